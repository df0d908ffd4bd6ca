r"""Softshrink: y = x - λ where x > λ ("lambd"), x + λ where x < -λ, else 0.

Derivation:
    dy/dx  = 1 where |x| > λ, which is exactly where y ≠ 0; else 0                             (1)
    grad_x = grad_y · dy/dx                                                                    (2)

Saves:
    y (4 bytes per float32 element), which a Linear behind it keeps anyway; torch keeps x, which nobody else does.

Edge values:
    x = ±λ: the subgradient 0.   NaN: y is NaN, and grad_y passes, as in torch.

Sources:
    Donoho, "De-noising by soft-thresholding", 1995, doi:10.1109/18.382009.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, kernel, public, undifferentiated
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample

__all__ = ["Softshrink", "SoftshrinkFunction", "softshrink"]

_softshrink_backward = kernel("softshrink_backward")


class SoftshrinkFunction(Function):
    """Softshrink with a hand-written derivative. Call it through :func:`softshrink`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, lambd: float) -> Tensor:  # x, y: (*)
        return F.softshrink(x, lambd)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, float], output: Tensor) -> None:
        _, ctx.lambd = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        if undifferentiated():
            return _softshrink_backward(grad_y, y, 0), None
        return _where_not_zero(grad_y, y), None  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, _: None) -> Tensor:
        (y,) = ctx.saved_tensors
        return _where_not_zero(tangent_x, y)


def _where_not_zero(v: Tensor, y: Tensor) -> Tensor:
    return v.masked_fill(y == 0, 0)  # (1)


_softshrink = entry(SoftshrinkFunction, again=SoftshrinkFunction.forward)


@public
def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    r"""Soft shrinkage, elementwise: :math:`y = \mathrm{sign}(x) \max(|x| - \lambda, 0)`.

    Args:
        input: Any shape ``(*)``, floating point.
        lambd: How far values move towards 0, :math:`\lambda \ge 0`.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is no floating-point tensor, or ``lambd`` is negative.

    Example:
        >>> import torch
        >>> from torchbp.functional import softshrink
        >>> softshrink(torch.tensor([-2.0, 0.3, 1.0]))
        tensor([-1.5000,  0.0000,  0.5000])
    """
    return _softshrink(input, lambd)


class Softshrink(nn.Softshrink):
    """Module form of :func:`softshrink`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return softshrink(input, self.lambd)


def _errors(make: Make) -> Iterator[Sample]:
    yield from _samples.elementwise_errors(make)
    yield Sample((make.normal(3), -1.0), name="negative")


def _all_samples(make: Make) -> Iterator[Sample]:
    yield from _samples.elementwise(make)
    for lambd in (0.2, 0.0):
        yield Sample((make.normal(3, 4), lambd), name=f"lambd{lambd}")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Softshrink, Sample(), Sample((make.normal(3, 4),))
    yield Softshrink, Sample((0.2,)), Sample((make.normal(3, 4),), name="arguments")


OP = Op(
    function=softshrink,
    modules=(Softshrink,),
    reference=F.softshrink,
    samples=_all_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    fused="aten::softshrink_backward",
)
