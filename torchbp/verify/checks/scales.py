"""Scales: the gradient is right for inputs much smaller and larger than the sample: clamps, other branches.

All change together; at one scale only every other one of several, which changes what they are to each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts, explodes, scaled

NAME = "scales"
FACTORS = (2.0**-10, 2.0**3, -(2.0**10))
EXPLODES = 1e14  # times as large outputs: out of the sample's domain
APART = 2.0**3  # of several inputs every other one


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
    if not tested:
        raise NotApplicable("forward takes no inputs of another size")


def _when(case: Case, chosen: Sequence[int], factor: float) -> str:
    if len(chosen) == 1:
        return f" where {case.names[chosen[0]]} is {factor:g} times as large"
    if len(chosen) == len(case.leaves):
        return f" for inputs {factor:g} times as large"
    return f" where {' and '.join(case.names[i] for i in chosen)} are {factor:g} times as large"


CHECK = Check(
    name=NAME,
    tests="the gradient is right for inputs a thousand times smaller, 8 and a thousand times larger",
    run=_run,
    order=82,
    needs=("same values",),
    level="full",
    differences=True,
)
