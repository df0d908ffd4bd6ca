"""Several outputs: their gradients add up, and an output that nobody uses is no reason to fail.

An output that depends on the inputs and has no gradient is noted: a loss that holds it learns nothing from it. It may
be meant so, as are a batch's statistics.
"""

from collections.abc import Iterator

import torch

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts, scaled
from torchbp.verify.tolerance import compare_all

NAME = "outputs"
MOVED = 1.0625  # times


def _run(case: Case) -> Iterator[Finding]:
    v, g = case.plain.cotangents, case.plain.grads
    silent = list(_without_gradient(case))
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


def _without_gradient(case: Case) -> Iterator[Finding]:
    """Note the outputs that change with the inputs and do not require grad, where others do."""
    silent = [
        k
        for k, y in enumerate(case.all_outputs)
        if k not in case.differentiable and (y.is_floating_point() or y.is_complex()) and y.numel()
    ]
    if not silent:
        return
    other = scaled(case, MOVED)
    if not accepts(other) or len(other.all_outputs) != len(case.all_outputs):
        return
    for k in silent:
        here, there = case.all_outputs[k], other.all_outputs[k]
        if here.shape == there.shape and not torch.allclose(here, there, equal_nan=True):
            yield Finding(
                check=NAME,
                severity="note",
                message=f"output {k} changes with the inputs, and has no gradient",
                cause="marked as not differentiable, or computed without a graph: is that meant?",
            )


CHECK = Check(
    name=NAME,
    tests="the gradients of several outputs add up, and each output may be unused",
    run=_run,
    order=22,
)
