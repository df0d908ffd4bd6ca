r"""ELU: y = s · x where x > 0, else s · α · (exp(βx) - 1); s = β = 1. With other s and β it is CELU and SELU.

Derivation:
    dy/dx  = s where x > 0, else
             s · α · β · exp(βx)                from the input                                 (1)
           = β · (y + s · α)                    from the output, whose sign is x's if α ≥ 0    (2)
    grad_x = grad_y · dy/dx                                                                    (3)

Saves:
    x, in its own dtype: 4 bytes per float32 element, as torch. Not y: (2) loses all digits as y → -s α.
    In place there is no x any more: y, as in torch. In half precision, where (2) is off by up to 100 %, a copy of x.

Edge values:
    x = 0: the left derivative, and the right second one, both as in torch.
    NaN: dy/dx is s, as in torch; of many elements NaN, as in torch.
    x → +∞: y → s x.   x → -∞: y → -s α, dy/dx → 0.

Sources:
    Clevert, Unterthiner, Hochreiter, "Fast and Accurate Deep Network Learning by Exponential Linear Units (ELUs)",
    2015, arXiv:1511.07289.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._clamp import clipped
from torchbp.ops._errors import wrong
from torchbp.ops._function import (
    Context,
    entry,
    is_half,
    kernel,
    overwrite,
    public,
    undifferentiated,
)
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._samples import Make, Sample
from torchbp.ops.kernels import in_one_loop, many

__all__ = ["ELU", "ELUFunction", "elu", "elu_"]

_elu_backward = kernel("elu_backward")


class ELUFunction(Function):
    """ELU, CELU and SELU with a hand-written derivative. Call it through :func:`elu`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, alpha: float, s: float, beta: float, inplace: bool
    ) -> Tensor:  # (*) -> (*)
        if inplace:
            return _nn.elu_(x, alpha, s, beta)
        if isinstance(x, Tensor) and many(x):
            y = in_one_loop(_value(alpha, s, beta), x)
            if y is not None:
                return y
        return _nn.elu(x, alpha, s, beta)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, float, float, float, bool], output: Tensor
    ) -> None:
        x, ctx.alpha, ctx.s, ctx.beta, inplace = inputs
        ctx.inplace = inplace
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(output if inplace else x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None, None, None, None]:
        (kept,) = ctx.saved_tensors
        if many(kept) and not ctx.inplace:
            grad_x = in_one_loop(_in_a_loop(ctx), grad_y, kept)
            if grad_x is not None:
                return grad_x, None, None, None, None
        if undifferentiated():
            grad_x = _elu_backward(grad_y, ctx.alpha, ctx.s, ctx.beta, ctx.inplace, kept)
        else:
            grad_x = _times_derivative(grad_y, kept, ctx)  # (3)
        return grad_x, None, None, None, None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        (kept,) = ctx.saved_tensors
        return _times_derivative(tangent_x, kept, ctx)


def _value(alpha: float, s: float, beta: float) -> Callable[[Tensor], Tensor]:
    left = s * alpha

    def formula(x: Tensor) -> Tensor:
        # no further than 0: the loop then takes the cheaper function of what is below it
        return torch.where(x < 0, left * torch.expm1((beta * x).clamp(max=0)), s * x)

    def of_negative_beta(x: Tensor) -> Tensor:
        return torch.where(x < 0, left * torch.expm1(beta * x), s * x)

    return formula if beta > 0 else of_negative_beta


def _in_a_loop(ctx: Context) -> Callable[[Tensor, Tensor], Tensor]:
    s, beta = ctx.s, ctx.beta
    left = s * ctx.alpha * beta

    # (1); NaN as torch's vectors; in torch's order: v (left exp(βx)) has 1.4 % more in the tail, for SELU
    def formula(v: Tensor, x: Tensor) -> Tensor:
        return torch.where(x > 0, v * s, v * left * torch.exp((beta * x).clamp(max=0)))

    def of_negative_beta(v: Tensor, x: Tensor) -> Tensor:
        return torch.where(x > 0, v * s, v * left * torch.exp(beta * x))

    return formula if beta > 0 else of_negative_beta


def _times_derivative(v: Tensor, kept: Tensor, ctx: Context) -> Tensor:
    alpha, s, beta = ctx.alpha, ctx.s, ctx.beta

    def of_x(v: Tensor, x: Tensor) -> Tensor:
        left = s * alpha * beta * torch.exp(beta * clipped(x, -math.inf, 0.0))
        return v * torch.where(x <= 0, left, s)  # (1)

    def of_y(v: Tensor, y: Tensor) -> Tensor:
        return v * torch.where(y <= 0, beta * (y + s * alpha), s)  # (2)

    return in_pieces(of_y if ctx.inplace else of_x, v, kept)


# s · x where x > 0, else s · α · (exp(βx) - 1), for the public functions of the family
scaled_elu = entry(ELUFunction, again=ELUFunction.forward)


def scaled_elu_(op: str, x: Tensor, alpha: float, s: float, beta: float) -> Tensor:
    """Write what ``scaled_elu`` returns into ``x``."""
    if is_half(x):
        return overwrite(scaled_elu, x, alpha, s, beta, False)
    if alpha < 0 and torch.is_grad_enabled() and x.requires_grad:
        rule = "alpha >= 0 with inplace=True"
        raise RuntimeError(wrong(op, rule, alpha, "the sign is lost in place: inplace=False"))
    return scaled_elu(x, alpha, s, beta, True)


@public
def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    r"""Exponential linear unit, elementwise: :math:`y = x` where :math:`x > 0`, else :math:`\alpha (e^x - 1)`.

    Args:
        input: Any shape ``(*)``, floating point.
        alpha: The values approach :math:`-\alpha` at -∞.
        inplace: Write the result into ``input``; needs ``alpha >= 0`` where a gradient is wanted.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is no floating-point tensor; ``inplace`` with a negative ``alpha`` where a gradient is
            wanted, or on a leaf that requires grad.

    Example:
        >>> import torch
        >>> from torchbp.functional import elu
        >>> elu(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-0.6321,  0.0000,  2.0000])
    """
    if inplace:
        return scaled_elu_("elu", input, alpha, 1.0, 1.0)
    return scaled_elu(input, alpha, 1.0, 1.0, False)


@public
def elu_(input: Tensor, alpha: float = 1.0) -> Tensor:
    """In-place form of :func:`elu`."""
    return elu(input, alpha, inplace=True)


class ELU(nn.ELU):
    """Module form of :func:`elu`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return elu(input, self.alpha, self.inplace)


def _all_samples(make: Make) -> Iterator[Sample]:
    yield from _samples.elementwise(make)
    for alpha in (1.7, 0.0, -0.5):
        yield Sample((make.normal(3, 4), alpha), name=f"alpha{alpha}")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield ELU, Sample(), Sample((make.normal(3, 4),))
    x = make.normal(3, 4, requires_grad=False)
    yield ELU, Sample((0.7,), {"inplace": True}), Sample((x,), name="inplace")


OP = Op(
    function=elu,
    modules=(ELU,),
    reference=F.elu,
    samples=_all_samples,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    fused="aten::elu_backward",
)
