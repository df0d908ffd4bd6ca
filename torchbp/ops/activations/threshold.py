r"""Threshold: y = x where x > t, else c, with t ("threshold") and c ("value").

Derivation:
    dy/dx  = 1 where x > t, else 0                                                             (1)
    grad_x = grad_y · dy/dx                                                                    (2)
    For c ≤ t: x > t exactly where y > t, so (1) is seen from the output.

Saves:
    c ≤ t: y (4 bytes per float32 element), which a Linear behind it keeps anyway.   c > t: x.

Edge values:
    x = t: the subgradient 0.   NaN: y is NaN, and grad_y passes, as in torch.

Sources:
    Konda, Memisevic, Krueger, "Zero-bias autoencoders and the benefits of co-adapting features", 2014,
    arXiv:1402.3337 (with c = 0).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import (
    Context,
    entry,
    is_half,
    kernel,
    overwrite,
    public,
    undifferentiated,
)
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample

__all__ = ["Threshold", "ThresholdFunction", "threshold", "threshold_"]

_threshold_backward = kernel("threshold_backward")


class ThresholdFunction(Function):
    """Threshold with a hand-written derivative. Call it through :func:`threshold`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, t: float, c: float, inplace: bool) -> Tensor:  # x, y: (*)
        return torch.threshold_(x, t, c) if inplace else torch.threshold(x, t, c)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, float, float, bool], output: Tensor
    ) -> None:
        x, t, c, inplace = inputs
        if inplace:
            ctx.mark_dirty(x)
        kept = output if inplace or c <= t else x
        ctx.t = t
        ctx.save_for_backward(kept)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        (kept,) = ctx.saved_tensors
        if undifferentiated():
            return _threshold_backward(grad_y, kept, ctx.t), None, None, None
        return _where_above(grad_y, kept, ctx.t), None, None, None  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        (kept,) = ctx.saved_tensors
        return _where_above(tangent_x, kept, ctx.t)


def _where_above(v: Tensor, kept: Tensor, t: float) -> Tensor:
    # On a CPU t is compared as it is, elsewhere as kept's dtype rounds it: as the kernels do, of the forward too.
    wide = kept.float() if is_half(kept) and kept.is_cpu else kept
    return v.masked_fill(wide <= t, 0)  # (1); so written, NaN passes


_threshold = entry(ThresholdFunction, again=ThresholdFunction.forward)


@public
def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    r"""Threshold, elementwise: :math:`y = x` where :math:`x > t`, else :math:`c`.

    Args:
        input: Any shape ``(*)``, real.
        threshold: Above it values pass.
        value: What stands in the place of the others.
        inplace: Write the result into ``input``.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is boolean or complex, or ``inplace`` on a leaf that requires grad.

    Example:
        >>> import torch
        >>> from torchbp.functional import threshold
        >>> threshold(torch.tensor([-2.0, 0.5, 8.0]), 0.7, -1.0)
        tensor([-1., -1.,  8.])
    """
    if inplace and value > threshold and torch.is_grad_enabled() and input.requires_grad:
        return overwrite(_threshold, input, threshold, value, False)
    return _threshold(input, threshold, value, inplace)


_function = threshold  # an argument of threshold_ has its name


@public
def threshold_(input: Tensor, threshold: float, value: float) -> Tensor:
    """In-place form of :func:`threshold`."""
    return _function(input, threshold, value, inplace=True)


class Threshold(nn.Threshold):
    """Module form of :func:`threshold`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return threshold(input, self.threshold, self.value, self.inplace)


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample(("text", 0.0, 0.0), name="text")
    yield Sample((make.normal(2),), name="no-threshold")


def _benchmark(make: Make, n: int) -> Sample:
    return Sample((*_samples.square(make, n).args, 0.1, -0.5))


def _all_samples(make: Make) -> Iterator[Sample]:
    for sample in _samples.elementwise(make):
        yield Sample((*sample.args, 0.1, -0.5), name=sample.name)
    yield Sample((make.normal(3, 4), 0.1, 0.5), name="value-above")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Threshold, Sample((0.1, -0.2)), Sample((make.normal(3, 4),))
    x = make.normal(3, 4, requires_grad=False)
    yield Threshold, Sample((0.1, -0.2), {"inplace": True}), Sample((x,), name="inplace")


OP = Op(
    function=threshold,
    modules=(Threshold,),
    reference=F.threshold,
    samples=_all_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_benchmark,
    elementwise=False,
    fused="aten::threshold_backward",
)
