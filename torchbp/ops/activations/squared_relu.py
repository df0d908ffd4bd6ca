r"""Squared ReLU: y = max(x, 0)².

Derivation:
    dy/dx  = 2 · max(x, 0)                                                                     (1)
    grad_x = grad_y · dy/dx                                                                    (2)

Saves:
    x, in its own dtype: 4 bytes per float32 element, as the composition in torch ops.

Edge values:
    x = 0: dy/dx = 0, from both sides.   x → +∞: both → ∞.   NaN gives NaN.

Sources:
    So et al., "Primer: Searching for Efficient Transformers for Language Modeling", 2021, arXiv:2109.08668.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, public, scale_fresh
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._samples import Make, Sample
from torchbp.ops.kernels import in_one_loop

__all__ = ["SquaredReLU", "SquaredReLUFunction", "squared_relu"]


class SquaredReLUFunction(Function):
    """Squared ReLU with a hand-written derivative. Call it through :func:`squared_relu`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # x, y: (*)
        y = in_one_loop(_value, x)
        return _value(x) if y is None else y

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,) = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return in_pieces(_times_derivative, grad_y, x)  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return in_pieces(_times_derivative, tangent_x, x)


def _value(input: Tensor) -> Tensor:
    return torch.relu(input).square()


def _times_derivative(v: Tensor, x: Tensor) -> Tensor:
    return scale_fresh(torch.relu(x), 2 * v)  # (1)


_squared_relu = entry(SquaredReLUFunction, again=SquaredReLUFunction.forward)


@public
def squared_relu(input: Tensor) -> Tensor:
    r"""Square of the rectified linear unit, elementwise: :math:`y = \max(x, 0)^2`.

    Args:
        input: Any shape ``(*)``, real.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is boolean or complex.

    Example:
        >>> import torch
        >>> from torchbp.functional import squared_relu
        >>> squared_relu(torch.tensor([-1.0, 0.5, 2.0]))
        tensor([0.0000, 0.2500, 4.0000])
    """
    return _squared_relu(input)


class SquaredReLU(nn.Module):
    """Module form of :func:`squared_relu`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return squared_relu(input)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield SquaredReLU, Sample(), Sample((make.normal(3, 4),))


OP = Op(
    function=squared_relu,
    modules=(SquaredReLU,),
    reference=_value,
    samples=_samples.elementwise,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
)
