"""Which elements of an input an output depends on, as its gradients tell: no call of forward is made for that."""

from collections.abc import Mapping

import torch
from torch import Tensor

from torchbp.verify.cases import Case
from torchbp.verify.resize import Places, Size
from torchbp.verify.tolerance import largest

__all__ = ["elementwise", "of_outputs"]


def elementwise(case: Case) -> list[int]:
    """Return the leaves whose element k alone element k of every output depends on: a slope times grad_output.

    For two random grad_outputs v and w that is so exactly where the gradients g and h fulfil g w = h v. Where they are
    0 throughout, nothing tells that it is element k of another argument that counts beside it.
    """
    if "elementwise" not in case.memo:
        case.memo["elementwise"] = _elementwise(case)
    return case.memo["elementwise"]


def _elementwise(case: Case) -> list[int]:
    y, *others = case.plain.outputs
    if any(other.shape != y.shape for other in others):
        return []
    alike = [
        i
        for i, leaf in enumerate(case.leaves)
        if leaf.shape == y.shape and leaf.numel() > 1 and not leaf.is_complex()
    ]
    if not alike:
        return []
    v, w = case.plain.cotangents[0], case.cotangents((y,), "elementwise")[0]
    grads, other = case.plain.grads, case.vjps([[w] * (1 + len(others))])[0]
    if others:  # which get the same
        grads = case.vjps([[v] * (1 + len(others))])[0]
    slack = 1e-9 if case.epsilon < 1e-12 else 1e-4
    sole = len(case.arguments) == 1
    told = [i for i in alike if sole or bool(grads[i].any())]
    return [i for i in told if _proportional(grads[i], v, other[i], w, slack)]


def _proportional(g: Tensor, v: Tensor, h: Tensor, w: Tensor, slack: float) -> bool:
    one, other = g * w, h * v
    return bool(torch.allclose(one, other, rtol=slack, atol=slack * largest(one), equal_nan=True))


def of_outputs(case: Case, size: Size) -> Places:
    """Return the places of a size that are the output's too: its first depends on the first there, and so the last.

    Nothing where there are several outputs, or none shows it.
    """
    if len(case.plain.outputs) != 1:
        return ()
    y, v = case.plain.outputs[0], case.plain.cotangents[0]
    for dim in (d for d, n in enumerate(y.shape) if n == size.now > 1):
        ends = [torch.zeros_like(v) for _ in range(2)]
        for at, end in zip((0, -1), ends, strict=True):
            end.select(dim, at).copy_(v.select(dim, at))
        first, last = (
            dict(zip(case.where, grads, strict=True)) for grads in case.vjps([[e] for e in ends])
        )
        shared = tuple(p for p in size.places if p[0] in first and _stays(first, last, p))
        if shared:
            return shared
    return ()


def _stays(
    first: Mapping[int, Tensor], last: Mapping[int, Tensor], place: tuple[int, int, int]
) -> bool:
    """Whether the gradients of an output's first and last place are 0 but in the first and last of an input.

    Under a causal mask the first output depends on the first keys alone, and the last does not.
    """
    i, dim, _ = place
    rest = first[i].shape[dim] - 1
    return not (first[i].narrow(dim, 1, rest).any() or last[i].narrow(dim, 0, rest).any())
