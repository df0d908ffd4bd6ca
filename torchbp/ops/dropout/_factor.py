r"""Dropout as a product with factors: y = x · f, f = m / (1 - p), which may be broadcast to x.

Derivation:
    grad_x = grad_y · f                                                                       (1)

Saves:
    f: for channels, and for so few elements that a byte widened in each product would cost more than what is kept.
"""

from torch import Tensor
from torch.autograd.function import Function

from torchbp.ops._function import Context, entry

__all__ = ["DropoutFactorFunction", "times_factor"]


class DropoutFactorFunction(Function):
    """Product with drawn factors. Call it through :func:`dropout`, :func:`dropout2d` and its like."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: Tensor, inplace: bool) -> Tensor:  # (*), (*) or (N, C, 1, ...)
        return x.mul_(factor) if inplace else x * factor

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        x, factor, inplace = inputs
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(factor)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return grad_y * factor, None, None  # (1)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        (factor,) = ctx.saved_tensors
        return tangent_x * factor


times_factor = entry(DropoutFactorFunction, again=DropoutFactorFunction.forward)
