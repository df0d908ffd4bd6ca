"""Numerics: what a formula that is right on paper still gets wrong."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import pair, real

X = lambda: (real(3, 4),)  # noqa: E731
K = math.sqrt(2 / math.pi)


class GeluTanh(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 0.5 * x * (1 + (K * (x + 0.044715 * x**3)).tanh())

    @staticmethod
    def pull(x, k):
        t = (k * (x + 0.044715 * x**3)).tanh()
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * GeluTanh.pull(x, K)


class GeluTanhConstant(GeluTanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * GeluTanh.pull(x, torch.tensor(K))  # float32: the default dtype


pair(
    "gelu_float32_constant",
    GeluTanhConstant.apply,
    GeluTanh.apply,
    X,
    "a constant rounded to float32",
)


class LogCosh(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.abs() + torch.nn.functional.softplus(-2 * x.abs()) - math.log(2)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.tanh()


class LogCoshRatio(LogCosh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.sinh() / x.cosh()


pair("log_cosh_overflow", LogCoshRatio.apply, LogCosh.apply, X, "inf / inf for large inputs")


class SoftSignNorm(Function):
    """x / (1 + |x|), row by row, |x| the norm of the row."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x / (1 + x.norm(dim=-1, keepdim=True))

    @staticmethod
    def pull(ctx, g, tiny):
        (x,) = ctx.saved_tensors
        n = x.norm(dim=-1, keepdim=True)
        return g / (1 + n) - x * (g * x).sum(-1, keepdim=True) / (n.clamp(min=tiny) * (1 + n) ** 2)

    @staticmethod
    def backward(ctx, g):
        return SoftSignNorm.pull(ctx, g, 1e-300)


class SoftSignNormZero(SoftSignNorm):
    @staticmethod
    def backward(ctx, g):
        return SoftSignNorm.pull(ctx, g, 0.0)


pair(
    "norm_of_zero",
    SoftSignNormZero.apply,
    SoftSignNorm.apply,
    X,
    "0 / 0 at a row of zeros, where forward is smooth",
)


class Expm1OverX(Function):
    """(exp(x) - 1) / x, 1 at 0."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(x == 0, 1.0, torch.expm1(x) / torch.where(x == 0, 1.0, x))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.where(x.abs() < 1e-3, 1.0, x)
        near = 0.5 + x / 3 + x * x / 8 + x**3 / 30
        return g * torch.where(x.abs() < 1e-3, near, (s.exp() - s.expm1() / s) / s)


class Expm1OverXNaive(Expm1OverX):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x * x.exp() - x.expm1()) / (x * x)


pair("expm1_over_x_at_zero", Expm1OverXNaive.apply, Expm1OverX.apply, X, "0 / 0 at 0")


class MeanSquareHalf(Function):
    """Root mean square of each row; the square is taken in float32 in forward."""

    @staticmethod
    def forward(ctx, x):
        wide = x if x.dtype == torch.float64 else x.float()
        r = (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        ctx.save_for_backward(x)
        return (x * r).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        w, v = x.to(wide), g.to(wide)
        r = (w.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return (r * v - r**3 * w * (w * v).mean(-1, keepdim=True)).to(x.dtype)


class MeanSquareOverflow(MeanSquareHalf):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        r = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return r * g - r**3 * x * (x * g).mean(-1, keepdim=True)


pair(
    "rms_fp16_square",
    MeanSquareOverflow.apply,
    MeanSquareHalf.apply,
    X,
    "float16: the square overflows beyond 256",
)


class BiasSum(Function):
    """x + b; the bias' gradient is summed in blocks of 32 rows."""

    @staticmethod
    def forward(ctx, x, b):
        return x + b

    @staticmethod
    def backward(ctx, g):
        return g, g.sum(0)


class BiasSumRunning(BiasSum):
    @staticmethod
    def backward(ctx, g):
        total = torch.zeros_like(g[0])
        for part in g.split(32):
            total = total + part.sum(0)
        return g, total


pair(
    "bias_running_sum",
    BiasSumRunning.apply,
    BiasSum.apply,
    lambda: (real(4, 3), real(3, seed=1)),
    "bfloat16: partial sums are added in bfloat16",
)


class ReluEmpty(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        grad = torch.zeros_like(g)
        grad[x > 0] = g[x > 0]
        return grad


class ReluUninitialised(ReluEmpty):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        grad = torch.empty_like(g)
        grad[x > 0] = g[x > 0]
        return grad


pair(
    "uninitialised", ReluUninitialised.apply, ReluEmpty.apply, X, "where x <= 0 nothing is written"
)
