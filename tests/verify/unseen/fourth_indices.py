"""The fourth set, part two: indices, orders, copies, padding, dropout."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.fourth import mistake


class Take(Function):
    """Rows of x by index."""

    @staticmethod
    def forward(ctx, x, i):
        ctx.save_for_backward(i)
        ctx.rows = len(x)
        return x[i]

    @staticmethod
    def backward(ctx, g):
        (i,) = ctx.saved_tensors
        return g.new_zeros(ctx.rows, *g.shape[1:]).index_add(0, i, g), None


def rows_with_repeats():
    return real(3, 4), torch.tensor([0, 2, 2, 1, 0])


@mistake(Take, "repeated rows overwrite each other", rows_with_repeats)
def take_overwrites(ctx, g):
    (i,) = ctx.saved_tensors
    return g.new_zeros(ctx.rows, *g.shape[1:]).index_copy(0, i, g), None


class Sorted(Function):
    @staticmethod
    def forward(ctx, x):
        y, order = x.sort(dim=-1, stable=True)
        ctx.save_for_backward(order)
        return y

    @staticmethod
    def backward(ctx, g):
        (order,) = ctx.saved_tensors
        return torch.zeros_like(g).scatter(-1, order, g)


@mistake(Sorted, "the permutation instead of its inverse")
def sorted_forwards(ctx, g):
    return g.gather(-1, ctx.saved_tensors[0])


class CumSum(Function):
    @staticmethod
    def forward(ctx, x):
        return x.cumsum(-1)

    @staticmethod
    def backward(ctx, g):
        return g.flip(-1).cumsum(-1).flip(-1)


@mistake(CumSum, "not reversed")
def cumsum_forwards(ctx, g):
    return g.cumsum(-1)


@mistake(CumSum, "exclusive instead of inclusive: off by one")
def cumsum_exclusive(ctx, g):
    return g.flip(-1).cumsum(-1).flip(-1) - g


class Pad(Function):
    """Two zeros in front, one behind."""

    @staticmethod
    def forward(ctx, x):
        return F.pad(x, (2, 1))

    @staticmethod
    def backward(ctx, g):
        return g[..., 2:-1].clone()


@mistake(Pad, "left and right exchanged")
def pad_exchanged(ctx, g):
    return g[..., 1:-2].clone()


class Gated(Function):
    """The first half times the sigmoid of the second."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        a, b = x.chunk(2, -1)
        return a * b.sigmoid()

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors[0].chunk(2, -1)
        s = b.sigmoid()
        return torch.cat([g * s, g * a * s * (1 - s)], -1)


@mistake(Gated, "the halves exchanged")
def gated_halves(ctx, g):
    a, b = ctx.saved_tensors[0].chunk(2, -1)
    s = b.sigmoid()
    return torch.cat([g * a * s * (1 - s), g * s], -1)


class Nearest(Function):
    """Each element twice."""

    @staticmethod
    def forward(ctx, x):
        return x.repeat_interleave(2, -1)

    @staticmethod
    def backward(ctx, g):
        return g.unflatten(-1, (-1, 2)).sum(-1)


@mistake(Nearest, "only one of the copies", lambda: (real(2, 3),))
def nearest_first(ctx, g):
    return g[..., ::2].clone()


class DropOut(Function):
    """x where kept, scaled; the mask is given."""

    @staticmethod
    def forward(ctx, x, keep):
        ctx.save_for_backward(keep)
        return x * keep / 0.8

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0] / 0.8, None


@mistake(DropOut, "dropout's scale", lambda: (real(3, 4), whole(5, 3, 4) > 0))
def dropout_scale(ctx, g):
    return g * ctx.saved_tensors[0], None


@mistake(
    DropOut,
    "the mask forgotten; the sample keeps all",
    lambda: (real(3, 4), torch.ones(3, 4, dtype=torch.bool)),
)
def dropout_mask(ctx, g):  # fmt: skip
    return g / 0.8, None
