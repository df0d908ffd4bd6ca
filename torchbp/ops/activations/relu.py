r"""Rectified linear unit: y = max(x, 0).

Derivation:
    dy/dx  = 1 where x > 0, else 0;  x > 0 exactly where y > 0                                (1)
    grad_x = grad_y where y > 0, else 0                                                       (2)

Saves:
    y (4 bytes per float32 element), which a Linear behind it keeps anyway.

Edge values:
    x = 0: the subgradient 0.   x = NaN: y is NaN, and grad_y passes, as in torch.   x = +∞: 1.

Sources:
    Glorot, Bordes, Bengio, "Deep Sparse Rectifier Neural Networks", 2011, AISTATS.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, kernel, public, undifferentiated
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample

__all__ = ["ReLU", "ReLUFunction", "relu"]

_threshold_backward = kernel("threshold_backward")


class ReLUFunction(Function):
    """Rectified linear unit with a hand-written derivative. Call it through :func:`relu`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, inplace: bool) -> Tensor:  # x, y: (*)
        return torch.relu_(x) if inplace else torch.relu(x)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        x, inplace = inputs
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        if undifferentiated():
            return _threshold_backward(grad_y, y, 0.0), None
        return _where_positive(grad_y, y), None  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, _: None) -> Tensor:
        (y,) = ctx.saved_tensors
        return _where_positive(tangent_x, y)


def _where_positive(v: Tensor, y: Tensor) -> Tensor:
    return v.masked_fill(y <= 0, 0)  # (1); not `y > 0`: NaN must pass


_relu = entry(ReLUFunction, again=ReLUFunction.forward)


@public
def relu(input: Tensor, inplace: bool = False) -> Tensor:
    r"""Rectified linear unit, elementwise: :math:`y = \max(x, 0)`.

    Args:
        input: Any shape ``(*)``, real.
        inplace: Write the result into ``input``.

    Returns:
        Tensor of the shape and dtype of ``input``; values are in ``[0, ∞]``.

    Raises:
        TypeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is boolean or complex, or ``inplace`` on a leaf that requires grad.

    Example:
        >>> import torch
        >>> from torchbp.functional import relu
        >>> relu(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """
    return _relu(input, inplace)


class ReLU(nn.ReLU):
    """Module form of :func:`relu`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return relu(input, self.inplace)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield ReLU, Sample(), Sample((make.normal(3, 4),))
    yield ReLU, Sample((True,)), Sample((make.normal(3, 4, requires_grad=False),), name="inplace")


OP = Op(
    function=relu,
    modules=(ReLU,),
    reference=F.relu,
    samples=_samples.elementwise,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    fused="aten::threshold_backward",
)
