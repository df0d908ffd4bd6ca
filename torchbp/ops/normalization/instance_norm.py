r"""Instance normalization: y = x̂ · w + b with x̂ = (x - μ) · r, r = 1/√(v + ε), for each channel of each sample.

Derivation:
    With the input's own statistics ("use_input_stats") it is group normalization of as many groups as channels, with
    the running ones batch normalization in evaluation: the gradients are derived in group_norm.py and batch_norm.py.

Saves:
    As those: x (4 bytes per float32 element, 2 in half precision), w, μ and r; by running statistics, frozen, w and u.

Edge values:
    A constant channel: x̂ = 0, r = 1/√ε.   ±inf or NaN: NaN in that channel of that sample.

Sources:
    Ulyanov, Vedaldi, Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016,
    arXiv:1607.08022.
"""

import math
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import entry, is_half, public, widened
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.normalization.batch_norm import BatchNormFunction
from torchbp.ops.normalization.group_norm import normalized_groups

__all__ = ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "instance_norm"]

_in_evaluation = entry(BatchNormFunction, again=BatchNormFunction.forward)


@public
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalize each channel of each sample: :math:`y = (x - \mu) / \sqrt{v + \epsilon} \cdot w + b`.

    Args:
        input: ``(N, C, *)``, floating point.
        running_mean: ``(C,)``: updated in place with the mean over the samples, or used; or ``None``.
        running_var: ``(C,)``, as ``running_mean``; it is updated with the unbiased variances' mean.
        weight: ``(C,)``, or ``None`` for ones.
        bias: ``(C,)``, or ``None`` for zeros.
        use_input_stats: Normalize by the mean and (biased) variance of ``input`` instead of the running ones.
        momentum: Weight of the new value in the update of the running statistics.
        eps: Added to the variance.

    Returns:
        Tensor of the shape and dtype of ``input``. In half precision statistics and sums are taken in float32.

    Raises:
        ValueError: One value a channel; one of the running statistics alone.
        RuntimeError: Shapes do not fit, or running statistics are to be used and not there.
        NotImplementedError: ``input`` is no floating-point tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import instance_norm
        >>> instance_norm(torch.tensor([[[1.0, 2.0, 3.0]]]))
        tensor([[[-1.2247,  0.0000,  1.2247]]])
    """
    if use_input_stats and math.prod(input.shape[2:]) == 1:
        rule = "more than 1 value per channel of a sample"
        raise ValueError(
            wrong("instance_norm", rule, shape(input), "the variance of one value is 0")
        )
    if not use_input_stats and (running_mean is None or running_var is None):
        advice = "pass running_mean and running_var, or use_input_stats=True"
        rule = "running statistics with use_input_stats=False"
        raise RuntimeError(wrong("instance_norm", rule, None, advice))
    if (running_mean is None) != (running_var is None):
        advice = "pass both or neither"
        raise ValueError(wrong("instance_norm", "two running statistics", "one", advice))
    if not input.is_floating_point():
        rule = "floating-point input"
        raise NotImplementedError(wrong("instance_norm", rule, input.dtype, "cast it first"))
    if input.dim() == 4:
        input = input.contiguous()  # as torch: its result is, also of channels last
    channels = input.shape[1]
    statistics = (("running_mean", running_mean), ("running_var", running_var))
    for name, t in (*statistics, ("weight", weight), ("bias", bias)):
        if t is not None and t.numel() != channels:
            rule = f"{name} of {channels} elements for an input of shape {shape(input)}"
            raise RuntimeError(wrong("instance_norm", rule, shape(t), "one a channel"))
    if not use_input_stats:
        used = _in_dtype_of(input, running_mean, running_var)
        arguments = (input, weight, bias, *used, False, momentum, eps)
        return _in_evaluation(*arguments)[0]
    if running_mean is not None and running_var is not None and input.numel():
        _update(input, running_mean, running_var, momentum)
    return normalized_groups(input, channels, weight, bias, eps)


def _in_dtype_of(x: Tensor, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return both in the dtype of ``x`` where the mean has another, as torch does, but in half precision."""
    if mean is None or var is None or mean.dtype == x.dtype or is_half(x):
        return mean, var
    return mean.to(x.dtype), var.to(x.dtype)


@torch.no_grad()
def _update(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> None:
    var, mean = torch.var_mean(widened(x.detach()), tuple(range(2, x.dim())))
    for running, new in ((running_mean, mean), (running_var, var)):
        running.lerp_(new.mean(0).to(running.dtype), momentum)


def _forward(module: _InstanceNorm, input: Tensor) -> Tensor:
    """Check the channels and choose the statistics, as torch's module does around its function."""
    batched = True
    if isinstance(input, Tensor):  # a torch.fx proxy does not know its dimensions
        module._check_input_dim(input)
        batched = input.dim() != module._get_no_batch_dim()
        channels = input.shape[1 if batched else 0]
        if channels != module.num_features:
            name, rule = type(module).__name__, f"{module.num_features} channels (num_features)"
            if module.affine:
                raise ValueError(wrong(name, rule, channels, "each has a weight of its own"))
            message = wrong(name, rule, channels, "without affine the number is not used")
            warnings.warn(message, UserWarning, stacklevel=3)
    else:
        advice = "only batched input can be traced"
        message = wrong(type(module).__name__, "a batch", "one sample", advice)
        torch._assert(input.dim() == module._get_no_batch_dim() + 1, message)
    y = instance_norm(
        input if batched else input.unsqueeze(0),
        module.running_mean,
        module.running_var,
        module.weight,
        module.bias,
        module.training or not module.track_running_stats,
        0.0 if module.momentum is None else module.momentum,
        module.eps,
    )
    return y if batched else y.squeeze(0)


class InstanceNorm1d(nn.InstanceNorm1d):
    """Module form of :func:`instance_norm` for ``(N, C, L)`` or ``(C, L)``."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, input)


class InstanceNorm2d(nn.InstanceNorm2d):
    """Module form of :func:`instance_norm` for ``(N, C, H, W)`` or ``(C, H, W)``."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, input)


class InstanceNorm3d(nn.InstanceNorm3d):
    """Module form of :func:`instance_norm` for ``(N, C, D, H, W)`` or ``(C, D, H, W)``."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, input)


def _samples(make: Make) -> Iterator[Sample]:
    for dims in ((2, 3, 4), (2, 3, 2, 2), (2, 3, 1, 2, 2)):
        args = (make.normal(*dims), None, None, make.normal(3), make.normal(3))
        yield Sample(args, name="x".join(map(str, dims)))
    yield Sample((make.normal(2, 3, 4),), {"eps": 1e-2}, name="plain")
    mean = make.normal(3, requires_grad=False)
    var = make.uniform(3, low=0.5, high=2.0)
    args = (make.normal(2, 3, 4), mean, var, make.normal(3), make.normal(3), False)
    yield Sample(args, name="running")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    x = make.normal(2, 3, 2, 2)
    yield InstanceNorm1d, Sample((3,)), Sample((make.normal(2, 3, 4),))
    yield InstanceNorm2d, Sample((3,), {"affine": True}), Sample((x,), name="affine")
    tracked = Sample((3,), {"affine": True, "track_running_stats": True})
    yield InstanceNorm2d, tracked, Sample((x,), name="tracked")
    yield InstanceNorm3d, Sample((3, 1e-3)), Sample((make.normal(2, 3, 2, 2, 1),))


def _errors(make: Make) -> Iterator[Sample]:
    x, c = make.normal(2, 3, 4), make.normal(3, requires_grad=False)
    yield Sample((x[..., :1],), name="one-value")
    yield Sample((make.normal(2, 3),), name="no-positions")
    yield Sample((x, c), name="one-statistic")
    yield Sample((x,), {"use_input_stats": False}, name="no-statistics")
    yield Sample((x, c[:2], c[:2]), name="mean")
    yield Sample((x, None, None, make.normal(4)), name="weight")
    yield Sample((make.labels(2, 3, 4, classes=5),), name="integers")


def _benchmark(make: Make, n: int) -> Sample:
    side = max(2, math.isqrt(n // 256))
    return Sample((make.normal(8, 32, side, side), None, None, make.normal(32), make.normal(32)))


def _saved_bytes(
    x: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    **_: object,
) -> int:
    kept_weight = 0 if weight is None else weight.numel()
    own = 0 if is_half(x) else 2 * x.shape[0] * x.shape[1]
    statistics = own if use_input_stats else 2 * x.shape[1]
    return (x.numel() + kept_weight + statistics) * x.element_size()


OP = Op(
    function=instance_norm,
    modules=(InstanceNorm1d, InstanceNorm2d, InstanceNorm3d),
    reference=F.instance_norm,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
    fused="aten::native_group_norm_backward",
)
