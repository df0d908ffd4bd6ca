"""Many small tensors in flat arrays, measured some steps later and all at once.

On the CPU each call of an operator counts, the more so as its code is not in the processor's caches during
training: a first call of numpy's dot takes 35 µs where the next takes 2. So a step only copies: tensors of
one trailing shape by one call, into one row of a table. When the table is full, or what was measured is
asked for, each quantity is measured of all rows by a few calls.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Packing", "Shelf", "Table", "small"]

# Elements of a tensor, above which the calls no longer matter. From 10 000 on OpenBLAS has threads of its own.
_SMALL = 1 << 13
_WHOLE = 1 << 20  # elements of a row
_ROWS, _ROOM = 16, 1 << 19  # of a table: rows, and elements where these make three rows and more
_RUNS = 16  # sizes that are measured one by one
# The sum of squares that float32 holds well: of at most 2¹³ elements those whose squares are lost, below
# 1e-38, make 1e-8 of it. Others are scaled first.
_LEAST, _MOST, _SCALE = 2e-26, 1e38, 2.0**80

_dot: Any = getattr(np, "vecdot", None) or partial(np.einsum, "...j,...j->...")  # numpy 1

# Index of the first and behind the last tensor, the same in elements of a row, and the shape there.
_Part = tuple[int, int, int, int, tuple[int, ...]]


class Packing:
    """Where each of some float32 tensors on the CPU lies in a row.

    Args:
        shapes: Their shapes. They are put into an order of the packing's own.

    Attributes:
        order: The indices of ``shapes`` in the order of the row. Tensors are given in this order.
        sizes: int ``(n,)``: numbers of elements, in that order.
        width: Their sum.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        rows = [tuple(shape) or (1,) for shape in shapes]
        numbers = [int(np.prod(shape)) for shape in rows]
        trailing = {tail: k for k, tail in enumerate(dict.fromkeys(row[1:] for row in rows))}
        keys = [(trailing[row[1:]], number) for row, number in zip(rows, numbers, strict=True)]
        self.order = tuple(sorted(range(len(rows)), key=lambda i: keys[i]))
        self.sizes = np.array([numbers[i] for i in self.order])
        ends = np.cumsum(self.sizes).tolist()
        self.width = int(ends[-1])
        self.starts = np.array([0, *ends[:-1]])
        self._scalars = any(not shapes[i] for i in self.order)
        bounds = [0, *ends]
        tails = [keys[i][0] for i in self.order]
        self._blocks: list[_Part] = [
            (a, b, bounds[a], bounds[b], (-1, *rows[self.order[a]][1:])) for a, b in _alike(tails)
        ]
        self._runs: list[_Part] = [
            (a, b, bounds[a], bounds[b], (b - a, -1)) for a, b in _alike(self.sizes.tolist())
        ]

    def blocks(self, row: Tensor) -> list[Tensor]:
        """Return where the tensors of each trailing shape go."""
        return [row[low:high].view(shape) for _, _, low, high, shape in self._blocks]

    def fill(self, blocks: list[Tensor], tensors: list[Tensor]) -> None:
        """Copy the tensors."""
        if self._scalars:
            tensors = [t.reshape(1) if t.ndim == 0 else t for t in tensors]
        for block, (first, last, *_) in zip(blocks, self._blocks, strict=True):
            torch.cat(tensors[first:last], out=block)

    def squares(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """Return ``(R, n)``: the sum of squares of each tensor of the rows ``(R, width)``."""
        if len(self._runs) > _RUNS:
            return np.add.reduceat(np.square(values, dtype=np.float64), self.starts, axis=1)
        with np.errstate(all="ignore"):
            found = self._dots(values)
            if not found.min() >= _LEAST:
                self._mend(found, values, found < _LEAST, _SCALE)
            if not found.max() <= _MOST:
                self._mend(found, values, ~(found <= _MOST), 1 / _SCALE)
        return found

    def _dots(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        found = np.empty((len(values), len(self.sizes)))
        for first, last, low, high, shape in self._runs:
            part = values[:, low:high].reshape(len(values), *shape)
            found[:, first:last] = _dot(part, part)
        return found

    def _mend(
        self,
        found: NDArray[np.float64],
        values: NDArray[np.float32],
        wrong: NDArray[np.bool_],
        scale: float,
    ) -> None:
        """Put right, of the sums of squares ``(R, n)``, those that are ``wrong``."""
        for first, last, low, high, shape in self._runs:
            there = np.flatnonzero(wrong[:, first:last].any(0))
            if len(there):
                near = slice(there[0], there[-1] + 1)  # as a rule those of neighbouring layers
                part = values[:, low:high].reshape(len(values), *shape)[:, near]
                scaled = part * np.float32(scale)
                sums = _dot(scaled, scaled).astype(np.float64) / scale**2
                np.copyto(found[:, first:last][:, near], sums, where=wrong[:, first:last][:, near])


class Table:
    """Rows of tensors of one packing, as quantities measure them.

    Args:
        packing: What lies where.
        values: float32 ``(R, width)``.
    """

    def __init__(self, packing: Packing, values: NDArray[np.float32]) -> None:
        self.packing, self.values = packing, values

    def squares(self) -> NDArray[np.float64]:
        """Return ``(R, n)``: the sum of squares of each tensor."""
        return self.packing.squares(self.values)

    def sums(self, terms: NDArray[Any]) -> NDArray[Any]:
        """Return ``(R, n)``: the sum of ``terms``, one an element, by tensors."""
        return np.add.reduceat(terms, self.packing.starts, axis=1)


class Shelf:
    """A table that is filled row by row.

    Args:
        packing: What lies where.

    Attributes:
        packing: The same.
        free: How many rows are left.
        filled: How often it has been emptied.
    """

    def __init__(self, packing: Packing) -> None:
        rows = min(max(_ROOM // packing.width, 2), _ROWS)
        table = torch.empty(rows, packing.width, dtype=torch.float32, device="cpu")
        self.packing, self.free, self.filled = packing, rows, 0
        self._values = table.numpy()
        self._blocks = [packing.blocks(row) for row in table]
        self._differences: list[tuple[int, int]] = []
        # By measure, the rows it was asked for, and where the answers go.
        self._asked: dict[Callable[..., Any], tuple[list[int], NDArray[np.float64]]] = {}

    def put(self, tensors: list[Tensor], *, room: int = 1) -> int:
        """Copy tensors, in the packing's order, and return their row.

        ``room``: so many rows are to be there without emptying the shelf in between.
        """
        if self.free < room:
            self.empty()
        row = len(self._blocks) - self.free
        self.packing.fill(self._blocks[row], tensors)
        self.free -= 1
        return row

    def subtract(self, row: int, other: int) -> None:
        """Take row ``other`` from ``row``, before that is measured."""
        self._differences.append((row, other))

    def ask(self, measure: Callable[..., Any], row: int) -> NDArray[np.float64]:
        """Return ``(n,)``, which will hold what ``measure`` finds of a row, when the shelf is emptied."""
        if measure not in self._asked:
            answers = np.empty((len(self._blocks), len(self.packing.sizes)))
            self._asked[measure] = [], answers
        rows, answers = self._asked[measure]
        rows.append(row)
        return answers[len(rows) - 1]

    def empty(self) -> None:
        """Measure what was asked for."""
        for row, other in self._differences:
            self._values[row] -= self._values[other]
        used = len(self._blocks) - self.free
        for measure, (rows, answers) in self._asked.items():
            whole = len(rows) == used
            values = self._values[:used] if whole else self._values[rows]
            answers[: len(rows)] = measure(Table(self.packing, values))
        self._differences, self._asked = [], {}
        self.free = len(self._blocks)
        self.filled += 1


def small(tensors: Sequence[Tensor]) -> list[int]:
    """Return the indices of the dense tensors that are to be packed."""
    found, left = [], _WHOLE
    for index, tensor in enumerate(tensors):
        size = tensor.numel()
        if 0 < size <= min(_SMALL, left) and tensor.dtype is torch.float32 and tensor.is_cpu:
            found.append(index)
            left -= size
    return found


def _alike(keys: Sequence[Any]) -> list[tuple[int, int]]:
    """Return first and last index (exclusive) of every run of equal keys."""
    bounds = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
    return list(pairwise([*bounds, len(keys)]))
