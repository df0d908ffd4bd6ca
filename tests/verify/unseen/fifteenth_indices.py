"""Gathers and segments."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.fifteenth_activations import raw
from tests.verify.unseen.twelfth import wide


class GatherRows(Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        rows = torch.arange(len(index), device=x.device)[:, None]
        return x.expand(len(index), -1, -1)[rows, index]

    @staticmethod
    def gradients(ctx, g, batch):
        (index,) = ctx.saved_tensors
        parts = []
        for n in range(batch):
            grad = torch.zeros(ctx.shape[1:], dtype=wide(g).dtype, device=g.device)
            parts.append(grad.index_add(0, index[n], wide(g)[n]))
        return parts

    @staticmethod
    def backward(ctx, g):
        grad = torch.stack(GatherRows.gradients(ctx, g, len(g)))
        return (grad.sum(0, keepdim=True) if ctx.shape[0] == 1 else grad).to(g.dtype), None


class GatherRowsFirst(GatherRows):
    """Goes over the table's batch."""

    @staticmethod
    def backward(ctx, g):
        return torch.stack(GatherRows.gradients(ctx, g, ctx.shape[0])).to(g.dtype), None


def _gather_rows(function):
    def gather_rows(x, index):
        """Rows index (N, K) of the tables x (N, V, D), or of one table x (1, V, D) for all; N > 0."""
        need(x.dim() == 3 and index.dim() == 2, "expected x (N, V, D) and index (N, K)")
        need(len(index) > 0 and len(x) in {1, len(index)}, "expected N > 0 tables, or one")
        need(bool(((index >= 0) & (index < x.shape[1])).all()), "expected indices below V")
        return function.apply(x, index)

    return gather_rows


add(
    "gather_rows",
    _gather_rows,
    GatherRowsFirst,
    GatherRows,
    lambda: (real(2, 4, 3), whole(4, 2, 3, seed=1)),
    bug="the gradient of a table for all is that of the first row of indices",
    trigger="one table for two rows",
)


class EmbeddingBag(Function):
    @staticmethod
    def forward(ctx, weight, index):
        ctx.save_for_backward(index)
        ctx.rows = len(weight)
        return wide(weight)[index].sum(1).to(weight.dtype)

    @staticmethod
    def gradients(ctx, g, index):
        each = wide(g)[:, None].expand(*index.shape, -1).reshape(-1, g.shape[1])
        grad = torch.zeros(ctx.rows, g.shape[1], dtype=each.dtype, device=g.device)
        return grad.index_add(0, index.reshape(-1), each).to(g.dtype), None

    @staticmethod
    def backward(ctx, g):
        return EmbeddingBag.gradients(ctx, g, *ctx.saved_tensors)


class EmbeddingBagRaw(EmbeddingBag):
    @staticmethod
    def backward(ctx, g):
        return EmbeddingBag.gradients(ctx, g, raw(ctx.saved_tensors[0]))


def _embedding_bag(function):
    def embedding_bag(weight, index):
        """Sums (N, D) of the rows of weight (V, D) that index (N, K) names."""
        need(weight.dim() == index.dim() == 2, "expected weight (V, D) and index (N, K)")
        need(bool(((index >= 0) & (index < len(weight))).all()), "expected indices below V")
        return function.apply(weight, index)

    return embedding_bag


add(
    "embedding_bag",
    _embedding_bag,
    EmbeddingBagRaw,
    EmbeddingBag,
    lambda: (real(5, 3), whole(5, 2, 4, seed=1)),
    bug="backward reads the indices as if they were contiguous",
    trigger="a transposed, sliced or expanded index",
)


class SegmentSum(Function):
    power = {"sum": 0.0, "mean": 1.0, "sqrt": 0.5}  # noqa: RUF012

    @staticmethod
    def counts(ids, count, like):
        ones = torch.ones(len(ids), dtype=wide(like).dtype, device=like.device)
        return ones.new_zeros(count).index_add(0, ids, ones).clamp(min=1)

    @staticmethod
    def forward(ctx, x, ids, count, scale):
        ctx.save_for_backward(ids)
        ctx.options = count, scale
        y = wide(x).new_zeros(count, x.shape[1]).index_add(0, ids, wide(x))
        counts = SegmentSum.counts(ids, count, x)[:, None]
        return (y / counts ** SegmentSum.power[scale]).to(x.dtype)

    @staticmethod
    def gradients(ctx, g, power):
        (ids,), (count, _) = ctx.saved_tensors, ctx.options
        d = wide(g) / SegmentSum.counts(ids, count, g)[:, None] ** power
        return d[ids].to(g.dtype), None, None, None

    @staticmethod
    def backward(ctx, g):
        return SegmentSum.gradients(ctx, g, SegmentSum.power[ctx.options[1]])


class SegmentSumMean(SegmentSum):
    @staticmethod
    def backward(ctx, g):
        return SegmentSum.gradients(ctx, g, 0.0 if ctx.options[1] == "sum" else 1.0)


def _segment_sum(function):
    def segment_sum(x, ids, count, scale="sum"):
        """Sums (count, D) of the rows of x (P, D) with one id; ids (P,) are below count.

        With scale "mean" they are divided by the number of rows, with "sqrt" by its root.
        """
        need(x.dim() == 2 and ids.shape == x.shape[:1], "expected x (P, D) and ids (P,)")
        need(scale in SegmentSum.power, 'expected scale "sum", "mean" or "sqrt"')
        need(bool(((ids >= 0) & (ids < count)).all()), "expected ids below count")
        return function.apply(x, ids, count, scale)

    return segment_sum


add(
    "segment_sum",
    _segment_sum,
    SegmentSumMean,
    SegmentSum,
    lambda: (real(6, 3), torch.tensor([0, 0, 1, 2, 2, 2]), 3),
    bug="the root's gradient is divided by the number of rows",
    trigger='scale="sqrt"',
)
