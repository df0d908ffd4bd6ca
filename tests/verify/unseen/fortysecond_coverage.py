"""Coverage: flags, edges of the domain, ties, masks and empty inputs."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fortysecond import add, alike, bounded, check, same, sized


def scalar(x):
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


# Arrhenius' rates factor exp(-energy / temperature) at temperatures, energies in the temperature's unit
def arrhenius(wrong):
    class Rate(Function):
        @staticmethod
        def forward(ctx, temperature, factor, energy):
            ctx.save_for_backward(temperature, factor, energy)
            return factor * (-energy / temperature).exp()

        @staticmethod
        def backward(ctx, g):
            temperature, factor, energy = ctx.saved_tensors
            needs = ctx.needs_input_grad
            part = g * (-energy / temperature).exp()
            by_temperature = part * factor * energy / temperature.square() if needs[0] else None
            by_factor = part.sum() if needs[1] else None
            asked = needs[1] if wrong else needs[2]
            by_energy = -(part * factor / temperature).sum() if asked else None
            return by_temperature, by_factor, by_energy

    def rate(temperature, factor, energy):
        sized("factor", factor)
        sized("energy", energy)
        alike(temperature, factor, energy)
        bounded("temperature", temperature, 0.1, 1e3)
        bounded("factor", factor, 1e-3, 1e3)
        bounded("energy", energy, 0, 100)
        return Rate.apply(temperature, factor, energy)

    return rate


add(
    "arrhenius_frozen_factor",
    arrhenius,
    lambda: ((0.5 + real(5, grad=False).abs()).requires_grad_(), scalar(1.3), scalar(0.8)),
    bug="The energy's gradient hangs on the factor's flag: none where the factor is frozen",
    trigger="a frozen factor",
)


# Mahalanobis' distances |(x - centre) W| of rows x (N, D), with a factor W (D, D) of the precision
def mahalanobis(wrong):
    def whole(t):
        return torch.where(t == 0, torch.ones_like(t), t)

    class Distance(Function):
        @staticmethod
        def forward(ctx, x, centre, factor):
            ctx.save_for_backward(x, centre, factor)
            y = (x - centre) @ factor
            top = y.abs().amax(1)
            return top * (y / whole(top)[:, None]).square().sum(1).sqrt()

        @staticmethod
        def backward(ctx, g):
            x, centre, factor = ctx.saved_tensors
            d = x - centre
            y = d @ factor
            top = y.detach().abs().amax(1, keepdim=True)
            y = y / (top if wrong else whole(top))
            square = y.square().sum(1, keepdim=True)
            part = g[:, None] * y / (square if wrong else whole(square)).sqrt()
            by_x = part @ factor.mT
            return by_x, -by_x.sum(0), d.mT @ part

    def distance(x, centre, factor):
        sized("x", x, None, None)
        sized("centre", centre, x.shape[1])
        sized("factor", factor, x.shape[1], x.shape[1])
        alike(x, centre, factor)
        bounded("x", x, -100, 100)
        bounded("centre", centre, -100, 100)
        bounded("factor", factor, -100, 100)
        return Distance.apply(x, centre, factor)

    return distance


add(
    "mahalanobis_at_centre",
    mahalanobis,
    lambda: (real(4, 3), real(3, seed=1), real(3, 3, seed=2)),
    bug="A row equal to the centre divides 0 by 0",
    trigger="a row equal to the centre",
)


# The pseudo-Voigt line: a share of a Lorentz curve, the rest of a Gauss curve of the same half width
def pseudo_voigt(wrong):
    class Line(Function):
        @staticmethod
        def forward(ctx, x, share, width):
            ctx.save_for_backward(x, share, width)
            z = (x / width).square()
            return share / (1 + z) + (1 - share) * (-math.log(2) * z).exp()

        @staticmethod
        def backward(ctx, g):
            x, share, width = ctx.saved_tensors
            z = x / width
            if wrong:
                most = z.detach().abs().max().clamp(min=1)
                square = (z / most).square() * most.square()
            else:
                square = z.square()
            wide, narrow = 1 / (1 + square), (-math.log(2) * square).exp()
            slope = -share * wide.square() - math.log(2) * (1 - share) * narrow
            by_z = g * 2 * z * slope
            return by_z / width, (g * (wide - narrow)).sum(), -(by_z * z).sum() / width

    def line(x, share, width):
        sized("share", share)
        sized("width", width)
        alike(x, share, width)
        bounded("x", x, -1e3, 1e3)
        bounded("share", share, 0, 1)
        bounded("width", width, 0.1, 100)
        return Line.apply(x, share, width)

    return line


add(
    "pseudo_voigt_empty",
    pseudo_voigt,
    lambda: (real(5), scalar(0.4), scalar(1.2)),
    bug="Backward takes the greatest of no distances",
    trigger="an empty input",
)


# Planck's radiance nu^3 / (exp(nu / temperature) - 1), without units
def planck(wrong):
    class Planck(Function):
        @staticmethod
        def forward(ctx, nu, temperature):
            ctx.save_for_backward(nu, temperature)
            u = nu / temperature
            return nu**3 * (-u).exp() / -(-u).expm1()

        @staticmethod
        def backward(ctx, g):
            nu, temperature = ctx.saved_tensors
            u = nu / temperature
            if wrong:
                density, steep = 1 / u.expm1(), -u.exp() / u.expm1().square()
            else:
                below = -(-u).expm1()
                density, steep = (-u).exp() / below, -(-u).exp() / below.square()
            by_u = g * nu**3 * steep
            by_nu = g * 3 * nu.square() * density + by_u / temperature
            return by_nu, -by_u * u / temperature

    def radiance(nu, temperature):
        same(nu, temperature)
        alike(nu, temperature)
        bounded("nu", nu, 0.01, 1e3)
        bounded("temperature", temperature, 0.05, 100)
        return Planck.apply(nu, temperature)

    return radiance


add(
    "planck_overflow",
    planck,
    lambda: (real(5, positive=True), real(5, seed=1, positive=True)),
    bug="Backward divides exp(u) by its square, which overflows to NaN",
    trigger="nu / temperature above 710 (above 88 in float32)",
)


# The midrange of rows: the mean of the greatest and the least
def midrange(wrong):
    class Midrange(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x.amax(-1) + x.amin(-1)) / 2

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            ends = [(x == end).to(x.dtype) for end in (x.amax(-1, True), x.amin(-1, True))]
            if not wrong:
                ends = [end / end.sum(-1, keepdim=True) for end in ends]
            return g[..., None] * (ends[0] + ends[1]) / 2

    def middle(x):
        check(x.ndim >= 1 and x.shape[-1] > 0, "x: expected rows of numbers")
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -1e3, 1e3)
        return Midrange.apply(x)

    return middle


add(
    "midrange_ties",
    midrange,
    lambda: (real(3, 4),),
    bug="Each of several equal ends gets the whole gradient: outside of the subgradient",
    trigger="two greatest or two least elements in a row",
)


# Cauchy and Schwarz's divergence of positive rows p and q (B, K): log |p| |q| / <p, q>, 0 for rows out of the mask
def cauchy_schwarz(wrong):
    def sums(p, q):
        return (t.sum(1, keepdim=True) for t in (p * q, p * p, q * q))

    class Divergence(Function):
        @staticmethod
        def forward(ctx, p, q, mask):
            ctx.save_for_backward(p, q, mask)
            p, q = (torch.where(mask[:, None], t, torch.ones_like(t)) for t in (p, q))
            both, pp, qq = sums(p, q)
            return torch.where(mask, ((pp.log() + qq.log()) / 2 - both.log())[:, 0], 0 * p[:, 0])

        @staticmethod
        def backward(ctx, g):
            p, q, mask = ctx.saved_tensors
            keep = mask[:, None]
            if not wrong:
                p, q = (torch.where(keep, t, torch.ones_like(t)) for t in (p, q))
            both, pp, qq = sums(p, q)
            g = g[:, None] * keep
            return g * (p / pp - q / both), g * (q / qq - p / both), None

    def divergence(p, q, mask):
        sized("p", p, None, None)
        same(p, q)
        alike(p, q)
        sized("mask", mask, len(p))
        check(mask.dtype == torch.bool, "mask: expected booleans")
        for name, t in {"p": p, "q": q}.items():
            bounded(name, t, 0, 100)
            bounded(f"{name} within the mask", t[mask], 1e-2, 100)
        return Divergence.apply(p, q, mask)

    return divergence


add(
    "cauchy_schwarz_padding",
    cauchy_schwarz,
    lambda: (
        real(3, 4, positive=True),
        real(3, 4, seed=1, positive=True),
        torch.tensor([True, True, False]),
    ),
    bug="Rows out of the mask are multiplied by 0 after a division by their sums: 0 times NaN",
    trigger="padding by zeros",
)
