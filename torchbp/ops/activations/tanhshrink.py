r"""Tanhshrink: y = x - tanh(x).

Derivation:
    dy/dx  = 1 - (1 - tanh²(x)) = tanh²(x)                                                     (1)
    grad_x = grad_y · conj(dy/dx)                                                              (2)

Saves:
    x, in its own dtype: 4 bytes per float32 element, as torch. y would not do: near 0, y = x³/3 has lost x.

Edge values:
    x → ±∞: y → x, dy/dx → 1.   NaN gives NaN.   x → 0: dy/dx → x², to full relative precision (torch: 1 - (1 - x²)).

Sources:
    Goodfellow, Bengio, Courville, "Deep Learning", 2016, section 6.3.2 (tanh).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, fused, public
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._samples import Make, Sample

__all__ = ["Tanhshrink", "TanhshrinkFunction", "tanhshrink"]


class TanhshrinkFunction(Function):
    """Tanhshrink with a hand-written derivative. Call it through :func:`tanhshrink`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # x, y: (*)
        t = x.tanh()
        return torch.sub(x, t, out=t) if fused(x) else x - t

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,) = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return in_pieces(_times_derivative, grad_y, x)  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return in_pieces(_times_derivative, tangent_x, x.conj())


def _times_derivative(v: Tensor, x: Tensor) -> Tensor:
    t = torch.tanh(x)
    if fused(v, t):
        return t.mul_(t).conj().mul_(v)
    return v * (t * t).conj()  # (1)


_tanhshrink = entry(TanhshrinkFunction, again=TanhshrinkFunction.forward)


@public
def tanhshrink(input: Tensor) -> Tensor:
    r"""Tanh shrink, elementwise: :math:`y = x - \tanh(x)`.

    Args:
        input: Any shape ``(*)``, floating point or complex.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        AttributeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is no floating-point tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import tanhshrink
        >>> tanhshrink(torch.tensor([-1.0, 0.0, 3.0]))
        tensor([-0.2384,  0.0000,  2.0049])
    """
    return _tanhshrink(input)


class Tanhshrink(nn.Tanhshrink):
    """Module form of :func:`tanhshrink`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return tanhshrink(input)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Tanhshrink, Sample(), Sample((make.normal(3, 4),))


OP = Op(
    function=tanhshrink,
    modules=(Tanhshrink,),
    reference=F.tanhshrink,
    samples=_samples.elementwise,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
)
