"""Elementwise formulas piece by piece, so that what lies between their steps stays in the cache.

A formula of several steps makes a tensor at each. Beyond the cache every one of them is a trip to memory, and from
some megabytes on, of pages that the system first has to give: they cost several times the arithmetic.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torchbp.ops._function import fused, in_float32, is_half

__all__ = ["in_pieces", "pieces", "separable"]

_PER_THREAD = 1 << 15  # elements; torch gives a thread no fewer
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
    length = _PER_THREAD * max(2, torch.get_num_threads())
    count = -(-tensors[0].numel() // length)
    split = ((t,) * count if t.dim() == 0 else t.view(-1).split(length) for t in tensors)
    yield from zip(*split, strict=True)
