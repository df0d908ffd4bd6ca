"""The numbers, flags and words that a function takes beside its tensors: what they are, what else they may be."""

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from torchbp.verify.cases import Case
from torchbp.verify.signatures import function_of, signature_of
from torchbp.verify.source import speaks
from torchbp.verify.words import other_words

__all__ = ["NEVER_NEGATIVE", "SIMPLE", "Values", "nearby", "options", "others", "with_options"]

SIMPLE = (bool, int, float, str)

# In the name of an argument.
NEVER_NEGATIVE = re.compile(
    "clip|decay|delta|drop|eps|keep|limit|margin|max|prob|radius|rate|ratio|sigma|size|smooth|std|tau|temp|tol|width"
)

# Attributes of a Module: its state, and what asks torch's embedding for another gradient on purpose.
NO_OPTIONS = ("training", "scale_grad_by_freq", "sparse")

ATTRIBUTES = "attributes of the Module that may be others"

INDEX = re.compile("blank|class|count|dim|id|ignore|index|num|pad|size|start|token")

Values = dict[int | str, Any]  # by position in `flat`, by name, or by attribute of a Module


def options(case: Case) -> Values:
    """Return the numbers, flags and words given, those that are defaults, and a Module's attributes."""
    return {**{i: x for i, x in case.others.items() if isinstance(x, SIMPLE)}, **_defaults(case)}


def _defaults(case: Case) -> dict[str, Any]:
    """Return the numbers, flags and words that are defaults and not given, or attributes of a Module."""
    module = case.func if isinstance(case.func, nn.Module) else None
    attributes = _attributes(case) if module is not None else {}
    try:
        signature = signature_of(case.func)
        bound = case.bound(signature)
    except (TypeError, ValueError):
        return (
            attributes  # without a signature, as built-in functions are, or called in another way
        )
    return attributes | {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in bound.arguments
        and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY
        and isinstance(parameter.default, (*SIMPLE, tuple))
        and name not in attributes
    }


def _attributes(case: Case) -> dict[str, Any]:
    """Return the attributes of a Module and of its parts; of torch's own layers in it what the others speak of."""
    assert isinstance(case.func, nn.Module)

    @cache  # a network has many layers, and few names
    def spoken_of(name: str) -> bool:
        return speaks(case, re.compile(rf"\.{name}\b"))

    if ATTRIBUTES not in case.given.memo:
        case.given.memo[ATTRIBUTES] = {
            path: x
            for path, x, torchs in _all_attributes(case.func)
            if not torchs or spoken_of(path.rpartition(".")[2])
        }
    return case.given.memo[ATTRIBUTES]


def _all_attributes(module: nn.Module) -> Iterator[tuple[str, Any, bool]]:
    """Yield name and value of each, and whether it is that of a layer of torch's own in another Module."""
    return (
        (f"{prefix}.{name}" if prefix else name, x, bool(prefix) and _is_torchs(part))
        for prefix, part in module.named_modules()
        for name, x in vars(part).items()
        if isinstance(x, (bool, float, str)) and not name.startswith("_") and name not in NO_OPTIONS
        # What may be written over is for the Module around it to know.
        if not (prefix and name == "inplace")
    )


def _is_torchs(part: nn.Module) -> bool:
    return type(part).__module__.startswith("torch.nn.")


def with_options(case: Case, change: Mapping[int | str, Any]) -> Case:
    """Return the case with other arguments, or attributes."""
    other = case.replaced({i: x for i, x in change.items() if isinstance(i, int)})
    named = {i: x for i, x in change.items() if isinstance(i, str)}
    if isinstance(case.func, nn.Module):
        attributes = _attributes(case)
        other = other.with_attributes({n: x for n, x in named.items() if n in attributes})
        for name, x in named.items():
            if name not in attributes:
                other = other.with_argument(name, x)
    elif named and (order := _by_place(case)):
        for name in sorted(
            named, key=order.index, reverse=True
        ):  # the last one takes those before it along
            at = f"argument {name}"
            if at in other.name_at:
                other = other.replaced({other.name_at.index(at): named[name]})
            else:
                other = other.with_argument(name, named[name])
    elif named:
        other.func = partial(case.func, **named)
    return other


def _by_place(case: Case) -> list[str]:
    """Return the names of the arguments, in order, of a function that takes none by its name."""
    return list(signature_of(case.func).parameters) if function_of(case.func) else []


def others(case: Case, x: Any, name: str = "") -> list[Any]:
    """Return what to try instead of ``x``, in this order; ``name`` is that of the argument, if it has one."""
    if isinstance(x, bool):
        return [not x]
    if isinstance(x, tuple):
        return _other_tuples(x)
    if isinstance(x, str):
        return other_words(x, case.func)
    integers = [t for _, t in case.arguments if t.dtype in (torch.int64, torch.int32) and t.numel()]
    if integers:
        # A number may be one of theirs: a blank, a class that is ignored. What is above all may be their count.
        most = max(int(t.max()) for t in integers)
        if name and x in {-1, 0, 1} and not INDEX.search(name):
            return [n for n in (-1, 1, 0) if n != x]  # a sign
        return [x + 1] if x > most else [int(integers[0].flatten()[0])] if x == -100 else []
    return _other_numbers(x, name)


def _other_numbers(x: int, name: str) -> list[Any]:
    """Return the whole numbers beside ``x``, 0, and what counts in the other direction, if ``x`` is a shift."""
    if x in (0, -1):
        return [1, -1] if x == 0 else [0, -2]
    shifts = x > 0 and not (NEVER_NEGATIVE.search(name) or INDEX.search(name))
    return list(dict.fromkeys([x + 1, *([-x] if shifts else []), x - 1, 0]))


def _other_tuples(x: tuple[Any, ...]) -> list[Any]:
    """Return a tuple of numbers with another for its first, and for its last: what is equal is so no more."""
    kinds = [type(n) for n in x]
    if not set(kinds) <= {int, float} or kinds in ([], [int]):
        return []  # one whole number alone is a dimension, or a size
    other = [nearby(n) if type(n) is float else n + 1 for n in x]
    return list(dict.fromkeys([(other[0], *x[1:]), (*x[:-1], other[-1])]))


def nearby(x: float) -> float:
    """Return a real number to try instead of ``x``."""
    return 0.5 * x + 0.125
