"""Coverage: kinks, zeros, large and complex numbers, repeated indices, sizes, flags and keywords."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.thirtyninth import (
    add,
    add_bare,
    alike,
    bounded,
    check,
    indices,
    same,
    sized,
)


# Soft erosion of signals (B, T) by a learned element (K): -tau logsumexp(-(x[t + k] - b[k]) / tau)
def soft_erosion(wrong):
    class Erosion(Function):
        @staticmethod
        def forward(ctx, x, b, tau):
            ctx.save_for_backward(x, b)
            ctx.tau = tau
            return -tau * ((b - x.unfold(1, len(b), 1)) / tau).logsumexp(-1)

        @staticmethod
        def backward(ctx, g):
            x, b = ctx.saved_tensors
            if wrong and not ctx.needs_input_grad[0]:
                return None, None, None
            size = len(b)
            p = g[:, :, None] * ((b - x.unfold(1, size, 1)) / ctx.tau).softmax(-1)
            pad = torch.nn.functional.pad
            spread = sum(pad(p[:, :, k], (k, size - 1 - k)) for k in range(size))
            return spread, -p.sum((0, 1)), None

    def erode(x, b, tau=0.5):
        sized("x", x, None, None)
        sized("b", b, None)
        check(len(b) <= x.shape[1], "b: expected no more numbers than x has columns")
        alike(x, b)
        check(0.05 <= tau <= 10, "tau: expected a number from 0.05 to 10")
        bounded("x", x, -100, 100)
        bounded("b", b, -100, 100)
        return Erosion.apply(x, b, tau)

    return erode


add(
    "soft_erosion_frozen",
    soft_erosion,
    lambda: (real(2, 6), real(3, seed=1)),
    bug="Backward returns nothing at all where the signals want no gradient",
    trigger="signals without gradient",
)


# A wave folder: a triangle wave of gain x + bias, with a gain and a bias per channel
def wave_folder(wrong):
    class Folder(Function):
        @staticmethod
        def forward(ctx, x, gain, bias):
            ctx.save_for_backward(x, gain, bias)
            phase = (gain * x + bias - 1).remainder(4)
            return (phase - 2).abs() - 1

        @staticmethod
        def backward(ctx, g):
            x, gain, bias = ctx.saved_tensors
            z = gain * x + bias
            if wrong:
                angle = math.pi / 2 * z
                h = g * angle.cos() / (1 - angle.sin().square()).sqrt()
            else:
                h = torch.where((z - 1).remainder(4) < 2, -g, g)
            by_gain = (h * x).flatten(0, -2).sum(0)
            return h * gain, by_gain, h.flatten(0, -2).sum(0)

    def fold(x, gain, bias):
        check(x.ndim >= 2 and x.numel() > 0, "x: expected rows of numbers")
        sized("gain", gain, x.shape[-1])
        same(gain, bias)
        alike(x, gain, bias)
        for name, t in {"x": x, "gain": gain, "bias": bias}.items():
            bounded(name, t, -20, 20)
        return Folder.apply(x, gain, bias)

    return fold


add(
    "wave_folder_turn",
    wave_folder,
    lambda: (
        real(3, 4),
        torch.ones(4, dtype=F64, requires_grad=True),
        torch.zeros(4, dtype=F64, requires_grad=True),
    ),
    bug="The slope is the arcsine's of a sine: cos / sqrt(1 - sin^2), infinite at a turning point",
    trigger="a wave at its turning point, as x = 1",
)


# Minus the log likelihood of games between players: 0 the first wins, 1 the second wins, 2 a draw (Davidson's model)
def drawn_games(wrong):
    class Games(Function):
        @staticmethod
        def forward(ctx, skill, draw, i, j, result):
            ctx.save_for_backward(skill, draw, i, j, result)
            return -Games.chances(skill, draw, i, j).gather(1, result[:, None]).sum()

        @staticmethod
        def chances(skill, draw, i, j):
            a, b = skill[i], skill[j]
            return torch.stack([a, b, draw + (a + b) / 2], 1).log_softmax(1)

        @staticmethod
        def backward(ctx, g):
            skill, draw, i, j, result = ctx.saved_tensors
            p = Games.chances(skill, draw, i, j).exp()
            q = g * (p - torch.nn.functional.one_hot(result, 3))
            first, second = q[:, 0] + q[:, 2] / 2, q[:, 1] + q[:, 2] / 2
            grad = torch.zeros_like(skill)
            if wrong:
                grad[i] += first
                grad[j] += second
            else:
                grad = grad.index_add(0, i, first).index_add(0, j, second)
            return grad, q[:, 2].sum(), None, None, None

    def games(skill, draw, i, j, result):
        sized("skill", skill, None)
        sized("draw", draw)
        sized("i", i, None)
        same(i, j, result)
        alike(skill, draw)
        indices("i", i, len(skill))
        indices("j", j, len(skill))
        indices("result", result, 3)
        bounded("skill", skill, -100, 100)
        bounded("draw", draw, -100, 100)
        return Games.apply(skill, draw, i, j, result)

    return games


add(
    "drawn_games_repeated",
    drawn_games,
    lambda: (
        real(4),
        torch.tensor(-0.4, dtype=F64, requires_grad=True),
        torch.tensor([0, 1, 0, 2, 3]),
        torch.tensor([1, 2, 3, 3, 1]),
        torch.tensor([0, 2, 1, 0, 2]),
    ),
    bug="Backward adds by an index with +=, which keeps one of a player's games",
)


# Buckingham's potential: (6 exp(a (1 - r)) - a r^-6) / (a - 6), of distances r in units of the best one
def buckingham(wrong):
    class Potential(Function):
        @staticmethod
        def forward(ctx, r, a):
            ctx.save_for_backward(r)
            ctx.a = a
            return (6 * (a * (1 - r)).exp() - a * r**-6) / (a - 6)

        @staticmethod
        def backward(ctx, g):
            (r,) = ctx.saved_tensors
            a = ctx.a
            repelled = (a * (1 - r)).exp()
            if wrong:
                repelled = torch.full_like(r, a).exp() * (-a * r).exp()
            return g * 6 * a / (a - 6) * (r**-7 - repelled), None

    def potential(r, a=14.0):
        check(r.is_floating_point(), "r: expected floating point numbers")
        check(7 <= a <= 1000, "a: expected a number from 7 to 1000")
        bounded("r", r, 0.95, 1e3)
        return Potential.apply(r, a)

    return potential


add(
    "buckingham_steep",
    buckingham,
    lambda: ((real(6, grad=False).abs() + 0.96).requires_grad_(), 120.0),
    bug="Backward takes exp(a) exp(-a r) for exp(a (1 - r)), which overflows",
    trigger="a steep wall in float32: a above 88",
)


# Green and Lagrange's strain (f' f - 1) / 2 of elements f (N, Q, 3, 3), averaged with weights (Q) at their points
def mean_strain(wrong):
    class Strain(Function):
        @staticmethod
        def forward(ctx, f, weight):
            ctx.save_for_backward(f, weight)
            eye = torch.eye(3, dtype=f.dtype, device=f.device)
            return (weight[:, None, None] * (f.mT @ f - eye)).sum(1) / 2

        @staticmethod
        def backward(ctx, g):
            f, weight = ctx.saved_tensors
            eye = torch.eye(3, dtype=f.dtype, device=f.device)
            by_weight = (g[:, None] * (f.mT @ f - eye)).sum((0, 2, 3)) / 2
            if wrong and len(weight) == 1:
                weight = torch.ones_like(weight)
            h = (g + g.mT)[:, None] / 2
            return weight[:, None, None] * (f @ h), by_weight

    def strain(f, weight):
        sized("f", f, None, None, 3, 3)
        sized("weight", weight, f.shape[1])
        alike(f, weight)
        bounded("f", f, -100, 100)
        bounded("weight", weight, -100, 100)
        return Strain.apply(f, weight)

    return strain


add(
    "mean_strain_one_point",
    mean_strain,
    lambda: (real(2, 2, 3, 3), real(2, seed=1, positive=True)),
    bug="With one point per element backward takes its weight for 1",
    trigger="one point per element",
)


# The radius of a Gaussian beam at z from its waist: sqrt(waist^2 + (k z / waist)^2)
def beam_radius(wrong):
    class Radius(Function):
        @staticmethod
        def forward(ctx, z, waist, k):
            ctx.save_for_backward(z, waist)
            ctx.k = k
            return torch.hypot(waist, k * z / waist)

        @staticmethod
        def backward(ctx, g):
            z, waist = ctx.saved_tensors
            spread = ctx.k * z / waist
            w = torch.hypot(waist, spread)
            by_z = ctx.k / waist * spread / w
            if wrong:
                by_z = (w.square() - waist.square()) / (z * w)
            return g * by_z, g * (waist - spread.square() / waist) / w, None

    def radius(z, waist, k=0.4):
        same(z, waist)
        alike(z, waist)
        check(1e-2 <= k <= 10, "k: expected a number from 0.01 to 10")
        bounded("z", z, -100, 100)
        bounded("waist", waist, 1e-2, 100)
        return Radius.apply(z, waist, k)

    return radius


add(
    "beam_radius_waist",
    beam_radius,
    lambda: (real(6), real(6, seed=1, positive=True)),
    bug="The slope by z is (w^2 - waist^2) / (z w): 0 / 0 at the waist",
    trigger="z = 0",
)


# Minus the mean log likelihood of Rayleigh's law at the observations (N) that a mask keeps, with learned log scales
def rayleigh(wrong):
    class Rayleigh(Function):
        @staticmethod
        def forward(ctx, scale, x, mask):
            ctx.save_for_backward(scale, x, mask)
            loss = x.square() * (-2 * scale).exp() / 2 + 2 * scale - x.log()
            return torch.where(mask, loss, 0 * loss).sum() / mask.sum()

        @staticmethod
        def backward(ctx, g):
            scale, x, mask = ctx.saved_tensors
            grad = g / mask.sum() * (2 - x.square() * (-2 * scale).exp())
            return grad if wrong else torch.where(mask, grad, 0 * grad), None, None

    def loss(scale, x, mask):
        same(scale, x, mask)
        alike(scale, x)
        check(not x.requires_grad, "x: expected observations without gradient")
        check(mask.dtype == torch.bool, "mask: expected booleans")
        check(bool(mask.any()), "mask: expected one observation or more")
        bounded("scale", scale, -5, 5)
        bounded("x", x, 1e-3, 1e3)
        return Rayleigh.apply(scale, x, mask)

    return loss


add(
    "rayleigh_masked",
    rayleigh,
    lambda: (
        real(6),
        real(6, seed=1, grad=False, positive=True),
        torch.tensor([True, True, False, True, True, False]),
    ),
    bug="Observations that the mask leaves out get a gradient",
)


# Antoine's vapour pressure at temperatures t (N, 1): 10^(a - b / (c + t)) per substance, or its logarithm
def vapour_pressure(wrong):
    class Pressure(Function):
        @staticmethod
        def forward(ctx, t, a, b, c, log):
            ctx.save_for_backward(t, a, b, c)
            ctx.log = log
            power = (a - b / (c + t)) * math.log(10)
            return power if log else power.exp()

        @staticmethod
        def backward(ctx, g):
            t, a, b, c = ctx.saved_tensors
            g = g * math.log(10)
            if wrong or not ctx.log:
                g = g * ((a - b / (c + t)) * math.log(10)).exp()
            by_t = g * b / (c + t).square()
            return by_t.sum(1, keepdim=True), g.sum(0), (-g / (c + t)).sum(0), by_t.sum(0), None

    def pressure(t, a, b, c, log=False):
        sized("t", t, None, 1)
        sized("a", a, None)
        same(a, b, c)
        alike(t, a, b, c)
        bounded("t", t, 0, 500)
        bounded("a", a, -10, 10)
        bounded("b", b, 0, 100)
        bounded("c", c, 1, 500)
        bounded("the power", ((a - b / (c + t)).detach()), -10, 10)
        return Pressure.apply(t, a, b, c, log)

    return pressure


add(
    "vapour_pressure_log",
    vapour_pressure,
    lambda: (
        real(4, 1, positive=True),
        real(2, seed=1),
        real(2, seed=2, positive=True),
        (real(2, seed=3, grad=False).abs() + 1).requires_grad_(),
    ),
    bug="Backward multiplies by the pressure although the logarithm was asked for",
    trigger="log=True",
    kwargs=lambda: {"log": True},
)


# The kernel 2 Re sum_n c_n exp(rate_n dt l), l = 0 .. length - 1, of a diagonal state space with complex rates
def diagonal_kernel(wrong):
    class Kernel(Function):
        @staticmethod
        def forward(ctx, rate, c, dt, length):
            ctx.save_for_backward(rate, c, dt)
            ctx.length = length
            steps = torch.arange(length, device=dt.device).to(dt.dtype)
            return 2 * (c[:, None] * (rate[:, None] * dt * steps).exp()).real.sum(0)

        @staticmethod
        def backward(ctx, g):
            rate, c, dt = ctx.saved_tensors
            steps = torch.arange(ctx.length, device=dt.device).to(dt.dtype)
            wave = (rate[:, None] * dt * steps).exp()
            by_c = 2 * (g * wave.conj()).sum(1)
            along = 2 * (g * steps * c[:, None] * wave).sum(1)
            by_rate = dt * (along if wrong else along.conj())
            return by_rate, by_c, (along * rate).real.sum(), None

    def kernel(rate, c, dt, length=6):
        sized("rate", rate, None)
        same(rate, c)
        sized("dt", dt)
        check(rate.dtype == c.dtype, "c: expected the rates' dtype")
        pairs = {torch.complex64: torch.float32, torch.complex128: torch.float64}
        check(rate.dtype in pairs, "rate: expected complex numbers")
        check(dt.dtype == pairs[rate.dtype], "dt: expected real numbers of the rates' precision")
        check(isinstance(length, int) and 1 <= length <= 256, "length: expected 1 to 256")
        bounded("the rates' real parts", rate.detach().real, -10, 0.1)
        bounded("the rates' imaginary parts", rate.detach().imag, -100, 100)
        bounded("c", c.detach().abs(), 0, 1e3)
        bounded("dt", dt, 1e-4, 1)
        return Kernel.apply(rate, c, dt, length)

    return kernel


def poles():
    rate = torch.complex(-real(3, grad=False, positive=True), real(3, seed=1, grad=False))
    c = torch.complex(real(3, seed=2, grad=False), real(3, seed=3, grad=False))
    dt = torch.tensor(0.3, dtype=F64, requires_grad=True)
    return rate.requires_grad_(), c.requires_grad_(), dt


add_bare(
    "diagonal_kernel_conj",
    diagonal_kernel,
    poles,
    bug="The rates' gradient isn't conjugated",
)


# Reinhard's tone map u / (1 + u), u the luminance in units of its log average over the image
def tone_map(wrong):
    delta = 1e-2

    class Tones(Function):
        @staticmethod
        def forward(ctx, x, key):
            ctx.save_for_backward(x)
            ctx.key = key
            u = key * x / (x + delta).log().mean().exp()
            return u / (1 + u)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            average = (x + delta).log().mean().exp()
            u = ctx.key * x / average
            h = g / (1 + u).square()
            share = 1 / (x.numel() if wrong else max(x.numel(), 1))
            return h * ctx.key / average - share * (h * u).sum() / (x + delta), None

    def tones(x, key=0.5):
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(1e-2 <= key <= 10, "key: expected a number from 0.01 to 10")
        bounded("x", x, 0, 1e4)
        return Tones.apply(x, key)

    return tones


add(
    "tone_map_empty",
    tone_map,
    lambda: (real(3, 4, positive=True),),
    bug="Backward divides 1 by the number of pixels in Python: ZeroDivisionError without any",
    trigger="an empty image",
)
