"""Densities, overlaps."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.sixteenth import add, expect


class Laplace(Function):
    @staticmethod
    def forward(ctx, x, loc, log_scale):
        ctx.save_for_backward(x, loc, log_scale)
        return (-(x - loc).abs() * (-log_scale).exp() - log_scale - math.log(2)).sum(-1)

    @staticmethod
    def gradients(ctx, g, sign):
        x, loc, log_scale = ctx.saved_tensors
        rate, g = (-log_scale).exp(), g[:, None]
        of_loc = g * (x - loc).sign() * rate
        return sign * of_loc, of_loc.sum(0), (g * ((x - loc).abs() * rate - 1)).sum(0)

    @staticmethod
    def backward(ctx, g):
        return Laplace.gradients(ctx, g, -1)


class LaplaceSign(Laplace):
    @staticmethod
    def backward(ctx, g):
        return Laplace.gradients(ctx, g, 1)


def _laplace(function):
    def laplace_log_density(x, loc, log_scale):
        """Sum over D of the Laplace log densities at x (N, D), with loc and log_scale (D,), from -10 to 10."""
        expect(
            x.dim() == 2 and loc.shape == log_scale.shape == x.shape[1:],
            "loc, log_scale (D,)",
            tuple(loc.shape),
        )
        expect((log_scale.abs() <= 10).all(), "log_scale from -10 to 10", log_scale)
        return function.apply(x, loc, log_scale)

    return laplace_log_density


add(
    "laplace_sign",
    _laplace,
    LaplaceSign,
    Laplace,
    lambda: (real(4, 3), real(3, seed=1), real(3, seed=2)),
    bug="x's gradient has loc's sign",
    shows="the sample",
)


class TanhNormal(Function):
    @staticmethod
    def forward(ctx, u, mean, log_std):
        ctx.save_for_backward(u, mean, log_std)
        z = (u - mean) * (-log_std).exp()
        normal = -z.square() / 2 - log_std - math.log(2 * math.pi) / 2
        return (normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)

    @staticmethod
    def gradients(ctx, g, sign):
        u, mean, log_std = ctx.saved_tensors
        rate, g = (-log_std).exp(), g[..., None]
        z = (u - mean) * rate
        of_mean = g * z * rate
        return sign * g * 2 * u.tanh() - of_mean, of_mean, g * (z.square() - 1)

    @staticmethod
    def backward(ctx, g):
        return TanhNormal.gradients(ctx, g, 1)


class TanhNormalSign(TanhNormal):
    @staticmethod
    def backward(ctx, g):
        return TanhNormal.gradients(ctx, g, -1)


def _tanh_normal(function):
    def tanh_normal(u, mean, log_std):
        """Log density of tanh(u), u normal of mean and log_std from -10 to 10, all (*, D), summed over D.

        u from -1000 to 1000.
        """
        expect(
            u.dim() and u.shape == mean.shape == log_std.shape, "one shape (*, D)", tuple(u.shape)
        )
        expect((log_std.abs() <= 10).all(), "log_std from -10 to 10", log_std)
        expect((u.abs() <= 1000).all(), "u from -1000 to 1000", u)
        return function.apply(u, mean, log_std)

    return tanh_normal


add(
    "tanh_normal_sign",
    _tanh_normal,
    TanhNormalSign,
    TanhNormal,
    lambda: (real(3, 2), real(3, 2, seed=1), real(3, 2, seed=2)),
    bug="the sign of tanh's part in u's gradient",
    shows="the sample",
)


class Tversky(Function):
    @staticmethod
    def sums(logits, target, alpha, beta):
        p, t = logits.flatten(1).sigmoid(), target.flatten(1)
        both = (p * t).sum(1)
        return p, t, both + 1, both + alpha * (p * (1 - t)).sum(1) + beta * ((1 - p) * t).sum(1) + 1

    @staticmethod
    def forward(ctx, logits, target, alpha, beta):
        ctx.save_for_backward(logits, target)
        ctx.weights = alpha, beta
        _, _, over, under = Tversky.sums(logits, target, alpha, beta)
        return 1 - (over / under).mean()

    @staticmethod
    def gradients(ctx, g, alpha, beta):
        logits, target = ctx.saved_tensors
        p, t, over, under = (
            a if a.dim() > 1 else a[:, None] for a in Tversky.sums(logits, target, *ctx.weights)
        )
        of_under = t + alpha * (1 - t) - beta * t
        d = -g / p.shape[0] * (t / under - over / under.square() * of_under)
        return (d * p * (1 - p)).view(logits.shape), None, None, None

    @staticmethod
    def backward(ctx, g):
        return Tversky.gradients(ctx, g, *ctx.weights)


class TverskySwapped(Tversky):
    @staticmethod
    def backward(ctx, g):
        return Tversky.gradients(ctx, g, *ctx.weights[::-1])


def _tversky(function):
    def tversky_loss(logits, target, alpha=0.5, beta=0.5):
        """Mean of 1 - (TP + 1) / (TP + alpha FP + beta FN + 1) of logits (N, *), N > 0, target a constant.

        target, of one shape with the logits, from 0 to 1; alpha and beta from 0 to 1.
        """
        expect(logits.dim() > 1 and logits.shape[0], "logits (N, *), N > 0", tuple(logits.shape))
        expect(logits.shape == target.shape, "target of the logits' shape", tuple(target.shape))
        expect(((target >= 0) & (target <= 1)).all(), "target from 0 to 1", target)
        expect(0 <= alpha <= 1 and 0 <= beta <= 1, "alpha, beta from 0 to 1", (alpha, beta))
        return function.apply(logits, target.detach(), alpha, beta)

    return tversky_loss


add(
    "tversky_swapped",
    _tversky,
    TverskySwapped,
    Tversky,
    lambda: (real(2, 1, 4, 4), (real(2, 1, 4, 4, seed=1, grad=False) > 0).to(F64)),
    bug="backward swaps alpha and beta",
    shows="alpha other than beta",
)


class GIoU(Function):
    """Corners: the first two of a box's numbers are the lower, the last two the upper."""

    @staticmethod
    def parts(a, b):
        inner = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
        outer = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
        size = a[:, 2:] - a[:, :2]
        both = inner.clamp(min=0).prod(1)
        union = size.prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - both
        return inner, outer, size, both, union

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        _, outer, _, both, union = GIoU.parts(a, b)
        return 2 - both / union - union / outer.prod(1)

    @staticmethod
    def gradients(ctx, g, mask):
        a, b = ctx.saved_tensors
        inner, outer, size, both, union = GIoU.parts(a, b)
        hull = outer.prod(1)
        of_union = g * (both / union / union - 1 / hull)
        of_both = -g / union - of_union
        of_inner = of_both[:, None] * inner.clamp(min=0).flip(1) * mask(inner)
        of_outer = (g * union / hull / hull)[:, None] * outer.flip(1)
        of_size = of_union[:, None] * size.flip(1)

        def below(x, y):
            return ((x < y).to(x.dtype) + (x <= y)) / 2

        low, high = a[:, :2], a[:, 2:]
        of_high = of_inner * below(high, b[:, 2:]) + of_outer * below(b[:, 2:], high) + of_size
        of_low = of_inner * below(b[:, :2], low) + of_outer * below(low, b[:, :2]) + of_size
        return torch.cat((-of_low, of_high), 1), None

    @staticmethod
    def backward(ctx, g):
        return GIoU.gradients(ctx, g, lambda inner: inner > 0)


class GIoUClamp(GIoU):
    @staticmethod
    def backward(ctx, g):
        return GIoU.gradients(ctx, g, torch.ones_like)


def _giou(function):
    def giou_loss(boxes, targets):
        """1 - generalised IoU of boxes and constant targets, (N, 4): x1, y1, x2, y2, with x1 < x2 and y1 < y2.

        Numbers from -10,000 to 10,000.
        """
        expect(boxes.dim() == 2 and boxes.shape[1] == 4, "boxes (N, 4)", tuple(boxes.shape))
        expect(boxes.shape == targets.shape, "targets (N, 4)", tuple(targets.shape))
        for a in (boxes, targets):
            expect((a[:, :2] < a[:, 2:]).all(), "x1 < x2, y1 < y2", a)
            expect((a.abs() <= 10_000).all(), "numbers from -10,000 to 10,000", a)
        return function.apply(boxes, targets.detach())

    return giou_loss


def giou_sample():
    boxes = torch.tensor(
        [[0, 0, 2, 2], [1, 1, 3, 4], [0.5, 0, 2, 3]], dtype=F64, requires_grad=True
    )
    return boxes, torch.tensor([[1, 1, 3, 3], [0, 0, 2, 2], [0, 1, 3, 4]], dtype=F64)


add(
    "giou_clamp",
    _giou,
    GIoUClamp,
    GIoU,
    giou_sample,
    bug="the sides of the overlap get a gradient where forward clamps them to 0",
    shows="boxes apart along one axis only",
)
