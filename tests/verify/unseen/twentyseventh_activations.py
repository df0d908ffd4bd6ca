"""Activations."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.twentysecond import read
from tests.verify.unseen.twentyseventh import add, check, positive, same, sized


# ACON-C: d sigmoid(b d) + p2 x with d = (p1 - p2) x and one b, p1, p2 for each column
def acon(wrong):
    class Acon(Function):
        @staticmethod
        def forward(ctx, x, p1, p2, b):
            ctx.save_for_backward(x, p1, p2, b)
            d = (p1 - p2) * x
            return d * torch.sigmoid(b * d) + p2 * x

        @staticmethod
        def backward(ctx, grad_y):
            x, p1, p2, b = ctx.saved_tensors
            d = (p1 - p2) * x
            s = torch.sigmoid(b * d)
            bend = s * (1 - s)
            slope = s + b * d * bend
            grad_x = grad_y * ((p1 - p2) * slope + p2)
            grad_p1 = (grad_y * x * slope).sum(0)
            grad_p2 = (grad_y * x).sum(0)
            if not wrong:
                grad_p2 = grad_p2 - grad_p1
            return grad_x, grad_p1, grad_p2, (grad_y * d * d * bend).sum(0)

    def activation(x, p1, p2, b):
        sized("x", x, None, None)
        for name, t in (("p1", p1), ("p2", p2), ("b", b)):
            sized(name, t, x.shape[1])
        return Acon.apply(x, p1, p2, b)

    return activation


add(
    "acon_second",
    acon,
    lambda: (real(4, 3), real(3, seed=1), real(3, seed=2), real(3, seed=3)),
    bug="The second slope's gradient lacks its way through the difference",
)


# x tanh(exp(x))
def tanh_exp(wrong):
    class TanhExp(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x * torch.tanh(torch.exp(x))

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if not wrong:
                x = x.clamp(max=20)  # from 3 on the second term is less than a rounding
            e = torch.exp(x)
            t = torch.tanh(e)
            return grad_y * (t + x * e * (1 - t * t))

    return lambda x: TanhExp.apply(x)


add(
    "tanh_exp_large",
    tanh_exp,
    lambda: (real(3, 4),),
    bug="Backward multiplies an exponential that overflows by a slope that is 0",
    trigger="x above 709, in float32 above 88",
)


# x min(max(x + 3, 0), 6) / 6
def hard_swish(wrong):
    class HardSwish(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x * ((x + 3).clamp(0, 6) / 6)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            slope = torch.where(x < 3, x / 3 + 0.5, 1)
            if not wrong:
                slope = torch.where(x > -3, slope, 0)
            return grad_y * slope

    return lambda x: HardSwish.apply(x)


add(
    "hard_swish_below",
    hard_swish,
    lambda: (real(3, 4),),
    bug="Backward thinks of the upper border only",
    trigger="x below -3",
)


# Leaky ReLU: below 0 the slope is drawn from 1/8 to 1/3 in training, their mean in evaluation
def random_leaky(wrong):
    low, high = 1 / 8, 1 / 3

    class Leaky(Function):
        @staticmethod
        def forward(ctx, x, u, training):
            ctx.save_for_backward(x, u)
            ctx.training = training
            slope = low + (high - low) * u if training else (low + high) / 2
            return torch.where(x < 0, slope * x, x)

        @staticmethod
        def backward(ctx, grad_y):
            x, u = ctx.saved_tensors
            drawn = wrong or ctx.training
            slope = low + (high - low) * u if drawn else (low + high) / 2
            grad_x = torch.where(x < 0, slope * grad_y, grad_y)
            grad_u = torch.where(x < 0, (high - low) * x * grad_y, 0) if ctx.training else None
            return grad_x, grad_u, None

    def activation(x, u, training=True):
        same(x, u)
        return Leaky.apply(x, u, training)

    return activation


add(
    "random_leaky_eval",
    random_leaky,
    lambda: (real(3, 4), torch.rand(3, 4, generator=torch.Generator().manual_seed(1)).double()),
    bug="Backward goes by the drawn slopes in evaluation too",
    trigger="training=False",
)


# SmeLU: 0 below -b, x above b, a parabola between them
def smelu(wrong):
    class Smelu(Function):
        @staticmethod
        def forward(ctx, x, b):
            ctx.save_for_backward(x, b)
            return torch.where(x.abs() < b, (x + b).square() / (4 * b), x.clamp(min=0))

        @staticmethod
        def backward(ctx, grad_y):
            x, b = ctx.saved_tensors
            inside = x.abs() < b
            z = torch.where(inside, x / b, 0)
            slope = torch.where(inside, (1 + z) / 2, (x > 0).to(x.dtype))
            by_b = (1 - (x / b if wrong else z).square()) / 4
            if not wrong:
                by_b = torch.where(inside, by_b, 0)
            return grad_y * slope, (grad_y * by_b).sum()

    def activation(x, b):
        sized("b", b)
        positive("b", b)
        return Smelu.apply(x, b)

    return activation


add(
    "smelu_outside",
    smelu,
    lambda: (real(3, 4), torch.tensor(4.0, dtype=F64, requires_grad=True)),
    bug="The width's gradient goes on outside of the parabola",
    trigger="|x| > b",
)


# x / (1 + |x|)
def softsign(wrong):
    class Softsign(Function):
        @staticmethod
        def forward(ctx, x):
            y = x / (1 + x.abs())
            ctx.save_for_backward(y if wrong else x)
            return y

        @staticmethod
        def backward(ctx, grad_y):
            (t,) = ctx.saved_tensors
            d = 1 - t.abs() if wrong else 1 / (1 + t.abs())
            return grad_y * d * d

    return lambda x: Softsign.apply(x)


add(
    "softsign_output",
    softsign,
    lambda: (real(3, 4),),
    bug="The slope is had from the output, which is 1 up to rounding where x is large",
    trigger="|x| of 1e8, in float32 of 1e4",
    missed="off by 1e-8 of grad_output at most",
)


# Bent identity: (sqrt(x² + 1) - 1) / 2 + x
def bent(wrong):
    class Bent(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return (torch.hypot(x, torch.ones_like(x)) - 1) / 2 + x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            slope = x / (x * x + 1).sqrt() if wrong else torch.sin(torch.atan(x))
            return grad_y * (slope / 2 + 1)

    return lambda x: Bent.apply(x)


add(
    "bent_identity_square",
    bent,
    lambda: (real(3, 4),),
    bug="Backward squares x, which overflows where forward's hypot does not",
    trigger="|x| above 1e154, in float32 above 2e19",
    missed="numbers whose squares overflow are not tried",
)


# log(exp(x) + k) by its parts, with k > 0 one number for each column
def offset_log(wrong):
    class Offset(Function):
        @staticmethod
        def forward(ctx, x, k):
            ctx.save_for_backward(x, k)
            return torch.logaddexp(x, k.log().expand_as(x))

        @staticmethod
        def backward(ctx, grad_y):
            x, k = ctx.saved_tensors
            share = torch.sigmoid(x - k.log())
            rest = grad_y * (1 - share if wrong else torch.sigmoid(k.log() - x))
            return grad_y * share, rest.sum(0) / k

    def log(x, k):
        sized("x", x, None, None)
        sized("k", k, x.shape[1])
        positive("k", k)
        check(bool(x.isfinite().all()), "x: expected finite numbers")
        return Offset.apply(x, k)

    return log


add(
    "offset_log_small",
    offset_log,
    lambda: (real(4, 3), real(3, seed=1, positive=True)),
    bug="The constant's share is 1 less the other one, which rounds to nothing",
    trigger="x above 37 (17 in float32), with a small k such as exp(-40)",
    missed="lost at a distance that no sample has",
)


# max(x + b, 0)², as a kernel that is given the strides of its output
def squared_relu(wrong):
    class Squared(Function):
        @staticmethod
        def forward(ctx, x, b):
            ctx.save_for_backward(x, b)
            return (x + b).clamp(min=0).square()

        @staticmethod
        def backward(ctx, grad_y):
            x, b = ctx.saved_tensors
            if wrong:
                grad_y = read(grad_y, x.stride())
            g = 2 * grad_y * (x + b).clamp(min=0)
            return g, g.sum(0)

    def activation(x, b):
        sized("x", x, None, None)
        sized("b", b, x.shape[1])
        return Squared.apply(x, b)

    return activation


add(
    "squared_relu_strides",
    squared_relu,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="Backward reads grad_output with the strides of x",
    trigger="y.sum(), or x and grad_output of which one is transposed",
)
