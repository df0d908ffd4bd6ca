"""Precision: types, sums of many numbers, cancellation, autocast."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtyeighth import add, add_bare, alike, bounded, check, sized
from tests.verify.unseen.twentieth import widened


# Standard deviation of rows
def row_deviation(wrong):
    class Deviation(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            d = x - x.mean(-1, keepdim=True)
            return (d.square().mean(-1) + 1e-5).sqrt()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            mean = x.mean(-1, keepdim=True)
            d = x - mean
            if wrong:
                variance = (x.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0)
            else:
                variance = d.square().mean(-1, keepdim=True)
            return g[..., None] * d / x.shape[-1] * torch.rsqrt(variance + 1e-5)

    def deviation(x):
        check(x.ndim >= 1 and x.numel() > 0, "x: expected numbers")
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -1e8, 1e8)
        return Deviation.apply(x)

    return deviation


add(
    "row_deviation_one_pass",
    row_deviation,
    lambda: (real(4, 5),),
    bug="Backward takes the variance as the mean of squares less the square of the mean",
    trigger="rows far from 0 for their spread, as 1e7 + x",
)


# x (B, T) with a scale per position
def position_scale(wrong):
    class Scale(Function):
        @staticmethod
        def forward(ctx, x, scale):
            ctx.save_for_backward(x, scale)
            return x * scale

        @staticmethod
        def backward(ctx, g):
            x, scale = ctx.saved_tensors
            wide = x.dtype if wrong else torch.promote_types(x.dtype, torch.float32)
            total = torch.zeros_like(scale, dtype=wide)
            for row, up in zip(x, g, strict=True):
                total = total + row.to(wide) * up.to(wide)
            return g * scale, total.to(scale.dtype)

    def scale_positions(x, scale):
        sized("x", x, None, None)
        sized("scale", scale, x.shape[1])
        alike(x, scale)
        bounded("x", x, -100, 100)
        bounded("scale", scale, -100, 100)
        return Scale.apply(x, scale)

    return scale_positions


add(
    "position_scale_running",
    position_scale,
    lambda: (real(6, 3), real(3, seed=1)),
    own=True,
    bug="The scale's gradient is a running sum over the batch in the type of x",
    trigger="bfloat16 or float16 and a large batch",
)


# Frames (..., T) under a Hann window
def hann_frames(wrong):
    def window(n, t):
        k = torch.arange(n, dtype=t.dtype, device=t.device)
        return (1 - (2 * math.pi * k / n).cos()) / 2

    class Frames(Function):
        @staticmethod
        def forward(ctx, x):
            return x * window(x.shape[-1], x)

        @staticmethod
        def backward(ctx, g):
            n = g.shape[-1]
            return g * (torch.hann_window(n, device=g.device).to(g) if wrong else window(n, g))

    def frames(x):
        check(x.ndim >= 1 and x.numel() > 0, "x: expected frames")
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -1e6, 1e6)
        return Frames.apply(x)

    return frames


add(
    "hann_frames_default_type",
    hann_frames,
    lambda: (real(3, 7),),
    bug="Backward's window is made in torch's default type, float32, and is wrong by 1e-8",
    trigger="the sample, to 7 digits",
)


# A network of two layers with squares between: (x A')^2 B'
def square_network(wrong):
    class Network(Function):
        @staticmethod
        def forward(ctx, x, a, b):
            ctx.save_for_backward(x, a, b)
            return F.linear(F.linear(x, a).square(), b)

        @staticmethod
        def backward(ctx, g):
            x, a, b = ctx.saved_tensors
            if not wrong:
                g = g.to(x.dtype)
            with torch.autocast(x.device.type, enabled=False):
                h = x @ a.mT
                down = 2 * h * (g @ b)
                return down @ a, down.mT @ x, g.mT @ h.square()

    def network(x, a, b):
        sized("x", x, None, None)
        sized("a", a, None, x.shape[1])
        sized("b", b, None, len(a))
        alike(x, a, b)
        for name, t in {"x": x, "a": a, "b": b}.items():
            bounded(name, t, -100, 100)
        return Network.apply(x, a, b)

    return widened(network)


add_bare(
    "square_network_autocast",
    square_network,
    lambda: (real(3, 4), real(5, 4, seed=1), real(2, 5, seed=2)),
    bug="Backward multiplies the bfloat16 grad_output by saved float32 weights, which fails",
    trigger="torch.autocast",
)


# log(1 - exp(-x)) of positive numbers
def log_survival(wrong):
    class Log(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.where(x > 0.7, torch.log1p(-(-x).exp()), (-torch.expm1(-x)).log())

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            e = (-x).exp()
            return g * e / ((1 - e) if wrong else -torch.expm1(-x))

    def log(x):
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, 1e-14, 1e4)
        return Log.apply(x)

    return log


add(
    "log_survival_tiny",
    log_survival,
    lambda: (real(4, 5, positive=True),),
    bug="Backward divides by 1 - exp(-x), of which little is left where x is small",
    trigger="numbers below 1e-6: digits are lost, in float32 all of them",
)
