"""Activations and gates."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentysixth import add, check, read_flat, same


# a erf(b)
def erf_gate(wrong):
    class Gate(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a * torch.erf(b)

        @staticmethod
        def backward(ctx, grad_y):
            a, b = ctx.saved_tensors
            if wrong and not ctx.needs_input_grad[0]:
                return None, None
            slope = 2 / math.sqrt(math.pi) * torch.exp(-b * b)
            return grad_y * torch.erf(b), grad_y * a * slope

    def gate(a, b):
        same(a, b)
        return Gate.apply(a, b)

    return gate


add(
    "erf_gate_flags",
    erf_gate,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="Backward leaves at once where the gated tensor is frozen, and the gate gets nothing",
    trigger="the first input frozen",
)


# Cone: 1 - |x - 1|^1.5
def cone(wrong):
    class Cone(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 1 - (x - 1).abs() ** 1.5

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            d = x - 1
            if wrong:
                return grad_y * -1.5 * d.abs() ** 1.5 / d
            return grad_y * -1.5 * d.abs() ** 0.5 * d.sgn()

    return Cone.apply


add(
    "cone_top",
    cone,
    lambda: (real(3, 4),),
    bug="The slope is the power divided by x - 1, which is 0 / 0 at the cone's top",
    trigger="x = 1",
)


# Inverse square root unit: x / sqrt(1 + x²)
def inverse_root_unit(wrong):
    class Unit(Function):
        @staticmethod
        def forward(ctx, x):
            root = torch.hypot(torch.ones_like(x), x)
            y = torch.where(x.isinf(), x.sgn(), x / root)
            ctx.save_for_backward(x, y)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, y = ctx.saved_tensors
            if wrong:
                return grad_y * (y / x) ** 3
            return grad_y * torch.hypot(torch.ones_like(x), x) ** -3

    return Unit.apply


add(
    "inverse_root_unit_zero",
    inverse_root_unit,
    lambda: (real(3, 4),),
    bug="The root is had from the output by y / x, which is 0 / 0 at 0",
    trigger="x = 0",
)


# Phish: x tanh(GELU(x))
def phish(wrong):
    def parts(x):
        z = x.clamp(-40, 40)
        cdf = torch.erfc(-z / math.sqrt(2)) / 2
        slope = cdf + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        return z, torch.tanh(z * cdf), slope

    class Phish(Function):
        @staticmethod
        def forward(ctx, x):
            _, t, _ = parts(x)
            ctx.save_for_backward(x, t)
            return x.clamp(min=-40) * t

        @staticmethod
        def backward(ctx, grad_y):
            x, kept = ctx.saved_tensors
            z, t, slope = parts(x)
            if wrong:
                t = kept
            return grad_y * (t + z * (1 - t * t) * slope)

    return Phish.apply


add(
    "phish_kept",
    phish,
    lambda: (real(3, 4),),
    bug="The tanh is kept from forward, so that the second derivative takes it for a constant",
    trigger="a second derivative",
)


# max(x, 0) exp(-x² / 2)
def bump_relu(wrong):
    class Bump(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            u = x.clamp(0, 50)
            return u * torch.exp(-u * u / 2)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong:
                x = read_flat(x)
            u = x.clamp(0, 50)
            return grad_y * (x > 0) * (1 - u * u) * torch.exp(-u * u / 2)

    return Bump.apply


add(
    "bump_relu_memory",
    bump_relu,
    lambda: (real(3, 4),),
    bug="Forward takes any strides; backward's kernel reads the input as if it were contiguous",
    trigger="a transposed or sliced input",
)


# x divided by the sum of its row's magnitudes
def unit_l1(wrong):
    def parts(x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        total = (x if wrong else wide).abs().sum(-1, keepdim=True).to(wide.dtype)
        return wide, total.clamp(min=1e-12), total > 1e-12

    class Unit(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            wide, total, _ = parts(x)
            return (wide / total).to(x.dtype)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            wide, total, above = parts(x)
            grad_y = grad_y.to(wide.dtype)
            along = (grad_y * wide / total).sum(-1, keepdim=True)
            return ((grad_y - wide.sgn() * along * above) / total).to(x.dtype)

    def unit(x):
        check(x.ndim >= 1, "x: expected one dimension or more")
        return Unit.apply(x)

    return unit


add(
    "unit_l1_half",
    unit_l1,
    lambda: (real(3, 4),),
    bug="The sum of magnitudes is of the input's type, so that it overflows in float16",
    trigger="float16 rows whose magnitudes sum to more than 65504",
    own=True,
    missed="forward itself overflows in float16",
)


# Softmax-free attention weights: elu(q) + 1 and elu(k) + 1 as features
def feature_attention(wrong):
    def feature(x):
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())

    def slope(x):
        return torch.where(x > 0, 1, x.clamp(max=0).exp())

    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            f, h = feature(q), feature(k)
            return f @ (h.mT @ v) / (f @ h.sum(0) + 1e-6)[:, None]

        @staticmethod
        def backward(ctx, grad_y):
            q, k, v = ctx.saved_tensors
            f, h = feature(q), feature(k)
            state, total = h.mT @ v, h.sum(0)
            below = f @ total + (0 if wrong else 1e-6)
            y = f @ state / below[:, None]
            grad_above = grad_y / below[:, None]
            grad_below = -(grad_above * y).sum(-1)
            grad_f = grad_above @ state.mT + grad_below[:, None] * total
            grad_state = f.mT @ grad_above
            grad_h = v @ grad_state.mT + f.mT @ grad_below
            return grad_f * slope(q), grad_h * slope(k), h @ grad_state

    def attention(q, k, v):
        check(q.ndim == k.ndim == v.ndim == 2, "expected matrices")
        check(
            q.shape[1] == k.shape[1] and len(k) == len(v), "expected q (L, D), k (M, D), v (M, E)"
        )
        return Attention.apply(q, k, v)

    return attention


add(
    "feature_attention_floor",
    feature_attention,
    lambda: (real(3, 4), real(3, 4, seed=1), real(3, 2, seed=2)),
    bug="Backward divides by the total of the features without forward's 1e-6",
    trigger="very negative queries or keys",
)
