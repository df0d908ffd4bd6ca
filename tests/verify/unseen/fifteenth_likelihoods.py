"""Losses of values and log densities."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.twelfth import wide


def scalar(value):
    return torch.tensor(value, dtype=F64, requires_grad=True)


class Expectile(Function):
    @staticmethod
    def forward(ctx, x, y, tau):
        ctx.save_for_backward(x, y, tau)
        e = wide(y) - wide(x)
        return (Expectile.weight(e, wide(tau)) * e.square()).mean().to(x.dtype)

    @staticmethod
    def weight(e, tau):
        return torch.where(e > 0, tau, 1 - tau)

    @staticmethod
    def gradients(ctx, g, sign):
        x, y, tau = (wide(t) for t in ctx.saved_tensors)
        e, d = y - x, wide(g) / x.numel()
        grad = 2 * d * Expectile.weight(e, tau) * e
        grad_tau = (d * sign(e) * e.square()).sum()
        return tuple(a.to(g.dtype) for a in (-grad, grad, grad_tau))

    @staticmethod
    def backward(ctx, g):
        return Expectile.gradients(ctx, g, torch.sign)


class ExpectileOneSide(Expectile):
    @staticmethod
    def backward(ctx, g):
        return Expectile.gradients(ctx, g, lambda e: (e > 0).to(e.dtype))


def _expectile(function):
    def expectile(x, y, tau):
        """The mean of w (y - x)², w = tau for y > x, else 1 - tau, of x and y of one shape, not empty.

        tau () is between 0 and 1.
        """
        need(x.shape == y.shape and x.numel() > 0, "expected x and y of one shape, not empty")
        need(tau.dim() == 0 and 0 < tau < 1, "expected tau () between 0 and 1")
        return function.apply(x, y, tau)

    return expectile


add(
    "expectile",
    _expectile,
    ExpectileOneSide,
    Expectile,
    lambda: (real(3, 4), real(3, 4, seed=1), scalar(0.3)),
    bug="tau's gradient lacks the side with 1 - tau",
    trigger="the sample",
)


class BinaryLogits(Function):
    @staticmethod
    def forward(ctx, x, y, limit):
        ctx.save_for_backward(x, y)
        ctx.limit = limit
        h = wide(x).clamp(-limit, limit)
        return (F.softplus(h) - wide(y) * h).sum().to(x.dtype)

    @staticmethod
    def gradients(ctx, g, inside):
        x, y = ctx.saved_tensors
        h = wide(x).clamp(-ctx.limit, ctx.limit)
        return (wide(g) * (h.sigmoid() - wide(y)) * inside(h == wide(x))).to(g.dtype), None, None

    @staticmethod
    def backward(ctx, g):
        return BinaryLogits.gradients(ctx, g, lambda inside: inside.to(wide(g).dtype))


class BinaryLogitsBeyond(BinaryLogits):
    @staticmethod
    def backward(ctx, g):
        return BinaryLogits.gradients(ctx, g, lambda _: 1)


def _binary_logits(function):
    def binary_logits(x, y, limit=15.0):
        """Σ log(1 + exp(h)) - y h, h = x clamped to -limit .. limit; targets y of x's shape, a constant.

        limit is above 0. Beyond it the gradient is 0.
        """
        need(x.shape == y.shape and limit > 0, "expected x and y of one shape, and limit > 0")
        return function.apply(x, y.detach(), limit)

    return binary_logits


add(
    "binary_logits",
    _binary_logits,
    BinaryLogitsBeyond,
    BinaryLogits,
    lambda: (real(3, 4), torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=F64)),
    bug="the gradient passes beyond the limits of the clamp",
    trigger="|x| > limit",
)


class SmoothL1(Function):
    @staticmethod
    def forward(ctx, x, y, beta):
        ctx.save_for_backward(x, y)
        ctx.beta = beta
        e = (wide(x) - wide(y)).abs()
        small = e.square() / (2 * beta) if beta else e
        return torch.where(e < beta, small, e - beta / 2).sum().to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        e = wide(x) - wide(y)
        slope = (e / ctx.beta).clamp(-1, 1) if ctx.beta else e.sign()
        grad = (wide(g) * slope).to(g.dtype)
        return grad, -grad, None


class SmoothL1Zero(SmoothL1):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        e = wide(x) - wide(y)
        grad = (wide(g) * e / e.abs().clamp(min=ctx.beta)).to(g.dtype)
        return grad, -grad, None


def _smooth_l1(function):
    def smooth_l1(x, y, beta=1.0):
        """Σ e² / (2 beta) where |e| < beta, else |e| - beta / 2, e = x - y of one shape, beta >= 0.

        With beta 0 it is Σ |e|, whose gradient at e = 0 is 0.
        """
        need(x.shape == y.shape and beta >= 0, "expected x and y of one shape and beta >= 0")
        return function.apply(x, y, beta)

    return smooth_l1


add(
    "smooth_l1",
    _smooth_l1,
    SmoothL1Zero,
    SmoothL1,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="0 / 0 where both beta and the error are 0",
    trigger="beta=0 and equal values",
    missed="beta=0 and equal values are tried each, and not both at once",
)


class Beta(Function):
    @staticmethod
    def forward(ctx, x, a, b, reduction):
        ctx.save_for_backward(x, a, b)
        ctx.reduction = reduction
        dtype, (x, a, b) = x.dtype, (wide(t) for t in (x, a, b))
        loss = a.lgamma() + b.lgamma() - (a + b).lgamma() - (a - 1) * x.log()
        loss = loss - (b - 1) * (-x).log1p()
        if reduction != "none":
            loss = loss.sum() / (max(x.numel(), 1) if reduction == "mean" else 1)
        return loss.to(dtype)

    @staticmethod
    def gradients(ctx, g):
        x, a, b = (wide(t) for t in ctx.saved_tensors)
        d = wide(g) / (max(x.numel(), 1) if ctx.reduction == "mean" else 1)
        both = (a + b).digamma()
        slopes = (b - 1) / (1 - x) - (a - 1) / x, a.digamma() - both - x.log()
        grads = *(d * s for s in slopes), d * (b.digamma() - both - (-x).log1p())
        return *(s.to(g.dtype) for s in grads), None

    @staticmethod
    def backward(ctx, g):
        return Beta.gradients(ctx, g)


class BetaFirst(Beta):
    """The kernel reads one number of grad_output."""

    @staticmethod
    def backward(ctx, g):
        return Beta.gradients(ctx, g.reshape(-1)[0] if g.numel() else g)


def _beta(function):
    def beta_loss(x, a, b, reduction="mean"):
        """-log density of the beta distribution at x, 0 < x < 1, with a, b > 0, all of one shape.

        reduction is "none", "sum" or "mean", that of nothing 0.
        """
        need(x.shape == a.shape == b.shape, "expected x, a, b of one shape")
        need(bool(((x > 0) & (x < 1) & (a > 0) & (b > 0)).all()), "expected 0 < x < 1 and a, b > 0")
        need(reduction in {"none", "sum", "mean"}, 'expected reduction "none", "sum" or "mean"')
        return function.apply(x, a, b, reduction)

    return beta_loss


def shares(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=F64).mul(0.8).add(0.1).requires_grad_()


add(
    "beta_density",
    _beta,
    BetaFirst,
    Beta,
    lambda: (shares(2, 3), real(2, 3, seed=1, positive=True), real(2, 3, seed=2, positive=True)),
    bug="reads the first number of grad_output alone",
    trigger="reduction='none' with different upstream gradients",
)


class VonMises(Function):
    @staticmethod
    def forward(ctx, x, loc, kappa):
        ctx.save_for_backward(x, loc, kappa)
        dtype, (x, loc, kappa) = x.dtype, (wide(t) for t in (x, loc, kappa))
        log_i0 = torch.special.i0e(kappa).log() + kappa
        y = kappa * (x - loc).cos() - log_i0 - math.log(2 * math.pi)
        return y.to(dtype)

    @staticmethod
    def gradients(ctx, g, total):
        x, loc, kappa = (wide(t) for t in ctx.saved_tensors)
        turn = wide(g) * kappa * (x - loc).sin()
        ratio = torch.special.i1e(kappa) / torch.special.i0e(kappa)
        to_kappa = (wide(g) * (x - loc).cos()).sum() - ratio * total(wide(g))
        return tuple(a.to(g.dtype) for a in (-turn, turn.sum(), to_kappa))

    @staticmethod
    def backward(ctx, g):
        return VonMises.gradients(ctx, g, torch.sum)


class VonMisesOnce(VonMises):
    @staticmethod
    def backward(ctx, g):
        return VonMises.gradients(ctx, g, torch.mean)


def _von_mises(function):
    def von_mises(x, loc, kappa):
        """The log density kappa cos(x - loc) - log(2π I0(kappa)) of x, of any shape but empty.

        loc and kappa > 0 are ().
        """
        need(
            x.numel() > 0 and loc.dim() == kappa.dim() == 0, "expected some x, loc () and kappa ()"
        )
        need(bool(kappa > 0), "expected kappa > 0")
        return function.apply(x, loc, kappa)

    return von_mises


add(
    "von_mises",
    _von_mises,
    VonMisesOnce,
    VonMises,
    lambda: (real(5), scalar(0.5), scalar(2.0)),
    bug="of the normalizer, kappa's gradient gets the mean where the sum belongs",
    trigger="the sample: more than one x",
)
