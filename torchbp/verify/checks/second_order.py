"""Second order: the gradient of the gradient equals differences of the first-order gradient.

A backward that detaches what it saved, or that saves an intermediate of forward, gives a right gradient and a silently
wrong second one. So does one that leaves no graph at all, as soon as another term has one: the sum is differentiated
without it. `once_differentiable` raises there, and is a refusal.
"""

from collections.abc import Iterator

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.curvature import second_derivative
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts, with_zeros

NAME = "second_order"
ZERO = " where one element of each input is 0"


def _run(case: Case) -> Iterator[Finding]:
    found = list(second_derivative(case, NAME))
    if not found and not case.draws:
        zero = with_zeros(case)
        if accepts(zero):
            found = list(second_derivative(zero, NAME, ZERO))
    case.wrong_twice = bool(found)
    yield from found


CHECK = Check(
    name=NAME,
    tests="the gradient of the gradient equals differences of the gradient",
    run=_run,
    order=70,
    needs=("same values",),
    level="full",
    differences=True,
)
