"""x · s(x) at x = ±∞, where torch's kernels form ∞ · 0 = NaN though the limit is relu(x), with derivative 0 or 1.

Mending it takes passes over memory, about half of such an op's time; where one reading of the input says that there is
no infinity in it, they are left out.
"""

import math

import torch
from torch import Tensor, nn

from torchbp.ops._function import eager

__all__ = ["FAR", "bounded", "known_finite", "mended", "note", "noted"]

# From here on |x| is so large that s(x) is 0 or 1 and the derivative too, in every dtype.
FAR = 1000.0


def _may_be_read(x: Tensor) -> bool:
    """Whether the values of ``x`` may decide: reading them neither waits for a device nor breaks a trace."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.is_cpu
        and x.is_floating_point()
        and eager()
        and not torch.jit.is_tracing()
    )


def known_finite(x: Tensor) -> bool:
    """Whether ``x`` is known to be finite."""
    return _may_be_read(x) and math.isfinite(_sum(x.detach()).item())


def note(x: Tensor) -> list[bool] | None:
    """Return an empty note for :func:`noted`; ``None`` where ``x`` may not be read."""
    return [] if _may_be_read(x) else None


def noted(x: Tensor, finite: list[bool] | None) -> bool:
    """Return whether ``x`` is known to be finite, and write it into the note.

    Before the kernel, which then finds in the cache what was read here.
    """
    if finite is None:
        return False
    finite.append(math.isfinite(_sum(x).item()))
    return finite[-1]


def _sum(x: Tensor) -> Tensor:
    # A sum that overflows costs time, no more; one of float16 would overflow soon.
    return x.sum(dtype=torch.float32) if x.dtype == torch.float16 else x.sum()


def mended(y: Tensor, x: Tensor) -> Tensor:
    """Return ``y``, but its limit where ``x`` is ±∞."""
    return y if y.is_complex() else torch.where(x.isinf(), torch.relu(x), y)


def bounded(x: Tensor) -> Tensor:
    """Return ``x``, nearer where it is so far out that the derivative is the limit's."""
    return x if x.is_complex() else x.clamp(-FAR, FAR)
