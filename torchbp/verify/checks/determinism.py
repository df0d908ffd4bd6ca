"""Determinism: the same backward gives the same gradient, whatever the random state."""

from collections.abc import Iterator

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

NAME = "determinism"
RUNS = 2


def _run(case: Case) -> Iterator[Finding]:
    if not case.steady:
        raise NotApplicable("forward gives other values each time it is called")
    for _ in range(RUNS):
        got = case.vjp(case.plain.cotangents)
        slack = case.options["nondet_tol"]
        if slack and all(
            bool(((a - b).abs() <= slack).all()) for a, b in zip(got, case.plain.grads, strict=True)
        ):
            continue
        found = compare_all(
            NAME,
            case,
            got,
            case.plain.grads,
            when=" in another run of the same backward",
            cause="backward draws random numbers, or reads memory it has not written",
        )
        yield from found
        if found:
            return


CHECK = Check(
    name=NAME,
    tests="the same backward gives the same gradient again",
    run=_run,
    order=11,
)
