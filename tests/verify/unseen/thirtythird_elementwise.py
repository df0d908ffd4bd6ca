"""Activations, colours, response curves."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirtythird import add, bounded, check, same, sized


# ELiSH: x sigmoid(x) above 0, (exp(x) - 1) sigmoid(x) below
def elish(wrong):
    class Elish(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.where(x >= 0, x, x.clamp(max=0).expm1()) * x.sigmoid()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            s, low = x.sigmoid(), x.clamp(max=0)
            above = s * (1 + x * (1 - s))
            below = s * low.exp() if wrong else s * (low.exp() + low.expm1() * (1 - s))
            return grad_y * torch.where(x >= 0, above, below)

    def function(x):
        bounded("x", x, -1e4, 1e4)
        return Elish.apply(x)

    return function


add(
    "elish_below",
    elish,
    lambda: (real(3, 4),),
    bug="Below 0 the derivative of the sigmoid is left out",
)


# (exp(x) - 1) / x, the first function of exponential integrators
def phi(wrong):
    class Phi(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            divisor = torch.where(x == 0, 1, x)
            return torch.where(x == 0, 1, x.expm1() / divisor)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            near = x == 0 if wrong else x.abs() < 1
            far = torch.where(near, 1, x)
            inside = torch.where(near, x, 0)
            slope = torch.zeros_like(x)
            for k in range(20, 0, -1):
                slope = slope * inside + k / math.factorial(k + 1)
            return grad_y * torch.where(near, slope, (far.exp() * (far - 1) + 1) / far**2)

    def function(x):
        bounded("x", x, -40, 40)
        return Phi.apply(x)

    return function


add(
    "phi_one_cancels",
    phi,
    lambda: (real(3, 4),),
    bug="The quotient rule's numerator cancels near 0; the series is used at 0 alone",
    trigger="numbers near 0, or float32",
)


# Hill's response (d / k)^n / (1 + (d / k)^n) to doses
def hill(wrong):
    class Hill(Function):
        @staticmethod
        def forward(ctx, dose, half, n):
            ctx.save_for_backward(dose, half, n)
            r = (dose / half) ** n
            return r / (1 + r)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            dose, half, n = ctx.saved_tensors
            ratio = dose / half
            r = ratio**n
            y = r / (1 + r)
            bent = y * (1 - y)
            grad_dose = grad_y * n * ratio ** (n - 1) / (half * (1 + r) ** 2)
            grad_half = -(grad_y * bent).sum() * n / half
            logs = ratio.log() if wrong else torch.where(ratio > 0, ratio, 1).log()
            return grad_dose, grad_half, (grad_y * bent * logs).sum()

    def function(dose, half, n):
        sized("half", half)
        sized("n", n)
        bounded("dose", dose, 0, 100)
        bounded("half", half, 0.1, 100)
        bounded("n", n, 1, 4)
        return Hill.apply(dose, half, n)

    return function


add(
    "hill_no_dose",
    hill,
    lambda: (
        real(5, positive=True),
        torch.tensor(0.8, dtype=torch.float64, requires_grad=True),
        torch.tensor(2.5, dtype=torch.float64, requires_grad=True),
    ),
    bug="The exponent's gradient takes the logarithm of a dose of 0: 0 * inf",
    trigger="a dose of 0, the control group",
)


# sqrt(x² + 1) - 1 with a rule for forward mode
def pseudo_abs(wrong):
    class PseudoAbs(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return (x.square() + 1).sqrt() - 1

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return grad_y * x / (x.square() + 1).sqrt()

        @staticmethod
        def jvp(ctx, tangent):
            (x,) = ctx.saved_tensors
            below = x.square() + 1
            return tangent * x / (below if wrong else below.sqrt())

    def function(x):
        bounded("x", x.detach(), -1e6, 1e6)
        return PseudoAbs.apply(x)

    return function


add(
    "pseudo_abs_tangent",
    pseudo_abs,
    lambda: (real(3, 4),),
    bug="The rule for forward mode leaves the root out",
    trigger="forward mode",
)


# Saturation (max - min) / max of colours in the last dimension, of dark ones over 1 / 255
def saturation(wrong):
    floor = 1 / 255

    class Saturation(Function):
        @staticmethod
        def forward(ctx, rgb):
            ctx.save_for_backward(rgb)
            high, low = rgb.amax(-1), rgb.amin(-1)
            return (high - low) / high.clamp(min=floor)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (rgb,) = ctx.saved_tensors
            high, at_high = rgb.max(-1, keepdim=True)
            low, at_low = rgb.min(-1, keepdim=True)
            g = grad_y[..., None]
            bright = torch.ones_like(high, dtype=torch.bool) if wrong else high > floor
            divisor = high if wrong else high.clamp(min=floor)
            by_high = torch.where(bright, low / divisor, 1) / divisor
            grad = torch.zeros_like(rgb).scatter_add(-1, at_high, g * by_high)
            return grad.scatter_add(-1, at_low, -g / divisor)

    def function(rgb):
        check(rgb.ndim >= 1 and rgb.shape[-1] == 3, "rgb: expected three channels last")
        bounded("rgb", rgb, -1e4, 1e4)
        return Saturation.apply(rgb)

    return function


add(
    "saturation_black",
    saturation,
    lambda: (
        torch.rand(
            4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ).requires_grad_(),
    ),
    bug="backward divides by the largest channel without forward's floor",
    trigger="a black or very dark pixel",
)


# CIE L* of a luminance: 116 f(t) - 16 with a cube root above (6/29)³ and a line below
def lightness(wrong):
    edge = (6 / 29) ** 3
    rise = (29 / 6) ** 2 / 3

    class Lightness(Function):
        @staticmethod
        def forward(ctx, t):
            ctx.save_for_backward(t)
            root = t.clamp(min=edge) ** (1 / 3)
            return 116 * torch.where(t > edge, root, rise * t + 4 / 29) - 16

        @staticmethod
        def backward(ctx, grad_y):
            (t,) = ctx.saved_tensors
            if wrong:
                return grad_y * 116 / 3 * t ** (-2 / 3)
            slope = t.clamp(min=edge) ** (-2 / 3) / 3
            return grad_y * 116 * torch.where(t > edge, slope, rise)

    def function(t):
        bounded("t", t, 0, 100)
        return Lightness.apply(t)

    return function


add(
    "lightness_dark",
    lightness,
    lambda: (real(3, 4, positive=True),),
    bug="backward knows the cube root alone, not the line below (6/29)³",
    trigger="a dark or black pixel",
)


# The share a / (a + b)
def share(wrong):
    class Share(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a / (a + b)

        @staticmethod
        def backward(ctx, grad_y):
            a, b = ctx.saved_tensors
            total = a + b
            if wrong:
                return grad_y * b / total**2, -grad_y * a / total**2
            g = grad_y / total
            return g * (b / total), -g * (a / total)

    def function(a, b):
        same(a, b)
        check(a.dtype == b.dtype, "expected one dtype")
        bounded("a", a, 1e-3, 2e4)
        bounded("b", b, 1e-3, 2e4)
        return Share.apply(a, b)

    return function


add(
    "share_square_half",
    share,
    lambda: (real(3, 4, positive=True), real(3, 4, seed=1, positive=True)),
    bug="The quotient rule's square of the sum overflows float16",
    trigger="float16 and a sum above 256",
    own=True,
    missed="an overflow in float16, in which forward computes too",
)
