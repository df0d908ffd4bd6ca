"""Activations and gates."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentysecond import add, check, same, sized


# SwiGLU: silu(a) b
def swiglu(wrong):
    class SwiGLU(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(a, b):
            return a * a.sigmoid() * b

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            a, b = ctx.saved_tensors
            s = a.sigmoid()
            slope = s if wrong else s * (1 + a * (1 - s))
            return grad_y * b * slope, grad_y * a * s

    def gate(a, b):
        same(a, b)
        return SwiGLU.apply(a, b)

    return gate


add(
    "swiglu_slope",
    swiglu,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="The gate's slope misses what its sigmoid changes by",
)


# ReLU, of which a visualisation took the positive gradients only
def guided_relu(wrong):
    class ReLU(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.clamp(min=0)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong:
                grad_y = grad_y.clamp(min=0)
            return grad_y.masked_fill(x <= 0, 0)

    return lambda x: ReLU.apply(x)


add(
    "guided_relu",
    guided_relu,
    lambda: (real(3, 4),),
    bug="The clamp of guided backpropagation stayed in the layer after the pictures were made",
    trigger="a negative grad_output",
)


# Hard shrinkage: x where |x| > 1/2, else 0
def hard_shrink(wrong):
    class Shrink(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.masked_fill(x.abs() <= 0.5, 0)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            none = ~(x.abs() > 0.5)
            return grad_y.masked_fill_(none, 0) if wrong else grad_y.masked_fill(none, 0)

    return lambda x: Shrink.apply(x)


add(
    "hard_shrink_writes",
    hard_shrink,
    lambda: (real(3, 4),),
    bug="Backward puts the zeros into grad_output itself",
    trigger="a grad_output that another branch or the caller uses too",
)


# GELU: x Phi(x)
def gelu(wrong):
    height = 0.3989 if wrong else 1 / math.sqrt(2 * math.pi)

    class GELU(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x * torch.special.ndtr(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return grad_y * (torch.special.ndtr(x) + x * height * torch.exp(-x * x / 2))

    return lambda x: GELU.apply(x)


add(
    "gelu_constant",
    gelu,
    lambda: (real(3, 4),),
    bug="Backward has 1 / sqrt(2 pi) with four digits",
    trigger="a tolerance below 1e-4",
)


# log cosh x
def log_cosh(wrong):
    class LogCosh(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            size = x.abs()
            return size + torch.log1p(torch.exp(-2 * size)) - math.log(2)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong:
                up, down = x.exp(), (-x).exp()
                return grad_y * (up - down) / (up + down)
            return grad_y * x.tanh()

    return lambda x: LogCosh.apply(x)


add(
    "log_cosh_overflow",
    log_cosh,
    lambda: (real(3, 4),),
    bug="The tangent is a quotient of exponentials, which overflow",
    trigger="|x| > 710, in float32 > 89",
)


# GLU: a sigmoid(b), with a rule for forward mode
def glu(wrong):
    class GLU(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(a, b):
            return a * b.sigmoid()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            a, b = ctx.saved_tensors
            s = b.sigmoid()
            return grad_y * s, grad_y * a * s * (1 - s)

        @staticmethod
        def jvp(ctx, tangent_a, tangent_b):
            a, b = ctx.saved_tensors
            s = b.sigmoid()
            if wrong:
                return tangent_a * s
            return tangent_a * s + tangent_b * a * s * (1 - s)

    def gate(a, b):
        same(a, b)
        return GLU.apply(a, b)

    return gate


add(
    "glu_tangent",
    glu,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="The rule for forward mode leaves out the gate's tangent",
    trigger="forward mode with a tangent of the gate",
)


# x softplus(w), w for each feature, with a batching rule
def soft_scale(wrong):
    class Scale(Function):
        @staticmethod
        def forward(x, w):
            return x * torch.logaddexp(w, torch.zeros_like(w))

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            grad_x = grad_y * torch.logaddexp(w, torch.zeros_like(w))
            grad_w = grad_y * x * w.sigmoid()
            return grad_x.sum_to_size(x.shape), grad_w.sum_to_size(w.shape)

        @staticmethod
        def vmap(info, in_dims, x, w):
            x = x[None] if in_dims[0] is None else x.movedim(in_dims[0], 0)
            if wrong:
                return Scale.apply(x.expand(info.batch_size, *x.shape[1:]), w), 0
            w = w[None] if in_dims[1] is None else w.movedim(in_dims[1], 0)
            ones = [1] * (x.ndim - 2)
            return Scale.apply(x, w.reshape(len(w), *ones, w.shape[-1])), 0

    def scale(x, w):
        check(x.ndim >= 1, "x: expected at least one dimension")
        sized("w", w, x.shape[-1])
        return Scale.apply(x, w)

    return scale


add(
    "soft_scale_batch",
    soft_scale,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="The batching rule takes the weights to be one set for all",
    trigger="vmap over the weights too, as of an ensemble",
)


# SiLU whose backward has a path for higher orders
def silu(wrong):
    class SiLU(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x * x.sigmoid()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            s = x.sigmoid()
            if wrong and torch.is_grad_enabled():
                return grad_y * s * (1 + x - s)
            return grad_y * s * (1 + x * (1 - s))

    return lambda x: SiLU.apply(x)


add(
    "silu_orders",
    silu,
    lambda: (real(3, 4),),
    bug="The path that can be differentiated again has x - s for x - x s",
    trigger="create_graph=True, as for a gradient penalty",
)
