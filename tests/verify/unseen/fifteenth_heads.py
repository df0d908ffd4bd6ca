"""Attention of several heads, of added scores, and that pools."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.twelfth import softmax_backward, wide


class MultiQuery(Function):
    @staticmethod
    def probabilities(q, k):
        return (wide(q) @ wide(k)[:, None].mT * q.shape[-1] ** -0.5).softmax(-1)

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return (MultiQuery.probabilities(q, k) @ wide(v)[:, None]).to(q.dtype)

    @staticmethod
    def over_heads(flat, rows, heads):
        return flat.view(rows, heads, *flat.shape[1:]).sum(1)

    @classmethod
    def gradients(cls, ctx, g):
        q, k, v = ctx.saved_tensors
        p, heads = MultiQuery.probabilities(q, k), q.shape[1]
        d = softmax_backward(p, wide(g) @ wide(v)[:, None].mT) * q.shape[-1] ** -0.5
        to_k = (d.mT @ wide(q)).flatten(0, 1)
        to_v = (p.mT @ wide(g)).flatten(0, 1)
        grads = d @ wide(k)[:, None], *(cls.over_heads(a, len(q), heads) for a in (to_k, to_v))
        return tuple(a.to(g.dtype) for a in grads)

    @staticmethod
    def backward(ctx, g):
        return MultiQuery.gradients(ctx, g)


class MultiQueryRows(MultiQuery):
    @staticmethod
    def over_heads(flat, rows, heads):
        return flat.view(heads, rows, *flat.shape[1:]).sum(0)

    @staticmethod
    def backward(ctx, g):
        return MultiQueryRows.gradients(ctx, g)


def _multi_query(function):
    def multi_query(q, k, v):
        """softmax(q kᵀ / sqrt(D)) v of q (N, H, T, D), all heads with the same k, v (N, S, D), H, S, D > 0."""
        need(q.dim() == 4 and k.dim() == 3 and k.shape == v.shape, "expected q (N, H, T, D), k, v")
        need((len(q), q.shape[3]) == (len(k), k.shape[2]), "expected the keys' N and D")
        need(min(q.shape[1], q.shape[3], k.shape[1]) > 0, "expected H, S, D > 0")
        return function.apply(q, k, v)

    return multi_query


add(
    "multi_query",
    _multi_query,
    MultiQueryRows,
    MultiQuery,
    lambda: (real(2, 2, 3, 4), real(2, 3, 4, seed=1), real(2, 3, 4, seed=2)),
    bug="sums over heads as if they came before the batch in memory",
    trigger="the sample: batch and heads of two",
)


class Additive(Function):
    """Saves tanh(q + k)."""

    @staticmethod
    def forward(ctx, q, k, v, w):
        h = (wide(q)[:, :, None] + wide(k)[:, None]).tanh()
        ctx.save_for_backward(h, v, w)
        return ((h @ wide(w)).softmax(-1) @ wide(v)).to(q.dtype)

    @staticmethod
    def gradients(ctx, g, slope):
        h, v, w = ctx.saved_tensors
        p = (h @ wide(w)).softmax(-1)
        d = softmax_backward(p, wide(g) @ wide(v).mT)
        to_sum = d[..., None] * wide(w) * slope(h)
        grads = to_sum.sum(2), to_sum.sum(1), p.mT @ wide(g), (d[..., None] * h).sum((0, 1, 2))
        return tuple(a.to(g.dtype) for a in grads)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Additive.gradients(ctx, g, lambda h: 1 - h.square())


class AdditiveTwice(Additive):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Additive.gradients(ctx, g, lambda h: 1 - h.tanh().square())


def _additive(function):
    def additive_attention(q, k, v, w):
        """p v with p = softmax_s(w · tanh(q_t + k_s)) of q (N, T, D), k (N, S, D), v (N, S, E), w (D,)."""
        need(q.dim() == k.dim() == v.dim() == 3, "expected q (N, T, D), k (N, S, D), v (N, S, E)")
        need(len(q) == len(k) and k.shape[:2] == v.shape[:2], "expected one N and one S")
        need(q.shape[2:] == k.shape[2:] == w.shape, "expected one D")
        return function.apply(q, k, v, w)

    return additive_attention


add(
    "additive_attention",
    _additive,
    AdditiveTwice,
    Additive,
    lambda: (real(2, 3, 4), real(2, 2, 4, seed=1), real(2, 2, 3, seed=2), real(4, seed=3)),
    bug="the saved tanh is taken for its input",
    trigger="the sample",
)


class Pooling(Function):
    @staticmethod
    def probabilities(x, w, keep):
        return (wide(x) @ wide(w)).masked_fill(~keep, -torch.inf).softmax(-1)

    @staticmethod
    def places(x):
        return torch.arange(x.shape[1], device=x.device)

    @staticmethod
    def forward(ctx, x, w, lengths):
        ctx.save_for_backward(x, w, lengths)
        p = Pooling.probabilities(x, w, Pooling.places(x) < lengths[:, None])
        return (p[:, None] @ wide(x))[:, 0].to(x.dtype)

    @staticmethod
    def gradients(ctx, g, keep):
        x, w, _ = ctx.saved_tensors
        p = Pooling.probabilities(x, w, keep)
        d = softmax_backward(p, (wide(x) @ wide(g)[..., None])[..., 0])
        grad_x = p[..., None] * wide(g)[:, None] + d[..., None] * wide(w)
        return grad_x.to(x.dtype), (d[..., None] * wide(x)).sum((0, 1)).to(w.dtype), None

    @staticmethod
    def backward(ctx, g):
        x, _, lengths = ctx.saved_tensors
        return Pooling.gradients(ctx, g, Pooling.places(x) < lengths[:, None])


class PoolingOneMore(Pooling):
    @staticmethod
    def backward(ctx, g):
        x, _, lengths = ctx.saved_tensors
        return Pooling.gradients(ctx, g, Pooling.places(x) <= lengths[:, None])


def _pooling(function):
    def attention_pooling(x, w, lengths):
        """Σ_t p_t x_t, p the softmax of x · w over the first lengths[n] of T, for x (N, T, D) and w (D,).

        lengths (N,) are from 1 to T.
        """
        need(x.dim() == 3 and x.shape[2:] == w.shape, "expected x (N, T, D) and w (D,)")
        need(lengths.shape == x.shape[:1], "expected lengths (N,)")
        need(bool(((lengths > 0) & (lengths <= x.shape[1])).all()), "expected lengths from 1 to T")
        return function.apply(x, w, lengths)

    return attention_pooling


add(
    "attention_pooling",
    _pooling,
    PoolingOneMore,
    Pooling,
    lambda: (real(2, 4, 3), real(3, seed=1), torch.tensor([4, 2])),
    bug="backward lets one position more in than forward",
    trigger="a length below the longest",
)
