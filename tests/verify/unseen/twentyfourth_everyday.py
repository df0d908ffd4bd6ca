"""Everyday mistakes in losses, scans, geometry, signals and statistics."""

import math

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


# Normals of triangles, as long as twice their area
def normals(wrong):
    class Normals(Function):
        @staticmethod
        def forward(ctx, a, b, c):
            ctx.save_for_backward(a, b, c)
            return torch.linalg.cross(b - a, c - a)

        @staticmethod
        def backward(ctx, grad_y):
            a, b, c = ctx.saved_tensors
            grad_b = torch.linalg.cross(c - a, grad_y)
            grad_c = torch.linalg.cross(grad_y, b - a)
            return -grad_b if wrong else -grad_b - grad_c, grad_b, grad_c

    def triangles(a, b, c):
        sized("a", a, None, 3)
        same(a, b, c)
        return Normals.apply(a, b, c)

    return triangles


add(
    "normals_corner",
    normals,
    lambda: (real(4, 3), real(4, 3, seed=1), real(4, 3, seed=2)),
    bug="The first corner's gradient lacks the part from the second edge",
)


# Vector part of a rotation vector's quaternion, with its full angle: w sin|w| / |w|
def rotation_part(wrong):
    class Part(Function):
        @staticmethod
        def forward(ctx, w):
            ctx.save_for_backward(w)
            return w * torch.sinc(length(w) / math.pi)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (w,) = ctx.saved_tensors
            t = length(w)
            curve = exact(t) if wrong else torch.where(t < 1, series(t.clamp(max=1)), exact(t))
            return grad_y * torch.sinc(t / math.pi) + w * curve * (w * grad_y).sum(1, keepdim=True)

    def length(w):
        return w.square().sum(1, keepdim=True).sqrt()

    def exact(t):
        return (t.cos() - t.sin() / t) / t**2

    def series(t):
        terms = [(-1) ** k * 2 * k / math.factorial(2 * k + 1) for k in range(1, 10)]
        total = torch.zeros_like(t)
        for term in reversed(terms):
            total = total * t * t + term
        return total

    def part(w):
        sized("w", w, None, 3)
        return Part.apply(w)

    return part


add(
    "rotation_part_zero",
    rotation_part,
    lambda: (real(4, 3),),
    bug="Backward divides by the angle",
    trigger="no rotation, and tiny ones, where the difference cancels",
)


# Windowed frames of 4, one every 2 steps
def frames(wrong):
    class Frames(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x.unfold(1, 4, 2) * w

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            grad_x = grad_y.new_zeros(x.shape)
            for k in range(grad_y.shape[1]):
                part = grad_x[:, 2 * k : 2 * k + 4]
                if wrong:
                    part.copy_(grad_y[:, k] * w)
                else:
                    part.add_(grad_y[:, k] * w)
            return grad_x, (grad_y * x.unfold(1, 4, 2)).sum((0, 1))

    def split(x, w):
        sized("x", x, None, None)
        check(x.shape[1] >= 4, "x: expected four steps or more")
        sized("w", w, 4)
        return Frames.apply(x, w)

    return split


add(
    "frames_overlap",
    frames,
    lambda: (real(2, 8), real(4, seed=1)),
    bug="Overlapping frames overwrite each other's gradient",
)


# Covariance of the columns
def covariance(wrong):
    class Covariance(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            centred = x - x.mean(0)
            return centred.T @ centred / (len(x) - 1)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            g = 2 * grad_y if wrong else grad_y + grad_y.T
            return (x - x.mean(0)) @ g / (len(x) - 1)

    def matrix(x):
        sized("x", x, None, None)
        check(len(x) >= 2, "x: expected two rows or more")
        return Covariance.apply(x)

    return matrix


add(
    "covariance_symmetric",
    covariance,
    lambda: (real(5, 3),),
    bug="Backward takes grad_output to be symmetric, as the covariance is",
    trigger="a grad_output that is not, as of one entry above the diagonal",
)


# Quantile of each row, between the two nearest elements
def quantile(wrong):
    class Quantile(Function):
        @staticmethod
        def forward(ctx, x, q):
            order = x.sort(dim=1, stable=True).indices
            place = q * (x.shape[1] - 1)
            low = min(int(place), x.shape[1] - 1)
            high = min(math.ceil(place), x.shape[1] - 1)
            ctx.part, ctx.shape = place - low, x.shape
            ctx.save_for_backward(order[:, low], order[:, high])
            below, above = (x.gather(1, order[:, k, None])[:, 0] for k in (low, high))
            return below.lerp(above, ctx.part)

        @staticmethod
        def backward(ctx, grad_y):
            part = 0 if wrong else ctx.part
            grad_x = grad_y.new_zeros(ctx.shape)
            for places, share in zip(ctx.saved_tensors, (1 - part, part), strict=True):
                grad_x = grad_x.scatter_add(1, places[:, None], share * grad_y[:, None])
            return grad_x, None

    def rows(x, *, q=0.4):
        sized("x", x, None, None)
        check(0 <= q <= 1, "q: expected a number from 0 to 1")
        check(not bool(x.isnan().any()), "x: expected no NaN")
        return Quantile.apply(x, q)

    return rows


add(
    "quantile_neighbour",
    quantile,
    lambda: (real(3, 4),),
    bug="The lower neighbour gets the whole gradient",
)
