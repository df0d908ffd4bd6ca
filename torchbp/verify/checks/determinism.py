"""Determinism: the same backward gives the same gradient, whatever the random state."""

from collections.abc import Iterator

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

NAME = "determinism"


def _run(case: Case) -> Iterator[Finding]:
    got, slack = case.again.grads, case.options["nondet_tol"]
    pairs = zip(got, case.plain.grads, strict=True)
    if slack and all(bool(((a - b).abs() <= slack).all()) for a, b in pairs):
        return
    yield from compare_all(
        NAME,
        case,
        got,
        case.plain.grads,
        when=" in another run of the same backward",
        cause="backward draws random numbers, or reads memory it has not written",
    )


CHECK = Check(
    name=NAME,
    tests="the same backward gives the same gradient again",
    run=_run,
    order=11,
    needs=("same values",),
)
