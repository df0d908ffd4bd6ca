"""What the source of a function speaks of: what it takes on purpose, and not by chance."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torchbp.verify.cases import Case

__all__ = ["speaks"]


def speaks(case: Case, of: re.Pattern[str]) -> bool:
    """Whether the function that was given, or an autograd.Function of which its outputs come, says so, or does so."""
    return any(of.search(_source(part)) for part in _parts(case))


def _parts(case: Case) -> Iterator[Any]:
    """Yield the function and the classes whose backward its outputs wait for."""
    yield case.func
    for y in case.kept[1]:
        yield from getattr(getattr(y.grad_fn, "_forward_cls", None), "__mro__", ())


def _source(part: Any) -> str:
    module = getattr(part, "__module__", None) or ""  # None: Function.apply in torch 2.14
    if module.startswith("torch."):
        return ""
    try:
        return inspect.getsource(part)
    except (OSError, TypeError):
        return ""
