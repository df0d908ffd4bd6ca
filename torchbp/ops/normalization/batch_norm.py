r"""Batch normalization: y = x̂ · w + b with x̂ = (x - μ) · r, r = 1/√(v + ε), each channel by itself.

μ and v are those of the batch (training), over D = N · L elements a channel, or the running ones m and u (evaluation).

Derivation, for one channel:
    evaluation: m and u are constants,
        grad_x = r · w · grad_y                                                               (1)
    training: μ and v depend on x (∂x̂/∂x: _standardize.py); with s = grad_y · w, the gradient of x̂,
        grad_x = r · (s - mean(s) - x̂ · mean(s · x̂))                                         (2)
    grad_w = Σ grad_y · x̂                                                                     (3)
    grad_b = Σ grad_y                                                                         (4)
    tangent_y = w · t + x̂ · tangent_w + tangent_b, t = r · tangent_x or (2) with s = tangent_x     (5)

Saves:
    Training: x (4 bytes per float32 element), w, and μ and r, one of each a channel, which only the fused kernel uses.
    Half precision: x (2 bytes) and w alone; statistics and sums are made again in float32.
    Evaluation: w and u; x and m only where w needs a gradient: frozen, 0 bytes an element.

Edge values:
    A constant channel: x̂ = 0, r = 1/√ε.   ±inf or NaN: NaN in that channel.   No elements: y is empty, statistics stay.

Sources:
    Ioffe, Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    2015, arXiv:1502.03167.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn.modules.batchnorm import _BatchNorm

from torchbp.ops._function import Context, as_dtype, entry, is_half, public, widened
from torchbp.ops._op import Op
from torchbp.ops._range import in_float64, norms_in_range
from torchbp.ops.kernels import over_batch
from torchbp.ops.normalization import _batch_norm_samples
from torchbp.ops.normalization._batch_norm_arguments import check
from torchbp.ops.normalization._by_kernels import batch_norm_gradients, move
from torchbp.ops.normalization._half_norms import (
    CHANNELS_LAST,
    as_kernels_take_it,
    half_batch_norm,
)
from torchbp.ops.normalization._standardize import (
    along_channels,
    channel_sum,
    project,
    standardize,
)

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormFunction", "batch_norm"]


class BatchNormFunction(Function):
    """Batch normalization with hand-written gradients. Call it through :func:`batch_norm`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # (N, C, *), (C,) four times -> (N, C, *); mean, rstd: (C,), empty in evaluation
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if x.numel() == 0:
            return x.clone(), x.new_empty(0), x.new_empty(0)
        rule = (training, momentum, eps)
        if not x.is_cpu:  # a GPU's kernel (torch 2.11) gives y whatever strides x has
            x = as_kernels_take_it(x, last=(4, 5))
        made = over_batch(x, weight, bias, eps) if training else None
        if made is not None:
            y, mean, rstd, variance = made
            move(running_mean, mean, momentum)
            count = x.numel() // x.shape[1]
            move(running_var, variance.mul_(count / (count - 1)), momentum)
            return y, mean, rstd
        if not is_half(x):
            return torch.native_batch_norm(x, weight, bias, running_mean, running_var, *rule)
        return half_batch_norm(x, weight, bias, running_mean, running_var, *rule)

    @staticmethod
    def again_in_training(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        _running_mean: Tensor | None,
        _running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        mean: Tensor | None,
        rstd: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Give the output of ``forward`` again, without moving the running statistics a second time."""
        made = over_batch(x, weight, bias, eps)
        if made is not None:
            return made[:3]
        if x.numel() > 0 and mean is not None and rstd is not None and _in_one_map(x, weight, bias):
            # The kernel forms rstd · w and b - mean · rstd · w, then one affine map: so it does in evaluation, where it
            # need not take the statistics again, a tenth of the time. 1 / √(1 + 0) is exactly 1.
            scale = rstd if weight is None else rstd * weight
            return torch.native_batch_norm(
                x, scale, bias, mean, torch.ones_like(mean), False, 0.0, 0.0
            )
        return BatchNormFunction.forward(x, weight, bias, None, None, training, momentum, eps)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        x, weight, bias, running_mean, running_var, ctx.training, _, ctx.eps = inputs
        _, mean, rstd = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        need_x, need_weight, *_ = ctx.needs_input_grad
        kept_weight = weight if need_x else None
        if ctx.training:
            needed = need_x or need_weight
            statistics = (mean, rstd) if needed and not is_half(x) else (None, None)
            ctx.save_for_backward(x if needed else None, kept_weight, *statistics)
        else:
            kept_x, kept_mean = (x, running_mean) if need_weight else (None, None)
            kept_var = running_var if need_x or need_weight else None
            ctx.save_for_backward(kept_x, kept_weight, kept_mean, kept_var)
        ctx.save_for_forward(x, weight, running_mean, running_var)

    @staticmethod
    def backward(
        ctx: Context, grad_y: Tensor | None, *_statistics: None
    ) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * 8
        if grad_y is None:
            return tuple(grads)
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        # a, b: μ and r of the batch in training, the running mean and variance in evaluation
        x, weight, a, b = ctx.saved_tensors
        if x is not None:
            needs = [need_x, need_weight, need_bias]
            found = batch_norm_gradients(grad_y, x, weight, a, b, ctx.training, ctx.eps, needs)
            if found is not None:
                grads[:3] = (
                    None if g is None else as_dtype(g, dtype)
                    for g, dtype in zip(found, ctx.dtypes, strict=True)
                )
                return tuple(grads)

        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        g = widened(grad_y)
        if need_x and not ctx.training:
            r = _running_rstd(g, b, ctx.eps)
            grads[0] = (g * (r if weight is None else r * along_channels(weight, g))).to(
                x_dtype
            )  # (1)
        if x is not None:
            normalized, r = _normalize(x, ctx.training, a, b, ctx.eps)
            if need_x and ctx.training:
                s = g if weight is None else g * along_channels(weight, g)
                grads[0] = project(s, normalized, r, _dims(g)).to(x_dtype)  # (2)
            if need_weight:
                grads[1] = channel_sum(g * normalized).to(weight_dtype)  # (3)
        if need_bias:
            grads[2] = channel_sum(g).to(bias_dtype)  # (4)
        return tuple(grads)

    @staticmethod
    def jvp(
        ctx: Context,
        tangent_x: Tensor | None,
        tangent_weight: Tensor | None,
        tangent_bias: Tensor | None,
        *_: None,
    ) -> tuple[Tensor, None, None]:
        x, weight, running_mean, running_var = ctx.saved_tensors
        normalized, r = _normalize(x, ctx.training, running_mean, running_var, ctx.eps)
        tangent_y = torch.zeros_like(normalized)  # (5)
        if tangent_x is not None:
            t = widened(tangent_x)
            t = project(t, normalized, r, _dims(x)) if ctx.training else t * r
            tangent_y = tangent_y + (t if weight is None else t * along_channels(weight, x))
        if tangent_weight is not None:
            tangent_y = tangent_y + normalized * along_channels(tangent_weight, x)
        if tangent_bias is not None:
            tangent_y = tangent_y + along_channels(tangent_bias, x)
        return tangent_y.to(x.dtype), None, None


def _dims(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def _in_one_map(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether torch's kernel takes each element through one affine map: on a CPU, of what has no gaps.

    Of other tensors it multiplies by rstd and by w one after the other, which rounds otherwise.
    """
    if not (x.is_cpu and all(p is None or p.is_contiguous() for p in parameters)):
        return False
    last = CHANNELS_LAST.get(x.dim())
    return x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))


def _running_rstd(x: Tensor, running_var: Tensor, eps: float) -> Tensor:
    return along_channels(torch.rsqrt(widened(running_var) + eps), x)


def _normalize(
    x: Tensor, training: bool, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return x̂ and r; half precision in float32."""
    if training:
        return standardize(x, _dims(x), eps)
    r = _running_rstd(x, running_var, eps)
    return (widened(x) - along_channels(running_mean, x)) * r, r


_in_training = entry(BatchNormFunction, again=BatchNormFunction.again_in_training)
_in_evaluation = entry(BatchNormFunction, again=BatchNormFunction.forward)


@public
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalize each channel over the batch: :math:`y = (x - \mu) / \sqrt{v + \epsilon} \cdot w + b`.

    Args:
        input: ``(N, C, *)``, floating point.
        running_mean: ``(C,)``: the mean :math:`\mu` in evaluation; in training it is updated in place, or ``None``.
        running_var: ``(C,)``, as ``running_mean``; it is updated with the unbiased variance.
        weight: ``(C,)``, or ``None`` for ones.
        bias: ``(C,)``, or ``None`` for zeros.
        training: Normalize by the batch's own mean and (biased) variance instead of the running ones.
        momentum: Weight of the new value in the update of the running statistics.
        eps: Added to the variance; positive in training.

    Returns:
        Tensor of the shape and dtype of ``input``. In half precision statistics and sums are taken in float32.

    Raises:
        ValueError: One value a channel in training; ``eps`` out of range; one of the running statistics alone.
        RuntimeError: Shapes or dtypes do not fit, or evaluation without running statistics.
        NotImplementedError: ``input`` is no floating-point tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import batch_norm
        >>> batch_norm(torch.tensor([[1.0], [2.0], [3.0]]), None, None, training=True)
        tensor([[-1.2247],
                [ 0.0000],
                [ 1.2247]])
    """
    check(input, running_mean, running_var, weight, bias, training, eps)
    if not input.is_floating_point():  # torch's own, or its refusal
        rule = (training, momentum, eps)
        return F.batch_norm(input, running_mean, running_var, weight, bias, *rule)
    run = _in_training if training else _in_evaluation
    y, _, r = run(input, weight, bias, running_mean, running_var, training, momentum, eps)
    if not training or norms_in_range(r):
        return y
    return in_float64(batch_norm, input, None, None, weight, bias, training, momentum, eps)


def _forward(module: _BatchNorm, input: Tensor) -> Tensor:
    """Keep count of the batches and choose the statistics, as torch's module does around its function."""
    if isinstance(input, Tensor):  # a torch.fx proxy does not know its dimensions
        module._check_input_dim(input)
    momentum = 0.0 if module.momentum is None else module.momentum
    if module.training and module.track_running_stats and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:  # the cumulative average
            momentum = 1.0 / float(module.num_batches_tracked)
    mean, var = module.running_mean, module.running_var
    training = module.training or (mean is None and var is None)
    if module.training and not module.track_running_stats:
        mean = var = None
    return batch_norm(input, mean, var, module.weight, module.bias, training, momentum, module.eps)


class BatchNorm1d(nn.BatchNorm1d):
    """Module form of :func:`batch_norm` for ``(N, C)`` or ``(N, C, L)``, with running statistics as in torch."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, input)


class BatchNorm2d(nn.BatchNorm2d):
    """Module form of :func:`batch_norm` for ``(N, C, H, W)``, with running statistics as in torch."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, input)


class BatchNorm3d(nn.BatchNorm3d):
    """Module form of :func:`batch_norm` for ``(N, C, D, H, W)``, with running statistics as in torch."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, input)


OP = Op(
    function=batch_norm,
    modules=(BatchNorm1d, BatchNorm2d, BatchNorm3d),
    reference=_batch_norm_samples.reference,
    samples=_batch_norm_samples.samples,
    module_samples=lambda make: _batch_norm_samples.module_samples(
        make, BatchNorm1d, BatchNorm2d, BatchNorm3d
    ),
    errors=_batch_norm_samples.errors,
    saved_bytes=_batch_norm_samples.saved_bytes,
    benchmark=_batch_norm_samples.benchmark,
    fused="aten::native_batch_norm_backward",
)
