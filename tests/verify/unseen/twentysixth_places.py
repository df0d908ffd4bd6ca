"""Padding, cutting, moving and merging: functions that put numbers in other places."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentieth import real_only
from tests.verify.unseen.twentysixth import add, add_bare, check, sized


# Two elements of the end before a row, one of the start after it
def circular_pad(wrong):
    class Pad(Function):
        @staticmethod
        def forward(ctx, x):
            return torch.cat((x[..., -2:], x, x[..., :1]), -1)

        @staticmethod
        def backward(ctx, grad_y):
            grad_x = grad_y[..., 2:-1]
            if not wrong:
                grad_x = grad_x.clone()
            grad_x[..., -2:] += grad_y[..., :2]
            grad_x[..., :1] += grad_y[..., -1:]
            return grad_x

    def pad(x):
        check(x.ndim >= 1 and x.shape[-1] >= 2, "x: expected a length of 2 or more")
        return Pad.apply(x)

    return pad


add(
    "circular_pad_view",
    circular_pad,
    lambda: (real(3, 5),),
    bug="The input's gradient is a view of grad_output, to which the borders are added",
    trigger="grad_output compared before and after, used again, or expanded",
)


# A row with both ends said three times
def replicate_pad(wrong):
    class Pad(Function):
        @staticmethod
        def forward(ctx, x):
            first, last = x[..., :1], x[..., -1:]
            return torch.cat((first, first, x, last, last), -1)

        @staticmethod
        def backward(ctx, grad_y):
            grad_x = grad_y[..., 2:-2].clone()
            if wrong:
                grad_x[..., 0] = grad_y[..., :3].sum(-1)
                grad_x[..., -1] = grad_y[..., -3:].sum(-1)
            else:
                grad_x[..., 0] += grad_y[..., :2].sum(-1)
                grad_x[..., -1] += grad_y[..., -2:].sum(-1)
            return grad_x

    def pad(x):
        check(x.ndim >= 1 and x.shape[-1] >= 1, "x: expected a length of 1 or more")
        return Pad.apply(x)

    return pad


add(
    "replicate_pad_single",
    replicate_pad,
    lambda: (real(3, 5),),
    bug="The ends are assigned one after the other, not added to",
    trigger="a length of 1, where both ends are one",
)


# Rows shifted by two
def shifted_window(wrong):
    class Shift(Function):
        @staticmethod
        def forward(ctx, x):
            return x.roll(-2, -1)

        @staticmethod
        def backward(ctx, grad_y):
            return grad_y.roll(-2 if wrong else 2, -1)

    def shift(x):
        check(x.ndim >= 1, "x: expected one dimension or more")
        return Shift.apply(x)

    return shift


add(
    "shifted_window_back",
    shifted_window,
    lambda: (real(3, 4),),
    bug="Backward shifts the same way again, which is the way back for a window of four",
    trigger="any length but 4, 2 and 1",
)


# The 2 x 2 in the middle of each image
def middle(wrong):
    class Middle(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.size = x.shape
            top, left = ((n - 2) // 2 for n in x.shape[-2:])
            return x[..., top : top + 2, left : left + 2].clone()

        @staticmethod
        def backward(ctx, grad_y):
            margins = [n - 2 for n in ctx.size[-2:]]
            top, left = (round(m / 2) if wrong else m // 2 for m in margins)
            down, right = margins[0] - top, margins[1] - left
            return F.pad(grad_y, (left, right, top, down))

    def cut(x):
        check(x.ndim >= 2 and min(x.shape[-2:]) >= 2, "x: expected (*, H, W), 2 x 2 or more")
        return Middle.apply(x)

    return cut


add(
    "middle_rounded",
    middle,
    lambda: (real(2, 4, 6),),
    bug="Half of the margin is rounded in backward and cut off in forward",
    trigger="a side of 5, 9, 13, ...",
)


# (*, H, L, D) to (*, L, H D)
def merged_heads(wrong):
    class Merge(Function):
        @staticmethod
        def forward(x):
            y = x.transpose(-3, -2).clone(memory_format=torch.contiguous_format)
            return y.flatten(-2)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.heads = inputs[0].shape[-3], inputs[0].shape[-1]

        @staticmethod
        def backward(ctx, grad_y):
            return grad_y.unflatten(-1, ctx.heads).transpose(-3, -2)

        @staticmethod
        def vmap(info, in_dims, x):
            return Merge.apply(x if wrong else x.movedim(in_dims[0], 0)), 0

    def merge(x):
        check(x.ndim >= 3 and min(x.shape[-3:]) >= 1, "x: expected (*, H, L, D)")
        return Merge.apply(x)

    return merge


add(
    "merged_heads_vmap",
    merged_heads,
    lambda: (real(2, 3, 2, 4),),
    bug="The batching rule takes the batch to be first",
    trigger="vmap with in_dims of 1",
)


# Every second place is in between: an image of twice the size
def twice_the_size(wrong):
    def between(n, like):
        place = (torch.arange(2 * n, device=like.device) - 0.5) / 2
        place = place.clamp(0, n - 1)
        columns = torch.arange(n, device=like.device)
        return (1 - (place[:, None] - columns).abs()).clamp(min=0).to(like.dtype)

    class Twice(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.dtype = x.dtype
            down, across = (between(n, x) for n in x.shape)
            ctx.save_for_backward(down, across)
            return down @ x @ across.mT

        @staticmethod
        def backward(ctx, grad_y):
            down, across = ctx.saved_tensors
            if wrong:
                return down.mT @ grad_y @ across
            with torch.autocast(grad_y.device.type, enabled=False):
                return down.mT @ grad_y.to(ctx.dtype) @ across

    def twice(x):
        sized("x", x, None, None)
        return Twice.apply(x)

    return real_only(twice)


add_bare(
    "twice_the_size_autocast",
    twice_the_size,
    lambda: (real(3, 4),),
    bug="Under autocast the products are of a half type, the kept weights are not",
    trigger="torch.autocast around forward",
)


# A learned table of positions added to sequences
def positions(wrong):
    class Positions(Function):
        @staticmethod
        def forward(ctx, x, table):
            ctx.rest = len(table) - x.shape[-2]
            return x + table[: x.shape[-2]]

        @staticmethod
        def backward(ctx, grad_y):
            grad_table = grad_y.sum(0)
            if not wrong:
                grad_table = F.pad(grad_table, (0, 0, 0, ctx.rest))
            return grad_y, grad_table

    def add_positions(x, table):
        sized("x", x, None, None, None)
        sized("table", table, None, x.shape[-1])
        check(len(table) >= x.shape[1], "table: expected as many rows as the sequences, or more")
        return Positions.apply(x, table)

    return add_positions


add(
    "positions_shorter",
    positions,
    lambda: (real(2, 4, 3), real(4, 3, seed=1)),
    bug="The table's gradient has the rows of the sequence only",
    trigger="sequences shorter than the table",
    missed="backward raises, for sizes that forward may have taken by chance",
)


# Sobel's filter in x, channel by channel
def edges(wrong):
    def filters(x):
        taps = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=x.device, dtype=x.dtype)
        return taps.expand(x.shape[1], 1, 3, 3)

    class Edges(Function):
        @staticmethod
        def forward(ctx, x):
            return F.conv2d(x, filters(x), groups=x.shape[1])

        @staticmethod
        def backward(ctx, grad_y):
            groups = 1 if wrong else grad_y.shape[1]
            return F.conv_transpose2d(grad_y, filters(grad_y), groups=groups)

    def sobel(x):
        sized("x", x, None, None, None, None)
        check(min(x.shape[2:]) >= 3, "x: expected images of 3 x 3 or more")
        return Edges.apply(x)

    return sobel


add(
    "edges_groups",
    edges,
    lambda: (real(2, 1, 4, 5),),
    bug="Backward's transposed convolution is not told of the groups",
    trigger="more than one channel",
)


# 2-D rotary positions: half of the features turn by the row, half by the column
def rotary_grid(wrong):
    def turns(x):
        h, w, d = x.shape[-3:]
        speed = 100.0 ** -(torch.arange(d // 4, device=x.device, dtype=x.dtype) / (d // 4))
        down = torch.arange(h, device=x.device, dtype=x.dtype)[:, None, None] * speed
        across = torch.arange(w, device=x.device, dtype=x.dtype)[:, None] * speed
        angle = torch.cat((down.expand(h, w, -1), across.expand(h, w, -1)), -1)
        return torch.polar(torch.ones_like(angle), angle)

    class Rotary(Function):
        @staticmethod
        def forward(ctx, x):
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * turns(x)).flatten(-2)

        @staticmethod
        def backward(ctx, grad_y):
            pairs = grad_y.unflatten(-1, (-1, 2))
            pairs = torch.view_as_complex(pairs if wrong else pairs.contiguous())
            return torch.view_as_real(pairs * turns(grad_y).conj()).flatten(-2)

    def rotary(x):
        check(x.ndim >= 3 and x.shape[-1] >= 4, "x: expected (*, H, W, D)")
        check(x.shape[-1] % 4 == 0, "x: expected a multiple of 4 features")
        return Rotary.apply(x)

    return rotary


add(
    "rotary_grid_strides",
    rotary_grid,
    lambda: (real(2, 3, 2, 4),),
    bug="Backward views grad_output as complex numbers, which only some strides allow",
    trigger="an expanded or transposed grad_output",
)
