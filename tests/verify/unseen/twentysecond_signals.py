"""Windows, limiters, spectra, patterns of noise."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentysecond import add, check


def samples(x):
    check(x.ndim >= 1 and x.shape[-1] >= 1, "expected one sample at least")


# Hann's window
def window(wrong):
    class Window(Function):
        @staticmethod
        def forward(ctx, x):
            return x * torch.hann_window(x.shape[-1], dtype=x.dtype, device=x.device)

        @staticmethod
        def backward(ctx, grad_y):
            dtype = None if wrong else grad_y.dtype
            taps = torch.hann_window(grad_y.shape[-1], dtype=dtype, device=grad_y.device)
            return grad_y * taps

    def taper(x):
        samples(x)
        return Window.apply(x)

    return taper


add(
    "window_dtype",
    window,
    lambda: (real(2, 7),),
    bug="Backward makes the window in the default dtype",
    trigger="float64 and a tolerance below 1e-8",
)


# x / (1 + |x|)
def limiter(wrong):
    class Limit(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x / (1 + x.abs())

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong and grad_y.numel():
                top = grad_y.abs().max()
                grad_y = torch.where(top > 0, grad_y / top, 0)
            return grad_y / (1 + x.abs()) ** 2

    return lambda x: Limit.apply(x)


add(
    "limiter_rescaled",
    limiter,
    lambda: (real(3, 4),),
    bug="Backward scales grad_output so that its largest number is 1, against explosions",
    trigger="a grad_output whose largest number is not 1",
)


# Half of the numbers, chosen by a seed, twice as large
def pattern(wrong):
    def draw(generator, x):
        return 2 * (torch.rand(x.shape, generator=generator) < 0.5).to(x)

    class Pattern(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.generator = torch.Generator().manual_seed(7)
            return x * draw(ctx.generator, x)

        @staticmethod
        def backward(ctx, grad_y):
            if not wrong:
                ctx.generator = torch.Generator().manual_seed(7)
            return grad_y * draw(ctx.generator, grad_y)

    return lambda x: Pattern.apply(x)


add(
    "pattern_drawn",
    pattern,
    lambda: (real(3, 4),),
    bug="Backward draws from the generator that forward has left behind, each time another pattern",
)


# The power of the frequencies that a real signal has
def power(wrong):
    class Power(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.fft.rfft(x).abs().square()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            n = x.shape[-1]
            spectrum = grad_y * torch.fft.rfft(x)
            if wrong:
                return 2 * n * torch.fft.irfft(spectrum, n)
            return 2 * n * torch.fft.ifft(spectrum, n).real

    def spectrum(x):
        samples(x)
        check(x.numel() > 0, "expected one signal at least")
        return Power.apply(x)

    return spectrum


add(
    "power_sides",
    power,
    lambda: (real(2, 6),),
    bug="The inverse for real signals counts each frequency for its mirror image too",
)
