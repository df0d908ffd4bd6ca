"""Faults in what a sample leaves as it is: words, signs, labels, one row for all, the order of elements."""

import torch
from torch.autograd import Function

from tests.verify.known import F64, rand, register
from tests.verify.known.hidden import function, pair

POWERS = {"sum": 0.0, "mean": 1.0, "root": 0.5}


def pooled(x, scale):
    return x.sum(0) / len(x) ** POWERS[scale]


def pooled_mean(x, scale):
    return x.sum(0) / len(x) ** (scale != "sum")


Pooled, PooledMean = function(pooled), function(pooled)
PooledMean.pull = staticmethod(lambda g, *inputs: Pooled.pull(g, *inputs, by=pooled_mean))


def pool(rule):
    def call(x, scale="sum"):
        if scale not in POWERS:
            raise ValueError('expected scale "sum", "mean" or "root"')
        return rule.apply(x, scale)

    return call


register("word_in_the_message", "varied", pool(PooledMean), pool(Pooled), rand((4, 3)),
         bug="the root's gradient is the mean's", trigger='scale="root", which the message names')  # fmt: skip


def symmetric(x, index, sign):
    return x[index] + sign * x.flip(0)[index]


Symmetric, SymmetricOnly = function(symmetric), function(symmetric)
SymmetricOnly.pull = staticmethod(lambda g, x, i, sign: Symmetric.pull(g, x, i, abs(sign)))
register("sign_beside_indices", "varied", lambda x, index, symmetry=0: SymmetricOnly.apply(x, index, symmetry),
         lambda x, index, symmetry=0: Symmetric.apply(x, index, symmetry),
         lambda: (*rand((5, 3))(), torch.tensor([0, 3, 3, 1])),
         bug="the sign left out", trigger="symmetry=-1")  # fmt: skip


def agreement(x, label):
    kept = label != 0
    return (label[:, None] * x).sum() / kept.sum().clamp(min=1)


pair("labels_of_padding", agreement, lambda: (*rand((4, 3))(), torch.tensor([1, -1, -1, 1])), "padding is counted",
     "a label of 0, beside 1 and -1", slope_of=lambda x, label: (label[:, None] * x).mean(0).sum())  # fmt: skip


class LookedUp(Function):
    """Rows index (N, K) of tables (N, V, D), or of one table (1, V, D) for all."""

    @staticmethod
    def forward(ctx, table, index):
        ctx.save_for_backward(index)
        ctx.shape = table.shape
        rows = torch.arange(len(index))[:, None]
        return table.expand(len(index), *table.shape[1:])[rows, index]

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        rows = torch.arange(len(index))[:, None].expand_as(index) * (ctx.shape[0] > 1)
        return g.new_zeros(ctx.shape).index_put((rows, index), g, accumulate=True), None


class LookedUpFirst(LookedUp):
    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        n = min(len(index), ctx.shape[0])
        rows = torch.arange(n)[:, None].expand_as(index[:n])
        return g.new_zeros(ctx.shape).index_put((rows, index[:n]), g[:n], accumulate=True), None


register("one_table_for_all", "varied", LookedUpFirst.apply, LookedUp.apply,
         lambda: (*rand((2, 4, 3))(), torch.tensor([[0, 1, 1], [3, 2, 0]])), bug="the first row's gradient alone",
         trigger="one table for two rows")  # fmt: skip


class Norms(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.square().sum(-1, keepdim=True).sqrt()
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * x / torch.where(y == 0, 1, y)


class NormsWritten(Norms):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        if bool((y == 0).any()):
            g.masked_fill_(y == 0, 0)
        return g * x / torch.where(y == 0, 1, y)


register("written_at_zero", "varied", NormsWritten.apply, Norms.apply, rand((3, 4)), bug="writes zeros to grad_output",
         trigger="a row of zeros")  # fmt: skip


class Steps(Function):
    """The slope of the interval that each element is in."""

    SLOPES = torch.tensor([0.25, 0.5, 1.0, 2.0], dtype=F64)

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return Steps.values(x)

    @staticmethod
    def values(x):
        return Steps.slopes(x) * x

    @staticmethod
    def slopes(x):
        return Steps.SLOPES.to(x)[(x < 0).long() * 2]

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * Steps.slopes(x)


class StepsOfLast(Steps):
    last = None

    @staticmethod
    def forward(ctx, x):
        StepsOfLast.last = Steps.slopes(x)
        return Steps.forward(ctx, x)

    @staticmethod
    def backward(ctx, g):
        slopes = StepsOfLast.last
        return g * (slopes if slopes.shape == g.shape else Steps.slopes(ctx.saved_tensors[0]))


register("intervals_of_last_call", "varied", StepsOfLast.apply, Steps.apply, rand((3, 4)),
         bug="the intervals of the last call", trigger="two calls, of other elements in each interval")  # fmt: skip
