"""The gradients of group and batch normalization by the kernels there are: compiled here, or torch's own."""

from torch import Tensor

from torchbp.ops._function import fused, is_half
from torchbp.ops.kernels import over_batch_backward, over_groups_backward
from torchbp.ops.normalization._group_rows import channels_backward, rows_backward
from torchbp.ops.normalization._half_norms import (
    as_kernels_take_it,
    batch_norm_backward,
    gradient_as_kernels_take_it,
    group_norm_backward,
    half_batch_norm_backward,
    half_group_norm_backward,
    sizes,
)

__all__ = ["batch_norm_gradients", "group_norm_gradients", "move"]


def group_norm_gradients(
    grad_y: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients of x, w and b, more than are needed maybe; ``None`` where only the formula will do.

    Args:
        grad_y: ``(N, C, *)``.
        x: ``(N, C, *)``.
        groups: How many there are in a sample.
        weight: ``(C,)``.
        mean: ``(N, G)``; not read in half precision.
        rstd: ``(N, G)``; not read in half precision.
        eps: Added to the variance.
        needs: Which gradients are needed.
    """
    grads = over_groups_backward(grad_y, x, groups, weight, mean, eps, needs)
    if grads is not None:
        return grads
    if is_half(x):
        if not x.numel() or not fused(grad_y, half=True):
            return None
        return half_group_norm_backward(grad_y, x, groups, weight, eps, needs)
    return _in_full_precision(grad_y, x, groups, weight, mean, rstd, eps, needs)


def _in_full_precision(
    grad_y: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...] | None:
    need_x, need_weight, need_bias = needs
    if not fused(grad_y, x):
        return None
    if x.dim() == 2:
        return rows_backward(grad_y, x, weight, mean, rstd, (need_x, need_weight, need_bias))
    if not x.numel() or (need_bias and weight is None):
        return None
    if groups == x.shape[1]:
        return channels_backward(grad_y, x, weight, mean, rstd, eps)
    dense_x = as_kernels_take_it(x)
    dense = (gradient_as_kernels_take_it(grad_y, dense_x), dense_x, mean, rstd)
    w = None if weight is None else weight.contiguous()
    return group_norm_backward(*dense, w, *sizes(x), groups, needs)


def batch_norm_gradients(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    training: bool,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients of x, w and b, those needed; ``None`` where only the formula will do.

    Args:
        grad_y: ``(N, C, *)``.
        x: ``(N, C, *)``.
        weight: ``(C,)``.
        a: The batch's μ in training, where it was kept; the running mean in evaluation.
        b: The batch's r in training, where it was kept; the running variance in evaluation.
        training: Which of the two.
        eps: Added to the variance.
        needs: Which gradients are needed.
    """
    found = over_batch_backward(grad_y, x, weight, a, eps, needs) if training else None
    if found is not None or not x.numel():
        return found
    if fused(grad_y, x):
        statistics = (None, None, a, b) if training else (a, b, None, None)
        # contiguous: with two dimensions the CPU kernel (torch 2.13) reads them as if they were
        weight, *dense = (None if t is None else t.contiguous() for t in (weight, *statistics))
        return batch_norm_backward(grad_y, x, weight, dense, training, eps, needs)
    if is_half(x) and fused(grad_y, half=True):
        return half_batch_norm_backward(grad_y, x, weight, a, b, training, eps, needs)
    return None


def move(running: Tensor | None, new: Tensor, momentum: float) -> None:
    """Move a running statistic towards that of the batch, as torch's kernel does."""
    if running is None:
        return
    if is_half(running):
        running.copy_(running.float().mul_(1 - momentum).add_(new, alpha=momentum))
    else:
        running.mul_(1 - momentum).add_(new, alpha=momentum)
