"""What a view asks for of one quantity: steps × entries, exact or in buckets of neighbouring samples."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchbp.tensorboard._layout import ABSENT, is_absent
from torchbp.tensorboard._vector import Scalar, Vector

__all__ = ["PLANES", "Matrix", "matrix", "profile"]

PLANES = ("max", "min", "last")
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Matrix:
    """A part of one quantity.

    Attributes:
        steps: int64 ``(C,)``: the step of each column, of a bucket the first.
        ends: int64 ``(C,)``: the same, of a bucket the last.
        planes: ``("value",)`` where a column is a sample, else of ``PLANES``.
        entries: The places of the entries among the quantity's names.
        values: float32 ``(len(planes), C, len(entries))``.
        points: Number of samples in the file.
    """

    steps: NDArray[np.int64]
    ends: NDArray[np.int64]
    planes: tuple[str, ...]
    entries: Sequence[int]
    values: NDArray[np.float32]
    points: int

    def header(self) -> dict[str, object]:
        """Return what JSON can hold of it: all but the values."""
        return {
            "steps": self.steps.tolist(),
            "ends": self.ends.tolist(),
            "planes": self.planes,
            "entries": list(self.entries),
            "exact": self.planes == ("value",),
            "points": self.points,
        }

    def encoded(self, **about: str) -> bytes:
        """Return header and values as the page reads them."""
        header = json.dumps(about | self.header()).encode()
        header += b" " * (-len(header) % 4)
        return struct.pack("<I", len(header)) + header + self.values.astype("<f4").tobytes()


def matrix(
    quantity: Vector | Scalar,
    *,
    first: float = -np.inf,
    last: float = np.inf,
    columns: int = 1000,
    planes: Sequence[str] = PLANES,
    entries: Sequence[int] | None = None,
) -> Matrix:
    """Return the samples from step ``first`` to ``last`` in at most ``columns`` columns.

    Where there are more samples, neighbours share a column, as many in each. Of them are told the
    largest, the smallest and the last value. A NaN that was measured is both largest and smallest:
    none is lost. Absent values are passed over, unless all are.
    """
    start = int(np.searchsorted(quantity.steps, first, "left"))
    stop = max(start, int(np.searchsorted(quantity.steps, last, "right")))
    chosen = range(len(quantity.names)) if entries is None else entries
    count = stop - start
    if count <= columns:
        steps = quantity.steps[start:stop]
        values = quantity.read(start, stop, entries)[None]
        return Matrix(steps, steps, ("value",), chosen, values, len(quantity.steps))
    edges = start + np.arange(columns + 1) * count // columns
    out = np.empty((len(planes), columns, len(chosen)), np.float32)
    per_column = 4 * max(1, len(chosen)) * -(-count // columns)
    together = max(1, _CHUNK_BYTES // per_column)
    for column in range(0, columns, together):
        part = edges[column : column + together + 1]
        samples = quantity.read(int(part[0]), int(part[-1]), entries)
        for plane, name in enumerate(planes):
            out[plane, column : column + len(part) - 1] = _reduced(name, samples, part - part[0])
    firsts, ends = quantity.steps[edges[:-1]], quantity.steps[edges[1:] - 1]
    return Matrix(firsts, ends, tuple(planes), chosen, out, len(quantity.steps))


def profile(quantity: Vector | Scalar, step: float) -> Matrix:
    """Return the sample nearest to ``step``, exact; no column where there is no sample."""
    if not len(quantity.steps):
        return matrix(quantity)
    nearest = quantity.steps[np.argmin(np.abs(quantity.steps - step))]
    # Of several samples of one step (a run that was resumed by hand) the last counts.
    at = int(np.searchsorted(quantity.steps, nearest, "right")) - 1
    one = quantity.steps[at : at + 1]
    values = quantity.read(at, at + 1)[None]
    return Matrix(one, one, ("value",), range(len(quantity.names)), values, len(quantity.steps))


def _reduced(
    plane: str, samples: NDArray[np.float32], edges: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Reduce the rows from each edge to the next."""
    if plane == "last":
        return samples[edges[1:] - 1]
    reduce, least = (np.maximum, -np.inf) if plane == "max" else (np.minimum, np.inf)
    out = reduce.reduceat(samples, edges[:-1], axis=0)
    if np.isnan(out).any() and (absent := is_absent(samples)).any():
        out = reduce.reduceat(np.where(absent, np.float32(least), samples), edges[:-1], axis=0)
        nowhere = np.logical_and.reduceat(absent, edges[:-1], axis=0)
        out.view(np.uint32)[nowhere] = ABSENT
    return out
