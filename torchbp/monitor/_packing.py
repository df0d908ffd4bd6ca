"""Many small tensors in one flat array.

On the CPU each call of an operator counts. Tensors of one trailing shape go into the array by one call,
and numpy measures those of one size by another: for 82 tensors of 1000 elements in a quarter of the time
of a foreach norm.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Packing", "is_small"]

_SMALL = 1 << 14  # elements of a tensor, above which the calls no longer matter
_RUNS = 16  # sizes that are measured one by one
# The sum of squares that float32 holds well: of at most 2¹⁴ elements those whose squares are lost, below
# 1e-38, make 1e-8 of it. Others are scaled first.
_LEAST, _MOST, _SCALE = 2e-26, 1e38, 2.0**80

_dot: Any = getattr(np, "vecdot", None) or partial(np.einsum, "ij,ij->i")  # numpy 1 lacks the first


class Packing:
    """Where each of some float32 tensors on the CPU lies in a flat array.

    Args:
        shapes: Their shapes. They are put into an order of the packing's own.

    Attributes:
        order: The indices of ``shapes`` in the order of the array. Tensors are given in this order.
        sizes: int ``(n,)``: numbers of elements, in that order.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        rows = [shape or (1,) for shape in shapes]
        numbers = [int(np.prod(shape)) for shape in rows]
        trailing = {tail: k for k, tail in enumerate(dict.fromkeys(row[1:] for row in rows))}
        self.order = tuple(
            sorted(range(len(rows)), key=lambda i: (trailing[rows[i][1:]], numbers[i], i))
        )
        self.sizes = np.array([numbers[i] for i in self.order])
        self._starts = np.concatenate(([0], np.cumsum(self.sizes)))
        self._scalars = [k for k, i in enumerate(self.order) if not shapes[i]]
        # By trailing shape and by size: first and last index, where in the array, and the shape there.
        self._blocks: list[tuple[int, int, int, int, tuple[int, ...]]] = []
        self._runs: list[tuple[int, int, int, int, tuple[int, ...]]] = []
        for first, last in _alike([trailing[rows[i][1:]] for i in self.order]):
            low, high = self._starts[[first, last]].tolist()
            self._blocks.append((first, last, low, high, (-1, *rows[self.order[first]][1:])))
        for first, last in _alike(self.sizes.tolist()):
            low, high = self._starts[[first, last]].tolist()
            self._runs.append((first, last, low, high, (last - first, -1)))

    def array(self) -> "Packed":
        """Return an array to pack into."""
        return Packed(self)

    def blocks(self, flat: Tensor) -> list[Tensor]:
        """Return where the tensors of each trailing shape go, as views of an array."""
        return [flat[low:high].view(shape) for _, _, low, high, shape in self._blocks]

    def runs(self, values: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Return the tensors of each size as rows, as views of an array; none if of too many sizes."""
        runs = self._runs if len(self._runs) <= _RUNS else []
        return [values[low:high].reshape(shape) for _, _, low, high, shape in runs]

    def fill(self, blocks: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Copy the tensors."""
        if self._scalars:
            tensors = [t.reshape(1) if t.ndim == 0 else t for t in tensors]
        for block, (first, last, *_) in zip(blocks, self._blocks, strict=True):
            torch.cat(tensors[first:last], out=block)

    def squares(self, runs: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        """Return ``(n,)``: the sum of squares of each row of the runs, in float32."""
        found = np.empty(len(self.sizes), np.float32)
        for part, (first, last, *_) in zip(runs, self._runs, strict=True):
            _dot(part, part, out=found[first:last])
        return found.astype(np.float64)

    def sums(self, terms: NDArray[Any]) -> NDArray[Any]:
        """Return ``(n,)``: the sum of ``terms``, one an element of the array, by tensors."""
        return np.add.reduceat(terms, self._starts[:-1])


class Packed:
    """The array.

    Args:
        packing: What lies where.

    Attributes:
        packing: The same.
        values: float32.
    """

    def __init__(self, packing: Packing) -> None:
        flat = torch.empty(int(packing.sizes.sum()))
        self.packing, self.values = packing, flat.numpy()
        self._blocks, self._runs = packing.blocks(flat), packing.runs(self.values)
        self._scaled = np.empty(0, np.float32)  # of the same size, where it was needed

    def fill(self, tensors: Sequence[Tensor]) -> "Packed":
        """Copy the tensors, in the packing's order."""
        self.packing.fill(self._blocks, tensors)
        return self

    def squares(self) -> NDArray[np.float64]:
        """Return ``(n,)``: the sum of squares of each."""
        if not self._runs:
            return self.sums(np.square(self.values, dtype=np.float64))
        with np.errstate(all="ignore"):
            found = self.packing.squares(self._runs)
            if not found.min() >= _LEAST:
                found = np.where(found < _LEAST, self._squares_scaled(_SCALE), found)
            if not found.max() <= _MOST:
                found = np.where(found <= _MOST, found, self._squares_scaled(1 / _SCALE))
        return found

    def _squares_scaled(self, scale: float) -> NDArray[np.float64]:
        if not len(self._scaled):
            self._scaled = np.empty_like(self.values)
        np.multiply(self.values, np.float32(scale), out=self._scaled)
        return self.packing.squares(self.packing.runs(self._scaled)) / scale**2

    def sums(self, terms: NDArray[Any]) -> NDArray[Any]:
        """Return ``(n,)``: the sum of ``terms``, one an element of the array, by tensors."""
        return self.packing.sums(terms)


def is_small(tensor: Tensor) -> bool:
    """Whether a dense tensor is to be packed."""
    return 0 < tensor.numel() <= _SMALL and tensor.dtype is torch.float32 and tensor.is_cpu


def _alike(keys: Sequence[Any]) -> list[tuple[int, int]]:
    """Return first and last index (exclusive) of every run of equal keys."""
    bounds = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
    return list(pairwise([*bounds, len(keys)]))
