"""vmap: a batch of inputs gives what a loop gives, forward and per-sample gradients, in any batch dimension."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable, Refused
from torchbp.verify.cases import Case
from torchbp.verify.raised import reason
from torchbp.verify.report import Finding
from torchbp.verify.tensors import tensors_in
from torchbp.verify.tolerance import compare, largest, rounding

NAME = "vmap"
BATCH = 2


def _run(case: Case) -> Iterator[Finding]:
    if case.draws or not case.steady:
        raise NotApplicable("forward draws random numbers")
    moved = [[leaf * (1 + 0.0625 * b) for leaf in case.leaves] for b in range(BATCH)]
    looped = [(list(case.plain.outputs), list(case.plain.grads)), _gradients(case, moved[1])]
    n = len(case.leaves)
    refused = []
    tried = set()
    for in_dim in (0, -1):
        dims = tuple(in_dim % (leaf.dim() + 1) if leaf.dim() else 0 for leaf in case.leaves)
        if dims in tried:
            continue
        tried.add(dims)
        batched = [
            torch.stack(parts, d) for parts, d in zip(zip(*moved, strict=True), dims, strict=True)
        ]
        found, why = _batch(case, batched, dims, looped, f" under vmap with in_dims={in_dim}")
        yield from found
        refused += why
        if found:
            return
    if n > 1 and not refused:  # one input batched, the others shared
        first = [moved[b][:1] + moved[0][1:] for b in range(BATCH)]
        looped = [looped[0], _gradients(case, first[1])]
        batched = [torch.stack([p[0] for p in first]), *moved[0][1:]]
        found, _ = _batch(
            case, batched, (0, *[None] * (n - 1)), looped, " under vmap with one input batched"
        )
        yield from found
    if refused:
        raise Refused(refused[0])


def _batch(
    case: Case,
    batched: list[Tensor],
    dims: tuple[int | None, ...],
    looped: list[tuple[list[Tensor], list[Tensor]]],
    when: str,
) -> tuple[list[Finding], list[str]]:
    """Compare forward, then per-sample gradients, with a loop; return the findings, and why it refuses."""

    def forward(*leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = tensors_in(case.call(leaves, seeded=False))
        return tuple(outputs[i] for i in case.differentiable)

    def both(*leaves: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        pulled: tuple[Any, ...] = torch.func.vjp(forward, *leaves)
        return pulled[0], pulled[1](case.plain.cotangents)

    refused: list[str] = []
    grads: tuple[Tensor, ...] = ()
    try:
        values, grads = torch.vmap(both, dims)(*batched)
    except Exception as error:  # a refusal; forward alone may do
        refused = [reason(error)]
        try:
            values = torch.vmap(forward, dims)(*batched)
        except Exception as first:
            return [], [reason(first)]
    pairs = [
        *(("the value of", f"output {k}", y, 0, k) for k, y in enumerate(values)),
        *(("grad of", case.names[k], g, 1, k) for k, g in enumerate(grads)),
    ]
    found = []
    for what, name, got, kind, k in pairs:
        expected = torch.stack([parts[kind][k] for parts in looped])
        wrong = compare(
            NAME,
            name,
            got,
            expected,
            rounding(case, expected) * (largest(expected) + 1 / 16),
            what=what,
            when=when,
            cause="the vmap rule: in_dims or the batch dimension of the output, or a function that mixes samples",
        )
        found += [wrong] if wrong else []
    return found, refused


def _gradients(case: Case, leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    outputs = case.forward(leaves)
    grads = case.backward(outputs, leaves, case.plain.cotangents)
    return [y.detach() for y in outputs], list(grads)


CHECK = Check(
    name=NAME,
    tests="vmap over forward and over per-sample gradients equals a loop",
    run=_run,
    order=74,
    level="full",
)
