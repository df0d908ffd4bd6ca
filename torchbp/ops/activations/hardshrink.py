r"""Hardshrink: y = x where |x| > λ ("lambd"), else 0.

Derivation:
    dy/dx  = 1 where |x| > λ, else 0;  for λ ≥ 0, |x| > λ exactly where y ≠ 0                  (1)
    grad_x = grad_y · dy/dx                                                                    (2)

Saves:
    y (4 bytes per float32 element), which a Linear behind it keeps anyway; torch keeps x, which nobody else does.

Edge values:
    x = ±λ: the subgradient 0.   λ < 0: the identity.   NaN: y is NaN, and grad_y passes, as in torch.

Sources:
    Donoho, Johnstone, "Ideal spatial adaptation by wavelet shrinkage", 1994, doi:10.1093/biomet/81.3.425.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, kernel, public, undifferentiated
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample

__all__ = ["Hardshrink", "HardshrinkFunction", "hardshrink"]

_hardshrink_backward = kernel("hardshrink_backward")


class HardshrinkFunction(Function):
    """Hardshrink with a hand-written derivative. Call it through :func:`hardshrink`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, lambd: float) -> Tensor:  # x, y: (*)
        return F.hardshrink(x, lambd)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, float], output: Tensor) -> None:
        _, ctx.lambd = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        if undifferentiated():
            return _hardshrink_backward(grad_y, y, 0.0 if ctx.lambd >= 0 else ctx.lambd), None
        return _where_kept(grad_y, y, ctx.lambd), None  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, _: None) -> Tensor:
        (y,) = ctx.saved_tensors
        return _where_kept(tangent_x, y, ctx.lambd)


def _where_kept(v: Tensor, y: Tensor, lambd: float) -> Tensor:
    return v.masked_fill(y == 0, 0) if lambd >= 0 else v * 1  # (1)


_hardshrink = entry(HardshrinkFunction, again=HardshrinkFunction.forward)


@public
def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    r"""Hard shrinkage, elementwise: :math:`y = x` where :math:`|x| > \lambda`, else 0.

    Args:
        input: Any shape ``(*)``, floating point.
        lambd: The width :math:`\lambda` of what becomes 0.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is no floating-point tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import hardshrink
        >>> hardshrink(torch.tensor([-2.0, 0.3, 1.0]))
        tensor([-2.,  0.,  1.])
    """
    return _hardshrink(input, lambd)


class Hardshrink(nn.Hardshrink):
    """Module form of :func:`hardshrink`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return hardshrink(input, self.lambd)


def _all_samples(make: Make) -> Iterator[Sample]:
    yield from _samples.elementwise(make)
    for lambd in (0.2, 0.0, -0.5):
        yield Sample((make.normal(3, 4), lambd), name=f"lambd{lambd}")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Hardshrink, Sample(), Sample((make.normal(3, 4),))
    yield Hardshrink, Sample((0.2,)), Sample((make.normal(3, 4),), name="arguments")


OP = Op(
    function=hardshrink,
    modules=(Hardshrink,),
    reference=F.hardshrink,
    samples=_all_samples,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    fused="aten::hardshrink_backward",
)
