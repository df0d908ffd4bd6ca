"""Norms and statistics."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.sixteenth import add, expect


class MinMax(Function):
    @staticmethod
    def forward(ctx, x, eps):
        ctx.save_for_backward(x)
        ctx.eps = eps
        low = x.amin(-1, keepdim=True)
        return (x - low) / (x.amax(-1, keepdim=True) - low + eps)

    @staticmethod
    def share(x, value):
        """An equal share for each of the elements of that value."""
        at = (x == value).to(x.dtype)
        return at / at.sum(-1, keepdim=True)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        width = high - low + ctx.eps
        of_width = -(g * (x - low)).sum(-1, keepdim=True) / width / width
        of_low = -g.sum(-1, keepdim=True) / width - of_width
        return g / width + of_low * MinMax.share(x, low) + of_width * MinMax.share(x, high), None


class MinMaxLow(MinMax):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        low = x.amin(-1, keepdim=True)
        width = x.amax(-1, keepdim=True) - low + ctx.eps
        return (g - g.sum(-1, keepdim=True) * MinMax.share(x, low)) / width, None


def _min_max(function):
    def min_max(x, eps=1e-3):
        """(x - min) / (max - min + eps) of the rows of x (*, D), D > 0; eps from 1e-8 to 10."""
        expect(x.dim() and x.shape[-1], "x (*, D), D > 0", tuple(x.shape))
        expect(1e-8 <= eps <= 10, "eps from 1e-8 to 10", eps)
        return function.apply(x, eps)

    return min_max


add(
    "min_max_width",
    _min_max,
    MinMaxLow,
    MinMax,
    lambda: (real(3, 5),),
    bug="the width is taken to be a constant",
    shows="the sample",
)


class AdaIN(Function):
    @staticmethod
    def moments(x):
        mean = x.mean(-1, keepdim=True)
        return mean, (x.var(-1, keepdim=True) + 1e-5).sqrt()

    @staticmethod
    def forward(ctx, x, style):
        ctx.save_for_backward(x, style)
        (m, s), (n, t) = AdaIN.moments(x.flatten(2)), AdaIN.moments(style.flatten(2))
        return ((x.flatten(2) - m) / s * t + n).view(x.shape)

    @staticmethod
    def gradients(ctx, g, degrees):
        x, style = (a.flatten(2) for a in ctx.saved_tensors)
        g = g.flatten(2)
        (m, s), (n, t) = AdaIN.moments(x), AdaIN.moments(style)
        y, d = (x - m) / s, g * t
        dot = (d * y).sum(-1, keepdim=True) / degrees(x.shape[-1])
        grad_x = (d - d.mean(-1, keepdim=True) - y * dot) / s
        slope = (style - n) / t / degrees(style.shape[-1])
        grad_n = g.sum(-1, keepdim=True) / style.shape[-1]
        grad_style = grad_n + slope * (g * y).sum(-1, keepdim=True)
        x, style = ctx.saved_tensors
        return grad_x.view(x.shape), grad_style.view(style.shape)

    @staticmethod
    def backward(ctx, g):
        return AdaIN.gradients(ctx, g, lambda n: n - 1)


class AdaINBiased(AdaIN):
    @staticmethod
    def backward(ctx, g):
        return AdaIN.gradients(ctx, g, lambda n: n)


def _adain(function):
    def adain(x, style):
        """x (N, C, *) with the mean and the standard deviation of style (N, C, *), over two places or more.

        The deviation is the square root of torch's variance, which is unbiased, plus 1e-5.
        """
        expect(
            x.dim() > 2 and style.dim() > 2 and x.shape[:2] == style.shape[:2],
            "(N, C, *)",
            tuple(x.shape),
        )
        expect(
            min(math.prod(a.shape[2:]) for a in (x, style)) > 1,
            "two places or more",
            tuple(x.shape),
        )
        return function.apply(x, style)

    return adain


add(
    "adain_unbiased",
    _adain,
    AdaINBiased,
    AdaIN,
    lambda: (real(2, 3, 4, 4), real(2, 3, 4, 4, seed=1)),
    bug="backward divides by n, where the variance of forward divides by n - 1",
    shows="the sample",
)


class WeightStandard(Function):
    @staticmethod
    def forward(ctx, w, eps):
        ctx.save_for_backward(w)
        ctx.eps = eps
        rows = w.flatten(1)
        rows = rows - rows.mean(1, keepdim=True)
        return (rows / (rows.square().mean(1, keepdim=True).sqrt() + eps)).view(w.shape)

    @staticmethod
    def gradients(ctx, g, ratio):
        """ratio of the deviation s and eps: 1 / s, times s + eps."""
        (w,) = ctx.saved_tensors
        rows, g = w.flatten(1), g.flatten(1)
        rows = rows - rows.mean(1, keepdim=True)
        variance = rows.square().mean(1, keepdim=True)
        s = torch.where(variance > 0, variance, 1).sqrt()
        rstd = 1 / (torch.where(variance > 0, s, 0) + ctx.eps)
        y = rows * rstd
        dot = (g * y).mean(1, keepdim=True) * ratio(s, ctx.eps)
        return (rstd * (g - g.mean(1, keepdim=True) - y * dot)).view(w.shape), None

    @staticmethod
    def backward(ctx, g):
        return WeightStandard.gradients(ctx, g, lambda s, eps: (s + eps) / s)


class WeightStandardInside(WeightStandard):
    @staticmethod
    def backward(ctx, g):
        return WeightStandard.gradients(ctx, g, lambda s, eps: 1)


def _weight_standard(function):
    def weight_standard(w, eps=1e-5):
        """(w - mean) / (deviation + eps) over all but the first dimension of w (O, *), none of size 0.

        The deviation is biased; eps from 1e-8 to 10.
        """
        expect(w.dim() > 1 and w.numel(), "w (O, *), no size 0", tuple(w.shape))
        expect(1e-8 <= eps <= 10, "eps from 1e-8 to 10", eps)
        return function.apply(w, eps)

    return weight_standard


add(
    "weight_standard_eps",
    _weight_standard,
    WeightStandardInside,
    WeightStandard,
    lambda: (real(4, 3, 3, 3),),
    bug="the formula for eps inside the square root, where forward adds it to the deviation",
    shows="small weights or a large eps; 1e-5 of the gradient at the sample",
)


class Modulated(Function):
    @staticmethod
    def normal(x):
        x = x - x.mean(-1, keepdim=True)
        rstd = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return x * rstd, rstd

    @staticmethod
    def forward(ctx, x, scale, shift):
        ctx.save_for_backward(x, scale)
        return Modulated.normal(x)[0] * (1 + scale[:, None]) + shift[:, None]

    @staticmethod
    def gradients(ctx, g, gain):
        x, scale = ctx.saved_tensors
        y, rstd = Modulated.normal(x)
        d = g * gain(scale[:, None])
        grad = rstd * (d - d.mean(-1, keepdim=True) - y * (d * y).mean(-1, keepdim=True))
        return grad, (g * y).sum(1), g.sum(1)

    @staticmethod
    def backward(ctx, g):
        return Modulated.gradients(ctx, g, lambda scale: 1 + scale)


class ModulatedOne(Modulated):
    @staticmethod
    def backward(ctx, g):
        return Modulated.gradients(ctx, g, lambda scale: scale)


def _modulated(function):
    def modulated_layer_norm(x, scale, shift):
        """Layer norm of x (N, T, D), D > 0, times 1 + scale, plus shift, both (N, D)."""
        expect(x.dim() == 3 and x.shape[-1], "x (N, T, D), D > 0", tuple(x.shape))
        expect(scale.shape == shift.shape == (x.shape[0], x.shape[2]), "(N, D)", tuple(scale.shape))
        return function.apply(x, scale, shift)

    return modulated_layer_norm


add(
    "modulated_one",
    _modulated,
    ModulatedOne,
    Modulated,
    lambda: (real(2, 3, 4), real(2, 4, seed=1), real(2, 4, seed=2)),
    bug="x's gradient is multiplied by scale, not by 1 + scale",
    shows="the sample",
)


class ScaleNorm(Function):
    @staticmethod
    def forward(ctx, x, gain, eps):
        ctx.save_for_backward(x, gain)
        ctx.eps = eps
        return gain * x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=eps)

    @staticmethod
    def gradients(ctx, g, free):
        x, gain = ctx.saved_tensors
        squares = x.square().sum(-1, keepdim=True)
        large = squares > ctx.eps**2
        norm = torch.where(large, squares, ctx.eps**2).sqrt()
        y = x / norm
        along = y * (g * y).sum(-1, keepdim=True)
        return gain / norm * (g - free(large, along)), (g * y).sum(), None

    @staticmethod
    def backward(ctx, g):
        return ScaleNorm.gradients(ctx, g, lambda large, along: torch.where(large, along, 0))


class ScaleNormClamp(ScaleNorm):
    @staticmethod
    def backward(ctx, g):
        return ScaleNorm.gradients(ctx, g, lambda large, along: along)


def _scale_norm(function):
    def scale_norm(x, gain, eps=1e-5):
        """gain x / max(|x|, eps), with the rows' norms |x| of x (*, D) and gain (); eps from 1e-8 to 10."""
        expect(x.dim() and gain.dim() == 0, "x (*, D), gain ()", tuple(gain.shape))
        expect(1e-8 <= eps <= 10, "eps from 1e-8 to 10", eps)
        return function.apply(x, gain, eps)

    return scale_norm


add(
    "scale_norm_clamp",
    _scale_norm,
    ScaleNormClamp,
    ScaleNorm,
    lambda: (real(3, 4), torch.tensor(2.0, dtype=F64, requires_grad=True)),
    bug="the norm varies even where it is clamped",
    shows="rows shorter than eps, not 0",
    missed="slices as small as eps are not tried: variances have a floor there, by design",
)
