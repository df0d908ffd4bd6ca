"""All elements of an input equal: they move together, no tie is broken, and their gradients add up to the slope.

A maximum whose backward gives the whole gradient to each of several equal elements gives their number times as much.
"""

from collections.abc import Iterator, Sequence

import torch

from torchbp.verify.cases import Case
from torchbp.verify.depends import elementwise
from torchbp.verify.differences import central
from torchbp.verify.lines import Lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts
from torchbp.verify.tensors import Directions
from torchbp.verify.tolerance import largest

__all__ = ["CAUSE", "selects", "where_all_equal"]

CAUSE = "each of several equal elements gets the whole gradient: share it, or give it to one"
SLACK = 1e-4  # of the gradients, all taken as positive
NOTHING = 1e-6  # of the sample's gradient, and
ROUNDING = 1e-11  # of grad_output: what is less is rounding, more of it where a variance is 0


def selects(case: Case, which: int) -> bool:
    """Whether the gradient at the sample looks like a selection's: 0 for a part of the elements."""
    g = case.plain.grads[which]
    zeros = int((g == 0).sum())
    return g.numel() / 4 <= zeros < g.numel() and which not in elementwise(case)


def where_all_equal(case: Case, chosen: Sequence[int], check: str) -> Iterator[Finding]:
    """Yield the leaves whose gradients do not add up to the slope where all their elements are equal."""
    if len(chosen) > 1 and _all_at_once(case, chosen):
        return
    for which in chosen:
        yield from _alone(case, which, check)


def _all_at_once(case: Case, chosen: Sequence[int]) -> bool:
    """Whether the gradients of all of them add up to the slope as they move, each at another pace."""
    made = _of_equal(case, chosen)
    if not made:
        return False
    lines, along = made
    along = {i: d * (1 + k / 2) for k, (i, d) in enumerate(along.items())}
    parts = {i: lines.grads[i].double().reshape(-1) * d for i, d in along.items()}
    slope = sum(float(p.sum()) for p in parts.values())
    slack = SLACK * max(float(p.abs().sum()) for p in parts.values())
    return abs(lines.value(along, lines.near) / lines.near - slope) <= slack


def _alone(case: Case, which: int, check: str) -> Iterator[Finding]:
    made = _of_equal(case, [which])
    if not made:
        return
    lines, along = made
    value = float(case.leaves[which].detach().flatten()[0])
    step = lines.near * abs(value)
    got = float(lines.grads[which].double().sum())
    nothing = NOTHING * largest(case.plain.grads[which])
    slack = SLACK * max(float(lines.grads[which].abs().sum()), nothing)
    slack += ROUNDING * max(map(largest, case.plain.cotangents))
    up = lines.value(along, lines.near)
    if abs(up / step - got) <= slack:
        return
    rise, bend = central(lambda t: up if t > 0 else lines.value(along, t), lines.near)
    expected = rise / abs(value)
    off = abs(expected - got)
    if not (off > slack and bend / abs(value) < 0.02 * off):
        return
    yield Finding(
        check=check,
        severity="wrong",
        input=case.names[which],
        got=got,
        expected=expected,
        message=f"grads of {case.names[which]}, where all its elements are {value:.4g}, add up to {got:.4g}; "
        f"expected {expected:.4g}, the slope as all move together",
        cause=CAUSE,
    )


def _of_equal(case: Case, chosen: Sequence[int]) -> tuple[Lines, Directions] | None:
    """Return lines through the case in which all elements of each chosen leaf are equal, and what moves them alike."""
    values = {i: float(case.leaves[i].detach().flatten()[0]) for i in chosen}
    new = {case.where[i]: torch.full_like(case.leaves[i], x) for i, x in values.items()}
    other = case.edited(new.get)
    if not all(values.values()) or not accepts(other):
        return None
    along = {
        i: torch.full((case.leaves[i].numel(),), abs(x), dtype=torch.float64, device="cpu")
        for i, x in values.items()
    }
    return Lines(other, elsewhere=True), along
