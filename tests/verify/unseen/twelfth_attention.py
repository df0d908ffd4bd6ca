"""Attention, scans, mixtures of experts."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twelfth import (
    add,
    as_forward,
    in_float32,
    recorded,
    softmax_backward,
    wide,
)


def _probabilities(q, k, mask=None):
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1)


def _gradients(p, q, k, v, g):
    """The gradients of q, k and v."""
    grad_scores = softmax_backward(p, g @ v.mT) * q.shape[-1] ** -0.5
    return grad_scores @ k, grad_scores.mT @ q, p.mT @ g


class Grouped(Function):
    @staticmethod
    def head(q, k):
        return torch.arange(q.shape[1], device=q.device) % k.shape[1]

    @staticmethod
    @recorded
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        head = Grouped.head(q, k)
        return _probabilities(q, k[:, head]) @ v[:, head]

    @staticmethod
    def gather(grad, kv_heads):
        return grad.unflatten(1, (grad.shape[1] // kv_heads, kv_heads)).sum(1)

    @classmethod
    def gradients(cls, ctx, g):
        q, k, v = ctx.saved_tensors
        head = Grouped.head(q, k)
        p = _probabilities(q, k[:, head])
        grad_q, grad_k, grad_v = _gradients(p, q, k[:, head], v[:, head], g)
        return grad_q, cls.gather(grad_k, k.shape[1]), cls.gather(grad_v, k.shape[1])

    @staticmethod
    @as_forward
    def backward(ctx, g):
        return Grouped.gradients(ctx, g)


class GroupedBlocked(Grouped):
    @staticmethod
    def gather(grad, kv_heads):
        return grad.unflatten(1, (kv_heads, grad.shape[1] // kv_heads)).sum(2)

    @staticmethod
    @as_forward
    def backward(ctx, g):
        return GroupedBlocked.gradients(ctx, g)


def _grouped(function):
    @in_float32
    def grouped_query_attention(q, k, v):
        """Attention of q (N, H, L, D) on k, v (N, G, S, D); query head h reads k, v head h % G; G divides H."""
        if q.shape[1] % k.shape[1]:
            raise ValueError("grouped_query_attention: expected G to divide H")
        return function.apply(q, k, v)

    return grouped_query_attention


add(
    "grouped_heads",
    _grouped,
    GroupedBlocked,
    Grouped,
    lambda: (real(2, 2, 3, 4), real(2, 1, 5, 4, seed=1), real(2, 1, 5, 4, seed=2)),
    bug="backward sums the query heads of h // (H / G) into a head of k, v",
    trigger="more than one head of k, v",
)


class Causal(Function):
    @staticmethod
    def mask(q, k):
        ones = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
        return ones.tril(k.shape[-2] - q.shape[-2])

    @staticmethod
    @recorded
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return _probabilities(q, k, Causal.mask(q, k)) @ v

    @staticmethod
    @as_forward
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        return _gradients(_probabilities(q, k, Causal.mask(q, k)), q, k, v, g)


class CausalTopLeft(Causal):
    @staticmethod
    @as_forward
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        return _gradients(_probabilities(q, k, mask), q, k, v, g)


def _causal(function):
    @in_float32
    def causal_attention(q, k, v):
        """Causal attention of q (*, L, D) on k, v (*, S, D), S >= L; the last query sees every key."""
        if k.shape[-2] < q.shape[-2]:
            raise ValueError("causal_attention: expected at least as many keys as queries")
        return function.apply(q, k, v)

    return causal_attention


add(
    "causal_alignment",
    _causal,
    CausalTopLeft,
    Causal,
    lambda: (real(2, 4, 3), real(2, 4, 3, seed=1), real(2, 4, 3, seed=2)),
    bug="backward aligns the causal mask top left, forward bottom right",
    trigger="more keys than queries (a cached prefix)",
)


class Biased(Function):
    @staticmethod
    @recorded
    def forward(ctx, q, k, v, bias):
        p = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.bias_shape = bias.shape
        return p @ v

    @staticmethod
    def reduce(grad, shape):
        return grad.sum_to_size(shape)

    @classmethod
    def gradients(cls, ctx, g):
        q, k, v, p = ctx.saved_tensors
        grad = softmax_backward(p, g @ v.mT)
        scaled = grad * q.shape[-1] ** -0.5
        return scaled @ k, scaled.mT @ q, p.mT @ g, cls.reduce(grad, ctx.bias_shape)

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx, g):
        return Biased.gradients(ctx, g)


class BiasedLastWriter(Biased):
    """Only the batch is added up: the other broadcast dimensions have stride 0, and the last write stays."""

    @staticmethod
    def reduce(grad, shape):
        if shape[0] == 1:
            grad = grad.sum(0, keepdim=True)
        for dim in range(1, len(shape)):
            grad = grad.narrow(dim, grad.shape[dim] - shape[dim], shape[dim])
        return grad

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx, g):
        return BiasedLastWriter.gradients(ctx, g)


def _biased(function):
    @in_float32
    def biased_attention(q, k, v, bias):
        """Attention of q (N, H, L, D) on k, v (N, H, S, D); bias (4-D) broadcasts to the scores (N, H, L, S)."""
        return function.apply(q, k, v, bias)

    return biased_attention


add(
    "bias_broadcast",
    _biased,
    BiasedLastWriter,
    Biased,
    lambda: (
        real(2, 2, 3, 4),
        real(2, 2, 5, 4, seed=1),
        real(2, 2, 5, 4, seed=2),
        real(1, 2, 3, 5, seed=3),
    ),
    bug="the gradient of bias is not summed over its broadcast dimensions but the first",
    trigger="a bias of shape (N, 1, 1, S) or (1, 1, L, S)",
)


class WithLogSum(Function):
    @staticmethod
    @recorded
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    @staticmethod
    @as_forward
    def backward(ctx, g, g_lse):
        q, k, v = ctx.saved_tensors
        p = _probabilities(q, k)
        grad = (softmax_backward(p, g @ v.mT) + p * g_lse[..., None]) * q.shape[-1] ** -0.5
        return grad @ k, grad.mT @ q, p.mT @ g


class WithLogSumDropped(WithLogSum):
    @staticmethod
    @as_forward
    def backward(ctx, g, g_lse):
        q, k, v = ctx.saved_tensors
        return _gradients(_probabilities(q, k), q, k, v, g)


def _with_log_sum(function):
    @in_float32
    def attention_with_lse(q, k, v):
        """Attention of q (*, L, D) on k, v (*, S, D), and the scores' logsumexp (*, L), to merge blocks by."""
        return function.apply(q, k, v)

    return attention_with_lse


add(
    "lse_dropped",
    _with_log_sum,
    WithLogSumDropped,
    WithLogSum,
    lambda: (real(2, 3, 4), real(2, 5, 4, seed=1), real(2, 5, 4, seed=2)),
    bug="backward ignores the second output's gradient",
    trigger="the sample",
)


class Rotary(Function):
    @staticmethod
    def turn(x, start, sign):
        """Rotate the halves of x (..., L, D) by the angle of each position."""
        length, half = x.shape[-2], x.shape[-1] // 2
        position = torch.arange(start, start + length, dtype=torch.float64, device=x.device)
        angle = position[:, None] * 100.0 ** -(torch.arange(half, device=x.device) / half)
        cos, sin = angle.cos().to(x.dtype), sign * angle.sin().to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    @staticmethod
    def forward(ctx, x, start):
        ctx.start = start
        return Rotary.turn(x, start, 1)

    @staticmethod
    def backward(ctx, g):
        return Rotary.turn(g, ctx.start, -1), None


class RotaryFromZero(Rotary):
    @staticmethod
    def backward(ctx, g):
        return Rotary.turn(g, 0, -1), None


def _rotary(function):
    def rotary(x, start=0):
        """Rotary embedding of x (..., L, D), D even, whose first row stands at position start."""
        return function.apply(x, start)

    return rotary


add(
    "rotary_start",
    _rotary,
    RotaryFromZero,
    Rotary,
    lambda: (real(2, 3, 4),),
    bug="backward turns back by the angles of positions 0, 1, ...",
    trigger="start != 0",
)


class Chunked(Function):
    CHUNK = 4

    @staticmethod
    @recorded
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return (q @ k.mT).tril() @ v

    @staticmethod
    def chunks(length):
        return range(0, length, Chunked.CHUNK)

    @classmethod
    def gradients(cls, ctx, g):
        q, k, v = (wide(t) for t in ctx.saved_tensors)
        g = wide(g)
        grad_q = (g @ v.mT).tril() @ k
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        state = q.new_zeros(*q.shape[:-2], q.shape[-1], v.shape[-1])  # sum of q gᵀ of later chunks
        for start in reversed(cls.chunks(q.shape[-2])):
            c = slice(start, start + Chunked.CHUNK)
            qc, kc, vc, gc = q[..., c, :], k[..., c, :], v[..., c, :], g[..., c, :]
            grad_k[..., c, :] = (vc @ gc.mT).triu() @ qc + vc @ state.mT
            grad_v[..., c, :] = (kc @ qc.mT).triu() @ gc + kc @ state
            state = state + qc.mT @ gc
        return grad_q, grad_k, grad_v

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx, g):
        return Chunked.gradients(ctx, g)


class ChunkedWholeOnly(Chunked):
    @staticmethod
    def chunks(length):
        return range(0, length - length % Chunked.CHUNK, Chunked.CHUNK)

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx, g):
        return ChunkedWholeOnly.gradients(ctx, g)


def _chunked(function):
    @in_float32
    def linear_attention(q, k, v):
        """Causal linear attention tril(q kᵀ) v of q, k (*, L, D) and v (*, L, E)."""
        return function.apply(q, k, v)

    return linear_attention


add(
    "chunk_tail",
    _chunked,
    ChunkedWholeOnly,
    Chunked,
    lambda: (real(2, 8, 3), real(2, 8, 3, seed=1), real(2, 8, 2, seed=2)),
    bug="backward leaves out the last chunk if it is not whole",
    trigger="a length that is no multiple of 4",
)
