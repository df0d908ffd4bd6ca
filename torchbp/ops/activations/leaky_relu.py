r"""Leaky ReLU: y = x where x > 0, else a · x, with the slope a ("negative_slope").

Derivation:
    dy/dx  = 1 where x > 0, else a                                                            (1)
    grad_x = grad_y · dy/dx                                                                   (2)
    For a ≥ 0: x > 0 exactly where y > 0, so (1) is seen from the output.

Saves:
    a ≥ 0: y (4 bytes per float32 element), which a Linear behind it keeps anyway; torch keeps x,
    which nobody else does.
    a < 0: x (4 bytes), since y is positive on both sides.

Edge values:
    x = 0: the subgradient a, as in torch.   NaN: y is NaN, dy/dx is a, as in torch.

Sources:
    Maas, Hannun, Ng, "Rectifier Nonlinearities Improve Neural Network Acoustic Models", 2013, ICML workshop.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._errors import wrong
from torchbp.ops._function import Context, entry, kernel, public, undifferentiated
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample

__all__ = ["LeakyReLU", "LeakyReLUFunction", "leaky_relu"]

_leaky_relu_backward = kernel("leaky_relu_backward")


class LeakyReLUFunction(Function):
    """Leaky ReLU with a hand-written derivative. Call it through :func:`leaky_relu`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, slope: float, inplace: bool) -> Tensor:  # x, y: (*)
        return _nn.leaky_relu_(x, slope) if inplace else _nn.leaky_relu(x, slope)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, float, bool], output: Tensor) -> None:
        x, slope, inplace = inputs
        if inplace:
            ctx.mark_dirty(x)
        kept = output if slope >= 0 else x
        ctx.slope = slope
        ctx.save_for_backward(kept)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        if undifferentiated():
            grad_x = _leaky_relu_backward(grad_y, kept, ctx.slope, False)
            return grad_x, None, None
        return _times_slope(grad_y, kept, ctx.slope), None, None  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        (kept,) = ctx.saved_tensors
        return _times_slope(tangent_x, kept, ctx.slope)


def _times_slope(v: Tensor, kept: Tensor, slope: float) -> Tensor:
    return torch.where(kept > 0, v, v * slope)  # (1)


_leaky_relu = entry(LeakyReLUFunction, again=LeakyReLUFunction.forward)


@public
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    r"""Leaky ReLU, elementwise: :math:`y = x` where :math:`x > 0`, else :math:`a x`.

    Args:
        input: Any shape ``(*)``, floating point.
        negative_slope: The slope :math:`a` of the negative side.
        inplace: Write the result into ``input``; needs a slope of at least 0.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is no floating-point tensor; ``inplace`` with a negative slope where a gradient is
            wanted, or on a leaf that requires grad.

    Example:
        >>> import torch
        >>> from torchbp.functional import leaky_relu
        >>> leaky_relu(torch.tensor([-1.0, 2.0]), 0.5)
        tensor([-0.5000,  2.0000])
    """
    if inplace and negative_slope < 0 and torch.is_grad_enabled() and input.requires_grad:
        rule = "negative_slope >= 0 with inplace=True"
        raise RuntimeError(
            wrong("leaky_relu", rule, negative_slope, "its sign is lost in place: inplace=False")
        )
    return _leaky_relu(input, negative_slope, inplace)


class LeakyReLU(nn.LeakyReLU):
    """Module form of :func:`leaky_relu`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return leaky_relu(input, self.negative_slope, self.inplace)


def _samples_with_slopes(make: Make) -> Iterator[Sample]:
    yield from _samples.elementwise(make)
    for slope in (0.3, 0.0, -0.5):
        yield Sample((make.normal(3, 4), slope), name=f"slope{slope}")
    yield Sample((make.normal(3, 4),), {"negative_slope": 0.1}, name="keyword")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield LeakyReLU, Sample(), Sample((make.normal(3, 4),))
    x = make.normal(3, 4, requires_grad=False)
    yield LeakyReLU, Sample((0.2,), {"inplace": True}), Sample((x,), name="inplace")


OP = Op(
    function=leaky_relu,
    modules=(LeakyReLU,),
    reference=F.leaky_relu,
    samples=_samples_with_slopes,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    fused="aten::leaky_relu_backward",
)
