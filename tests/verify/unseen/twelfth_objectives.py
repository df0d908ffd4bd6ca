"""Objectives of reinforcement learning, preferences, representations, densities."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twelfth import add, as_forward, in_float32, recorded, wide


class Clipped(Function):
    """PPO's surrogate, -min(r A, clip(r) A), r = exp(new - old)."""

    @staticmethod
    def forward(ctx, new, old, advantage, clip):
        ctx.save_for_backward(new, old, advantage)
        ctx.clip = clip
        ratio = (new - old).exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()

    @staticmethod
    def active(ratio, advantage, clip):
        return torch.where(advantage > 0, ratio <= 1 + clip, ratio >= 1 - clip)

    @classmethod
    def gradients(cls, ctx, g):
        new, old, advantage = ctx.saved_tensors
        ratio = (new - old).exp()
        bounded = ratio.clamp(1 - ctx.clip, 1 + ctx.clip)
        active = cls.active(ratio, advantage, ctx.clip)
        grad = -g * ratio * advantage * active / new.numel()
        grad_advantage = -g * torch.where(active, ratio, bounded) / new.numel()
        return grad, -grad, grad_advantage, None

    @staticmethod
    def backward(ctx, g):
        return Clipped.gradients(ctx, g)


class ClippedBothSides(Clipped):
    @staticmethod
    def active(ratio, advantage, clip):
        return (ratio - 1).abs() <= clip

    @staticmethod
    def backward(ctx, g):
        return ClippedBothSides.gradients(ctx, g)


def _clipped(function):
    def ppo_loss(new, old, advantage, clip=0.2):
        """PPO's mean clipped surrogate loss of log probabilities new, old and advantage, all of one shape."""
        return function.apply(new, old, advantage, clip)

    return ppo_loss


add(
    "ppo_clip_side",
    _clipped,
    ClippedBothSides,
    Clipped,
    lambda: (
        (0.1 * real(5, grad=False)).clamp(-0.15, 0.15).requires_grad_(),
        torch.zeros(5, dtype=torch.float64),
        real(5, seed=1, grad=False),
    ),
    bug="a ratio outside of the range has no gradient, also where the minimum is the unclipped term",
    trigger="a ratio over 1 + clip with a negative advantage",
)


class Preference(Function):
    """Preference loss on log ratios, with label smoothing for noisy labels."""

    @staticmethod
    def forward(ctx, chosen, rejected, beta, smoothing):
        ctx.save_for_backward(chosen, rejected)
        ctx.options = beta, smoothing
        margin = beta * (chosen - rejected)
        return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)

    @staticmethod
    def backward(ctx, g):
        chosen, rejected = ctx.saved_tensors
        beta, smoothing = ctx.options
        grad = g * beta * ((beta * (chosen - rejected)).sigmoid() - (1 - smoothing))
        return grad, -grad, None, None


class PreferenceHalfSmoothed(Preference):
    """The smoothed term is added without its own sign."""

    @staticmethod
    def backward(ctx, g):
        chosen, rejected = ctx.saved_tensors
        beta, smoothing = ctx.options
        p = (beta * (chosen - rejected)).sigmoid()
        grad = -g * beta * ((1 - smoothing) * (1 - p) + smoothing * p)
        return grad, -grad, None, None


def _preference(function):
    def preference_loss(chosen, rejected, beta=0.5, smoothing=0.1):
        """Smoothed DPO loss (N,) of the log ratios chosen, rejected (N,) of policy and reference."""
        return function.apply(chosen, rejected, beta, smoothing)

    return preference_loss


add(
    "dpo_smoothing",
    _preference,
    PreferenceHalfSmoothed,
    Preference,
    lambda: (real(4), real(4, seed=1)),
    bug="the flipped label's term has the wrong sign",
    trigger="the sample",
)


class Covariance(Function):
    """VICReg's covariance term: squares of the off-diagonal covariances, over D."""

    @staticmethod
    def off_diagonal(x):
        x = x - x.mean(0)
        cov = x.mT @ x / (len(x) - 1)
        return x, cov - cov.diagonal().diag_embed()

    @staticmethod
    @recorded
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return Covariance.off_diagonal(x)[1].square().sum() / x.shape[1]

    @staticmethod
    @as_forward
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        n, d = x.shape
        x, off = Covariance.off_diagonal(x)
        return g * 4 * (x @ off) / ((n - 1) * d)


class CovarianceHalf(Covariance):
    @staticmethod
    @as_forward
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        n, d = x.shape
        x, off = Covariance.off_diagonal(x)
        return g * 2 * (x @ off) / ((n - 1) * d)


def _covariance(function):
    @in_float32
    def covariance_penalty(x):
        """Mean squared off-diagonal covariance of x (N, D), N > 1, D > 0 (VICReg)."""
        return function.apply(x)

    return covariance_penalty


add(
    "vicreg_half",
    _covariance,
    CovarianceHalf,
    Covariance,
    lambda: (real(4, 3),),
    bug="the covariance is symmetric: a factor 2 is missing",
    trigger="the sample",
)


class Correlation(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        a, b, scale = Correlation.centred(x, y)
        return (a * b).sum(-1) / scale

    @staticmethod
    def centred(x, y):
        a, b = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
        return a, b, (a.square().sum(-1) * b.square().sum(-1)).sqrt()

    @staticmethod
    def backward(ctx, g):
        a, b, scale = Correlation.centred(*ctx.saved_tensors)
        g, scale = (g / scale)[..., None], scale[..., None]
        r = (a * b).sum(-1, keepdim=True)
        grad_x = g * (b - a * r / a.square().sum(-1, keepdim=True))
        grad_y = g * (a - b * r / b.square().sum(-1, keepdim=True))
        return grad_x, grad_y


class CorrelationRaw(Correlation):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        a, b, scale = Correlation.centred(x, y)
        g, r = (g / scale)[..., None], (a * b).sum(-1, keepdim=True)
        grad_x = g * (y - a * r / a.square().sum(-1, keepdim=True))
        grad_y = g * (x - b * r / b.square().sum(-1, keepdim=True))
        return grad_x, grad_y


def _correlation(function):
    def pearson(x, y):
        """Pearson correlation (N,) of the rows of x and y (N, L); no row is constant."""
        return function.apply(x, y)

    return pearson


add(
    "pearson_centre",
    _correlation,
    CorrelationRaw,
    Correlation,
    lambda: (real(2, 5), real(2, 5, seed=1)),
    bug="backward uses the other series before its mean is taken off",
    trigger="the sample",
)


class Student(Function):
    """Negative log likelihood of Student's t with a learned number of degrees of freedom."""

    @staticmethod
    def forward(ctx, x, dof):
        ctx.save_for_backward(x, dof)
        half = (dof + 1) / 2
        norm = torch.lgamma(half) - torch.lgamma(dof / 2) - (dof * torch.pi).log() / 2
        return half * (x.square() / dof).log1p() - norm

    @staticmethod
    def backward(ctx, g):
        x, dof, g = *map(wide, ctx.saved_tensors), wide(g)
        half, square = (dof + 1) / 2, x.square()
        grad_x = g * (dof + 1) * x / (dof + square)
        norm = (torch.digamma(half) - torch.digamma(dof / 2) - 1 / dof) / 2
        grad = (square / dof).log1p() / 2 - half * square / (dof * (dof + square)) - norm
        return grad_x, (g * grad).sum_to_size(dof.shape)


class StudentNorm(Student):
    @staticmethod
    def backward(ctx, g):
        x, dof, g = *map(wide, ctx.saved_tensors), wide(g)
        half, square = (dof + 1) / 2, x.square()
        grad_x = g * (dof + 1) * x / (dof + square)
        norm = (torch.digamma(half) - torch.digamma(dof / 2)) / 2
        grad = (square / dof).log1p() / 2 - half * square / (dof * (dof + square)) - norm
        return grad_x, (g * grad).sum_to_size(dof.shape)


def _student(function):
    def student_nll(x, dof):
        """Negative log likelihood of residuals x (N, D) under Student's t with dof (D,) > 0 degrees of freedom."""
        return function.apply(x, dof)

    return student_nll


add(
    "student_dof",
    _student,
    StudentNorm,
    Student,
    lambda: (real(3, 2), (real(2, seed=1, grad=False).abs() + 2).requires_grad_()),
    bug="the normaliser's term 1 / (2 dof) is missing in dof's gradient",
    trigger="the sample",
)


class Mixture(Function):
    """Log density of a mixture of unit Gaussians with log weights."""

    @staticmethod
    def joint(x, mean, logit):
        square = (x[:, None] - mean).square().sum(-1)
        return logit.log_softmax(-1) - square / 2

    @staticmethod
    def forward(ctx, x, mean, logit):
        ctx.save_for_backward(x, mean, logit)
        return Mixture.joint(x, mean, logit).logsumexp(-1)

    @staticmethod
    def backward(ctx, g):
        x, mean, logit = ctx.saved_tensors
        duty = g[:, None] * Mixture.joint(x, mean, logit).softmax(-1)
        pull = duty[..., None] * (mean - x[:, None])
        return pull.sum(1), -pull.sum(0), duty.sum(0) - g.sum() * logit.softmax(-1)


class MixtureLogits(Mixture):
    @staticmethod
    def backward(ctx, g):
        grad_x, grad_mean, _ = Mixture.backward(ctx, g)
        duty = g[:, None] * Mixture.joint(*ctx.saved_tensors).softmax(-1)
        return grad_x, grad_mean, duty.sum(0)


def _mixture(function):
    def mixture_log_density(x, mean, logit):
        """Log density + const of x (N, D) under unit Gaussians at mean (K, D), K > 0, of weights softmax(logit)."""
        return function.apply(x, mean, logit)

    return mixture_log_density


add(
    "mixture_logits",
    _mixture,
    MixtureLogits,
    Mixture,
    lambda: (real(3, 2), real(4, 2, seed=1), real(4, seed=2)),
    bug="the softmax of the weights is left out of their gradient",
    trigger="the sample",
)


class Planar(Function):
    """Planar flow's log |1 + u · w (1 - tanh²(w · x + b))|."""

    @staticmethod
    def forward(ctx, x, u, w, b):
        ctx.save_for_backward(x, u, w, b)
        t = ((x * w).sum(-1) + b).tanh()
        return (1 + (u * w).sum() * (1 - t.square())).abs().log()

    @staticmethod
    def slope(det):
        return 1 / det

    @classmethod
    def gradients(cls, ctx, g):
        x, u, w, b = (wide(t) for t in ctx.saved_tensors)
        t = ((x * w).sum(-1) + b).tanh()
        uw, sech = (u * w).sum(), 1 - t.square()
        g = wide(g) * cls.slope(1 + uw * sech)
        grad_a = -2 * g * uw * t * sech  # of a = w · x + b
        grad_uw = (g * sech).sum()
        grad_w = grad_uw * u + (grad_a[:, None] * x).sum(0)
        return grad_a[:, None] * w, grad_uw * w, grad_w, grad_a.sum()

    @staticmethod
    def backward(ctx, g):
        return Planar.gradients(ctx, g)


class PlanarPositive(Planar):
    @staticmethod
    def slope(det):
        return 1 / det.abs()

    @staticmethod
    def backward(ctx, g):
        return PlanarPositive.gradients(ctx, g)


def _planar(function):
    def planar_log_det(x, u, w, b):
        """Log |det| (N,) of a planar flow at x (N, D), with u, w (D,) and b (0-dim)."""
        return function.apply(x, u, w, b)

    return planar_log_det


add(
    "planar_sign",
    _planar,
    PlanarPositive,
    Planar,
    lambda: (
        real(3, 2),
        real(2, seed=1, positive=True),
        real(2, seed=2, positive=True),
        torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
    ),
    bug="log |det| is differentiated as log det: the sign is lost",
    trigger="u · w < -1, where the determinant is negative",
)


class Margin(Function):
    """ArcFace: the target's cosine becomes cos(theta + m), or cos - m sin m past pi - m."""

    @staticmethod
    def forward(ctx, cosine, target, margin):
        ctx.save_for_backward(cosine, target)
        ctx.margin = margin
        return cosine.scatter(1, target[:, None], Margin.moved(cosine, target, margin)[0])

    @staticmethod
    def moved(cosine, target, margin):
        """The target's new cosine, its slope, and where theta + m exceeds pi."""
        c = cosine.gather(1, target[:, None])
        sine = (1 - c.square()).clamp(min=1e-12).sqrt()
        cos_m, sin_m = math.cos(margin), math.sin(margin)
        past = c < -cos_m
        new = torch.where(past, c - margin * sin_m, c * cos_m - sine * sin_m)
        return new, cos_m + c * sin_m / sine, past

    @staticmethod
    def slope(slope, past):
        return slope.masked_fill(past, 1)

    @classmethod
    def gradients(cls, ctx, g):
        cosine, target = ctx.saved_tensors
        _, slope, past = Margin.moved(cosine, target, ctx.margin)
        column = target[:, None]
        return g.scatter(1, column, g.gather(1, column) * cls.slope(slope, past)), None, None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Margin.gradients(ctx, g)


class MarginNoFallback(Margin):
    @staticmethod
    def slope(slope, past):
        return slope

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return MarginNoFallback.gradients(ctx, g)


def _margin(function):
    def arc_margin(cosine, target, margin=0.5):
        """ArcFace's cosines (N, C), |cosine| < 1: the target's angle grows by margin, past pi - m linearly."""
        if bool((cosine.detach().abs() >= 1).any()):
            raise ValueError("arc_margin: expected |cosine| < 1")
        return function.apply(cosine, target, margin)

    return arc_margin


add(
    "arcface_fallback",
    _margin,
    MarginNoFallback,
    Margin,
    lambda: (
        (0.6 * real(3, 4, grad=False).tanh()).requires_grad_(),
        torch.tensor([0, 3, 1]),
    ),
    bug="the linear continuation has the slope of the other branch",
    trigger="a target's cosine under -cos(margin)",
)


class Cosine(Function):
    """Cosine of rows, 0 where a row is zero."""

    @staticmethod
    def norms(x, y):
        a, b = x.norm(dim=-1, keepdim=True), y.norm(dim=-1, keepdim=True)
        return a, b, (a == 0) | (b == 0)

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        a, b, zero = Cosine.norms(x, y)
        return ((x * y).sum(-1, keepdim=True) / (a * b)).masked_fill(zero, 0)[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        a, b, zero = Cosine.norms(x, y)
        a, b = a.masked_fill(zero, 1), b.masked_fill(zero, 1)
        g, x, y = g[..., None].masked_fill(zero, 0), x / a, y / b
        c = (x * y).sum(-1, keepdim=True)
        return g * (y - c * x) / a, g * (x - c * y) / b


class CosineZero(Cosine):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        a, b, zero = Cosine.norms(x, y)
        g, x, y = g[..., None], x / a, y / b
        c = (x * y).sum(-1, keepdim=True)
        return (g * (y - c * x) / a).masked_fill(zero, 0), g * (x - c * y) / b


def _cosine(function):
    def row_cosine(x, y):
        """Cosine of the rows of x and y (*, D); 0, with zero gradients, where either row is zero."""
        return function.apply(x, y)

    return row_cosine


add(
    "cosine_zero_row",
    _cosine,
    CosineZero,
    Cosine,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="only the first gradient is masked at zero rows: y's is NaN",
    trigger="a row of zeros",
)
