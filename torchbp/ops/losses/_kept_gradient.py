"""Losses of single elements that keep their gradient in the place of x: as many bytes, and backward is one product.

    ℓ reduced, and g = ±∂ℓ/∂x of each element, from one exponential, of which backward would need the same again
    grad_x = ±s · g,  s the gradient of each ℓ: grad for "sum", grad / N for "mean"           (1)
    ∂g/∂x  = c(g, t), a second derivative's, for which g is an output that no caller sees     (2)

For some ten thousand float32 or float64 to some million, with a gradient for x alone; not in forward mode, which asks
for no backward. Under ``lean`` others may keep x, too, which then costs nothing: there it is kept, and g made again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.compiler import is_dynamo_compiling

from torchbp.ops import _recipe
from torchbp.ops._function import Context, entry, followed, modes_active, visible
from torchbp.ops._invalid import sound
from torchbp.ops._reduction import FEW, WIDE, reduced_in_one_loop, spread

__all__ = ["Formula", "KeptGradientFunction", "suits_kept_gradient", "with_kept_gradient"]

TOO_MANY = (
    1 << 23
)  # elements; from here on every new tensor is of pages that the system first has to give


class Formula(NamedTuple):
    """A loss, as :class:`KeptGradientFunction` computes it.

    Attributes:
        both: ``both(x, t)`` is ℓ, with its limits, and g, of single elements.
        write: ``write(g, x, t)`` writes g, piece by piece, and returns what the losses sum up to, in parts.
        curvature: ``curvature(g, t)`` is (2).
        limits: ``limits(x, t, reduction)`` is the loss where what ``write`` returns is NaN.
        negative: Whether g is -∂ℓ/∂x, where that is cheaper to write.
    """

    both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    write: Callable[[Tensor, Tensor, Tensor], list[Tensor]]
    curvature: Callable[[Tensor, Tensor], Tensor]
    limits: Callable[[Tensor, Tensor, str], Tensor]
    negative: bool = False


class KeptGradientFunction(Function):
    """A loss that keeps its gradient. Call it through :func:`with_kept_gradient`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, reduction: str, formula: Formula, keeps: bool
    ) -> tuple[Tensor, Tensor | None]:  # (*), (*) -> (), g (*)
        made = reduced_in_one_loop(formula.both, reduction, x, target, beside=(None,))
        if made is not None:
            loss, gradient = made
            return loss, gradient if keeps else None
        gradient = torch.empty_like(x)
        loss = torch.stack(formula.write(gradient, x, target)).sum()
        loss = loss / x.numel() if reduction == "mean" else loss
        loss = loss if sound(loss) else formula.limits(x, target, reduction)
        return loss, gradient if keeps else None

    @staticmethod
    def setup_context(
        ctx: Context,
        inputs: tuple[Tensor, Tensor, str, Formula, bool],
        output: tuple[Tensor, Tensor | None],
    ) -> None:
        x, target, ctx.reduction, ctx.formula, keeps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(None if keeps else x, output[1], target)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor | None, grad_of_gradient: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        x, gradient, target = ctx.saved_tensors
        formula = ctx.formula
        if gradient is None:
            gradient = _with_gradient(x, target, ctx.reduction, formula, True)[1]
        grad_x = None
        if grad is not None:
            s = spread(grad, ctx.reduction, target.numel())
            grad_x = gradient * (-s if formula.negative else s)  # (1)
        if grad_of_gradient is not None:
            second = grad_of_gradient * formula.curvature(gradient, target)  # (2)
            grad_x = second if grad_x is None else grad_x + second
        return grad_x, None, None, None, None


def suits_kept_gradient(x: Tensor, target: Tensor, reduction: str) -> bool:
    """Whether these may go to :func:`with_kept_gradient`, and are of a size for which it has measured to be faster."""
    return (
        not is_dynamo_compiling()
        and FEW < x.numel() < TOO_MANY
        and reduction != "none"
        and torch.is_grad_enabled()
        and x.requires_grad
        and not target.requires_grad
        and type(x) is Tensor
        and type(target) is Tensor
        and x.dtype in WIDE
        and target.dtype is x.dtype
        and target.size() == x.size()
        and x.is_contiguous()
        and target.is_contiguous()
        and visible(x)
        and not (modes_active() and followed())
        and target.is_cpu
        and forward_ad._current_level < 0
    )


def with_kept_gradient(x: Tensor, target: Tensor, reduction: str, formula: Formula) -> Tensor:
    """Return the loss, for which :func:`suits_kept_gradient` holds."""
    return _with_gradient(x, target, reduction, formula, not _recipe.asked)[0]


_with_gradient: Any = entry(KeptGradientFunction)
