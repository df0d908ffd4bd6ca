"""Colours and their spaces."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentyfirst import add, check, sized


# Hue, saturation, value to RGB: v - v s max(0, min(k, 4 - k, 1)), k = (n + 6 h) mod 6, n = 5, 3, 1
def hsv_to_rgb(wrong):
    class ToRGB(Function):
        @staticmethod
        def forward(ctx, hsv):
            check(hsv.ndim >= 1 and hsv.shape[-1] == 3, "expected hue, saturation, value")
            ctx.save_for_backward(hsv)
            h, s, v = hsv.split(1, -1)
            k = (hsv.new_tensor([5, 3, 1]) + 6 * h) % 6
            return v - v * s * torch.minimum(k, 4 - k).clamp(0, 1)

        @staticmethod
        def backward(ctx, grad_y):
            (hsv,) = ctx.saved_tensors
            h, s, v = hsv.split(1, -1)
            k = (hsv.new_tensor([5, 3, 1]) + 6 * h) % 6
            f = torch.minimum(k, 4 - k).clamp(0, 1)
            rising, falling = (k > 0) & (k < 1), (k > 3) & (k < 4)
            slope = rising.to(f.dtype) if wrong else rising.to(f.dtype) - falling.to(f.dtype)
            grads = -6 * v * s * slope, -v * f, 1 - s * f
            return torch.cat([(g * grad_y).sum(-1, keepdim=True) for g in grads], -1)

    return lambda hsv: ToRGB.apply(hsv)


add(
    "hsv_to_rgb_falling",
    hsv_to_rgb,
    lambda: (
        torch.tensor(
            [[0.05, 0.5, 0.7], [0.4, 0.8, 0.9], [0.72, 0.3, 0.6]],
            dtype=torch.float64,
            requires_grad=True,
        ),
    ),
    bug="The side of the hue's trapezium that falls has no slope",
    trigger="hues in every second sector",
)


# sRGB to linear light: c / 12.92 up to 0.04045, ((c + 0.055) / 1.055)^2.4 above
def linear_light(wrong):
    def linear(c):
        low = c <= 0.04045
        base = c if wrong else torch.where(low, 1, c)
        return torch.where(low, c / 12.92, ((base + 0.055) / 1.055) ** 2.4)

    return linear


add(
    "linear_light_negative",
    linear_light,
    lambda: (real(3, 3, positive=True),),
    bug="kornia (issue 868): the power of a negative number is chosen away, but not its derivative",
    trigger="a colour out of the gamut, below -0.055",
)


# CIE L, a, b from X, Y, Z: f(t) = cube root above d^3, t / (3 d^2) + 4/29 below, d = 6/29
def lab(wrong):
    d = 6 / 29

    def f(t):
        high = t > d**3
        root = (t if wrong else torch.where(high, t, 1)) ** (1 / 3)
        return torch.where(high, root, t / (3 * d**2) + 4 / 29)

    def convert(xyz):
        check(xyz.ndim >= 1 and xyz.shape[-1] == 3, "expected X, Y, Z")
        x, y, z = f(xyz).unbind(-1)
        return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)

    return convert


add(
    "lab_black",
    lab,
    lambda: (real(3, 3, positive=True),),
    bug="kornia (issue 868): the cube root at 0 is chosen away, but not its derivative",
    trigger="a black pixel",
)


# Chroma at half the size: the mean over blocks of 2 x 2, at an odd edge over those that are there
def chroma(wrong):
    def counts(x):
        ones = x.new_ones(1, 1, *x.shape[1:])
        return F.avg_pool2d(ones, 2, ceil_mode=True, count_include_pad=False, divisor_override=1)[0]

    class Halve(Function):
        @staticmethod
        def forward(ctx, x):
            sized("x", x, None, None, None)
            ctx.shape = x.shape
            pad = (0, x.shape[2] % 2, 0, x.shape[1] % 2)
            ctx.share = 1 / counts(F.pad(torch.zeros_like(x[:1]), pad)) if wrong else 1 / counts(x)
            total = F.pad(x, pad).unfold(1, 2, 2).unfold(2, 2, 2).sum((3, 4))
            return total / counts(x)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            g = (grad_y * ctx.share).repeat_interleave(2, 1).repeat_interleave(2, 2)
            return g[:, : ctx.shape[1], : ctx.shape[2]]

    return lambda x: Halve.apply(x)


add(
    "chroma_odd_edge",
    chroma,
    lambda: (real(2, 4, 4),),
    bug="Backward divides by four in every block",
    trigger="an odd width or height",
)
