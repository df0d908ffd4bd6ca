"""Norms of many tensors at once."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchbp.monitor._quantity import precise

__all__ = ["root", "root_mean", "squares"]


def squares(tensors: list[Tensor]) -> Tensor:
    """Return the squared L2 norm of each, ``(n,)``.

    Summed in float32, because half precision overflows at 65504; elements below about 1e-22 are
    lost, as their squares are.
    """
    wide = {torch.float64, torch.complex128}
    dtype = torch.float64 if any(t.dtype in wide for t in tensors) else torch.float32
    norms = torch._foreach_norm(tensors, 2, dtype=dtype)  # noqa: SLF001  # nothing public is as fast
    return torch.stack(list(norms)).to(precise(tensors[0])).square()


def root(sums: NDArray[np.float64], _: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the norm: √Σ x²."""
    return np.sqrt(sums)


def root_mean(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the root mean square: √(Σ x² / n)."""
    return np.sqrt(sums / np.maximum(counts, 1))
