"""Several outputs: their gradients add up, and an output that nobody uses is no reason to fail.

An output that depends on the inputs and has no gradient is noted: a loss that holds it learns nothing from it. It may
be meant so, as are a batch's statistics.
"""

from collections.abc import Iterator

import torch

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.lost import lost
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

NAME = "outputs"


def _run(case: Case) -> Iterator[Finding]:
    v, g = case.plain.cotangents, case.plain.grads
    silent = list(lost(case, NAME, "note"))
    yield from silent
    if len(v) < 2:
        if silent:
            return
        raise NotApplicable("one output")
    if not case.options["check_undefined_grad"]:
        raise NotApplicable("check_undefined_grad is False")
    alone = case.vjps([[t if i == j else None for j, t in enumerate(v)] for i in range(len(v))])
    summed = [torch.stack(parts).sum(0) for parts in zip(*alone, strict=True)]
    yield from compare_all(
        NAME,
        case,
        g,
        summed,
        when=" for all outputs together; expected is the sum over outputs used alone",
        cause="the gradients of several outputs overwrite each other, or one is dropped",
    )


CHECK = Check(
    name=NAME,
    tests="the gradients of several outputs add up, and each output may be unused",
    run=_run,
    order=22,
)
