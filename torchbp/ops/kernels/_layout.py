"""How the tensors of a loop lie in memory, and which of them it takes: arrays, numbers, what is spread, and rows."""

from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from torchbp.ops._function import fused, plain

__all__ = [
    "HALF",
    "NAMES",
    "ROWS",
    "SPREAD",
    "Laid",
    "Taken",
    "all_arrays",
    "in_memory",
    "in_rows",
    "is_one_for_all",
    "laid_out",
]

HALF = (torch.bfloat16, torch.float16)
_FIRST = (torch.float32, *HALF)
NAMES = {
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int8: "int8_t",
    torch.int32: "int32_t",
    torch.uint8: "uint8_t",
    torch.bool: "uint8_t",
}
ARRAY, NUMBER, SPREAD, ROWS = "Array", "Number", "Spread", "Rows"
_A_ROW = 16  # elements; of shorter ones each would be copied by itself


class Taken(NamedTuple):
    """What the loop makes of an argument."""

    dtype: torch.dtype
    kind: str  # of each element its own, one number for all, or numbers spread over dimensions, or rows with gaps


class Laid(NamedTuple):
    """How the arguments lie in memory."""

    like: Tensor  # an array: what is made lies as it does, or, beside rows, without gaps
    taken: tuple[Taken, ...]
    # Two for each argument: 0, or how its numbers are spread, or how its rows lie.
    lengths: tuple[int, ...]
    rows: bool


def all_arrays(tensors: tuple[Tensor, ...]) -> tuple[Taken, ...] | None:
    """Return what :func:`laid_out` finds where all tensors are contiguous and of one shape and dtype, else ``None``."""
    first = tensors[0]
    shape, dtype = first.shape, first.dtype
    for t in tensors:
        if not (
            t.is_contiguous()
            and t.dtype is dtype
            and t.is_cpu
            and (type(t) is Tensor or plain(t))
            and t.shape == shape
            and not t.is_neg()
        ):
            return None
    return (
        _of_dtype(dtype, len(tensors)) if dtype in _FIRST and fused(*tensors, half=True) else None
    )


@cache
def _of_dtype(dtype: torch.dtype, count: int) -> tuple[Taken, ...]:
    return (Taken(dtype, ARRAY),) * count


def laid_out(tensors: tuple[Tensor, ...], *, any_first: bool = False) -> Laid | None:
    """Return how ``tensors`` lie, the first of them of the whole shape; ``None`` where a loop does not take them.

    Args:
        tensors: The arguments of a formula.
        any_first: Whether the first may be of any dtype that a loop reads.
    """
    first = tensors[0]
    if not (any_first or first.dtype in _FIRST) or not fused(*tensors, half=True):
        return None
    taken: list[Taken] = []
    lengths: list[int] = []
    arrays: list[Tensor] = []
    for t in tensors:
        kind, spread = _kind(t, first.shape)
        if kind is None:
            return None
        if kind == ARRAY:
            arrays.append(t)
        taken.append(Taken(t.dtype, kind))
        lengths += spread
    if not arrays:
        return None
    if not all(t.is_contiguous() for t in arrays):
        strides = arrays[0].stride()
        alike = all(t.stride() == strides for t in arrays)
        if not alike or any(lengths) or _has_gaps(arrays[0]):
            return _laid_in_rows(tensors, arrays[0], taken, lengths)
    return Laid(arrays[0], tuple(taken), tuple(lengths), False)


def _laid_in_rows(
    tensors: tuple[Tensor, ...], like: Tensor, taken: list[Taken], lengths: list[int]
) -> Laid | None:
    for i, t in enumerate(tensors):
        if taken[i].kind == ARRAY and not t.is_contiguous():
            rows = in_rows(t)
            if rows is None:
                return None
            taken[i] = Taken(t.dtype, ROWS)
            lengths[2 * i : 2 * i + 2] = rows
    return Laid(like, tuple(taken), tuple(lengths), True)


def in_rows(t: Tensor) -> tuple[int, int] | None:
    """Return (length, stride), for element i lies at i // length * stride + i % length; ``None`` where it doesn't."""
    dims = [(n, s) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1]
    length = 1
    while dims and dims[-1][1] == length:
        length *= dims.pop()[0]
    if not dims:
        return length, length
    stride = expected = dims[-1][1]
    for n, s in reversed(dims):
        if s != expected:
            return None
        expected *= n
    return None if length < _A_ROW else (length, stride)


def in_memory(t: Tensor) -> bool:
    """Whether the values of ``t`` are what the CPU's memory holds where it points."""
    return t.is_cpu and plain(t) and not t.is_neg()


def _kind(t: Tensor, shape: torch.Size) -> tuple[str | None, tuple[int, int]]:
    """Return what the loop makes of ``t``, and how its numbers are spread; ``None`` where it can't read it."""
    if t.dtype not in NAMES or not in_memory(t):
        return None, (0, 0)
    if t.numel() == 1:
        return NUMBER, (0, 0)
    if t.shape == shape:
        return ARRAY, (0, 0)
    spread = _spread(t, shape)
    return (None, (0, 0)) if spread is None else (SPREAD, spread)


def _spread(t: Tensor, shape: torch.Size) -> tuple[int, int] | None:
    """Return (inner, size), for element i has number (i / inner) % size; ``None`` where none do."""
    if not t.is_contiguous() or t.dim() > len(shape):
        return None
    own = (1,) * (len(shape) - t.dim()) + tuple(t.shape)
    places = [i for i, n in enumerate(own) if n > 1]
    if not places or own[places[0] : places[-1] + 1] != shape[places[0] : places[-1] + 1]:
        return None
    return prod(shape[places[-1] + 1 :]), t.numel()


def _has_gaps(t: Tensor) -> bool:
    return torch.empty_like(t, device="meta").stride() != t.stride()


def is_one_for_all(t: Tensor) -> bool:
    """Whether ``t`` is one number expanded, as the gradient of a sum is: a loop for it would be one more to compile."""
    return t.numel() > 1 and not any(t.stride())
