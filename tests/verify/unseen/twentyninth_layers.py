"""Layers: norms, convolutions, pooling, attention, adapters."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyninth import (
    add,
    bounded,
    check,
    read_flat,
    sized,
)


# Filter response norm with a learned floor: x / sqrt(mean of x^2 over the places + |floor|)
def filter_response(wrong):
    class Response(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, floor):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + floor.abs()[:, None])

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            x, floor = ctx.saved_tensors
            r = torch.rsqrt(x.square().mean(-1, keepdim=True) + floor.abs()[:, None])
            along = (grad_y * x).sum(-1, keepdim=True)
            grad_floor = -(along * r**3 / 2).sum((0, 2))
            if not wrong:
                grad_floor = grad_floor * floor.sign()
            return grad_y * r - x * r**3 * along / x.shape[-1], grad_floor

    def norm(x, floor):
        sized("x", x, None, None, None)
        sized("floor", floor, x.shape[1])
        check(bool((floor.abs() > 1e-6).all()), "floor: expected numbers other than 0")
        bounded("x", x, -1e4, 1e4)
        return Response.apply(x, floor)

    return norm


add(
    "filter_response_floor",
    filter_response,
    lambda: (real(2, 3, 4), real(3, seed=1, positive=True)),
    bug="The learned floor's gradient is without the magnitude's sign",
    trigger="a floor that training has made negative",
)


# Batch norm, without a gain, over groups of `size` rows; the last group may be smaller
def ghost_norm(wrong):
    class Ghost(Function):
        @staticmethod
        def forward(ctx, x, size):
            ctx.save_for_backward(x)
            ctx.size = size
            rows = []
            for part in x.split(size):
                c = part - part.mean(0)
                rows.append(c * torch.rsqrt(c.square().mean(0) + 1e-5))
            return torch.cat(rows)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            rows = []
            for part, g in zip(x.split(ctx.size), grad_y.split(ctx.size), strict=True):
                n = ctx.size if wrong else len(part)
                c = part - part.mean(0)
                r = torch.rsqrt(c.square().mean(0) + 1e-5)
                y = c * r
                rows.append(r * (g - g.sum(0) / n - y * (g * y).sum(0) / n))
            return torch.cat(rows), None

    def norm(x, size=4):
        sized("x", x, None, None)
        check(size >= 1, "size: expected 1 at least")
        bounded("x", x, -1e4, 1e4)
        return Ghost.apply(x, size)

    return norm


add(
    "ghost_norm_rest",
    ghost_norm,
    lambda: (real(8, 3),),
    bug="Backward divides by the groups' nominal size",
    trigger="a number of rows that the size does not divide",
)


# Partial convolution: what the mask leaves of a window counts for the whole window
def partial_convolution(wrong):
    def shares(mask, k):
        n = F.conv1d(mask, torch.ones(1, 1, k, dtype=mask.dtype, device=mask.device))
        return torch.where(n > 0, k / n.clamp(min=1), 0)

    class Partial(Function):
        @staticmethod
        def forward(ctx, x, w, mask):
            ctx.save_for_backward(x, w, mask)
            return F.conv1d(torch.where(mask > 0, x, 0), w) * shares(mask, w.shape[2])

        @staticmethod
        def backward(ctx, grad_y):
            x, w, mask = ctx.saved_tensors
            g = grad_y if wrong else grad_y * shares(mask, w.shape[2])
            grad_x = torch.nn.grad.conv1d_input(x.shape, w, g)
            grad_w = torch.nn.grad.conv1d_weight(torch.where(mask > 0, x, 0), w.shape, g)
            return torch.where(mask > 0, grad_x, 0), grad_w, None

    def convolution(x, w, mask):
        sized("x", x, None, None, None)
        sized("w", w, None, x.shape[1], None)
        sized("mask", mask, len(x), 1, x.shape[2])
        check(w.shape[2] <= x.shape[2], "w: expected no more taps than places")
        check(bool(((mask == 0) | (mask == 1)).all()), "mask: expected 0 and 1")
        check(not mask.requires_grad, "mask: is a constant")
        return Partial.apply(x, w, mask.to(x.dtype))

    return convolution


add(
    "partial_convolution_holes",
    partial_convolution,
    lambda: (real(2, 2, 6), real(3, 2, 3, seed=1), torch.ones(2, 1, 6, dtype=torch.float64)),
    bug="Backward is that of the masked convolution, without the window's share",
    trigger="a hole in the mask",
)


# Linear layer of an equalised learning rate, as a style generator's mapping has it
def equalised_linear(wrong):
    class Linear(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, w, b, rate):
            return x @ w.mT * (rate / w.shape[1] ** 0.5) + b * rate

        @staticmethod
        def setup_context(ctx, inputs, output):
            x, w, _, ctx.rate = inputs
            ctx.save_for_backward(x, w)

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            c = ctx.rate / w.shape[1] ** 0.5
            grad_b = grad_y.sum(0) if wrong else grad_y.sum(0) * ctx.rate
            return grad_y @ w * c, grad_y.mT @ x * c, grad_b, None

    def linear(x, w, b, rate=1.0):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        sized("b", b, len(w))
        return Linear.apply(x, w, b, float(rate))

    return linear


add(
    "equalised_linear_rate",
    equalised_linear,
    lambda: (real(4, 3), real(2, 3, seed=1), real(2, seed=2)),
    bug="The bias's gradient is without the rate",
    trigger="a rate other than 1, which is the default",
)


# Channels to places, for upsampling by r
def pixel_shuffle(wrong):
    class Shuffle(Function):
        @staticmethod
        def forward(ctx, x, r):
            ctx.r = r
            return F.pixel_shuffle(x, r)

        @staticmethod
        def backward(ctx, grad_y):
            g = read_flat(grad_y) if wrong else grad_y
            return F.pixel_unshuffle(g, ctx.r), None

    def shuffle(x, r=2):
        sized("x", x, None, None, None, None)
        check(r >= 1 and x.shape[1] % r**2 == 0, "x: expected a multiple of r^2 channels")
        return Shuffle.apply(x, r)

    return shuffle


add(
    "pixel_shuffle_channels_last",
    pixel_shuffle,
    lambda: (real(2, 8, 2, 3),),
    bug="Backward's kernel reads grad_output as contiguous",
    trigger="a grad_output that is channels_last, expanded or a slice",
)


# Depthwise filter of a sequence, causal, with the input as it comes
def depthwise(wrong):
    class Depthwise(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            k = w.shape[1]
            return F.conv1d(F.pad(x, (k - 1, 0)), w[:, None], groups=len(w))

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            if wrong and x.stride(-1) == 1:
                x = read_flat(x)
            k, length = w.shape[1], x.shape[2]
            p = F.pad(x, (k - 1, 0))
            late = F.pad(grad_y, (0, k - 1))
            grad_x = sum(
                late[..., k - 1 - j : k - 1 - j + length] * w[:, j, None] for j in range(k)
            )
            taps = [(grad_y * p[..., j : j + length]).sum((0, 2)) for j in range(k)]
            return grad_x, torch.stack(taps, 1)

    def filtered(x, w):
        sized("x", x, None, None, None)
        sized("w", w, x.shape[1], None)
        return Depthwise.apply(x, w)

    return filtered


add(
    "depthwise_slice",
    depthwise,
    lambda: (real(2, 3, 5), real(3, 2, seed=1)),
    bug="Backward asks only for a last stride of 1 before it reads the input as contiguous",
    trigger="an input that is a slice of channels or of time",
)


# Attention with a bias by distance, as a module
def biased_attention(wrong):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = {}

        def bias(self, slope, n):
            if wrong and n in self.kept:
                return self.kept[n]
            place = torch.arange(n, dtype=slope.dtype, device=slope.device)
            value = -slope.detach() * (place[:, None] - place).abs()
            if wrong:
                self.kept[n] = value
            return value

        def forward(self, q, k, v, slope):
            sized("q", q, None, None)
            sized("k", k, *q.shape)
            sized("v", v, len(q), None)
            check(slope.ndim == 0 and not slope.requires_grad, "slope: expected one constant")
            scores = q @ k.mT / q.shape[1] ** 0.5 + self.bias(slope, len(q))
            return scores.softmax(1) @ v

    module = Attention()
    return lambda q, k, v, slope: module(q, k, v, slope)


add(
    "biased_attention_kept",
    biased_attention,
    lambda: (
        real(4, 3),
        real(4, 3, seed=1),
        real(4, 2, seed=2),
        torch.tensor(0.5, dtype=torch.float64),
    ),
    bug="The module keeps the bias by the length, not by the slope",
    trigger="a second call with another slope, or in another type",
    missed="what was kept at the first call is right in the sample",
)
