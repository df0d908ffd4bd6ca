"""x · s(x) at x = ±∞, where torch's kernels form ∞ · 0 = NaN though the limit is relu(x), with derivative 0 or 1.

Mending it takes passes over memory, about half of such an op's time; where one reading of the input says that there is
no infinity in it, they are left out.
"""

import math

import torch
from torch import Tensor, nn

from torchbp.ops._function import eager

__all__ = ["bounded", "known_finite", "mended"]

# From here on |x| is so large that s(x) is 0 or 1 and the derivative too, in every dtype.
_FAR = 1000.0


def known_finite(x: Tensor) -> bool:
    """Whether ``x`` is known to be finite; ``False`` where reading it would wait for a device or break a trace."""
    plain = (
        type(x) in (Tensor, nn.Parameter)
        and x.is_cpu
        and x.is_floating_point()
        and eager()
        and not torch.jit.is_tracing()
    )
    if not plain:
        return False
    # A sum that overflows costs time, no more; one of float16 would overflow soon.
    wide = torch.float32 if x.dtype == torch.float16 else None
    return math.isfinite(x.detach().sum(dtype=wide).item())


def mended(y: Tensor, x: Tensor) -> Tensor:
    """Return ``y``, but its limit where ``x`` is ±∞."""
    return y if y.is_complex() else torch.where(x.isinf(), torch.relu(x), y)


def bounded(x: Tensor) -> Tensor:
    """Return ``x``, nearer where it is so far out that the derivative is the limit's."""
    return x if x.is_complex() else x.clamp(-_FAR, _FAR)
