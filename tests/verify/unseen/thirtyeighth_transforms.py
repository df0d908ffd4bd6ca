"""Transforms: forward mode, vmap, torch.compile, second derivatives, what a Function declares."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtyeighth import add, alike, bounded, check, same, sized


# Harmonic mean of two positive numbers
def harmonic_mean(wrong):
    class Mean(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(a, b):
            return 2 * a * (b / (a + b))

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            return g * 2 * (b / (a + b)).square(), g * 2 * (a / (a + b)).square()

        @staticmethod
        def jvp(ctx, ta, tb):
            a, b = ctx.saved_tensors
            along, across = (a / (a + b)).square(), (b / (a + b)).square()
            if wrong:
                return 2 * (along * ta + across * tb)
            return 2 * (across * ta + along * tb)

    def mean(a, b):
        same(a, b)
        alike(a, b)
        bounded("a", a, 1e-6, 1e6)
        bounded("b", b, 1e-6, 1e6)
        return Mean.apply(a, b)

    return mean


add(
    "harmonic_mean_tangents",
    harmonic_mean,
    lambda: (real(3, 4, positive=True), real(3, 4, seed=1, positive=True)),
    bug="The forward-mode rule swaps the two slopes",
    trigger="forward mode",
)


# Log of the mean of exp(x) over the first dimension
def column_log_mean(wrong):
    class LogMean(Function):
        @staticmethod
        def forward(x, dim):
            bounded("x", x, -1e3, 1e3)
            return x.logsumexp(dim) - math.log(x.shape[dim])

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])
            ctx.dim = inputs[1]

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g.unsqueeze(ctx.dim) * x.softmax(ctx.dim), None

        @staticmethod
        def vmap(info, in_dims, x, dim):
            x = x.movedim(in_dims[0], -1 if wrong else 0)
            return LogMean.apply(x, dim if wrong else dim + 1), 0

    def log_mean(x):
        check(x.ndim >= 1 and x.numel() > 0, "x: expected numbers")
        check(x.is_floating_point(), "x: expected floating point numbers")
        return LogMean.apply(x, 0)

    return log_mean


add(
    "column_log_mean_batched",
    column_log_mean,
    lambda: (real(3, 3),),
    bug="The vmap rule moves the batch to the end and says that it is the first dimension of the output",
    trigger="vmap",
)


# Shepard's interpolation: values (N,) weighted by 1 / (d^2 + eps) at places (B, D), with d to points (N, D)
def shepard(wrong):
    def weights(x, points):
        d = x[:, None] - points
        return 1 / (d.square().sum(-1) + 0.1), d

    class Interpolate(Function):
        @staticmethod
        def forward(ctx, x, points, values):
            w, _ = weights(x, points)
            ctx.save_for_backward(x, points, values, w)
            return w @ values / w.sum(-1)

        @staticmethod
        def backward(ctx, g):
            x, points, values, w = ctx.saved_tensors
            again, d = weights(x, points)
            if not wrong:
                w = again
            total = w.sum(-1, keepdim=True)
            y = w @ values / total[:, 0]
            h = g[:, None] / total
            slope = h * (values - y[:, None]) * -2 * w.square()
            grad = slope[..., None] * d
            return grad.sum(1), -grad.sum(0), (h * w).sum(0)

    def interpolate(x, points, values):
        sized("x", x, None, None)
        sized("points", points, None, x.shape[1])
        sized("values", values, len(points))
        alike(x, points, values)
        for name, t in {"x": x, "points": points, "values": values}.items():
            bounded(name, t, -1e3, 1e3)
        return Interpolate.apply(x, points, values)

    return interpolate


add(
    "shepard_kept_weights",
    shepard,
    lambda: (real(3, 2), real(4, 2, seed=1), real(4, seed=2)),
    bug="Backward uses the weights that forward computed and saved, of which autograd knows no history",
    trigger="a second derivative",
)


# Boltzmann's mean: softmax(alpha x) . x per row
def boltzmann_mean(wrong):
    class Mean(Function):
        @staticmethod
        def forward(ctx, x, alpha):
            ctx.save_for_backward(x, alpha)
            return ((alpha * x).softmax(-1) * x).sum(-1)

        @staticmethod
        def backward(ctx, g):
            x, alpha = ctx.saved_tensors
            with torch.set_grad_enabled(torch.is_grad_enabled() and not wrong):
                p = (alpha * x).softmax(-1)
            g = g[..., None]
            y = (p * x).sum(-1, keepdim=True)
            grad_alpha = (g * p * x * (x - y)).sum()
            return g * p * (1 + alpha * (x - y)), grad_alpha

    def mean(x, alpha):
        check(x.ndim >= 1 and x.numel() > 0, "x: expected numbers")
        sized("alpha", alpha)
        alike(x, alpha)
        bounded("x", x, -1e3, 1e3)
        bounded("alpha", alpha, -100, 100)
        return Mean.apply(x, alpha)

    return mean


add(
    "boltzmann_mean_no_grad",
    boltzmann_mean,
    lambda: (real(3, 4), torch.tensor(0.8, dtype=torch.float64, requires_grad=True)),
    bug="Backward takes the softmax under no_grad to save memory",
    trigger="a second derivative",
)


# tanh(x)^2, a gate that is even
def tanh_square(wrong):
    class Gate(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh().square()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            t = x.tanh()
            if wrong and torch.compiler.is_compiling():
                return g * 2 * t * (1 - t)
            return g * 2 * t * (1 - t.square())

    def gate(x):
        check(x.is_floating_point(), "x: expected floating point numbers")
        return Gate.apply(x)

    return gate


add(
    "tanh_square_compiled",
    tanh_square,
    lambda: (real(4, 5),),
    bug="The path for torch.compile forgets to square tanh",
    trigger="torch.compile",
)


# Soft table look-up: values mixed by softmax of -|x - key|^2; returns the weights, too
def soft_table(wrong):
    def mixture(x, keys):
        return (-(x[:, None] - keys).square().sum(-1)).softmax(-1)

    class Table(Function):
        @staticmethod
        def forward(ctx, x, keys, values):
            p = mixture(x, keys)
            ctx.save_for_backward(x, keys, values)
            if wrong:
                ctx.mark_non_differentiable(p)
            return p @ values, p

        @staticmethod
        def backward(ctx, g, g_p):
            x, keys, values = ctx.saved_tensors
            p = mixture(x, keys)
            h = g @ values.mT + g_p
            s = p * (h - (p * h).sum(-1, keepdim=True))
            d = 2 * s[..., None] * (x[:, None] - keys)
            return -d.sum(1), d.sum(0), p.mT @ g

    def look_up(x, keys, values):
        sized("x", x, None, None)
        sized("keys", keys, None, x.shape[1])
        sized("values", values, len(keys), None)
        alike(x, keys, values)
        for name, t in {"x": x, "keys": keys, "values": values}.items():
            bounded(name, t, -20, 20)
        return Table.apply(x, keys, values)

    return look_up


add(
    "soft_table_weights",
    soft_table,
    lambda: (real(3, 2), real(4, 2, seed=1), real(4, 2, seed=2)),
    bug="Marks the weights non-differentiable, which they are not: an entropy penalty on them trains nothing",
    trigger="the second output, which doesn't require a gradient",
    missed="an output without a gradient may be meant: it is a note",
)
