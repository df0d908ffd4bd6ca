"""Scales: the gradient is right for inputs much smaller and larger than the sample: clamps, other branches.

All change together; at one scale only every other one of several, which changes what they are to each other. An input
that is nowhere negative, or nowhere positive, is also taken with the other sign, alone, where forward takes it so:
coordinates, what came out of a ReLU, a slope; the first of two is larger at once, and the sign of a sum may turn there.
A single number may be a limit, though, within which nothing is then.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import APART, accepts, explodes, scaled

NAME = "scales"
FACTORS = (2.0**-10, APART, -(2.0**10))
EXPLODES = 1e14  # times as large outputs: out of the sample's domain
NEGATED = (-APART, -1.0)  # times as large: of two inputs; of one the latter


def _run(case: Case) -> Iterator[Finding]:
    tested = False
    for factor in FACTORS:
        if factor in case.memo.get("scaled", ()):  # by sizes
            tested = True
            continue
        chosen = range(0, len(case.leaves), 2 if factor == APART else 1)
        other = scaled(case, factor, chosen)
        if not accepts(other):
            continue
        tested = True
        found = check_lines(other, NAME, _when(case, chosen, factor))
        if found:
            yield replace(found, severity="note") if explodes(case, other, EXPLODES) else found
            return
    one_sided = _one_sided(case)[: len(NEGATED)]
    for which, factor in zip(one_sided, NEGATED[-len(one_sided) :], strict=False):
        other = _negated(case, case.where[which], factor)
        if not accepts(other) or _closed(case, other, which):
            continue
        tested = True
        found = check_lines(other, NAME, f" where {case.names[which]} is {factor:g} times as large")
        if found:
            yield found
            return
    if not tested:
        raise NotApplicable("forward takes no inputs of another size")


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


def _negated(case: Case, position: int, factor: float) -> Case:
    return case.edited(lambda i, t: factor * t if i == position else t)


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
