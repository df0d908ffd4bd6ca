"""Arguments: the gradient is right where a number, flag or word among the arguments is another.

A sample with alpha=1, dim=-1 or reduction="mean" hides a factor that is missing, a dimension that is fixed, a count
that is due to one reduction only. So does a default that the sample leaves as it is, or an attribute of a Module. What
changes nothing in forward is left in peace: a flag that detaches, a factor that reverses gradients; so is a forward
that is flat there: `hard=True` asks for a straight-through gradient.
"""

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts, same_outputs
from torchbp.verify.words import other_words

NAME = "arguments"
MOST = 4  # arguments alone, beside all real numbers at once and all others at once
EACH = 2  # other values of one, that forward takes
TRIED = 4  # calls for those
SIMPLE = (bool, int, float, str)

Values = dict[int | str, Any]  # by position in `flat`, by name, or by attribute of a Module


def _run(case: Case) -> Iterator[Finding]:
    given: Values = {i: x for i, x in case.others.items() if isinstance(x, SIMPLE)}
    values = {**given, **_defaults(case)}
    tested = False
    for some in _tries(case, values):
        accepted = 0
        for change in some:
            other = _with(case, change)
            if accepted >= EACH or not accepts(other) or same_outputs(case, other):
                continue
            accepted += 1
            tested = True
            when = " where " + " and ".join(
                f"{i if isinstance(i, str) else case.name_at[i]} is {x!r} instead of {values[i]!r}"
                for i, x in change.items()
            )
            found = check_lines(other, NAME, when)
            if found and found.expected != 0:
                yield found
                return
            if len(change) > 1:
                break
    if not tested:
        raise NotApplicable("no number, flag or word among the arguments that may be another")


def _tries(case: Case, values: Values) -> Iterator[list[Values]]:
    """Yield what to change: all real numbers, all else, each alone."""
    reals = {i: x for i, x in values.items() if isinstance(x, float)}
    others = {i: ys for i, x in values.items() if i not in reals and (ys := _others(case, x))}
    if reals:
        alone = [{i: _nearby(x)} for i, x in reals.items()] if len(reals) > 1 else []
        yield [{i: _nearby(x) for i, x in reals.items()}, *alone[:MOST]]
        yield [{i: -x for i, x in reals.items()}]
    if len(others) > 1:
        yield [{i: ys[0] for i, ys in others.items()}]
    for i, ys in islice(others.items(), MOST):
        yield [{i: y} for y in ys[:TRIED]]
    # Far more of what is counted: what is read at one ratio may be cut off at another.
    yield from ([{i: 4 * x}] for i, x in values.items() if type(x) is int and x > 1 and i in others)


def _nearby(x: float) -> float:
    return 0.5 * x + 0.125


def _defaults(case: Case) -> dict[str, Any]:
    """Return the numbers, flags and words that are defaults and not given, or attributes of a Module."""
    if isinstance(case.func, nn.Module):
        return {
            f"{prefix}.{name}" if prefix else name: x
            for prefix, module in case.func.named_modules()
            for name, x in vars(module).items()
            if isinstance(x, (bool, float, str)) and not name.startswith("_") and name != "training"
        }
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
        and isinstance(parameter.default, (*SIMPLE, tuple))
    }


def _with(case: Case, change: Mapping[int | str, Any]) -> Case:
    """Return the case with other arguments, or attributes."""
    other = case.replaced({i: x for i, x in change.items() if isinstance(i, int)})
    named = {i: x for i, x in change.items() if isinstance(i, str)}
    if isinstance(case.func, nn.Module):
        return other.with_attributes(named)
    if named:
        other.func = partial(case.func, **named)
    return other


def _others(case: Case, x: Any) -> list[Any]:
    """Return what to try instead of ``x``, in this order."""
    if isinstance(x, bool):
        return [not x]
    if isinstance(x, tuple):
        n = list(x)
        whole = len(n) > 1 and all(type(k) is int for k in n)
        return [(n[0] + 1, *n[1:]), (*n[:-1], n[-1] + 1)] if whole else []
    if isinstance(x, str):
        return other_words(x, case.func)
    integers = [t for _, t in case.arguments if t.dtype in (torch.int64, torch.int32) and t.numel()]
    if integers:
        # A number may be one of theirs: a blank, a class that is ignored. What is above all may be their count.
        most = max(int(t.max()) for t in integers)
        return [x + 1] if x > most else [int(integers[0].flatten()[0])] if x == -100 else []
    return [0, -2] if x == -1 else [x + 1, x - 1]


CHECK = Check(
    name=NAME,
    tests="the gradient is right with another number, flag or word among the arguments",
    run=_run,
    order=83,
    needs=("same values",),
    level="full",
    differences=True,
)
