"""Layouts: grad_output and saved inputs, indexed as a kernel indexes them."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirtyninth import (
    add,
    alike,
    bounded,
    check,
    indices,
    read_flat,
    same,
    sized,
)


# Yukawa's energy exp(-kappa r) / r of each pair (2, P) of charged points
def yukawa(wrong):
    class Energy(Function):
        @staticmethod
        def forward(ctx, x, charge, pairs, kappa):
            ctx.save_for_backward(x, charge, pairs)
            ctx.kappa = kappa
            r = (x[pairs[0]] - x[pairs[1]]).norm(dim=-1)
            return charge[pairs[0]] * charge[pairs[1]] * (-kappa * r).exp() / r

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            x, charge, (i, j) = ctx.saved_tensors
            if wrong and 0 in g.stride():
                g = read_flat(g)
            d = x[i] - x[j]
            r = d.norm(dim=-1)
            e = g * (-ctx.kappa * r).exp() / r
            pull = (-e * charge[i] * charge[j] * (ctx.kappa + 1 / r) / r)[:, None] * d
            by_x = torch.zeros_like(x).index_add(0, i, pull).index_add(0, j, -pull)
            by_charge = torch.zeros_like(charge).index_add(0, i, e * charge[j])
            return by_x, by_charge.index_add(0, j, e * charge[i]), None, None

    def energy(x, charge, pairs, kappa=0.7):
        sized("x", x, None, 3)
        sized("charge", charge, len(x))
        sized("pairs", pairs, 2, None)
        indices("pairs", pairs, len(x))
        alike(x, charge)
        check(0 <= kappa <= 10, "kappa: expected a number from 0 to 10")
        bounded("x", x, -100, 100)
        bounded("charge", charge, -100, 100)
        bounded("distances", (x[pairs[0]] - x[pairs[1]]).detach().norm(dim=-1), 0.05, 1e3)
        return Energy.apply(x, charge, pairs, kappa)

    return energy


add(
    "yukawa_expanded",
    yukawa,
    lambda: (real(4, 3), real(4, seed=1), torch.tensor([[0, 0, 1, 2], [1, 2, 3, 3]])),
    bug="Backward reads past the only element of an expanded grad_output",
    trigger="the backward of a sum",
)


# Hellinger's squared distance of rows p and q: half of the sum of (sqrt(p) - sqrt(q))^2
def hellinger(wrong):
    class Hellinger(Function):
        @staticmethod
        def forward(ctx, p, q):
            ctx.save_for_backward(p, q)
            return (p.sqrt() - q.sqrt()).square().sum(-1) / 2

        @staticmethod
        def backward(ctx, g):
            p, q = ctx.saved_tensors
            g = (read_flat(g) if wrong else g)[..., None] / 2
            a, b = p.sqrt(), q.sqrt()
            return g * (a - b) / a, g * (b - a) / b

    def distance(p, q):
        check(p.ndim >= 1 and p.numel() > 0, "p: expected rows of numbers")
        same(p, q)
        alike(p, q)
        bounded("p", p, 1e-3, 1e3)
        bounded("q", q, 1e-3, 1e3)
        return Hellinger.apply(p, q)

    return distance


add(
    "hellinger_flat",
    hellinger,
    lambda: (real(3, 4, 3, positive=True), real(3, 4, 3, seed=1, positive=True)),
    bug="Backward indexes grad_output as if it were contiguous",
    trigger="a transposed, cut or expanded grad_output",
)


# Geman and McClure's loss d^2 / (d^2 + c^2) of each element
def geman(wrong):
    class Geman(Function):
        @staticmethod
        def forward(ctx, x, y, c):
            ctx.save_for_backward(x, y)
            ctx.c = c
            square = (x - y).square()
            return square / (square + c * c)

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            d = (read_flat(x) if wrong else x) - y
            grad = g * 2 * d * ctx.c**2 / (d.square() + ctx.c**2).square()
            return grad, -grad, None

    def loss(x, y, c=1.2):
        same(x, y)
        alike(x, y)
        check(0.1 <= c <= 100, "c: expected a number from 0.1 to 100")
        bounded("x", x, -1e3, 1e3)
        bounded("y", y, -1e3, 1e3)
        return Geman.apply(x, y, c)

    return loss


add(
    "geman_flat_input",
    geman,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="Backward indexes the saved predictions as if they were contiguous",
    trigger="transposed or cut predictions",
)


# Lightness 116 f(y) - 16 of luminance y: the cube root above (6/29)^3, a line below
def lightness(wrong):
    knee = 6 / 29

    class Lightness(Function):
        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(y)
            high = y.clamp(min=knee**3) ** (1 / 3)
            return 116 * torch.where(y > knee**3, high, y / (3 * knee**2) + 4 / 29) - 16

        @staticmethod
        def backward(ctx, g):
            (y,) = ctx.saved_tensors
            if wrong:
                g = g if g.ndim and g.stride(-1) == 1 else g.contiguous()
                g = read_flat(g)
            steep = y.clamp(min=knee**3) ** (-2 / 3) / 3
            line = torch.full_like(y, 1 / (3 * knee**2))
            return 116 * g * torch.where(y > knee**3, steep, line)

    def convert(y):
        check(y.is_floating_point(), "y: expected floating point numbers")
        bounded("y", y, -10, 1e3)
        return Lightness.apply(y)

    return convert


add(
    "lightness_last_stride",
    lightness,
    lambda: (real(4, 5, positive=True),),
    bug="Backward looks at grad_output's last stride only and takes the rows for dense",
    trigger="a grad_output cut out of wider rows, as by the backward of cat",
)


# Signals (B, T), each delayed by a learned fraction of samples; zeros come first
def fractional_delay(wrong):
    def taps(x, delay):
        k = delay.floor().long()
        t = torch.arange(x.shape[1], device=x.device) - k[:, None]
        read = [
            torch.where(s >= 0, x.gather(1, s.clamp(0, x.shape[1] - 1)), 0 * x) for s in (t, t - 1)
        ]
        return *read, t, (delay - k)[:, None]

    class Delay(Function):
        @staticmethod
        def forward(ctx, x, delay):
            ctx.save_for_backward(x, delay)
            near, far, _, f = taps(x, delay)
            return near + f * (far - near)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            x, delay = ctx.saved_tensors
            if wrong:
                x = read_flat(x if x.stride(-1) == 1 else x.contiguous())
            near, far, t, f = taps(x, delay)
            grad = torch.zeros_like(g)
            for s, part in ((t, g * (1 - f)), (t - 1, g * f)):
                kept = torch.where(s >= 0, part, 0 * part)
                grad = grad.scatter_add(1, s.clamp(0, x.shape[1] - 1), kept)
            return grad, (g * (far - near)).sum(1)

    def shifted(x, delay):
        sized("x", x, None, None)
        sized("delay", delay, len(x))
        alike(x, delay)
        bounded("x", x, -1e3, 1e3)
        bounded("delay", delay, 0, x.shape[1])
        return Delay.apply(x, delay)

    return shifted


add(
    "fractional_delay_pitch",
    fractional_delay,
    lambda: (real(3, 6), (real(3, seed=1, grad=False).abs() + 0.3).requires_grad_()),
    bug="Backward takes the signals for rows without gaps: it checks their last stride only",
    trigger="signals cut out of a wider buffer",
)
