"""Elementwise functions."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.eighteenth import add


class SinTimes(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x.sin() * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return x.cos() * g * y, x.sin() * g


class SinTimesMinus(SinTimes):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return x.cos() * g * y, -x.sin() * g


def _sin_times(function):
    def sin_times(x, y):
        """sin(x) y of x and y of one shape."""
        return function.apply(x, y)

    return sin_times


add(
    "sin_times_sign",
    _sin_times,
    SinTimesMinus,
    SinTimes,
    lambda: (real(4), real(4, seed=1)),
    bug="the tutorial's second gradient has a minus (jax-ml/jax#13048)",
    trigger="the sample",
)


class Power(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x**y

    @staticmethod
    def gradients(ctx, g, log):
        x, y = ctx.saved_tensors
        return g * y * x ** (y - 1), g * x**y * log(x)

    @staticmethod
    def backward(ctx, g):
        return Power.gradients(ctx, g, lambda x: x.where(x > 0, 1).log())


class PowerZero(Power):
    @staticmethod
    def backward(ctx, g):
        return Power.gradients(ctx, g, torch.log)


def _power(function):
    def power(x, y):
        """x to the power of y, of one shape; x >= 0, y > 0."""
        return function.apply(x, y)

    return power


add(
    "power_zero",
    _power,
    PowerZero,
    Power,
    lambda: (real(4, positive=True), real(4, seed=1, positive=True)),
    bug="the exponent's gradient of a base 0 is 0 times -inf (ml-explore/mlx#628)",
    trigger="a base of 0",
)


class Sign(Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return v.sign()

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g)


class SignAbs(Sign):
    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0].sign() * g


def _sign(function):
    def sign(v):
        """The sign of each element of vectors (N, 3)."""
        return function.apply(v)

    return sign


add(
    "sign_abs",
    _sign,
    SignAbs,
    Sign,
    lambda: (real(4, 3),),
    bug="the gradient is that of the absolute value (NVIDIA/warp#1466)",
    trigger="the sample",
)


class Subtract(Function):
    @staticmethod
    def forward(ctx, a, b):
        return a - b

    @staticmethod
    def backward(ctx, g):
        return g, -g


class SubtractPlus(Subtract):
    @staticmethod
    def backward(ctx, g):
        return g, g.clone()


def _subtract(function):
    def subtract(a, b):
        """a - b of one shape."""
        return function.apply(a, b)

    return subtract


add(
    "subtract_sign",
    _subtract,
    SubtractPlus,
    Subtract,
    lambda: (real(4), real(4, seed=1)),
    bug="the second value's gradient is without its minus (KhawajaAbaid/micrograd_c#1)",
    trigger="the sample",
)


class MulN(Function):
    @staticmethod
    def forward(ctx, n, x):
        ctx.n = n
        x.mul_(n)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return None, g * ctx.n


class MulNTwo(MulN):
    @staticmethod
    def forward(ctx, n, x):
        ctx.n = n
        x.mul_(2)
        ctx.mark_dirty(x)
        return x


def _mul_n(function):
    def mul_n(x, n):
        """n times x."""
        return function.apply(n, x.clone())

    return mul_n


add(
    "mul_n_two",
    _mul_n,
    MulNTwo,
    MulN,
    lambda: (real(4), 6),
    bug="forward multiplies by 2, backward by n (pytorch/pytorch#132601)",
    trigger="the sample",
)
