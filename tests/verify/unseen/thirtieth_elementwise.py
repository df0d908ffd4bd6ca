"""Activations and other functions of single numbers."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtieth import add, bounded, check, same, sized


# The inverse square root unit: x / √(1 + a x²)
def inverse_root(wrong):
    class Unit(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, a):
            return x * torch.rsqrt(1 + a * x * x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            x, ctx.a = inputs
            ctx.save_for_backward(x)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            root = torch.rsqrt(1 + ctx.a * x * x)
            return grad_y * (x * root / x if wrong else root) ** 3, None

    def unit(x, a=1.0):
        check(0 < a <= 100, "a: expected a number above 0, up to 100")
        bounded("x", x, -1e4, 1e4)
        return Unit.apply(x, float(a))

    return unit


add(
    "isru_zero",
    inverse_root,
    lambda: (real(3, 4),),
    bug="The slope is written as (y / x)³, as in the paper, which is 0 / 0 at 0",
    trigger="x = 0",
)


# x where it is above the threshold, and a value elsewhere
def threshold_unit(wrong):
    class Threshold(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, threshold, value):
            return torch.where(x > threshold, x, value)

        @staticmethod
        def setup_context(ctx, inputs, output):
            x, ctx.threshold, _ = inputs
            ctx.save_for_backward(output if wrong else x)

        @staticmethod
        def backward(ctx, grad_y):
            (kept,) = ctx.saved_tensors
            return torch.where(kept > ctx.threshold, grad_y, 0), None, None

    def unit(x, threshold=0.0, value=0.0):
        bounded("x", x, -1e30, 1e30)
        return Threshold.apply(x, float(threshold), float(value))

    return unit


add(
    "threshold_from_output",
    threshold_unit,
    lambda: (real(3, 4),),
    bug="Backward looks at the output to save the input's memory",
    trigger="a value above the threshold",
)


# Concatenated ReLU: max(x, 0) and max(-x, 0), one after the other in dimension 1
def concatenated(wrong):
    class Both(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.cat([x.clamp(min=0), (-x).clamp(min=0)], 1)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong:
                # The two halves of the last dimension, cut to the input's shape
                flat = grad_y.reshape(-1, 2 * x.shape[-1])
                up, down = (half.reshape(x.shape) for half in flat.chunk(2, 1))
            else:
                up, down = grad_y.chunk(2, 1)
            return torch.where(x > 0, up, 0) - torch.where(x < 0, down, 0)

    def both(x):
        check(x.ndim >= 2 and x.shape[-1] > 0, "x: expected two dimensions or more, none empty")
        check(x.shape[1] > 0, "x: expected a channel at least")
        bounded("x", x, -1e30, 1e30)
        return Both.apply(x)

    return both


add(
    "concat_relu_dim",
    concatenated,
    lambda: (real(3, 4),),
    bug="Backward cuts the gradient in halves of the last dimension, where forward joined in dimension 1",
    trigger="images, where dimension 1 is not the last",
)


# The luminance of linear light: 0.2126 r + 0.7152 g + 0.0722 b, the colours in the last dimension
def luminance(wrong):
    weights = (0.2126, 0.7152, 0.0722)

    class Luminance(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            r, g, b = x.unbind(-1)
            return weights[0] * r + weights[1] * g + weights[2] * b

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad_y):
            if wrong:
                return grad_y[..., None] * torch.tensor(weights, device=grad_y.device)
            w = torch.tensor(weights, dtype=grad_y.dtype, device=grad_y.device)
            return grad_y[..., None] * w

    def light(x):
        check(x.ndim >= 1 and x.shape[-1] == 3, "x: expected three colours in the last dimension")
        return Luminance.apply(x)

    return light


add(
    "luma_float32",
    luminance,
    lambda: (real(2, 4, 3),),
    bug="Backward makes the weights without a dtype, so they are rounded to float32",
    trigger="a tolerance below 1e-8",
)


# γ x with γ one number a feature: the layer scale of vision transformers
def layer_scale(wrong):
    class Scale(Function):
        @staticmethod
        def forward(ctx, x, gamma):
            ctx.save_for_backward(x, gamma)
            return x * gamma

        @staticmethod
        def backward(ctx, grad_y):
            x, gamma = ctx.saved_tensors
            grad_y = grad_y.contiguous()
            grad_x = grad_y * gamma
            both = grad_y.mul_(x) if wrong and not torch.is_grad_enabled() else grad_y * x
            return grad_x, both.reshape(-1, len(gamma)).sum(0)

    def scale(x, gamma):
        sized("gamma", gamma, None)
        check(x.ndim >= 1 and x.shape[-1] == len(gamma), "x: expected gamma's size at the end")
        return Scale.apply(x, gamma)

    return scale


add(
    "layer_scale_written",
    layer_scale,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="To save a buffer, the product for gamma is written over grad_output",
    trigger="a residual branch that gets the same grad_output",
)


# log(exp a + exp b), with a rule for forward mode
def log_add(wrong):
    class LogAdd(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(a, b):
            return torch.logaddexp(a, b)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            a, b = ctx.saved_tensors
            return grad_y * torch.sigmoid(a - b), grad_y * torch.sigmoid(b - a)

        @staticmethod
        def jvp(ctx, tangent_a, tangent_b):
            a, b = ctx.saved_tensors
            share = torch.sigmoid(a - b)
            other = share if wrong else torch.sigmoid(b - a)
            return tangent_a * share + tangent_b * other

    def add_logs(a, b):
        same(a, b)
        bounded("a", a, -1e30, 1e30)
        bounded("b", b, -1e30, 1e30)
        return LogAdd.apply(a, b)

    return add_logs


add(
    "log_add_tangent",
    log_add,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="The rule for forward mode weighs both tangents with the share of the first",
    trigger="forward mode",
)


# 1 / cosh x, whose derivative is a Function of its own
def sech(wrong):
    class Slope(Function):
        @staticmethod
        def forward(ctx, grad_y, x):
            ctx.save_for_backward(grad_y, x)
            return -grad_y * torch.tanh(x) / torch.cosh(x)

        @staticmethod
        def backward(ctx, grad):
            grad_y, x = ctx.saved_tensors
            th, s = torch.tanh(x), 1 / torch.cosh(x)
            grad_x = grad * grad_y * s * (th * th - s * s)
            return None if wrong else -grad * th * s, grad_x

    class Sech(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 1 / torch.cosh(x)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return Slope.apply(grad_y, x)

    def function(x):
        bounded("x", x, -80, 80)
        return Sech.apply(x)

    return function


add(
    "sech_second_upstream",
    sech,
    lambda: (real(3, 4),),
    bug="The derivative's own backward returns None for grad_output",
    trigger="a second derivative through grad_output, as of two layers one on the other",
)
