r"""Softsign: y = x / (1 + |x|).

Derivation:
    dy/dx  = 1 / (1 + |x|)²                                                                    (1)
    grad_x = grad_y · dy/dx                                                                    (2)

Saves:
    x, in its own dtype: 4 bytes per float32 element; torch keeps x and 1 + |x|, 8 bytes.
    Not y: 1 - |y| has lost what (1) needs where |x| is large.

Edge values:
    x → ±∞: y → ±1, dy/dx → 0; torch gives NaN at ±∞.   x = 0: dy/dx = 1, from both sides.

Sources:
    Bergstra, Desjardins, Lamblin, Bengio, "Quadratic Polynomials Learn Better Image Features", 2009, TR 1337, Montréal.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, fused, public
from torchbp.ops._invalid import FEW, sound
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations._infinities import known_finite
from torchbp.ops.kernels import in_one_loop

__all__ = ["Softsign", "SoftsignFunction", "softsign"]


class SoftsignFunction(Function):
    """Softsign with a hand-written derivative. Call it through :func:`softsign`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, finite: bool | None) -> Tensor:  # x, y: (*)
        y = in_one_loop(_value, x)
        if y is not None:
            return y
        if finite is None:
            scale = x.abs().add_(1)
            y = torch.div(x, scale, out=scale) if x.is_floating_point() else x / scale
            if sound(y):
                return y
        largest = torch.finfo(x.dtype).max
        x = x.clamp(-largest, largest)  # ±∞ gives ±1
        if not fused(x, half=True):
            return x / (x.abs() + 1)
        scale = x.abs().add_(1)
        return torch.div(x, scale, out=scale)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, bool | None], output: Tensor) -> None:
        x, _ = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if fused(grad_y) and x.numel() <= FEW:
            scale = x.abs().add_(1)
            return torch.div(grad_y, scale.mul_(scale), out=scale), None
        return in_pieces(_times_derivative, grad_y, x), None  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, _: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return in_pieces(_times_derivative, tangent_x, x)


def _value(x: Tensor) -> Tensor:
    largest = torch.finfo(torch.float32).max
    x = x.clamp(-largest, largest)
    return x / (1 + x.abs())


def _times_derivative(v: Tensor, x: Tensor) -> Tensor:
    scale = 1 + x.abs()
    return v / (scale * scale)  # (1)


_softsign = entry(SoftsignFunction, again=SoftsignFunction.forward)


@public
def softsign(input: Tensor) -> Tensor:
    r"""Softsign, elementwise: :math:`y = x / (1 + |x|)`.

    Args:
        input: Any shape ``(*)``, floating point.

    Returns:
        Tensor of the shape and dtype of ``input``; values are in ``[-1, 1]``.

    Raises:
        AttributeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is no floating-point tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import softsign
        >>> softsign(torch.tensor([-1.0, 0.0, 3.0]))
        tensor([-0.5000,  0.0000,  0.7500])
    """
    if not input.is_floating_point():
        return F.softsign(
            input
        )  # integers have no gradient; complex |x| has no complex derivative: torch's own
    return _softsign(input, known_finite(input, many=False))


class Softsign(nn.Softsign):
    """Module form of :func:`softsign`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return softsign(input)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Softsign, Sample(), Sample((make.normal(3, 4),))


OP = Op(
    function=softsign,
    modules=(Softsign,),
    reference=F.softsign,
    samples=_samples.elementwise,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    limits={math.inf: (1.0, 0.0), -math.inf: (-1.0, 0.0)},
)
