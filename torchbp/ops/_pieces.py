"""Elementwise formulas piece by piece, so that what lies between their steps stays in the cache.

A formula of several steps makes a tensor at each. Beyond the cache every one of them is a trip to memory, and from
some megabytes on, of pages that the system first has to give: they cost several times the arithmetic.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torchbp.ops._function import fused, in_float32, is_half

__all__ = ["PIECE", "in_pieces", "in_row_pieces", "pieces", "separable"]

PIECE = 1 << 16  # elements: 256 KB of float32; two threads halve it, torch gives none less
_LARGE = 1 << 23  # elements; below 32 MB the C library keeps memory, and pieces gain nothing
_LARGE_HALF = 1 << 18  # the float32 copies of half precision are worth avoiding sooner


def in_pieces(formula: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Evaluate an elementwise ``formula`` as :func:`in_float32` does, large tensors piece by piece.

    Args:
        formula: Elementwise function of ``tensors``.
        tensors: Floating point; the value has the shape and dtype of the first.

    Returns:
        The formula's value in the first tensor's own dtype.
    """
    first = tensors[0]
    if not separable(*tensors):
        return in_float32(formula, *tensors)
    value = torch.empty_like(first)
    for part, *parts in pieces(value, *tensors):
        part.copy_(formula(*(p.float() for p in parts) if is_half(first) else parts))
    return value


def in_row_pieces(formula: Callable[..., Tensor], dim: int, *tensors: Tensor) -> Tensor:
    """Evaluate as :func:`in_float32` does a ``formula`` along ``dim``, half precision some rows at a time.

    Args:
        formula: Function of ``tensors``, and its value a tensor, whose rows are those of the last dimension.
        dim: The dimension it works along; another than the last is not taken apart.
        tensors: Floating point, alike but for the length of their rows; the value has the dtype of the first.
    """
    first = tensors[0]
    last = first.dim() > 1 and dim in (-1, first.dim() - 1)
    if not (
        is_half(first)
        and last
        and first.numel() >= _LARGE_HALF
        and first.is_cpu
        and fused(*tensors, half=True)
        and all(t.is_contiguous() and t.shape[:-1] == first.shape[:-1] for t in tensors)
    ):
        return in_float32(formula, *tensors)
    some = max(1, PIECE // max(t.shape[-1] for t in tensors))
    rows = zip(*(t.view(-1, t.shape[-1]).split(some) for t in tensors), strict=True)
    value = torch.cat([in_float32(formula, *parts) for parts in rows])
    return value.view(*first.shape[:-1], value.shape[-1])


def separable(*tensors: Tensor) -> bool:
    """Whether an elementwise formula of ``tensors`` is worth evaluating piece by piece, and can be.

    It can where nobody differentiates or traces it, and all of them lie in memory alike, but for single numbers.
    """
    first = tensors[0]
    return (
        first.numel() >= (_LARGE_HALF if is_half(first) else _LARGE)
        and first.is_cpu
        and fused(*tensors, half=True)
        and all(
            t.dim() == 0
            or (t.shape == first.shape and t.dtype == first.dtype and t.is_contiguous())
            for t in tensors
        )
    )


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors' pieces side by side; a single number goes with each of them."""
    length = PIECE // 2 * max(2, torch.get_num_threads())
    count = -(-tensors[0].numel() // length)
    split = ((t,) * count if t.dim() == 0 else t.view(-1).split(length) for t in tensors)
    yield from zip(*split, strict=True)
