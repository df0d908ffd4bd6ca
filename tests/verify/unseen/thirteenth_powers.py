"""Powers, products and sums of exponentials."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirteenth import add


class Polynomial(Function):
    @staticmethod
    def powers(x, first, last):
        k = torch.arange(first, last, dtype=x.dtype, device=x.device)
        return k, x.unsqueeze(-1).pow(k)

    @staticmethod
    def forward(ctx, x, c):
        ctx.save_for_backward(x, c)
        return Polynomial.powers(x, 0, c.shape[0])[1] @ c

    @staticmethod
    def gradients(ctx, g, first):
        x, c = ctx.saved_tensors
        k, below = Polynomial.powers(x, first - 1, c.shape[0] - 1)
        slope = (c[first:] * (k + 1) * below).sum(-1)
        return g * slope, Polynomial.powers(x, 0, c.shape[0])[1].mT @ g

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Polynomial.gradients(ctx, g, 1)


class PolynomialConstant(Polynomial):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Polynomial.gradients(ctx, g, 0)


def _polynomial(function):
    def polynomial(x, c):
        """Sum of c[k] x^k of x (N,), with the coefficients c (K,), K > 0."""
        return function.apply(x, c)

    return polynomial


add(
    "polynomial_zero",
    _polynomial,
    PolynomialConstant,
    Polynomial,
    lambda: (real(4), real(3, seed=1)),
    bug="the constant's slope is 0 times 1 / x (jax-ml/jax#14745)",
    trigger="an x of 0",
)


class WeightedLogSumExp(Function):
    @staticmethod
    def forward(ctx, a, b):
        top = a.amax(-1, keepdim=True)
        out = top + (b * (a - top).exp()).sum(-1, keepdim=True).log()
        ctx.save_for_backward(a, b, out)
        return out.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, b, out = ctx.saved_tensors
        e = g.unsqueeze(-1) * (a - out).exp()
        return b * e, e


class WeightedLogSumExpMasked(WeightedLogSumExp):
    """A weight of 0 takes its element out."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, b, out = ctx.saved_tensors
        a = torch.where(b == 0, -torch.inf, a)
        e = g.unsqueeze(-1) * (a - out).exp()
        return b * e, e


def _weighted_log_sum_exp(function):
    def weighted_log_sum_exp(a, b):
        """log of the sum of b exp(a) over the last dimension, a and b (..., D), b >= 0 and not all of them 0."""
        return function.apply(a, b)

    return weighted_log_sum_exp


add(
    "logsumexp_weight_zero",
    _weighted_log_sum_exp,
    WeightedLogSumExpMasked,
    WeightedLogSumExp,
    lambda: (real(2, 3), real(2, 3, seed=1, positive=True)),
    bug="a weight of 0 gets no gradient (jax-ml/jax#22398)",
    trigger="a weight of exactly 0",
)


class Power(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x.pow(y)

    @staticmethod
    def log(x):
        return torch.where(x > 0, x, 1).log()  # x^y log(x) tends to 0

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * y * x.pow(y - 1), g * x.pow(y) * Power.log(x)


class PowerLog(Power):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * y * x.pow(y - 1), g * x.pow(y) * x.log()


def _power(function):
    def power(x, y):
        """x^y of x >= 0 and y >= 1, of one shape."""
        return function.apply(x, y)

    return power


add(
    "power_base_zero",
    _power,
    PowerLog,
    Power,
    lambda: (real(3, positive=True), (1.5 + real(3, seed=1, grad=False).abs()).requires_grad_()),
    bug="0 times log(0) in the exponent's gradient (tinygrad/tinygrad#155)",
    trigger="a base of 0",
)


class PointPower(Function):
    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(x)
        ctx.p = p
        return x.pow(p)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * ctx.p * x.pow(ctx.p - 1), None


class PointPowerRelu(PointPower):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.pow(ctx.p) > 0), None


def _point_power(function):
    def point_power(x, p=2.5):
        """x^p of x > 0 (any shape), the number p."""
        return function.apply(x, p)

    return point_power


add(
    "point_power",
    _point_power,
    PointPowerRelu,
    PointPower,
    lambda: (real(3, 2, positive=True),),
    bug="the gradient is relu's, copied (ahrefs/ocannl#73)",
    trigger="the sample",
)


class Multiply(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        ctx.same = x is y
        return x * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * y, g * x


class MultiplyOnce(Multiply):
    """Gradients go by tensor, each told once."""

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * y, None if ctx.same else g * x


def _multiply(function):
    def multiply(x, y):
        """x y of x and y of one shape."""
        return function.apply(x, y)

    return multiply


add(
    "multiply_same",
    _multiply,
    MultiplyOnce,
    Multiply,
    lambda: (real(3, 2), real(3, 2, seed=1)),
    bug="one of the two gradients, where both factors are one tensor (SciSharp/TensorFlow.NET#303)",
    trigger="multiply(x, x)",
)
