"""Edges of domains and shapes, linearity in grad_output, and functions without a derivative."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentythird import add, check, same, sized


# A score for each row: x @ w, as one column
def score(wrong):
    class Score(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return (x @ w)[:, None]

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            g = grad_y.squeeze() if wrong else grad_y.squeeze(1)
            return g[:, None] * w, g @ x

    def linear(x, w):
        sized("x", x, None, None)
        sized("w", w, x.shape[1])
        return Score.apply(x, w)

    return linear


add(
    "score_squeeze",
    score,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="Backward squeezes every dimension of size 1, not the last alone",
    trigger="a batch of 1",
)


# Squashed vectors: x / sqrt(1 + |x|^2) along the last dimension
def squash(wrong):
    class Squash(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * factor(x)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            r = factor(x)
            y = x * r
            mixed = (grad_y * y).sum(1 if wrong else -1, keepdim=True)
            return r * (grad_y - y * mixed)

    def factor(x):
        return (1 + x.square().sum(-1, keepdim=True)).rsqrt()

    def capsule(x):
        check(x.ndim >= 1, "expected 1 dimension or more")
        return Squash.apply(x)

    return capsule


add(
    "squash_dimension",
    squash,
    lambda: (real(3, 4),),
    bug="Backward sums along the second dimension, forward along the last",
    trigger="three dimensions",
)


# Each column less its mean
def centre(wrong):
    class Centre(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.rows = len(x)
            return x - x.mean(0)

        @staticmethod
        def backward(ctx, grad_y):
            if wrong:
                return grad_y - grad_y.sum(0) * (1 / ctx.rows)
            return grad_y - grad_y.mean(0)

    def centred(x):
        check(x.ndim == 2, "expected 2 dimensions")
        return Centre.apply(x)

    return centred


add(
    "centre_empty",
    centre,
    lambda: (real(3, 4),),
    bug="Backward divides by the number of rows in Python",
    trigger="no rows",
)


# The distances between two sets of points
def distances(wrong):
    class Distance(Function):
        @staticmethod
        def forward(ctx, x, z):
            ctx.save_for_backward(x, z)
            return (x[:, None] - z).square().sum(2).sqrt()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, z = ctx.saved_tensors
            apart = x[:, None] - z
            d = apart.square().sum(2, keepdim=True).sqrt()
            unit = apart / d
            if not wrong:
                unit = unit.where(d != 0, 0)
            each = grad_y[:, :, None] * unit
            return each.sum(1), -each.sum(0)

    def measure(x, z):
        sized("x", x, None, None)
        sized("z", z, None, x.shape[1])
        return Distance.apply(x, z)

    return measure


add(
    "distances_same",
    distances,
    lambda: (real(3, 2), real(4, 2, seed=1)),
    bug="Backward divides 0 by 0 where two points are one",
    trigger="a point in both sets",
)


# Coefficient of rotation vectors: (1 - cos x) / x^2
def versine(wrong):
    class Versine(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.sinc(x / (2 * math.pi)).square() / 2

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            slope = x.sin() / x**2 - 2 * (1 - x.cos()) / x**3
            if wrong:
                slope = slope.where(x != 0, 0)
            else:
                terms = [
                    (-1) ** k * 2 * k / math.factorial(2 * k + 2) * x ** (2 * k - 1)
                    for k in range(1, 11)
                ]
                slope = slope.where(~(x.abs() < 1), sum(terms))
            return grad_y * slope

    return Versine.apply


add(
    "versine_small",
    versine,
    lambda: (real(3, 4),),
    bug="Backward subtracts what is almost equal, and is guarded at 0 alone",
    trigger="|x| of 1e-5 and below",
)


# The larger of two
def larger(wrong):
    class Larger(Function):
        @staticmethod
        def forward(ctx, x, z):
            ctx.save_for_backward(x, z)
            return torch.maximum(x, z)

        @staticmethod
        def backward(ctx, grad_y):
            x, z = ctx.saved_tensors
            half = grad_y if wrong else grad_y / 2
            for_x = grad_y.where(x >= z, 0)
            for_z = grad_y.where(z >= x, 0)
            return half.where(x == z, for_x), half.where(x == z, for_z)

    def maximum(x, z):
        same(x, z)
        check(not bool((x.isnan() | z.isnan()).any()), "expected numbers")
        return Larger.apply(x, z)

    return maximum


add(
    "larger_ties",
    larger,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="Where both are equal each gets the whole gradient",
    trigger="equal elements",
)


# Linear layer that sends its gradient in 8 bits
def compressed_linear(wrong):
    class Linear(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w.T

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            g = grad_y
            if wrong:
                step = (g.abs().amax() / 127).clamp_min(1e-30)
                g = (g / step).round() * step
            return g @ w, g.T @ x

    def linear(x, w):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        return Linear.apply(x, w)

    return linear


add(
    "compressed_linear_bits",
    compressed_linear,
    lambda: (real(3, 4), real(2, 4, seed=1)),
    bug="grad_output is rounded to 255 steps",
    trigger="a grad_output that varies",
)


# Logarithm of the sigmoid
def log_sigmoid(wrong):
    class LogSigmoid(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return F.logsigmoid(x)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong:
                grad_y = grad_y.where(grad_y.abs() > 1e-3, 0)
            return grad_y * torch.sigmoid(-x)

    return LogSigmoid.apply


add(
    "log_sigmoid_sparse",
    log_sigmoid,
    lambda: (real(3, 4),),
    bug="Backward drops elements of grad_output below 0.001",
    trigger="a small grad_output, as of a mean over many elements",
)


# Inverse hyperbolic sine
def arcsinh(wrong):
    def by_array(x):
        y = x.detach().cpu().double().numpy()
        return torch.as_tensor(np.arcsinh(y)).to(x)

    return by_array if wrong else torch.asinh


add(
    "arcsinh_array",
    arcsinh,
    lambda: (real(3, 4),),
    bug="The function computes through NumPy, where the graph ends",
)


# Mean and variance
def moments(wrong):
    def both(x):
        check(x.numel() >= 2, "expected 2 elements or more")
        variance = x.var(correction=0)
        return x.mean(), x.new_tensor(variance.item()) if wrong else variance

    return both


add(
    "moments_item",
    moments,
    lambda: (real(3, 4),),
    bug="The variance is made anew from a Python number",
    trigger="the second output",
    missed="a note: an output without a gradient may be meant",
)
