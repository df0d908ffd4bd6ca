"""Precision: dtypes of gradients, of constants and sums, and what cancels."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.fortysecond import add, alike, bounded, check, same, sized


# Heron's areas of triangles with sides a, b and c
def heron(wrong):
    def square(a, b, c):
        return (a + b + c) * (b + c - a) * (c + a - b) * (a + b - c)

    class Area(Function):
        @staticmethod
        def forward(ctx, a, b, c):
            ctx.save_for_backward(a, b, c)
            return square(a, b, c).sqrt() / 4

        @staticmethod
        def backward(ctx, g):
            a, b, c = ctx.saved_tensors
            if wrong:
                g, a, b, c = (t.float() for t in (g, a, b, c))
            part = g / (2 * square(a, b, c).sqrt())
            return (
                part * a * (b * b + c * c - a * a),
                part * b * (c * c + a * a - b * b),
                part * c * (a * a + b * b - c * c),
            )

    def area(a, b, c):
        same(a, b, c)
        alike(a, b, c)
        for name, t in {"a": a, "b": b, "c": c}.items():
            bounded(name, t, 1e-2, 100)
        least = torch.minimum(torch.minimum(b + c - a, c + a - b), a + b - c)
        bounded("the triangles' excess", least / (a + b + c), 1e-3, 1)
        return Area.apply(a, b, c)

    return area


def sides():
    return tuple((2 + real(4, seed=k, grad=False).tanh() / 2).requires_grad_() for k in range(3))


add(
    "heron_area_float32",
    heron,
    sides,
    bug="Backward returns a float32 gradient, whatever the sides' dtype",
    trigger="a tolerance below 1e-7, or the raw gradient's dtype",
)


# Quasi-hyperbolic discounting of rewards: reward / (1 + rate delay), and a factor beta on all that isn't at once
def discount(wrong):
    class Discount(Function):
        @staticmethod
        def forward(ctx, reward, rate, delay, beta):
            ctx.save_for_backward(reward, rate, delay)
            ctx.beta = beta
            value = reward / (1 + rate * delay)
            return torch.where(delay > 0, beta * value, value)

        @staticmethod
        def backward(ctx, g):
            reward, rate, delay = ctx.saved_tensors
            late = delay > 0
            one = torch.ones_like(g)
            factor = torch.where(late, ctx.beta, 1.0) if wrong else torch.where(late, ctx.beta, one)
            part = g * factor / (1 + rate * delay)
            return part, -(part * reward * delay / (1 + rate * delay)).sum(), None, None

    def discounted(reward, rate, delay, beta=0.7):
        same(reward, delay)
        sized("rate", rate)
        alike(reward, rate, delay)
        check(0 < beta <= 1, "beta: expected a number above 0, up to 1")
        check(not delay.requires_grad, "delay: expected delays without a gradient")
        bounded("reward", reward, -1e3, 1e3)
        bounded("rate", rate, 0, 100)
        bounded("delay", delay, 0, 1e3)
        return Discount.apply(reward, rate, delay, beta)

    return discounted


add(
    "discount_python_factor",
    discount,
    lambda: (
        real(6),
        torch.tensor(0.4, dtype=torch.float64, requires_grad=True),
        torch.tensor([0.0, 1.0, 2.0, 0.0, 3.5, 5.0], dtype=torch.float64),
    ),
    bug="torch.where of two Python numbers makes the factor a float32",
    trigger="a tolerance below 1e-8",
)


# The logarithmic mean (x - y) / log(x / y) of temperature differences at a heat exchanger's ends
def log_mean(wrong):
    def series(t):
        """Return (exp(-t) - 1 + t) / t^2 for small t."""
        total = term = torch.full_like(t, 0.5)
        for k in range(3, 18):
            term = -term * t / k
            total = total + term
        return total

    def slope(t):
        near = t.abs() < (0 if wrong else 1)
        far = torch.where(near, torch.ones_like(t), t)
        far = torch.where(far == 0, torch.ones_like(t), far)
        return torch.where(near | (t == 0), series(t), ((-far).exp() - 1 + far) / far.square())

    class LogMean(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            t = ((x - y) / y).log1p()
            safe = torch.where(t == 0, torch.ones_like(t), t)
            return torch.where(t == 0, y, y * safe.expm1() / safe)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            t = ((x - y) / y).log1p()
            return g * slope(t), g * slope(-t)

    def mean(x, y):
        same(x, y)
        alike(x, y)
        bounded("x", x, 0.1, 100)
        bounded("y", y, 0.1, 100)
        return LogMean.apply(x, y)

    return mean


add(
    "log_mean_cancels",
    log_mean,
    lambda: (real(5, positive=True), real(5, seed=1, positive=True)),
    bug="Backward takes exp(-t) - 1 + t over t^2 as it stands, which cancels for nearly equal ends",
    trigger="x and y within 1e-5 of each other",
)


# Mixed pooling of signals (B, T): a learned share of each window's maximum, the rest of its mean
def mixed_pooling(wrong):
    def wide(t):
        return t.to(torch.promote_types(t.dtype, torch.float32))

    class Pool(Function):
        @staticmethod
        def forward(ctx, x, share, size):
            ctx.save_for_backward(x, share)
            ctx.size = size
            cut, a = wide(x).unflatten(1, (-1, size)), wide(share)
            return (a * cut.amax(2) + (1 - a) * cut.mean(2)).to(x.dtype)

        @staticmethod
        def backward(ctx, g):
            x, share = ctx.saved_tensors
            g, a, cut = wide(g), wide(share), wide(x).unflatten(1, (-1, ctx.size))
            top = cut.argmax(2, keepdim=True)
            hit = torch.zeros_like(cut).scatter(2, top, 1.0)
            by_x = g[:, :, None] * (a * hit + (1 - a) / ctx.size)
            parts = g * (cut.gather(2, top)[:, :, 0] - cut.mean(2))
            if wrong:
                by_share = torch.zeros_like(share)
                for part in parts.flatten().to(share.dtype):
                    by_share = by_share + part
            else:
                by_share = parts.sum()
            return by_x.flatten(1).to(x.dtype), by_share.to(share.dtype), None

    def pooled(x, share, size=2):
        sized("x", x, None, None)
        sized("share", share)
        alike(x, share)
        check(isinstance(size, int) and 1 <= size <= x.shape[1], "size: expected a window within x")
        check(x.shape[1] % size == 0, "x: expected whole windows")
        bounded("x", x, -1e3, 1e3)
        bounded("share", share, 0, 1)
        return Pool.apply(x, share, size)

    return pooled


add(
    "mixed_pooling_narrow",
    mixed_pooling,
    lambda: (real(3, 6), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)),
    bug="The share's gradient is a running sum in its own dtype",
    trigger="float16 or bfloat16 and many windows",
    own=True,
)


# The gamma distribution's negative log likelihood of x with shapes and rates
def gamma_likelihood(wrong):
    class Gamma(Function):
        @staticmethod
        def forward(ctx, x, shape, rate):
            ctx.save_for_backward(x, shape, rate)
            return rate * x + shape.lgamma() - shape * rate.log() - (shape - 1) * x.log()

        @staticmethod
        def backward(ctx, g):
            x, shape, rate = ctx.saved_tensors
            logs = (x * rate).half().log().to(x.dtype) if wrong else (x * rate).log()
            by_x = g * (rate - (shape - 1) / x)
            return by_x, g * (shape.digamma() - logs), g * (x - shape / rate)

    def likelihood(x, shape, rate):
        same(x, shape, rate)
        alike(x, shape, rate)
        bounded("x", x, 0.1, 100)
        bounded("shape", shape, 0.1, 100)
        bounded("rate", rate, 0.1, 100)
        return Gamma.apply(x, shape, rate)

    return likelihood


add(
    "gamma_likelihood_half",
    gamma_likelihood,
    lambda: tuple(real(5, seed=k, positive=True) for k in range(3)),
    bug="The logarithm in the shapes' gradient is taken in float16",
    trigger="a tolerance below 1e-3",
)
