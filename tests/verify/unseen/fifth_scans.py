"""The fifth set, part five: scans, recurrent cells, steps of differential equations."""

import torch
import torch.nn.functional as F

from tests.verify.unseen import real
from tests.verify.unseen.fifth import Kept, wrong_pull

CHUNK = 4


class Recurrence(Kept):
    """h[t] = a[t] h[t-1] + x[t] along the first dimension, from h[-1] = 0."""

    @staticmethod
    def value(a, x):
        h, states = torch.zeros_like(x[0]), []
        for at, xt in zip(a, x, strict=True):
            h = at * h + xt
            states.append(h)
        return torch.stack(states)

    @staticmethod
    def pull(g, a, x):
        after = torch.cat([a[1:], torch.zeros_like(a[:1])])
        grad_x = Recurrence.value(after.flip(0), g.flip(0)).flip(0)
        return Recurrence.before(a, x) * grad_x, grad_x

    @staticmethod
    def before(a, x):
        return torch.cat([torch.zeros_like(x[:1]), Recurrence.value(a, x)[:-1]])


def sequence(n=6):
    return lambda: (real(n, 3), real(n, 3, seed=1))


@wrong_pull(
    Recurrence, "a block's own scan scaled instead of its carry (accelerated-scan#15)", sequence(8)
)
def recurrence_carry(g, a, x):
    after = torch.cat([a[1:], torch.zeros_like(a[:1])])
    carry, parts = torch.zeros_like(x[0]), []
    for at, gt in zip(after.split(CHUNK)[::-1], g.split(CHUNK)[::-1], strict=True):
        inside = Recurrence.value(at.flip(0), gt.flip(0)).flip(0)
        parts.append(inside * at[-1:].clamp(min=0.5, max=1) + carry)
        carry = parts[-1][0] * a[0]
    grad_x = torch.cat(parts[::-1])
    return Recurrence.before(a, x) * grad_x, grad_x


@wrong_pull(Recurrence, "the decay one step early", sequence())
def recurrence_shifted(g, a, x):
    grad_x = Recurrence.value(a.flip(0), g.flip(0)).flip(0)
    return Recurrence.before(a, x) * grad_x, grad_x


@wrong_pull(Recurrence, "the carry is lost between blocks of four; the sample is one", sequence(4))
def recurrence_blocks(g, a, x):
    after = torch.cat([a[1:], torch.zeros_like(a[:1])])
    pairs = zip(after.split(CHUNK), g.split(CHUNK), strict=True)
    grad_x = torch.cat([Recurrence.value(at.flip(0), gt.flip(0)).flip(0) for at, gt in pairs])
    return Recurrence.before(a, x) * grad_x, grad_x


class Started(Kept):
    """h, then h + the sums of x: a scan that gives its first state too."""

    value = staticmethod(lambda h, x: torch.cat([h[None], h + x.cumsum(0)]))

    @staticmethod
    def pull(g, h, x):
        return g.sum(0), g[1:].flip(0).cumsum(0).flip(0)


@wrong_pull(
    Started, "the first state counted as a step (pytensor#2217)", lambda: (real(3), real(4, 3))
)
def started_shifted(g, h, x):
    return g.sum(0), g[:-1].flip(0).cumsum(0).flip(0)


class Selective(Kept):
    """h[t] = exp(-d[t]) h[t-1] + d[t] x[t]: the step d is in both terms."""

    value = staticmethod(lambda d, x: Recurrence.value((-d).exp(), d * x))

    @staticmethod
    def pull(g, d, x, drive=1.0):
        grad_a, grad_u = Recurrence.pull(g, (-d).exp(), d * x)
        return -grad_a * (-d).exp() + drive * grad_u * x, grad_u * d


def steps():
    return real(5, 3, positive=True), real(5, 3, seed=1)


@wrong_pull(Selective, "the step's gradient through the decay alone", steps)
def selective_drive(g, d, x):
    return Selective.pull(g, d, x, drive=0.0)


class SoftStep(Kept):
    """Mean over time of softplus(d + b) x, b one number a feature."""

    value = staticmethod(lambda d, b, x: (F.softplus(d + b) * x).mean(0))

    @staticmethod
    def pull(g, d, b, x):
        s = g * x * (d + b).sigmoid() / len(d)
        return s, s.sum(0), g * F.softplus(d + b) / len(d)


@wrong_pull(
    SoftStep,
    "padding to a multiple of four counts, its softplus is not 0 (mamba#368)",
    lambda: (real(4, 3), real(3, seed=1), real(4, 3, seed=2)),
)
def soft_step_padding(g, d, b, x):
    grad_d, grad_b, grad_x = SoftStep.pull(g, d, b, x)
    return grad_d, grad_b + (-len(d) % 4) * g * b.sigmoid() / len(d), grad_x


class GRUCandidate(Kept):
    """tanh(i + r (h u + b))."""

    value = staticmethod(lambda i, r, h, u, b: (i + r * (h @ u + b)).tanh())

    @staticmethod
    def pull(g, i, r, h, u, b):
        inner = h @ u + b
        d = g * (1 - (i + r * inner).tanh() ** 2)
        return d, d * inner, (d * r) @ u.mT, h.mT @ (d * r), (d * r).sum(0)


def cell():
    return real(3, 4), real(3, 4, seed=1), real(3, 5, seed=2), real(5, 4, seed=3), real(4, seed=4)


@wrong_pull(GRUCandidate, "the bias outside of the reset gate", cell)
def gru_bias(g, i, r, h, u, b):
    *grads, _ = GRUCandidate.pull(g, i, r, h, u, b)
    return *grads, (g * (1 - (i + r * (h @ u + b)).tanh() ** 2)).sum(0)


class Peephole(Kept):
    """h = sigmoid(o + p c) tanh(c)."""

    value = staticmethod(lambda o, p, c: (o + p * c).sigmoid() * c.tanh())

    @staticmethod
    def pull(g, o, p, c, peek=1.0):
        s, t = (o + p * c).sigmoid(), c.tanh()
        d = g * t * s * (1 - s)
        return d, (d * c).sum(0), g * s * (1 - t * t) + peek * d * p


@wrong_pull(
    Peephole,
    "the cell's gradient not through the peephole",
    lambda: (real(3, 4), real(4, seed=1), real(3, 4, seed=2)),
)
def peephole_lost(g, o, p, c):
    return Peephole.pull(g, o, p, c, peek=0.0)


class Midpoint(Kept):
    """One midpoint step of y' = tanh(w y)."""

    @staticmethod
    def value(y, w):
        return y + 0.5 * (w * (y + 0.25 * (w * y).tanh())).tanh()

    @staticmethod
    def pull(g, y, w, through=1.0):
        first = (w * y).tanh()
        half = y + 0.25 * first
        d = 0.5 * g * (1 - (w * half).tanh() ** 2)
        inner = through * 0.25 * d * w * (1 - first**2)
        return g + d * w + inner * w, d * half + inner * y


@wrong_pull(Midpoint, "the middle taken as a constant", lambda: (real(3, 4), real(3, 4, seed=1)))
def midpoint_constant(g, y, w):
    return Midpoint.pull(g, y, w, through=0.0)


@wrong_pull(
    Midpoint, "the adjoint of an Euler step from the end", lambda: (real(3, 4), real(3, 4, seed=1))
)
def midpoint_from_end(g, y, w):
    end = Midpoint.value(y, w)
    d = 0.5 * g * (1 - (w * end).tanh() ** 2)
    return g + d * w, d * end


class Products(Kept):
    """Running products along the last dimension."""

    value = staticmethod(lambda x: x.cumprod(-1))

    @staticmethod
    def pull(g, x):
        n = x.shape[-1]
        grads = []
        for k in range(n):  # without x[k], and without a division
            ones = torch.ones_like(x[..., :1])
            others = torch.cat([x[..., :k], ones, x[..., k + 1 :]], -1)
            grads.append((g * others.cumprod(-1))[..., k:].sum(-1))
        return torch.stack(grads, -1)


@wrong_pull(Products, "divided by x, which may be 0", lambda: (real(3, 4),))
def products_divided(g, x):
    return (g * x.cumprod(-1)).flip(-1).cumsum(-1).flip(-1) / x


class LogSums(Kept):
    """Logarithms of running sums of exponentials, along the last dimension."""

    value = staticmethod(lambda x: x.logcumsumexp(-1))

    @staticmethod
    def pull(g, x):
        y = x.logcumsumexp(-1)
        n = torch.arange(x.shape[-1])
        later = n[:, None] <= n  # element i is in sum j
        d = (x[..., :, None] - y[..., None, :]).masked_fill(~later, -torch.inf)
        return (g[..., None, :] * d.exp()).sum(-1)


@wrong_pull(LogSums, "exp of x and of -y apart: an overflow", lambda: (real(3, 4),))
def log_sums_apart(g, x):
    y = x.logcumsumexp(-1)
    return x.exp() * (g * (-y).exp()).flip(-1).cumsum(-1).flip(-1)
