"""Normalisation."""

import torch
from torch import nn
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.twentyseventh import add, add_bare, check, same, sized


# Global response norm: x + gain x n + bias, n a channel's magnitude by the channels' mean of them
def response(wrong):
    tiny = 1e-6

    def magnitude(x):
        return torch.linalg.vector_norm(x, dim=2, keepdim=True)

    class Response(Function):
        @staticmethod
        def forward(ctx, x, gain, bias):
            ctx.save_for_backward(x, gain)
            r = magnitude(x)
            n = r / (r.mean(1, keepdim=True) + tiny)
            return x + gain[:, None] * x * n + bias[:, None]

        @staticmethod
        def backward(ctx, grad_y):
            x, gain = ctx.saved_tensors
            r = magnitude(x)
            mean = r.mean(1, keepdim=True) + tiny
            g = grad_y * gain[:, None]
            grad_n = (g * x).sum(2, keepdim=True)
            grad_r = (grad_n - (grad_n * r).mean(1, keepdim=True) / mean) / mean
            unit = x / r if wrong else x / torch.where(r == 0, 1, r)
            grad_x = grad_y + g * r / mean + grad_r * unit
            return grad_x, (grad_y * x * r / mean).sum((0, 2)), grad_y.sum((0, 2))

    def norm(x, gain, bias):
        sized("x", x, None, None, None)
        sized("gain", gain, x.shape[1])
        same(gain, bias)
        return Response.apply(x, gain, bias)

    return norm


add(
    "response_dead",
    response,
    lambda: (real(2, 3, 4), real(3, seed=1), real(3, seed=2)),
    bug="A channel's direction is 0 / 0 where it is 0 throughout",
    trigger="a dead channel, as after a ReLU",
)


# Filter response norm: max(gain x / sqrt(mean x² + |e|) + bias, floor) with a learned e
def filter_response(wrong):
    class Filter(Function):
        @staticmethod
        def forward(ctx, x, gain, bias, floor, e):
            ctx.save_for_backward(x, gain, bias, floor, e)
            z = x / root(x, e)
            return torch.maximum(gain[:, None] * z + bias[:, None], floor[:, None])

        @staticmethod
        def backward(ctx, grad_y):
            x, gain, bias, floor, e = ctx.saved_tensors
            r = root(x, e)
            z = x / r
            above = gain[:, None] * z + bias[:, None] > floor[:, None]
            g = torch.where(above, grad_y, 0)
            grad_floor = (grad_y - g).sum((0, 2))
            grad_z = g * gain[:, None]
            dot = (grad_z * z).sum(2, keepdim=True)
            grad_x = (grad_z - z * dot / x.shape[2]) / r
            grad_e = -(dot / (2 * r * r)).sum(0)[:, 0]
            if not wrong:
                grad_e = grad_e * e.sign()
            return grad_x, (g * z).sum((0, 2)), g.sum((0, 2)), grad_floor, grad_e

    def root(x, e):
        return (x.square().mean(2, keepdim=True) + e.abs()[:, None]).sqrt()

    def norm(x, gain, bias, floor, e):
        sized("x", x, None, None, None)
        sized("gain", gain, x.shape[1])
        same(gain, bias, floor, e)
        check(bool((root(x, e) > 0).all()), "expected rows that are not 0, or an e that is not")
        return Filter.apply(x, gain, bias, floor, e)

    return norm


add(
    "filter_response_sign",
    filter_response,
    lambda: (
        real(2, 3, 4),
        real(3, seed=1),
        real(3, seed=2),
        real(3, seed=3),
        torch.full((3,), 1e-2, dtype=F64, requires_grad=True),
    ),
    bug="The learned e's gradient is that of a positive one",
    trigger="an e that learning has made negative",
)


# Batch norm without gain whose backward makes the normalised input anew, to save memory
def light_norm(wrong):
    def normal(x):
        c = x - x.mean(0)
        r = torch.rsqrt(c.square().mean(0) + 1e-5)
        return c * r, r

    class Norm(Function):
        @staticmethod
        def forward(ctx, x, average):
            ctx.save_for_backward(x)
            ctx.average = average
            if average is None:
                return normal(x)[0]
            average.lerp_(x.detach().mean(0).to(average.dtype), 0.1)
            return normal(x)[0]

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong and ctx.average is not None:
                ctx.average.lerp_(x.detach().mean(0).to(ctx.average.dtype), 0.1)
            y, r = normal(x)
            return r * (grad_y - grad_y.mean(0) - y * (grad_y * y).mean(0)), None

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("average", torch.zeros(3, dtype=F64))

        def forward(self, x):
            if x.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"x: expected float32 or float64, got {x.dtype}")
            sized("x", x, None, 3)
            check(len(x) >= 2, "x: expected two rows at least")
            return Norm.apply(x, self.average if self.training else None)

    return Layer()


add_bare(
    "light_norm_twice",
    light_norm,
    lambda: (real(4, 3),),
    bug="What backward computes anew moves the running mean a second time",
    trigger="buffers compared before and after backward",
)


# x by the root of its mean square, with a rule for forward mode
def mean_square_norm(wrong):
    tiny = 1e-6

    class Norm(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + tiny)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            return through(*ctx.saved_tensors, grad_y)

        @staticmethod
        def jvp(ctx, tangent_x):
            (x,) = ctx.saved_tensors
            if wrong:
                return tangent_x * torch.rsqrt(x.square().mean(-1, keepdim=True) + tiny)
            return through(x, tangent_x)  # the Jacobian is symmetric

    def through(x, t):
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + tiny)
        y = x * r
        return r * (t - y * (y * t).mean(-1, keepdim=True))

    def norm(x):
        check(x.ndim >= 1 and x.shape[-1] >= 1, "x: expected one feature at least")
        return Norm.apply(x)

    return norm


add(
    "mean_square_tangent",
    mean_square_norm,
    lambda: (real(3, 4),),
    bug="The rule for forward mode takes the root for a constant",
    trigger="forward mode",
)
