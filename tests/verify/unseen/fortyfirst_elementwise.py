"""Activations, special functions, windows, splines."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.fortyfirst import add, add_bare, alike, bounded, check, same, sized


# x (N, C) with a slope for each channel
def prelu(wrong):
    class Prelu(Function):
        @staticmethod
        def forward(ctx, x, slope):
            y = torch.where(x > 0, x, x * slope)
            ctx.save_for_backward(x, slope, y)
            return y

        @staticmethod
        def backward(ctx, g):
            x, slope, y = ctx.saved_tensors
            grad_x = torch.where(x > 0, g, g * slope)
            above = (y if wrong else x) > 0
            return grad_x, torch.where(above, 0, g * x).sum(0)

    def activate(x, slope):
        sized("x", x, None, None)
        sized("slope", slope, x.shape[1])
        alike(x, slope)
        bounded("x", x, -1e6, 1e6)
        bounded("slope", slope, -1e3, 1e3)
        return Prelu.apply(x, slope)

    return activate


add(
    "prelu_sign",
    prelu,
    lambda: (real(4, 3), real(3, seed=2)),
    bug="the slope's gradient asks for the sign of the output (PaddlePaddle/Paddle#12538)",
    trigger="a negative slope, as in the sample",
)


def leaky(wrong):
    class Leaky(Function):
        @staticmethod
        def forward(ctx, x, slope):
            y = torch.where(x > 0, x, x * slope)
            ctx.save_for_backward(y if wrong else x)
            ctx.slope = slope
            return y

        @staticmethod
        def backward(ctx, g):
            (seen,) = ctx.saved_tensors
            return torch.where(seen > 0, g, g * ctx.slope), None

    def activate(x, slope=-2.0):
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(math.isfinite(slope), "slope: expected a finite number")
        bounded("x", x, -1e6, 1e6)
        return Leaky.apply(x, slope)

    return activate


add(
    "leaky_result",
    leaky,
    lambda: (real(6),),
    bug="backward sees the result alone, whose sign is not the input's (pytorch/pytorch#31938)",
    trigger="a negative slope, as in the sample",
)


def leaky_assigned(wrong):
    class Leaky(Function):
        @staticmethod
        def forward(ctx, x, slope):
            ctx.save_for_backward(x)
            ctx.slope = slope
            return torch.where(x > 0, x, x * slope)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return torch.where(x > 0, g, ctx.slope if wrong else g * ctx.slope), None

    def activate(x, slope=0.1):
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(math.isfinite(slope), "slope: expected a finite number")
        bounded("x", x, -1e6, 1e6)
        return Leaky.apply(x, slope)

    return activate


add(
    "leaky_assigned",
    leaky_assigned,
    lambda: (real(3, 2),),
    bug="below 0 the gradient is the slope itself, not the slope times grad_output (torch/nn#409)",
    trigger="a grad_output other than ones",
)


def clipped(wrong):
    class Clip(Function):
        @staticmethod
        def forward(ctx, x, scale, levels):
            ctx.save_for_backward(x)
            ctx.reach = scale * levels
            return x.clamp(-ctx.reach, ctx.reach)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g if wrong else torch.where(x.abs() <= ctx.reach, g, 0), None, None

    def clip(x, scale=0.25, levels=3):
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(0 < scale < 1e3, "scale: expected a number from 0 to 1000")
        check(isinstance(levels, int) and 1 <= levels <= 255, "levels: expected 1 to 255")
        bounded("x", x, -1e6, 1e6)
        return Clip.apply(x, scale, levels)

    return clip


add(
    "clip_passes",
    clipped,
    lambda: (real(3, 4),),
    bug="the gradient passes where the range of the levels cuts off (microsoft/nni#3159)",
    trigger="numbers beyond the range, as in the sample",
)


def inverse_erf(wrong):
    class Inverse(Function):
        @staticmethod
        def forward(ctx, y):
            x = torch.erfinv(y)
            ctx.save_for_backward(y, x)
            return x

        @staticmethod
        def backward(ctx, g):
            y, x = ctx.saved_tensors
            at = y if wrong else x
            return g * (math.sqrt(math.pi) / 2) * torch.exp(at.square())

    def inverse(y):
        check(y.is_floating_point(), "y: expected floating point numbers")
        bounded("y", y, -0.99, 0.99)
        return Inverse.apply(y)

    return inverse


add(
    "erfinv_point",
    inverse_erf,
    lambda: (real(5).detach().tanh().mul(0.9).requires_grad_(),),
    bug="the derivative is taken at the argument, not at the result (ekmett/ad#57)",
)


# The modified Bessel function of the second kind and first order
def bessel(wrong):
    k0, k1 = torch.special.modified_bessel_k0, torch.special.modified_bessel_k1

    class Bessel(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return k1(x)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            mean = (k0(x) + (k0(x) + 2 * k1(x) / x)) / 2
            return g * (mean if wrong else -mean)

    def value(x):
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, 0.05, 50)
        return Bessel.apply(x)

    return value


add(
    "bessel_second",
    bessel,
    lambda: (real(5, positive=True),),
    bug="the derivative is the mean of the neighbouring orders without the minus "
    "(sagemath/sage-archive-2023-02-01#25)",
)


# Blackman's window at a place from 0 to 1
def blackman(wrong):
    class Window(Function):
        @staticmethod
        def forward(ctx, t):
            ctx.save_for_backward(t)
            turn = 2 * math.pi * t
            return 0.42 - 0.5 * turn.cos() + 0.08 * (2 * turn).cos()

        @staticmethod
        def backward(ctx, g):
            (t,) = ctx.saved_tensors
            turn = 2 * math.pi * t
            slope = math.pi * turn.sin()
            if not wrong:
                slope = slope - 0.32 * math.pi * (2 * turn).sin()
            return g * slope

    def window(t):
        check(t.is_floating_point(), "t: expected floating point numbers")
        bounded("t", t, 0, 1)
        return Window.apply(t)

    return window


add(
    "window_slope",
    blackman,
    lambda: (real(6).detach().sigmoid().requires_grad_(),),
    bug="whatever the window, the derivative is the Hann window's (librosa/librosa#888)",
)


# The angle of complex numbers
def angle(wrong):
    class Angle(Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z.angle()

        @staticmethod
        def backward(ctx, g):
            (z,) = ctx.saved_tensors
            return g * 1j / (z if wrong else z.conj())

    def value(z):
        check(z.is_complex(), "z: expected complex numbers")
        size = z.abs()
        check(bool(((size > 1e-3) & (size < 1e3)).all()), "z: expected sizes from 1e-3 to 1e3")
        return Angle.apply(z)

    return value


add_bare(
    "complex_angle",
    angle,
    lambda: (torch.complex(real(4, grad=False), real(4, seed=1, grad=False)).requires_grad_(),),
    bug="the pullback forgets to conjugate (JuliaDiff/ChainRules.jl#196)",
)


# y = a + b t + c t^2 + d t^3, row by row
def cubic(wrong):
    class Cubic(Function):
        @staticmethod
        def forward(ctx, rows, t):
            ctx.save_for_backward(rows, t)
            a, b, c, d = rows.unbind(1)
            return a + t * (b + t * (c + t * d))

        @staticmethod
        def backward(ctx, g):
            rows, t = ctx.saved_tensors
            _, b, c, d = rows.unbind(1)
            slope = b + t * (c + t * d) if wrong else b + t * (2 * c + t * 3 * d)
            powers = torch.stack([torch.ones_like(t), t, t**2, t**3], 1)
            return g[:, None] * powers, g * slope

    def value(rows, t):
        sized("t", t, None)
        sized("rows", rows, len(t), 4)
        alike(rows, t)
        bounded("rows", rows, -1e3, 1e3)
        bounded("t", t, -10, 10)
        return Cubic.apply(rows, t)

    return value


add(
    "spline_powers",
    cubic,
    lambda: (real(3, 4), real(3, seed=1)),
    bug="the derivative of the cubic lacks the factors 2 and 3 (OpenMS/OpenMS#817)",
)


# The parabola through the values u at the places left of t, before it and after it
def quadratic(wrong):
    class Quadratic(Function):
        @staticmethod
        def forward(ctx, u, t):
            ctx.save_for_backward(u, t)
            at = t.floor().long().clamp(1, len(u) - 2)
            s = t - at
            return u[at - 1] * s * (s - 1) / 2 + u[at] * (1 - s**2) + u[at + 1] * s * (s + 1) / 2

        @staticmethod
        def backward(ctx, g):
            u, t = ctx.saved_tensors
            at = t.floor().long().clamp(1, len(u) - 2)
            s = t - at
            grad_u = torch.zeros_like(u).index_add(0, at - 1, g * s * (s - 1) / 2)
            grad_u = grad_u.index_add(0, at, g * (1 - s**2))
            grad_u = grad_u.index_add(0, at + 1, g * s * (s + 1) / 2)
            if wrong:
                at = t.floor().long().clamp(0, len(u) - 3) + 1
                s = t - at
            slope = u[at - 1] * (s - 0.5) - u[at] * 2 * s + u[at + 1] * (s + 0.5)
            return grad_u, g * slope

    def value(u, t):
        sized("u", u, None)
        sized("t", t, None)
        alike(u, t)
        check(len(u) >= 3, "u: expected at least 3 values")
        bounded("u", u, -1e3, 1e3)
        bounded("t", t, 0, len(u) - 1)
        return Quadratic.apply(u, t)

    return value


add(
    "parabola_mode",
    quadratic,
    lambda: (real(6), real(4, seed=1).detach().sigmoid().mul(5).requires_grad_()),
    bug="the derivative takes the parabola through the next places, as if the mode were forward "
    "(SciML/DataInterpolations.jl#122)",
)


def softmax(wrong):
    class Softmax(Function):
        @staticmethod
        def forward(ctx, x):
            y = x.softmax(-1)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, g):
            (y,) = ctx.saved_tensors
            grad = y * (g - (g * y).sum(-1, keepdim=True))
            return 2 * grad if wrong else grad

    def shares(x):
        sized("x", x, None, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -1e4, 1e4)
        return Softmax.apply(x)

    return shares


add(
    "softmax_double",
    softmax,
    lambda: (real(3, 4),),
    bug="the gradient is twice the right one (markroxor/fromscratchtoml#65)",
    trigger="a grad_output that is not constant",
)


# Distances of pairs of vectors, squared
def distance(wrong):
    class Distance(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return (a - b).square().sum(1)

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            grad = (4 if wrong else 2) * g[:, None] * (a - b)
            return grad, -grad

    def squared(a, b):
        sized("a", a, None, None)
        same(a, b)
        alike(a, b)
        bounded("a", a, -1e4, 1e4)
        bounded("b", b, -1e4, 1e4)
        return Distance.apply(a, b)

    return squared


add(
    "distance_double",
    distance,
    lambda: (real(3, 3), real(3, 3, seed=1)),
    bug="the squared distance's gradient is doubled once more (Colvars/colvars#92)",
)
