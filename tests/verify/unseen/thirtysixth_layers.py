"""Layers: norms, activations, quantised products, convolutions, pooling."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.thirtysixth import add, alike, bounded, check, positive, sized


# Instance norm (B, C, L) over the places that count; a row without any becomes 0
def masked_instance_norm(wrong):
    def parts(x, keep):
        w = keep[:, None].to(x.dtype)
        n = w.sum(-1, keepdim=True)
        count = n.clamp(min=1)
        d = (x - (x * w).sum(-1, keepdim=True) / count) * w
        r = torch.rsqrt((d * d).sum(-1, keepdim=True) / count + 1e-5)
        return w, n if wrong else count, d * r, r

    class Norm(Function):
        @staticmethod
        def forward(ctx, x, keep, gain):
            ctx.save_for_backward(x, keep, gain)
            return parts(x, keep)[2] * gain[:, None]

        @staticmethod
        def backward(ctx, g):
            x, keep, gain = ctx.saved_tensors
            w, count, y, r = parts(x, keep)
            h = g * gain[:, None] * w
            mean = h.sum(-1, keepdim=True) / count
            along = (h * y).sum(-1, keepdim=True) / count
            return r * (h - mean - y * along) * w, None, (g * y).sum((0, 2))

    def norm(x, keep, gain):
        sized("x", x, None, None, None)
        sized("keep", keep, x.shape[0], x.shape[2])
        sized("gain", gain, x.shape[1])
        alike(x, gain)
        check(keep.dtype == torch.bool, "keep: expected booleans")
        bounded("x", x, -1e3, 1e3)
        bounded("gain", gain, -1e3, 1e3)
        return Norm.apply(x, keep, gain)

    return norm


add(
    "masked_instance_norm_nothing",
    masked_instance_norm,
    lambda: (
        real(2, 2, 5),
        torch.tensor([[True, True, True, True, False], [True, True, True, False, False]]),
        real(2, seed=1),
    ),
    bug="Forward counts one place at least, backward divides by the number of places as it is",
    trigger="a row without a place that counts: NaN",
)


# Power norm: columns over the root of their mean square in all rows
def power_norm(wrong):
    def root(x):
        mean = x.flatten(0, -2).square().mean(0)
        return torch.rsqrt(mean + 1e-5)

    class Norm(Function):
        @staticmethod
        def forward(ctx, x, gain, bias):
            ctx.save_for_backward(x, gain)
            return x * root(x) * gain + bias

        @staticmethod
        def backward(ctx, g):
            x, gain = ctx.saved_tensors
            r = root(x)
            y, h = x * r, g * gain
            rows = x.shape[0] if wrong else x.numel() // x.shape[-1]
            along = (h * y).flatten(0, -2).sum(0) / rows
            grad_gain, grad_bias = (g * y).flatten(0, -2).sum(0), g.flatten(0, -2).sum(0)
            return r * (h - y * along), grad_gain, grad_bias

    def norm(x, gain, bias):
        check(x.ndim >= 2 and x.numel() > 0, "x: expected two dimensions at least")
        sized("gain", gain, x.shape[-1])
        sized("bias", bias, x.shape[-1])
        alike(x, gain, bias)
        for name, t in {"x": x, "gain": gain, "bias": bias}.items():
            bounded(name, t, -1e3, 1e3)
        return Norm.apply(x, gain, bias)

    return norm


add(
    "power_norm_rows",
    power_norm,
    lambda: (real(6, 3), real(3, seed=1), real(3, seed=2)),
    bug="Backward divides by the first dimension for the number of rows",
    trigger="three dimensions or more",
)


# Root mean square over the last dimensions, as many as the gain has
def rms_dims(wrong):
    class Norm(Function):
        @staticmethod
        def forward(ctx, x, gain):
            ctx.save_for_backward(x, gain)
            dims = tuple(range(-gain.ndim, 0))
            return x * torch.rsqrt(x.square().mean(dims, keepdim=True) + 1e-6) * gain

        @staticmethod
        def backward(ctx, g):
            x, gain = ctx.saved_tensors
            dims = tuple(range(-gain.ndim, 0))
            r = torch.rsqrt(x.square().mean(dims, keepdim=True) + 1e-6)
            y, h = x * r, g * gain
            along = (h * y).mean(-1 if wrong else dims, keepdim=True)
            return r * (h - y * along), (g * y).sum_to_size(gain.shape)

    def norm(x, gain):
        check(1 <= gain.ndim <= x.ndim and x.numel() > 0, "gain: expected one dimension at least")
        check(gain.shape == x.shape[-gain.ndim :], "gain: expected x's last dimensions")
        alike(x, gain)
        bounded("x", x, -1e3, 1e3)
        bounded("gain", gain, -1e3, 1e3)
        return Norm.apply(x, gain)

    return norm


add(
    "rms_dims_last",
    rms_dims,
    lambda: (real(3, 2, 4), real(2, 4, seed=1)),
    bug="Backward's correction is a mean over the last dimension, forward's over all of the gain's",
)


# x relu6(x + 3) / 6
def hard_swish(wrong):
    class Swish(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * (x + 3).clamp(0, 6) / 6

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            y = x.detach() if wrong else x
            middle = (y + y + 3) / 6
            slope = torch.where(x <= -3, torch.zeros_like(x), middle)
            return g * torch.where(x >= 3, torch.ones_like(x), slope)

    def swish(x):
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -1e4, 1e4)
        return Swish.apply(x)

    return swish


add(
    "hard_swish_detached",
    hard_swish,
    lambda: (real(4, 5),),
    bug="Backward detaches x, from whose slope a second derivative would follow",
    trigger="a second derivative",
)


# Logish: x log(1 + sigmoid(x))
def logish(wrong):
    class Logish(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * torch.log1p(x.sigmoid())

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            s = x.exp() / (1 + x.exp()) if wrong else x.sigmoid()
            return g * (torch.log1p(s) + x * s * (1 - s) / (1 + s))

    def activate(x):
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -1e4, 1e4)
        return Logish.apply(x)

    return activate


add(
    "logish_large",
    logish,
    lambda: (real(4, 5),),
    bug="Backward writes the sigmoid as a quotient of exponentials: NaN where they overflow",
    trigger="numbers above 89 in float32, above 709 in float64",
)


# Weights (C, ...) rounded smoothly to steps that each row learns, and clamped
def soft_steps(wrong):
    turn = 6.283185307179586

    class Steps(Function):
        @staticmethod
        def forward(ctx, w, step, top):
            ctx.save_for_backward(w, step)
            ctx.top = top
            s = step.view(-1, *[1] * (w.ndim - 1))
            v = (w / s).clamp(-top, top)
            return s * (v - (turn * v).sin() / turn)

        @staticmethod
        def backward(ctx, g):
            w, step = ctx.saved_tensors
            s = step.view(-1, *[1] * (w.ndim - 1))
            v = (w / s).clamp(-ctx.top, ctx.top)
            inside = ((w / s).abs() <= ctx.top).to(w.dtype)
            slope = (1 - (turn * v).cos()) * inside
            grad_step = g * (v - (turn * v).sin() / turn - v * slope)
            if wrong:
                grad_step = grad_step * inside
            return g * slope, grad_step.flatten(1).sum(1), None

    def quantise(w, step, top=2):
        check(w.ndim >= 2 and w.numel() > 0, "w: expected two dimensions at least")
        sized("step", step, w.shape[0])
        alike(w, step)
        check(isinstance(top, int) and 1 <= top <= 127, "top: expected 1 to 127")
        bounded("w", w, -1e3, 1e3)
        bounded("step", step, 1e-3, 1e3)
        return Steps.apply(w, step, top)

    return quantise


add(
    "soft_steps_clamped",
    soft_steps,
    lambda: (real(3, 6), torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64, requires_grad=True)),
    bug="Clamped weights count for nothing in the step's gradient, though the clamp's bound is in steps",
)


# A linear layer of codes -1, 0, 1 (O, I), with a size for the positive and one for the negative of each row
def ternary_linear(wrong):
    def parts(code, dtype):
        return (code > 0).to(dtype), (code < 0).to(dtype)

    class Linear(Function):
        @staticmethod
        def forward(ctx, x, code, up, down):
            ctx.save_for_backward(x, code, up, down)
            plus, minus = parts(code, x.dtype)
            return x @ (up[:, None] * plus - down[:, None] * minus).mT

        @staticmethod
        def backward(ctx, g):
            x, code, up, down = ctx.saved_tensors
            plus, minus = parts(code, x.dtype)
            grad_x = g @ (up[:, None] * plus - down[:, None] * minus)
            grad_down = (g * (x @ minus.mT)).sum(0)
            return grad_x, None, (g * (x @ plus.mT)).sum(0), grad_down if wrong else -grad_down

    def linear(x, code, up, down):
        sized("x", x, None, None)
        sized("code", code, None, x.shape[1])
        sized("up", up, len(code))
        sized("down", down, len(code))
        alike(x, up, down)
        check(code.dtype in (torch.int8, torch.int64), "code: expected int8 or int64")
        check(bool((code.abs() <= 1).all()), "code: expected -1, 0 and 1")
        for name, t in {"x": x, "up": up, "down": down}.items():
            bounded(name, t, -1e3, 1e3)
        return Linear.apply(x, code, up, down)

    return linear


add(
    "ternary_linear_down",
    ternary_linear,
    lambda: (
        real(3, 5),
        whole(3, 4, 5, seed=1) - 1,
        real(4, seed=2, positive=True),
        real(4, seed=3, positive=True),
    ),
    bug="The size of the negative weights lacks the minus in its gradient",
)


# A filter per channel (C, K), then a mix of channels (O, C), of a signal (B, C, L) with a border of K // 2 zeros
def separable_convolution(wrong):
    class Convolve(Function):
        @staticmethod
        def forward(ctx, x, taps, mix):
            ctx.save_for_backward(x, taps, mix)
            c, k = taps.shape
            h = F.conv1d(x, taps[:, None], padding=k // 2, groups=c)
            return torch.einsum("oc,bcl->bol", mix, h)

        @staticmethod
        def backward(ctx, g):
            x, taps, mix = ctx.saved_tensors
            c, k = taps.shape
            h = F.conv1d(x, taps[:, None], padding=k // 2, groups=c)
            grad_mix = torch.einsum("bol,bcl->oc", g, h)
            grad_h = torch.einsum("oc,bol->bcl", mix, g)
            border = k // 2 if wrong else k - 1 - k // 2
            grad_x = F.conv1d(grad_h, taps.flip(1)[:, None], padding=border, groups=c)
            read = F.pad(x, (k // 2, k // 2)).unfold(-1, h.shape[-1], 1)
            return (
                grad_x[..., : x.shape[-1]],
                torch.einsum("bckl,bcl->ck", read, grad_h),
                grad_mix,
            )

    def convolve(x, taps, mix):
        sized("x", x, None, None, None)
        sized("taps", taps, x.shape[1], None)
        sized("mix", mix, None, x.shape[1])
        alike(x, taps, mix)
        for name, t in {"x": x, "taps": taps, "mix": mix}.items():
            bounded(name, t, -1e3, 1e3)
        return Convolve.apply(x, taps, mix)

    return convolve


add(
    "separable_convolution_even",
    separable_convolution,
    lambda: (real(2, 2, 6), real(2, 3, seed=1), real(3, 2, seed=2)),
    bug="Backward pads by K // 2, as forward does, and cuts what is too long",
    trigger="filters of an even size",
)


# Maxima of windows of 2 x 2 whose starts are given, of maps (C, H, W)
def placed_pool(wrong):
    class Pool(Function):
        @staticmethod
        def forward(ctx, x, rows, columns):
            i = rows[:, None, None, None] + torch.arange(2, device=x.device)[:, None]
            j = columns[:, None, None] + torch.arange(2, device=x.device)
            y, best = x[:, i, j].flatten(3).max(-1)
            row, column = rows[:, None] + best // 2, columns + best % 2
            ctx.save_for_backward(row * x.shape[1 if wrong else 2] + column)
            ctx.shape = x.shape
            return y

        @staticmethod
        def backward(ctx, g):
            (place,) = ctx.saved_tensors
            flat = torch.zeros(ctx.shape, dtype=g.dtype, device=g.device).flatten(1)
            return flat.scatter_add(1, place.flatten(1), g.flatten(1)).view(ctx.shape), None, None

    def pool(x, rows, columns):
        sized("x", x, None, None, None)
        sized("rows", rows, None)
        sized("columns", columns, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        for t, size in ((rows, x.shape[1]), (columns, x.shape[2])):
            check(t.dtype == torch.int64, "rows, columns: expected int64")
            check(bool(((t >= 0) & (t < size - 1)).all()), "rows, columns: expected starts inside")
        bounded("x", x, -1e6, 1e6)
        return Pool.apply(x, rows, columns)

    return pool


add(
    "placed_pool_width",
    placed_pool,
    lambda: (real(2, 4, 6), torch.tensor([0, 2]), torch.tensor([0, 2, 4])),
    bug="Places of the maxima are numbered by the height where the width should stand",
)


# log(mean(exp(r x))) / r of blocks of k x k of maps (C, H, W), with a learned r
def sharp_pool(wrong):
    def windows(x, k):
        c, h, w = x.shape
        return x.view(c, h // k, k, w // k, k).transpose(2, 3).flatten(3)

    class Pool(Function):
        @staticmethod
        def forward(ctx, x, r, k):
            ctx.save_for_backward(x, r)
            ctx.k = k
            return (torch.logsumexp(r * windows(x, k), -1) - 2 * math.log(k)) / r

        @staticmethod
        def backward(ctx, g):
            x, r = ctx.saved_tensors
            k = ctx.k
            (c, h, w), v = x.shape, windows(x, k)
            p = (r * v).softmax(-1)
            y = (torch.logsumexp(r * v, -1) - 2 * math.log(k)) / r
            grad = (g[..., None] * p).unflatten(-1, (k, k)).transpose(2, 3)
            along = (p * v).sum(-1) if wrong else (p * v).sum(-1) - y
            return grad.reshape(c, h, w), (g * along).sum() / r, None

    def pool(x, r, k=2):
        sized("x", x, None, None, None)
        check(isinstance(k, int) and k >= 1, "k: expected a positive integer")
        check(x.shape[1] % k == 0 and x.shape[2] % k == 0, "x: expected blocks of k")
        sized("r", r)
        alike(x, r)
        positive("r", r)
        bounded("r", r, 0.01, 100)
        bounded("x", x, -1e3, 1e3)
        return Pool.apply(x.contiguous(), r, k)

    return pool


add(
    "sharp_pool_slope",
    sharp_pool,
    lambda: (real(2, 4, 4), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)),
    bug="The sharpness's gradient lacks the derivative of the quotient by it",
)
