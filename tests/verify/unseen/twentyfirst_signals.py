"""Frames, envelopes, predictors, windows, filters on lines and images."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentyfirst import add, check, positive, sized


# Weighted overlap-add: sum of w frame over the sum of w^2 at each place
def overlap_add(wrong):
    def places(frames, hop):
        start = torch.arange(len(frames), device=frames.device) * hop
        return (start[:, None] + torch.arange(frames.shape[1], device=frames.device)).flatten()

    class OverlapAdd(Function):
        @staticmethod
        def forward(ctx, frames, window, hop):
            at = places(frames, hop)
            length = (len(frames) - 1) * hop + frames.shape[1]
            power = frames.new_zeros(length).index_add(0, at, window.square().repeat(len(frames)))
            total = frames.new_zeros(length).index_add(0, at, (frames * window).flatten())
            ctx.save_for_backward(frames, window, power, total / power)
            ctx.at = at
            return total / power

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            frames, window, power, y = ctx.saved_tensors
            if wrong:
                power = power[len(power) // 2].expand_as(power)
            share = (grad_y / power)[ctx.at].view_as(frames)
            there = y[ctx.at].view_as(frames)
            return share * window, (share * (frames - 2 * there * window)).sum(0), None

    def synthesis(frames, window, hop=2):
        sized("frames", frames, None, None)
        sized("window", window, frames.shape[1])
        positive("window", window)
        check(1 <= hop <= frames.shape[1], "hop: expected 1 to the frame's length")
        return OverlapAdd.apply(frames, window, hop)

    return synthesis


add(
    "overlap_add_edges",
    overlap_add,
    lambda: (real(3, 4), real(4, seed=1, positive=True)),
    bug="Backward divides by the windows' power in the middle everywhere",
)


# Envelope: |x + i Hilbert(x)| by doubling the positive frequencies
def envelope(wrong):
    def parts(n, like):
        h = torch.zeros(n, dtype=like.dtype, device=like.device)
        h[0] = 1
        h[1 : (n + 1) // 2] = 2
        if n % 2 == 0:
            h[n // 2] = 1
        return h

    class Analytic(Function):
        @staticmethod
        def forward(ctx, x):
            z = torch.fft.ifft(torch.fft.fft(x) * parts(x.shape[-1], x))
            return z.real.contiguous(), z.imag.contiguous()

        @staticmethod
        def backward(ctx, grad_re, grad_im):
            h = parts(grad_re.shape[-1], grad_re)
            if wrong and len(h) % 2 == 0:
                h = torch.where(torch.arange(len(h), device=h.device) == len(h) // 2, 2, h)
            return torch.fft.ifft(torch.fft.fft(torch.complex(grad_re, grad_im)) * h).real

    def magnitude(x):
        check(x.numel() >= 1 and x.ndim >= 1 and x.shape[-1] >= 2, "expected two samples or more")
        re, im = Analytic.apply(x)
        s = re.square() + im.square()
        return torch.where(s > 0, torch.where(s > 0, s, 1).sqrt(), 0)

    return magnitude


add(
    "envelope_nyquist",
    envelope,
    lambda: (real(2, 7),),
    bug="Backward doubles the frequency in the middle of an even spectrum",
    trigger="an even length",
)


# Levinson-Durbin: the predictor of each order from that of the order before
def levinson(wrong):
    def predictor(r):
        check(r.ndim == 2 and r.shape[1] >= 2, "r: expected (batch, lags)")
        check(bool((r[:, 0] > 0).all()), "r: expected positive power")
        error, a = r[:, 0], r.new_ones(len(r), 1)
        for order in range(1, r.shape[1]):
            k = -(a * r[:, 1 : order + 1].flip(1)).sum(1) / error
            check(bool((k.abs() < 1).all()), "r: expected an autocorrelation")
            longer = F.pad(a, (0, 1))
            a = longer + k[:, None] * longer.flip(1)
            error = error * (1 - k.square())
            if wrong:
                error = error.detach()
        return a

    return predictor


add(
    "levinson_error_power",
    levinson,
    lambda: (
        torch.tensor(
            [[1.0, 0.5, 0.2, 0.1], [2.0, -0.8, 0.3, 0.2]], dtype=torch.float64, requires_grad=True
        ),
    ),
    bug="The power of the error is carried on without its history",
)


# YIN: d(lag) lag / sum_{j <= lag} d(j), d(lag) = sum_t (x_t - x_{t + lag})^2
def pitch_difference(wrong):
    class Normalise(Function):
        @staticmethod
        def forward(ctx, d):
            ctx.save_for_backward(d)
            lag = torch.arange(1, d.shape[1] + 1, dtype=d.dtype, device=d.device)
            return d * lag / d.cumsum(1)

        @staticmethod
        def backward(ctx, grad_y):
            (d,) = ctx.saved_tensors
            lag = torch.arange(1, d.shape[1] + 1, dtype=d.dtype, device=d.device)
            total = d.cumsum(1)
            into_total = -grad_y * d * lag / total**2
            if wrong:
                return grad_y * lag / total + into_total.cumsum(1)
            return grad_y * lag / total + into_total.flip(1).cumsum(1).flip(1)

    def difference(x, lags=3):
        sized("x", x, None, None)
        check(1 <= lags < x.shape[1], "lags: expected 1 to the length - 1")
        n = x.shape[1] - lags
        d = torch.stack(
            [(x[:, :n] - x[:, k : k + n]).square().sum(1) for k in range(1, lags + 1)], 1
        )
        check(bool((d[:, 0] > 0).all()), "x: expected a signal that varies")
        return Normalise.apply(d)

    return difference


add(
    "pitch_difference_sum",
    pitch_difference,
    lambda: (real(2, 6),),
    bug="The running sum's gradient runs forwards",
)


# MVDR beamformer: w = R^-1 d / (d' R^-1 d)
def beamformer(wrong):
    class Weights(Function):
        @staticmethod
        def forward(ctx, r, d):
            u = torch.linalg.solve(r, d[..., None])[..., 0]
            gain = (d * u).sum(-1, keepdim=True)
            ctx.save_for_backward(r, d, u, gain)
            return u / gain

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_w):
            r, d, u, gain = ctx.saved_tensors
            into_gain = -(grad_w * u).sum(-1, keepdim=True) / gain**2
            into_u = grad_w / gain
            if not wrong:
                into_u = into_u + into_gain * d
            back = torch.linalg.solve(r.mT, into_u[..., None])[..., 0]
            return -back[..., :, None] * u[..., None, :], back + into_gain * u

    def weights(r, d):
        sized("r", r, None, None, r.shape[-1])
        sized("d", d, *r.shape[:2])
        sized("r", r, None, d.shape[1], d.shape[1])
        check(bool((r == r.mT).all()), "r: expected symmetric matrices")
        check(bool((torch.linalg.eigvalsh(r)[:, 0] > 1e-3).all()), "r: expected positive matrices")
        check(bool((d.norm(dim=1) > 1e-3).all()), "d: expected directions other than 0")
        return Weights.apply(r, d)

    return lambda a, d: weights(
        a @ a.mT + torch.eye(a.shape[-2], dtype=a.dtype, device=a.device), d
    )


add(
    "beamformer_gain",
    beamformer,
    lambda: (real(2, 3, 3), real(2, 3, seed=1)),
    bug="The covariance is not followed into the gain in the denominator",
)


# Kaiser's window: I0(b sqrt(1 - u^2)) / I0(b), u from -1 to 1
def kaiser(wrong):
    def inner(beta, n):
        u = torch.linspace(-1, 1, n, dtype=beta.dtype, device=beta.device)
        return ((1 - u) * (1 + u)).sqrt()

    class Window(Function):
        @staticmethod
        def forward(ctx, beta, n):
            s = inner(beta, n)
            z = beta[..., None] * s
            b = beta[..., None]
            ctx.save_for_backward(beta, s)
            return torch.special.i0e(z) / torch.special.i0e(b) * (z - b).exp()

        @staticmethod
        def backward(ctx, grad_y):
            beta, s = ctx.saved_tensors
            b = beta[..., None]
            z = b * s
            y = torch.special.i0e(z) / torch.special.i0e(b) * (z - b).exp()
            rate = s * torch.special.i1e(z) / torch.special.i0e(z)
            if not wrong:
                rate = rate - torch.special.i1e(b) / torch.special.i0e(b)
            return (grad_y * y * rate).sum(-1), None

    def window(beta, n=5):
        check(n >= 2, "expected two samples or more")
        check(bool((beta >= 0).all()), "beta: expected numbers >= 0")
        return Window.apply(beta, n)

    return window


add(
    "kaiser_denominator",
    kaiser,
    lambda: (real(3, positive=True),),
    bug="The number that brings the middle to 1 is taken for a constant",
)


# Bilateral filter of a line: weights exp(-(x_i - x_j)^2 / 2) over the neighbours
def bilateral(wrong):
    class Filter(Function):
        @staticmethod
        def forward(ctx, x, near):
            w = near * (-(x[:, :, None] - x[:, None]).square() / 2).exp()
            ctx.save_for_backward(x, near)
            return (w @ x[:, :, None])[..., 0] / w.sum(2)

        @staticmethod
        def backward(ctx, grad_y):
            x, near = ctx.saved_tensors
            gap = x[:, :, None] - x[:, None]
            w = near * (-gap.square() / 2).exp()
            w = w / w.sum(2, keepdim=True)
            y = (w @ x[:, :, None])[..., 0]
            share = w * grad_y[:, :, None]
            bend = -share * (x[:, None] - y[:, :, None]) * gap
            grad_x = share.sum(1) + bend.sum(2)
            return grad_x if wrong else grad_x - bend.sum(1), None

    def smooth(x, radius=1):
        sized("x", x, None, None)
        check(radius >= 1, "expected a radius >= 1")
        i = torch.arange(x.shape[1], device=x.device)
        return Filter.apply(x, ((i[:, None] - i).abs() <= radius).to(x.dtype))

    return smooth


add(
    "bilateral_neighbours",
    bilateral,
    lambda: (real(2, 5),),
    bug="A sample moves its own weights only, not those that its neighbours give it",
)


# Dilation: y_i = max_j x_{i + j - (k - 1) // 2} + w_j
def dilation(wrong):
    class Dilate(Function):
        @staticmethod
        def forward(ctx, x, w):
            k = len(w)
            before = (k - 1) // 2
            padded = F.pad(x, (before, k - 1 - before), value=float("-inf"))
            y, j = (padded.unfold(1, k, 1) + w).max(2)
            ctx.save_for_backward(w, j)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            w, j = ctx.saved_tensors
            before = len(w) // 2 if wrong else (len(w) - 1) // 2
            at = torch.arange(j.shape[1], device=j.device) + j - before
            at = at.clamp(0, j.shape[1] - 1)
            grad_x = torch.zeros_like(grad_y).scatter_add(1, at, grad_y)
            grad_w = torch.zeros_like(w, dtype=grad_y.dtype)
            return grad_x, grad_w.index_add(0, j.flatten(), grad_y.flatten())

    def dilate(x, w):
        sized("x", x, None, None)
        sized("w", w, None)
        check(len(w) <= 2 * x.shape[1], "w: too long for the line")
        check(bool(x.isfinite().all() & w.isfinite().all()), "expected finite numbers")
        return Dilate.apply(x, w)

    return dilate


add(
    "dilation_even_kernel",
    dilation,
    lambda: (real(2, 5), real(3, seed=1)),
    bug="Backward centres the kernel by k // 2",
    trigger="a kernel of even length",
)


# A-law: a |x| / (1 + ln a) below 1/a, (1 + ln(a |x|)) / (1 + ln a) above, with the sign of x
def a_law(wrong):
    class Compress(Function):
        @staticmethod
        def forward(ctx, x, a):
            check(a > 1, "expected a > 1")
            ctx.save_for_backward(x)
            ctx.a = a
            m = x.abs()
            scale = 1 / (1 + torch.tensor(a, dtype=x.dtype).log().item())
            ctx.scale = scale
            low = m < 1 / a
            return (
                x.sign() * scale * torch.where(low, a * m, 1 + (a * torch.where(low, 1, m)).log())
            )

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            m = x.abs()
            low = m < 1 / ctx.a
            if wrong:
                return grad_y * ctx.scale / m.clamp_min(1e-12), None
            slope = torch.where(low, ctx.a, 1 / torch.where(low, 1, m))
            return grad_y * ctx.scale * slope, None

    return lambda x, a=87.6: Compress.apply(x, a)


add(
    "a_law_small",
    a_law,
    lambda: (real(5),),
    bug="The slope of the logarithm is used in the linear part as well",
    trigger="a sample below 1/a",
)
