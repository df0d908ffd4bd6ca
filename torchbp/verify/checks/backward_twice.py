"""Backward twice: a graph that is kept gives the same gradient again, and other ones for other grad_outputs."""

from collections.abc import Iterator

from torchbp.verify._check import Check, Refused
from torchbp.verify.cases import BackwardRaised, Case
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

NAME = "backward_twice"


def _run(case: Case) -> Iterator[Finding]:
    v = case.plain.cotangents
    leaves = case.fresh()
    outputs = case.forward(leaves)
    first = case.backward(outputs, leaves, v, retain_graph=True)
    first = [g.clone() for g in first]
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
