"""What the record of ``batch_norm`` reads: samples, errors, a benchmark, the bytes kept."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops._function import is_half
from torchbp.ops._samples import Make, Sample

__all__ = ["benchmark", "errors", "module_samples", "reference", "samples", "saved_bytes"]


def reference(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *rule: bool | float,
    **named: bool | float,
) -> Tensor:
    """Torch's; on a GPU (torch 2.11) it has no gradient of a bias without a weight, which is given it."""
    if weight is None and bias is not None and not input.is_cpu:
        weight = torch.ones_like(bias)
    arguments: tuple[Any, ...] = (running_mean, running_var, weight, bias, *rule)
    return F.batch_norm(input, *arguments, **named)  # pyright: ignore[reportArgumentType]


def samples(make: Make) -> Iterator[Sample]:
    """Yield every way to call it."""
    for dims in ((4, 3), (2, 3, 4), (2, 3, 2, 2), (0, 3)):
        args = (make.normal(*dims), None, None, make.normal(3), make.normal(3), True)
        yield Sample(args, name="x".join(map(str, dims)))
    yield Sample((make.normal(4, 3), None, None), {"training": True, "eps": 1e-2}, name="plain")
    no_bias = {"weight": make.normal(3), "training": True}
    yield Sample((make.normal(4, 3), None, None), no_bias, name="no-bias")
    frozen = make.normal(3, requires_grad=False)
    args = (make.normal(4, 3), None, None, frozen, make.normal(3), True)
    yield Sample(args, name="frozen-weight")
    mean = make.normal(3, requires_grad=False)
    var = make.uniform(3, low=0.5, high=2.0)
    args = (make.normal(2, 3, 2), mean, var, make.normal(3), make.normal(3))
    yield Sample(args, name="eval")
    args = (make.normal(2, 3, 2), mean, var, frozen, make.normal(3, requires_grad=False))
    yield Sample(args, name="eval-frozen")
    yield Sample((make.normal(2, 3, 2), mean, var), name="eval-plain")
    data = make.normal(4, 3, requires_grad=False)
    kwargs = {"bias": make.normal(3), "training": True}
    yield Sample((data, None, None), kwargs, name="bias-only")


def module_samples(
    make: Make, one: type[nn.Module], two: type[nn.Module], three: type[nn.Module]
) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    """Yield constructor arguments of the Modules of 1, 2 and 3 dimensions, with an input for each."""
    yield one, Sample((3,)), Sample((make.normal(4, 3),))
    yield one, Sample((3,), {"momentum": None}), Sample((make.normal(4, 3, 2),), name="3d")
    untracked = Sample((3,), {"track_running_stats": False})
    yield one, untracked, Sample((make.normal(4, 3),), name="untracked")
    x = make.normal(2, 3, 2, 2)
    yield two, Sample((3,)), Sample((x,))
    yield two, Sample((3,), {"affine": False}), Sample((x,), name="not-affine")
    yield three, Sample((3, 1e-3)), Sample((make.normal(2, 3, 2, 2, 1),))


def errors(make: Make) -> Iterator[Sample]:
    """Yield what it refuses."""
    x, c = make.normal(4, 3), make.normal(3, requires_grad=False)
    yield Sample((x, None, None), name="no-statistics")
    yield Sample((x, c, None, None, None, True), name="one-statistic")
    yield Sample((x[:1], c, c, None, None, True), name="one-value")
    yield Sample((x, None, None, None, None, True, 0.1, 0.0), name="eps")
    yield Sample((x, c, c, make.normal(4)), name="weight")
    yield Sample((x, c[:2], c), name="mean")
    yield Sample((make.normal(3), c, c), name="vector")
    yield Sample((make.labels(4, 3, classes=5), c, c), name="integers")


def benchmark(make: Make, n: int) -> Sample:
    """Return 8 images of 32 channels, ``n`` values in all."""
    side = max(1, math.isqrt(n // 256))
    x = make.normal(8, 32, side, side)
    return Sample((x, None, None, make.normal(32), make.normal(32), True))


def saved_bytes(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    **_: object,
) -> int:
    """Return the bytes that backward keeps."""
    size, channels = x.element_size(), x.shape[1]
    need_weight = weight is not None and weight.requires_grad
    if not (x.requires_grad or need_weight):
        return 0
    kept_weight = 0 if weight is None or not x.requires_grad else channels * size
    if training:
        statistics = 0 if is_half(x) or not x.numel() else 2 * channels * size
        return x.numel() * size + kept_weight + statistics
    return (x.numel() + channels) * size * need_weight + channels * size + kept_weight
