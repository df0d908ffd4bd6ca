"""Normalisations fused with a residual, a gate or a product."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentieth import HALF, add, check, same, sized

EPS = 1e-6


def rms(x):
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def rms_backward(x, g):
    """Gradient of x / rms(x)."""
    r = rms(x)
    n = x * r
    return r * (g - n * (g * n).mean(-1, keepdim=True))


def rows_and_weight(x, w):
    check(x.ndim >= 1 and w.shape == x.shape[-1:], "expected x (*, D) and w (D)")


def over_rows(t):
    return t.reshape(-1, t.shape[-1]).sum(0)


# s = x + residual, y = s / rms(s) w
def added_norm(wrong):
    class Norm(Function):
        @staticmethod
        def forward(ctx, x, residual, w):
            same(x, residual)
            rows_and_weight(x, w)
            s = x + residual
            ctx.save_for_backward(x, residual, w)
            return s * rms(s) * w, s

        @staticmethod
        def backward(ctx, grad_y, grad_s):
            x, residual, w = ctx.saved_tensors
            s = x + residual
            before, after = (grad_s, 0) if wrong else (0, grad_s)
            grad = rms_backward(s, (grad_y + before) * w) + after
            return grad, grad, over_rows(grad_y * s * rms(s))

    return lambda x, residual, w: Norm.apply(x, residual, w)


add(
    "added_norm",
    added_norm,
    lambda: (real(3, 4), real(3, 4, seed=1), real(4, seed=2)),
    bug="quack (pull request 53): the sum's own gradient is added before the norm's backward, not"
    " after it",
)


def added_norm_alone(wrong):
    class Norm(Function):
        @staticmethod
        def forward(ctx, x, residual, w, prenorm):
            same(x, residual)
            rows_and_weight(x, w)
            s = x + residual
            ctx.save_for_backward(x, residual, w)
            ctx.prenorm = prenorm
            y = s * rms(s) * w
            return (y, s) if prenorm else y

        @staticmethod
        def backward(ctx, grad_y, grad_s=None):
            x, residual, w = ctx.saved_tensors
            s = x + residual
            grad = rms_backward(s, grad_y * w)
            if ctx.prenorm:
                grad = grad + grad_s
            grad_residual = None if wrong and not ctx.prenorm else grad
            return grad, grad_residual, over_rows(grad_y * s * rms(s)), None

    return lambda x, residual, w, prenorm=True: Norm.apply(x, residual, w, prenorm)


add(
    "added_norm_alone",
    added_norm_alone,
    lambda: (real(3, 4), real(3, 4, seed=1), real(4, seed=2)),
    bug="quack (pull request 52): no gradient for the residual where the sum is not returned",
    trigger="prenorm=False",
    kwargs=lambda: {"prenorm": True},
)


# out = (x / rms(x) w silu(gate)) m'
def gated_norm(wrong):
    silu = torch.nn.functional.silu

    class Norm(Function):
        @staticmethod
        def forward(ctx, x, gate, w, m):
            same(x, gate)
            sized("x", x, None, None)
            rows_and_weight(x, w)
            sized("m", m, None, x.shape[1])
            ctx.save_for_backward(x, gate, w, m)
            return (x * rms(x) * w * silu(gate)) @ m.T

        @staticmethod
        def backward(ctx, grad_out):
            x, gate, w, m = ctx.saved_tensors
            n = x * rms(x)
            y = n * w
            s = torch.sigmoid(gate)
            grad_y = grad_out @ m
            grad_n = grad_y * silu(gate)
            grad_gate = grad_y * y * s * (1 + gate * (1 - s))
            kept = y if wrong else y * silu(gate)
            return (
                rms_backward(x, grad_n * w),
                grad_gate,
                (grad_n * n).sum(0),
                grad_out.T @ kept,
            )

    return lambda x, gate, w, m: Norm.apply(x, gate, w, m)


add(
    "gated_norm_product",
    gated_norm,
    lambda: (real(3, 4), real(3, 4, seed=1), real(4, seed=2), real(2, 4, seed=3)),
    bug="flash-linear-attention (pull request 1071): the product's input, computed again in"
    " backward, lacks the gate",
)


def strided_norm(wrong):
    class Norm(Function):
        @staticmethod
        def forward(ctx, x, w):
            sized("x", x, None, None)
            rows_and_weight(x, w)
            ctx.save_for_backward(x, w)
            return x * rms(x) * w

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            if wrong:  # the kernel is told how far apart rows are, not how far columns
                x = torch.as_strided(x, x.shape, (x.stride(0), 1))
            return rms_backward(x, grad_y * w), (grad_y * x * rms(x)).sum(0)

    return lambda x, w: Norm.apply(x, w)


add(
    "norm_column_stride",
    strided_norm,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="VeOmni (pull request 958): backward's kernel gets the stride of the rows and takes the"
    " columns to lie side by side",
    trigger="an input whose columns do not",
)


def half_norm(wrong):
    class Norm(Function):
        @staticmethod
        def forward(ctx, x, w):
            sized("x", x, None, None)
            rows_and_weight(x, w)
            ctx.save_for_backward(x, w)
            y = torch.nn.functional.layer_norm(up(x), x.shape[-1:], eps=EPS)
            return (y * up(w)).to(x.dtype)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            g = up(grad_y)
            c = up(x) - up(x).mean(-1, keepdim=True)
            r = torch.rsqrt(c.square().mean(-1, keepdim=True) + EPS)
            n = c * r
            gw = g * up(w)
            grad_x = r * (gw - gw.mean(-1, keepdim=True) - n * (gw * n).mean(-1, keepdim=True))
            if wrong:
                grad_w = torch.zeros_like(w)
                for row in g * n:
                    grad_w += row.to(w.dtype)
            else:
                grad_w = (g * n).sum(0).to(w.dtype)
            return grad_x.to(x.dtype), grad_w

    def up(t):
        return t.float() if t.dtype in HALF else t

    return lambda x, w: Norm.apply(x, w)


add(
    "norm_weight_half",
    half_norm,
    lambda: (real(128, 3), real(3, seed=1)),
    bug="The weight's gradient is added up row by row in the weight's own type",
    trigger="half types and many rows",
    own=True,
)


# y = x / max(|x|, eps)
def unit_rows(wrong):
    class Unit(Function):
        @staticmethod
        def forward(ctx, x):
            check(x.ndim >= 1, "expected at least one dimension")
            ctx.save_for_backward(x)
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return x / norm.clamp(min=EPS)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            kept = norm.clamp(min=EPS)
            y = x / kept
            along = y * (grad_y * y).sum(-1, keepdim=True)
            if wrong:
                return (grad_y - along) / norm
            return (grad_y - torch.where(norm >= EPS, along, 0.0)) / kept

    return lambda x: Unit.apply(x)


add(
    "unit_rows_floor",
    unit_rows,
    lambda: (real(3, 4),),
    bug="Backward divides by the norm, forward by the norm or its floor",
    trigger="a row of zeros",
)
