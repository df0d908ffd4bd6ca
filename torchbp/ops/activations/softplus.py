r"""Softplus: y = log(1 + exp(βx)) / β, and y = x where βx is above a threshold.

Derivation:
    dy/dx  = σ(βx), and 1 above the threshold                                                  (1)
    grad_x = grad_y · dy/dx                                                                    (2)

Saves:
    x, in its own dtype: 4 bytes per float32 element, as torch.

Edge values:
    x → +∞: y → x, dy/dx → 1.   x → -∞: y → 0, dy/dx → 0.   At the threshold y has a step of e^-threshold / β.

Sources:
    Goodfellow, Bengio, Courville, "Deep Learning", 2016, section 3.10.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, kernel, public, undifferentiated
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._samples import Make, Sample
from torchbp.ops.kernels import in_one_loop, many

__all__ = ["Softplus", "SoftplusFunction", "softplus"]

_softplus_backward = kernel("softplus_backward")


class SoftplusFunction(Function):
    """Softplus with a hand-written derivative. Call it through :func:`softplus`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, beta: float, threshold: float) -> Tensor:  # x, y: (*)
        if isinstance(x, Tensor) and many(x):
            y = in_one_loop(_values(beta, threshold), x)
            if y is not None:
                return y
        return F.softplus(x, beta, threshold)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        x, ctx.beta, ctx.threshold = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        if many(x):
            grad_x = in_one_loop(_times(ctx.beta, ctx.threshold), grad_y, x)
            if grad_x is not None:
                return grad_x, None, None
        if undifferentiated():
            return _softplus_backward(grad_y, x, ctx.beta, ctx.threshold), None, None
        return _times_derivative(grad_y, x, ctx.beta, ctx.threshold), None, None  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return _times_derivative(tangent_x, x, ctx.beta, ctx.threshold)


def _values(beta: float, threshold: float) -> Callable[[Tensor], Tensor]:
    if beta == 1:
        return partial(F.softplus, threshold=threshold)
    return partial(F.softplus, beta=beta, threshold=threshold)


def _times(beta: float, threshold: float) -> Callable[[Tensor, Tensor], Tensor]:
    def formula(v: Tensor, x: Tensor) -> Tensor:
        z = x if beta == 1 else beta * x
        return torch.where(z > threshold, v, v * torch.sigmoid(z))  # (1)

    return formula


def _times_derivative(v: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    return in_pieces(_times(beta, threshold), v, x)


_softplus = entry(SoftplusFunction, again=SoftplusFunction.forward)


@public
def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    r"""Softplus, elementwise: :math:`y = \log(1 + e^{\beta x}) / \beta`.

    Args:
        input: Any shape ``(*)``, floating point.
        beta: The sharpness :math:`\beta`.
        threshold: Where :math:`\beta x` is above it, :math:`y = x`.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is no floating-point tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import softplus
        >>> softplus(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([0.3133, 0.6931, 2.1269])
    """
    return _softplus(input, beta, threshold)


class Softplus(nn.Softplus):
    """Module form of :func:`softplus`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return softplus(input, self.beta, self.threshold)


def _all_samples(make: Make) -> Iterator[Sample]:
    yield from _samples.elementwise(make)
    yield Sample((make.normal(3, 4), 2.5), name="beta")
    yield Sample((make.normal(3, 4),), {"beta": 2, "threshold": 1}, name="threshold")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Softplus, Sample(), Sample((make.normal(3, 4),))
    yield Softplus, Sample((2.0, 1.0)), Sample((make.normal(3, 4),), name="arguments")


OP = Op(
    function=softplus,
    modules=(Softplus,),
    reference=F.softplus,
    samples=_all_samples,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    fused="aten::softplus_backward",
)
