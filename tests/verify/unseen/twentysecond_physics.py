"""Forces, line shapes, hyperbolas, normal distributions."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentysecond import add, check, read


# The force on a chain: minus the gradient of sum(x^4) / 4 + sum of squared differences / 2
def chain_force(wrong):
    def energy(x):
        return (x**4).sum() / 4 + (x[1:] - x[:-1]).square().sum() / 2

    def force(x):
        check(x.ndim == 1 and len(x) >= 1, "expected the places of a chain")
        if wrong:
            orders = torch.is_grad_enabled()
            with torch.enable_grad():
                x.requires_grad_(True)
                return -torch.autograd.grad(energy(x), x, create_graph=orders)[0]
        bend = x[1:] - x[:-1]
        none = torch.zeros_like(x[:1])
        return torch.cat([bend, none]) - torch.cat([none, bend]) - x**3

    return force


add(
    "chain_force_flag",
    chain_force,
    lambda: (real(5),),
    bug="The caller's tensor is made to require a gradient, and the result with it",
    trigger="places that require no gradient",
)


# Lorentz's line: 1 / (1 + x^2)
def lorentz(wrong):
    class Lorentz(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 1 / (1 + x * x)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong:
                grad_y = read(grad_y, x.stride())
            return -2 * grad_y * (x / (1 + x * x)) / (1 + x * x)

    return lambda x: Lorentz.apply(x)


add(
    "lorentz_stride",
    lorentz,
    lambda: (real(3, 4),),
    bug="One set of strides, those of x, is given to the kernel for both tensors",
    trigger="torch.cat, a transposition or sum() after the function",
)


# sqrt(1 + x^2), with a rule for forward mode
def hyperbola(wrong):
    def slope(x):
        return x / torch.hypot(x, torch.ones_like(x))

    class Hyperbola(Function):
        @staticmethod
        def forward(x):
            return torch.hypot(x, torch.ones_like(x))

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
            return tangent_x.mul_(slope(x)) if wrong else tangent_x * slope(x)

    return lambda x: Hyperbola.apply(x)


add(
    "hyperbola_tangent",
    hyperbola,
    lambda: (real(3, 4),),
    bug="The rule for forward mode writes over the tangent that it is given",
    trigger="forward mode with a tangent that is used again",
)


# The normal distribution function
def normal(wrong):
    class Normal(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return torch.special.ndtr(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return grad_y * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def distribution(x):
        if wrong and not torch.is_grad_enabled():
            return torch.sigmoid(1.702 * x)
        return Normal.apply(x)

    return distribution


add(
    "normal_inference",
    normal,
    lambda: (real(3, 4),),
    bug="Without gradients the function is another, a fast approximation",
    trigger="a value under torch.no_grad() compared with that of training",
)
