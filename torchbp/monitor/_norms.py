"""Norms of many tensors at once."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._utils import _flatten_dense_tensors as _flatten

from torchbp.monitor._quantity import precise

__all__ = ["changes", "copies", "root", "root_mean", "squares"]

_SMALL = 1 << 20


def _are_small(tensors: list[Tensor]) -> bool:
    """Whether there are many small tensors on the CPU, where each call of an operator counts."""
    first = tensors[0]
    return (
        len(tensors) > 8
        and first.device.type == "cpu"
        and all(t.dtype is torch.float32 for t in tensors)
        and sum(t.numel() for t in tensors) <= _SMALL
    )


def squares(tensors: list[Tensor]) -> Tensor:
    """Return the squared L2 norm of each, ``(n,)``.

    Summed in float32, because half precision overflows at 65504; elements below about 1e-22 are
    lost, as their squares are. Of many small tensors on the CPU a flat copy is summed up by parts:
    for 82 of 1000 elements in less than half the time of a foreach norm.
    """
    if _are_small(tensors):
        flat = np.square(_flatten(tensors).numpy(), dtype=np.float64)
        ends = np.cumsum([t.numel() for t in tensors])
        return torch.from_numpy(np.add.reduceat(flat, np.append(0, ends[:-1])))
    wide = {torch.float64, torch.complex128}
    dtype = torch.float64 if any(t.dtype in wide for t in tensors) else torch.float32
    norms = torch._foreach_norm(tensors, 2, dtype=dtype)  # noqa: SLF001  # nothing public is as fast
    return torch.stack(list(norms)).to(precise(tensors[0])).square()


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies; of many small tensors, views into one."""
    if tensors and _are_small(tensors):
        whole = _flatten(tensors)
        return list(whole.split([t.numel() for t in tensors]))
    return [t.clone() for t in tensors]


def changes(after: list[Tensor], before: list[Tensor]) -> list[Tensor]:
    """Return ``after - before``, the latter from :func:`copies`."""
    if after and _are_small(after):
        whole = _flatten(after) - _flatten(before)
        return list(whole.split([t.numel() for t in after]))
    return list(torch._foreach_sub(after, before))  # noqa: SLF001


def root(sums: NDArray[np.float64], _: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the norm: √Σ x²."""
    return np.sqrt(sums)


def root_mean(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the root mean square: √(Σ x² / n)."""
    return np.sqrt(sums / np.maximum(counts, 1))
