"""An elementwise formula of Python, written down as C++: it is run once, on symbols that note what is done to them.

So the formula stands in one place, its op's file, and is what a kernel computes: in float32, with the accurate
functions of CUDA or of ``kernels/math.h``, NaN kept as torch keeps it. Products may be fused with sums.
"""

import math
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from torchbp.ops._apart import Apart, with_apart
from torchbp.ops._function import formula_only

__all__ = ["Symbol", "source", "steps"]

_one_at_a_time = threading.Lock()
_INFINITY = "T(__int_as_float(0x7f800000))"


def source(name: str, formula: Callable[..., Any], count: int) -> str | None:
    """Return ``formula`` of ``count`` tensors as a function template ``name``; ``None`` where a step has no rule."""
    noted = steps(formula, count)
    if noted is None or len(noted[1]) > 1:
        return None
    lines, (value,), _ = noted
    taken = ", ".join(f"T a{i}" for i in range(count))
    return f"template <typename T> T {name}({taken}) {{ {' '.join(lines)} return {value}; }}"


def steps(
    formula: Callable[..., Any], count: int, *, loop: bool = False
) -> tuple[list[str], tuple[str, ...], tuple[float, ...]] | None:
    """Return the lines of ``formula`` of ``a0``, ``a1``, ..., the names of its values, and the numbers it closes over.

    Args:
        formula: Elementwise; its value is one tensor or a tuple of them.
        count: Of tensors.
        loop: Whether it is for ``kernels/``: a number that the formula closes over, or is partial in, then becomes
            ``c0``, ``c1``, ..., and the same lines serve all of them. Else the numbers are written into the lines.

    Returns:
        ``None`` where a step has no rule.
    """
    lines = Lines(_RULES | _LOOP_RULES if loop else _RULES, _BELOW_0 if loop else {})
    symbols = [Symbol(f"a{i}", lines) for i in range(count)]
    try:
        with _one_at_a_time, formula_only():  # backward has a thread for each device
            made = (with_apart(formula) if loop else formula)(*symbols)
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError):
        return None
    values = made if isinstance(made, tuple) else (made,)
    if not all(isinstance(value, Symbol) for value in values):
        return None
    return lines, tuple(map(str, values)), tuple(lines.numbers)


class Lines(list[str]):
    """What has been noted, by which rules, those for what is not above 0, and the numbers that go with it."""

    def __init__(
        self, rules: Mapping[str, Callable[..., str]], below_0: Mapping[str, Callable[..., str]]
    ) -> None:
        self.rules, self.below_0 = rules, below_0
        self.signs: dict[str | None, int] = {}  # 1: at least 0, or NaN; -1: at most
        self.numbers: list[float] = []


class Symbol:
    """Stands for an element of a float32 tensor, as on a GPU; what is done to it becomes a line."""

    dtype = torch.float32
    is_cpu = False
    is_cuda = True

    def __init__(self, name: str, lines: "Lines") -> None:
        self._name, self._lines = name, lines

    def __str__(self) -> str:
        return self._name

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> "Symbol":
        return _step(function.__name__, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Callable[..., "Symbol"]:
        if name not in self._lines.rules:
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
    if name == "pow" and isinstance(args[1], Apart):  # a product, for 2
        args = (args[0], float(args[1]))
    operands = [_operand(a, lines) for a in args]
    named = {k: _operand(v, lines) for k, v in kwargs.items()}
    rule = lines.rules[name]
    if name in lines.below_0 and len(operands) == 1 and not named and _sign(args[0], lines) < 0:
        rule = lines.below_0[name]
    value = rule(*operands, **named)
    symbol = Symbol(f"t{len(lines)}", lines)
    lines.signs[str(symbol)] = _sign_of_step(name, args, kwargs, lines)
    lines.append(f"const {'bool' if name in _TRUTHS else 'T'} {symbol} = {value};")
    return symbol


def _sign(value: Any, lines: Lines) -> int:
    """Return 1 where ``value`` is known to be at least 0, -1 where at most 0, else 0; of one loop's numbers none is."""
    if isinstance(value, Symbol):
        return lines.signs.get(str(value), 0)
    if isinstance(value, Apart) or not isinstance(value, (int, float)):
        return 0
    return 1 if value > 0 else -1 if value < 0 else 0


def _sign_of_step(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], lines: Lines) -> int:
    if name in _NOT_NEGATIVE or (name == "mul" and args[0] is args[1]):
        return 1
    if name == "neg":
        return -_sign(args[0], lines)
    if name == "mul":
        return _sign(args[0], lines) * _sign(args[1], lines)
    if name == "clamp" and kwargs.keys() == {"max"}:
        most = kwargs["max"]
        return -1 if not isinstance(most, (Apart, Symbol)) and most <= 0 else 0
    return 0


def _operand(value: Any, lines: Lines) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Symbol):
        return str(value)
    if not isinstance(value, (int, float)) or math.isnan(value):
        message = (
            f"expected a symbol or a number, got {type(value).__name__}; a tensor is an argument"
        )
        raise TypeError(message)
    if isinstance(value, Apart):
        for i, known in enumerate(lines.numbers):
            if known is value:  # and not one that happens to be as large
                return f"c{i}"
        lines.numbers.append(value)
        return f"c{len(lines.numbers) - 1}"
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


def _softplus_in_loop(x: str, beta: str = "T(1)", threshold: str = "T(20)") -> str:
    z = x if beta == "T(1)" else f"({beta} * {x})"
    value = f"(({z} < T(0) ? T(0) : {z}) + log1p_exp(-fabs({z})))"
    return f"{z} > {threshold} ? {x} : {value if beta == 'T(1)' else f'{value} / {beta}'}"


def _huber(x: str, t: str, _: str, delta: str) -> str:
    d = f"fabs({x} - {t})"
    return f"{d} <= {delta} ? T(0.5) * {d} * {d} : {delta} * ({d} - T(0.5) * {delta})"


def _power(x: str, p: str) -> str:
    return f"{x} * {x}" if p == "T(2.0)" else f"pow({x}, {p})"


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
    "pow": _power,
    "reciprocal": lambda x: f"T(1) / {x}",
    "relu": lambda x: _clamp(x, "T(0)"),
    "sigmoid": lambda x: f"T(1) / (T(1) + exp(-{x}))",
    "sign": lambda x: f"T({x} > T(0)) - T({x} < T(0))",
    "softplus": _softplus,
    "square": lambda x: f"{x} * {x}",
    "sub": _sum("-"),
    "where": lambda mask, a, b: f"{mask} ? {a} : {b}",
}
# what has no name of torch's is of kernels/math/soft.h
_LOOP_RULES: dict[str, Callable[..., str]] = {
    "bfloat16": lambda x: f"rounded_to_bfloat16({x})",
    "log_sigmoid": lambda x: f"({x} < T(0) ? {x} : T(0)) - log1p_exp(-fabs({x}))",
    "softplus": _softplus_in_loop,
    "sigmoid": lambda x: f"sigmoid({x})",
    "special_erfcx": lambda x: f"erfcx({x})",  # of x >= 0
}
# In loops, of what is known to be at most 0, or NaN.
_BELOW_0: dict[str, Callable[..., str]] = {
    "exp": lambda x: f"exp_below_0({x})",
    "expm1": lambda x: f"expm1_below_0({x})",
    "softplus": lambda x: f"log1p_exp({x})",
}
_NOT_NEGATIVE = {"abs", "exp", "relu", "sigmoid", "sqrt", "square"}
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
