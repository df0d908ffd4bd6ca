"""Batch and group normalization of half precision by torch's kernels, as precise as in float32, and as fast as torch's.

Given statistics and parameters in float32 beside an x of half precision, the kernels compute and sum in float32, and
round once. Statistics are not kept: a second forward makes them again, which takes as long as the backward's kernel.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchbp.ops._function import kernel, transforms_active
from torchbp.ops.normalization import _half_groups

__all__ = [
    "CHANNELS_LAST",
    "as_kernels_take_it",
    "batch_norm_backward",
    "gradient_as_kernels_take_it",
    "group_norm_backward",
    "half_batch_norm",
    "half_batch_norm_backward",
    "half_group_norm",
    "half_group_norm_backward",
    "ones",
    "sizes",
]

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_batch_norm_backward = kernel("native_batch_norm_backward")
group_norm_backward = kernel("native_group_norm_backward")


def sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def as_kernels_take_it(x: Tensor, last: Sequence[int] = (4,)) -> Tensor:
    """Return ``x`` as the kernels take it: contiguous, or channels last where it is so.

    Args:
        x: ``(N, C, *)``.
        last: Of how many dimensions the latter is taken.
    """
    if transforms_active():  # vmap cannot tell the latter
        return x.contiguous()
    dims = x.dim()
    kept = dims in last and x.is_contiguous(memory_format=CHANNELS_LAST[dims])
    return x if kept else x.contiguous()


def batch_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Sequence[Tensor | None],
    training: bool,
    eps: float,
    needs: list[bool],
) -> tuple[Any, ...]:
    """Return the gradients of x, w and b by torch's kernel, those that are needed.

    A GPU's kernels (torch 2.11) give empty tensors, or fail, where not all are asked for, where there is no weight, and
    in evaluation without the batch's statistics: they are given all, and asked for all.

    Args:
        grad_y: ``(N, C, *)``.
        x: ``(N, C, *)``.
        weight: ``(C,)``.
        statistics: The running mean and variance, in evaluation; the batch's μ and r, in training.
        training: Which of the two.
        eps: Added to the variance.
        needs: Which gradients are needed.
    """
    if x.is_cpu:
        found = _batch_norm_backward(grad_y, x, weight, *statistics, training, eps, needs)
    else:
        running_mean, running_var, mean, rstd = statistics
        if not training and running_mean is not None and running_var is not None:
            mean, rstd = running_mean, torch.rsqrt(running_var + eps)
        weight = weight if weight is not None or mean is None else torch.ones_like(mean)
        statistics = (running_mean, running_var, mean, rstd)
        found = _batch_norm_backward(grad_y, x, weight, *statistics, training, eps, [True] * 3)
    return tuple(g if needed else None for g, needed in zip(found, needs, strict=True))


def gradient_as_kernels_take_it(grad_y: Tensor, x: Tensor) -> Tensor:
    """Return the gradient to go with ``x``, which is as they take it: they read both in the order that ``x`` has."""
    last = x.dim() == 4 and not x.is_contiguous()
    return grad_y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def ones(x: Tensor) -> Tensor:  # (N, C, *) -> (C,) float32
    return torch.ones(x.shape[1], dtype=torch.float32, device=x.device)


def half_group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and μ and r in float32, by parameters in float32: else the kernel would round both before their use."""
    if _half_groups.suits(x):
        found = _half_groups.forward(x, groups, weight, bias, eps)
        if found is not None:
            return found
    w = ones(x) if weight is None else weight.float()
    b = torch.zeros_like(w) if bias is None else bias.float()
    x, w, b = as_kernels_take_it(x), w.contiguous(), b.contiguous()
    if x.is_cpu:
        return torch.native_group_norm(x, w, b, *sizes(x), groups, eps)
    y, mean, rstd = torch.native_group_norm(x.float(), w, b, *sizes(x), groups, eps)
    return y.to(x.dtype), mean, rstd  # elsewhere they take one dtype


def half_group_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients, those of the parameters in float32."""
    if _half_groups.suits(grad_y, x):
        found = _half_groups.backward(grad_y, x, groups, weight, eps)
        if found is not None:
            return found
    _, mean, rstd = half_group_norm(x, groups, None, None, eps)
    w = ones(x) if weight is None else weight.float().contiguous()
    x = as_kernels_take_it(x)
    grad_y = gradient_as_kernels_take_it(grad_y, x)
    if not x.is_cpu:
        grad_y, x = grad_y.float(), x.float()
    return group_norm_backward(grad_y, x, mean, rstd, w, *sizes(x), groups, needs)


def half_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and μ and r in float32, by parameters in float32: else the kernel would round both before their use."""
    weight = ones(x) if weight is None else weight.float()
    bias = torch.zeros_like(weight) if bias is None else bias.float()
    rule = (training, momentum, eps)
    if running_mean is None or running_var is None:
        return torch.native_batch_norm(x, weight, bias, None, None, *rule)
    mean, var = running_mean.float(), running_var.float()
    output = torch.native_batch_norm(x, weight, bias, mean, var, *rule)
    if training and mean is not running_mean:
        running_mean.copy_(mean)
        running_var.copy_(var)
    return output


def half_batch_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    needs: list[bool],
) -> tuple[Any, ...]:
    """Return the gradients, those of the parameters in float32."""
    w = ones(x) if weight is None else weight.float().contiguous()
    if training:
        _, mean, rstd = half_batch_norm(x, None, None, None, None, True, 0.0, eps)
        statistics = (None, None, mean, rstd)
    else:
        running = (running_mean, running_var)
        statistics = (*(t if t is None else t.float().contiguous() for t in running), None, None)
    return batch_norm_backward(grad_y, x, w, statistics, training, eps, needs)
