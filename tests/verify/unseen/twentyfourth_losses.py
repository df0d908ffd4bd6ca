"""Everyday mistakes in losses and a scan."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentyfourth import add, check, same, sized


# Dice loss of each sample
def dice(wrong):
    class Dice(Function):
        @staticmethod
        def forward(ctx, p, t):
            ctx.save_for_backward(p, t)
            both, either = parts(p, t)
            return 1 - both / either

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            p, t = ctx.saved_tensors
            both, either = parts(p, t)
            if wrong:
                either = either.mean().expand_as(either)
            scale = grad_y[:, None]
            share = (both / either)[:, None]
            either = either[:, None]
            return scale * (share - 2 * t) / either, scale * (share - 2 * p) / either

    def parts(p, t):
        return 2 * (p * t).sum(1) + 1, p.sum(1) + t.sum(1) + 1

    def loss(p, t):
        sized("p", p, None, None)
        same(p, t)
        check(bool((p >= 0).all() and (t >= 0).all()), "expected numbers >= 0")
        return Dice.apply(p, t)

    return loss


add(
    "dice_batch",
    dice,
    lambda: (real(3, 4, positive=True), real(3, 4, seed=1, positive=True)),
    bug="Backward takes the batch's mean for each sample's size",
)


# Contrastive loss of pairs, both ways, at a learned scale
def contrastive(wrong):
    class Contrast(Function):
        @staticmethod
        def forward(ctx, a, b, s):
            ctx.save_for_backward(a, b, s)
            logits = s.exp() * (a @ b.T)
            rows, columns = logits.log_softmax(1), logits.log_softmax(0)
            return -(rows.diagonal() + columns.diagonal()).mean() / 2

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            a, b, s = ctx.saved_tensors
            raw = a @ b.T
            logits = s.exp() * raw
            eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
            g = grad_y * (logits.softmax(1) + logits.softmax(0) - 2 * eye) / (2 * len(a))
            grad_s = (g * (raw if wrong else logits)).sum()
            return s.exp() * g @ b, s.exp() * g.T @ a, grad_s

    def loss(a, b, s):
        sized("a", a, None, None)
        same(a, b)
        sized("s", s)
        return Contrast.apply(a, b, s)

    return loss


add(
    "contrastive_scale",
    contrastive,
    lambda: (real(4, 3), real(4, 3, seed=1), real((), seed=2)),
    bug="The scale is learned as a logarithm, but its gradient is that of the scale",
)


# Binary cross-entropy with a weight for the positives of each class
def weighted_bce(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, x, t, w):
            ctx.save_for_backward(x, t, w)
            return -((1 - t) * F.logsigmoid(-x) + w * t * F.logsigmoid(x)).mean()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, t, w = ctx.saved_tensors
            g = grad_y / x.numel()
            weight = 1 if wrong else w
            grad_x = g * ((1 - t) * x.sigmoid() - weight * t * (-x).sigmoid())
            no, yes = F.logsigmoid(-x), F.logsigmoid(x)
            return grad_x, g * (no - w * yes), -(g * t * yes).sum(0)

    def loss(x, t, w):
        sized("x", x, None, None)
        same(x, t)
        sized("w", w, x.shape[1])
        return Loss.apply(x, t, w)

    return loss


def chances(*shape):
    return real(*shape, seed=1).detach().sigmoid().requires_grad_()


add(
    "weighted_bce_positives",
    weighted_bce,
    lambda: (real(4, 3), chances(4, 3), real(3, seed=2, positive=True)),
    bug="Backward leaves the positives' weight out",
)


# Triplet loss of squared distances
def triplet(wrong):
    class Triplet(Function):
        @staticmethod
        def forward(ctx, a, p, n):
            ctx.save_for_backward(a, p, n)
            return violation(a, p, n).relu().mean()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            a, p, n = ctx.saved_tensors
            g = (2 * grad_y / len(a)).expand(len(a))
            if not wrong:
                g = torch.where(violation(a, p, n) <= 0, 0, g)
            g = g[:, None]
            return g * ((a - p) - (a - n)), g * (p - a), g * (a - n)

    def violation(a, p, n):
        return (a - p).square().sum(1) - (a - n).square().sum(1) + 1

    def loss(a, p, n):
        sized("a", a, None, None)
        same(a, p, n)
        return Triplet.apply(a, p, n)

    return loss


add(
    "triplet_satisfied",
    triplet,
    lambda: (real(6, 3), real(6, 3, seed=1), real(6, 3, seed=2)),
    bug="Triplets that keep their distance get a gradient too",
    trigger="a triplet whose negative is far enough",
)


# Divergence of a Gaussian from the normal, its log-variance kept between -5 and 5
def gaussian_divergence(wrong):
    class Divergence(Function):
        @staticmethod
        def forward(ctx, mean, spread):
            ctx.save_for_backward(mean, spread)
            v = spread.clamp(-5, 5)
            return (mean * mean + v.exp() - v - 1).sum(-1) / 2

        @staticmethod
        def backward(ctx, grad_y):
            mean, spread = ctx.saved_tensors
            g = grad_y[..., None]
            for_spread = g * spread.clamp(-5, 5).expm1() / 2
            if not wrong:
                inside = (spread >= -5) & (spread <= 5)
                for_spread = torch.where(inside, for_spread, 0)
            return g * mean, for_spread

    def divergence(mean, spread):
        sized("mean", mean, None, None)
        same(mean, spread)
        return Divergence.apply(mean, spread)

    return divergence


add(
    "gaussian_divergence_clamp",
    gaussian_divergence,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="Forward clamps the log-variance, backward lets the gradient through",
    trigger="a log-variance beyond 5",
)


# h_t = a h_(t-1) + x_t from a first state
def leaky_scan(wrong):
    class Scan(Function):
        @staticmethod
        def forward(ctx, x, a, first):
            states = [first]
            for row in x:
                states.append(a * states[-1] + row)
            y = torch.stack(states[1:])
            ctx.save_for_backward(y, a, first)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            y, a, first = ctx.saved_tensors
            carry, grad_a = torch.zeros_like(a), torch.zeros_like(a)
            grad_x = []
            for t in range(len(y) - 1, -1, -1):
                carry = carry + grad_y[t]
                grad_x.append(carry)
                if t:
                    grad_a = grad_a + carry * y[t - 1]
                elif not wrong:
                    grad_a = grad_a + carry * first
                carry = a * carry
            return torch.stack(grad_x[::-1]), grad_a, carry

    def scan(x, a, first):
        sized("x", x, None, None)
        sized("a", a, x.shape[1])
        sized("first", first, x.shape[1])
        return Scan.apply(x, a, first)

    return scan


add(
    "leaky_scan_first",
    leaky_scan,
    lambda: (real(5, 3), real(3, seed=1), real(3, seed=2)),
    bug="The decay's gradient leaves the first step out, as if the first state were 0",
)
