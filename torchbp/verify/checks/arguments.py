"""Arguments: the gradient is right where a number, flag or word among the arguments is another.

A sample with alpha=1, dim=-1 or reduction="mean" hides a factor that is missing, a dimension that is fixed, a count
that is due to one reduction only. So does a default that the sample leaves as it is. What changes nothing in forward is
left in peace: a flag that detaches, a factor that reverses gradients; so is a forward that is flat there: `hard=True`
asks for a straight-through gradient.
"""

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts

NAME = "arguments"
MOST = 3  # arguments, beside all real numbers at once
SIMPLE = (bool, int, float, str)
WORDS = (
    ("mean", "sum", "none"),
    ("zeros", "border", "reflection"),
    ("constant", "reflect", "replicate", "circular"),
    ("nearest", "linear", "bilinear", "trilinear"),
    ("none", "tanh"),
)


def _run(case: Case) -> Iterator[Finding]:
    given = {i: x for i, x in case.others.items() if isinstance(x, SIMPLE)}
    values: dict[int | str, Any] = {**given, **_defaults(case)}
    reals = {i: x for i, x in values.items() if isinstance(x, float)}
    # Beside integer inputs a number may be one of theirs: a blank, a class that is ignored.
    indexed = any(t.dtype == torch.int64 for _, t in case.arguments)
    discrete = {
        i: _others(x)
        for i, x in values.items()
        if i not in reals and (isinstance(x, (bool, str)) or not indexed)
    }
    tries = [[{i: 0.5 * x + 0.125 for i, x in reals.items()}]] if reals else []
    tries += [[{i: y} for y in others] for i, others in discrete.items() if others][:MOST]
    tested = False
    for changes in tries:
        for change in changes:
            other = _with(case, change)
            if not accepts(other) or _same(case, other):
                continue
            tested = True
            when = " where " + " and ".join(
                f"{i if isinstance(i, str) else case.name_at[i]} is {x!r} instead of {values[i]!r}"
                for i, x in change.items()
            )
            found = check_lines(other, NAME, when)
            if found and found.expected != 0:
                yield found
                return
            break
    if not tested:
        raise NotApplicable("no number, flag or word among the arguments that may be another")


def _defaults(case: Case) -> dict[str, Any]:
    """Return the numbers, flags and words that are arguments by default and not given; none of a Module's."""
    if isinstance(case.func, nn.Module):
        return {}
    try:
        signature = inspect.signature(case.func)
        bound = case.bound(signature)
    except (TypeError, ValueError):
        return {}  # without a signature, as built-in functions are, or called in another way
    return {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in bound.arguments
        and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY
        and isinstance(parameter.default, SIMPLE)
    }


def _with(case: Case, change: Mapping[int | str, Any]) -> Case:
    """Return the case with other arguments: at positions of ``flat``, and by name."""
    other = case.replaced({i: x for i, x in change.items() if isinstance(i, int)})
    named = {i: x for i, x in change.items() if isinstance(i, str)}
    if named:
        other.func = partial(case.func, **named)
    return other


def _others(x: Any) -> list[Any]:
    """Return what to try instead of ``x``, in this order."""
    if isinstance(x, bool):
        return [not x]
    if isinstance(x, int):
        return [0, -2] if x == -1 else [x + 1, x - 1]
    words = next((w for w in WORDS if x in w), ())
    return [w for w in words if w != x][:1] if isinstance(x, str) else []


def _same(case: Case, other: Case) -> bool:
    """Whether forward gives the same."""
    pairs = zip(case.all_outputs, other.all_outputs, strict=False)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


CHECK = Check(
    name=NAME,
    tests="the gradient is right with another number, flag or word among the arguments",
    run=_run,
    order=83,
    needs=("same values",),
    level="full",
    differences=True,
)
