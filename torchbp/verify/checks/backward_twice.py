"""Backward twice: a graph that is kept gives the same gradient again, and other ones for other grad_outputs."""

from collections.abc import Iterator

from torchbp.verify._check import Check, Refused
from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

NAME = "backward_twice"


def _run(case: Case) -> Iterator[Finding]:
    v, first = case.plain.cotangents, case.plain.grads
    leaves, outputs = case.kept
    try:
        second = case.backward(outputs, leaves, v, retain_graph=True)
    except BackwardRaised as error:
        raise Refused(f"a second backward raises {error}") from error
    yield from compare_all(
        NAME,
        case,
        second,
        first,
        when=" in the second backward through one graph",
        cause="backward writes to what it keeps: a buffer scaled in place, or freed",
    )


CHECK = Check(
    name=NAME,
    tests="a second backward through a kept graph gives the same gradient",
    run=_run,
    order=15,
)
