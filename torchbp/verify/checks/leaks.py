"""Leaks: what a call allocates is free again once its results are gone."""

from collections.abc import Iterator

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.used import called_on, used

NAME = "leaks"


def _run(case: Case) -> Iterator[Finding]:
    try:
        call = used(case)
    except (ForwardRaised, BackwardRaised):  # new values in the same memory are another check's
        call = called_on(case, case.fresh())
    if call.forever:
        yield Finding(
            check=NAME,
            severity="wrong",
            message=f"each call leaves {call.forever} tensors behind that nothing frees",
            got=float(call.forever),
            expected=0.0,
            cause="appended to a global, the class or the module",
        )
    elif call.cycles:
        yield Finding(
            check=NAME,
            severity="note",
            message=f"each call leaves {call.cycles} tensors in a reference cycle, freed by the "
            "garbage collector only: a tensor, often the output, kept as ctx attribute",
        )


CHECK = Check(
    name=NAME,
    tests="a call leaves no tensor behind",
    run=_run,
    order=62,
    level="full",
)
