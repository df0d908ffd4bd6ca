"""Backward twice: a graph that is kept gives the same gradient again, and other ones for other grad_outputs."""

from collections.abc import Iterator

from torchbp.verify._check import Check, Refused
from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

NAME = "backward_twice"


def _run(case: Case) -> Iterator[Finding]:
    second = case.second
    if isinstance(second, BackwardRaised):
        raise Refused(f"a second backward raises {second}") from second
    yield from compare_all(
        NAME,
        case,
        second,
        case.plain.grads,
        when=" in the second backward through one graph",
        cause="backward writes to what it keeps: a buffer scaled in place, or freed",
    )


CHECK = Check(
    name=NAME,
    tests="a second backward through a kept graph gives the same gradient",
    run=_run,
    order=15,
)
