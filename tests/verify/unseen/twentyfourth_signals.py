"""Everyday mistakes in geometry, signals and statistics."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentyfourth import add, check, same, sized


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
