"""Elementwise functions."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyfifth import add, add_bare, check, leaf, same


# The Gudermannian function: y = 2 arctan(tanh(x / 2)), y' = 1 / cosh(x)
def gudermannian(wrong):
    class Gudermannian(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return 2 * (x / 2).tanh().atan()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            e = x.exp() if wrong else torch.where(x > 0, -x, x).exp()
            return grad_y * 2 * e / (1 + e * e)

    return lambda x: Gudermannian.apply(x)


add(
    "gudermannian_large",
    gudermannian,
    lambda: (real(3, 4),),
    bug="The derivative is a quotient of exp(x) and exp(2 x), which both overflow",
    trigger="large x (above 709; 88 in float32)",
)


# Hard swish: y = x min(max(x + 3, 0), 6) / 6
def hard_swish(wrong):
    class HardSwish(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x * (x + 3).clamp(0, 6) / 6

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            middle = torch.where((x >= -3) & (x <= 3), (2 * x + 3) / 6, 0)
            above = (x >= 3) if wrong else (x > 3)
            return grad_y * (middle + above)

    return lambda x: HardSwish.apply(x)


add(
    "hard_swish_kink",
    hard_swish,
    lambda: (real(3, 4),),
    bug="At 3 the slopes of both pieces are added: 2.5, where 1 and 1.5 would do",
    trigger="x = 3",
)


# x between two bounds that are tensors; the upper one wins, as in torch.clamp
def bounded(wrong):
    class Bounded(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, low, high):
            return torch.minimum(torch.maximum(x, low), high)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            x, low, high = ctx.saved_tensors
            below = (x < low) if wrong else (x < low) & (low <= high)
            above = (x > high) if wrong else (torch.maximum(x, low) > high)
            inside = (x >= low) & (x <= high)
            return tuple(torch.where(m, grad_y, 0) for m in (inside, below, above))

    def clamp(x, low, high):
        same(x, low, high)
        return Bounded.apply(x, low, high)

    return clamp


add(
    "bounded_crossed",
    bounded,
    lambda: (real(3, 4), leaf(real(3, 4, seed=1) - 3), leaf(real(3, 4, seed=2) + 3)),
    bug="Backward never thought of a lower bound above the upper one, where only the upper one counts",
    trigger="bounds that cross",
)


# A smooth step between two edges: t = (x - a) / (b - a) in [0, 1], y = t^2 (3 - 2 t)
def smooth_step(wrong):
    class SmoothStep(Function):
        @staticmethod
        def forward(ctx, x, a, b):
            ctx.save_for_backward(x, a, b)
            t = ((x - a) / (b - a)).clamp(0, 1)
            return t * t * (3 - 2 * t)

        @staticmethod
        def backward(ctx, grad_y):
            x, a, b = ctx.saved_tensors
            grad_x = grad_a = grad_b = None
            t = ((x - a) / (b - a)).clamp(0, 1)
            slope = grad_y * 6 * t * (1 - t) / (b - a)
            if ctx.needs_input_grad[0]:
                grad_x = slope
            needs_a, needs_b = ctx.needs_input_grad[1:]
            if (needs_a and needs_b) if wrong else (needs_a or needs_b):
                grad_a, grad_b = (slope * (t - 1)).sum(), -(slope * t).sum()
            return grad_x, grad_a, grad_b

    def step(x, a, b):
        check(a.ndim == 0 and b.ndim == 0, "a, b: expected single numbers")
        check(bool((a < b).all()), "expected a < b")
        return SmoothStep.apply(x, a, b)

    return step


add(
    "smooth_step_edges",
    smooth_step,
    lambda: (real(3, 4), leaf(real(()) - 2), leaf(real(()) + 1)),
    bug="The edges' gradients are computed where both are asked for, not where one is",
    trigger="one edge that is fixed",
)


# Softsign: y = x / (1 + |x|), y' = 1 / (1 + |x|)^2
def softsign(wrong):
    class Softsign(Function):
        @staticmethod
        def forward(ctx, x):
            d = 1 + x.abs()
            ctx.save_for_backward(x, d)
            return x / d

        @staticmethod
        def backward(ctx, grad_y):
            x, d = ctx.saved_tensors
            if not wrong:
                d = 1 + x.abs()
            return grad_y / d / d

    return lambda x: Softsign.apply(x)


add(
    "softsign_denominator",
    softsign,
    lambda: (real(3, 4),),
    bug="The denominator is kept from forward, to which a second derivative does not lead back",
    trigger="double backward",
)


# A signed power: y = sign(x) |x|^p for p >= 1
def signed_power(wrong):
    class SignedPower(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, p):
            return x.sign() * x.abs() ** p

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            x, p = ctx.saved_tensors
            size = x.abs()
            log = size.log() if wrong else torch.where(size == 0, 1, size).log()
            return grad_y * p * size ** (p - 1), grad_y * x.sign() * size**p * log

    def power(x, p):
        same(x, p)
        check(bool(((p >= 1) & (p <= 20)).all()), "p: expected numbers from 1 to 20")
        return SignedPower.apply(x, p)

    return power


add(
    "signed_power_zero",
    signed_power,
    lambda: (real(3, 4), leaf(real(3, 4, seed=1, positive=True) + 1)),
    bug="The exponent's gradient is 0 times the logarithm of 0",
    trigger="x = 0",
)


# TanhExp: y = x tanh(exp(x))
def tanh_exp(wrong):
    def slope(x):
        e = x.clamp(max=20).exp()
        t = e.tanh()
        return t + x * e * (1 - t * t)

    class TanhExp(Function):
        @staticmethod
        def forward(x):
            return x * x.exp().tanh()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return grad_y * slope(x)

        @staticmethod
        def jvp(ctx, tangent_x):
            (x,) = ctx.saved_tensors
            return tangent_x * (x.exp().tanh() if wrong else slope(x))

    return lambda x: TanhExp.apply(x)


add(
    "tanh_exp_tangent",
    tanh_exp,
    lambda: (real(3, 4),),
    bug="The rule for forward mode takes the gate for constant",
    trigger="forward mode",
)


# The modulus of complex numbers: y = |z|
def modulus(wrong):
    class Modulus(Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z.abs()

        @staticmethod
        def backward(ctx, grad_y):
            (z,) = ctx.saved_tensors
            return grad_y * (z / z.abs() if wrong else z.sgn())

    def absolute(z):
        if not z.is_complex():
            raise TypeError(f"z: expected complex numbers, got {z.dtype}")
        return Modulus.apply(z)

    return absolute


add_bare(
    "modulus_silence",
    modulus,
    lambda: (
        torch.complex(real(3, 4, grad=False), real(3, 4, seed=1, grad=False)).requires_grad_(),
    ),
    bug="The direction of a number is z / |z|, 0 / 0 for a silent bin of a spectrum",
    trigger="z = 0",
)


# x |x| with a backward that is a Function of its own: y' = 2 |x|, y'' = 2 sign(x)
def signed_square(wrong):
    class Slope(Function):
        @staticmethod
        def forward(ctx, grad_y, x):
            ctx.save_for_backward(grad_y, x)
            return 2 * grad_y * x.abs()

        @staticmethod
        def backward(ctx, grad):
            grad_y, x = ctx.saved_tensors
            return 2 * grad * x.abs(), 2 * grad * grad_y * (1 if wrong else x.sign())

    class SignedSquare(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x.abs()

        @staticmethod
        def backward(ctx, grad_y):
            return Slope.apply(grad_y, *ctx.saved_tensors)

    return lambda x: SignedSquare.apply(x)


add(
    "signed_square_second",
    signed_square,
    lambda: (real(3, 4),),
    bug="The second derivative has lost the sign",
    trigger="double backward at negative x",
)
