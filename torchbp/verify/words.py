"""Words a function knows: the other values of an argument like reduction="mean"."""

import inspect
import re
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from torch.autograd import Function

__all__ = ["other_words"]

DEEP = 3  # functions that call one another
WORD = re.compile(r"[a-z][a-z0-9_-]{1,15}")
QUOTED = re.compile(rf"[\"'`]({WORD.pattern})[\"'`]")
KNOWN = (
    ("mean", "sum", "none", "batchmean"),
    ("zeros", "border", "reflection"),
    ("constant", "reflect", "replicate", "circular"),
    ("nearest", "linear", "bilinear", "trilinear", "bicubic"),
    ("none", "tanh"),
    ("same", "valid", "full"),
    ("relu", "tanh", "gelu", "sigmoid"),
    ("sum", "mean", "max", "min", "prod"),
)


def other_words(word: str, func: Callable[..., Any]) -> list[str]:
    """Return what may be passed to ``func`` instead of ``word``: what its code names, and what is usual."""
    groups = list(_constants(func, DEEP))
    named = [w for group in groups for w in group]
    beside = [w for group in groups if word in group for w in group]  # in a list, or a message
    usual = [w for group in KNOWN if word in group for w in group]
    both = [w for w in usual if w in named]
    return [w for w in dict.fromkeys([*beside, *both, *usual, *named]) if w != word]


def _constants(func: Any, deep: int) -> Iterator[list[str]]:
    """Yield the words in the code of a function, of a Function's methods, and of what they refer to.

    Those that stand together, in a tuple or in quotation marks in one text, come together.
    """
    func = getattr(func, "func", func)  # of a partial
    owner = getattr(func, "__self__", func)  # of `apply`
    if isinstance(owner, type) and issubclass(owner, Function):
        for name in ("forward", "setup_context", "backward"):
            yield from _constants(getattr(owner, name), deep)
        return
    if isinstance(func, nn.Module):
        func = type(func).forward
    if not isinstance(func, FunctionType) or (func.__module__ or "").startswith("torch."):
        return
    yield from _in_code(func.__code__)
    used = [func.__globals__.get(name) for name in func.__code__.co_names]
    for f in (*used, *inspect.getclosurevars(func).nonlocals.values()) if deep else ():
        yield from _constants(f, deep - 1)


def _in_code(code: CodeType) -> Iterator[list[str]]:
    for x in code.co_consts:
        if isinstance(x, CodeType):
            yield from _in_code(x)
        elif isinstance(x, (tuple, frozenset)):
            yield sorted(y for y in x if isinstance(y, str) and WORD.fullmatch(y))
        elif isinstance(x, str):
            yield [x] if WORD.fullmatch(x) else QUOTED.findall(x)
