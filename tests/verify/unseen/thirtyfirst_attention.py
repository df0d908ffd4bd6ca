"""Attention in several forms, each with its whole backward."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.device import DEVICE
from tests.verify.unseen import real
from tests.verify.unseen.thirtyfirst import add, add_bare, bounded, check, read, sized


# Attention over real keys only, with the dropout's mask drawn by the caller
def dropped_attention(wrong):
    def weights(q, k, present):
        s = q @ k.mT * q.shape[-1] ** -0.5
        return s.masked_fill(~present[:, None, None, :], -math.inf).softmax(-1)

    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v, present, keep, p):
            ctx.save_for_backward(q, k, v, present, keep)
            ctx.p = p
            return (weights(q, k, present) * keep / (1 - p)) @ v

        @staticmethod
        def backward(ctx, grad_y):
            q, k, v, present, keep = ctx.saved_tensors
            a = weights(q, k, present)
            dropped = a * keep / (1 - ctx.p)
            grad_v = dropped.mT @ grad_y
            grad_dropped = grad_y @ v.mT
            grad_a = grad_dropped * keep / (1 - ctx.p)
            delta = (a * (grad_dropped if wrong else grad_a)).sum(-1, keepdim=True)
            grad_s = a * (grad_a - delta) * q.shape[-1] ** -0.5
            return grad_s @ k, grad_s.mT @ q, grad_v, None, None, None

    def attention(q, k, v, present, keep, p=0.1):
        sized("q", q, None, None, None, None)
        sized("k", k, *q.shape[:2], None, q.shape[3])
        sized("v", v, *k.shape[:3], None)
        bounded("v", v, -1e4, 1e4)
        sized("present", present, len(q), k.shape[2])
        sized("keep", keep, *q.shape[:3], k.shape[2])
        check(present.dtype == keep.dtype == torch.bool, "masks: expected booleans")
        check(bool(present.any(-1).all()), "present: expected a key in each sequence")
        check(0 <= p < 1, "p: expected a number from 0 up to 1")
        bounded("q", q, -100, 100)
        bounded("k", k, -100, 100)
        return Attention.apply(q, k, v, present, keep, float(p))

    return attention


add(
    "dropped_attention_delta",
    dropped_attention,
    lambda: (
        real(2, 2, 3, 4),
        real(2, 2, 5, 4, seed=1),
        real(2, 2, 5, 4, seed=2),
        torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
        real(2, 2, 3, 5, seed=3, grad=False) > -0.8,
    ),
    kwargs=lambda: {"p": 0.2},
    bug="The softmax's row sum is taken of the gradient before the dropout's mask",
    trigger="a weight that is dropped",
)


# Attention whose backward goes over blocks of up to 32 keys with the saved logarithm of the rows' sums
def blocked_attention(wrong):
    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            s = q @ k.mT * q.shape[-1] ** -0.5
            total = s.logsumexp(-1, keepdim=True)
            y = (s - total).exp() @ v
            ctx.save_for_backward(q, k, v, y, total)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            q, k, v, y, total = ctx.saved_tensors
            scale = q.shape[-1] ** -0.5
            n = k.shape[-2]
            block = min(32, n)
            delta = (grad_y * y).sum(-1, keepdim=True)
            grad_q, grad_k, grad_v = (torch.zeros_like(t) for t in (q, k, v))
            for i in range(n // block if wrong else -(-n // block)):
                part = slice(i * block, (i + 1) * block)
                kb, vb = k[..., part, :], v[..., part, :]
                a = (q @ kb.mT * scale - total).exp()
                grad_s = a * (grad_y @ vb.mT - delta) * scale
                grad_q += grad_s @ kb
                grad_k[..., part, :] = grad_s.mT @ q
                grad_v[..., part, :] = a.mT @ grad_y
            return grad_q, grad_k, grad_v

    def attention(q, k, v):
        sized("q", q, None, None, None)
        sized("k", k, len(q), None, q.shape[2])
        sized("v", v, len(q), k.shape[1], None)
        bounded("v", v, -1e4, 1e4)
        bounded("q", q, -100, 100)
        bounded("k", k, -100, 100)
        return Attention.apply(q, k, v)

    return attention


add(
    "blocked_attention_floor",
    blocked_attention,
    lambda: (real(2, 4, 8), real(2, 6, 8, seed=1), real(2, 6, 8, seed=2)),
    bug="The number of blocks is rounded down",
    trigger="more than 32 keys, not a multiple of 32",
)


# Causal attention with rotated queries and keys; the queries are the sequence's last ones
def decoded_attention(wrong):
    def turned(x, start, back=False):
        half = x.shape[-1] // 2
        at = torch.arange(start, start + x.shape[-2], dtype=x.dtype, device=x.device)
        rate = 100.0 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
        angle = at[:, None] * rate
        c, s = angle.cos(), -angle.sin() if back else angle.sin()
        a, b = x.chunk(2, -1)
        return torch.cat((a * c - b * s, a * s + b * c), -1)

    def weights(q, k):
        t, n = q.shape[-2], k.shape[-2]
        later = torch.ones(t, n, dtype=torch.bool, device=q.device).triu(n - t + 1)
        s = turned(q, n - t) @ turned(k, 0).mT * q.shape[-1] ** -0.5
        return s.masked_fill(later, -math.inf).softmax(-1)

    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return weights(q, k) @ v

        @staticmethod
        def backward(ctx, grad_y):
            q, k, v = ctx.saved_tensors
            past = k.shape[-2] - q.shape[-2]
            a = weights(q, k)
            grad_a = grad_y @ v.mT
            grad_s = a * (grad_a - (a * grad_a).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
            grad_q = turned(grad_s @ turned(k, 0), 0 if wrong else past, back=True)
            grad_k = turned(grad_s.mT @ turned(q, past), 0, back=True)
            return grad_q, grad_k, a.mT @ grad_y

    def attention(q, k, v):
        sized("q", q, None, None, None)
        sized("k", k, len(q), None, q.shape[2])
        sized("v", v, len(q), k.shape[1], None)
        bounded("v", v, -1e4, 1e4)
        check(q.shape[1] <= k.shape[1], "q: expected no more queries than keys")
        check(q.shape[2] % 2 == 0, "q: expected an even width")
        bounded("q", q, -100, 100)
        bounded("k", k, -100, 100)
        return Attention.apply(q, k, v)

    return attention


add(
    "decoded_attention_past",
    decoded_attention,
    lambda: (real(2, 4, 6), real(2, 4, 6, seed=1), real(2, 4, 6, seed=2)),
    bug="The queries' gradient is turned back from position 0, not from the first query's",
    trigger="more keys than queries",
)


# Heads that share keys and values; the kernel writes (batch, place, head, width) and hands out its transpose
def shared_keys(wrong):
    def weights(q, k):
        return (q @ k[:, None].mT * q.shape[-1] ** -0.5).softmax(-1)

    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            b, h, t, _ = q.shape
            y = q.new_empty(b, t, h, v.shape[-1]).transpose(1, 2)
            y.copy_(weights(q, k) @ v[:, None])
            ctx.strides = y.stride()
            return y

        @staticmethod
        def backward(ctx, grad_y):
            q, k, v = ctx.saved_tensors
            g = read(grad_y, ctx.strides) if wrong else grad_y
            a = weights(q, k)
            grad_a = g @ v[:, None].mT
            grad_s = a * (grad_a - (a * grad_a).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
            grad_k = (grad_s.mT @ q).sum(1)
            return grad_s @ k[:, None], grad_k, (a.mT @ g).sum(1)

    def attention(q, k, v):
        sized("q", q, None, None, None, None)
        sized("k", k, len(q), None, q.shape[3])
        sized("v", v, len(q), k.shape[1], None)
        bounded("v", v, -1e4, 1e4)
        bounded("q", q, -100, 100)
        bounded("k", k, -100, 100)
        return Attention.apply(q, k, v)

    return attention


add(
    "shared_keys_strides",
    shared_keys,
    lambda: (real(2, 2, 3, 4), real(2, 5, 4, seed=1), real(2, 5, 4, seed=2)),
    bug="grad_output is read with the output's strides",
    trigger="a grad_output of another layout than the output, contiguous for one",
)


# Attention of unit queries and keys, with a learned temperature per head
def unit_attention(wrong):
    def unit(x):
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-4)

    def unit_back(x, g):
        r = torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-4)
        return g * r - x * r**3 * (g * x).sum(-1, keepdim=True)

    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v, heat):
            ctx.save_for_backward(q, k, v, heat)
            s = unit(q) @ unit(k).mT * heat[:, None, None]
            return s.softmax(-1) @ v

        @staticmethod
        def backward(ctx, grad_y):
            q, k, v, heat = ctx.saved_tensors
            needs_q, needs_k, needs_v, needs_heat = ctx.needs_input_grad
            uq, uk = unit(q), unit(k)
            cosine = uq @ uk.mT
            a = (cosine * heat[:, None, None]).softmax(-1)
            grad_a = grad_y @ v.mT
            grad_s = a * (grad_a - (a * grad_a).sum(-1, keepdim=True))
            grad_c = grad_s * heat[:, None, None]
            grad_q = grad_k = grad_v = grad_heat = None
            if needs_q:
                grad_q = unit_back(q, grad_c @ uk)
            if needs_k:
                grad_k = unit_back(k, grad_c.mT @ uq)
            if needs_v:
                grad_v = a.mT @ grad_y
            if needs_heat and (needs_q or not wrong):
                grad_heat = (grad_s * cosine).sum((0, 2, 3))
            return grad_q, grad_k, grad_v, grad_heat

    def attention(q, k, v, heat):
        sized("q", q, None, None, None, None)
        sized("k", k, *q.shape[:2], None, q.shape[3])
        sized("v", v, *k.shape[:3], None)
        bounded("v", v, -1e4, 1e4)
        sized("heat", heat, q.shape[1])
        bounded("q", q, -100, 100)
        bounded("k", k, -100, 100)
        bounded("heat", heat, -100, 100)
        return Attention.apply(q, k, v, heat)

    return attention


add(
    "unit_attention_frozen",
    unit_attention,
    lambda: (
        real(2, 2, 3, 4),
        real(2, 2, 4, 4, seed=1),
        real(2, 2, 4, 4, seed=2),
        real(2, seed=3, positive=True),
    ),
    bug="The temperature's gradient is made together with the queries' only",
    trigger="queries that need no gradient",
)


# A sequence's mean by the softmax of the inner products with a learned vector
def attention_pooling(wrong):
    class Pooling(Function):
        @staticmethod
        def forward(ctx, x, scores):
            ctx.save_for_backward(x, scores)
            return (scores.softmax(1)[..., None] * x).sum(1)

        @staticmethod
        def backward(ctx, grad_y):
            x, scores = ctx.saved_tensors
            a = scores.softmax(1)
            along = x @ grad_y[:, :, None]
            along = along.squeeze() if wrong else along.squeeze(2)
            grad_scores = a * (along - (a * along).sum(-1, keepdim=True))
            return a[..., None] * grad_y[:, None], grad_scores

    def pooling(x, scores):
        sized("x", x, None, None, None)
        sized("scores", scores, *x.shape[:2])
        bounded("scores", scores, -1e4, 1e4)
        bounded("x", x, -100, 100)
        return Pooling.apply(x, scores)

    return pooling


add(
    "attention_pooling_single",
    attention_pooling,
    lambda: (real(3, 4, 5), real(3, 4, seed=1)),
    bug="squeeze() takes out the places' dimension too, what follows is broadcast",
    trigger="sequences of one place",
)


# Weights of a query's neighbours with a learned bias per distance, as text-to-text models have it
def relative_weights(wrong):
    def distance(z, table):
        n = torch.arange(z.shape[-1], device=z.device)
        m = torch.arange(z.shape[-2], device=z.device)
        return (n - m[:, None]).abs().clamp(max=len(table) - 1)

    class Weights(Function):
        @staticmethod
        def forward(ctx, z, table):
            p = (z + table[distance(z, table)]).softmax(-1)
            ctx.save_for_backward(p, table)
            return p

        @staticmethod
        def backward(ctx, grad_y):
            p, table = ctx.saved_tensors
            grad_z = p * (grad_y - (p * grad_y).sum(-1, keepdim=True))
            if wrong:
                return grad_z, None
            at = distance(p, table).flatten()
            return grad_z, torch.zeros_like(table).index_add(0, at, grad_z.sum(0).flatten())

    def weights(z, *, bias=None):
        sized("z", z, None, None, None)
        bounded("z", z, -1e4, 1e4)
        if bias is None:
            return z.softmax(-1)
        sized("bias", bias, None)
        bounded("bias", bias, -1e4, 1e4)
        return Weights.apply(z, bias.to(z.dtype))

    return weights


add(
    "relative_weights_keyword",
    relative_weights,
    lambda: (real(2, 3, 5),),
    kwargs=lambda: {"bias": real(4, seed=1)},
    bug="The bias, a keyword, is given to the Function and gets no gradient",
    trigger="the gradient of a keyword argument",
)


# Scores of queries and keys; under autocast in its type, with the scale taken into the queries
def scaled_scores(wrong):
    class Scores(Function):
        @staticmethod
        def forward(ctx, q, k, low):
            ctx.save_for_backward(q, k)
            ctx.low = low
            scale = q.shape[-1] ** -0.5
            if low is None:
                return q @ k.mT * scale
            return (q * scale).to(low) @ k.to(low).mT

        @staticmethod
        def backward(ctx, grad_y):
            q, k = ctx.saved_tensors
            scale = q.shape[-1] ** -0.5
            if ctx.low is None:
                return grad_y @ k * scale, grad_y.mT @ q * scale, None
            g = grad_y.to(ctx.low)
            scaled = (q if wrong else q * scale).to(ctx.low)
            grad_q = (g @ k.to(ctx.low)).to(q.dtype) * scale
            return grad_q, (g.mT @ scaled).to(k.dtype), None

    def scores(q, k):
        sized("q", q, None, None, None)
        sized("k", k, len(q), None, q.shape[2])
        check(q.dtype == k.dtype and not q.is_complex(), "k: expected q's type, a real one")
        cast = torch.is_autocast_enabled(DEVICE) and q.dtype != torch.float64
        return Scores.apply(q, k, torch.get_autocast_dtype(DEVICE) if cast else None)

    return scores


add_bare(
    "scaled_scores_autocast",
    scaled_scores,
    lambda: (real(2, 3, 4), real(2, 5, 4, seed=1)),
    bug="The path of autocast multiplies by the queries before they were scaled",
    trigger="torch.autocast",
)
