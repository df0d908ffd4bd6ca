"""Scales: the gradient is right for inputs much smaller and larger than the sample: clamps, other branches.

All become smaller together; of several only every other one becomes larger, which changes what they are to each other.
"""

from collections.abc import Iterator, Sequence

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.lines import check_lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import FACTORS, accepts, scaled

NAME = "scales"


def _run(case: Case) -> Iterator[Finding]:
    tested = False
    for factor in FACTORS:
        if factor in case.memo.get("scaled", ()):  # by sizes
            tested = True
            continue
        chosen = range(0, len(case.leaves), 2 if factor > 1 else 1)
        other = scaled(case, factor, chosen)
        if not accepts(other):
            continue
        tested = True
        found = check_lines(other, NAME, _when(case, chosen, factor))
        if found:
            yield found
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
    tests="the gradient is right for inputs 64 times smaller and 8 times larger",
    run=_run,
    order=82,
    needs=("same values",),
    level="full",
    differences=True,
)
