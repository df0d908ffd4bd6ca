"""The same gradient, asked for in other ways: a backward may go another way under `create_graph`, or by strides.

Fused kernels are left under `create_graph`, where their gradient would have none of its own; what takes their place is
seldom tested. Where a gradient is asked for more than once anyway, it is asked for so.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

__all__ = ["asked_otherwise", "differs_otherwise", "strided", "ways"]

RELATIVE = 1e-6  # of two formulas of one gradient, far from the user's sample

GRAPH = " under create_graph=True"
TURNED = " for a grad_output that is not contiguous"


def strided(v: Tensor) -> Tensor:
    """Return v as every second element of a larger tensor whose other elements are not v's."""
    wide = torch.full((*v.shape, 2), -7.0, dtype=v.dtype, device=v.device)
    wide[..., 0] = v
    return wide[..., 0]


def turned(v: Tensor) -> Tensor:
    """Return ``v`` with its dimensions in memory in reverse order, and a gap between any two elements."""
    dims = tuple(reversed(range(v.dim())))
    return strided(v.permute(dims)).permute(dims)


def asked_otherwise(
    case: Case, outputs: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the gradient for the case's grad_output, asked for in all the other ways at once; if refused, plainly."""
    v = case.plain.cotangents
    try:
        return case.backward(outputs, leaves, [turned(t) for t in v], create_graph=True)
    except BackwardRaised:
        return case.backward(outputs, leaves, v, retain_graph=True)


def ways(case: Case) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """Yield the gradient in the sample, asked for in each of the other ways, and which that is."""
    leaves, outputs = case.kept
    v = case.plain.cotangents
    for when, given, graph in ((TURNED, [turned(t) for t in v], False), (GRAPH, v, True)):
        try:
            grads = case.backward(outputs, leaves, given, retain_graph=True, create_graph=graph)
        except BackwardRaised:  # a refusal, or a graph that can be run once only
            continue
        yield when, tuple(g.detach() for g in grads)


def differs_otherwise(case: Case, check: str, when: str) -> Finding | None:
    """Return how the gradient asked for otherwise differs from the plain one, which is right."""
    for how, grads in ways(case):
        cause = "create_graph takes another way through backward" if how == GRAPH else None
        found = compare_all(
            check,
            case,
            grads,
            case.plain.grads,
            when=f"{when}{how}",
            cause=cause or "grad_output indexed as if contiguous",
            relative=RELATIVE,
        )
        if found:
            return found[0]
    return None
