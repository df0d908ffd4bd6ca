"""Scales: the gradient is right for inputs much smaller and larger than the sample: clamps, other branches.

All change together; at one scale only every other one of several, which changes what they are to each other. Inputs
that are nowhere negative, or nowhere positive, are also taken with the other sign, where forward takes them so:
coordinates, what came out of a ReLU, a slope; the first alone, and larger at once, for the sign of a sum may turn
there, then the others, then all. Points of a plane are mirrored. A single number may be a limit, though, within which
nothing is then. Where nothing larger is taken, what lies between -1 and 1 is taken near those bounds, and two rows of
square matrices are negated, which leaves a rotation one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import APART, accepts, explodes, negated, scaled
from torchbp.verify.tensors import is_square

NAME = "scales"
FACTORS = (2.0**-10, APART, -(2.0**10))
LESS = {APART: (4.0, 2.0), -(2.0**10): (-16.0, -8.0, -2.0)}  # where that is refused
ROOT = 1 / 32  # takes what is between -1 and 1 near its bounds
EXPLODES = 1e14  # times as large outputs: out of the sample's domain


def _run(case: Case) -> Iterator[Finding]:
    tested = any(factor in case.memo.get("scaled", ()) for factor in FACTORS)  # by sizes
    for other, when in _tries(case):
        tested = True
        found = check_lines(other, NAME, when)
        if found:
            yield replace(found, severity="note") if explodes(case, other, EXPLODES) else found
            return
    if not tested:
        raise NotApplicable("forward takes no inputs of another size")


def _tries(case: Case) -> Iterator[tuple[Case, str]]:
    """Yield what forward takes of other scales and signs, and the condition."""
    larger = False
    for factor in FACTORS:
        if factor in case.memo.get("scaled", ()):
            larger |= abs(factor) > 1
            continue
        chosen = range(0, len(case.leaves), 2 if factor == APART else 1)
        for times in (factor, *LESS.get(factor, ())):
            other = scaled(case, times, chosen)
            if accepts(other):
                larger |= abs(factor) > 1
                yield other, _when(case, chosen, times)
                break
    near = None if larger else _near_bounds(case)
    if near and accepts(near):
        yield near, " for inputs near -1 and 1"
    if not larger:
        yield from _turned(case)
    for some, factor in _to_negate(_one_sided(case)):
        other = _negated(case, [case.where[i] for i in some], factor)
        if accepts(other) and not any(_closed(case, other, i) for i in some):
            by = "negated" if factor == -1 else f"{factor:g} times as large"
            names = " and ".join(case.names[i] for i in some)
            yield other, f" where {names} {'are' if len(some) > 1 else 'is'} {by}"


def _to_negate(one_sided: list[int]) -> Iterator[tuple[list[int], float]]:
    """Yield which leaves of one sign to negate, and the factor: the first, which is larger too, the rest, all."""
    first, rest = one_sided[:1], one_sided[1:]
    if first:
        yield first, -APART if rest else -1.0
    if rest:
        yield rest, -1.0
        yield one_sided, -1.0


def _turned(case: Case) -> Iterator[tuple[Case, str]]:
    """Yield the case with two rows of its square matrices negated, which leaves a rotation one."""
    square = [i for i, t in case.arguments if i in case.where and is_square(t) and t.shape[-1] > 2]
    other = case.edited(lambda i, t: _two_negated(t) if i in square else t)
    if square and accepts(other):
        yield other, " where two rows of each matrix are negated"


def _two_negated(t: Tensor) -> Tensor:
    sign = torch.ones_like(t[..., :1])
    sign[..., :2, :] = -1
    return t * sign


def _near_bounds(case: Case) -> Case | None:
    """Return the case with its inputs between -1 and 1, cosines or probabilities, near those bounds."""
    inside = [
        k
        for k, leaf in zip(case.where, case.leaves, strict=True)
        if k < case.size
        and leaf.numel() > 1
        and not leaf.is_complex()
        and bool(leaf.abs().max() < 1)
    ]
    if not inside:
        return None
    return case.edited(lambda i, t: t.sign() * t.abs() ** ROOT if i in inside else t)


def _one_sided(case: Case) -> list[int]:
    """Return the leaves that have one sign."""
    inputs = ((i, leaf) for i, leaf in enumerate(case.leaves) if case.where[i] < case.size)
    return [
        i
        for i, leaf in inputs
        if leaf.numel()
        and not leaf.is_complex()
        and bool((leaf > 0).any()) != bool((leaf < 0).any())
    ]


def _negated(case: Case, positions: list[int], factor: float) -> Case:
    return case.edited(lambda i, t: negated(t, factor) if i in positions else t)


def _closed(case: Case, other: Case, which: int) -> bool:
    """Whether another input has no influence any more: the number that is negated is a limit, then."""
    return case.leaves[which].numel() == 1 and any(
        k != which and bool(g.any()) and not bool(there.any())
        for k, (g, there) in enumerate(zip(case.plain.grads, other.plain.grads, strict=True))
    )


def _when(case: Case, chosen: Sequence[int], factor: float) -> str:
    if len(chosen) == 1:
        return f" where {case.names[chosen[0]]} is {factor:g} times as large"
    if len(chosen) == len(case.leaves):
        return f" for inputs {factor:g} times as large"
    return f" where {' and '.join(case.names[i] for i in chosen)} are {factor:g} times as large"


CHECK = Check(
    name=NAME,
    tests="the gradient is right for inputs a thousand times smaller, 8 and a thousand times larger, and negated",
    run=_run,
    order=82,
    needs=("same values",),
    level="full",
    differences=True,
)
