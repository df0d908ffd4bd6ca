"""Edges of the domain, kinks, constants."""

import torch
import torch.nn.functional as F

from tests.verify.known import rand, register
from tests.verify.known.elementwise import Pointwise
from tests.verify.known.elementwise_pairs import T


class Softplus(Pointwise):
    @staticmethod
    def forward(x):
        return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.sigmoid(x)


class SoftplusOverflow(Softplus):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.exp(x) / (1 + torch.exp(x))


class SafeSqrt(Pointwise):
    @staticmethod
    def forward(x):
        return x.clamp(min=0).sqrt()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        pos = x > 0
        return torch.where(pos, g * 0.5 / torch.where(pos, x, 1).sqrt(), 0)


class SafeSqrtNaN(SafeSqrt):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x > 0) * 0.5 / x.sqrt()


class Leaky(Pointwise):
    @staticmethod
    def forward(x):
        return torch.where(x > 0, x, 0.1 * x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, g, 0.1 * g)


class LeakyScalars(Leaky):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.where(x > 0, 1.0, 0.1)  # two Python scalars make a float32 tensor


class LeakyKink(Leaky):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * ((x >= 0).to(g.dtype) + 0.1 * (x <= 0).to(g.dtype))


register(
    "overflow_to_nan",
    "coverage",
    SoftplusOverflow.fn,
    Softplus.fn,
    T,
    reference=F.softplus,
    gradcheck=False,
    bug="exp overflows, gradient becomes NaN",
    trigger="large input (x > 710; > 88 in float32)",
)
register(
    "where_nan",
    "coverage",
    SafeSqrtNaN.fn,
    SafeSqrt.fn,
    rand((3, 4), low=0.1),
    gradcheck=False,
    bug="0 * inf: NaN leaks out of the masked branch",
    trigger="x <= 0",
)
register(
    "where_scalars_float32",
    "precision",
    LeakyScalars.fn,
    Leaky.fn,
    T,
    gradcheck=False,
    reference=lambda x: F.leaky_relu(x, 0.1),
    bug="torch.where of two Python scalars is float32: slope 0.1 is off by 1.5e-8",
    trigger="tolerance below 1e-8",
)
register(
    "kink_outside_subgradient",
    "coverage",
    LeakyKink.fn,
    Leaky.fn,
    T,
    gradcheck=False,
    reference=lambda x: F.leaky_relu(x, 0.1),
    bug="gradient at 0 is 1.1, outside [0.1, 1]",
    trigger="x == 0",
)
