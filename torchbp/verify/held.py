"""What a call of a function may change beside its tensors: the Modules and the random generators that it reaches."""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.autograd import Function

from torchbp.verify.signatures import holdings

__all__ = ["held"]


def held(*given: Any) -> Iterator[Any]:
    """Yield what functions are methods of, close over, have for an argument, or name, whatever it is; no copy is made.

    Functions of the same package that are named, and what Modules have for attributes, are looked into, too.
    """
    left = [*given, *(v for x in given for v in _attributes(x))]
    seen: dict[int, Any] = {}  # kept, so that no id is another's
    while left:
        x = left.pop()
        if id(x) not in seen:
            seen[id(x)] = x
            yield x
            left += _parts(x)


def _parts(x: Any) -> list[Any]:
    if isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    if isinstance(x, nn.Module):
        attributes = [v for part in x.modules() for v in vars(part).values()]
        return [type(x), *(v for v in attributes if not isinstance(v, dict))]
    if inspect.ismethod(x):
        return [x.__self__, x.__func__, *_attributes(x.__self__)]
    if inspect.isfunction(x):
        return [*_named(x), getattr(x, "__wrapped__", None)]
    if inspect.isclass(x) and issubclass(x, (Function, nn.Module)) and _package(x) != "torch":
        return holdings(x)
    return []


def _attributes(x: Any) -> list[Any]:
    """Return those of an object that is called, or has a method called, and what its class does then."""
    if inspect.isclass(x) or isinstance(x, nn.Module):
        return []
    return [*getattr(x, "__dict__", {}).values(), inspect.getattr_static(type(x), "__call__", None)]


def _named(function: Any) -> list[Any]:
    """Return what a function closes over, and the globals that it names: functions and classes of its package only."""
    package = _package(function)
    if package == "torch":
        return []
    try:
        seen = inspect.getclosurevars(function)
    except ValueError:  # of a variable that has no value yet
        return []
    named = seen.globals.values()
    ours = [x for x in named if not hasattr(x, "__qualname__") or _package(x) == package]
    return [*seen.nonlocals.values(), *ours]


def _package(x: Any) -> str:
    return (getattr(x, "__module__", None) or "").partition(".")[0]
