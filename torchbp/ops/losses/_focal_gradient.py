"""The gradient of focal loss, by formula and from compiled loops over rows; the numbers are those of focal_loss.py."""

import torch
from torch import Tensor

from torchbp.ops._function import Context, as_dtype, fused, is_half, scale_fresh
from torchbp.ops._reduction import spread
from torchbp.ops.kernels import (
    listed,
    many,
    over_log_probabilities,
    over_probabilities,
    over_softmax_gradient,
    takes_logits,
)
from torchbp.ops.losses._classes import class_dim, counted

__all__ = [
    "gradient",
    "gradient_in_a_loop",
    "gradient_in_place",
    "loss_in_a_loop",
    "of_values",
]

_MANY = 1 << 20  # elements
_MANY_HALF = 1 << 17


def _gains(x: Tensor) -> bool:
    """Whether loops over the rows of ``x`` gain: what is made of each row's numbers takes thirty calls."""
    return takes_logits(x) and (many(x, _MANY_HALF if is_half(x) else _MANY) or listed())


def loss_in_a_loop(
    x: Tensor, target: Tensor, alpha: Tensor | None, gamma: float, ignored: int, reduction: str
) -> Tensor | None:
    """Return the loss from log p_t of a compiled loop over rows; ``None`` where there is none."""
    made = over_log_probabilities(x, target, ignored) if _gains(x) else None
    if made is None:
        return None
    log_p, _, total = made
    values = torch.expm1(log_p).neg_().pow_(gamma).mul_(log_p).neg_()
    if alpha is not None:
        _, w, total = counted(x, target, alpha, ignored)
        values = (values * w).masked_fill_(w == 0, 0)
    values = values if reduction == "none" else values.sum()
    return as_dtype(values / total if reduction == "mean" else values, x.dtype)


def gradient_in_a_loop(
    x: Tensor, grad: Tensor, target: Tensor, alpha: Tensor | None, ctx: Context
) -> Tensor | None:
    """Return (2) from compiled loops over rows; ``None`` where there are none."""
    made = over_probabilities(x, target, ctx.ignored) if _gains(x) else None
    if made is None:
        return None
    log_p, u = made
    if ctx.simple:
        s, index = spread(grad, ctx.reduction, target.numel()), target
    else:
        s, index = of_values(x, grad, target, alpha, ctx)
    sk = s * _slope(log_p.exp(), u, ctx.gamma)
    grad_x = over_softmax_gradient(x, sk, target, ctx.ignored)
    if grad_x is None:
        return None
    own = (u * sk).neg_().to(x.dtype)
    return grad_x.scatter_(1, index.unsqueeze(1), own.unsqueeze(1))  # (2), p_t - 1 = -u


def of_values(
    x: Tensor, grad: Tensor, target: Tensor, alpha: Tensor | None, ctx: Context
) -> tuple[Tensor, Tensor]:
    """Return s α_t, 0 where ignored, and a safe index."""
    index, w, total = counted(x, target, alpha, ctx.ignored)
    s = spread(grad.to(w.dtype), ctx.reduction, total)
    if ctx.reduction == "mean":
        s = s.masked_fill(total == 0, 0)  # nothing counted: 0, not 0/0
    return s * w, index


def gradient(x: Tensor, s: Tensor, index: Tensor, gamma: float) -> Tensor:
    dim = class_dim(x)
    at = index.unsqueeze(dim)
    p = torch.softmax(x, dim, dtype=s.dtype)
    p_t = p.gather(dim, at)
    p = p.scatter_(dim, at, 0) if fused(p) else p.scatter(dim, at, 0)
    u = p.sum(dim, keepdim=True)  # 1 - p_t would round to 0
    sk = s.unsqueeze(dim) * _slope(p_t, u, gamma)
    made = scale_fresh(p, sk)
    put = made.scatter_ if fused(made, sk) else made.scatter
    return put(dim, at, -sk * u)  # (2), p_t - 1 = -u


def _slope(p_t: Tensor, u: Tensor, gamma: float) -> Tensor:
    """Return k but for α."""
    log_p = torch.where(u < 0.5, torch.log1p(-u.clamp(max=0.5)), p_t.log())
    certain = u == 0
    ratio = (log_p / u.masked_fill(certain, 1)).masked_fill(certain, -1)
    return u.pow(gamma) * (1 - gamma * p_t * ratio.clamp(min=torch.finfo(u.dtype).min))  # (1)


def gradient_in_place(x: Tensor, s: Tensor, index: Tensor, gamma: float) -> Tensor:
    """Return (2) as :func:`gradient` does, for γ ≥ 1 and one s or one a position, in half as many calls."""
    dim = class_dim(x)
    at = index.unsqueeze(dim)
    p = torch.softmax(x, dim)
    p_t = p.gather(dim, at)
    u = p.scatter_(dim, at, 0).sum(dim, keepdim=True)
    # p_t L, which is 0 for p_t = 0
    p_log_p = torch.where(u < 0.5, torch.special.xlog1py(p_t, -u), torch.xlogy(p_t, p_t))
    k = u.pow(gamma).sub_(u.pow(gamma - 1).mul_(p_log_p), alpha=gamma)  # (1)
    sk = k.mul_(s.unsqueeze(dim) if s.dim() else s)
    return p.mul_(sk).scatter_(dim, at, u.mul_(sk).neg_())  # (2), p_t - 1 = -u
