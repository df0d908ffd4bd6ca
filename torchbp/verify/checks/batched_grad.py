"""Batched gradients: backward under vmap, as `torch.autograd.grad(is_grads_batched=True)` runs it, equals a loop."""

from collections.abc import Iterator

import torch

from torchbp.verify._check import Check, Refused
from torchbp.verify.cases import Case
from torchbp.verify.raised import reason
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

NAME = "batched_grad"
BATCH = 2


def _run(case: Case) -> Iterator[Finding]:
    several = [case.cotangents(case.plain.outputs, f"{NAME} {i}") for i in range(BATCH)]
    expected = case.vjps(several)
    leaves, outputs = case.kept
    stacked = [torch.stack(parts) for parts in zip(*several, strict=True)]
    case.calls.count(backward=1)
    try:
        got = torch.autograd.grad(
            outputs, leaves, stacked, is_grads_batched=True, allow_unused=True, retain_graph=True
        )
    except Exception as error:
        message = f"check_batched_grad: a batch of grad_outputs raises {reason(error)}"
        if case.options["check_batched_grad"]:
            yield Finding(check=NAME, severity="wrong", message=message)
        raise Refused(reason(error)) from error
    for i in range(BATCH):
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
