"""Functions of single numbers: activations, rates, curves."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyninth import add, bounded, check


# Hard mish: x / 2 times x + 2, held between 0 and 2
def hard_mish(wrong):
    class HardMish(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x / 2 * (x + 2).clamp(0, 2)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            middle = x / 2 + 1 if wrong else x + 1
            slope = torch.where(x >= 0, 1, torch.where(x > -2, middle, 0))
            return grad_y * slope

    def function(x):
        bounded("x", x, -1e6, 1e6)
        return HardMish.apply(x)

    return function


add(
    "hard_mish_middle",
    hard_mish,
    lambda: (real(3, 4),),
    bug="The product's other term is missing in the middle piece",
)


# The inverse of softplus, for x > 0
def inverse_softplus(wrong):
    class Inverse(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x + torch.log(-torch.expm1(-x))

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong:
                return grad_y * torch.exp(x) / torch.expm1(x)
            return -grad_y / torch.expm1(-x)

    def inverse(x):
        check(bool((x > 0).all()), "x: expected positive numbers")
        return Inverse.apply(x)

    return inverse


add(
    "inverse_softplus_large",
    inverse_softplus,
    lambda: (real(3, 4, positive=True),),
    bug="Forward never takes exp(x), backward divides two of them",
    trigger="x above 710, above 89 in float32",
)


# The logit of a probability that is held eps away from 0 and 1
def held_logit(wrong):
    class Logit(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(p, eps):
            return torch.logit(p.clamp(eps, 1 - eps))

        @staticmethod
        def setup_context(ctx, inputs, output):
            p, ctx.eps = inputs
            ctx.save_for_backward(p)

        @staticmethod
        def backward(ctx, grad_y):
            (p,) = ctx.saved_tensors
            q = p.clamp(ctx.eps, 1 - ctx.eps)
            grad_p = grad_y / (q * (1 - q))
            if not wrong:
                grad_p = torch.where((p > ctx.eps) & (p < 1 - ctx.eps), grad_p, 0)
            return grad_p, None

    def logit(p, eps=1e-3):
        check(0 < eps < 0.5, "eps: expected a number between 0 and 1 / 2")
        bounded("p", p, 0, 1)
        return Logit.apply(p, eps)

    return logit


add(
    "held_logit_ends",
    held_logit,
    lambda: ((0.1 + 0.8 * torch.sigmoid(real(3, 4))).detach().requires_grad_(),),
    bug="Backward gives probabilities beyond eps the slope at eps",
    trigger="a probability that is held",
)


# Inverse square root unit: x / sqrt(1 + a x^2) with one learned a
def inverse_root_unit(wrong):
    class Unit(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, a):
            return x * torch.rsqrt(1 + a * x * x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            x, a = ctx.saved_tensors
            r = torch.rsqrt(1 + a * x * x)
            share = (x * r) ** 3 if wrong else (x * r) ** 3 / 2
            return grad_y * r**3, -(grad_y * share).sum()

    def unit(x, a):
        check(a.ndim == 0 and bool((a >= 0) & (a <= 1e3)), "a: expected one number, 0 to 1000")
        bounded("x", x, -1e6, 1e6)
        return Unit.apply(x, a)

    return unit


add(
    "inverse_root_unit_half",
    inverse_root_unit,
    lambda: (real(3, 4), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)),
    bug="The learned curvature's gradient is without the root's 1/2",
)


# ReLU that ends at 6, with a rule for forward mode
def relu_six(wrong):
    class Six(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.clamp(0, 6)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return torch.where((x > 0) & (x < 6), grad_y, 0)

        @staticmethod
        def jvp(ctx, tangent_x):
            (x,) = ctx.saved_tensors
            on = x > 0 if wrong else (x > 0) & (x < 6)
            return torch.where(on, tangent_x, 0)

    return lambda x: Six.apply(x)


add(
    "relu_six_tangent",
    relu_six,
    lambda: (real(3, 4),),
    bug="The rule for forward mode was copied from ReLU",
    trigger="forward mode and x above 6",
)


# GELU with a backward of its own, which has a backward of its own
def gelu_twice(wrong):
    def density(x):
        return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    class Slope(Function):
        @staticmethod
        def forward(ctx, x, grad_y):
            ctx.save_for_backward(x, grad_y)
            return grad_y * (torch.special.ndtr(x) + x * density(x))

        @staticmethod
        def backward(ctx, g):
            x, grad_y = ctx.saved_tensors
            bend = (1 if wrong else 2) * density(x) - x * x * density(x)
            return g * grad_y * bend, g * (torch.special.ndtr(x) + x * density(x))

    class Gelu(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * torch.special.ndtr(x)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return Slope.apply(x, grad_y)

    def gelu(x):
        bounded("x", x, -1e6, 1e6)
        return Gelu.apply(x)

    return gelu


add(
    "gelu_twice_bend",
    gelu_twice,
    lambda: (real(3, 4),),
    bug="The second derivative has one of two equal terms",
    trigger="a second derivative",
)


# The current through a membrane: x / (1 - exp(-x)), 1 at 0
def membrane_current(wrong):
    class Current(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            zero = x == 0
            return torch.where(zero, 1, -x / torch.expm1(-torch.where(zero, 1, x)))

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong:
                d = -torch.expm1(-x)
                return grad_y * (d - x * torch.exp(-x)) / (d * d)
            # 1/2 + the odd part: x / (1 - exp(-x)) = x / 2 + (x / 2) coth(x / 2)
            near = x.abs() < 0.5
            a = torch.where(near, x, 0)
            q = a * a
            bernoulli = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160)
            odd = sum(b * 2 * (k + 1) * q**k for k, b in enumerate(bernoulli)) * a
            odd = odd + -691 / 1307674368000 * 12 * q**5 * a + 1 / 74724249600 * 14 * q**6 * a
            b = torch.where(near, 1, x)
            t = torch.tanh(b / 2)
            # 1 / sinh^2 = (1 - t^2) / t^2, with exp(-|b|), which does not overflow
            e = torch.exp(-b.abs())
            sinh2 = 4 * e / (1 - e) ** 2
            far = 0.5 / t - b / 4 * sinh2
            return grad_y * (0.5 + torch.where(near, odd, far))

    def current(x):
        bounded("x", x, -500, 500)
        return Current.apply(x)

    return current


add(
    "membrane_current_rest",
    membrane_current,
    lambda: (real(3, 4),),
    bug="Forward knows the quotient's limit, backward's is 0 / 0 there and a difference of like numbers near it",
    trigger="x = 0 and x near it, such as 1e-12",
)
