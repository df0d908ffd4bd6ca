"""Options, smiles, steps, slopes, fields, forces."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyeighth import (
    add,
    add_bare,
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
        finite(y=y)
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
        check(f.ndim >= 1 and f.numel() >= 1, "expected rows of a number or more")
        return Poisson.apply(f)

    return potential


add(
    "periodic_poisson_mean",
    periodic_poisson,
    lambda: (real(2, 6),),
    bug="Backward divides by 1 where the wave number is 0, so that the mean stays",
)


# The forces on a chain of springs, which harden as they are stretched
def chain_forces(wrong):
    class Forces(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stiffness = torch.nn.Parameter(torch.tensor([0.8, 0.3], dtype=F64))

        def forward(self, x):
            sized("x", x, None)
            if x.dtype != self.stiffness.dtype:
                raise TypeError(f"x: expected {self.stiffness.dtype}, got {x.dtype}")
            if not wrong:
                bend = x[1:] - x[:-1]
                pull = self.stiffness[0] * bend + self.stiffness[1] * bend**3
                none = torch.zeros_like(x[:1])
                return torch.cat([pull, none]) - torch.cat([none, pull])
            recording = torch.is_grad_enabled()
            with torch.enable_grad():
                y = x if x.requires_grad else x.detach().requires_grad_()
                bend = y[1:] - y[:-1]
                energy = (self.stiffness[0] / 2 * bend**2 + self.stiffness[1] / 4 * bend**4).sum()
                graph = recording and self.training
                (slope,) = torch.autograd.grad(energy, y, create_graph=graph)
            return -slope

    return Forces()


add_bare(
    "chain_forces_eval",
    chain_forces,
    lambda: (real(5),),
    bug="The forces are the energy's gradient, with a graph only in training",
    trigger="evaluation",
)
