"""Losses at ±∞, where a formula forms ∞ - ∞ or 0 · ∞, NaN, although the loss has a limit.

A class that a mask rules out has the logit -∞ and the target 0: its share of the loss is 0. The form that says so takes
more passes over memory. So the plain one is computed, and where a look at it finds NaN, the other.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from torchbp.ops._function import visible
from torchbp.ops._invalid import sound
from torchbp.ops._reduction import reduced, reduced_in_one_kernel

__all__ = ["product", "reduced_with_limits", "with_limits"]


def with_limits(plain: Callable[[], Tensor], limits: Callable[[], Tensor], x: Tensor) -> Tensor:
    """Return the loss by its plain form, or by the other, that has the limits, where that is NaN.

    Args:
        plain: Gives the loss.
        limits: Gives it, too; called at once where a look would wait for a device, or break a trace.
        x: What both are computed from.
    """
    if visible(x):
        loss = plain()
        if sound(loss):
            return loss
    return limits()


def reduced_with_limits(
    plain: Callable[..., Tensor],
    limits: Callable[..., Tensor],
    reduction: str,
    *tensors: Tensor,
    into: Callable[..., object] | None = None,
    spare: int = 0,
) -> Tensor:
    """Return the reduced loss of an elementwise formula: in one kernel by ``limits`` at once, which cost nothing there.

    Args:
        plain: Elementwise function of ``tensors``.
        limits: The same, with the limits.
        reduction: As :func:`reduced` takes it.
        tensors: Of one shape.
        into: The plain one as :func:`reduced` takes it.
        spare: How many spares it takes.
    """
    loss = reduced_in_one_kernel(limits, reduction, *tensors)
    if loss is not None:
        return loss
    return with_limits(
        partial(reduced, plain, reduction, *tensors, into=into, spare=spare),
        partial(reduced, limits, reduction, *tensors),  # (*), (*) -> () or (*)
        tensors[0],
    )


def product(share: Tensor, value: Tensor) -> Tensor:
    """Return ``share * value``, but 0 where the share is 0, also of an infinite value; NaN remains."""
    return (share * value).masked_fill((share == 0) & ~value.isnan(), 0)
