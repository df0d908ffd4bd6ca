"""Losses."""

import math
from itertools import permutations

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.twentyseventh import add, check, indices, positive, same, sized


# Tweedie: the mean of exp((2 - p) x) / (2 - p) - t exp((1 - p) x) / (1 - p) for 1 < p < 2
def tweedie(wrong):
    class Tweedie(Function):
        @staticmethod
        def forward(ctx, x, t, power):
            ctx.save_for_backward(x, t)
            (Tweedie if wrong else ctx).power = power
            a, b = 1 - power, 2 - power
            return ((b * x).exp() / b - t * (a * x).exp() / a).mean()

        @staticmethod
        def backward(ctx, grad_y):
            x, t = ctx.saved_tensors
            power = (Tweedie if wrong else ctx).power
            a, b = 1 - power, 2 - power
            g = grad_y / x.numel()
            return g * ((b * x).exp() - t * (a * x).exp()), -g * (a * x).exp() / a, None

    def loss(x, t, power=1.5):
        same(x, t)
        check(x.numel() > 0, "expected one number at least")
        check(1 < power < 2, "power: expected a number between 1 and 2")
        return Tweedie.apply(x, t, power)

    return loss


add(
    "tweedie_power",
    tweedie,
    lambda: (real(3, 4), real(3, 4, seed=1, positive=True)),
    bug="The power is kept on the class, where the next call puts its own",
    trigger="two calls with different powers before backward",
)


# Cauchy: the sum of log(1 + (x / c)² / 2), with one learned c
def cauchy(wrong):
    class Cauchy(Function):
        @staticmethod
        def forward(ctx, x, c):
            ctx.save_for_backward(x, c)
            return torch.log1p((x / c).square() / 2).sum()

        @staticmethod
        def backward(ctx, grad_y):
            x, c = ctx.saved_tensors
            grad_x = grad_c = None
            if ctx.needs_input_grad[0] or not wrong:
                z = x / c
                slope = grad_y * z / (1 + z.square() / 2)
                grad_x = slope / c
                grad_c = -(slope * z).sum() / c
            return grad_x, grad_c

    def loss(x, c):
        sized("c", c)
        positive("c", c)
        return Cauchy.apply(x, c)

    return loss


add(
    "cauchy_frozen",
    cauchy,
    lambda: (real(3, 4), torch.tensor(1.5, dtype=F64, requires_grad=True)),
    bug="The width's gradient is computed where the errors need one",
    trigger="x.requires_grad False, as with the residuals of a frozen model",
)


# Ordinal regression: the sum of -log of the product of P(t > k) = sigmoid(x - b_k) or 1 - P for each k,
# b the running sum of a_0, exp(a_1), ...
def ordinal(wrong):
    def bounds(a):
        return torch.cat([a[:1], a[1:].exp()])

    class Ordinal(Function):
        @staticmethod
        def forward(ctx, x, a, t):
            ctx.save_for_backward(x, a, t)
            z = x[:, None] - bounds(a).cumsum(0)
            above = t[:, None] > torch.arange(len(a), device=t.device)
            return -F.logsigmoid(torch.where(above, z, -z)).sum()

        @staticmethod
        def backward(ctx, grad_y):
            x, a, t = ctx.saved_tensors
            z = x[:, None] - bounds(a).cumsum(0)
            above = t[:, None] > torch.arange(len(a), device=t.device)
            g = grad_y * torch.where(above, -torch.sigmoid(-z), torch.sigmoid(z))
            grad_b = -g.sum(0)
            inner = a.exp() if wrong else torch.cat([torch.ones_like(a[:1]), a[1:].exp()])
            return g.sum(1), grad_b.flip(0).cumsum(0).flip(0) * inner, None

    def loss(x, a, t):
        sized("x", x, None)
        sized("a", a, None)
        sized("t", t, len(x))
        indices("t", t, len(a) + 1)
        return Ordinal.apply(x, a, t)

    return loss


add(
    "ordinal_first",
    ordinal,
    lambda: (real(4), torch.zeros(3, dtype=F64, requires_grad=True), torch.tensor([0, 3, 1, 2])),
    bug="The first bound gets the exponential's factor too, which is for the steps that follow",
    trigger="a first bound that is not 0",
)


# Scale-invariant ratio of signal and noise, in decibels, one for each row
def signal_noise(wrong):
    tiny = 1e-8

    def parts(x, t):
        power = t.square().sum(1, keepdim=True)
        dot = (x * t).sum(1, keepdim=True)
        return dot, power

    class Ratio(Function):
        @staticmethod
        def forward(ctx, x, t):
            ctx.save_for_backward(x, t)
            dot, power = parts(x, t)
            s = dot / (power + tiny) * t
            return 10 * ((s.square().sum(1) + tiny) / ((x - s).square().sum(1) + tiny)).log10()

        @staticmethod
        def backward(ctx, grad_y):
            x, t = ctx.saved_tensors
            dot, power = parts(x, t)
            power = power if wrong else power + tiny
            a = dot / power
            s = a * t
            e = x - s
            factor = 20 / math.log(10) * grad_y[:, None]
            grad_s = factor * s / (s.square().sum(1, keepdim=True) + tiny)
            grad_e = -factor * e / (e.square().sum(1, keepdim=True) + tiny)
            grad_a = ((grad_s - grad_e) * t).sum(1, keepdim=True)
            grad_t = a * (grad_s - grad_e) + grad_a * (x - 2 * a * t) / power
            return grad_e + grad_a * t / power, grad_t

    def ratio(x, t):
        sized("x", x, None, None)
        same(x, t)
        return Ratio.apply(x, t)

    return ratio


add(
    "signal_noise_silent",
    signal_noise,
    lambda: (real(2, 5), real(2, 5, seed=1)),
    bug="Backward divides by the target's power without forward's 1e-8",
    trigger="a silent target",
)


# The mean squared error of separated sources in their best order, which each sample has for itself
def best_order(wrong):
    def orders(x, t):
        each = list(permutations(range(x.shape[1])))
        errors = torch.stack([(x - t[:, list(p)]).square().sum((1, 2)) for p in each], 1)
        place = torch.tensor(each, device=x.device)[errors.argmin(1)]
        return place[:1].expand_as(place) if wrong else place

    class Best(Function):
        @staticmethod
        def forward(ctx, x, t):
            ctx.save_for_backward(x, t)
            each = permutations(range(x.shape[1]))
            errors = [(x - t[:, list(p)]).square().sum((1, 2)) for p in each]
            return torch.stack(errors).amin(0).sum() / x.numel()

        @staticmethod
        def backward(ctx, grad_y):
            x, t = ctx.saved_tensors
            place = orders(x, t)
            rows = torch.arange(len(x), device=x.device)[:, None]
            grad_x = grad_y * 2 / x.numel() * (x - t[rows, place])
            return grad_x, -grad_x[rows, place.argsort(1)]

    def loss(x, t):
        sized("x", x, None, None, None)
        same(x, t)
        check(x.shape[1] <= 4, "x: expected four sources at most")
        return Best.apply(x, t)

    return loss


add(
    "best_order_first",
    best_order,
    lambda: (real(1, 2, 3), real(1, 2, 3, seed=1)),
    bug="Backward takes the first sample's order for the batch",
    trigger="samples with several orders",
)
