"""Functions of single numbers."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtyfifth import add, alike, bounded, check, same, sized


# x where x >= 0, x / sqrt(1 + alpha x²) elsewhere
def isrlu(wrong):
    class Isrlu(Function):
        @staticmethod
        def forward(ctx, x, alpha):
            ctx.save_for_backward(x)
            ctx.alpha = alpha
            return torch.where(x >= 0, x, x * torch.rsqrt(1 + alpha * x * x))

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            root = torch.rsqrt(1 + ctx.alpha * x * x)
            slope = torch.where(x >= 0, torch.ones_like(x), root**3)
            return slope if wrong else g * slope, None

    def activate(x, alpha=1.0):
        alike(x)
        bounded("x", x, -1e3, 1e3)
        check(0 < alpha <= 100, "alpha: expected a number from 0 to 100")
        return Isrlu.apply(x, alpha)

    return activate


add(
    "isrlu_cotangent",
    isrlu,
    lambda: (real(3, 4),),
    bug="backward returns the slope, without grad_output (pytorch/pytorch#4355)",
    trigger="a grad_output that is not 1",
)


# a x + b
def affine(wrong):
    class Affine(Function):
        @staticmethod
        def forward(ctx, x, a, b):
            ctx.a, ctx.b = a, b
            return a * x + b

        @staticmethod
        def backward(ctx, g):
            return ctx.a * g + ctx.b if wrong else ctx.a * g, None, None

    def scale(x, a, b):
        alike(x)
        check(math.isfinite(a) and math.isfinite(b), "a, b: expected finite numbers")
        return Affine.apply(x, float(a), float(b))

    return scale


add(
    "affine_offset",
    affine,
    lambda: (real(2, 5),),
    kwargs=lambda: {"a": 3.0, "b": 0.5},
    bug="the gradient is a g + b: the function applied to the cotangent (aesara-devs/aesara#660)",
)


def tanh(wrong):
    class Tanh(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.tanh(x)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            if wrong:
                e = torch.exp(2 * x)
                return g * 4 * e / (e + 1) ** 2
            return g * (1 - torch.tanh(x) ** 2)

    def activate(x):
        alike(x)
        return Tanh.apply(x)

    return activate


add(
    "tanh_overflow",
    tanh,
    lambda: (real(3, 4),),
    bug="the slope is a quotient of exponentials: infinity over infinity (jax-ml/jax#764)",
    trigger="x so large that the square of exp(2 x) overflows",
)


# x log(1 + y), 0 where x is 0
def xlog1py(wrong):
    class Xlog1py(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return torch.where(x == 0, torch.zeros_like(x), x * torch.log1p(y))

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            slope = torch.log1p(y)
            if wrong:
                slope = torch.where(x == 0, torch.zeros_like(x), slope)
            return g * slope, g * x / (1 + y)

    def product(x, y):
        same(x, y)
        alike(x, y)
        bounded("x", x, -1e3, 1e3)
        bounded("y", y, -0.999, 1e6)
        return Xlog1py.apply(x, y)

    return product


add(
    "xlog1py_zero",
    xlog1py,
    lambda: (real(3, 4), real(3, 4, seed=1, positive=True)),
    bug="x's gradient is 0 where x is 0, in place of log(1 + y) (tensorflow/tensorflow#56873)",
    trigger="an x of 0",
)


# x to a whole power
def power(wrong):
    class Power(Function):
        @staticmethod
        def forward(ctx, x, n):
            ctx.save_for_backward(x)
            ctx.n = n
            return x**n

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * ctx.n * (x**ctx.n / x if wrong else x ** (ctx.n - 1)), None

    def raise_to(x, n):
        alike(x)
        bounded("x", x, -1e3, 1e3)
        check(isinstance(n, int) and 1 <= n <= 10, "n: expected an integer from 1 to 10")
        return Power.apply(x, n)

    return raise_to


add(
    "power_zero",
    power,
    lambda: (real(3, 4),),
    kwargs=lambda: {"n": 2},
    bug="the slope of the power of 0 is 0 / 0 (martinjrobins/diffsl#139)",
    trigger="an x of 0",
)


# base to the power x
def rpow(wrong):
    class Rpow(Function):
        @staticmethod
        def forward(ctx, x, base):
            ctx.save_for_backward(x)
            ctx.base = base
            return torch.pow(base, x)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            if wrong:
                return g * ctx.base * x ** (ctx.base - 1), None
            return g * torch.pow(ctx.base, x) * math.log(ctx.base), None

    def exponential(x, base=3.0):
        alike(x)
        bounded("x", x, -15, 15)
        check(1e-2 <= base <= 100, "base: expected a number from 0.01 to 100")
        return Rpow.apply(x, float(base))

    return exponential


add(
    "rpow_swapped",
    rpow,
    lambda: (real(3, 4),),
    bug="backward differentiates x to the power of the base (tenstorrent/tt-metal#52144)",
)


def silu(wrong):
    class Silu(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return F.silu(x)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            if wrong:
                e = torch.exp(-x)
                return g * (1 + e + x * e / (1 + e) ** 2)
            s = torch.sigmoid(x)
            return g * s * (1 + x * (1 - s))

    def activate(x):
        alike(x)
        bounded("x", x, -1e3, 1e3)
        return Silu.apply(x)

    return activate


add(
    "silu_parentheses",
    silu,
    lambda: (real(3, 4),),
    bug="only the sum's last term is divided, for want of parentheses (chelsea0x3b/dfdx#915)",
)


# The approximation with tanh
def gelu(wrong):
    def inner(x):
        return 0.7978845608028654 * (x + 0.044715 * x**3)

    class Gelu(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 0.5 * x * (1 + torch.tanh(inner(x)))

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            t = torch.tanh(inner(x))
            steep = 0.7978845608028654
            if not wrong:
                steep = steep * (1 + 3 * 0.044715 * x * x)
            return g * 0.5 * (1 + t + x * (1 - t * t) * steep)

    def activate(x):
        alike(x)
        bounded("x", x, -100, 100)
        return Gelu.apply(x)

    return activate


add(
    "gelu_cubic",
    gelu,
    lambda: (real(3, 4),),
    bug="the cubic term within tanh has no derivative (ravin-d-27/PyDeepFlow#89)",
)


def logistic(wrong):
    class Logistic(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.sigmoid(x)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            y = x if wrong else torch.sigmoid(x)
            return g * y * (1 - y)

    def activate(x):
        alike(x)
        return Logistic.apply(x)

    return activate


add(
    "logistic_input",
    logistic,
    lambda: (real(3, 4),),
    bug="x (1 - x) of the input, not of the sigmoid (kyle8998/Sudo-Productivity#3)",
)


# Positive numbers to any power
def positive_power(wrong):
    class Power(Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.save_for_backward(x)
            ctx.factor = factor
            return x**factor

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * ctx.factor * x ** (ctx.factor if wrong else ctx.factor - 1), None

    def raise_to(x, factor=2.5):
        alike(x)
        bounded("x", x, 1e-3, 1e3)
        check(-4 <= factor <= 4, "factor: expected a number from -4 to 4")
        return Power.apply(x, float(factor))

    return raise_to


add(
    "positive_power_factor",
    positive_power,
    lambda: (real(3, 4, positive=True),),
    bug="the slope keeps the exponent, which is not lowered by 1 (PaddlePaddle/Paddle#31699)",
)


# x where it is positive, the constant 0 elsewhere
def ramp(wrong):
    class Ramp(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.where(x <= 0, torch.zeros_like(x), x)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            nothing = torch.zeros_like(g)
            return nothing if wrong else torch.where(x <= 0, nothing, g)

    def activate(x):
        alike(x)
        return Ramp.apply(x)

    return activate


add(
    "ramp_constant",
    ramp,
    lambda: (real(3, 4),),
    bug="with the constant 0 in one branch the whole derivative is 0 (EnzymeAD/Enzyme#101)",
)


# x held within q steps of a learned size on both sides of 0 (a quantizer that does not round)
def held(wrong):
    class Hold(Function):
        @staticmethod
        def forward(ctx, x, step, q):
            ctx.save_for_backward(x, step)
            ctx.q = q
            return torch.clamp(x / step, -q, q) * step

        @staticmethod
        def backward(ctx, g):
            x, step = ctx.saved_tensors
            inside = (x / step).abs() <= ctx.q
            nothing = torch.zeros_like(g)
            grad_step = torch.where(inside, nothing, g * x.sign() * ctx.q).sum()
            return g if wrong else torch.where(inside, g, nothing), grad_step, None

    def hold(x, step, q=2):
        alike(x, step)
        sized("step", step)
        bounded("x", x, -1e3, 1e3)
        bounded("step", step, 1e-3, 1e3)
        check(isinstance(q, int) and q >= 1, "q: expected an integer >= 1")
        return Hold.apply(x, step, q)

    return hold


add(
    "held_outside",
    held,
    lambda: (real(3, 4, grad=False).tanh().requires_grad_(), real((), seed=3, positive=True)),
    bug="x's gradient passes where x lies outside the range (hustzxd/LSQuantization#1)",
    trigger="an x beyond the range",
)


# log of the normal distribution's cdf; y may be infinite
def normal_lcdf(wrong):
    def parts(y, mu, sigma):
        known = y.isfinite()
        z = torch.where(known, (torch.where(known, y, mu) - mu) / sigma, torch.zeros_like(mu))
        ratio = torch.exp(-z * z / 2 - torch.special.log_ndtr(z)) / math.sqrt(2 * math.pi)
        return known, z, ratio / sigma

    class Lcdf(Function):
        @staticmethod
        def forward(ctx, y, mu, sigma):
            ctx.save_for_backward(y, mu, sigma)
            return torch.special.log_ndtr((y - mu) / sigma)

        @staticmethod
        def backward(ctx, g):
            y, mu, sigma = ctx.saved_tensors
            known, z, ratio = parts(y, mu, sigma)
            ratio = torch.where(known, ratio, torch.zeros_like(ratio))
            if wrong:
                z = (y - mu) / sigma
            return g * ratio, -g * ratio, -g * ratio * z

    def lcdf(y, mu, sigma):
        same(y, mu, sigma)
        alike(y, mu, sigma)
        bounded("mu", mu, -1e3, 1e3)
        bounded("sigma", sigma, 1e-2, 1e3)
        check(bool((y.isposinf() | (y.abs() <= 1e6)).all()), "y: expected up to 1e6, or infinity")
        check(bool(((y - mu) / sigma >= -8).all()), "y: expected at least mu - 8 sigma")
        return Lcdf.apply(y, mu, sigma)

    return lcdf


add(
    "normal_lcdf_infinite",
    normal_lcdf,
    lambda: (real(2, 3, grad=False), real(2, 3, seed=1), real(2, 3, seed=2, positive=True)),
    bug="the scale's gradient is 0 times the infinite z (stan-dev/math#2881)",
    trigger="an infinite y",
    missed="the gradient is NaN at an infinite input, as torch's own is of the same formula",
)


# The lower regularized incomplete gamma function, by its series
def igamma(wrong):
    def terms(a, x):
        n = torch.arange(100, device=x.device, dtype=x.dtype)
        powers = (a[..., None] + n) * torch.log(x)[..., None] - x[..., None]
        return torch.exp(powers - torch.lgamma(a[..., None] + n + 1)), n

    class Igamma(Function):
        @staticmethod
        def forward(ctx, a, x):
            ctx.save_for_backward(a, x)
            return terms(a, x)[0].sum(-1)

        @staticmethod
        def backward(ctx, g):
            a, x = ctx.saved_tensors
            parts, n = terms(a, x)
            slope = torch.log(x)[..., None] - torch.digamma(a[..., None] + n + 1)
            grad_a = torch.zeros_like(a) if wrong else g * (parts * slope).sum(-1)
            return grad_a, g * torch.exp((a - 1) * torch.log(x) - x - torch.lgamma(a))

    def lower(a, x):
        same(a, x)
        alike(a, x)
        bounded("a", a, 0.05, 20)
        bounded("x", x, 0.01, 20)
        return Igamma.apply(a, x)

    return lower


add(
    "igamma_shape",
    igamma,
    lambda: (real(4, positive=True), real(4, seed=1, positive=True)),
    bug="the gradient by a is 0 (tensorflow/tensorflow#17995)",
)


# Binary cross-entropy of logits, one number each
def bce_logits(wrong):
    class Grad(Function):
        @staticmethod
        def forward(ctx, x, t, g):
            ctx.save_for_backward(x, t, g)
            return g * (torch.sigmoid(x) - t)

        @staticmethod
        def backward(ctx, v):
            x, t, g = ctx.saved_tensors
            s = torch.sigmoid(x)
            return v * g * s * (1 - s), None if wrong else -v * g, v * (s - t)

    class Loss(Function):
        @staticmethod
        def forward(ctx, x, t):
            ctx.save_for_backward(x, t)
            return F.softplus(x) - t * x

        @staticmethod
        def backward(ctx, g):
            x, t = ctx.saved_tensors
            return Grad.apply(x, t, g), -g * x

    def loss(x, t):
        same(x, t)
        alike(x, t)
        bounded("x", x, -15, 15)
        bounded("t", t, -10, 10)
        return Loss.apply(x, t)

    return loss


add(
    "bce_logits_mixed",
    bce_logits,
    lambda: (real(3, 4), real(3, 4, seed=1, grad=False).sigmoid().requires_grad_()),
    bug="the gradient's own derivative leaves the targets out (pytorch/pytorch#79609)",
    trigger="a second derivative by logits and targets",
)
