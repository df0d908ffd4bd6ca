"""The gradient of a cross entropy for its logits; the numbers are those of the derivation in cross_entropy.py."""

import torch
from torch import Tensor

from torchbp.ops._function import fused, is_half, kernel, scale_fresh
from torchbp.ops._reduction import FEW, REDUCTIONS, spread
from torchbp.ops.kernels import over_softmax_gradient, takes_logits
from torchbp.ops.losses._classes import all_count, along_classes, class_dim, counted

__all__ = [
    "gradient_in_a_loop",
    "gradient_of_indices",
    "gradient_of_probabilities",
    "terms_of_probabilities",
]

_nll_loss = kernel("nll_loss_forward")
_nll_loss_backward = kernel("nll_loss_backward")


def gradient_of_indices(
    x: Tensor,
    grad: Tensor,
    target: Tensor,
    w: Tensor | None,
    reduction: str,
    ignored: int,
    smoothing: float,
) -> Tensor:
    """Return (1) for the gradient ``grad`` of the reduced loss, in float32 for half precision."""
    dim = class_dim(x)
    if smoothing == 0.0 and fused(x, grad) and _suits_kernels(x, w):
        how = REDUCTIONS[reduction]
        log_p = torch.log_softmax(x, 1)
        total = _nll_loss(log_p, target, w, how, ignored)[1]
        by_log_p = _nll_loss_backward(grad, log_p, target, w, how, ignored, total)
        return torch._log_softmax_backward_data(by_log_p, log_p, 1, x.dtype)
    if w is None and smoothing == 0.0 and fused(x, grad) and all_count(target, ignored):
        s = spread(grad, reduction, max(1, target.numel()))
        s = s.unsqueeze(dim) if s.dim() else s
        index = target.long().unsqueeze(dim)
        return torch.softmax(x, dim).mul_(s).scatter_add_(dim, index, (-s).expand(index.shape))
    index, w_t, total = counted(x, target, w, ignored)
    s = spread(grad.to(w_t.dtype), reduction, total)
    if reduction == "mean":
        s = s.masked_fill(total == 0, 0)  # nothing counted: 0, as in torch, not 0/0
    a = s * w_t if smoothing == 0.0 else s * (1 - smoothing) * w_t
    p = torch.softmax(x, dim, dtype=w_t.dtype)
    if smoothing == 0.0:
        gradient = scale_fresh(p, a.unsqueeze(dim))
    else:
        classes = x.shape[dim]
        b = (s * (smoothing / classes)).expand_as(a).masked_fill(target == ignored, 0)
        gradient = scale_fresh(p, (a + b * (classes if w is None else w.sum())).unsqueeze(dim))
        b = b.unsqueeze(dim)
        gradient = gradient - (b if w is None else b * along_classes(w, x))
    return gradient.scatter_add_(dim, index.unsqueeze(dim), -a.unsqueeze(dim))


def gradient_in_a_loop(
    x: Tensor,
    grad: Tensor,
    target: Tensor,
    w: Tensor | None,
    reduction: str,
    ignored: int,
    smoothing: float,
) -> Tensor | None:
    """Return (1) in the dtype of ``x``, from a compiled loop over its rows; ``None`` where there is none."""
    if not takes_logits(x):
        return None
    target = target.long()
    mean = reduction == "mean" and w is None  # divided by a count, which the loop knows
    if w is None:
        a = s = spread(grad, "sum" if mean else reduction, 1)
    else:
        _, w_t, total = counted(x, target, w, ignored)
        s = spread(grad, reduction, total)
        a = s * w_t
    if smoothing == 0.0:
        return over_softmax_gradient(x, a, target, ignored, peak=a, mean=mean)
    a, b = a * (1 - smoothing), s * (smoothing / x.shape[1])
    by_p = a + b * (x.shape[1] if w is None else w.float().sum())
    return over_softmax_gradient(x, by_p, target, ignored, w, even=b, peak=a, mean=mean)


def _suits_kernels(x: Tensor, w: Tensor | None) -> bool:
    """Whether torch's four kernels, which weigh and ignore, too, are faster than eight simpler ones."""
    like = w is None or w.dtype == x.dtype
    return x.dim() == 2 and x.numel() <= FEW and x.is_cpu and like


def gradient_of_probabilities(
    s: Tensor, q: Tensor, log_p: Tensor, wide_w: Tensor, dim: int
) -> Tensor:
    """Return (2) for the gradient s of each value, from what :func:`terms_of_probabilities` gives."""
    wq = wide_w * q
    return s * (log_p.exp() * wq.sum(dim, keepdim=True) - wq)


def terms_of_probabilities(
    x: Tensor, target: Tensor, w: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, log p and w along the classes, in float32 for half precision."""
    dim = class_dim(x)
    dtype = torch.float32 if is_half(x) else x.dtype
    q = target.to(torch.promote_types(dtype, target.dtype))
    q = q * (1 - smoothing) + smoothing / max(1, x.shape[dim])
    wide_w = q.new_ones(()) if w is None else along_classes(w, x)
    return q, torch.log_softmax(x, dim, dtype=dtype), wide_w
