"""Sequences and signals."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyfifth import add, check, leaf, sized


# Running sums that start anew where a flag stands
def restarted_sum(wrong):
    def sums(x, flags):
        state, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = torch.where(flags[:, t], 0, state) + x[:, t]
            out.append(state)
        return torch.stack(out, 1)

    class Sums(Function):
        @staticmethod
        def forward(ctx, x, flags):
            ctx.save_for_backward(flags)
            return sums(x, flags)

        @staticmethod
        def backward(ctx, grad_y):
            (flags,) = ctx.saved_tensors
            ends = flags if wrong else torch.cat([flags[:, 1:], flags[:, :1]], 1)
            return sums(grad_y.flip(1), ends.flip(1)).flip(1), None

    def running(x, flags):
        sized("x", x, None, None)
        sized("flags", flags, *x.shape)
        if flags.dtype != torch.bool:
            raise TypeError(f"flags: expected truth values, got {flags.dtype}")
        return Sums.apply(x, flags)

    return running


add(
    "restarted_sum_flag",
    restarted_sum,
    lambda: (real(2, 5), torch.zeros(2, 5, dtype=torch.bool)),
    bug="The sum from the end starts anew at the flag, not at the place before it",
    trigger="any restart but at the first place",
)


# A smoothing filter of odd length, as Savitzky and Golay's, over the inner places
def smoothing(wrong):
    class Smooth(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, w):
            return x.unfold(-1, w.shape[0], 1) @ w

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            k = w.shape[0]
            padded = torch.nn.functional.pad(grad_y, (k - 1, k - 1))
            grad_x = padded.unfold(-1, k, 1) @ (w if wrong else w.flip(0))
            grad_w = (grad_y[..., None] * x.unfold(-1, k, 1)).sum_to_size(k)
            return grad_x, grad_w

    def smooth(x, w):
        sized("w", w, None)
        check(w.shape[0] % 2 == 1, "w: expected an odd number of taps")
        check(x.ndim >= 1 and x.shape[-1] >= w.shape[0], "x: expected as many places as taps")
        return Smooth.apply(x, w)

    return smooth


def taps():
    return torch.tensor([-3.0, 12, 17, 12, -3], dtype=torch.float64) / 35


add(
    "smoothing_derivative",
    smoothing,
    lambda: (real(2, 7), taps()),
    bug="Backward does not turn the taps round",
    trigger="taps that are not symmetric, such as those of the first derivative",
)


# The moving median, of an even window the lower of both in the middle
def moving_median(wrong):
    class Median(Function):
        @staticmethod
        def forward(ctx, x, width):
            windows = x.unfold(1, width, 1)
            order = windows.argsort(dim=-1, stable=True)
            low, high = (width - 1) // 2, width // 2
            middle = order[..., low : high + 1] if wrong else order[..., low : low + 1]
            start = torch.arange(windows.shape[1], device=x.device)[:, None]
            ctx.save_for_backward((middle + start).flatten(1))
            ctx.length, ctx.share = x.shape[1], middle.shape[-1]
            return windows.sort(dim=-1, stable=True).values[..., low]

        @staticmethod
        def backward(ctx, grad_y):
            (places,) = ctx.saved_tensors
            zeros = grad_y.new_zeros(len(grad_y), ctx.length)
            shares = (grad_y / ctx.share).repeat_interleave(ctx.share, 1)
            return zeros.scatter_add(1, places, shares), None

    def median(x, width=3):
        sized("x", x, None, None)
        check(1 <= width <= x.shape[1], "width: expected a number from 1 to the length")
        check(not bool(x.isnan().any()), "x: expected no NaN")
        return Median.apply(x, width)

    return median


add(
    "moving_median_even",
    moving_median,
    lambda: (real(2, 7),),
    bug="Backward gives both middle places half, as if forward took their mean",
    trigger="an even width, as in the sample",
    kwargs=lambda: {"width": 4},
)


# A level in decibels, cut off at a range below the loudest place of all
def ranged_level(wrong):
    class Level(Function):
        @staticmethod
        def forward(ctx, x, span):
            ctx.save_for_backward(x)
            ctx.span = span
            y = 10 * x.log10()
            return y.maximum(y.max() - span)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            y = 10 * x.log10()
            floor = y.max() - ctx.span
            grad = torch.where(y >= floor, grad_y, 0)
            if not wrong:
                rest = torch.where(y >= floor, 0, grad_y).sum()
                loudest = torch.zeros_like(y).flatten().index_fill(0, y.argmax(), 1)
                grad = grad + rest * loudest.view(y.shape)
            return grad * 10 / math.log(10) / x, None

    def level(x, span=80.0):
        check(x.numel() > 0, "x: expected one place at least")
        check(span > 0, "span: expected a positive number")
        check(bool(((x > 0) & x.isfinite()).all()), "x: expected positive powers")
        return Level.apply(x, span)

    return level


add(
    "ranged_level_floor",
    ranged_level,
    lambda: (real(3, 4, positive=True),),
    bug="Places at the floor give nothing to the loudest place, by which the floor is set",
    trigger="a range of more than 80 dB in x",
)


# Teager's energy of the inner places: y_t = x_t^2 - x_{t-1} x_{t+1}
def teager(wrong):
    class Energy(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x[..., 1:-1] ** 2 - x[..., :-2] * x[..., 2:]

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            pad = torch.nn.functional.pad
            middle = pad(grad_y * 2 * x[..., 1:-1], (1, 1))
            before = pad(grad_y * x[..., 2:], (0, 2))
            after = pad(grad_y * x[..., :-2], (2, 0))
            return middle - 2 * before if wrong else middle - before - after

    def energy(x):
        check(x.ndim >= 1 and x.shape[-1] >= 3, "x: expected three places at least")
        return Energy.apply(x)

    return energy


add(
    "teager_neighbours",
    teager,
    lambda: (real(2, 6),),
    bug="Both neighbours' products are taken for one twice",
)


# Holt's smoothing of level and trend: l' = a x + (1 - a) (l + b), b' = c (l' - l) + (1 - c) b
def holt(wrong):
    class Holt(Function):
        @staticmethod
        def forward(ctx, x, a, c):
            ctx.save_for_backward(x)
            ctx.a, ctx.c = a, c
            level, trend, out = x[:, 0], torch.zeros_like(x[:, 0]), []
            for t in range(x.shape[1]):
                old, level = level, a * x[:, t] + (1 - a) * (level + trend)
                trend = c * (level - old) + (1 - c) * trend
                out.append(level)
            return torch.stack(out, 1)

        @staticmethod
        def backward(ctx, grad_y):
            a, c = ctx.a, ctx.c
            grad_level = grad_trend = torch.zeros_like(grad_y[:, 0])
            grads = []
            for t in reversed(range(grad_y.shape[1])):
                total = grad_y[:, t] + grad_level + c * grad_trend
                grads.append(a * total)
                grad_level = (1 - a) * total - c * grad_trend
                grad_trend = (1 - a) * total + (1 - c) * grad_trend
            if not wrong:
                grads[-1] = grads[-1] + grad_level
            return torch.stack(grads[::-1], 1), None, None

    def smooth(x, a=0.5, c=0.3):
        sized("x", x, None, None)
        check(0 <= a <= 1 and 0 <= c <= 1, "a, c: expected numbers from 0 to 1")
        return Holt.apply(x, a, c)

    return smooth


add(
    "holt_first_level",
    holt,
    lambda: (real(2, 5),),
    bug="The first place starts the level too, for which it gets no gradient",
)


# A gated recurrence h' = f h + (1 - f) x whose steps past a row's length leave the state as it is
def held_recurrence(wrong):
    class Held(Function):
        @staticmethod
        def forward(ctx, x, f, lengths):
            states = [torch.zeros_like(x[:, 0])]
            for t in range(x.shape[1]):
                new = f[:, t] * states[-1] + (1 - f[:, t]) * x[:, t]
                states.append(torch.where(t < lengths, new, states[-1]))
            ctx.save_for_backward(x, f, lengths)
            return states[-1]

        @staticmethod
        def backward(ctx, grad_y):
            x, f, lengths = ctx.saved_tensors
            states = [torch.zeros_like(x[:, 0])]
            for t in range(x.shape[1]):
                new = f[:, t] * states[-1] + (1 - f[:, t]) * x[:, t]
                states.append(torch.where(t < lengths, new, states[-1]))
            grad_x, grad_f = [], []
            for t in reversed(range(x.shape[1])):
                live = t < lengths
                grad_x.append(torch.where(live, grad_y * (1 - f[:, t]), 0))
                grad_f.append(torch.where(live, grad_y * (states[t] - x[:, t]), 0))
                through = grad_y * f[:, t]
                grad_y = through if wrong else torch.where(live, through, grad_y)
            return torch.stack(grad_x[::-1], 1), torch.stack(grad_f[::-1], 1), None

    def last(x, f, lengths):
        sized("x", x, None, None)
        sized("f", f, *x.shape)
        sized("lengths", lengths, len(x))
        check(bool(((lengths >= 0) & (lengths <= x.shape[1])).all()), "lengths: expected 0 to L")
        return Held.apply(x, f, lengths)

    return last


add(
    "held_recurrence_padding",
    held_recurrence,
    lambda: (real(2, 4), leaf(real(2, 4, seed=1).sigmoid()), torch.tensor([4, 4])),
    bug="The state's gradient is multiplied by the padding's gates on its way back",
    trigger="rows of several lengths",
)
