"""An elementwise formula of Python, written down as CUDA: it is run once, on symbols that note what is done to them.

So the formula stands in one place, its op's file, and is what the kernel computes: in float32, with the accurate
functions of CUDA, NaN kept as torch keeps it. Products may be fused with sums.
"""

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from torchbp.ops._function import formula_only

__all__ = ["Symbol", "source"]

_one_at_a_time = threading.Lock()
_INFINITY = "T(__int_as_float(0x7f800000))"


def source(name: str, formula: Callable[..., Any], count: int) -> str | None:
    """Return ``formula`` of ``count`` tensors as a function template ``name``; ``None`` where a step has no rule."""
    lines: list[str] = []
    symbols = [Symbol(f"a{i}", lines) for i in range(count)]
    try:
        with _one_at_a_time, formula_only():  # backward has a thread for each device
            value = formula(*symbols)
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError):
        return None
    if not isinstance(value, Symbol):
        return None
    taken = ", ".join(f"T {s}" for s in symbols)
    return f"template <typename T> T {name}({taken}) {{ {' '.join(lines)} return {value}; }}"


class Symbol:
    """Stands for an element of a float32 tensor on a GPU; what is done to it becomes a line of CUDA."""

    dtype = torch.float32
    is_cpu = False
    is_cuda = True

    def __init__(self, name: str, lines: list[str]) -> None:
        self._name, self._lines = name, lines

    def __str__(self) -> str:
        return self._name

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> "Symbol":
        return _step(function.__name__, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Callable[..., "Symbol"]:
        if name not in _RULES:
            raise AttributeError(name)
        return partial(_step, name, self)

    def __bool__(self) -> bool:
        message = "Symbol: expected no choice by values, got one; it stands for all of them"
        raise TypeError(message)

    def is_complex(self) -> bool:
        return False

    def is_floating_point(self) -> bool:
        return True


def _step(name: str, *args: Any, **kwargs: Any) -> Symbol:
    lines = next(a._lines for a in args if isinstance(a, Symbol))
    value = _RULES[name](*map(_operand, args), **{k: _operand(v) for k, v in kwargs.items()})
    symbol = Symbol(f"t{len(lines)}", lines)
    lines.append(f"const {'bool' if name in _TRUTHS else 'T'} {symbol} = {value};")
    return symbol


def _operand(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Symbol):
        return str(value)
    if not isinstance(value, (int, float)) or math.isnan(value):
        message = (
            f"expected a symbol or a number, got {type(value).__name__}; a tensor is an argument"
        )
        raise TypeError(message)
    if math.isinf(value):
        return _INFINITY if value > 0 else "-" + _INFINITY
    return f"T({float(value)!r})"


def _clamp(x: str, min: str | None = None, max: str | None = None, **_: str) -> str:
    # of NaN no comparison holds: it stays
    above = f"({x} < {min} ? {min} : {x})" if min else x
    return f"({x} > {max} ? {max} : {above})" if max else above


def _sum(sign: str) -> Callable[..., str]:
    return lambda a, b, alpha=None: f"{a} {sign} {alpha + ' * ' if alpha else ''}{b}"


def _softplus(x: str, beta: str = "T(1)", threshold: str = "T(20)") -> str:
    return f"{beta} * {x} > {threshold} ? {x} : log1p(exp({beta} * {x})) / {beta}"


def _huber(x: str, t: str, _: str, delta: str) -> str:
    d = f"fabs({x} - {t})"
    return f"{d} <= {delta} ? T(0.5) * {d} * {d} : {delta} * ({d} - T(0.5) * {delta})"


def _same(x: str) -> str:
    return x


_FUNCTIONS = "exp exp2 expm1 log log1p log2 sqrt tanh erf erfc cosh sinh atan"
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_PRODUCTS = {"mul": "*", "div": "/", "logical_and": "&&", "logical_or": "||"}
_TRUTHS = {*_COMPARISONS, "logical_and", "logical_or", "logical_not", "isinf", "isnan"}
_RULES: dict[str, Callable[..., str]] = {
    **{f: (lambda x, f=f: f"{f}({x})") for f in _FUNCTIONS.split()},
    **{f: (lambda a, b, s=s: f"{a} {s} {b}") for f, s in {**_COMPARISONS, **_PRODUCTS}.items()},
    "abs": lambda x: f"fabs({x})",
    "add": _sum("+"),
    "addcmul": lambda x, a, b, value="T(1)": f"{x} + {value} * {a} * {b}",
    "clamp": _clamp,
    "conj": _same,
    "contiguous": _same,
    "detach": _same,
    "float": _same,
    "hardtanh": lambda x, min_val, max_val, **_: _clamp(x, min_val, max_val),
    "huber_loss": _huber,
    "isinf": lambda x: f"fabs({x}) == {_INFINITY}",
    "isnan": lambda x: f"{x} != {x}",
    "log_sigmoid": lambda x: f"({x} < T(0) ? {x} : T(0)) - log1p(exp(-fabs({x})))",
    "logical_not": lambda x: f"!{x}",
    "masked_fill": lambda x, mask, value: f"{mask} ? {value} : {x}",
    "mse_loss": lambda x, t, **_: f"({x} - {t}) * ({x} - {t})",
    "neg": lambda x: f"-{x}",
    "pow": lambda x, p: f"pow({x}, {p})",
    "reciprocal": lambda x: f"T(1) / {x}",
    "relu": lambda x: _clamp(x, "T(0)"),
    "sigmoid": lambda x: f"T(1) / (T(1) + exp(-{x}))",
    "sign": lambda x: f"T({x} > T(0)) - T({x} < T(0))",
    "softplus": _softplus,
    "square": lambda x: f"{x} * {x}",
    "sub": _sum("-"),
    "where": lambda mask, a, b: f"{mask} ? {a} : {b}",
}
_OPERATORS = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "truediv": "div",
    "pow": "pow",
    "and": "logical_and",
    "or": "logical_or",
    "neg": "neg",
    "abs": "abs",
    "invert": "logical_not",
    **{name: name for name in _COMPARISONS},
}


def _give_operators() -> None:
    for operator, rule in _OPERATORS.items():
        setattr(Symbol, f"__{operator}__", lambda *operands, rule=rule: _step(rule, *operands))
    for operator in ("add", "sub", "mul", "truediv", "pow"):
        rule = _OPERATORS[operator]
        setattr(Symbol, f"__r{operator}__", lambda a, b, rule=rule: _step(rule, b, a))


_give_operators()
