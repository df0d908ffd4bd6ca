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

_LEAST, _MOST = 1e-12, 1e18


def norms(bundle: Bundle | Table) -> Tensor | NDArray[np.floating[Any]]:
    """Return the L2 norm of each, ``(n,)`` or ``(R, n)``.

    In float32 at least, because half precision overflows at 65504. It loses elements below about 1e-22: on the
    CPU, where looking at a norm waits for nothing, those of small norm are measured again in double.
    """
    if isinstance(bundle, Table):
        return np.sqrt(bundle.squares())
    tensors = bundle.tensors
    cpu = tensors[0].is_cpu
    if len(tensors) == 1 and tensors[0].numel() <= 1 << 17 and not cpu:
        return torch.linalg.vector_norm(tensors[0], dtype=precise(tensors[0])).reshape(1)
    dtype = torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32
    found = list(torch._foreach_norm(tensors, 2, dtype=dtype))  # noqa: SLF001  # nothing public is as fast
    if cpu and dtype is torch.float32:
        for i, norm in enumerate(map(float, found)):
            if not _LEAST <= norm <= _MOST:
                found[i] = torch.linalg.vector_norm(tensors[i], dtype=torch.float64)
        found = [norm.double() for norm in found]
    return torch.stack(found)


def root(sums: NDArray[np.float64], _: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the norm: √Σ x²."""
    return np.sqrt(sums)


def root_mean(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the root mean square: √(Σ x² / n)."""
    return np.sqrt(sums / np.maximum(counts, 1))
