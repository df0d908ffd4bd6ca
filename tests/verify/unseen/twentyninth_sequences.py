"""Recurrences, scans and signals."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentieth import HALF
from tests.verify.unseen.twentyninth import add, add_bare, bounded, check, indices, same, sized


# Pooling of a quasi-recurrent network: c = f c + (1 - f) z over time
def forget_pooling(wrong):
    def states(z, f):
        c, y = torch.zeros_like(z[0]), []
        for zt, ft in zip(z, f, strict=True):
            c = ft * c + (1 - ft) * zt
            y.append(c)
        return y

    class Pooling(Function):
        @staticmethod
        def forward(ctx, z, f):
            ctx.save_for_backward(z, f)
            return torch.stack(states(z, f))

        @staticmethod
        def backward(ctx, grad_y):
            z, f = ctx.saved_tensors
            y, g = states(z, f), torch.zeros_like(z[0])
            grad_z, grad_f = [], []
            for t in reversed(range(len(z))):
                g = g + grad_y[t]
                before = y[t - 1] if t or wrong else torch.zeros_like(g)
                grad_z.append(g * (1 - f[t]))
                grad_f.append(g * (before - z[t]))
                g = g * f[t]
            return torch.stack(grad_z[::-1]), torch.stack(grad_f[::-1])

    def pooling(z, f):
        sized("z", z, None, None)
        same(z, f)
        bounded("z", z, -1e6, 1e6)
        bounded("f", f, -1, 1)
        return Pooling.apply(z, f)

    return pooling


add(
    "forget_pooling_wraps",
    forget_pooling,
    lambda: (real(4, 3), torch.sigmoid(real(4, 3, seed=1)).detach().requires_grad_()),
    bug="The state before the first step is y[-1], the last one",
)


# Each padded sequence turned round within its length, as the way back of a bidirectional network has it
def turned(wrong):
    def order(lengths, n):
        place = torch.arange(n, device=lengths.device)
        return torch.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)

    class Turned(Function):
        @staticmethod
        def forward(ctx, x, lengths):
            ctx.save_for_backward(lengths)
            return x.gather(1, order(lengths, x.shape[1])[..., None].expand(x.shape))

        @staticmethod
        def backward(ctx, grad_y):
            (lengths,) = ctx.saved_tensors
            if wrong:
                return grad_y.flip(1), None
            place = order(lengths, grad_y.shape[1])[..., None].expand(grad_y.shape)
            return grad_y.gather(1, place), None

    def turn(x, lengths):
        sized("x", x, None, None, None)
        sized("lengths", lengths, len(x))
        indices("lengths", lengths, x.shape[1] + 1)
        return Turned.apply(x, lengths.long())

    return turn


add(
    "turned_whole",
    turned,
    lambda: (real(2, 4, 3), torch.tensor([4, 4])),
    bug="Backward turns the padding too",
    trigger="sequences of several lengths",
)


# The power of a signal at one frequency
def tone_power(wrong):
    class Power(Function):
        @staticmethod
        def parts(x, w):
            n = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
            return n, (x * (w * n).cos()).sum(-1), (x * (w * n).sin()).sum(-1)

        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            _, a, b = Power.parts(x, w)
            return a * a + b * b

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            n, a, b = Power.parts(x, w)
            g = 2 * grad_y[..., None]
            a, b = a[..., None], b[..., None]
            grad_x = g * (a * (w * n).cos() + b * (w * n).sin())
            turn = g * x * (b * (w * n).cos() - a * (w * n).sin())
            return grad_x, turn.sum() if wrong else (turn * n).sum()

    def power(x, w):
        check(x.ndim >= 1, "x: expected at least one dimension")
        check(w.ndim == 0, "w: expected one number")
        bounded("x", x, -1e4, 1e4)
        bounded("w", w, -10, 10)
        return Power.apply(x, w)

    return power


add(
    "tone_power_frequency",
    tone_power,
    lambda: (real(2, 6), torch.tensor(0.9, dtype=torch.float64)),
    bug="The frequency's gradient is without the place by which it is multiplied",
    trigger="a frequency that requires grad",
)


# The median of each window of an odd width
def moving_median(wrong):
    class Median(Function):
        @staticmethod
        def forward(ctx, x, width):
            y, place = x.unfold(-1, width, 1).median(-1)
            place = place + torch.arange(y.shape[-1], device=x.device)
            ctx.save_for_backward(*((x, y) if wrong else (place,)))
            ctx.shape, ctx.width = x.shape, width
            return y

        @staticmethod
        def backward(ctx, grad_y):
            grad_x = grad_y.new_zeros(ctx.shape)
            if not wrong:
                return grad_x.scatter_add(-1, ctx.saved_tensors[0], grad_y), None
            x, y = ctx.saved_tensors
            n = y.shape[-1]
            for j in range(ctx.width):
                hit = torch.where(x[..., j : j + n] == y, grad_y, 0)
                grad_x = grad_x + F.pad(hit, (j, ctx.shape[-1] - n - j))
            return grad_x, None

    def median(x, width=3):
        check(x.ndim >= 1, "x: expected at least one dimension")
        check(width % 2 == 1 and 1 <= width <= x.shape[-1], "width: expected odd, within x")
        check(bool(x.isfinite().all()), "x: expected finite numbers")
        return Median.apply(x, width)

    return median


add(
    "moving_median_equal",
    moving_median,
    lambda: (real(2, 6),),
    bug="Backward finds the median by its value, so that equal numbers get the gradient several times",
    trigger="equal numbers in a window",
)


# Sine transform (DST-I) by its matrix
def sine_transform(wrong):
    def matrix(n, t):
        dtype = torch.float32 if wrong else torch.float64
        k = torch.arange(1, n + 1, dtype=dtype, device=t.device)
        return torch.sin(math.pi / (n + 1) * k[:, None] * k).to(t.dtype)

    class Transform(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            n = x.shape[-1]
            k = torch.arange(1, n + 1, dtype=torch.float64, device=x.device)
            return x @ torch.sin(math.pi / (n + 1) * k[:, None] * k).to(x.dtype)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad_y):
            return grad_y @ matrix(grad_y.shape[-1], grad_y)

    def transform(x):
        check(x.ndim >= 1, "x: expected at least one dimension")
        return Transform.apply(x)

    return transform


add(
    "sine_transform_single",
    sine_transform,
    lambda: (real(2, 6),),
    bug="Backward computes the sines in float32, where forward has float64",
    trigger="float64 and a tolerance below 1e-7",
)


# An all-zero filter whose taps come as a list of numbers
def listed_taps(wrong):
    class Filter(Function):
        @staticmethod
        def forward(ctx, x, taps):
            ctx.taps = taps if wrong else tuple(taps)
            n = x.shape[-1]
            return sum(c * F.pad(x, (j, 0))[..., :n] for j, c in enumerate(taps))

        @staticmethod
        def backward(ctx, grad_y):
            n = grad_y.shape[-1]
            g = [c * F.pad(grad_y[..., j:], (0, min(j, n))) for j, c in enumerate(ctx.taps)]
            return sum(g), None

    def filtered(x, taps=(0.5, 0.3, -0.2)):
        check(x.ndim >= 1, "x: expected at least one dimension")
        check(len(taps) >= 1, "taps: expected one at least")
        return Filter.apply(x, taps)

    return filtered


add(
    "listed_taps_changed",
    listed_taps,
    lambda: (real(2, 6),),
    kwargs=lambda: {"taps": [0.5, 0.3, -0.2]},
    bug="Backward reads the caller's list, not what it held",
    trigger="a list that is changed between forward and backward",
    missed="the caller's list is not changed between forward and backward",
)


# The state of a linear recurrence after all inputs, one pole each channel, complex
def complex_pole(wrong):
    class Pole(Function):
        @staticmethod
        def forward(ctx, x, a):
            ctx.save_for_backward(x, a)
            h = torch.zeros_like(x[0])
            for xt in x:
                h = a * h + xt
            return h

        @staticmethod
        def backward(ctx, grad_h):
            x, a = ctx.saved_tensors
            states = [torch.zeros_like(x[0])]
            for xt in x[:-1]:
                states.append(a * states[-1] + xt)
            grad_a, grads = torch.zeros_like(a), []
            g = grad_h
            for h in reversed(states):
                grads.append(g)
                grad_a = grad_a + g * (h if wrong else h.conj())
                g = g * a.conj()
            return torch.stack(grads[::-1]), grad_a

    def state(x, a):
        sized("x", x, None, None)
        sized("a", a, x.shape[1])
        if x.dtype in HALF or a.dtype in HALF:
            raise TypeError("expected at least single precision")
        if x.dtype != a.dtype:
            raise TypeError(f"expected one type, got {x.dtype} and {a.dtype}")
        check(bool((a.abs() <= 1.5).all()), "a: expected poles of magnitude 1.5 at most")
        check(bool((x.abs() <= 1e6).all()), "x: expected numbers of magnitude 1e6 at most")
        return Pole.apply(x, a)

    return state


add_bare(
    "complex_pole_state",
    complex_pole,
    lambda: (real(4, 3), (0.3 * real(3, seed=1)).detach().requires_grad_()),
    bug="The pole's gradient takes the state without its conjugate",
    trigger="complex poles",
)
