"""Determinism: the same backward gives the same gradient, whatever the random state.

Of a forward that gives other values each time no gradient can be tested: that is said, for a report that passes would
not tell.
"""

from collections.abc import Iterator

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

NAME = "determinism"


def _run(case: Case) -> Iterator[Finding]:
    if not case.steady:
        yield Finding(
            check=NAME,
            severity="note",
            message="forward gives other values each time it is called, under one seed: its gradient was not tested",
            cause="a state that is kept between calls, or random numbers of a generator that is out of reach",
        )
        return
    got, slack = case.again.grads, case.options["nondet_tol"]
    pairs = zip(got, case.plain.grads, strict=True)
    if slack and all(bool(((a - b).abs() <= slack).all()) for a, b in pairs):
        return
    found = compare_all(
        NAME,
        case,
        got,
        case.plain.grads,
        when=" in another run of the same backward",
        cause="backward draws random numbers, or reads memory it has not written",
    )
    yield from found or (() if slack else _last_bits(case))


def _last_bits(case: Case) -> Iterator[Finding]:
    """Compare the bits of two runs through one graph, on a CPU: a GPU adds up in an order of chance."""
    again = case.second
    if isinstance(again, BackwardRaised):
        return
    for name, g, e in zip(case.names, again, case.plain.grads, strict=True):
        off = (g != e) & ~(g.isnan() & e.isnan())
        if g.device.type == "cpu" and bool(off.any()):
            yield Finding(
                check=NAME,
                severity="wrong",
                input=name,
                message=f"grad of {name} has other last bits in another run of the same backward, "
                f"in {int(off.sum())}/{g.numel()} elements",
                cause="backward adds up in an order of chance; nondet_tol lets that pass",
            )


CHECK = Check(
    name=NAME,
    tests="the same backward gives the same gradient again",
    run=_run,
    order=11,
)
