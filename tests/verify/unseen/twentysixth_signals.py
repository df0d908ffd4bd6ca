"""Templates and spectra."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentysixth import add, check, sized


# Correlation of each row with a template
def template_match(wrong):
    kept = {}

    def unit(b):
        centred = b - b.mean()
        size = centred.norm()
        check(bool(size > 0), "template: expected numbers that differ")
        return centred / size, size

    def known(b):
        if not wrong:
            return unit(b)
        key = b.data_ptr(), b.shape, b.dtype
        if key not in kept:
            kept[key] = unit(b)
        return kept[key]

    def rows(a):
        centred = a - a.mean(-1, keepdim=True)
        size = centred.norm(dim=-1, keepdim=True)
        check(bool((size > 0).all()), "a: expected rows of numbers that differ")
        return centred / size, size

    class Match(Function):
        @staticmethod
        def forward(ctx, a, b):
            e, size = rows(a)
            t, whole = known(b)
            y = e @ t
            ctx.save_for_backward(e, size, t, whole, y)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            e, size, t, whole, y = ctx.saved_tensors
            grad_a = grad_y[:, None] * (t - y[:, None] * e) / size
            return grad_a, (grad_y @ e - (grad_y * y).sum() * t) / whole

    def match(a, b):
        sized("a", a, None, None)
        sized("b", b, a.shape[1])
        return Match.apply(a, b)

    return match


add(
    "template_match_kept",
    template_match,
    lambda: (real(3, 5), real(5, seed=1, grad=False)),
    bug="The normalised template is kept by its address",
    trigger="a template changed in place, or another one in the same memory",
)


# Cosine transform of type II by one Fourier transform of the reordered row
def cosine_transform(wrong):
    def turns(n, like):
        angle = -math.pi / (2 * n) * torch.arange(n, device=like.device, dtype=like.dtype)
        return torch.polar(torch.ones_like(angle), angle)

    class Cosine(Function):
        @staticmethod
        def forward(ctx, x):
            v = torch.cat((x[..., ::2], x[..., 1::2].flip(-1)), -1)
            return (torch.fft.fft(v) * turns(x.shape[-1], x)).real.clone()

        @staticmethod
        def backward(ctx, grad_y):
            n = grad_y.shape[-1]
            grad_v = torch.fft.fft(grad_y * turns(n, grad_y)).real
            half = n // 2 if wrong else (n + 1) // 2
            grad_x = torch.empty_like(grad_v)
            grad_x[..., ::2] = grad_v[..., :half]
            grad_x[..., 1::2] = grad_v[..., half:].flip(-1)
            return grad_x

    def transform(x):
        check(x.ndim >= 1 and x.numel() >= 1, "x: expected at least one number")
        return Cosine.apply(x)

    return transform


add(
    "cosine_transform_odd",
    cosine_transform,
    lambda: (real(3, 6),),
    bug="Backward takes half of the row to be n // 2",
    trigger="an odd length",
)


# Magnitudes of the spectra of frames of four, two apart
def spectrogram(wrong):
    class Spectrogram(Function):
        @staticmethod
        def forward(ctx, x):
            spectrum = torch.fft.rfft(x.unfold(0, 4, 2))
            ctx.save_for_backward(spectrum)
            ctx.length = len(x)
            return spectrum.abs()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (spectrum,) = ctx.saved_tensors
            unit = spectrum / spectrum.abs() if wrong else spectrum.sgn()
            frames = 4 * torch.fft.ifft(grad_y * unit, n=4).real
            place = torch.arange(ctx.length, device=grad_y.device).unfold(0, 4, 2)
            grad_x = frames.new_zeros(ctx.length)
            return grad_x.index_add_(0, place.flatten(), frames.flatten())

    def magnitudes(x):
        sized("x", x, None)
        check(len(x) >= 4, "x: expected four samples or more")
        return Spectrogram.apply(x)

    return magnitudes


add(
    "spectrogram_silence",
    spectrogram,
    lambda: (real(8),),
    bug="The phase is the spectrum by its magnitude, which is 0 / 0 in silence",
    trigger="a frame of zeros",
)
