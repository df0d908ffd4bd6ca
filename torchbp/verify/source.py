"""What the source of a function speaks of: what it takes on purpose, and not by chance."""

import functools
import inspect
import io
import re
import tokenize
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.autograd import Function

from torchbp.verify.cases import Case
from torchbp.verify.signatures import methods_of
from torchbp.verify.tensors import graph

__all__ = [
    "PROMISED",
    "bounds",
    "codes_of",
    "compared",
    "does",
    "functions",
    "lacking",
    "promised",
    "speaks",
]

PROMISED = "generate_vmap_rule promises a rule, and a tensor's value decides what is computed"
# What vmap says of a value that is read into Python.
READS = re.compile(r"data-dependent control flow|\.item\(\)|inplace arithmetic")

COMPARED = re.compile(r"[!=]= *(-?\d+(?:\.\d*)?)\b")
BOUND = re.compile(r"[<>]=? *(-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)\b")
BLANK = {tokenize.NL, tokenize.INDENT, tokenize.DEDENT}  # between statements
TRANSFORMS = re.compile(r"functorch|forward_ad|torch\.func\b|is_batched|is_dual")


def speaks(case: Case, of: re.Pattern[str]) -> bool:
    """Whether the function that was given, or an autograd.Function of which its outputs come, says so, or does so."""
    return any(of.search(_source(part)) for part in _parts(case))


def does(case: Case, of: re.Pattern[str]) -> bool:
    """Whether one of these does so: the same of their code alone, without comments and docstrings."""
    return any(of.search(_code(_source(part, docstring=False))) for part in _parts(case))


def compared(case: Case) -> list[float]:
    """Return the numbers that the function's source compares something with for equality."""
    found = [n for part in _parts(case) for n in COMPARED.findall(_source(part))]
    return list(dict.fromkeys(map(float, found)))


def bounds(case: Case) -> list[float]:
    """Return the numbers that the function's source says something is more or less than."""
    found = [n for part in _parts(case) for n in BOUND.findall(_source(part))]
    return list(dict.fromkeys(map(float, found)))


def lacking(case: Case, has: Callable[[type[Function]], bool]) -> str:
    """Return the name of an autograd.Function, of those behind the outputs, that ``has`` not what a transform asks for.

    Torch refuses it then, whatever is computed. Nothing where what is written beside them speaks of transforms: there
    another way may be taken.
    """
    lacks = [function.__name__ for function in functions(case) if not has(function)]
    if not lacks:
        return ""
    beside = {inspect.getmodule(part) for part in (case.func, *functions(case))}
    return "" if any(TRANSFORMS.search(_source(module)) for module in beside) else min(lacks)


def promised(case: Case, error: BaseException) -> bool:
    """Whether vmap refuses for a value that is read within a Function that torch was asked to make a rule of.

    What reads one before it calls the Function, to see whether it may, refuses by itself.
    """
    asked = [f for f in functions(case) if f.generate_vmap_rule]
    return bool(asked and READS.search(str(error))) and _went_through(error, asked)


def codes_of(functions: Iterable[type[Function]]) -> set[types.CodeType]:
    """Return the code of the methods of these."""
    return {x.__code__ for f in functions for c in f.__mro__ for x in methods_of(c)}


def _went_through(error: BaseException | None, functions: list[type[Function]]) -> bool:
    """Whether a method of one of these was being run as ``error``, or what it was raised from, was raised."""
    codes = codes_of(functions)
    while error is not None:
        if any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__)):
            return True
        error = error.__cause__
    return False


def functions(case: Case) -> set[type[Function]]:
    """Return the autograd.Functions behind the outputs."""
    nodes = graph(case.kept[1])
    return {n._forward_cls for n in nodes if hasattr(n, "_forward_cls")}  # noqa: SLF001  # from a node the only way


def _parts(case: Case) -> Iterator[Any]:
    """Yield the function, those it closes over, and the classes whose backward its outputs wait for."""
    module = case.func if isinstance(case.func, nn.Module) else None
    left: list[Any] = (
        [type(part) for part in module.modules()] if module is not None else [case.func]
    )
    for y in case.kept[1]:
        left += getattr(getattr(y.grad_fn, "_forward_cls", None), "__mro__", ())
    seen: set[int] = set()
    while left:
        part = left.pop(0)
        if id(part) not in seen:
            seen.add(id(part))
            yield part
            left += _closed_over(part)


def _closed_over(part: Any) -> Iterator[Any]:
    """Yield the functions that a function closes over, or one of a class's methods."""
    own = [getattr(part, "__wrapped__", None), part]
    for method in methods_of(part) if inspect.isclass(part) else filter(inspect.isfunction, own):
        yield method
        cells = [cell for cell in method.__closure__ or () if _is_filled(cell)]
        yield from (c.cell_contents for c in cells if inspect.isfunction(c.cell_contents))


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _source(part: Any, *, docstring: bool = True) -> str:
    """Return what is written of a function, a module, or a class: its name, its docstring and its methods.

    `inspect` reads the whole file to find a class: a tenth of a second and more.
    """
    named = "__name__" if inspect.ismodule(part) else "__module__"
    module = getattr(part, named, None) or ""  # None: Function.apply in torch 2.14
    if module.startswith("torch."):
        return ""
    if inspect.isclass(part):
        written = [_source(x) for x in methods_of(part)]
        said = [part.__doc__ or ""] if docstring else []
        return "\n".join([part.__qualname__, *said, *written])
    try:
        return inspect.getsource(part)
    except (OSError, TypeError):
        return ""


@functools.lru_cache(maxsize=256)
def _code(source: str) -> str:
    """Return a source without its comments, and without the strings that are statements."""
    lines = source.splitlines(keepends=True)
    spans: list[tuple[tuple[int, int], tuple[int, int]]] = []
    begins = True  # a statement
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and begins):
                spans.append((token.start, token.end))
            elif token.type not in BLANK:
                begins = token.type == tokenize.NEWLINE
    except (tokenize.TokenError, SyntaxError):  # of a lambda, which is a part of its lines
        pass
    for (first, start), (last, end) in reversed(spans):
        lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:]]
    return "".join(lines)
