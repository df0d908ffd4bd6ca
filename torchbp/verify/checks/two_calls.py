"""Two calls: what one forward keeps is its own, whatever runs before its backward."""

from collections.abc import Iterator

import torch

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

NAME = "two_calls"
CAUSE = "state shared between calls: something kept on the class, the module or a global"


def _run(case: Case) -> Iterator[Finding]:
    other = case.nearby
    v, expected = other.plain.cotangents, other.plain.grads  # alone, before any mixing
    yield from _overwritten(case)
    here, mine = case.kept if case.runs_again else case.graph()
    there, its = other.kept if case.runs_again else other.graph()
    first = case.backward(mine, here, case.plain.cotangents, retain_graph=True)
    second = other.backward(its, there, v, retain_graph=True)
    when = " after another call of the function"
    yield from compare_all(NAME, case, first, case.plain.grads, when=when, cause=CAUSE)
    when = " in the second of two calls"
    yield from compare_all(NAME, case, second, expected, when=when, cause=CAUSE)


def _overwritten(case: Case) -> Iterator[Finding]:
    """Yield an output of the first call that is no longer what it was: a buffer that every call returns."""
    for i, (now, was) in enumerate(zip(case.kept[1], case.plain.outputs, strict=True)):
        if not torch.allclose(now.detach(), was, rtol=0, atol=0, equal_nan=True):
            yield Finding(
                check=NAME,
                severity="wrong",
                input=f"output {i}",
                message=f"output {i} of the first call is another after the second call",
                cause="a buffer that every call returns: return a copy",
            )
            return


CHECK = Check(
    name=NAME,
    tests="two calls in flight at once do not disturb each other",
    run=_run,
    order=40,
)
