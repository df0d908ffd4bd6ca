"""Cross entropy of class indices of some ten thousand logits to some million, derived in ``cross_entropy.py``.

It saves p = softmax(x) instead of x, as many bytes: an exponential less for each logit in backward, whose error stays
that of p, half of what log p leaves. The loss needs no more than p either: -log p_t, one logarithm a position.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function
from torch.compiler import is_dynamo_compiling

from torchbp.ops import _recipe
from torchbp.ops._function import (
    Context,
    entry,
    followed,
    fused,
    kernel,
    modes_active,
    visible,
)
from torchbp.ops._reduction import FEW, REDUCTIONS, WIDE, reduce, spread
from torchbp.ops.kernels import takes_logits
from torchbp.ops.losses._classes import all_count

__all__ = ["TOO_MANY", "SoftmaxCrossEntropyFunction", "of_softmax", "suits_softmax"]

TOO_MANY = 1 << 23  # elements; from here on log p, some rows at a time, is not written to memory
_LOG_TINY = {torch.float32: 80.0, torch.float64: 700.0}  # below exp(-these) p has few digits
_nll_loss = kernel("nll_loss_forward")


class SoftmaxCrossEntropyFunction(Function):
    """Cross entropy of class indices. Call it through ``cross_entropy``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, reduction: str
    ) -> tuple[Tensor, Tensor | None]:  # (N, C), (N,) -> () or (N,), p (N, C)
        p = torch.softmax(x, 1)
        values = _nll_loss(p, target, None, REDUCTIONS["none"], -1)[0].neg_().log_().neg_()
        if values.max().item() <= _LOG_TINY[x.dtype]:
            loss = reduce(values, reduction)
        else:  # NaN, too
            loss = F.cross_entropy(x, target, reduction=reduction)
        return loss, None if _recipe.asked else p  # x, whose storage others may keep, too

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, str], output: tuple[Tensor, Tensor | None]
    ) -> None:
        x, target, ctx.reduction = inputs
        _, p = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if p is None else None, p, target)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor | None, grad_p: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        x, p, target = ctx.saved_tensors
        p = torch.softmax(x, 1) if p is None else p
        grad_x = None
        if grad is not None:
            grad_x = _gradient(p, target, spread(grad, ctx.reduction, target.numel()))
        if grad_p is not None:  # of a second derivative
            of_p = _through_softmax(p, grad_p)
            grad_x = of_p if grad_x is None else grad_x + of_p
        return grad_x, None, None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> tuple[Tensor, Tensor | None]:
        x, saved, target = ctx.saved_tensors
        p = torch.softmax(x, 1) if saved is None else saved
        product = _gradient(p, target, p.new_ones(())) * tangent_x  # (5)
        tangent = product.sum(1) if ctx.reduction == "none" else product.sum()
        tangent = tangent / target.numel() if ctx.reduction == "mean" else tangent
        return tangent, None if saved is None else _through_softmax(p, tangent_x)


def _gradient(p: Tensor, target: Tensor, s: Tensor) -> Tensor:
    """Return (1): s · (p_j - [j = t])."""
    s = s.unsqueeze(1) if s.dim() else s
    index = target.unsqueeze(1)
    gradient = p * s
    put = gradient.scatter_add_ if fused(s, p) else gradient.scatter_add
    return put(1, index, (-s).expand(index.shape))


def _through_softmax(p: Tensor, v: Tensor) -> Tensor:
    """Return the product of v and softmax's derivative, which is symmetric."""
    return p * (v - (p * v).sum(1, keepdim=True))


def suits_softmax(x: Tensor, target: Tensor, ignored: int) -> bool:
    """Whether these may go to :func:`of_softmax`, which ignores no position, and has measured to be faster."""
    return (
        not is_dynamo_compiling()
        and type(x) is Tensor
        and FEW < x.numel() < TOO_MANY
        and x.dim() == 2
        and x.dtype in WIDE
        and target.dtype is torch.int64
        and target.size() == x.size()[:1]
        and visible(x)
        and not (modes_active() and followed())
        and not takes_logits(x)  # which keeps x, and is faster still
        and all_count(target, ignored)
    )


of_softmax: Any = entry(SoftmaxCrossEntropyFunction)
