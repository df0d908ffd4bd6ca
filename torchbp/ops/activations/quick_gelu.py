r"""QuickGELU: y = x · σ(a x), a = 1.702, the sigmoid approximation of GELU.

Derivation:
    dy/dx  = σ(ax) + x · a · σ(ax) · σ(-ax)  = σ(ax) · (1 + a x · σ(-ax))                       (1)
    grad_x = grad_y · conj(dy/dx)                                                                   (2)
    With z = a x: y = silu(z) / a and dy/dx = silu'(z).

Saves:
    x, in its own dtype: 4 bytes per float32 element; the composition in torch ops keeps 8.

Edge values:
    x → +∞: y → x, dy/dx → 1.   x → -∞: y → 0, dy/dx → 0.   NaN gives NaN.

Sources:
    Hendrycks, Gimpel, "Gaussian Error Linear Units (GELUs)", 2016, arXiv:1606.08415.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, fused, kernel, public
from torchbp.ops._jagged import row_by_row
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations import silu
from torchbp.ops.activations._infinities import (
    at_once,
    bounded,
    known_finite,
    limited,
    value,
    with_limits,
)
from torchbp.ops.kernels import many

__all__ = ["QuickGELU", "QuickGELUFunction", "quick_gelu"]

_silu_backward_into = kernel("silu_backward", "grad_input")

_A = 1.702


class QuickGELUFunction(Function):
    """QuickGELU with a hand-written derivative. Call it through :func:`quick_gelu`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, finite: bool | None) -> Tensor:  # x, y: (*)
        if x.is_cuda or many(x):
            return value(_value, x, finite, _formula, loop=True)
        return limited(_value(x), x, finite)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, bool | None], output: Tensor) -> None:
        x, ctx.finite = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if x.is_cuda or many(x):
            grad_x = at_once(_times_derivative if x.is_cuda else _by_one_sigmoid, grad_y, x)  # (2)
            if grad_x is not None:
                return grad_x, None
        if fused(grad_y, x) and not x.is_complex():
            return with_limits(_backward, grad_y, x, ctx.finite), None
        return in_pieces(_times_derivative, grad_y, bounded(x)), None  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, _: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return in_pieces(_times_derivative, tangent_x, bounded(x).conj())


def _value(input: Tensor) -> Tensor:
    return in_pieces(_formula, input)


def _formula(x: Tensor) -> Tensor:
    return x * torch.sigmoid(_A * x)


def _backward(grad_y: Tensor, x: Tensor) -> Tensor:
    z = x * _A
    return _silu_backward_into(grad_y, z, grad_input=z)


def _by_one_sigmoid(v: Tensor, x: Tensor) -> Tensor:
    return silu._by_one_sigmoid(v, _A * x)


def _times_derivative(v: Tensor, x: Tensor) -> Tensor:
    z = _A * x
    return v * (torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))).conj()  # (1)


_quick_gelu = entry(QuickGELUFunction, again=QuickGELUFunction.forward)


@public
@row_by_row()
def quick_gelu(input: Tensor) -> Tensor:
    r"""GELU by a sigmoid, elementwise: :math:`y = x \sigma(1.702 x)`.

    Args:
        input: Any shape ``(*)``, floating point or complex.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is no floating-point tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import quick_gelu
        >>> quick_gelu(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-0.1542,  0.0000,  1.9357])
    """
    return _quick_gelu(input, known_finite(input, loop=True))


class QuickGELU(nn.Module):
    """Module form of :func:`quick_gelu`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return quick_gelu(input)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield QuickGELU, Sample(), Sample((make.normal(3, 4),))


OP = Op(
    function=quick_gelu,
    modules=(QuickGELU,),
    reference=_value,
    samples=_samples.elementwise,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    limits={math.inf: (math.inf, 1.0), -math.inf: (0.0, 0.0)},
    fused="aten::silu_backward",
)
