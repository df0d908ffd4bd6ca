"""Interpolation."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.twelfth import wide


class LinearInterpolation(Function):
    @staticmethod
    def cells(at, knots):
        return (torch.searchsorted(knots, at, right=True) - 1).clamp(0, len(knots) - 2)

    @staticmethod
    def forward(ctx, at, knots, values):
        i = LinearInterpolation.cells(at, knots)
        ctx.save_for_backward(at, knots, values, i)
        a, k, v = wide(at), wide(knots), wide(values)
        return (v[i] + (v[i + 1] - v[i]) * (a - k[i]) / (k[i + 1] - k[i])).to(at.dtype)

    @staticmethod
    def gradients(ctx, g, i):
        at, knots, values = (wide(t) for t in ctx.saved_tensors[:3])
        d, width = wide(g), knots[i + 1] - knots[i]
        t = (at - knots[i]) / width
        grad = torch.zeros_like(values).index_add(0, i, d * (1 - t)).index_add(0, i + 1, d * t)
        return (d * (values[i + 1] - values[i]) / width).to(g.dtype), None, grad.to(g.dtype)

    @staticmethod
    def backward(ctx, g):
        return LinearInterpolation.gradients(ctx, g, ctx.saved_tensors[3])


class LinearInterpolationLast(LinearInterpolation):
    """Keeps the cells of the last call."""

    last = None

    @staticmethod
    def forward(ctx, at, knots, values):
        LinearInterpolationLast.last = LinearInterpolation.cells(at, knots)
        return LinearInterpolation.forward(ctx, at, knots, values)

    @staticmethod
    def backward(ctx, g):
        return LinearInterpolation.gradients(ctx, g, LinearInterpolationLast.last)


def _linear_interpolation(function):
    def linear_interpolation(at, knots, values):
        """Through values (K,) at the knots (K,), K > 1, ascending constants, at the places at (P,).

        Beyond the ends the first and the last line go on.
        """
        need(
            at.dim() == knots.dim() == 1 and knots.shape == values.shape,
            "expected at, knots, values",
        )
        need(len(knots) > 1 and bool((knots.diff() > 0).all()), "expected ascending knots, K > 1")
        return function.apply(at.contiguous(), knots.detach().contiguous(), values)

    return linear_interpolation


add(
    "linear_interpolation",
    _linear_interpolation,
    LinearInterpolationLast,
    LinearInterpolation,
    lambda: (real(5), torch.linspace(-2, 2, 4, dtype=F64), real(4, seed=1)),
    bug="backward takes the cells of the last call",
    trigger="a second call before the first's backward",
)


class Hermite(Function):
    @staticmethod
    def weights(t):
        """Those of values and slopes at both ends, for the value and its first two derivatives."""
        one = torch.ones_like(t)
        value = 1 - t**2 * (3 - 2 * t), t**2 * (3 - 2 * t), t * (1 - t) ** 2, t**2 * (t - 1)
        first = 6 * t * (t - 1), 6 * t * (1 - t), (1 - t) * (1 - 3 * t), t * (3 * t - 2)
        return value, first, (12 * t - 6, 6 * one - 12 * t, 6 * t - 4, 6 * t - 2)

    @staticmethod
    def mix(weights, ends):
        return sum(w * e for w, e in zip(weights, ends, strict=True))

    @staticmethod
    def forward(ctx, t, *ends):
        ctx.save_for_backward(t, *ends)
        value, first, _ = Hermite.weights(wide(t))
        ends = [wide(e) for e in ends]
        return Hermite.mix(value, ends).to(t.dtype), Hermite.mix(first, ends).to(t.dtype)

    @staticmethod
    def gradients(ctx, g, g_slope, to_t):
        t, *ends = (wide(s) for s in ctx.saved_tensors)
        value, first, second = Hermite.weights(t)
        d, d_slope = wide(g), wide(g_slope)
        grad_t = d * Hermite.mix(first, ends) + to_t * d_slope * Hermite.mix(second, ends)
        grads = [d * v + d_slope * f for v, f in zip(value, first, strict=True)]
        return tuple(a.to(g.dtype) for a in (grad_t, *grads))

    @staticmethod
    def backward(ctx, g, g_slope):
        return Hermite.gradients(ctx, g, g_slope, 1)


class HermiteValue(Hermite):
    @staticmethod
    def backward(ctx, g, g_slope):
        return Hermite.gradients(ctx, g, g_slope, 0)


def _hermite(function):
    def hermite(t, p0, p1, m0, m1):
        """The cubic with values p0, p1 and slopes m0, m1 at 0 and 1, at t, and its slope; all of one shape."""
        need(t.shape == p0.shape == p1.shape == m0.shape == m1.shape, "expected one shape")
        return function.apply(t, p0, p1, m0, m1)

    return hermite


add(
    "hermite",
    _hermite,
    HermiteValue,
    Hermite,
    lambda: tuple(real(4, seed=seed) for seed in range(5)),
    bug="t's gradient ignores the second output",
    trigger="the sample: a loss of the slope",
)
