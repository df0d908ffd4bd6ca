"""Elementwise functions and bases."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.seventeenth import add
from tests.verify.unseen.sixteenth import expect


class BiasAct(Function):
    @staticmethod
    def before(x, b, slope, gain):
        return F.leaky_relu(x + b.view(-1, *[1] * (x.dim() - 2)), slope) * gain

    @staticmethod
    def forward(ctx, x, b, slope, gain, limit):
        ctx.save_for_backward(x, b)
        ctx.options = slope, gain, limit
        return BiasAct.before(x, b, slope, gain).clamp(-limit, limit)

    @staticmethod
    def gradients(ctx, g, scaled):
        x, b = ctx.saved_tensors
        slope, gain, limit = ctx.options
        y = BiasAct.before(x, b, slope, gain)
        grad = scaled(g, gain) * torch.where(y > 0, y.new_tensor(1), slope) * (y.abs() <= limit)
        return grad, grad.sum([i for i in range(x.dim()) if i != 1]), None, None, None

    @staticmethod
    def backward(ctx, g):
        return BiasAct.gradients(ctx, g, lambda g, gain: g * gain)


class BiasActInPlace(BiasAct):
    @staticmethod
    def backward(ctx, g):
        return BiasAct.gradients(ctx, g, lambda g, gain: g.mul_(gain))


def _bias_act(function):
    def bias_act(x, b, slope=0.2, gain=2**0.5, limit=math.inf):
        """leaky_relu(x + b) gain, clamped to ±limit, of x (N, C, *) and b (C,).

        slope from 0 to 1, its own at 0; gain from 0.1 to 10; limit > 0, where the slope is the inner one.
        """
        expect(x.dim() > 1 and b.shape == x.shape[1:2], "x (N, C, *), b (C,)", tuple(b.shape))
        expect(0 <= slope <= 1 and 0.1 <= gain <= 10, "slope, gain", (slope, gain))
        expect(limit > 0, "limit > 0", limit)
        return function.apply(x, b, slope, gain, limit)

    return bias_act


add(
    "bias_act_in_place",
    _bias_act,
    BiasActInPlace,
    BiasAct,
    lambda: (real(2, 3, 4), real(3, seed=1)),
    bug="backward multiplies grad_output by the gain in place",
    shows="any grad_output that is looked at again",
)


class Rational(Function):
    """The quotient's denominator is 1 + |Q|; Q has no constant term."""

    @staticmethod
    def parts(x, a, b):
        powers = x[..., None] ** torch.arange(6, device=x.device)
        q = (powers[..., 1:5] * b).sum(-1)
        return powers, (powers * a).sum(-1), q, 1 / (1 + q.abs())

    @staticmethod
    def forward(ctx, x, a, b):
        _, p, _, inverse = Rational.parts(x, a, b)
        ctx.save_for_backward(x, a, b, inverse)
        return p * inverse

    @staticmethod
    def gradients(ctx, g, kept):
        x, a, b, inverse = ctx.saved_tensors
        powers, p, q, again = Rational.parts(x, a, b)
        inverse = kept(inverse, again)
        k = torch.arange(1, 6, device=x.device)
        of_p, of_q = g * inverse, -g * p * inverse.square() * q.sign()
        slope_p, slope_q = (
            (powers[..., : c.numel()] * k[: c.numel()] * c).sum(-1) for c in (a[1:], b)
        )
        grad_a, grad_b = of_p[..., None] * powers, of_q[..., None] * powers[..., 1:5]
        return (
            of_p * slope_p + of_q * slope_q,
            grad_a.sum_to_size(a.shape),
            grad_b.sum_to_size(b.shape),
        )

    @staticmethod
    def backward(ctx, g):
        return Rational.gradients(ctx, g, lambda saved, again: again)


class RationalKept(Rational):
    @staticmethod
    def backward(ctx, g):
        return Rational.gradients(ctx, g, lambda saved, again: saved)


def _rational(function):
    def rational(x, a, b):
        """(a_0 + … + a_5 x^5) / (1 + |b_1 x + … + b_4 x^4|) of x (*), a (6,), b (4,); |·| has slope 0 at 0."""
        expect(a.shape == (6,) and b.shape == (4,), "a (6,), b (4,)", tuple(a.shape))
        return function.apply(x, a, b)

    return rational


add(
    "rational_second",
    _rational,
    RationalKept,
    Rational,
    lambda: (real(3, 4), real(6, seed=1), real(4, seed=2)),
    bug="the denominator is saved by forward: a constant to the second derivative",
    shows="double backward",
)


class BesselBasis(Function):
    @staticmethod
    def frequencies(r, count, cutoff):
        return torch.arange(1, count + 1, dtype=r.dtype, device=r.device) * (math.pi / cutoff)

    @staticmethod
    def forward(ctx, r, count, cutoff):
        ctx.save_for_backward(r)
        ctx.options = count, cutoff
        k = BesselBasis.frequencies(r, count, cutoff)
        return math.sqrt(2 / cutoff) * k * torch.sinc(k / math.pi * r[..., None])

    @staticmethod
    def gradients(ctx, g, cutoff):
        (r,) = ctx.saved_tensors
        k = BesselBasis.frequencies(r, ctx.options[0], cutoff)
        u = k * r[..., None]
        away = torch.where(u > 0.5, u, 1)
        s = torch.where(u > 0.5, 0, u).square()
        near = -u / 3 * (1 - s / 10 * (1 - s / 28 * (1 - s / 54 * (1 - s / 88))))
        slope = torch.where(u > 0.5, (away.cos() - away.sin() / away) / away, near)
        return (g * math.sqrt(2 / cutoff) * k.square() * slope).sum(-1), None, None

    @staticmethod
    def backward(ctx, g):
        return BesselBasis.gradients(ctx, g, ctx.options[1])


class BesselBasisFive(BesselBasis):
    @staticmethod
    def backward(ctx, g):
        return BesselBasis.gradients(ctx, g, 5.0)


def _bessel_basis(function):
    def bessel_basis(r, count=8, cutoff=5.0):
        """√(2 / cutoff) sin(n π r / cutoff) / r, n from 1 to count, of distances r (*), to (*, count).

        r from 0 to cutoff, cutoff from 1 to 20, count from 1 to 16.
        """
        expect(1 <= cutoff <= 20 and 1 <= count <= 16, "cutoff, count", (cutoff, count))
        expect(((r >= 0) & (r <= cutoff)).all(), "r from 0 to cutoff", r)
        return function.apply(r, count, cutoff)

    return bessel_basis


add(
    "bessel_basis_cutoff",
    _bessel_basis,
    BesselBasisFive,
    BesselBasis,
    lambda: (real(2, 3, positive=True),),
    bug="backward takes the default cutoff",
    shows="cutoff other than 5",
)
