"""Products of bfloat16 matrices in float32: MKL's kernel, which torch's library brings along and does not call.

Torch's own rounds its sums to bfloat16, and of float32 takes three to four times as long where the processor multiplies
matrices of bfloat16 (AMX). A factor that is float32, as every gradient is here, goes in as two of bfloat16, which
together have 16 of its 24 digits: beside the one rounding to bfloat16 at the end that is nothing.
"""

import ctypes
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from torchbp.ops._function import fused
from torchbp.ops._pieces import pieces
from torchbp.ops.kernels import in_memory, in_one_loop

__all__ = [
    "Parts",
    "empty_halves",
    "finite",
    "halved",
    "high_and_low",
    "ones_times",
    "parts",
    "product",
    "suit",
]

Parts = tuple[Tensor, ...]  # what sums up to a matrix: itself, or its high and its low half
_MANY = 1 << 22  # products of two numbers, from which the calls and the halves gain
_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112  # of the CBLAS


def _mkl() -> Callable[..., None] | None:
    """Return MKL's kernel, where it is there and the processor multiplies matrices of bfloat16."""
    if not getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        call = library.cblas_gemm_bf16bf16f32
    except (AttributeError, OSError):
        return None
    call.restype = None
    # integers of 64 bits, by value: right for a library of either size
    size, number, data = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    of_a, of_b, of_c = (data, size), (data, size), (data, size)
    call.argtypes = (*(size,) * 6, number, *of_a, *of_b, number, *of_c)
    return call


_MKL = _mkl()


def suit(rows: int, *matrices: Tensor | None) -> bool:
    """Whether the products of so many rows with each of these go to MKL's kernel; ``None`` is none."""
    given = [m for m in matrices if m is not None]
    if _MKL is None or len(given) == 0 or not fused(*given, half=True):
        return False
    large = rows * prod(max(m.shape for m in given)) >= _MANY
    return large and all(m.dtype == torch.bfloat16 and in_memory(m) for m in given)


def parts(d: Tensor) -> Parts:
    """Return the high and the low half of a float32 matrix."""
    made = in_one_loop(high_and_low, d, outputs=(torch.bfloat16,) * 2)
    if made is not None:
        return made
    high = d.to(torch.bfloat16)
    low = torch.empty_like(high)
    for low_part, d_part, high_part in pieces(low, d, high):
        low_part.copy_(d_part - high_part)
    return high, low


def high_and_low(d: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``d`` rounded to bfloat16, and the rest."""
    high = d.bfloat16()
    return high, d - high


def empty_halves(rows: int, columns: int) -> Parts:
    """Return what a loop writes the halves of a matrix into."""
    return tuple(torch.empty(rows, columns, dtype=torch.bfloat16, device="cpu") for _ in range(2))


def halved(formula: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return all values of ``formula`` but the last in halves, first the high ones, and the last as it is."""
    *whole, last = formula(*tensors)
    high, low = zip(*map(high_and_low, whole), strict=True)
    return *high, *low, last


def product(d: Parts, b: Tensor, onto: Tensor | None = None, room: Tensor | None = None) -> Tensor:
    """Return ``d @ b`` in float32, of halves that :func:`suit`, or of float32; added to ``onto``, which may be written.

    Args:
        d: The parts of a matrix.
        b: A matrix of their dtype.
        onto: A float32 matrix that the caller has just made.
        room: One that is written over; not beside ``onto``.
    """
    if len(d) == 1 and d[0].dtype != torch.bfloat16:
        (whole,) = d
        return torch.mm(whole, b, out=room) if onto is None else onto.addmm_(whole, b)
    sums = onto
    for part in d:
        sums = _add(part, b, sums, room)
    assert sums is not None
    return sums


def ones_times(part: Tensor) -> Tensor:
    """Return the sums of the columns, as a product with ones: torch would make the matrix float32 first."""
    ones = torch.ones(1, part.shape[0], dtype=part.dtype, device="cpu")
    return _add(ones, part, None).view(-1)


def _add(a: Tensor, b: Tensor, onto: Tensor | None, room: Tensor | None = None) -> Tensor:
    """Return a @ b, added to ``onto`` where that is given, else written into ``room``."""
    (a, of_a), (b, of_b) = _in_rows(a), _in_rows(b)
    (m, k), n = a.shape, b.shape[1]
    sums = room if onto is None else onto
    if sums is None:
        sums = torch.empty(m, n, dtype=torch.float32, device="cpu")
    assert _MKL is not None
    factors = (a.data_ptr(), max(a.stride()), b.data_ptr(), max(b.stride()))
    before = 0.0 if onto is None else 1.0
    _MKL(_ROW_MAJOR, of_a, of_b, m, n, k, 1.0, *factors, before, sums.data_ptr(), sums.stride(0))
    return sums


def _in_rows(t: Tensor) -> tuple[Tensor, int]:
    """Return ``t``, or a copy, whose rows or whose columns lie in memory one behind the other; and which of both."""
    for which, rows in ((_AS_IT_IS, t), (_TRANSPOSED, t.mT)):
        if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]:
            return t, which
    return t.contiguous(), _AS_IT_IS


def finite(*tensors: Tensor | None) -> bool:
    """Whether the sums of all are finite: nothing in them is infinite or NaN."""
    return all(t is None or bool(t.sum().isfinite()) for t in tensors)
