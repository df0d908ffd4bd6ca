"""Losses: focal, divergence, margins, overlap."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import pair, real, whole


class Focal(Function):
    """Sum over rows of -(1-p)^2 log p for the class that is true."""

    @staticmethod
    def forward(ctx, x, t):
        p = x.softmax(-1).gather(-1, t[:, None])
        ctx.save_for_backward(x, t)
        return (-((1 - p) ** 2) * p.log()).sum()

    @staticmethod
    def slope(p):
        return (1 - p) * (2 * p.log() - (1 - p) / p)

    @classmethod
    def pull(cls, ctx, g):
        x, t = ctx.saved_tensors
        s = x.softmax(-1)
        p = s.gather(-1, t[:, None])
        return g * cls.slope(p) * p * (F.one_hot(t, x.shape[-1]) - s), None

    @staticmethod
    def backward(ctx, g):
        return Focal.pull(ctx, g)


class FocalFrozen(Focal):
    @staticmethod
    def slope(p):
        return -((1 - p) ** 2) / p

    @staticmethod
    def backward(ctx, g):
        return FocalFrozen.pull(ctx, g)


pair(
    "focal_factor_constant",
    FocalFrozen.apply,
    Focal.apply,
    lambda: (real(5, 3), whole(3, 5)),
    "the modulating factor is taken for a constant",
)


class KL(Function):
    """KL divergence with log targets, "batchmean"."""

    @staticmethod
    def forward(ctx, x, t):
        ctx.save_for_backward(t)
        return (t.exp() * (t - x)).sum() / len(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (t,) = ctx.saved_tensors
        return -g * t.exp() / len(t), None


class KLMean(KL):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (t,) = ctx.saved_tensors
        return -g * t.exp() / t.numel(), None


pair(
    "kl_batchmean",
    KLMean.apply,
    KL.apply,
    lambda: (
        real(4, 3).detach().log_softmax(-1).requires_grad_(),
        real(4, 3, seed=1, grad=False).log_softmax(-1),
    ),
    "divides by all elements instead of rows",
)


class BCE(Function):
    """Binary cross-entropy of logits with pos_weight, mean."""

    @staticmethod
    def forward(ctx, x, t, w):
        ctx.save_for_backward(x, t, w)
        return F.binary_cross_entropy_with_logits(x, t, pos_weight=w)

    @staticmethod
    def backward(ctx, g):
        x, t, w = ctx.saved_tensors
        s = x.sigmoid()
        return g * ((1 - t) * s - w * t * (1 - s)) / x.numel(), None, None


class BCEWeight(BCE):
    @staticmethod
    def backward(ctx, g):
        x, t, w = ctx.saved_tensors
        s = x.sigmoid()
        return g * (s - t) * torch.where(t > 0, w, 1) / x.numel(), None, None


pair(
    "bce_soft_targets",
    BCEWeight.apply,
    BCE.apply,
    lambda: (
        real(4, 3),
        real(4, 3, seed=1, grad=False).sigmoid(),
        real(3, seed=2, grad=False).exp(),
    ),
    "pos_weight applied as if targets were 0 or 1",
)


class Triplet(Function):
    """max(0, |a-p|^2 - |a-n|^2 + 1), mean over rows."""

    @staticmethod
    def forward(ctx, a, p, n):
        ctx.save_for_backward(a, p, n)
        return Triplet.rows(a, p, n).clamp(min=0).mean()

    @staticmethod
    def rows(a, p, n):
        return (a - p).square().sum(-1) - (a - n).square().sum(-1) + 1

    @staticmethod
    def backward(ctx, g):
        a, p, n = ctx.saved_tensors
        on = (Triplet.rows(a, p, n) > 0)[:, None] * (2 * g / len(a))
        return on * (n - p), on * (p - a), on * (a - n)


class TripletAlways(Triplet):
    @staticmethod
    def backward(ctx, g):
        a, p, n = ctx.saved_tensors
        on = 2 * g / len(a) * torch.ones_like(a)
        return on * (n - p), on * (p - a), on * (a - n)


pair(
    "triplet_margin",
    TripletAlways.apply,
    Triplet.apply,
    lambda: (real(5, 3), real(5, 3, seed=1), real(5, 3, seed=2)),
    "triplets beyond the margin still get a gradient",
)


class Dice(Function):
    """1 - 2 sum(p t) / (sum p + sum t)."""

    @staticmethod
    def forward(ctx, p, t):
        ctx.save_for_backward(p, t)
        return 1 - 2 * (p * t).sum() / (p.sum() + t.sum())

    @staticmethod
    def backward(ctx, g):
        p, t = ctx.saved_tensors
        total = p.sum() + t.sum()
        return g * (-2 * t / total + 2 * (p * t).sum() / total**2), None


class DiceFirst(Dice):
    @staticmethod
    def backward(ctx, g):
        p, t = ctx.saved_tensors
        return g * -2 * t / (p.sum() + t.sum()), None


pair(
    "dice_denominator",
    DiceFirst.apply,
    Dice.apply,
    lambda: (
        real(4, 4).detach().sigmoid().requires_grad_(),
        (real(4, 4, seed=1, grad=False) > 0).double(),
    ),
    "the denominator is taken for a constant",
)
