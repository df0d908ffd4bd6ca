r"""Sigmoid: y = σ(x) = 1 / (1 + exp(-x)).

Derivation:
    dy/dx  = exp(-x) / (1 + exp(-x))²
           = y · (1 - y)                      from the output                                 (1)
           = σ(x) · σ(-x)                     from the input, since 1 - σ(x) = σ(-x)          (2)
    grad_x = grad_y · conj(dy/dx)                                                             (3)

Saves:
    float32 and wider: y (4 bytes per float32 element), which a Linear behind it keeps anyway.
    bfloat16, float16: x (2 bytes). There y has lost what (1) needs: 1 - y is 0 from x = 6.25 on in bfloat16, where
    dy/dx is still 1.9e-3. (2), in float32 from x, keeps it.

Edge values:
    x → ±∞: y → 1 or 0, dy/dx → 0.   NaN gives NaN.

Sources:
    Rumelhart, Hinton, Williams, "Learning representations by back-propagating errors", 1986, doi:10.1038/323533a0.
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
from torchbp.ops.kernels import half_in_one_loop

__all__ = ["Sigmoid", "SigmoidFunction", "sigmoid"]

_sigmoid_backward = kernel("sigmoid_backward")
_sigmoid_backward_into = kernel("sigmoid_backward", "grad_input")


class SigmoidFunction(Function):
    """Sigmoid with a hand-written derivative. Call it through :func:`sigmoid`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # x, y: (*)
        y = half_in_one_loop(torch.sigmoid, x)
        return torch.sigmoid(x) if y is None else y

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,) = inputs
        kept = x if is_half(x) else output
        ctx.save_for_backward(kept)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        if undifferentiated() and not is_half(kept):
            return _sigmoid_backward(grad_y, kept)
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
    return v * (kept * (1 - kept)).conj()  # (1)


def _from_input(v: Tensor, x: Tensor) -> Tensor:
    return v * (torch.sigmoid(x) * torch.sigmoid(-x))  # (2)


def _by_one_exponential(v: Tensor, x: Tensor) -> Tensor:
    e = torch.exp(-x.abs())
    d = 1 + e
    return v * (e / (d * d))  # (2), which is even in x


def _from_input_into(grad_x: Tensor, v: Tensor, x: Tensor) -> None:
    # (2) is even in x, and of σ(-|x|) the complement is exact: one sigmoid
    y = torch.abs(x, out=grad_x).neg_().sigmoid_()
    _sigmoid_backward_into(v, y, grad_input=grad_x)


_sigmoid = entry(SigmoidFunction, again=SigmoidFunction.forward)


@public
def sigmoid(input: Tensor) -> Tensor:
    r"""Logistic sigmoid, elementwise: :math:`y = 1 / (1 + e^{-x})`.

    Args:
        input: Any shape ``(*)``; floating point, complex, or integers, which become the default dtype.

    Returns:
        Tensor of the shape of ``input``; values are in ``[0, 1]``.

    Raises:
        TypeError: ``input`` is not a tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import sigmoid
        >>> sigmoid(torch.tensor([0.0, 2.0]))
        tensor([0.5000, 0.8808])
    """
    return _sigmoid(input)


class Sigmoid(nn.Sigmoid):
    """Module form of :func:`sigmoid`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return sigmoid(input)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Sigmoid, Sample(), Sample((make.normal(3, 4),))


OP = Op(
    function=sigmoid,
    modules=(Sigmoid,),
    reference=torch.sigmoid,
    samples=_samples.elementwise,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    fused="aten::sigmoid_backward",
)
