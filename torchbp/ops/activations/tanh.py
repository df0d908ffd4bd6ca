r"""Hyperbolic tangent: y = tanh(x) = (exp(x) - exp(-x)) / (exp(x) + exp(-x)).

Derivation:
    dy/dx  = 1 / cosh²(x)
           = 1 - y²                           from the output                                 (1)
           = 4 · σ(2x) · σ(-2x)               from the input, since tanh(x) = 2 σ(2x) - 1     (2)
    grad_x = grad_y · conj(dy/dx)                                                             (3)

Saves:
    float32 and wider: y (4 bytes per float32 element), which a Linear behind it keeps anyway.
    bfloat16, float16: x (2 bytes). There y has lost what (1) needs: 1 - y² is 0 from x = 3.47 on in bfloat16, where
    dy/dx is still 3.9e-3. (2), in float32 from x, keeps it.

Edge values:
    x → ±∞: y → ±1, dy/dx → 0.   NaN gives NaN.

Sources:
    LeCun, Bottou, Orr, Müller, "Efficient BackProp", 1998, doi:10.1007/3-540-49430-8_2.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, is_half, kernel, public, undifferentiated
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations._tanh import TORCHS_IS_FAST
from torchbp.ops.activations._tanh import tanh as _tanh_of
from torchbp.ops.kernels import half_in_one_loop, in_one_loop

__all__ = ["Tanh", "TanhFunction", "tanh"]

_tanh_backward = kernel("tanh_backward")
_sigmoid_backward_into = kernel("sigmoid_backward", "grad_input")


class TanhFunction(Function):
    """Hyperbolic tangent with a hand-written derivative. Call it through :func:`tanh`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # x, y: (*)
        # float32 by MKL's takes 0.33 ms a million, by the loop 0.40
        y = (half_in_one_loop if TORCHS_IS_FAST else in_one_loop)(torch.tanh, x)
        return _tanh_of(x) if y is None else y

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,) = inputs
        kept = x if is_half(x) else output
        ctx.save_for_backward(kept)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        if undifferentiated() and not is_half(kept):
            return _tanh_backward(grad_y, kept)
        grad_x = half_in_one_loop(_by_one_exponential, grad_y, kept)
        if grad_x is not None:
            return grad_x
        return _times_derivative(grad_y, kept)  # (3)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        return _times_derivative(tangent_x, kept.conj())


def _times_derivative(v: Tensor, kept: Tensor) -> Tensor:
    if is_half(kept):
        return in_pieces(_from_input, v, kept, into=_from_input_into)
    return v * (1 - kept * kept).conj()  # (1)


def _from_input(v: Tensor, x: Tensor) -> Tensor:
    return v * (4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x))  # (2)


def _by_one_exponential(v: Tensor, x: Tensor) -> Tensor:
    e = torch.exp(-2 * x.abs())
    d = 1 + e
    return v * (4 * e / (d * d))  # (2), which is even in x


def _from_input_into(grad_x: Tensor, v: Tensor, x: Tensor) -> None:
    # (2) is even in x, and of σ(-2|x|) the complement is exact: one sigmoid
    s = torch.abs(x, out=grad_x).mul_(-2).sigmoid_()
    _sigmoid_backward_into(v, s, grad_input=grad_x).mul_(4)


_tanh = entry(TanhFunction, again=TanhFunction.forward)


@public
def tanh(input: Tensor) -> Tensor:
    r"""Hyperbolic tangent, elementwise: :math:`y = \tanh(x)`.

    Args:
        input: Any shape ``(*)``; floating point, complex, or integers, which become the default dtype.

    Returns:
        Tensor of the shape of ``input``; values are in ``[-1, 1]``.

    Raises:
        TypeError: ``input`` is not a tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import tanh
        >>> tanh(torch.tensor([0.0, 2.0]))
        tensor([0.0000, 0.9640])
    """
    return _tanh(input)


class Tanh(nn.Tanh):
    """Module form of :func:`tanh`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return tanh(input)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Tanh, Sample(), Sample((make.normal(3, 4),))


OP = Op(
    function=tanh,
    modules=(Tanh,),
    reference=torch.tanh,
    samples=_samples.elementwise,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    fused="aten::tanh_backward",
)
