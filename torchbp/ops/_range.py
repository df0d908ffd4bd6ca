"""Squares beyond float32: of x = 1e30 the norm is a float32, and so is what is divided by it, but not x² = 1e60.

Where a look finds elements so large, a norm, its quotients and their gradients are those of float64, rounded once.
torch gives 0 or NaN there. The look comes after the kernels: an overflow raises a flag of the processor's, which is
read in 0.1 µs (``_invalid.py``). On more than one thread the largest element is searched for, one reading of x. Where
no look is possible (a GPU, ``torch.compile``, ``torch.func``) the value is that of float32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchbp.ops._function import visible
from torchbp.ops._invalid import OVERFLOW, at_hand, clear, raised

__all__ = ["in_float64", "in_range", "norms_in_range"]

_LARGEST = 1e12  # the cube of it, and the sum of some squares, are float32
_NARROW = (torch.float32, torch.bfloat16)


def in_range(*tensors: Tensor) -> bool:
    """Whether the squares of ``tensors``, of which something has just been made, fit, or can't be looked at."""
    narrow = [t for t in tensors if t.dtype in _NARROW and visible(t)]
    if not narrow or (at_hand() and not raised(OVERFLOW)):
        return True
    clear(OVERFLOW)  # it may be somebody else's
    return all(_largest(t.detach()) <= _LARGEST for t in narrow)


def norms_in_range(r: Tensor) -> bool:
    """Whether all of ``r``, the reciprocals of norms or deviations, are what float32 makes them, or can't be looked at.

    Of too large an x, and of NaN, r is 0 or NaN; torch's kernels raise it to the third power in backward.
    """
    if r.dtype not in _NARROW or not visible(r) or not r.numel():
        return True
    return r.min().item() >= 1 / _LARGEST


def in_float64(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Return ``function`` of the arguments, the floating-point tensors in float64; in the first one's dtype."""

    def wide(v: Any) -> Any:
        return v.double() if isinstance(v, Tensor) and v.is_floating_point() else v

    y = function(*map(wide, args), **{k: wide(v) for k, v in kwargs.items()})
    return y.to(args[0].dtype)


def _largest(t: Tensor) -> float:
    """Return the largest magnitude, or NaN."""
    if not t.numel():
        return 0.0
    low, high = torch.aminmax(t)
    return max(-low.item(), high.item())
