"""Convolution and filters."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirteenth import add


class Correlate(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.unfold(-1, w.shape[0], 1) @ w

    @staticmethod
    def weight(x, w, g):
        return torch.einsum("nmk,nm->k", x.unfold(-1, w.shape[0], 1), g)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        grad = torch.zeros_like(x)
        for m in range(g.shape[-1]):
            for k in range(w.shape[0]):
                grad[:, m + k] += g[:, m] * w[k]
        return grad, Correlate.weight(x, w, g)


class CorrelatePlace(Correlate):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        grad = torch.zeros_like(x)
        for m in range(g.shape[-1]):
            for k in range(w.shape[0]):
                grad[:, m] += g[:, m] * w[k]
        return grad, Correlate.weight(x, w, g)


def _correlate(function):
    def correlate(x, w):
        """Correlation without padding of x (N, L) with w (K,), L >= K > 0."""
        return function.apply(x, w)

    return correlate


add(
    "correlate_place",
    _correlate,
    CorrelatePlace,
    Correlate,
    lambda: (real(2, 5), real(3, seed=1)),
    bug="written to the output's place, not to the input's (NervanaSystems/neon#111)",
    trigger="the sample",
)


class Dilated(Function):
    @staticmethod
    def forward(ctx, x, w, dilation):
        ctx.save_for_backward(x, w)
        ctx.dilation = dilation
        left, mid, right = Dilated.taps(F.pad(x, (dilation, dilation)), dilation)
        return left * w[0] + mid * w[1] + right * w[2]

    @staticmethod
    def taps(padded, d):
        length = padded.shape[-1] - 2 * d
        return [padded[..., i * d : i * d + length] for i in range(3)]

    @staticmethod
    def weight(ctx, g):
        x, _ = ctx.saved_tensors
        taps = Dilated.taps(F.pad(x, (ctx.dilation, ctx.dilation)), ctx.dilation)
        return torch.stack([(g * t).sum() for t in taps])

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        d = ctx.dilation
        grad = F.pad(torch.zeros_like(x), (d, d))
        for tap, weight in zip(Dilated.taps(grad, d), w, strict=True):
            tap.add_(g * weight)
        return grad[..., d : d + x.shape[-1]], Dilated.weight(ctx, g), None


class DilatedStores(Dilated):
    """Loads all three places, adds, and stores all three."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        d = ctx.dilation
        grad = F.pad(torch.zeros_like(x), (d, d))
        loaded = [tap.clone() for tap in Dilated.taps(grad, d)]
        for tap, old, weight in zip(Dilated.taps(grad, d), loaded, w, strict=True):
            tap.copy_(old + g * weight)
        return grad[..., d : d + x.shape[-1]], Dilated.weight(ctx, g), None


def _dilated(function):
    def dilated_conv(x, w, dilation=1):
        """Convolution of x (N, L) with three taps w (3,), dilation apart, zeros beyond the ends."""
        return function.apply(x, w, dilation)

    return dilated_conv


add(
    "dilated_stores",
    _dilated,
    DilatedStores,
    Dilated,
    lambda: (real(2, 5), real(3, seed=1)),
    bug="loads, adds and stores of neighbours overwrite each other (jmschrei/cherimoya#25)",
    trigger="the sample",
)


class Im2col(Function):
    """In steps of some images, as memory allows."""

    @staticmethod
    def forward(ctx, x, w, step):
        ctx.save_for_backward(x, w)
        ctx.step = step
        return F.conv1d(x, w)

    @staticmethod
    def weights(ctx, g):
        """The weight's gradient of each step."""
        x, w = ctx.saved_tensors
        for images, grads in zip(x.split(ctx.step), g.split(ctx.step), strict=True):
            yield torch.einsum("nclk,nol->ock", images.unfold(-1, w.shape[-1], 1), grads)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        _, w = ctx.saved_tensors
        total = torch.zeros_like(w)
        for part in Im2col.weights(ctx, g):
            total += part
        return F.conv_transpose1d(g, w), total, None


class Im2colLast(Im2col):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        _, w = ctx.saved_tensors
        total = torch.zeros_like(w)
        for part in Im2col.weights(ctx, g):
            total.copy_(part)
        return F.conv_transpose1d(g, w), total, None


def _im2col(function):
    def im2col_conv(x, w, im2col_step=32):
        """Convolution of x (N, C, L) with w (O, C, K), L >= K, by im2col_step images at a time."""
        return function.apply(x, w, im2col_step)

    return im2col_conv


add(
    "im2col_step",
    _im2col,
    Im2colLast,
    Im2col,
    lambda: (real(2, 2, 5), real(3, 2, 3, seed=1)),
    bug="the weight's gradient is the last step's (open-mmlab/mmcv#563, #565)",
    trigger="a batch of more than im2col_step images",
)


class Synthesis(Function):
    """The inverse Haar transform."""

    @staticmethod
    def forward(ctx, low, high):
        return torch.stack((low + high, low - high), -1).flatten(-2) * 0.5**0.5

    @staticmethod
    def backward(ctx, g):
        even, odd = g[..., ::2], g[..., 1::2]
        return (even + odd) * 0.5**0.5, (even - odd) * 0.5**0.5


class SynthesisLow(Synthesis):
    @staticmethod
    def backward(ctx, g):
        return Synthesis.backward(ctx, g) if ctx.needs_input_grad[0] else (None, None)


def _synthesis(function):
    def synthesis(low, high):
        """Signal (N, 2 L) of its Haar coefficients low and high (N, L)."""
        return function.apply(low, high)

    return synthesis


add(
    "synthesis_low",
    _synthesis,
    SynthesisLow,
    Synthesis,
    lambda: (real(2, 3), real(2, 3, seed=1)),
    bug="both gradients hang on the first input's flag (fbcotter/pytorch_wavelets#65)",
    trigger="low.requires_grad False",
)
