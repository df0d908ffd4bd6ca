r"""SiLU (swish): y = x · σ(x).

Derivation:
    dy/dx  = σ(x) + x · σ(x) · σ(-x)  = σ(x) · (1 + x · σ(-x)),  since σ' = σ(x) · σ(-x)        (1)
    grad_x = grad_y · conj(dy/dx)                                                              (2)

Saves:
    x, in its own dtype: 4 bytes per float32 element, as torch. Not y: x is no function of it, and near
    the minimum of y an error of ε in y is one of √ε in the derivative.

Edge values:
    x → +∞: y → x, dy/dx → 1.   x → -∞: y → 0, dy/dx → 0; torch gives NaN at x = -∞, and as derivative at ±∞.

Sources:
    Elfwing, Uchibe, Doya, "Sigmoid-Weighted Linear Units for Neural Network Function Approximation in
    Reinforcement Learning", 2017, arXiv:1702.03118.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, kernel, overwrite, public, undifferentiated
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations._infinities import (
    at_once,
    bounded,
    known_finite,
    value,
    with_limits,
)
from torchbp.ops.kernels import many

__all__ = ["SiLU", "SiLUFunction", "silu"]

_silu_backward = kernel("silu_backward")


class SiLUFunction(Function):
    """SiLU (swish) with a hand-written derivative. Call it through :func:`silu`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, finite: bool | None) -> Tensor:  # x, y: (*)
        return value(_nn.silu, x, finite, _value, loop=True)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, bool | None], output: Tensor) -> None:
        x, finite = inputs
        if finite is not None:  # the first thing set on ctx takes 0.6 µs
            ctx.finite = finite
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if x.is_cuda or many(x):
            grad_x = at_once(_by_one_sigmoid, grad_y, x)  # (2)
            if grad_x is not None:
                return grad_x, None
        if undifferentiated() and not x.is_complex():
            return with_limits(_silu_backward, grad_y, x, getattr(ctx, "finite", None)), None
        return in_pieces(_times_derivative, grad_y, bounded(x)), None  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, _: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return in_pieces(_times_derivative, tangent_x, bounded(x).conj())


def _value(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _by_one_sigmoid(v: Tensor, x: Tensor) -> Tensor:
    return v * _slope(x, torch.sigmoid(x))


def _slope(x: Tensor, s: Tensor) -> Tensor:
    # 1 - s cancels where x · σ(-x) is lost beside 1; near the root at -1.28 it is nearer than σ(-x)
    return s * (1 + x * (1 - s))  # (1)


def _times_derivative(v: Tensor, x: Tensor) -> Tensor:
    return v * (torch.sigmoid(x) * (1 + x * torch.sigmoid(-x))).conj()  # (1)


_silu = entry(SiLUFunction, again=SiLUFunction.forward)


@public
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    r"""SiLU, or swish, elementwise: :math:`y = x \sigma(x)`.

    Args:
        input: Any shape ``(*)``, floating point or complex.
        inplace: Write the result into ``input``.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is no floating-point tensor, or ``inplace`` on a leaf that requires grad.

    Example:
        >>> import torch
        >>> from torchbp.functional import silu
        >>> silu(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-0.2689,  0.0000,  1.7616])
    """
    if inplace:
        return overwrite(_silu, input, known_finite(input, loop=True))
    return _silu(input, known_finite(input, loop=True))


class SiLU(nn.SiLU):
    """Module form of :func:`silu`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return silu(input, self.inplace)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield SiLU, Sample(), Sample((make.normal(3, 4),))
    x = make.normal(3, 4, requires_grad=False)
    yield SiLU, Sample((), {"inplace": True}), Sample((x,), name="inplace")


OP = Op(
    function=silu,
    modules=(SiLU,),
    reference=F.silu,
    samples=_samples.elementwise,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    limits={math.inf: (math.inf, 1.0), -math.inf: (0.0, 0.0)},
    fused="aten::silu_backward",
)
