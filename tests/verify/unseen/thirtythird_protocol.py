"""What autograd asks of a Function: flags, saved tensors, state, orders, forward mode, vmap."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtythird import add, bounded, check, same, sized


# x exp(-t) with a rule for forward mode
def decayed(wrong):
    class Decayed(Function):
        @staticmethod
        def forward(x, t):
            return x * (-t).exp()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, grad_y):
            if grad_y is None:
                return None, None
            x, t = ctx.saved_tensors
            grad_x = grad_y * (-t).exp()
            return grad_x, -grad_x * x

        @staticmethod
        def jvp(ctx, tangent_x, tangent_t):
            x, t = ctx.saved_tensors
            shrink = (-t).exp()
            if wrong:
                return shrink * (tangent_x - x * tangent_t)
            tangent = torch.zeros_like(x)
            if tangent_x is not None:
                tangent = tangent + shrink * tangent_x
            if tangent_t is not None:
                tangent = tangent - shrink * x * tangent_t
            return tangent

    def function(x, t):
        same(x, t)
        bounded("x", x.detach(), -1e4, 1e4)
        bounded("t", t.detach(), -50, 50)
        return Decayed.apply(x, t)

    return function


add(
    "decayed_one_tangent",
    decayed,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="The rule for forward mode does not expect None for an input without a tangent",
    trigger="forward mode over one of the inputs",
)


# The outer product with a rule for vmap
def outer(wrong):
    class Outer(Function):
        @staticmethod
        def forward(a, b):
            return a[..., :, None] * b[..., None, :]

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            a, b = ctx.saved_tensors
            return (grad_y * b[..., None, :]).sum(-1), (grad_y * a[..., :, None]).sum(-2)

        @staticmethod
        def vmap(info, in_dims, a, b):
            if wrong:
                in_dims = (in_dims[0], in_dims[0])
            moved = (
                t.expand(info.batch_size, *t.shape) if at is None else t.movedim(at, 0)
                for t, at in zip((a, b), in_dims, strict=True)
            )
            return Outer.apply(*moved), 0

    def function(a, b):
        check(a.ndim == 1 and b.ndim == 1, "expected vectors")
        return Outer.apply(a, b)

    return function


add(
    "outer_second_dimension",
    outer,
    lambda: (real(3), real(4, seed=1)),
    bug="The rule for vmap moves both vectors by the first one's dimension",
    trigger="vmap over different dimensions, or over one vector alone",
)


# An adapter next to frozen features: x + relu(x down) up
def adapter(wrong):
    class Adapter(Function):
        @staticmethod
        def forward(ctx, x, down, up):
            ctx.save_for_backward(x, down, up)
            return x + (x @ down).relu() @ up

        @staticmethod
        def backward(ctx, grad_y):
            if wrong and not ctx.needs_input_grad[0]:
                return None, None, None
            x, down, up = ctx.saved_tensors
            hidden = (x @ down).relu()
            grad_pre = (grad_y @ up.mT) * (hidden > 0)
            rows = x.flatten(0, -2).mT
            grad_down = rows @ grad_pre.flatten(0, -2)
            grad_up = hidden.flatten(0, -2).mT @ grad_y.flatten(0, -2)
            return grad_y + grad_pre @ down.mT, grad_down, grad_up

    def function(x, down, up):
        check(x.ndim >= 2, "x: expected features of tokens")
        sized("down", down, x.shape[-1], None)
        sized("up", up, down.shape[1], x.shape[-1])
        for t in (x, down, up):
            bounded("arguments", t, -1e3, 1e3)
        return Adapter.apply(x, down, up)

    return function


add(
    "adapter_features_frozen",
    adapter,
    lambda: (real(5, 4), real(4, 2, seed=1), real(2, 4, seed=2)),
    bug="backward ends early where the features need no gradient: the weights get none",
    trigger="frozen features, which is what adapters are for",
)


# x times a gain; backward notes how large the gradients are
def watched_gain(wrong):
    seen = []

    class Gain(Function):
        @staticmethod
        def forward(ctx, x, gain):
            ctx.save_for_backward(x, gain)
            return x * gain

        @staticmethod
        def backward(ctx, grad_y):
            x, gain = ctx.saved_tensors
            if wrong:
                seen.append(grad_y.detach())
            return grad_y * gain, (grad_y * x).sum_to_size(gain.shape)

    def function(x, gain):
        check(x.ndim >= 1, "x: expected channels last")
        sized("gain", gain, x.shape[-1])
        bounded("x", x, -1e4, 1e4)
        bounded("gain", gain, -1e4, 1e4)
        return Gain.apply(x, gain)

    return function


add(
    "watched_gain_kept",
    watched_gain,
    lambda: (real(5, 3), real(3, seed=1)),
    bug="For a plot of the gradients' sizes every grad_output is kept for good",
    trigger="memory watched over many steps",
)


# Root of the tokens' mean square per channel, with the number of tokens on the class
def token_level(wrong):
    class Level(Function):
        count = 1

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            Level.count = ctx.count = x.shape[1]
            return (x.square().mean(1) + 1e-6).sqrt()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            n = Level.count if wrong else ctx.count
            level = (x.square().mean(1) + 1e-6).sqrt()
            return (grad_y / level)[:, None] * x / n

    def function(x):
        sized("x", x, None, None, None)
        bounded("x", x, -1e4, 1e4)
        return Level.apply(x)

    return function


add(
    "token_level_count",
    token_level,
    lambda: (real(2, 5, 3),),
    bug="The number of tokens is kept on the class, for the last call",
    trigger="a call with another number of tokens between forward and backward",
)


# Level of a frame in decibels
def decibels(wrong):
    rise = 10 / math.log(10)

    class Decibels(Function):
        @staticmethod
        def forward(ctx, x):
            power = x.square().mean(-1) + 1e-3
            ctx.save_for_backward(x, power if wrong else None)
            return rise * power.log()

        @staticmethod
        def backward(ctx, grad_y):
            x, power = ctx.saved_tensors
            if power is None:
                power = x.square().mean(-1) + 1e-3
            return 2 * rise / x.shape[-1] * (grad_y / power)[..., None] * x

    def function(x):
        check(x.ndim >= 1 and x.shape[-1] >= 1, "x: expected frames")
        bounded("x", x, -1e4, 1e4)
        return Decibels.apply(x)

    return function


add(
    "decibels_power_saved",
    decibels,
    lambda: (real(3, 4),),
    bug="The power is saved from forward: the second derivative takes it as a constant",
    trigger="double backward",
)


# 1 / (1 + x²)
def rational_bump(wrong):
    class Bump(Function):
        @staticmethod
        def forward(ctx, x):
            if wrong:
                ctx.x = x
            else:
                ctx.save_for_backward(x)
            return 1 / (1 + x.square())

        @staticmethod
        def backward(ctx, grad_y):
            x = ctx.x if wrong else ctx.saved_tensors[0]
            return -2 * grad_y * x / (1 + x.square()) ** 2

    def function(x):
        bounded("x", x, -1e4, 1e4)
        return Bump.apply(x)

    return function


add(
    "rational_bump_attribute",
    rational_bump,
    lambda: (real(3, 4),),
    bug="The input is an attribute of ctx: that it was changed in place goes unnoticed",
    trigger="an input changed in place before backward, which has to raise",
)


# A signal without its straight line of best fit
def detrended(wrong):
    def line(x):
        n = x.shape[-1]
        t = torch.arange(n, device=x.device).to(x.dtype) - (n - 1) / 2
        slope = (x * t).sum(-1, keepdim=True) / t.square().sum().clamp(min=0.5)
        return x.mean(-1, keepdim=True) + slope * t

    class Detrended(Function):
        @staticmethod
        def forward(ctx, x):
            return x - line(x)

        @staticmethod
        def backward(ctx, grad_y):
            if wrong:
                return grad_y.sub_(line(grad_y))
            return grad_y - line(grad_y)

    def function(x):
        check(x.ndim >= 1 and x.shape[-1] >= 1, "x: expected a signal")
        bounded("x", x, -1e4, 1e4)
        return Detrended.apply(x)

    return function


add(
    "detrended_writes",
    detrended,
    lambda: (real(2, 6),),
    bug="grad_output is written over: another use of it gets the line taken off too",
    trigger="the output used by a branch that hands the same grad_output on, as y + z",
)
