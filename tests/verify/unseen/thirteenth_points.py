"""Functions of one argument that somebody got wrong at a point: at 0, close to it, or far away."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirteenth import add


class Silu(Function):
    @staticmethod
    def forward(ctx, x):
        y = x * x.sigmoid()
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        s = x.sigmoid()
        return g * (s + y * (1 - s))


class SiluRatio(Silu):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        s = y / x
        return g * (s + y * (1 - s))


def _silu(function):
    def silu(x):
        """x sigmoid(x) of x (any shape)."""
        return function.apply(x)

    return silu


add(
    "silu_zero",
    _silu,
    SiluRatio,
    Silu,
    lambda: (real(3, 4),),
    bug="the sigmoid is the output over the input, NaN at 0 (huggingface/candle#2083)",
    trigger="an input of 0",
)


class Softplus(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0) + (-x.abs()).exp().log1p()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.sigmoid()


class SoftplusBranches(Softplus):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * ((x > 0).to(x.dtype) - x.sign() * (-x.abs()).sigmoid())


def _softplus(function):
    def softplus(x):
        """log(1 + exp(x)) of x (any shape)."""
        return function.apply(x)

    return softplus


add(
    "softplus_zero",
    _softplus,
    SoftplusBranches,
    Softplus,
    lambda: (real(3, 4),),
    bug="max and abs are differentiated apart: 0 at 0, where 1/2 is due (jax-ml/jax#2107)",
    trigger="an input of 0",
)


class BesselI0(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.abs().exp() * torch.special.i0e(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.abs().exp() * torch.special.i1e(x)


class BesselI0Scaled(BesselI0):
    """The product rule on exp(|x|) i0e(x)."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        scaled = torch.special.i0e(x)
        slope = torch.where(x < 0, -1, 1)
        inner = torch.special.i1e(x) - x.sign() * scaled
        return g * x.abs().exp() * (slope * scaled + inner)


def _i0(function):
    def i0(x):
        """Modified Bessel function of order 0 of x (any shape)."""
        return function.apply(x)

    return i0


add(
    "i0_zero",
    _i0,
    BesselI0Scaled,
    BesselI0,
    lambda: (real(3, 4),),
    bug="two conventions for the slope of |x|: 1 at 0, where 0 is due (jax-ml/jax#40628)",
    trigger="an input of 0",
)


class FloorNorm(Function):
    @staticmethod
    def forward(ctx, x, floor):
        n = x.square().sum(-1, keepdim=True).sqrt()
        ctx.save_for_backward(x, n)
        ctx.floor = floor
        return n.clamp(min=floor).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, n = ctx.saved_tensors
        return g.unsqueeze(-1) * torch.where(n > ctx.floor, x / n, 0), None


class FloorNormMasked(FloorNorm):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, n = ctx.saved_tensors
        return g.unsqueeze(-1) * (n > ctx.floor) * (x / n), None


def _floor_norm(function):
    def floor_norm(x, floor=1e-3):
        """max(|x|, floor) of the vectors x (..., D), floor > 0."""
        return function.apply(x, floor)

    return floor_norm


add(
    "floor_norm",
    _floor_norm,
    FloorNormMasked,
    FloorNorm,
    lambda: (real(3, 2),),
    bug="0 times 0 / 0 below the floor, where the function is constant (ml-explore/mlx#3668)",
    trigger="a vector of zeros",
)


class Sinc(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sinc(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        z = math.pi * x
        s = z.square()
        near = -z / 3 * (1 - s / 10 * (1 - s / 28 * (1 - s / 54 * (1 - s / 88))))
        far = (z.cos() - torch.sinc(x)) / torch.where(x == 0, 1, z)
        return g * math.pi * torch.where(x.abs() < 0.1, near, far)


class SincQuotient(Sinc):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        z = math.pi * torch.where(x == 0, 1, x)
        return g * math.pi * torch.where(x == 0, 0, z.cos() / z - z.sin() / z.square())


def _sinc(function):
    def sinc(x):
        """sin(pi x) / (pi x) of x (any shape), 1 at 0."""
        return function.apply(x)

    return sinc


add(
    "sinc_tiny",
    _sinc,
    SincQuotient,
    Sinc,
    lambda: (real(3, 4),),
    bug="cos(z) / z less sin(z) / z²: nothing but rounding close to 0 (jax-ml/jax#40629)",
    trigger="inputs close to 0 (1e-16)",
)


class Sigmoid(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 1 / (1 + (-x).exp())

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.sigmoid() * (-x).sigmoid()


class SigmoidChain(Sigmoid):
    """Through the reciprocal, the sum and exp."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        e = (-x).exp()
        y = 1 / (1 + e)
        return g * y * y * e


def _sigmoid(function):
    def sigmoid(x):
        """1 / (1 + exp(-x)) of x (any shape, any size)."""
        return function.apply(x)

    return sigmoid


add(
    "sigmoid_chain",
    _sigmoid,
    SigmoidChain,
    Sigmoid,
    lambda: (real(3, 4),),
    bug="0 times the exp that overflowed (tinygrad/tinygrad#1113)",
    trigger="large negative inputs",
)


class ImaginaryPart(Function):
    @staticmethod
    def forward(ctx, z):
        return z.imag.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.complex(torch.zeros_like(g), g)


class ImaginaryPartNegative(ImaginaryPart):
    @staticmethod
    def backward(ctx, g):
        return torch.complex(torch.zeros_like(g), -g)


def _imag(function):
    def imaginary_part(z):
        """Imaginary part of the complex tensor z (any shape)."""
        return function.apply(z)

    return imaginary_part


add(
    "imaginary_part",
    _imag,
    ImaginaryPartNegative,
    ImaginaryPart,
    lambda: (torch.complex(real(3, grad=False), real(3, seed=1, grad=False)).requires_grad_(),),
    bug="the sign of imag's gradient (ml-explore/mlx#2366)",
    trigger="the sample",
)
