"""The precision that a function works in, read from its outputs."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchbp.verify.raised import ForwardRaised

if TYPE_CHECKING:
    from torchbp.verify.cases import Case

__all__ = ["precision"]

SINGLE = "whether what gives numbers of float32 computes in it"


def precision(case: "Case") -> float:
    """Return that of the outputs, or float32's where they hold no more bits and the inputs do.

    Where the inputs, given in float32, hold no more either, a selection of them does not tell: what forward makes of
    others does, a sixteenth larger.
    """
    outputs = case.plain.outputs
    eps = max(torch.finfo(y.dtype).eps for y in (torch.empty(0, dtype=torch.float64), *outputs))
    if _holds_single(outputs) and (_holds_more(case) or _is_single(case)):
        return max(eps, torch.finfo(torch.float32).eps)
    return eps


def _is_single(case: "Case") -> bool:
    """Whether forward computes in float32, as the outputs of another sample tell; found once for all samples."""
    memo = case.given.memo
    if SINGLE not in memo:
        try:
            memo[SINGLE] = _holds_single([y.detach() for y in case.nearby.kept[1]])
        except ForwardRaised:
            memo[SINGLE] = True
    return memo[SINGLE]


def _holds_single(tensors: Iterable[Tensor]) -> bool:
    """Whether one of float64 holds numbers of float32 only, and not only whole ones."""
    return any(
        t.dtype in (torch.float64, torch.complex128)
        and bool((_real(t) != _real(t).round()).any())
        and _is_rounded(t)
        for t in tensors
    )


def _holds_more(case: "Case") -> bool:
    """Whether an input holds more bits than float32 has."""
    inputs = [t for t in case.flat if isinstance(t, Tensor)]
    return any(not _is_rounded(t) for t in inputs if t.is_floating_point() or t.is_complex())


def _is_rounded(t: Tensor) -> bool:
    real = _real(t)
    return torch.equal(real, real.float().to(real.dtype))


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
