"""Sound, images, convolution, sums."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.sixteenth import add, expect


class LogMel(Function):
    @staticmethod
    def forward(ctx, power, filters, floor):
        ctx.save_for_backward(power, filters)
        ctx.floor = floor
        return (filters @ power).clamp(min=floor).log()

    @staticmethod
    def gradients(ctx, g, mask):
        power, filters = ctx.saved_tensors
        mel = filters @ power
        d = torch.where(mask(mel), g / mel.clamp(min=ctx.floor), 0)
        return filters.mT @ d, (d @ power.mT).sum(0), None

    @staticmethod
    def backward(ctx, g):
        return LogMel.gradients(ctx, g, lambda mel: mel >= ctx.floor)


class LogMelFloor(LogMel):
    @staticmethod
    def backward(ctx, g):
        return LogMel.gradients(ctx, g, lambda mel: torch.ones_like(mel, dtype=torch.bool))


def _log_mel(function):
    def log_mel(power, filters, floor=1e-3):
        """log(max(filters power, floor)) of power (N, F, T) with filters (M, F); floor from 1e-6 to 1."""
        expect(
            power.dim() == 3 and filters.dim() == 2,
            "power (N, F, T), filters (M, F)",
            tuple(power.shape),
        )
        expect(filters.shape[1] == power.shape[1], "filters (M, F)", tuple(filters.shape))
        expect(1e-6 <= floor <= 1, "floor from 1e-6 to 1", floor)
        return function.apply(power, filters, floor)

    return log_mel


add(
    "log_mel_floor",
    _log_mel,
    LogMelFloor,
    LogMel,
    lambda: (real(2, 5, 3, positive=True), real(4, 5, seed=1, positive=True)),
    bug="backward lacks the clamp's mask",
    shows="bands below the floor: silence",
)


class MuLaw(Function):
    @staticmethod
    def forward(ctx, x, mu):
        ctx.save_for_backward(x)
        ctx.mu = mu
        return x.sign() * (mu * x.abs()).log1p() / math.log1p(mu)

    @staticmethod
    def gradients(ctx, g, signs):
        (x,) = ctx.saved_tensors
        return g * signs(x) * ctx.mu / (1 + ctx.mu * x.abs()) / math.log1p(ctx.mu), None

    @staticmethod
    def backward(ctx, g):
        return MuLaw.gradients(ctx, g, torch.ones_like)


class MuLawSigns(MuLaw):
    @staticmethod
    def backward(ctx, g):
        return MuLaw.gradients(ctx, g, lambda x: x.sign() * x.sign())


def _mu_law(function):
    def mu_law(x, mu=255):
        """sign(x) log(1 + mu |x|) / log(1 + mu); mu from 1 to 65535."""
        expect(1 <= mu <= 65535, "mu from 1 to 65535", mu)
        return function.apply(x, mu)

    return mu_law


add(
    "mu_law_zero",
    _mu_law,
    MuLawSigns,
    MuLaw,
    lambda: (real(3, 4),),
    bug="the chain rule by the letter: sign(x) sign(x) is 0 at 0, where the slope is greatest",
    shows="x = 0: digital silence",
)


GRAY = 0.299, 0.587, 0.114


class Contrast(Function):
    @staticmethod
    def gray(x):
        weights = x.new_tensor(GRAY).view(3, 1, 1)
        return weights, (x * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x, factor)
        mean = Contrast.gray(x)[1]
        return mean + factor.view(-1, 1, 1, 1) * (x - mean)

    @staticmethod
    def gradients(ctx, g, of_mean):
        x, factor = ctx.saved_tensors
        weights, mean = Contrast.gray(x)
        f = factor.view(-1, 1, 1, 1)
        total = of_mean((1 - f) * g.sum((1, 2, 3), keepdim=True))
        return f * g + total * weights / x[0, 0].numel(), (g * (x - mean)).sum((1, 2, 3))

    @staticmethod
    def backward(ctx, g):
        return Contrast.gradients(ctx, g, lambda total: total)


class ContrastMean(Contrast):
    @staticmethod
    def backward(ctx, g):
        return Contrast.gradients(ctx, g, torch.zeros_like)


def _contrast(function):
    def contrast(x, factor):
        """mean + factor (x - mean) of images x (N, 3, H, W), none empty, factor (N,), with their gray means."""
        expect(
            x.dim() == 4 and x.shape[1] == 3 and x.numel(),
            "x (N, 3, H, W), not empty",
            tuple(x.shape),
        )
        expect(factor.shape == x.shape[:1], "factor (N,)", tuple(factor.shape))
        return function.apply(x, factor)

    return contrast


add(
    "contrast_mean",
    _contrast,
    ContrastMean,
    Contrast,
    lambda: (real(2, 3, 4, 4, positive=True), real(2, seed=1, positive=True)),
    bug="the image's mean is taken to be a constant",
    shows="the sample",
)


class Conv2d(Function):
    @staticmethod
    def forward(ctx, x, w, bias, stride, padding):
        ctx.save_for_backward(x, w)
        ctx.options = {"kernel_size": w.shape[2:], "stride": stride, "padding": padding}
        ctx.biased = bias is not None
        y = w.flatten(1) @ F.unfold(x, **ctx.options)
        y = y if bias is None else y + bias[:, None]
        return y.unflatten(
            2,
            [
                (n + 2 * padding - k) // stride + 1
                for n, k in zip(x.shape[2:], w.shape[2:], strict=True)
            ],
        )

    @staticmethod
    def gradients(ctx, g, biased):
        x, w = ctx.saved_tensors
        g = g.flatten(2)
        grad_x = F.fold(w.flatten(1).mT @ g, x.shape[2:], **ctx.options)
        grad_w = (g @ F.unfold(x, **ctx.options).mT).sum(0).view(w.shape)
        return grad_x, grad_w, g.sum((0, 2)) if biased else None, None, None

    @staticmethod
    def backward(ctx, g):
        return Conv2d.gradients(ctx, g, ctx.biased)


class Conv2dBias(Conv2d):
    @staticmethod
    def backward(ctx, g):
        return Conv2d.gradients(ctx, g, True)


def _conv2d(function):
    def conv2d(x, w, bias=None, stride=1, padding=0):
        """Correlation of x (N, C, H, W) and w (O, C, K, L) plus bias (O,), if given; no size is 0.

        stride from 1 to 4, padding from 0 to 4; the padded image is no smaller than the kernel.
        """
        expect(
            x.dim() == w.dim() == 4 and x.shape[1] == w.shape[1],
            "x (N, C, H, W), w (O, C, K, L)",
            tuple(w.shape),
        )
        expect(x.numel() and w.numel(), "no size 0", tuple(x.shape))
        expect(bias is None or bias.shape == w.shape[:1], "bias (O,)", bias)
        expect(
            stride in range(1, 5) and padding in range(5),
            "stride 1 to 4, padding 0 to 4",
            (stride, padding),
        )
        fits = all(n + 2 * padding >= k for n, k in zip(x.shape[2:], w.shape[2:], strict=True))
        expect(fits, "an image no smaller than the kernel", tuple(x.shape))
        return function.apply(x, w, bias, stride, padding)

    return conv2d


add(
    "conv2d_no_bias",
    _conv2d,
    Conv2dBias,
    Conv2d,
    lambda: (real(2, 3, 5, 5), real(4, 3, 3, 3, seed=1), real(4, seed=2)),
    bug="backward returns a gradient for the bias even if there is none",
    shows="bias=None",
)


class ExclusiveSum(Function):
    @staticmethod
    def shifted(x, dim):
        first = x.narrow(dim, 0, 1)
        return torch.cat((torch.zeros_like(first), x.narrow(dim, 0, x.shape[dim] - 1)), dim).cumsum(
            dim
        )

    @staticmethod
    def forward(ctx, x, dim):
        ctx.dim = dim
        return ExclusiveSum.shifted(x, dim)

    @staticmethod
    def backward(ctx, g):
        return ExclusiveSum.shifted(g.flip(ctx.dim), ctx.dim).flip(ctx.dim), None


class ExclusiveSumInclusive(ExclusiveSum):
    @staticmethod
    def backward(ctx, g):
        return g.flip(ctx.dim).cumsum(ctx.dim).flip(ctx.dim), None


def _exclusive_sum(function):
    def exclusive_sum(x, dim=-1):
        """Sums of the elements before each one along dim, of size > 0, of x (*)."""
        expect(-x.dim() <= dim < x.dim(), "one of x's dimensions", dim)
        expect(x.shape[dim], "a size > 0", tuple(x.shape))
        return function.apply(x, dim)

    return exclusive_sum


add(
    "exclusive_sum_inclusive",
    _exclusive_sum,
    ExclusiveSumInclusive,
    ExclusiveSum,
    lambda: (real(3, 5),),
    bug="backward's reverse sums include the element itself",
    shows="the sample",
)
