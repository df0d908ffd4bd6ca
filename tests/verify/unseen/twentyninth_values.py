"""Finance, densities, means, and what a backward may write to."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentieth import HALF
from tests.verify.unseen.twentyninth import add, bounded, check, same, sized


def single(t):
    return t.float() if t.dtype in HALF else t


# The value of 1 a year for T years at a rate: (1 - exp(-rate T)) / rate
def annuity(wrong):
    def factor(x):
        """(1 - exp(-x)) / x, 1 at 0."""
        zero = x == 0
        return torch.where(zero, 1, -torch.expm1(-x) / torch.where(zero, 1, x))

    class Annuity(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(rate, years):
            return years * factor(rate * years)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            rate, years = ctx.saved_tensors
            x = rate * years
            grad_years = grad_y * torch.exp(-x)
            if wrong:
                zero = x == 0
                safe = torch.where(zero, 1, x)
                slope = (torch.exp(-x) * (1 + x) - 1) / (safe * safe)
                slope = torch.where(zero, -0.5, slope)
                return grad_y * years**2 * slope, grad_years
            near = x.abs() < 1
            a = torch.where(near, x, 0)
            series = sum((-1) ** k * k / math.factorial(k + 1) * a ** (k - 1) for k in range(1, 20))
            b = torch.where(near, 1, x)
            slope = torch.where(near, series, (torch.exp(-b) * (1 + b) - 1) / (b * b))
            return grad_y * years**2 * slope, grad_years

    def value(rate, years):
        same(rate, years)
        bounded("rate", rate, -0.5, 5)
        bounded("years", years, 0, 100)
        return Annuity.apply(rate, years)

    return value


add(
    "annuity_small_rate",
    annuity,
    lambda: (
        (0.2 * torch.sigmoid(real(3, 4))).detach().requires_grad_(),
        real(3, 4, seed=1, positive=True),
    ),
    bug="Backward knows the limit at 0, not that its difference rounds to nothing near it",
    trigger="a rate such as 1e-8, or 1e-4 in float32",
    missed="in float64 only for numbers far smaller than the sample's",
)


# The undiscounted price of an option on a forward
def option(wrong):
    class Price(Function):
        generate_vmap_rule = True

        @staticmethod
        def places(f, k, s):
            a = (f / k).log() / s
            return a + s / 2, a - s / 2

        @staticmethod
        def forward(f, k, s, put):
            side = -1 if put else 1
            up, down = (torch.special.ndtr(side * d) for d in Price.places(f, k, s))
            return side * (f * up - k * down)

        @staticmethod
        def setup_context(ctx, inputs, output):
            *tensors, ctx.put = inputs
            ctx.save_for_backward(*tensors)

        @staticmethod
        def backward(ctx, grad_y):
            f, k, s = ctx.saved_tensors
            side = -1 if ctx.put else 1
            d, e = Price.places(f, k, s)
            vega = f * torch.exp(-d * d / 2) / math.sqrt(2 * math.pi)
            slope_f = side * torch.special.ndtr(side * d)
            slope_k = -torch.special.ndtr(e) if wrong else -side * torch.special.ndtr(side * e)
            return grad_y * slope_f, grad_y * slope_k, grad_y * vega, None

    def price(f, k, s, put=False):
        same(f, k, s)
        bounded("f", f, 1e-2, 1e3)
        bounded("k", k, 1e-2, 1e3)
        bounded("s", s, 1e-2, 10)
        return Price.apply(f, k, s, put)

    return price


add(
    "option_puts",
    option,
    lambda: tuple(real(3, 4, seed=i, positive=True) for i in range(3)),
    bug="The slope in the strike is the call's for a put too",
    trigger="put=True; the default is a call",
)


# The price of a bond that pays a coupon m times a year, at a yield compounded as often
def bond(wrong):
    class Bond(Function):
        @staticmethod
        def forward(ctx, rate, coupon, periods, m):
            ctx.save_for_backward(rate, coupon)
            ctx.periods, ctx.m = periods, m
            n = torch.arange(1, periods + 1, dtype=rate.dtype, device=rate.device)
            d = (1 + rate[..., None] / m) ** -n
            return coupon / m * d.sum(-1) + d[..., -1]

        @staticmethod
        def backward(ctx, grad_y):
            rate, coupon = ctx.saved_tensors
            m = ctx.m
            n = torch.arange(1, ctx.periods + 1, dtype=rate.dtype, device=rate.device)
            base = 1 + rate[..., None] / m
            d = base**-n
            slope = -n / m * (d if wrong else d / base)
            grad_rate = coupon / m * slope.sum(-1) + slope[..., -1]
            return grad_y * grad_rate, grad_y * d.sum(-1) / m, None, None

    def price(rate, coupon, periods=6, m=2):
        same(rate, coupon)
        check(1 <= periods <= 400 and m >= 1, "periods: expected 1 to 400; m: 1 at least")
        bounded("rate", rate, 0, 1)
        bounded("coupon", coupon, -10, 10)
        return Bond.apply(rate, coupon, periods, m)

    return price


add(
    "bond_compounded",
    bond,
    lambda: (
        (0.2 * torch.sigmoid(real(3))).detach().requires_grad_(),
        real(3, seed=1, positive=True),
    ),
    bug="The slope is that of continuous compounding: one discount is missing",
)


# The log density of an inverse Gaussian
def inverse_gaussian(wrong):
    class Density(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, mean, shape):
            d = (x - mean) / mean
            return (shape / (2 * math.pi * x**3)).log() / 2 - shape * d * d / (2 * x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            x, mean, shape = ctx.saved_tensors
            grad_x = -1.5 / x - shape * (1 / mean**2 - 1 / x**2) / 2
            grad_mean = shape * (x - mean) / mean ** (2 if wrong else 3)
            grad_shape = 0.5 / shape - ((x - mean) / mean) ** 2 / (2 * x)
            return grad_y * grad_x, grad_y * grad_mean, grad_y * grad_shape

    def density(x, mean, shape):
        same(x, mean, shape)
        for name, t in (("x", x), ("mean", mean), ("shape", shape)):
            bounded(name, t, 1e-2, 1e3)
        return Density.apply(x, mean, shape)

    return density


add(
    "inverse_gaussian_mean",
    inverse_gaussian,
    lambda: tuple(real(3, 4, seed=i, positive=True) for i in range(3)),
    bug="The mean's gradient divides by its square, where the cube belongs",
)


# The mean of each row with weights, in float32 for half types
def weighted_mean(wrong):
    class Mean(Function):
        @staticmethod
        def forward(ctx, x, w):
            y = (single(x) * single(w)).sum(-1) / single(w).sum(-1)
            y = y.to(x.dtype)
            ctx.save_for_backward(x, w, y)
            return y

        @staticmethod
        def backward(ctx, grad_y):
            x, w, y = ctx.saved_tensors
            wide_x, wide_w = single(x), single(w)
            total = wide_w.sum(-1, keepdim=True)
            kept = single(y)[..., None]
            y = kept if wrong else (wide_x * wide_w).sum(-1, keepdim=True) / total
            g = single(grad_y)[..., None] / total
            return (g * wide_w).to(x.dtype), (g * (wide_x - y)).to(w.dtype)

    def mean(x, w):
        same(x, w)
        check(x.ndim >= 1 and x.shape[-1] >= 1, "x: expected one number a row at least")
        if x.dtype != w.dtype:
            raise TypeError(f"expected one type, got {x.dtype} and {w.dtype}")
        bounded("x", x, -1e3, 1e3)
        bounded("w", w, 1e-2, 1e2)
        return Mean.apply(x, w)

    return mean


add(
    "weighted_mean_rounded",
    weighted_mean,
    lambda: (real(3, 4), real(3, 4, seed=1, positive=True)),
    bug="Backward subtracts the mean that was rounded for the output",
    trigger="bfloat16 or float16 and rows far from 0, such as 100 and 101",
    own=True,
    missed="within what rounding in bfloat16 explains",
)


# Numbers below a threshold are cut off
def cut(wrong):
    class Cut(Function):
        @staticmethod
        def forward(ctx, x, threshold):
            low = x <= threshold
            ctx.save_for_backward(low)
            return x.masked_fill(low, 0)

        @staticmethod
        def backward(ctx, grad_y):
            (low,) = ctx.saved_tensors
            if wrong:
                return grad_y.contiguous().masked_fill_(low, 0), None
            return grad_y.masked_fill(low, 0), None

    def function(x, threshold=0.0):
        return Cut.apply(x, float(threshold))

    return function


add(
    "cut_written",
    cut,
    lambda: (real(3, 4),),
    bug="Backward fills what contiguous() returns, which is grad_output itself where that is contiguous",
    trigger="a grad_output that is used again or compared",
)


# The mean of each piece of a sequence, of which the last piece may be short
def grid_mean(wrong):
    class Mean(Function):
        @staticmethod
        def forward(ctx, x, size):
            ctx.shape, ctx.size = x.shape, size
            return F.avg_pool1d(x, size, ceil_mode=True, count_include_pad=False)

        @staticmethod
        def backward(ctx, grad_y):
            length = ctx.shape[-1]
            place = torch.arange(length, device=grad_y.device) // ctx.size
            count = torch.full((grad_y.shape[-1],), ctx.size, device=grad_y.device)
            if not wrong:
                count = count.clamp(max=length - ctx.size * torch.arange(len(count)).to(count))
            return (grad_y / count)[..., place], None

    def mean(x, size=2):
        sized("x", x, None, None, None)
        check(1 <= size <= x.shape[2], "size: expected 1 to the length")
        return Mean.apply(x, size)

    return mean


add(
    "grid_mean_last",
    grid_mean,
    lambda: (real(2, 3, 6),),
    bug="Backward divides the last piece's gradient by a whole piece's size",
    trigger="a length that the size does not divide",
)
