"""x · s(x) at x = ±∞, where torch's kernels form ∞ · 0 = NaN though the limit is relu(x), with derivative 0 or 1.

Mending it takes passes over memory, about half of such an op's time. So the kernels run as they are, and where one look
at what they gave says that there is no NaN in it, it is left at that.
"""

import cmath
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchbp.ops._function import eager

__all__ = ["FAR", "bounded", "free_of_nan", "mended", "with_limits"]

# From here on |x| is so large that s(x) is 0 or 1 and the derivative too, in every dtype.
FAR = 1000.0
_FEW = 1024  # elements; up to these torch.equal answers in 0.6 µs, a sum in 1.8


def free_of_nan(made: Tensor) -> bool:
    """Whether ``made`` is known to hold no NaN, where a look neither waits for a device nor breaks a trace.

    Right after a kernel, which leaves what it made in the cache.
    """
    if type(made) is not Tensor or not made.is_cpu or not eager() or torch._C._is_tracing():
        return False
    return _no_nan(made)


def with_limits(backward: Callable[..., Tensor], grad_y: Tensor, x: Tensor, **more: Any) -> Tensor:
    """Return torch's kernel ``backward(grad_y, x)``, but with the limits where ``x`` is ±∞."""
    if grad_y.is_cpu:
        grad_x = backward(grad_y, x, **more)
        if type(grad_x) is Tensor and _no_nan(grad_x):
            return grad_x
    return backward(grad_y, bounded(x), **more)


def _no_nan(made: Tensor) -> bool:
    if made.numel() <= _FEW:
        return torch.equal(made, made)
    # A sum that overflows costs time, no more; one of float16 would overflow soon.
    total = made.sum(dtype=torch.float32) if made.dtype == torch.float16 else made.sum()
    return cmath.isfinite(total.item())


def mended(y: Tensor, x: Tensor) -> Tensor:
    """Return ``y``, but its limit where ``x`` is ±∞."""
    return y if y.is_complex() else torch.where(x.isinf(), torch.relu(x), y)


def bounded(x: Tensor) -> Tensor:
    """Return ``x``, nearer where it is so far out that the derivative is the limit's."""
    return x if x.is_complex() else x.clamp(-FAR, FAR)
