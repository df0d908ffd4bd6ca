"""Samples whose matrices are positive definite: a covariance, a Gram matrix.

Many functions are made for such matrices alone and do not look: what is wrong of others only is worth a note. At other
sizes, scales and values the matrices of a sample are not positive definite any more, unless they are made so. That they
are not symmetric either is no excuse: a transpose that is missing is right for symmetric ones.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from torchbp.verify.tensors import is_square

__all__ = ["Keep", "keep_definite"]

LEAST = 2.0**-10  # of the sample's smallest eigenvalue

Keep = Callable[[int, Tensor], Tensor]  # told the position in ``flat``


def keep_definite(flat: Mapping[int, Tensor]) -> Keep | None:
    """Return what makes matrices positive definite again where those of ``flat`` are; ``None`` where none are.

    No less so, either: the smallest eigenvalue stays as large beside the largest.
    """
    values = {i: torch.linalg.eigvalsh(t.double()) for i, t in flat.items() if _is_symmetric(t)}
    definite = {i: v for i, v in values.items() if bool((v > 0).all())}
    if not definite:
        return None
    ratios = {i: float((v[..., 0] / v[..., -1]).min()) for i, v in definite.items()}
    least = {i: LEAST * float(v.min()) for i, v in definite.items()}

    def keep(i: int, t: Tensor) -> Tensor:
        if i not in definite or not is_square(t) or not t.numel():
            return t
        v = torch.linalg.eigvalsh(((t + t.mT) / 2).detach().double().cpu())
        floor = (ratios[i] * v[..., -1]).clamp(min=least[i])
        # What was made so before stays as it is.
        lacks = torch.where(v[..., 0] < floor / 2, floor - v[..., 0], 0).to(t)
        return t + lacks[..., None, None] * torch.eye(t.shape[-1]).to(t)

    return keep


def _is_symmetric(t: Tensor) -> bool:
    """Whether ``t`` holds symmetric matrices, not diagonal ones only."""
    if not (is_square(t) and t.is_floating_point() and t.shape[-1] > 1 and t.numel()):
        return False
    diagonal = torch.diag_embed(t.diagonal(dim1=-2, dim2=-1))
    return torch.equal(t, t.mT) and not torch.equal(t, diagonal)
