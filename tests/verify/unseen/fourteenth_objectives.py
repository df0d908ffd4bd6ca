"""Losses, first drafts."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fourteenth import add, require


class BarlowTwins(Function):
    @staticmethod
    def standard(x):
        x = x - x.mean(0)
        std = (x.square().mean(0) + 1e-5).sqrt()
        return x / std, std

    @staticmethod
    def forward(ctx, x, y, weight):
        ctx.save_for_backward(x, y)
        ctx.weight = weight
        _, miss, factor = BarlowTwins.cross(x, y, weight)
        return (factor * miss.square()).sum()

    @staticmethod
    def cross(x, y, weight):
        a, b = BarlowTwins.standard(x)[0], BarlowTwins.standard(y)[0]
        one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return (a, b), a.mT @ b / x.shape[0] - one, one + weight * (1 - one)

    @staticmethod
    def gradients(ctx, g, through):
        x, y = ctx.saved_tensors
        (a, b), miss, factor = BarlowTwins.cross(x, y, ctx.weight)
        d = 2 * g * factor * miss / x.shape[0]
        return through(x, a, b @ d.mT), through(y, b, a @ d), None

    @staticmethod
    def through(x, a, d):
        """The gradient of x from the gradient d of its standardised form a."""
        return (d - d.mean(0) - a * (d * a).mean(0)) / BarlowTwins.standard(x)[1]

    @staticmethod
    def backward(ctx, g):
        return BarlowTwins.gradients(ctx, g, BarlowTwins.through)


class BarlowTwinsFixed(BarlowTwins):
    @staticmethod
    def backward(ctx, g):
        return BarlowTwins.gradients(
            ctx, g, lambda x, a, d: (d - d.mean(0)) / BarlowTwins.standard(x)[1]
        )


def _barlow_twins(function):
    def barlow_twins(x, y, weight=0.005):
        """The Barlow Twins loss () of the views x and y (N, D), N > 0: their columns are standardised."""
        require(
            x.shape == y.shape and x.dim() == 2 and x.shape[0] > 0, "x, y must be (N, D), N > 0"
        )
        return function.apply(x, y, weight)

    return barlow_twins


add(
    "barlow_twins_deviation",
    _barlow_twins,
    BarlowTwinsFixed,
    BarlowTwins,
    lambda: (real(6, 3), real(6, 3, seed=1)),
    bug="the standard deviation is taken for a constant",
    trigger="the sample",
)


class Asymmetric(Function):
    @staticmethod
    def forward(ctx, logits, target, gamma, clip):
        ctx.save_for_backward(logits, target)
        ctx.options = gamma, clip
        p = logits.sigmoid()
        shifted = (p - clip).clamp(min=0)
        negative = shifted**gamma * (-shifted).log1p()
        return -(target * torch.nn.functional.logsigmoid(logits) + (1 - target) * negative).sum()

    @staticmethod
    def gradients(ctx, g, shift):
        logits, target = ctx.saved_tensors
        gamma, clip = ctx.options
        p = logits.sigmoid()
        s = shift(p - clip)
        slope = gamma * s ** (gamma - 1) * (-s).log1p() - s**gamma / (1 - s)
        negative = torch.where(s == 0, 0, slope) * p * (1 - p)
        return -g * (target * (1 - p) + (1 - target) * negative), None, None, None

    @staticmethod
    def backward(ctx, g):
        return Asymmetric.gradients(ctx, g, lambda s: s.clamp(min=0))


class AsymmetricClip(Asymmetric):
    @staticmethod
    def backward(ctx, g):
        return Asymmetric.gradients(ctx, g, lambda s: s)


def _asymmetric(function):
    def asymmetric(logits, target, gamma=4, clip=0.05):
        """The asymmetric loss () of multi-label logits, with targets 0 or 1 of their shape.

        A wrong label's probability is lowered by clip, in [0.01, 0.5], down to 0; gamma is a whole number, 1 or more.
        """
        require(isinstance(gamma, int) and gamma >= 1, "gamma must be a whole number, 1 or more")
        require(0.01 <= clip <= 0.5, "clip must be in [0.01, 0.5]")
        require(
            logits.shape == target.shape and not target.requires_grad,
            "target as logits, no gradient",
        )
        return function.apply(logits, target, gamma, clip)

    return asymmetric


add(
    "asymmetric_clip",
    _asymmetric,
    AsymmetricClip,
    Asymmetric,
    lambda: (
        real(3, 4),
        torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.float64),
    ),
    bug="backward leaves out the clamp of the shifted probability",
    trigger="a wrong label's probability below clip (a logit under -3), by little unless gamma=1",
)


class QuantileHuber(Function):
    @staticmethod
    def parts(theta, target):
        """Errors (B, N, M), and how much an error over or under each quantile weighs."""
        n = theta.shape[1]
        tau = (torch.arange(n, dtype=theta.dtype, device=theta.device) + 0.5) / n
        error = target.unsqueeze(1) - theta.unsqueeze(2)
        return error, (tau.view(1, -1, 1) - (error < 0).to(theta.dtype)).abs()

    @staticmethod
    def forward(ctx, theta, target, kappa):
        ctx.save_for_backward(theta, target)
        ctx.kappa = kappa
        error, weight = QuantileHuber.parts(theta, target)
        huber = torch.where(error.abs() <= kappa, error**2 / 2, kappa * (error.abs() - kappa / 2))
        return (weight * huber / kappa).mean(2).sum(1).mean()

    @staticmethod
    def gradients(ctx, g, count):
        theta, target = ctx.saved_tensors
        error, weight = QuantileHuber.parts(theta, target)
        d = weight * error.clamp(-ctx.kappa, ctx.kappa) / ctx.kappa
        return -g * d.sum(2) / count(theta, target), None, None

    @staticmethod
    def backward(ctx, g):
        return QuantileHuber.gradients(ctx, g, lambda theta, target: len(theta) * target.shape[1])


class QuantileHuberCount(QuantileHuber):
    @staticmethod
    def backward(ctx, g):
        return QuantileHuber.gradients(ctx, g, lambda theta, target: theta.numel())


def _quantile_huber(function):
    def quantile_huber(theta, target, kappa=1.0):
        """QR-DQN's loss () of the quantiles theta (B, N) for the targets (B, M), B and M > 0, kappa > 0.

        The mean over targets, the sum over quantiles, the mean over the batch. Gradient for theta alone.
        """
        require(kappa > 0 and target.numel() > 0, "kappa must be positive, target not empty")
        require(
            theta.shape[:1] == target.shape[:1] and not target.requires_grad, "detach the target"
        )
        return function.apply(theta, target, kappa)

    return quantile_huber


add(
    "quantile_huber_count",
    _quantile_huber,
    QuantileHuberCount,
    QuantileHuber,
    lambda: (real(3, 4), real(3, 4, seed=1, grad=False)),
    bug="backward divides by the number of quantiles, forward by that of the targets",
    trigger="more or fewer targets than quantiles",
)


class Entmax(Function):
    """Entmax with α = 3/2: the square of what is left of x / 2 above a threshold."""

    @staticmethod
    def value(x, dim):
        x = x.movedim(dim, -1) / 2
        x = x - x.amax(-1, keepdim=True).detach()
        ordered = x.sort(-1, descending=True)[0]
        rho = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
        mean, square = ordered.cumsum(-1) / rho, ordered.square().cumsum(-1) / rho
        tau = mean - ((1 - rho * (square - mean**2)) / rho).clamp(min=0).sqrt()
        support = (tau <= ordered).sum(-1, keepdim=True).clamp(min=1)
        x, tau = x.movedim(-1, dim), tau.gather(-1, support - 1).movedim(-1, dim)
        return (x - tau).clamp(min=0).square()

    @staticmethod
    def forward(ctx, x, dim):
        y = Entmax.value(x, dim)
        ctx.save_for_backward(y)
        ctx.dim = dim
        return y

    @staticmethod
    def gradients(ctx, g, dim):
        root = ctx.saved_tensors[0].clamp(min=1e-30).sqrt() * (ctx.saved_tensors[0] > 0)
        d = g * root
        return d - root * d.sum(dim, keepdim=True) / root.sum(dim, keepdim=True), None

    @staticmethod
    def backward(ctx, g):
        return Entmax.gradients(ctx, g, ctx.dim)


class EntmaxLast(Entmax):
    @staticmethod
    def backward(ctx, g):
        return Entmax.gradients(ctx, g, -1)


def _entmax(function):
    def entmax(x, dim=-1):
        """Entmax (α = 3/2) of x along a dimension, which is not empty."""
        require(-x.dim() <= dim < x.dim() and x.shape[dim] > 0, "dim must be one of x's, not empty")
        return function.apply(x, dim)

    return entmax


add(
    "entmax_dim",
    _entmax,
    EntmaxLast,
    Entmax,
    lambda: (real(3, 4),),
    bug="backward sums along the last dimension, whatever dim is",
    trigger="dim=0",
)
