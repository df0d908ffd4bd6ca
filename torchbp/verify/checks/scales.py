"""Scales: the gradient is right for inputs much smaller and larger than the sample: clamps, other branches."""

from collections.abc import Iterator

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.lines import check_lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import FACTORS, accepts, scaled

NAME = "scales"


def _run(case: Case) -> Iterator[Finding]:
    if not case.steady:
        raise NotApplicable("forward gives other values each time it is called")
    tested = False
    for factor in FACTORS:
        if factor in case.memo.get("scaled", ()):  # by sizes
            tested = True
            continue
        other = scaled(case, factor)
        if not accepts(other):
            continue
        tested = True
        found = check_lines(other, NAME, f" for inputs {factor:g} times as large")
        if found:
            yield found
            return
    if not tested:
        raise NotApplicable("forward takes no inputs of another size")


CHECK = Check(
    name=NAME,
    tests="the gradient is right for inputs 64 times smaller and 8 times larger",
    run=_run,
    order=82,
    level="full",
    differences=True,
)
