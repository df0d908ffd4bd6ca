"""Special functions, filters, transforms, complex numbers."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyeighth import add, add_bare, check, finite, one_dtype, sized


# Lambert's W on x >= 0: the w of w exp(w) = x
def lambert(wrong):
    class Lambert(Function):
        @staticmethod
        def forward(ctx, x):
            far = torch.where(x > 3, x, 3).log()
            w = torch.where(x > 3, far - far.log(), torch.log1p(x) * 0.8)
            for _ in range(20):
                w = (w * w + x * torch.exp(-w)) / (1 + w)
            ctx.save_for_backward(x, w)
            return w

        @staticmethod
        def backward(ctx, grad_w):
            x, w = ctx.saved_tensors
            return grad_w * (w / (x * (1 + w)) if wrong else torch.exp(-w) / (1 + w))

    def product_log(x):
        finite(x=x)
        check(bool((x >= 0).all()), "expected x >= 0")
        return Lambert.apply(x)

    return product_log


add(
    "lambert_zero",
    lambert,
    lambda: (real(3, 4, positive=True),),
    bug="Backward is w / (x (1 + w)), which is 0 / 0 at 0",
    trigger="x = 0",
)


# Langevin's function coth(x) - 1 / x
def langevin(wrong):
    even = 2 * torch.arange(1, 20, dtype=torch.float64)
    zeta = torch.special.zeta(even, 1).tolist()
    terms = [-2 * (-1) ** n * z / math.pi ** (2 * n) for n, z in enumerate(zeta, 1)]

    def value(x):
        small = x.abs() < 1
        near = torch.where(small, x, 0)
        series = torch.zeros_like(x)
        for term in reversed(terms):
            series = series * near * near + term
        far = torch.where(small, 1, x)
        t = torch.exp(-2 * far.abs())
        return torch.where(small, series * near, far.sign() * (1 + t) / (1 - t) - 1 / far)

    class Langevin(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return value(x)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return grad_y * (1 / x**2 - 1 / torch.sinh(x) ** 2)

    return lambda x: Langevin.apply(x) if wrong else value(x)


add(
    "langevin_small",
    langevin,
    lambda: (real(3, 4),),
    bug="Backward subtracts two squares that grow without bound at 0",
    trigger="x near 0",
)


# The modified Bessel function of order 1
def bessel(wrong):
    class Bessel(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.special.i1(x)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong:
                return grad_y * (torch.special.i0(x) - torch.special.i1(x) / x)
            away = torch.where(x == 0, 1, x)
            ratio = torch.where(x == 0, 0.5, torch.special.i1(away) / away)
            return grad_y * (torch.special.i0(x) - ratio)

    def function(x):
        check(bool((x.abs() <= 80).all()), "expected |x| <= 80")
        return Bessel.apply(x)

    return function


add(
    "bessel_origin",
    bessel,
    lambda: (real(3, 4),),
    bug="Backward divides the function by x",
    trigger="x = 0, where the slope is one half",
)


# The digamma function
def digamma(wrong):
    def slope(x):
        left = x < 0.5
        trigamma = torch.polygamma(1, torch.where(left, 1 - x, x))
        near = torch.where(left, x - x.detach().round(), 0.5)
        mirror = (math.pi / torch.sin(math.pi * near)) ** 2
        if wrong:
            return torch.where(x < 0, mirror + trigamma, torch.polygamma(1, x.clamp(min=1e-30)))
        return torch.where(left, mirror - trigamma, trigamma)

    class Digamma(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.digamma(x)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return grad_y * slope(x)

    def function(x):
        finite(x=x)
        check(bool(((x > 0) | (x != x.round())).all()), "expected no pole: 0, -1, -2, ...")
        return Digamma.apply(x)

    return function


add(
    "digamma_reflection",
    digamma,
    lambda: (real(3, 4, positive=True),),
    bug="The reflected slope is added, where it is subtracted",
    trigger="x < 0",
)


# Savitzky and Golay's filter: a parabola's value or derivative in windows of five
def savgol(wrong):
    def taps(order, like):
        place = torch.arange(-2, 3, dtype=torch.float64)
        fit = torch.linalg.pinv(torch.stack([place**0, place, place**2], -1))
        return (math.factorial(order) * fit[order]).to(like)

    def slide(x, h):
        return (x.unfold(-1, 5, 1) * h).sum(-1)

    class Savgol(Function):
        @staticmethod
        def forward(ctx, x, order):
            ctx.order = order
            return slide(x, taps(order, x))

        @staticmethod
        def backward(ctx, grad_y):
            h = taps(ctx.order, grad_y)
            wide = torch.nn.functional.pad(grad_y, (4, 4))
            return slide(wide, h if wrong else h.flip(0)), None

    def smooth(x, derivative=0):
        check(x.ndim >= 1 and x.shape[-1] >= 5, "expected rows of five numbers or more")
        check(derivative in (0, 1, 2), "expected the derivative 0, 1 or 2")
        return Savgol.apply(x, derivative)

    return smooth


add(
    "savgol_derivative",
    savgol,
    lambda: (real(2, 8),),
    bug="Backward does not turn the taps round, which are the same both ways for smoothing",
    trigger="derivative=1",
)


# A number with its magnitude raised to a power and its direction kept
def magnitude_power(wrong):
    class MagnitudePower(Function):
        @staticmethod
        def forward(ctx, z, power):
            ctx.save_for_backward(z)
            ctx.power = power
            return z * z.abs() ** (power - 1)

        @staticmethod
        def backward(ctx, grad_y):
            (z,) = ctx.saved_tensors
            size, more = z.abs() ** (ctx.power - 1), ctx.power - 1
            if wrong:
                return grad_y * ctx.power * size, None
            way = z.sgn()
            along = (way.conj() * grad_y).real if z.is_complex() else way * grad_y
            return size * grad_y + more * size * way * along, None

    def compress(z, power=2.0):
        one_dtype(z)
        check(power >= 1, "expected a power of at least 1")
        return MagnitudePower.apply(z, power)

    return compress


add_bare(
    "magnitude_power_complex",
    magnitude_power,
    lambda: (real(3, 4),),
    bug="Backward multiplies by the power in all directions, not along the number alone",
    trigger="complex numbers",
)


# Walsh and Hadamard's transform of rows whose length is a power of two
def hadamard(wrong):
    def sums(x):
        n, width = x.shape[-1], 1
        y = x
        while width < n:
            y = y.reshape(*x.shape[:-1], n // (2 * width), 2, width)
            first, second = y[..., 0, :], y[..., 1, :]
            y = torch.stack([first + second, first - second], -2)
            width *= 2
        return y.reshape(x.shape)

    class Hadamard(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return sums(x) / math.sqrt(x.shape[-1])

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad_y):
            return sums(grad_y) / math.sqrt(grad_y.shape[-1])

        @staticmethod
        def jvp(ctx, tangent_x):
            return sums(tangent_x) / (1 if wrong else math.sqrt(tangent_x.shape[-1]))

    def transform(x):
        n = x.shape[-1] if x.ndim else 0
        check(n >= 1 and n & (n - 1) == 0, "expected rows as long as a power of two")
        return Hadamard.apply(x)

    return transform


add(
    "hadamard_tangent",
    hadamard,
    lambda: (real(3, 4),),
    bug="The rule for forward mode does not divide by the root of the length",
    trigger="forward mode",
)


# An operator's expectation in a state, Re <s, H s>
def expectation(wrong):
    class Expectation(Function):
        @staticmethod
        def forward(ctx, h, s):
            ctx.save_for_backward(h, s)
            return torch.vdot(s, h @ s).real.clone()

        @staticmethod
        def backward(ctx, grad_e):
            h, s = ctx.saved_tensors
            grad_s = 2 * (h @ s) if wrong else h @ s + h.mH @ s
            return grad_e * torch.outer(s, s.conj()), grad_e * grad_s

    def expect(h, s):
        sized("s", s, None)
        sized("h", h, len(s), len(s))
        one_dtype(h, s)
        return Expectation.apply(h, s)

    return expect


def observable():
    h = torch.complex(real(3, 3, grad=False), real(3, 3, seed=1, grad=False))
    s = torch.complex(real(3, seed=2, grad=False), real(3, seed=3, grad=False))
    return ((h + h.mH) / 2).requires_grad_(), s.requires_grad_()


add_bare(
    "expectation_hermitian",
    expectation,
    observable,
    bug="The state's gradient is 2 H s, whatever the operator",
    trigger="an operator that is not Hermitian",
)
