r"""Group normalization: y = x̂ · w + b with x̂ = (x - μ) · r, r = 1/√(v + ε), over each group of channels of each sample.

Derivation, for one group of one sample: D = C/G · L elements (∂x̂/∂x: _standardize.py);
    with s = grad_y · w, the gradient of x̂, w and b one of each a channel:
    grad_x = r · (s - mean(s) - x̂ · mean(s · x̂))                                             (1)
    grad_w = Σ over samples and positions of grad_y · x̂                                       (2)
    grad_b = Σ over samples and positions of grad_y                                           (3)
    tangent_y = r · (t - mean(t) - x̂ · mean(t · x̂)) · w + x̂ · tangent_w + tangent_b,  t = tangent_x     (4)

Saves:
    x (4 bytes per float32 element), w, and μ and r, one of each a group, which only the fused kernel uses.
    Half precision: x (2 bytes) and w alone; statistics and sums are made again in float32.

Edge values:
    A constant group: x̂ = 0, r = 1/√ε.   ±inf or NaN: NaN in that group.   No samples: y is empty, grad_w and grad_b 0.

Sources:
    Wu, He, "Group Normalization", 2018, arXiv:1803.08494.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._autocast import autocasts
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import Context, as_dtype, entry, is_half, public, widened
from torchbp.ops._op import Op
from torchbp.ops._range import in_float64, norms_in_range
from torchbp.ops._samples import Make, Sample
from torchbp.ops.kernels import over_groups
from torchbp.ops.normalization._by_kernels import group_norm_gradients
from torchbp.ops.normalization._group_rows import grouped, rows_forward
from torchbp.ops.normalization._half_norms import as_kernels_take_it, half_group_norm, sizes
from torchbp.ops.normalization._standardize import (
    along_channels,
    channel_sum,
    project,
    standardize,
)

__all__ = ["GroupNorm", "GroupNormFunction", "group_norm"]


class GroupNormFunction(Function):
    """Group normalization with hand-written gradients. Call it through :func:`group_norm`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # (N, C, *), (C,), (C,) -> (N, C, *); mean, rstd: (N, G)
        x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        made = over_groups(x, groups, weight, bias, eps)
        if made is not None:
            return made
        if x.dim() == 2 and not is_half(x):
            return rows_forward(x, groups, weight, bias, eps)
        if is_half(x):
            return half_group_norm(x, groups, weight, bias, eps)
        # contiguous: the CPU kernels (torch 2.13) read parameters as if they were
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
        return torch.native_group_norm(as_kernels_take_it(x), weight, bias, *sizes(x), groups, eps)

    @staticmethod
    def setup_context(
        ctx: Context,
        inputs: tuple[Tensor, int, Tensor | None, Tensor | None, float],
        output: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        x, ctx.groups, weight, bias, ctx.eps = inputs
        _, mean, rstd = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        need_x, _, need_weight, *_ = ctx.needs_input_grad
        needed = need_x or need_weight
        statistics = (mean, rstd) if needed and not is_half(x) else (None, None)
        kept = (x, weight) if needed else (None, None)
        ctx.save_for_backward(*kept, *statistics)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(
        ctx: Context, grad_y: Tensor | None, *_statistics: None
    ) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        if grad_y is None:
            return None, None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        need_x, _, need_weight, need_bias, _ = ctx.needs_input_grad
        if x is not None:
            needs = [need_x, need_weight, need_bias]
            grads = group_norm_gradients(grad_y, x, ctx.groups, weight, mean, rstd, ctx.eps, needs)
            if grads is not None:
                grad_x, grad_weight, grad_bias = (
                    as_dtype(g, dtype) if g is not None and needed else None
                    for g, dtype, needed in zip(grads, (x.dtype, *ctx.dtypes), needs, strict=True)
                )
                return grad_x, None, grad_weight, grad_bias, None

        weight_dtype, bias_dtype = ctx.dtypes
        grad_x = grad_weight = grad_bias = None
        g = widened(grad_y)
        if x is not None:
            normalized, r = standardize(grouped(x, ctx.groups), (2,), ctx.eps)
            if need_x:
                s = g if weight is None else g * along_channels(weight, g)
                grad_x = project(grouped(s, ctx.groups), normalized, r, (2,))  # (1)
                grad_x = grad_x.reshape(g.shape).to(grad_y.dtype)
            if need_weight:
                grad_weight = channel_sum(g * normalized.reshape(g.shape)).to(weight_dtype)  # (2)
        if need_bias:
            grad_bias = channel_sum(g).to(bias_dtype)  # (3)
        return grad_x, None, grad_weight, grad_bias, None

    @staticmethod
    def jvp(
        ctx: Context,
        tangent_x: Tensor | None,
        _groups: None,
        tangent_weight: Tensor | None,
        tangent_bias: Tensor | None,
        _eps: None,
    ) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        normalized, r = standardize(grouped(x, ctx.groups), (2,), ctx.eps)
        tangent_y = torch.zeros_like(normalized).reshape(x.shape)  # (4)
        if tangent_x is not None:
            t = project(grouped(widened(tangent_x), ctx.groups), normalized, r, (2,))
            t = t.reshape(x.shape)
            tangent_y = tangent_y + (t if weight is None else t * along_channels(weight, x))
        if tangent_weight is not None:
            scale = along_channels(tangent_weight, x)
            tangent_y = tangent_y + normalized.reshape(x.shape) * scale
        if tangent_bias is not None:
            tangent_y = tangent_y + along_channels(tangent_bias, x)
        return tangent_y.to(x.dtype), None, None


_group_norm = entry(GroupNormFunction, again=GroupNormFunction.forward)


def normalized_groups(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return y of (N, C, *), in float64 where float32 has no squares of x; the arguments have been checked."""
    y, _, r = _group_norm(x, groups, weight, bias, eps)
    return y if norms_in_range(r) else in_float64(normalized_groups, x, groups, weight, bias, eps)


@public
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalize over groups of channels: :math:`y = (x - \mu) / \sqrt{v + \epsilon} \cdot w + b`.

    Args:
        input: ``(N, C, *)``, floating point.
        num_groups: Number of groups, which divides C; each has its own mean and variance in each sample.
        weight: ``(C,)``, or ``None`` for ones.
        bias: ``(C,)``, or ``None`` for zeros.
        eps: Added to the variance.

    Returns:
        Tensor of the shape and dtype of ``input``. In half precision statistics and sums are taken in float32.

    Raises:
        RuntimeError: Shapes do not fit, or ``num_groups`` does not divide C.
        ValueError: A group of one value.
        ZeroDivisionError: ``num_groups`` is 0.
        NotImplementedError: ``input`` is no floating-point tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import group_norm
        >>> group_norm(torch.tensor([[1.0, 3.0, 5.0, 9.0]]), 2)
        tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """
    if input.dim() < 2:
        rule = "input of shape (N, C, *)"
        raise RuntimeError(wrong("group_norm", rule, shape(input), "the second dimension is C"))
    n, channels, positions = sizes(input)
    if n * channels // num_groups * positions == 1:
        rule = "more than 1 value per group"
        raise ValueError(wrong("group_norm", rule, shape(input), "the variance of one value is 0"))
    if channels % num_groups:
        rule = f"num_groups that divides the {channels} channels"
        raise RuntimeError(wrong("group_norm", rule, num_groups, "take a divisor"))
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and tuple(t.shape) != (channels,):
            rule = f"{name} of shape {(channels,)} for an input of shape {shape(input)}"
            raise RuntimeError(wrong("group_norm", rule, shape(t), "one a channel"))
        if t is not None and t.dtype != input.dtype and not is_half(input):
            raise RuntimeError(wrong("group_norm", f"{name} of {input.dtype}", t.dtype, "cast one"))
    # Off the CPU it is one of autocast's float32 ops.
    if not input.is_cpu and autocasts(input.device.type):
        weight, bias = (t if t is None else widened(t) for t in (weight, bias))
        input = widened(input)
    return normalized_groups(input, num_groups, weight, bias, eps)


class GroupNorm(nn.GroupNorm):
    """Module form of :func:`group_norm`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _samples(make: Make) -> Iterator[Sample]:
    for dims in ((2, 4, 3), (3, 6), (2, 4, 2, 2), (0, 4, 2)):
        args = (make.normal(*dims), 2, make.normal(dims[1]), make.normal(dims[1]))
        yield Sample(args, name="x".join(map(str, dims)))
    yield Sample((make.normal(2, 3, 4), 1), {"eps": 1e-2}, name="one-group")
    yield Sample((make.normal(2, 3, 4), 3, make.normal(3)), name="channels")
    frozen = make.normal(4, requires_grad=False)
    yield Sample((make.normal(2, 4, 3), 2, frozen, make.normal(4)), name="frozen-weight")
    data = make.normal(2, 4, 3, requires_grad=False)
    yield Sample((data, 2, make.normal(4), make.normal(4)), name="data-input")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    x = make.normal(2, 4, 3, 2)
    yield GroupNorm, Sample((2, 4)), Sample((x,))
    yield GroupNorm, Sample((4, 4, 1e-3)), Sample((x,), name="eps")
    yield GroupNorm, Sample((2, 4), {"affine": False}), Sample((x,), name="not-affine")


def _errors(make: Make) -> Iterator[Sample]:
    x = make.normal(4, 4, 2)
    yield Sample((x, 3), name="divides")
    yield Sample((x, 0), name="zero")
    yield Sample((make.normal(3), 1), name="vector")
    yield Sample((make.normal(1, 3), 3), name="one-value")
    yield Sample((x, 2, make.normal(3)), name="weight")
    yield Sample((x, 2, None, make.normal(3)), name="bias")
    yield Sample((make.labels(4, 4, classes=5), 2), name="integers")
    yield Sample((make.normal(4, 4), 2, make.normal(4).float()), name="dtypes")


def _benchmark(make: Make, n: int) -> Sample:
    side = max(1, math.isqrt(n // 512))
    return Sample((make.normal(8, 64, side, side), 32, make.normal(64), make.normal(64)))


def _saved_bytes(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
) -> int:
    if not (x.requires_grad or (weight is not None and weight.requires_grad)):
        return 0
    kept_weight = 0 if weight is None else weight.numel()
    statistics = 0 if is_half(x) else 2 * x.shape[0] * groups
    return (x.numel() + kept_weight + statistics) * x.element_size()


OP = Op(
    function=group_norm,
    modules=(GroupNorm,),
    reference=F.group_norm,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
    fused="aten::native_group_norm_backward",
)
