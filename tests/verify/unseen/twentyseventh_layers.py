"""Dropout, embedding and convolution."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentyseventh import add, check, indices, same, sized


# Alpha dropout: a (x where kept, else -s) + b, which keeps mean 0 and variance 1
def alpha_dropout(wrong):
    s = 1.7580993408473766

    def scale(p):
        return ((1 - p) * (1 + p * s * s)) ** -0.5

    class Dropout(Function):
        @staticmethod
        def forward(ctx, x, kept, p):
            ctx.save_for_backward(kept)
            ctx.p = p
            a = scale(p)
            return a * torch.where(kept, x, -s) + a * p * s

        @staticmethod
        def backward(ctx, grad_y):
            (kept,) = ctx.saved_tensors
            factor = 1 / (1 - ctx.p) if wrong else scale(ctx.p)
            return torch.where(kept, grad_y * factor, 0), None, None

    def dropout(x, kept, p=0.2):
        same(x, kept)
        check(kept.dtype == torch.bool, "kept: expected booleans")
        check(0 <= p < 1, "p: expected a number from 0 to below 1")
        return Dropout.apply(x, kept, p)

    return dropout


add(
    "alpha_dropout_factor",
    alpha_dropout,
    lambda: (real(3, 4), whole(3, 3, 4, seed=1) > 0),
    bug="Backward has plain dropout's factor",
)


# Dropout of whole channels, by one number between 0 and 1 for each of them
def channel_dropout(wrong):
    class Dropout(Function):
        @staticmethod
        def forward(ctx, x, u, p):
            ctx.save_for_backward(u)
            ctx.p = p
            return torch.where((u >= p)[..., None], x / (1 - p or 1), 0)

        @staticmethod
        def backward(ctx, grad_y):
            (u,) = ctx.saved_tensors
            p = ctx.p
            if wrong:
                kept = (u >= p).to(grad_y.dtype)[..., None]
                return grad_y * kept / torch.tensor(1 - p, dtype=grad_y.dtype), None, None
            return torch.where((u >= p)[..., None], grad_y / (1 - p or 1), 0), None, None

    def dropout(x, u, p=0.5):
        sized("x", x, None, None, None)
        sized("u", u, *x.shape[:2])
        check(not u.requires_grad, "u: expected numbers without a gradient")
        check(bool(((u >= 0) & (u < 1)).all()), "u: expected numbers from 0 to below 1")
        check(0 <= p <= 1, "p: expected a number from 0 to 1")
        return Dropout.apply(x, u, p)

    return dropout


add(
    "channel_dropout_all",
    channel_dropout,
    lambda: (real(2, 3, 4), torch.rand(2, 3, generator=torch.Generator().manual_seed(1)).double()),
    bug="Backward divides 0 by 0 where forward knows that nothing is kept",
    trigger="p=1",
)


# x + z for the samples that keep their branch, z scaled by 1 / (1 - p)
def drop_path(wrong):
    class Path(Function):
        @staticmethod
        def forward(ctx, x, z, kept, p):
            ctx.save_for_backward(kept)
            ctx.p = p
            return x + z * (kept.to(z.dtype) / (1 - p))[:, None]

        @staticmethod
        def backward(ctx, grad_y):
            (kept,) = ctx.saved_tensors
            factor = (kept.to(grad_y.dtype) / (1 - ctx.p))[:, None]
            grad_z = grad_y.detach().mul_(factor) if wrong else grad_y * factor
            return grad_y, grad_z, None, None

    def path(x, z, kept, p=0.5):
        sized("x", x, None, None)
        same(x, z)
        sized("kept", kept, len(x))
        check(kept.dtype == torch.bool, "kept: expected booleans")
        check(0 <= p < 1, "p: expected a number from 0 to below 1")
        return Path.apply(x, z, kept, p)

    return path


add(
    "drop_path_residual",
    drop_path,
    lambda: (real(3, 4), real(3, 4, seed=1), torch.tensor([True, False, True])),
    bug="The branch's gradient is scaled in the memory that goes to the residual too",
)


# Rows of a table, with rows of zeros for the padding
def lookup(wrong):
    class Lookup(Function):
        @staticmethod
        def forward(ctx, table, place, padding):
            ctx.save_for_backward(place)
            ctx.rows, ctx.padding = len(table), padding
            kept = place != padding % len(table)
            return torch.where(kept[..., None], table[place], 0)

        @staticmethod
        def backward(ctx, grad_y):
            (place,) = ctx.saved_tensors
            kept = place != (ctx.padding if wrong else ctx.padding % ctx.rows)
            g = torch.where(kept[..., None], grad_y, 0).flatten(0, -2)
            zeros = grad_y.new_zeros(ctx.rows, grad_y.shape[-1])
            return zeros.index_add(0, place.flatten(), g), None, None

    def rows(table, place, padding=0):
        sized("table", table, None, None)
        indices("place", place, len(table))
        check(place.ndim >= 1, "place: expected one dimension at least")
        check(-len(table) <= padding < len(table), "padding: expected a row of the table")
        return Lookup.apply(table, place.long(), padding)

    return rows


add(
    "lookup_padding",
    lookup,
    lambda: (real(5, 3), torch.tensor([[1, 4, 0], [4, 2, 0]])),
    bug="Backward compares with a padding row that is counted from the table's end",
    trigger="padding=-1, as in the sample",
    kwargs=lambda: {"padding": -1},
)


# Convolution of each channel by itself with several kernels: w has M rows for each channel
def depthwise(wrong):
    class Depthwise(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return F.conv1d(x, w[:, None], groups=x.shape[1])

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            row = torch.arange(len(w), device=w.device)
            channel = row % x.shape[1] if wrong else row // (len(w) // x.shape[1])
            grad_x = F.conv_transpose1d(grad_y, w[:, None], groups=x.shape[1])
            windows = x.unfold(2, w.shape[1], 1)[:, channel]
            return grad_x, torch.einsum("ncl,nclk->ck", grad_y, windows)

    def convolution(x, w):
        sized("x", x, None, None, None)
        sized("w", w, None, None)
        check(len(w) % x.shape[1] == 0, "w: expected as many rows for each channel")
        check(w.shape[1] <= x.shape[2], "w: expected no more taps than places")
        return Depthwise.apply(x, w)

    return convolution


add(
    "depthwise_multiplier",
    depthwise,
    lambda: (real(2, 3, 5), real(3, 2, seed=1)),
    bug="Backward gives kernel o the channel o % C, which is right for one kernel a channel",
    trigger="two kernels for each channel",
)


# Convolution that keeps the length: of K - 1 zeros one more at the end where K is even
def same_length(wrong):
    class Same(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return F.conv1d(padded(x, w.shape[2]), w)

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            k = w.shape[2]
            before = (k - 1) // 2 if wrong else k // 2
            grad_x = F.conv1d(F.pad(grad_y, (before, k - 1 - before)), w.flip(2).transpose(0, 1))
            grad_w = torch.einsum("nol,nclk->ock", grad_y, padded(x, k).unfold(2, k, 1))
            return grad_x, grad_w

    def padded(x, k):
        return F.pad(x, ((k - 1) // 2, k // 2))

    def convolution(x, w):
        sized("x", x, None, None, None)
        sized("w", w, None, x.shape[1], None)
        return Same.apply(x, w)

    return convolution


add(
    "same_length_even",
    same_length,
    lambda: (real(2, 2, 5), real(3, 2, 3, seed=1)),
    bug="Backward pads grad_output as forward pads x, where it should be the other way round",
    trigger="an even number of taps",
)


# The mean over time and the deviation, whose square is at least 1e-3, side by side
def statistics_pool(wrong):
    floor = 1e-3

    def spread(x):
        c = x - x.mean(2, keepdim=True)
        return c, c.square().mean(2, keepdim=True)

    class Pool(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.cat([x.mean(2), spread(x)[1].clamp(min=floor).sqrt()[..., 0]], 1)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            c, v = spread(x)
            grad_mean, grad_s = grad_y[..., None].chunk(2, 1)
            grad_s = grad_s / v.clamp(min=floor).sqrt()
            if not wrong:
                grad_s = torch.where(v > floor, grad_s, 0)
            return (grad_mean + grad_s * c) / x.shape[2]

    def pool(x):
        sized("x", x, None, None, None)
        return Pool.apply(x)

    return pool


add(
    "statistics_pool_floor",
    statistics_pool,
    lambda: (real(2, 3, 5),),
    bug="Backward lets the gradient through where forward holds the variance at its floor",
    trigger="a channel that is almost constant",
)
