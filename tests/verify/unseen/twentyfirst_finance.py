"""Prices, risks, returns; and choices under limits."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentyfirst import add, check, positive, same, sized


# Black-Scholes: s N(d) - k exp(-r t) N(d - v), v = sigma sqrt t, d = (log(s / k) + r t) / v + v / 2
def call_price(wrong):
    def price(s, k, t, sigma, rate=0.03):
        same(s, k, t, sigma)
        for name, a in (("s", s), ("k", k), ("sigma", sigma)):
            positive(name, a)
        check(bool((t >= 0).all()), "t: expected times >= 0")
        over = t == 0
        check(
            not bool((over & (s == k)).any()), "s: an option at the money has no slope when it ends"
        )
        later = t if wrong else torch.where(over, 1, t)
        small = torch.where(over, 1, sigma * t.sqrt())
        check(bool((small > 1e-6).all()), "t: too small for the volatility")
        v, bond = sigma * later.sqrt(), k * (-rate * t).exp()
        d = ((s / k).log() + rate * t) / v + v / 2
        value = s * torch.special.ndtr(d) - bond * torch.special.ndtr(d - v)
        return torch.where(over, (s - bond).clamp_min(0), value)

    return price


add(
    "call_price_last_day",
    call_price,
    lambda: tuple(real(4, seed=s, positive=True) for s in range(4)),
    bug="The formula is replaced by the payoff at the end only after it was divided by 0",
    trigger="a time of 0",
)


# Internal rate of return: sum_t c_t exp(-t z) = p over t = 1, 2, ...; z = log(1 + rate)
def internal_rate(wrong):
    class LogRate(Function):
        @staticmethod
        def forward(ctx, c, p):
            t = torch.arange(1, c.shape[1] + 1, dtype=c.dtype, device=c.device)
            z = torch.zeros_like(p)
            for _ in range(100):
                terms = c.log() - t * z[:, None]
                f = terms.logsumexp(1) - p.log()
                z = z + f / (terms.softmax(1) * t).sum(1)
            ctx.save_for_backward(c, z)
            return z

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_z):
            c, z = ctx.saved_tensors
            t = torch.arange(1, c.shape[1] + 1, dtype=c.dtype, device=c.device)
            discount = (-t * z[:, None]).exp()
            duration = (c * discount * t).sum(1)
            if wrong:
                discount = (-(t - 1) * z[:, None]).exp()
            rate = (grad_z / duration)[:, None]
            return discount * rate, -rate[:, 0]

    def log_rate(c, p):
        sized("c", c, None, None)
        sized("p", p, len(c))
        positive("c", c)
        positive("p", p)
        check(
            bool(((c.sum(1) / p).log().abs() < 5).all()), "p: too far from the sum of the payments"
        )
        return LogRate.apply(c, p)

    return log_rate


add(
    "internal_rate_periods",
    internal_rate,
    lambda: (real(2, 4, positive=True), real(2, seed=1, positive=True)),
    bug="Backward discounts the first payment by no period",
)


# The largest fall from a peak before, as a part of the peak
def drawdown(wrong):
    def largest(x):
        sized("x", x, None, None)
        positive("x", x)
        peak = x.cummax(1).values
        if wrong:
            peak = peak.detach()
        return (1 - x / peak).amax(1)

    return largest


add(
    "drawdown_peak",
    drawdown,
    lambda: (real(2, 6, positive=True),),
    bug="The running peak is detached",
)


# Expected shortfall: the mean of the worst a n losses, one of them in part
def expected_shortfall(wrong):
    class Shortfall(Function):
        @staticmethod
        def forward(ctx, x, a):
            n = a * x.shape[1]
            whole = min(math.floor(n + 1e-9), x.shape[1])
            part = max(n - whole, 0.0)
            worst, place = x.sort(stable=True, dim=1, descending=True)
            weight = torch.zeros_like(x[0])
            weight[:whole] = 1
            if part > 1e-9 and whole < x.shape[1]:
                weight[whole] = part
            ctx.save_for_backward(place, weight)
            ctx.n = n
            return worst @ weight / n

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            place, weight = ctx.saved_tensors
            taken = (weight > 0).to(weight.dtype) if wrong else weight
            share = (taken / (taken.sum() if wrong else ctx.n)).to(grad_y.dtype).expand_as(place)
            return grad_y[:, None] * torch.zeros_like(share).scatter(1, place, share), None

    def shortfall(x, a=0.5):
        sized("x", x, None, None)
        check(0 < a <= 1, "expected a part from 0 to 1")
        check(a * x.shape[1] > 1e-6, "expected more of the losses")
        return Shortfall.apply(x, a)

    return shortfall


add(
    "expected_shortfall_part",
    expected_shortfall,
    lambda: (real(2, 6),),
    bug="Backward counts the loss that is taken in part as a whole one",
    trigger="a part of the losses that is not a whole number of them",
)


# GARCH(1, 1): h_t = w + a x_{t-1}^2 + b h_{t-1} from the mean square; sum (log h_t + x_t^2 / h_t) / 2
def garch(wrong):
    class Likelihood(Function):
        @staticmethod
        def forward(ctx, x, w, a, b):
            h = [x.square().mean()]
            for t in range(1, len(x)):
                h.append(w + a * x[t - 1].square() + b * h[-1])
            h = torch.stack(h)
            ctx.save_for_backward(x, a, b, h)
            return (h.log() + x.square() / h).sum() / 2

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, a, b, h = ctx.saved_tensors
            local = (1 / h - x.square() / h.square()) / 2
            into = torch.zeros_like(local[0])
            grad_x, sums = x / h, [0, 0, 0]
            for t in reversed(range(len(x))):
                into = local[t] + b * into
                if t:
                    sums = [
                        sums[0] + into,
                        sums[1] + into * x[t - 1].square(),
                        sums[2] + into * h[t - 1],
                    ]
                    grad_x[t - 1] += 2 * a * x[t - 1] * into
            if not wrong:
                grad_x = grad_x + 2 * x / len(x) * into
            return (grad_x * grad_y, *(s * grad_y for s in sums))

    def likelihood(x, w, a, b):
        sized("x", x, None)
        check(len(x) >= 2, "expected two returns or more")
        for name, p in (("w", w), ("a", a), ("b", b)):
            sized(name, p)
            positive(name, p)
        check(bool((x != 0).any()), "x: expected returns that vary")
        return Likelihood.apply(x, w, a, b)

    return likelihood


add(
    "garch_start",
    garch,
    lambda: (
        real(5),
        *(real(1, seed=s, positive=True).detach()[0].requires_grad_() for s in (1, 2, 3)),
    ),
    bug="The first variance, the returns' mean square, is taken for a constant",
)


# Projection on the l1 ball of radius r: x itself inside, sign(x) max(|x| - t, 0) outside
def l1_ball(wrong):
    class Project(Function):
        @staticmethod
        def forward(ctx, x, r):
            m = x.abs()
            top = m.sort(1, descending=True).values
            count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
            limits = (top.cumsum(1) - r) / count
            size = (top > limits).sum(1, keepdim=True).clamp_min(1)
            t = limits.gather(1, size - 1)
            outside = m.sum(1, keepdim=True) > r
            y = torch.where(outside, x.sign() * (m - t).clamp_min(0), x)
            ctx.save_for_backward(y, outside)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            y, outside = ctx.saved_tensors
            s = y.sign()
            mean = (s * grad_y).sum(1, keepdim=True) / s.abs().sum(1, keepdim=True).clamp_min(1)
            cut = s.abs() * grad_y - s * mean
            return cut if wrong else torch.where(outside, cut, grad_y), None

    def project(x, r=1.0):
        sized("x", x, None, None)
        check(r > 0, "expected r > 0")
        return Project.apply(x, r)

    return project


add(
    "l1_ball_inside",
    l1_ball,
    lambda: ((2 * real(3, 4).detach()).requires_grad_(),),
    bug="Backward projects on the sphere's face whether x was outside or not",
    trigger="a row inside the ball",
)


# Group lasso: x max(0, 1 - a / |x|)
def shrink(wrong):
    class Shrink(Function):
        @staticmethod
        def forward(ctx, x, a):
            size = x.norm(dim=1, keepdim=True)
            ctx.save_for_backward(x)
            ctx.a = a
            return x * (1 - a / size.clamp_min(a)).clamp_min(0)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            size = x.norm(dim=1, keepdim=True)
            keep = (1 - ctx.a / size.clamp_min(ctx.a)).clamp_min(0)
            grad_x = keep * grad_y
            if not wrong:
                unit = x / size.clamp_min(ctx.a)
                turned = ctx.a / size.clamp_min(ctx.a) * unit * (unit * grad_y).sum(1, keepdim=True)
                grad_x = grad_x + torch.where(size > ctx.a, turned, 0)
            return grad_x, None

    def group_shrink(x, a=0.5):
        sized("x", x, None, None)
        check(a > 0, "expected a > 0")
        return Shrink.apply(x, a)

    return group_shrink


add(
    "group_shrink_norm",
    shrink,
    lambda: (real(3, 4),),
    bug="The rows' norms are taken for constants",
)
