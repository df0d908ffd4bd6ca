"""What the source of a function speaks of: what it takes on purpose, and not by chance."""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.autograd import Function

from torchbp.verify.cases import Case
from torchbp.verify.tensors import graph

__all__ = ["functions", "lacking", "speaks"]

TRANSFORMS = re.compile(r"functorch|forward_ad|torch\.func\b|is_batched|is_dual")


def speaks(case: Case, of: re.Pattern[str]) -> bool:
    """Whether the function that was given, or an autograd.Function of which its outputs come, says so, or does so."""
    return any(of.search(_source(part)) for part in _parts(case))


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


def functions(case: Case) -> set[type[Function]]:
    """Return the autograd.Functions behind the outputs."""
    nodes = graph(case.kept[1])
    return {n._forward_cls for n in nodes if hasattr(n, "_forward_cls")}  # noqa: SLF001  # from a node the only way


def _parts(case: Case) -> Iterator[Any]:
    """Yield the function, those it closes over, and the classes whose backward its outputs wait for."""
    yield case.func
    if isinstance(case.func, nn.Module):
        yield from {type(part) for part in case.func.modules()}
    if inspect.isfunction(case.func):
        closed = inspect.getclosurevars(inspect.unwrap(case.func)).nonlocals.values()
        yield from filter(inspect.isfunction, closed)
    for y in case.kept[1]:
        yield from getattr(getattr(y.grad_fn, "_forward_cls", None), "__mro__", ())


def _source(part: Any) -> str:
    """Return what is written of a function, a module, or a class: its name, its docstring and its methods.

    `inspect` reads the whole file to find a class: a tenth of a second and more.
    """
    named = "__name__" if inspect.ismodule(part) else "__module__"
    module = getattr(part, named, None) or ""  # None: Function.apply in torch 2.14
    if module.startswith("torch."):
        return ""
    if inspect.isclass(part):
        methods = [getattr(x, "__func__", x) for x in vars(part).values()]
        written = [_source(x) for x in methods if inspect.isfunction(x)]
        return "\n".join([part.__qualname__, part.__doc__ or "", *written])
    try:
        return inspect.getsource(part)
    except (OSError, TypeError):
        return ""
