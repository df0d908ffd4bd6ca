"""Cross entropy of class indices: the Function behind ``cross_entropy``, in whose file it is derived."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.function import Function

from torchbp.ops._function import Context, as_dtype, entry, fused, unviewed
from torchbp.ops._reduction import REDUCTIONS
from torchbp.ops.kernels import many, over_log_probabilities
from torchbp.ops.losses._classes import class_dim, counted
from torchbp.ops.losses._logits_gradient import gradient_in_a_loop, gradient_of_indices
from torchbp.ops.losses._softmax_cross_entropy import TOO_MANY

__all__ = ["IndexCrossEntropyFunction", "of_indices"]

_PIECE = 1 << 17  # elements: half a megabyte of float32


class IndexCrossEntropyFunction(Function):
    """Cross entropy of class indices. Call it through ``cross_entropy``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, w: Tensor | None, reduction: str, ignored: int, smoothing: float
    ) -> Tensor:  # (N, C, *), (N, *) int64, (C,) -> () or (N, *)
        if target.dtype == torch.uint8:  # torch has no batching rule for it
            target = target.long()
        loss = _in_loops(x, target, w, reduction, ignored, smoothing)
        if loss is not None:
            return loss
        if _by_rows(x):
            return _values_by_rows(x, target, w, reduction, ignored, smoothing)
        loss = _nn.cross_entropy_loss(x, target, w, REDUCTIONS[reduction], ignored, smoothing)
        return unviewed(loss) if reduction == "none" else loss

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, Tensor | None, str, int, float], output: Tensor
    ) -> None:
        *tensors, ctx.reduction, ctx.ignored, ctx.smoothing = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        x, target, w = ctx.saved_tensors
        settings = (ctx.reduction, ctx.ignored, ctx.smoothing)
        grad_x = gradient_in_a_loop(x, grad, target, w, *settings)
        if grad_x is None:
            grad_x = as_dtype(gradient_of_indices(x, grad, target, w, *settings), x.dtype)
        return grad_x, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_others: None) -> Tensor:
        x, target, w = ctx.saved_tensors
        one = torch.ones((), dtype=x.dtype, device=x.device)
        settings = (ctx.reduction, ctx.ignored, ctx.smoothing)
        product = gradient_of_indices(x, one, target, w, *settings) * tangent_x  # (5)
        values = product.sum(class_dim(x)) if ctx.reduction == "none" else product.sum()
        return values.to(x.dtype)


def _in_loops(
    x: Tensor, target: Tensor, w: Tensor | None, reduction: str, ignored: int, smoothing: float
) -> Tensor | None:
    """Return the loss where the rows go through a compiled loop, in which nothing but log p_t is written."""
    made = over_log_probabilities(x, target, ignored, w, weighted=smoothing > 0)
    if made is None:
        return None
    log_p, even, total = made
    values = log_p if smoothing == 0.0 else log_p * (1 - smoothing)
    if w is not None:
        _, w_t, total = counted(x, target, w, ignored)
        values = values * w_t
    if even is not None:
        values = values.add(even, alpha=smoothing / x.shape[1])
    values = values.neg() if reduction == "none" else values.sum().neg_()
    return as_dtype(values / total if reduction == "mean" else values, x.dtype)


def _by_rows(x: Tensor) -> bool:
    return x.dim() == 2 and many(x, TOO_MANY) and x.is_cpu and fused(x) and x.is_floating_point()


def _values_by_rows(
    x: Tensor, target: Tensor, w: Tensor | None, reduction: str, ignored: int, smoothing: float
) -> Tensor:
    """Return torch's values, some rows at a time: log p stays in the cache (2048 by 32000: 55 ms, not 152)."""
    rows = max(1, _PIECE // x.shape[1])
    options: dict[str, Any] = {"ignore_index": ignored, "label_smoothing": smoothing}
    values = [
        F.cross_entropy(part, t, w, reduction="none", **options)
        for part, t in zip(x.split(rows), target.split(rows), strict=True)
    ]
    loss = torch.cat(values)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted(x, target, w, ignored)[2]


of_indices = entry(IndexCrossEntropyFunction)
