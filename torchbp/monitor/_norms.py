"""Norms of many tensors at once."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchbp.monitor._bundle import Bundle
from torchbp.monitor._packing import Table
from torchbp.monitor._quantity import precise

__all__ = ["norms", "root", "root_mean"]

_WIDE = {torch.float64, torch.complex128}


def norms(bundle: Bundle | Table) -> Tensor | NDArray[np.floating[Any]]:
    """Return the L2 norm of each, ``(n,)`` or ``(R, n)``.

    Large ones in float32, because half precision overflows at 65504: elements below about 1e-22 are lost.
    """
    if isinstance(bundle, Table):
        return np.sqrt(bundle.squares())
    tensors = bundle.tensors
    if len(tensors) == 1 and tensors[0].numel() <= 1 << 17:
        return torch.linalg.vector_norm(tensors[0], dtype=precise(tensors[0])).reshape(1)
    dtype = torch.float64 if any(t.dtype in _WIDE for t in tensors) else torch.float32
    found = torch._foreach_norm(tensors, 2, dtype=dtype)  # noqa: SLF001  # nothing public is as fast
    return torch.stack(list(found))


def root(sums: NDArray[np.float64], _: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the norm: √Σ x²."""
    return np.sqrt(sums)


def root_mean(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the root mean square: √(Σ x² / n)."""
    return np.sqrt(sums / np.maximum(counts, 1))
