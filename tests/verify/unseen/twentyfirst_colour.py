"""Colours and their spaces."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyfirst import add, check


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
            rising, falling = k < 1, (k >= 3) & (k < 4)
            slope = rising.to(f.dtype) if wrong else rising.to(f.dtype) - falling.to(f.dtype)
            grads = -6 * v * s * slope, -v * f, 1 - s * f
            return torch.cat([(g * grad_y).sum(-1, keepdim=True) for g in grads], -1)

    return lambda hsv: ToRGB.apply(hsv)


add(
    "hsv_to_rgb_falling",
    hsv_to_rgb,
    lambda: (
        torch.tensor(
            [[0.25, 0.5, 0.7], [0.6, 0.8, 0.9], [0.9, 0.3, 0.6]],
            dtype=torch.float64,
            requires_grad=True,
        ),
    ),
    bug="The side of the hue's trapezium that falls has no slope",
    trigger="hues in every second sector, as from red to yellow",
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
    bug="kornia's rgb_to_lab had gradients that are no numbers (issue 868); here the power of a negative"
    " number is chosen away, but not its derivative",
    trigger="a colour out of the gamut, below -0.055",
)
