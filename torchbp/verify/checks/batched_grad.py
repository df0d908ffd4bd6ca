"""Batched gradients: backward under vmap equals a loop.

First under torch.vmap, which refuses what it cannot do; then as `torch.autograd.grad(is_grads_batched=True)` runs it,
whose older vmap ends the process on some of that: `grad_output.data` in torch 2.13.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from torchbp.verify._check import Check, Refused
from torchbp.verify.cases import Case
from torchbp.verify.raised import reason
from torchbp.verify.report import Finding
from torchbp.verify.source import PROMISED, promised
from torchbp.verify.tolerance import compare_all

NAME = "batched_grad"
BATCH = 2


def _run(case: Case) -> Iterator[Finding]:
    several = [case.cotangents(case.plain.outputs, f"{NAME} {i}") for i in range(BATCH)]
    expected = case.vjps(several)
    leaves, outputs = case.kept
    stacked = [torch.stack(parts) for parts in zip(*several, strict=True)]

    def pull(*v: Tensor) -> tuple[Tensor, ...]:
        return case.backward(outputs, leaves, v, retain_graph=True)

    case.calls.count(backward=1)
    try:
        results = [
            torch.vmap(pull)(*stacked),
            torch.autograd.grad(
                outputs,
                leaves,
                stacked,
                is_grads_batched=True,
                allow_unused=True,
                retain_graph=True,
            ),
        ]
    except Exception as error:
        message = f"check_batched_grad: a batch of grad_outputs raises {reason(error)}"
        cause = PROMISED if promised(case, error) else None
        if cause or case.options["check_batched_grad"]:
            yield Finding(check=NAME, severity="wrong", message=message, cause=cause)
        raise Refused(reason(error)) from error
    for got, i in product(results, range(BATCH)):
        here = [
            torch.zeros_like(leaf) if g is None else g[i]
            for g, leaf in zip(got, leaves, strict=True)
        ]
        found = compare_all(
            NAME,
            case,
            here,
            expected[i],
            when=f" for grad_output {i} of a batch",
            cause="backward mixes a batch of grad_outputs",
        )
        yield from found
        if found:
            return


CHECK = Check(
    name=NAME,
    tests="vmap over backward equals a loop",
    run=_run,
    order=75,
    level="full",
)
