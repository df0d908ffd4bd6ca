"""Divergences, likelihoods and scores."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.seventeenth import add
from tests.verify.unseen.sixteenth import expect


class MMD(Function):
    @staticmethod
    def kernel(x, y, width):
        d = (x[:, None] - y) / width
        return d, (-d.square().sum(-1) / 2).exp()

    @staticmethod
    def forward(ctx, x, y, width):
        ctx.save_for_backward(x, y, width)
        xx, yy, xy = (MMD.kernel(a, b, width)[1].mean() for a, b in ((x, x), (y, y), (x, y)))
        return xx + yy - 2 * xy

    @staticmethod
    def gradients(ctx, g, pairs):
        x, y, width = ctx.saved_tensors

        def part(a, b, weight):
            d, k = MMD.kernel(a, b, width)
            e = g * weight * k[..., None] * d / width
            return -e.sum(1), e.sum(0), (e * d).sum((0, 1))

        n, m = len(x), len(y)
        (a, b, w), (c, d, v), (e, f, u) = (
            part(x, x, 1 / n**2),
            part(y, y, 1 / m**2),
            part(x, y, -2 / pairs(n, m)),
        )
        return a + b + e, c + d + f, w + v + u

    @staticmethod
    def backward(ctx, g):
        return MMD.gradients(ctx, g, lambda n, m: n * m)


class MMDSquare(MMD):
    @staticmethod
    def backward(ctx, g):
        return MMD.gradients(ctx, g, lambda n, m: n * n)


def _mmd(function):
    def mmd(x, y, width):
        """Squared maximum mean discrepancy, biased, of x (N, D), y (M, D), N, M > 0; widths (D,) >= 0.1."""
        expect(
            x.dim() == y.dim() == 2 and len(x) and len(y) and x.shape[1] == y.shape[1],
            "x (N, D), y (M, D)",
            tuple(y.shape),
        )
        expect(width.shape == x.shape[1:] and (width >= 0.1).all(), "widths (D,), >= 0.1", width)
        return function.apply(x, y, width)

    return mmd


add(
    "mmd_pairs",
    _mmd,
    MMDSquare,
    MMD,
    lambda: (real(3, 2), real(3, 2, seed=1), torch.full((2,), 1.5, dtype=F64, requires_grad=True)),
    bug="the mixed pairs' mean is taken over N², not N M",
    shows="N other than M",
)


class ZeroInflated(Function):
    @staticmethod
    def forward(ctx, gate, log_rate, y):
        ctx.save_for_backward(gate, log_rate, y)
        rate = log_rate.exp()
        zero = torch.logaddexp(gate, -rate)
        some = y * log_rate - rate - torch.lgamma(y + 1)
        return (torch.nn.functional.softplus(gate) - torch.where(y == 0, zero, some)).mean()

    @staticmethod
    def gradients(ctx, g, of_some):
        gate, log_rate, y = ctx.saved_tensors
        rate = log_rate.exp()
        s, share = gate.sigmoid(), (gate + rate).sigmoid()
        g = g / y.numel()
        of_gate = torch.where(y == 0, s - share, of_some(s))
        return g * of_gate, g * torch.where(y == 0, (1 - share) * rate, rate - y), None

    @staticmethod
    def backward(ctx, g):
        return ZeroInflated.gradients(ctx, g, lambda s: s)


class ZeroInflatedSign(ZeroInflated):
    @staticmethod
    def backward(ctx, g):
        return ZeroInflated.gradients(ctx, g, lambda s: -s)


def _zero_inflated(function):
    def zero_inflated(gate, log_rate, y):
        """Mean negative log-likelihood of counts y >= 0, constants: 0 with probability sigmoid(gate), else Poisson.

        Of one shape, not empty; the rate is e^log_rate, |log_rate| <= 5.
        """
        expect(gate.shape == log_rate.shape == y.shape and y.numel(), "one shape", tuple(y.shape))
        expect((y >= 0).all(), "y >= 0", y)
        expect((log_rate.abs() <= 5).all(), "|log_rate| <= 5", log_rate)
        return function.apply(gate, log_rate, y.detach().to(gate.dtype))

    return zero_inflated


add(
    "zero_inflated_sign",
    _zero_inflated,
    ZeroInflatedSign,
    ZeroInflated,
    lambda: (real(6), real(6, seed=1), torch.tensor([0, 2, 0, 1, 5, 3])),
    bug="the gate's gradient has the wrong sign where y > 0",
    shows="the sample",
)


class ComplexScore(Function):
    """Real parts are the first half of a row, imaginary parts the second."""

    @staticmethod
    def forward(ctx, h, r, t):
        ctx.save_for_backward(h, r, t)
        (a, b), (c, d), (e, f) = (x.chunk(2, -1) for x in (h, r, t))
        return ((a * c - b * d) * e + (a * d + b * c) * f).sum(-1)

    @staticmethod
    def gradients(ctx, g, sign):
        h, r, t = ctx.saved_tensors
        (a, b), (c, d), (e, f) = (x.chunk(2, -1) for x in (h, r, t))
        g = g[..., None]
        return (
            g * torch.cat((c * e + d * f, c * f - d * e), -1),
            g * torch.cat((a * e + b * f, a * f - sign * b * e), -1),
            g * torch.cat((a * c - b * d, a * d + b * c), -1),
        )

    @staticmethod
    def backward(ctx, g):
        return ComplexScore.gradients(ctx, g, 1)


class ComplexScoreSign(ComplexScore):
    @staticmethod
    def backward(ctx, g):
        return ComplexScore.gradients(ctx, g, -1)


def _complex_score(function):
    def complex_score(h, r, t):
        """Re Σ h r t̄ of complex h, r, t, each given as (*, 2 D): real parts, then imaginary; of one shape."""
        expect(
            h.dim() and h.shape == r.shape == t.shape and h.shape[-1] % 2 == 0,
            "h, r, t (*, 2 D)",
            tuple(h.shape),
        )
        return function.apply(h, r, t)

    return complex_score


add(
    "complex_score_sign",
    _complex_score,
    ComplexScoreSign,
    ComplexScore,
    lambda: tuple(real(3, 4, seed=s) for s in range(3)),
    bug="one term of the relation's imaginary part has the wrong sign",
    shows="the sample",
)


class RotateDistance(Function):
    @staticmethod
    def difference(h, angle, t):
        (a, b), (e, f) = h.chunk(2, -1), t.chunk(2, -1)
        c, s = angle.cos(), angle.sin()
        u, v = a * c - b * s - e, a * s + b * c - f
        return u, v, (u.square() + v.square()).sqrt(), c, s

    @staticmethod
    def forward(ctx, h, angle, t):
        ctx.save_for_backward(h, angle, t)
        return RotateDistance.difference(h, angle, t)[2].sum(-1)

    @staticmethod
    def gradients(ctx, g, sign):
        h, angle, t = ctx.saved_tensors
        u, v, m, c, s = RotateDistance.difference(h, angle, t)
        e, f = t.chunk(2, -1)
        u, v = (g[..., None] * x / torch.where(m > 0, m, 1) for x in (u, v))
        of_h = torch.cat((u * c + v * s, v * c - sign * u * s), -1)
        return of_h, v * e - u * f, -torch.cat((u, v), -1)

    @staticmethod
    def backward(ctx, g):
        return RotateDistance.gradients(ctx, g, 1)


class RotateDistanceSign(RotateDistance):
    @staticmethod
    def backward(ctx, g):
        return RotateDistance.gradients(ctx, g, -1)


def _rotate_distance(function):
    def rotate_distance(h, angle, t):
        """Σ |h e^(i angle) - t| of complex h, t, each (*, 2 D): real parts, then imaginary; angle (*, D).

        Where a difference is 0 the gradient is 0.
        """
        expect(h.dim() and h.shape == t.shape, "h, t (*, 2 D)", tuple(t.shape))
        expect(
            angle.dim() and (*angle.shape[:-1], 2 * angle.shape[-1]) == tuple(h.shape),
            "angle (*, D)",
            tuple(angle.shape),
        )
        return function.apply(h, angle, t)

    return rotate_distance


add(
    "rotate_distance_sign",
    _rotate_distance,
    RotateDistanceSign,
    RotateDistance,
    lambda: (real(3, 4), real(3, 2, seed=1), real(3, 4, seed=2)),
    bug="one term of the head's imaginary part has the wrong sign",
    shows="the sample",
)


class SpectralConvergence(Function):
    @staticmethod
    def norm(x):
        return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return (SpectralConvergence.norm(x - y) / SpectralConvergence.norm(y)).mean()

    @staticmethod
    def gradients(ctx, g, size):
        x, y = ctx.saved_tensors
        d = x - y
        n, s = SpectralConvergence.norm(d), SpectralConvergence.norm(size(x, y))
        n = torch.where(n > 0, n, 1)
        g = g / len(x)
        grad = g * d / n / s
        return grad, -grad - g * SpectralConvergence.norm(d) * y / s**3

    @staticmethod
    def backward(ctx, g):
        return SpectralConvergence.gradients(ctx, g, lambda x, y: y)


class SpectralConvergenceInput(SpectralConvergence):
    @staticmethod
    def backward(ctx, g):
        return SpectralConvergence.gradients(ctx, g, lambda x, y: x)


def _spectral_convergence(function):
    def spectral_convergence(x, y):
        """Mean over N of ‖x - y‖ / ‖y‖ of magnitudes x and y (N, F, T), N > 0, y's norms above 1e-3.

        Where x is y the numerator's gradient is 0.
        """
        expect(x.dim() == 3 and x.shape == y.shape and len(x), "x, y (N, F, T)", tuple(y.shape))
        expect((y.square().sum((1, 2)) > 1e-6).all(), "norms above 1e-3", y)
        return function.apply(x, y)

    return spectral_convergence


add(
    "spectral_convergence_input",
    _spectral_convergence,
    SpectralConvergenceInput,
    SpectralConvergence,
    lambda: (real(2, 3, 4, positive=True), real(2, 3, 4, seed=1, positive=True)),
    bug="backward divides by the norm of x, not of y",
    shows="the sample",
)
