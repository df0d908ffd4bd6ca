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
    v = case.plain.cotangents
    other = case.variant(_moved, parameters=True)
    expected = other.vjp(v)  # alone, before any mixing
    here, there = case.fresh(), other.fresh()
    mine, its = case.forward(here), other.forward(there)
    first = case.backward(mine, here, v)
    second = other.backward(its, there, v)
    when = " after another call of the function"
    yield from compare_all(NAME, case, first, case.plain.grads, when=when, cause=CAUSE)
    yield from compare_all(
        NAME, case, second, expected, when=" in the second of two calls", cause=CAUSE
    )


def _moved(t: torch.Tensor) -> torch.Tensor:
    return t * 1.0625 if t.is_floating_point() or t.is_complex() else t  # stays in most domains


CHECK = Check(
    name=NAME,
    tests="two calls in flight at once do not disturb each other",
    run=_run,
    order=40,
)
