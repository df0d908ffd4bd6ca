"""Filters, filter banks, spectra and oscillators."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.nineteenth import uniform
from tests.verify.unseen.twentieth import add, check, same, sized


# y_t = x_t - sum_k a_k y_{t-k}
def all_pole(wrong):
    def run(x, a):
        steps = []
        for t in range(x.shape[1]):
            y = x[:, t]
            for k in range(1, min(len(a), t) + 1):
                y = y - a[k - 1] * steps[t - k]
            steps.append(y)
        return torch.stack(steps, 1)

    class Filter(Function):
        @staticmethod
        def forward(ctx, x, a):
            sized("x", x, None, None)
            sized("a", a, None)
            y = run(x, a)
            ctx.save_for_backward(a, y)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            a, y = ctx.saved_tensors
            grad_x = run(grad_y.flip(1), a).flip(1)
            grad_a = torch.zeros(len(y), len(a), dtype=y.dtype, device=y.device)
            for k in range(1, min(len(a), y.shape[1] - 1) + 1):
                grad_a[:, k - 1] = -(grad_x[:, k:] * y[:, :-k]).sum(1)
            return grad_x, grad_a.mean(0) if wrong else grad_a.sum(0)

    return lambda x, a: Filter.apply(x, a)


add(
    "all_pole_batch",
    all_pole,
    lambda: (real(1, 5), uniform(2, low=-0.5, high=0.5, seed=1)),
    bug="The coefficients' gradient is averaged over the batch that shares them",
    trigger="a batch of more than one",
)


# y_2n = (low + high)/sqrt 2, y_2n+1 = (low - high)/sqrt 2
def synthesis(wrong):
    class Synthesis(Function):
        @staticmethod
        def forward(ctx, low, high):
            check(low.ndim >= 1, "expected at least one dimension")
            same(low, high)
            return torch.stack([low + high, low - high], -1).flatten(-2) / math.sqrt(2)

        @staticmethod
        def backward(ctx, grad_y):
            if wrong and not ctx.needs_input_grad[0]:
                return None, None
            even, odd = grad_y[..., ::2], grad_y[..., 1::2]
            return (even + odd) / math.sqrt(2), (even - odd) / math.sqrt(2)

    return lambda low, high: Synthesis.apply(low, high)


add(
    "synthesis_bank_high",
    synthesis,
    lambda: (real(2, 4), real(2, 4, seed=1)),
    bug="pytorch_wavelets (issue 65): backward does nothing unless the low band needs a gradient",
    trigger="a high band that alone needs one",
)


# log(max(bank power, floor))
def log_bank(wrong):
    class Log(Function):
        @staticmethod
        def forward(ctx, power, bank, floor):
            sized("power", power, None, None)
            sized("bank", bank, None, len(power))
            check(floor > 0, f"expected floor > 0, got {floor}")
            ctx.save_for_backward(power, bank)
            ctx.floor = floor
            return torch.log((bank @ power).clamp(min=floor))

        @staticmethod
        def backward(ctx, grad_y):
            power, bank = ctx.saved_tensors
            mel = bank @ power
            g = grad_y / mel.clamp(min=ctx.floor)
            if not wrong:
                g = torch.where(mel >= ctx.floor, g, 0.0)
            return bank.T @ g, g @ power.T, None

    return lambda power, bank, floor=1e-5: Log.apply(power, bank, floor)


add(
    "log_bank_floor",
    log_bank,
    lambda: (real(4, 3, positive=True), uniform(2, 4, low=0.1, high=0.9, seed=1)),
    bug="Below the floor, where the output is constant, backward divides by the floor",
    trigger="bands without power",
)


# circular convolution of the last dimension
def convolution(wrong):
    class Convolution(Function):
        @staticmethod
        def forward(ctx, x, h):
            check(x.ndim >= 1, "expected at least one dimension")
            same(x, h)
            ctx.save_for_backward(x, h)
            return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(h), n=x.shape[-1])

        @staticmethod
        def backward(ctx, grad_y):
            x, h = ctx.saved_tensors
            g = torch.fft.rfft(grad_y)
            n = None if wrong else x.shape[-1]
            grad_x = torch.fft.irfft(g * torch.fft.rfft(h).conj(), n=n)
            return grad_x, torch.fft.irfft(g * torch.fft.rfft(x).conj(), n=n)

    return lambda x, h: Convolution.apply(x, h)


add(
    "circular_convolution",
    convolution,
    lambda: (real(2, 6), real(2, 6, seed=1)),
    bug="Backward's inverse transform is not told the length",
    trigger="odd lengths",
)


# y_t = a_t sin(2 pi/16 sum_{s <= t} f_s)
def oscillator(wrong):
    turn = 2 * math.pi / 16

    class Oscillator(Function):
        @staticmethod
        def forward(ctx, f, a):
            sized("f", f, None)
            same(f, a)
            ctx.save_for_backward(f, a)
            return a * torch.sin(turn * f.cumsum(0))

        @staticmethod
        def backward(ctx, grad_y):
            f, a = ctx.saved_tensors
            phase = turn * f.cumsum(0)
            grad_phase = grad_y * a * torch.cos(phase)
            later = grad_phase.flip(0).cumsum(0).flip(0)
            if wrong:
                later = later - grad_phase
            return turn * later, grad_y * torch.sin(phase)

    return lambda f, a: Oscillator.apply(f, a)


add(
    "oscillator_phase",
    oscillator,
    lambda: (uniform(5, low=0.5, high=2.0), real(5, seed=1)),
    bug="The sum back over time leaves out the step itself",
)
