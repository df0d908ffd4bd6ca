r"""Tanhshrink: y = x - tanh(x).

Derivation:
    with t = tanh(x), dt/dx = 1 - t²:  dy/dx = 1 - (1 - t²) = t²                               (1)
    grad_x = grad_y · conj(dy/dx)                                                              (2)
    t is an output too, which no caller sees; a second derivative goes through it: grad_t · conj(1 - t²) adds to (2).

Saves:
    t (4 bytes per float32 element), as torch. y would not do: near 0, y = x³/3 has lost x.
    bfloat16, float16: x (2 bytes), from which t is made again in float32.

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
from torchbp.ops._function import Context, entry, fused, is_half, public
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations._tanh import tanh
from torchbp.ops.kernels import in_one_loop, many

__all__ = ["Tanhshrink", "TanhshrinkFunction", "tanhshrink"]


class TanhshrinkFunction(Function):
    """Tanhshrink with a hand-written derivative. Call it through :func:`tanhshrink`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:  # x, y, t: (*)
        if isinstance(x, Tensor) and many(x):
            if is_half(x):
                y = in_one_loop(_value, x)
                made = None if y is None else (y, None)
            else:
                made = in_one_loop(_both, x, outputs=(None, None))
            if made is not None:
                return made
        t = tanh(x) if isinstance(x, Tensor) else x.tanh()  # torch's error
        return x - t, None if is_half(x) else t

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor], output: tuple[Tensor, Tensor | None]
    ) -> None:
        (x,), (_, t) = inputs, output
        ctx.set_materialize_grads(False)
        kept = x if t is None else t
        ctx.save_for_backward(kept)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor | None, grad_t: Tensor | None) -> Tensor | None:
        (kept,) = ctx.saved_tensors
        grad_x = None
        if grad_y is not None:
            grad_x = _times_derivative(grad_y, kept)  # (2)
        if grad_t is not None:
            by_t = grad_t * (1 - kept * kept).conj()
            grad_x = by_t if grad_x is None else grad_x + by_t
        return grad_x

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor) -> tuple[Tensor, Tensor | None]:
        (kept,) = ctx.saved_tensors
        tangent_y = _times_derivative(tangent_x, kept.conj())
        return tangent_y, None if is_half(kept) else tangent_x * (1 - kept * kept)


def _value(x: Tensor) -> Tensor:
    return x - torch.tanh(x)


def _both(x: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(x)
    return x - t, t


def _times_square(v: Tensor, t: Tensor) -> Tensor:
    return v * (t * t)


def _times_derivative(v: Tensor, kept: Tensor) -> Tensor:
    if is_half(kept):
        return in_pieces(lambda v, x: v * x.tanh().square(), v, kept, into=_of_input_into)
    by_square = in_one_loop(_times_square, v, kept)
    if by_square is not None:
        return by_square
    if fused(v, kept) and not v.is_complex():
        t = kept * kept
        return t.mul_(v)
    return v * (kept * kept).conj()  # (1)


def _of_input_into(grad_x: Tensor, v: Tensor, x: Tensor) -> None:
    torch.tanh(x, out=grad_x).square_().mul_(v)


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
    y, _ = _tanhshrink(input)
    return y


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
