"""Extremes: where forward is finite and smooth, so is the gradient: large inputs, all zero, one 0, one 1."""

import math
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.checks.degenerate import EVERY
from torchbp.verify.depends import elementwise
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.finite import not_finite, not_finite_at
from torchbp.verify.lines import STEP, Lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import (
    LARGE,
    accepts,
    scaled,
    with_ones,
    with_zero,
    with_zeros,
    within_limits,
)
from torchbp.verify.smooth import DECOMPOSED
from torchbp.verify.source import speaks
from torchbp.verify.tensors import is_square, real, scale_of
from torchbp.verify.tolerance import largest

NAME = "extremes"


SAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    f"{LARGE:g} times as large": lambda t: t * LARGE,
    "all zero": torch.zeros_like,
}
LESS = 2.0**8  # times, where LARGE is refused
TINY = 2.0**-40
SWALLOWS = (
    2.0**60
)  # of matrices: a 1 that keeps differences of eigenvalues from 0 is lost beside these
STEEP = 1e12  # times as large gradients as the sample's
# Of the sample, perhaps, beside which something is nothing.
LARGEST = re.compile(r"\b(a?max|a?min)\(")
SHORT = 2.0**-14  # step
SIDES = 4.0  # times as far on one side of 0 as on the other


class Extreme(NamedTuple):
    """The case at an extreme: ``when`` says at which, ``also`` is asked there beside whether gradients are finite."""

    case: Case
    when: str
    also: Callable[[Case], Finding | None] = lambda _: None
    kinks: bool = False  # whether forward may have a kink there


def _run(case: Case) -> Iterator[Finding]:
    inputs = _inputs(case)
    by_element = len(elementwise(case)) == len(case.leaves)
    tested = _is_known(case)
    for text, change in [*SAMPLES.items()][tested:]:
        zero = "zero" in text
        if zero and (len(inputs) <= (1 if by_element else 2) or case.memo.get(EVERY)):
            continue  # see `degenerate` and `edges`
        # All inputs as large: a sample that `scales` has too.
        every = _changed(case, inputs, change) if zero else scaled(case, LARGE, inputs)
        if len(inputs) > 1 and accepts(every) and _finite(every):
            tested = True
            continue  # each alone leaves no question
        for which in inputs:
            other, said = _alone(case, which, text, change) if len(inputs) > 1 else (every, text)
            if not accepts(other):
                continue
            tested = True
            when = f" where {case.names[which]} is {said}"
            found = not_finite(other, NAME, when)
            if found:
                yield found
                return
    for extreme in _extremes(case, by_element):
        tested = True
        found = not_finite(extreme.case, NAME, extreme.when, kinks=extreme.kinks)
        if found := found or extreme.also(extreme.case):
            yield found
            return
    if not tested:
        raise NotApplicable("forward is finite at no extreme")


def _alone(
    case: Case, which: int, text: str, change: Callable[[Tensor], Tensor]
) -> tuple[Case, str]:
    """Return the case with one input changed, and how: less so, where it may not be as large."""
    if change is torch.zeros_like:  # a sample that `degenerate` has too
        return with_zero(case, case.where[which]), text
    other = _changed(case, [which], change)
    if accepts(other):
        return other, text
    return _changed(case, [which], lambda t: t * LESS), f"{LESS:g} times as large"


def _inputs(case: Case) -> list[int]:
    """Return which leaves are real arguments."""
    return [
        i
        for i, (name, leaf) in enumerate(zip(case.names, case.leaves, strict=True))
        if not leaf.is_complex() and leaf.numel() and not name.startswith("parameter")
    ]


def _is_known(case: Case) -> bool:
    """Whether inputs as large, negated, were right at another size, and negating leaves their range about as it is."""
    return -LARGE in case.memo.get("scaled", ()) and all(
        leaf.is_complex() or _is_balanced(leaf)
        for k, leaf in zip(case.where, case.leaves, strict=True)
        if k < case.size
    )


def _is_balanced(t: Tensor) -> bool:
    """Whether ``t`` has one sign, which then stays, or is about as large on both sides of 0."""
    if not t.numel():
        return True
    low, high = -float(t.min()), float(t.max())
    return not (low > 0 and high > 0) or max(low, high) < SIDES * min(low, high)


def _extremes(case: Case, by_element: bool) -> Iterator[Extreme]:
    """Yield the case with inputs as large as a limit allows, or one element 0 or 1."""
    factor, limited = within_limits(case)
    if limited:
        yield Extreme(limited, f" for inputs {factor:g} times as large")
    if any(map(is_square, case.leaves)) and speaks(case, DECOMPOSED):
        swallowed = scaled(case, SWALLOWS)
        if accepts(swallowed):
            yield Extreme(swallowed, f" for inputs {SWALLOWS:.1g} times as large")
    if by_element:  # see `edges`
        yield from _tiny(case) if speaks(case, LARGEST) else ()
        return
    zero, one = with_zeros(case), with_ones(case)
    if zero is not case and accepts(zero):
        steepest = max(map(largest, case.plain.grads))
        slope = partial(_slope_at_zero, steepest=steepest)
        yield Extreme(zero, " where one element is 0", slope, kinks=True)
    elif zero is not case:
        yield from _tiny(case)
    if one is not case and accepts(one):
        yield Extreme(one, " where one element is 1", _beside_ones)


def _tiny(case: Case) -> Iterator[Extreme]:
    """Yield the case with one element close to 0, where 0 is refused: what lies below a floor."""
    other = with_zeros(case, TINY)
    if accepts(other):
        # A step is a part of what an element holds, not of what is typical.
        other.memo["steps"] = [
            torch.minimum(scale_of(leaf.cpu()), real(leaf).cpu().abs() + sys.float_info.min)
            for leaf in other.leaves
        ]
        when = f" where one element is {TINY:g} times as large"
        yield Extreme(other, when, lambda there: check_lines(there, NAME, when, beyond=False))


def _beside_ones(one: Case) -> Finding | None:
    """Compare the gradient of the others where every other element of the last row is 1: products of 1 - p are 0 then.

    What is 1 stays so: it may be the end of the domain.
    """
    where = [i for i, t in zip(one.where, one.leaves, strict=True) if i < one.size and _has_one(t)]

    def with_several(t: Tensor) -> Tensor:
        rows = t.clone().reshape(-1, t.shape[-1])
        rows[-1, ::2] = 1
        return rows.view(t.shape)

    other = one.edited(lambda i, t: with_several(t) if i in where else t)
    if not accepts(other):
        return None
    other.memo["steps"] = [
        scale_of(leaf.cpu()) * (leaf.cpu() != 1).reshape(-1) if i in where else None
        for i, leaf in zip(other.where, other.leaves, strict=True)
    ]
    when = " where every other element of the last row is 1"
    return check_lines(other, NAME, when) or _inward(other, where, when)


def _inward(case: Case, where: list[int], when: str) -> Finding | None:
    """Compare the gradient of elements that are 1 with the slope of forward to the one side there is."""
    lines = Lines(case.edited(lambda _, t: t))  # without the steps that leave a 1 as it is
    inward = {
        k: -lines.scales[k] * (real(leaf.cpu()).reshape(-1) == 1)
        for k, leaf in enumerate(case.leaves)
        if case.where[k] in where
    }
    got = lines.along(inward)
    far, near = (lines.value(inward, step) / step for step in (SHORT, SHORT / 4))
    slack = 16 * SHORT + 16 * lines.noise / SHORT
    if not abs(near - got) > slack + 1e-3 * abs(got) or abs(far - near) > slack + 0.05 * abs(near):
        return None  # or forward is not smooth there: a logarithm
    outward = -lines.value(inward, -SHORT) / SHORT
    if abs(outward - got) <= slack + 1e-3 * abs(got):
        return None  # a kink, where 1 is not the end of the domain
    if any(_is_periodic(case, k, d) for k, d in inward.items()):
        return None
    return Finding(
        check=NAME,
        severity="wrong",
        message=f"the slope from there inward is {near:.4g}{when}, the gradient says {got:.4g}",
        got=got,
        expected=near,
        cause="another branch for what is 1, or a division by 1 less that is clamped",
    )


def _has_one(t: Tensor) -> bool:
    return (
        not t.is_complex()
        and t.dim() > 0
        and t.shape[-1] > 2
        and bool(t.min() > 0 and t.max() == 1)
    )


def _slope_at_zero(zero: Case, steepest: float) -> Finding | None:
    """Compare the gradient of elements that are 0 with a central difference, unless there is a kink."""
    if max(map(largest, zero.plain.grads)) > STEEP * (1 + steepest):
        return None  # what is divided by its norm, or eps, twice: no step is short enough
    lines, made = Lines(zero), zero.memo.pop(STEP, None)
    # What depends on whether an element is 0 may be the gradient of others: all move.
    along, step = (made.directions, made.size) if made else (lines.direction(0), SHORT)
    directions = dict(along)
    for i in _inputs(zero):
        at_zero = real(zero.leaves[i].cpu()).reshape(-1) == 0
        directions[i] = torch.where(at_zero, directions[i].abs(), directions[i])
    got = lines.along(directions)
    right = (lines.rise_to(made.outputs) if made else lines.value(directions, step)) / step
    slack = 1e-3 * abs(got) + 16 * SHORT + 4 * lines.noise / step
    if not abs(right - got) > slack:  # NaN is out of the domain
        return None
    left = -lines.value(directions, -SHORT) / SHORT
    if math.isnan(left):  # the end of the domain: what is 0 stays so
        zero = zero.edited(lambda _, t: t)
        zero.memo["steps"] = [
            step * (leaf.cpu() != 0).reshape(-1)
            for step, leaf in zip(lines.scales, zero.leaves, strict=True)
        ]
    elif not abs(left - got) > slack or abs(left - right) > 0.25 * abs(left - got):  # a kink
        return None
    return check_lines(zero, NAME, " where one element of each input is 0")


def _changed(case: Case, chosen: list[int], change: Callable[[Tensor], Tensor]) -> Case:
    where = [case.where[i] for i in chosen]
    return case.edited(lambda i, t: change(t) if i in where else t)


def _finite(case: Case) -> bool:
    return not any(not_finite_at(case, i) for i in range(len(case.leaves)))


def _is_periodic(case: Case, which: int, inward: Tensor) -> bool:
    """Whether one of the elements that are 1, and count, may as well be 0, as a hue: it has the slope of either."""
    counts = (inward != 0) & (case.plain.grads[which].cpu().reshape(-1) != 0)
    for k in counts.nonzero().flatten().tolist():
        leaves = case.fresh()
        with torch.no_grad():
            leaves[which].reshape(-1)[k] = 0
        outputs = case.forward(leaves)
        pairs = zip(outputs, case.plain.outputs, strict=True)
        if all(torch.allclose(a, b) for a, b in pairs):
            return True
    return False


CHECK = Check(
    name=NAME,
    tests="the gradient is finite where forward is finite and smooth: large, all zero, one 0, one 1",
    run=_run,
    order=85,
    needs=("no random numbers", "same values"),
    level="full",
    differences=True,
)
