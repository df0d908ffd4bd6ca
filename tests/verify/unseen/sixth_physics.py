"""The sixth set, part seven: an ODE step, energies, distances, spectra."""

import math

import torch

from tests.verify.unseen import SIXTH, pair, real
from tests.verify.unseen.sixth import Rule, X, faulty


class Midpoint(Rule):
    """A step of the midpoint rule for x' = sin(w x), of 0.1."""

    value = staticmethod(lambda x, w: x + 0.1 * torch.sin(w * (x + 0.05 * torch.sin(w * x))))

    @staticmethod
    def pull(g, x, w, mid=None):
        mid = x + 0.05 * torch.sin(w * x) if mid is None else mid
        slope = g * 0.1 * torch.cos(w * mid)
        first = slope * w * 0.05 * torch.cos(w * x)
        return g + slope * w + first * w, (slope * mid + first * x).sum_to_size(w.shape)


@faulty(
    Midpoint,
    "the midpoint is kept as a constant: second derivative lost",
    lambda: (real(3, 4), real(4)),
)
def midpoint(g, x, w):
    return Midpoint.pull(g, x, w, (x + 0.05 * torch.sin(w * x)).detach())


class Coulomb(Rule):
    """Energy of charges q at places r, softened: the sum over pairs of q_i q_j / sqrt(d^2 + 0.01)."""

    @staticmethod
    def between(r):
        d = r[:, None] - r
        return d, (d.square().sum(-1) + 0.01).rsqrt() * (
            1 - torch.eye(len(r), dtype=r.dtype, device=r.device)
        )

    @classmethod
    def value(cls, r, q):
        return 0.5 * (q[:, None] * q * cls.between(r)[1]).sum()

    @classmethod
    def pull(cls, g, r, q):
        d, near = cls.between(r)
        return -g * ((q[:, None] * q * near**3)[..., None] * d).sum(1), g * (near * q).sum(1)


@faulty(Coulomb, "a pair's force acts on its first charge only", lambda: (real(4, 3), real(4)))
def coulomb(g, r, q):
    d, near = Coulomb.between(r)
    return -g * ((q[:, None] * q * near**3).triu()[..., None] * d).sum(1), g * (near * q).sum(1)


class Distance(Rule):
    """sqrt(|a_i - b_j|^2 + 1e-4)."""

    value = staticmethod(lambda a, b: ((a[:, None] - b).square().sum(-1) + 1e-4).sqrt())

    @staticmethod
    def pull(g, a, b):
        d = a[:, None] - b
        d = d * (g * (d.square().sum(-1) + 1e-4).rsqrt())[..., None]
        return d.sum(1), -d.sum(0)


@faulty(
    Distance,
    "|a|^2 - 2ab + |b|^2 cancels far from the origin",
    lambda: (real(3, 2), real(4, 2, seed=1)),
)
def distance(g, a, b):
    square = a.square().sum(-1)[:, None] - 2 * a @ b.mT + b.square().sum(-1)
    w = g * (square + 1e-4).rsqrt()
    return w.sum(1)[:, None] * a - w @ b, w.sum(0)[:, None] * b - w.mT @ a


class PowerSpectrum(Rule):
    """|rfft(x)|^2."""

    value = staticmethod(lambda x: torch.view_as_real(torch.fft.rfft(x)).square().sum(-1))

    @staticmethod
    def pull(g, x):
        spectrum = torch.zeros(x.shape, dtype=x.dtype.to_complex(), device=x.device)
        spectrum[..., : g.shape[-1]] = g * torch.fft.rfft(x)
        return 2 * x.shape[-1] * torch.fft.ifft(spectrum).real


@faulty(
    PowerSpectrum,
    "the last bin is taken for Nyquist's: right for even lengths",
    lambda: (real(2, 6),),
)
def power_spectrum(g, x):
    n = x.shape[-1]
    weight = torch.full_like(g, 0.5)
    weight[..., 0] = weight[..., -1] = 1
    return 2 * n * torch.fft.irfft(weight * g * torch.fft.rfft(x), n=n)


def sinc(x):
    """sin(x) / x, near 0 by its series."""
    near = x.abs() < 1
    inner, outer = torch.where(near, x, 0.0), torch.where(near, 1.0, x)
    series = sum((-1) ** k * inner ** (2 * k) / math.factorial(2 * k + 1) for k in range(10))
    return torch.where(near, series, outer.sin() / outer)


def sinc_unsafe(x):
    return torch.where(x == 0, 1.0, x.sin() / x)


pair("sinc_6", sinc_unsafe, sinc, X, "nan from the branch not taken", into=SIXTH)


class Magnitude(Rule):
    """sqrt(|z|^2 + 1e-4) of a complex number in two parts."""

    value = staticmethod(lambda a, b: (a * a + b * b + 1e-4).sqrt())

    @staticmethod
    def pull(g, a, b):
        w = g * (a * a + b * b + 1e-4).rsqrt()
        return w * a, w * b


@faulty(Magnitude, "gradient of the conjugate", lambda: (real(3, 4), real(3, 4, seed=1)))
def magnitude(g, a, b):
    z = torch.complex(a, b).conj() * (g * (a * a + b * b + 1e-4).rsqrt())
    return z.real, z.imag
