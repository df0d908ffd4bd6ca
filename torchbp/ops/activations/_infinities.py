"""x · s(x) at x = ±∞, where torch's kernels form ∞ · 0 = NaN though the limit is relu(x), with derivative 0 or 1.

Mending it takes passes over memory, about half of such an op's time. So the kernels run as they are where one look says
that they may: on one thread, of few elements, and with the compiled library, at what forward and backward gave
(`../_invalid.py`), some 0.1 to 0.6 µs each, on several threads 6; else at the input, once, before the kernel, which
then finds it in the cache. Which it is, is asked once, before the Function.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from torchbp.ops._function import followed, fused, is_half, modes_active, visible
from torchbp.ops._invalid import FEW, at_hand, at_hand_of_all, quiet, sound
from torchbp.ops._one_kernel import in_one_kernel
from torchbp.ops.kernels import MANY, half_in_one_loop, in_one_loop, many
from torchbp.ops.kernels import at_hand as compiled

__all__ = [
    "FAR",
    "at_once",
    "bounded",
    "known_finite",
    "limited",
    "mended",
    "value",
    "with_limits",
]

# From here on |x| is so large that s(x) is 0 or 1 and the derivative too, in every dtype.
FAR = 1000  # no float, which dynamo could not use in two Functions


def known_finite(x: Tensor, *, many: bool = True, loop: bool = False) -> bool | None:
    """Whether ``x`` is known to be finite; ``None`` where what is made of it is looked at instead.

    Args:
        x: Looked at where that neither waits for a device nor breaks a trace.
        many: Whether a look at many elements is worth its time.
        loop: Whether the op has a loop of float32, too, that is right at ±∞.
    """
    if not (isinstance(x, Tensor) and visible(x)):  # what is none, the kernel refuses
        return False
    if modes_active() and followed():
        return False
    if x.numel() <= FEW or at_hand() or at_hand_of_all(x.numel()):
        return None
    if compiled() and x.numel() >= MANY and (is_half(x) or (loop and x.dtype == torch.float32)):
        return None
    if not many or not x.is_floating_point():
        return False
    x = x.detach()
    # A sum that overflows costs time, no more; one of float16 would overflow soon.
    total = x.sum(dtype=torch.float32) if x.dtype == torch.float16 else x.sum()
    return math.isfinite(total.item())


def limited(y: Tensor, x: Tensor, finite: bool | None) -> Tensor:
    """Return ``y``, but its limit where ``x`` is ±∞; ``finite`` is what :func:`known_finite` says of ``x``."""
    if finite or (finite is None and sound(y)):
        return y
    return mended(y, x)


def value(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    finite: bool | None,
    formula: Callable[[Tensor], Tensor],
    *,
    loop: bool | None = None,
) -> Tensor:
    """Return torch's kernel ``forward(x)``, but its limit where ``x`` is ±∞.

    On a GPU, and in half precision where it has been compiled, ``formula``, the same, in one kernel, of what is no
    further out than -1000: at ∞ it is right. With ``loop`` in float32, too; with ``loop=False`` on a GPU alone.
    """
    if loop is not False and isinstance(x, Tensor) and many(x):
        one = in_one_loop if loop else half_in_one_loop
        y = one(partial(_of_bounded_below, formula), x)
        if y is not None:
            return y
    if finite is None:
        y = forward(x)
        return y if quiet() or sound(y) else mended(y, x)
    if isinstance(x, Tensor) and x.is_cuda and x.is_floating_point():
        y = in_one_kernel(partial(_of_bounded_below, formula), x)
        return forward(x.clamp(min=-FAR)) if y is None else y
    return limited(forward(x), x, finite)


def _of_bounded_below(formula: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return formula(x.clamp(min=-FAR))


def at_once(
    times_derivative: Callable[[Tensor, Tensor], Tensor], v: Tensor, x: Tensor
) -> Tensor | None:
    """Return ``times_derivative(v, x)``, or its limit where ``x`` is ±∞, as :func:`in_one_kernel` does, or ``None``."""
    return in_one_kernel(partial(_of_bounded, times_derivative), v, x)


def _of_bounded(
    times_derivative: Callable[[Tensor, Tensor], Tensor], v: Tensor, x: Tensor
) -> Tensor:
    return times_derivative(v, bounded(x))


def with_limits(
    backward: Callable[[Tensor, Tensor], Tensor], grad_y: Tensor, x: Tensor, finite: bool | None
) -> Tensor:
    """Return torch's kernel ``backward(grad_y, x)``, not differentiated, but with the limits where ``x`` is ±∞."""
    if finite is not False:
        grad_x = backward(grad_y, x)
        if finite or (quiet() and not modes_active()):
            return grad_x
        if fused(grad_y, half=True) and sound(grad_x):
            return grad_x
    return backward(grad_y, bounded(x))


def mended(y: Tensor, x: Tensor) -> Tensor:
    """Return ``y``, but its limit where ``x`` is ±∞."""
    return y if y.is_complex() else torch.where(x.isinf(), torch.relu(x), y)


def bounded(x: Tensor) -> Tensor:
    """Return ``x``, nearer where it is so far out that the derivative is the limit's."""
    return x if x.is_complex() else x.clamp(-FAR, FAR)
