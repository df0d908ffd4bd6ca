"""Options, smiles, steps, slopes, splats, fields."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyeighth import (
    add,
    check,
    finite,
    logarithm_ratio,
    one_dtype,
    positive,
    same,
    sized,
)

F64 = torch.float64


# An American option on Cox, Ross and Rubinstein's tree
def american(wrong):
    def price(spot, vol, put=False, strike=100.0, rate=0.05, years=1.0, steps=12):
        sized("spot", spot)
        sized("vol", vol)
        one_dtype(spot, vol)
        positive("spot", spot)
        positive("vol", vol)
        check(strike > 0 and years > 0 and steps >= 1, "expected a strike, a term and a step")
        dt = years / steps
        up = torch.exp(vol * math.sqrt(dt))
        p = (math.exp(rate * dt) - 1 / up) / (up - 1 / up)
        check(0 < float(p.detach()) < 1, "expected a probability between 0 and 1; take more steps")
        sign = -1 if put else 1

        def payoff(n):
            rise = 2 * torch.arange(n + 1, dtype=spot.dtype, device=spot.device) - n
            return (sign * (spot * up**rise - strike)).clamp(min=0)

        value = payoff(steps)
        for n in reversed(range(steps)):
            hold = math.exp(-rate * dt) * (p * value[1:] + (1 - p) * value[:-1])
            now = payoff(n)
            value = hold + (now - hold).clamp(min=0).detach() if wrong else torch.maximum(hold, now)
        return value[0]

    return price


add(
    "american_exercise",
    american,
    lambda: tuple(torch.tensor(v, dtype=F64, requires_grad=True) for v in (103.0, 0.2)),
    bug="What early exercise adds is detached",
    trigger="put=True, as a call without dividends is never exercised early",
)


# The factor z / x(z) of the SABR model's smile
def smile_factor(wrong):
    def factor(z, rho):
        sized("z", z, None)
        sized("rho", rho)
        one_dtype(z, rho)
        check(bool((rho.abs() < 1).all()), "expected a correlation between -1 and 1")
        check(bool((z.abs() <= 10).all()), "expected |z| <= 10")
        past = z - rho
        root = torch.sqrt(past * past + (1 - rho) * (1 + rho))
        after, before = torch.where(past < 0, 0, past), torch.where(past < 0, -past, 0)
        share = torch.where(past < 0, (1 + rho) / (root + before), (root + after) / (1 - rho))
        rise = (share + 1) / (root + 1)
        if wrong:
            away = torch.where(z == 0, 1, z)
            return torch.where(z == 0, 1, away / torch.log1p(away * rise))
        return 1 / (rise * logarithm_ratio(z * rise))

    return factor


add(
    "smile_factor_money",
    smile_factor,
    lambda: (real(5), torch.tensor(-0.4, dtype=F64, requires_grad=True)),
    bug="At the money the factor is the constant 1, without its slope",
    trigger="z = 0",
)


# The running integral by trapezia
def running_integral(wrong):
    class Integral(Function):
        @staticmethod
        def forward(ctx, x, step):
            ctx.step, ctx.dtype = step, x.dtype
            wide = torch.promote_types(x.dtype, torch.float32)
            x = x.to(wide)
            return (step / 2 * (x[..., 1:] + x[..., :-1])).cumsum(-1)

        @staticmethod
        def backward(ctx, grad_y):
            tail = grad_y.flip(-1).cumsum(-1).flip(-1)
            if wrong:
                sums = [grad_y[..., -1].to(ctx.dtype)]
                for g in grad_y.to(ctx.dtype).unbind(-1)[-2::-1]:
                    sums.append(sums[-1] + g)
                tail = torch.stack(sums[::-1], -1)
            none = torch.zeros_like(tail[..., :1])
            ends = torch.cat([tail, none], -1) + torch.cat([none, tail], -1)
            return ctx.step / 2 * ends, None

    def integrate(x, step=0.1):
        check(x.ndim >= 1 and x.shape[-1] >= 2, "expected rows of two numbers or more")
        if not x.is_floating_point():
            raise TypeError(f"x: expected floating numbers, got {x.dtype}")
        return Integral.apply(x, step).to(x.dtype)

    return integrate


add(
    "running_integral_narrow",
    running_integral,
    lambda: (real(2, 6),),
    bug="Backward adds up in the type of x",
    trigger="bfloat16 and long rows",
    own=True,
)


# One implicit step of y' = -k y^3
def implicit_step(wrong):
    class Step(Function):
        @staticmethod
        def forward(ctx, y, k, h):
            a = h * k
            limit = (y.abs() / a) ** (1 / 3)
            z = y.sign() * torch.minimum(y.abs(), limit)
            for _ in range(30):
                z = (y + 2 * a * z**3) / (1 + 3 * a * z * z)
            ctx.save_for_backward(k, z, 1 / (1 + 3 * a * z * z))
            ctx.h = h
            return z

        @staticmethod
        def backward(ctx, grad_z):
            k, z, slope = ctx.saved_tensors
            if not wrong:
                slope = 1 / (1 + 3 * ctx.h * k * z * z)
            grad_y = grad_z * slope
            return grad_y, -(grad_y * ctx.h * z**3).sum(), None

    def advance(y, k, h=0.1):
        sized("k", k)
        one_dtype(y, k)
        finite("y", y)
        positive("k", k)
        check(h > 0, "expected a step h > 0")
        return Step.apply(y, k, h)

    return advance


add(
    "implicit_step_slope",
    implicit_step,
    lambda: (real(4), real((), positive=True, seed=1)),
    bug="The step's slope is kept from forward, a constant to the second derivative",
    trigger="a second derivative",
)


# The limiter minmod: the smaller of two slopes of one sign, else 0
def minmod(wrong):
    class MinMod(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            small = torch.where(a.abs() < b.abs(), a, b)
            return torch.where(a.sign() * b.sign() > 0, small, 0)

        @staticmethod
        def backward(ctx, grad_s):
            a, b = ctx.saved_tensors
            grad_s = torch.where(a.sign() * b.sign() > 0, grad_s, 0)
            first = a < b if wrong else a.abs() < b.abs()
            return torch.where(first, grad_s, 0), torch.where(first, 0, grad_s)

    def limit(a, b):
        same(a, b)
        one_dtype(a, b)
        return MinMod.apply(a, b)

    return limit


add(
    "minmod_falling",
    minmod,
    lambda: (real(3, 4, positive=True), real(3, 4, positive=True, seed=1)),
    bug="Backward chooses by a < b, not by magnitude",
    trigger="two slopes that fall",
)


# What widening a splat's covariance (a, b; b, c) by s must take from its opacity
def compensation(wrong):
    class Compensation(Function):
        @staticmethod
        def forward(ctx, cov, s):
            ctx.save_for_backward(cov)
            ctx.s = s
            a, b, c = cov.unbind(-1)
            return ((a * c - b * b) / ((a + s) * (c + s) - b * b)).sqrt()

        @staticmethod
        def backward(ctx, grad_r):
            (cov,) = ctx.saved_tensors
            (a, b, c), s = cov.unbind(-1), ctx.s
            before, after = a * c - b * b, (a + s) * (c + s) - b * b
            half = grad_r * (before / after).sqrt() / 2
            by_a, by_b, by_c = c / before, -2 * b / before, a / before
            if not wrong:
                by_a, by_c = by_a - (c + s) / after, by_c - (a + s) / after
                by_b = by_b + 2 * b / after
            return torch.stack([half * by_a, half * by_b, half * by_c], -1), None

    def compensate(cov, s=0.3):
        sized("cov", cov, None, 3)
        check(s > 0, "expected s > 0")
        finite("cov", cov)
        a, b, c = cov.unbind(-1)
        fits = (a > 0) & (c > 0) & (a * c - b * b > 0)
        check(bool(fits.all()), "expected positive definite matrices")
        return Compensation.apply(cov, s)

    return compensate


def covariances():
    a, c = real(4, positive=True, grad=False) + 0.5, real(4, positive=True, seed=1, grad=False)
    b = 0.8 * (a * c).sqrt() * torch.tanh(real(4, seed=2, grad=False))
    return torch.stack([a, b, c], -1).requires_grad_()


add(
    "compensation_widened",
    compensation,
    lambda: (covariances(),),
    bug="The widened matrix's determinant is taken for constant",
)


# Interpolation over a triangle seen in perspective: weights w, depths z, values v at its corners
def perspective(wrong):
    class Perspective(Function):
        @staticmethod
        def forward(ctx, w, z, v):
            ctx.save_for_backward(w, z, v)
            share = w / z
            return (share * v).sum(-1) / share.sum(-1)

        @staticmethod
        def backward(ctx, grad_y):
            w, z, v = ctx.saved_tensors
            share = w / z
            total = share.sum(-1, keepdim=True)
            part = share / total
            y = (part * v).sum(-1, keepdim=True)
            grad_part = grad_y[..., None] * (v - y)
            by_z = -grad_y[..., None] * v if wrong else -grad_part
            return grad_part / z / total, by_z * part / z, grad_y[..., None] * part

    def interpolate(w, z, v):
        sized("w", w, None, 3)
        same(w, z, v)
        one_dtype(w, z, v)
        positive("w", w)
        positive("z", z)
        return Perspective.apply(w, z, v)

    return interpolate


add(
    "perspective_depth",
    perspective,
    lambda: (real(4, 3, positive=True), real(4, 3, positive=True, seed=1), real(4, 3, seed=2)),
    bug="The depths' gradient leaves the sum of the shares out",
)


# The periodic solution of -u'' = f with mean 0
def periodic_poisson(wrong):
    def solve(f, mean):
        n = f.shape[-1]
        k = torch.fft.fftfreq(n, 1 / n, dtype=f.dtype, device=f.device)
        inverse = torch.where(k == 0, mean, 1 / torch.where(k == 0, 1, k) ** 2)
        return torch.fft.ifft(torch.fft.fft(f) * inverse).real

    class Poisson(Function):
        @staticmethod
        def forward(ctx, f):
            return solve(f, 0.0)

        @staticmethod
        def backward(ctx, grad_u):
            return solve(grad_u, 1.0 if wrong else 0.0)

    def potential(f):
        check(f.ndim >= 1 and f.shape[-1] >= 1, "expected rows of a number or more")
        return Poisson.apply(f)

    return potential


add(
    "periodic_poisson_mean",
    periodic_poisson,
    lambda: (real(2, 6),),
    bug="Backward divides by 1 where the wave number is 0, so that the mean stays",
)
