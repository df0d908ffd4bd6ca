"""Attention: windows, blocks of keys, pooling, cosine scores, random features, gates."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtysecond import add, bounded, check, finite, same, sized


def softmax_back(p, grad_p):
    return p * (grad_p - (grad_p * p).sum(-1, keepdim=True))


# Grouped-query attention over the `window` last positions, the own one included
def window_groups(wrong):
    def weights(q, k, window):
        places = torch.arange(q.shape[-2], device=q.device)
        back = places[:, None] - places
        s = q @ k.mT / math.sqrt(q.shape[-1])
        return s.masked_fill((back < 0) | (back >= window), -math.inf).softmax(-1)

    class Attend(Function):
        @staticmethod
        def forward(ctx, q, k, v, window):
            ctx.save_for_backward(q, k, v)
            ctx.window = window
            grouped = q.unflatten(1, (k.shape[1], -1))
            return (weights(grouped, k[:, :, None], window) @ v[:, :, None]).flatten(1, 2)

        @staticmethod
        def backward(ctx, grad_y):
            q, k, v = ctx.saved_tensors
            heads = (k.shape[1], -1)
            q, g = q.unflatten(1, heads), grad_y.unflatten(1, heads)
            k, v = k[:, :, None], v[:, :, None]
            p = weights(q, k, ctx.window + 1 if wrong else ctx.window)
            grad_s = softmax_back(p, g @ v.mT) / math.sqrt(q.shape[-1])
            grad_q = (grad_s @ k).flatten(1, 2)
            return grad_q, (grad_s.mT @ q).sum(2), (p.mT @ g).sum(2), None

    def attention(q, k, v, window=8):
        sized("q", q, None, None, None, None)
        b, heads, n, d = q.shape
        sized("k", k, b, None, n, d)
        sized("v", v, b, k.shape[1], n, None)
        check(heads % k.shape[1] == 0, "q: expected a multiple of k's heads")
        check(window >= 1, "window: expected 1 at least")
        finite(q=q, k=k, v=v)
        return Attend.apply(q, k, v, window)

    return attention


add(
    "window_groups",
    window_groups,
    lambda: (real(2, 4, 5, 3), real(2, 2, 5, 3, seed=1), real(2, 2, 5, 3, seed=2)),
    bug="Backward's window is one position wider than forward's",
    trigger="a sequence longer than the window of 8",
)


# Cross-attention whose backward visits the keys in blocks of 32
def key_blocks(wrong):
    class Attend(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            y = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
            ctx.save_for_backward(q, k, v, y)
            return y

        @staticmethod
        def backward(ctx, grad_y):
            q, k, v, y = ctx.saved_tensors
            scale, n = 1 / math.sqrt(q.shape[-1]), k.shape[-2]
            lse = (q @ k.mT * scale).logsumexp(-1, keepdim=True)
            delta = (grad_y * y).sum(-1, keepdim=True)
            blocks = max(n // 32, 1) if wrong else -(-n // 32)
            grad_q, grads_k, grads_v = torch.zeros_like(q), [], []
            for start in range(0, 32 * blocks, 32):
                kb, vb = k[..., start : start + 32, :], v[..., start : start + 32, :]
                p = (q @ kb.mT * scale - lse).exp()
                grad_s = p * (grad_y @ vb.mT - delta) * scale
                grad_q = grad_q + grad_s @ kb
                grads_k.append(grad_s.mT @ q)
                grads_v.append(p.mT @ grad_y)
            done = sum(t.shape[-2] for t in grads_k)
            if done < n:
                grads_k.append(torch.zeros_like(k[..., done:, :]))
                grads_v.append(torch.zeros_like(v[..., done:, :]))
            return grad_q, torch.cat(grads_k, -2), torch.cat(grads_v, -2)

    def attention(q, k, v):
        sized("q", q, None, None, None)
        sized("k", k, q.shape[0], None, q.shape[2])
        sized("v", v, q.shape[0], k.shape[1], None)
        finite(q=q, k=k, v=v)
        return Attend.apply(q, k, v)

    return attention


add(
    "key_blocks_rest",
    key_blocks,
    lambda: (real(2, 3, 4), real(2, 5, 4, seed=1), real(2, 5, 2, seed=2)),
    bug="Backward forgets the last block of keys where it is not full",
    trigger="more than 32 keys, not a multiple of 32",
)


# A sequence's mean under the softmax of x . query, and these weights
def pooled_and_weights(wrong):
    class Pool(Function):
        @staticmethod
        def forward(ctx, x, query):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x, query)
            p = (x @ query).softmax(-1)
            return (p[..., None] * x).sum(-2), p

        @staticmethod
        def backward(ctx, grad_y, grad_p):
            x, query = ctx.saved_tensors
            p = (x @ query).softmax(-1)
            grad_x, through = torch.zeros_like(x), torch.zeros_like(p)
            if grad_y is not None:
                through = (x * grad_y[..., None, :]).sum(-1)
                grad_x = p[..., None] * grad_y[..., None, :]
            if grad_p is not None and not (wrong and grad_y is not None):
                through = through + grad_p
            grad_s = softmax_back(p, through)
            grad_x = grad_x + grad_s[..., None] * query
            return grad_x, (grad_s[..., None] * x).sum((0, 1))

    def pool(x, query):
        sized("x", x, None, None, None)
        sized("query", query, x.shape[2])
        return Pool.apply(x, query)

    return pool


add(
    "pooled_weights_elif",
    pooled_and_weights,
    lambda: (real(2, 4, 3), real(3, seed=1)),
    bug="Backward follows the weights only if the mean has no gradient: elif in the place of if",
    trigger="a loss of both outputs",
)


def unit(t):
    return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6)


def unit_back(t, grad):
    y = unit(t)
    r = torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6)
    return r * (grad - y * (y * grad).sum(-1, keepdim=True))


# Attention weights of normalised queries and keys with one learned temperature
def normed_weights(wrong):
    class Weights(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(q, k, tau):
            return (tau * (unit(q) @ unit(k).mT)).softmax(-1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_p):
            q, k, tau = ctx.saved_tensors
            cosines = unit(q) @ unit(k).mT
            grad_s = softmax_back((tau * cosines).softmax(-1), grad_p)
            grad_q = grad_k = grad_tau = None
            if ctx.needs_input_grad[0]:
                grad_q = unit_back(q, tau * grad_s @ unit(k))
            if ctx.needs_input_grad[1]:
                grad_k = unit_back(k, tau * grad_s.mT @ unit(q))
            if ctx.needs_input_grad[0 if wrong else 2]:
                grad_tau = (grad_s * cosines).sum().reshape(1)
            return grad_q, grad_k, grad_tau

    def attention(q, k, tau):
        sized("q", q, None, None, None)
        sized("k", k, q.shape[0], None, q.shape[2])
        sized("tau", tau, 1)
        bounded("q", q, -1e4, 1e4)
        bounded("k", k, -1e4, 1e4)
        return Weights.apply(q, k, tau)

    return attention


add(
    "normed_attention_temperature",
    normed_weights,
    lambda: (real(2, 3, 4), real(2, 5, 4, seed=1), torch.full((1,), 2.0).double().requires_grad_()),
    bug="The temperature's gradient hangs on the queries' flag",
    trigger="frozen queries and a temperature that is trained",
)


# Swin's cosine attention: scores times exp(min(scale, ln 100)), one scale a head
def swin_scores(wrong):
    top = math.log(100)

    class Scores(Function):
        @staticmethod
        def forward(ctx, q, k, scale):
            ctx.save_for_backward(q, k, scale)
            return unit(q) @ unit(k).mT * scale.clamp(max=top).exp()[:, None, None]

        @staticmethod
        def backward(ctx, grad_s):
            q, k, scale = ctx.saved_tensors
            factor = scale.clamp(max=top).exp()[:, None, None]
            cosines = unit(q) @ unit(k).mT
            grad_scale = (grad_s * cosines * factor).sum((0, 2, 3))
            if not wrong:
                grad_scale = torch.where(scale <= top, grad_scale, 0)
            grad_q = unit_back(q, factor * grad_s @ unit(k))
            return grad_q, unit_back(k, factor * grad_s.mT @ unit(q)), grad_scale

    def scores(q, k, scale):
        sized("q", q, None, None, None, None)
        sized("k", k, q.shape[0], q.shape[1], None, q.shape[3])
        sized("scale", scale, q.shape[1])
        bounded("q", q, -1e4, 1e4)
        bounded("k", k, -1e4, 1e4)
        return Scores.apply(q, k, scale)

    return scores


add(
    "swin_scale_cap",
    swin_scores,
    lambda: (
        real(1, 2, 3, 4),
        real(1, 2, 3, 4, seed=1),
        torch.full((2,), math.log(10)).double().requires_grad_(),
    ),
    bug="The scale gets a gradient beyond its cap too",
    trigger="a scale above ln 100",
)


# Attention in linear time with positive random features, drawn from a seed
def random_feature_attention(wrong):
    def attention(q, k, v, features=16, seed=7):
        sized("q", q, None, None, None)
        sized("k", k, q.shape[0], None, q.shape[2])
        sized("v", v, q.shape[0], k.shape[1], None)
        bounded("q", q, -5, 5)
        bounded("k", k, -5, 5)
        d = q.shape[2]
        if wrong:
            torch.manual_seed(seed)
            drawn = torch.randn(features, d, dtype=torch.float64)
        else:
            drawn = torch.randn(
                features, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
            )
        drawn = drawn.to(q.device, q.dtype)

        def exponents(t):
            t = t * d**-0.25
            return t @ drawn.mT - t.square().sum(-1, keepdim=True) / 2

        eq, ek = exponents(q), exponents(k)
        fq = (eq - eq.detach().amax(-1, keepdim=True)).exp()
        fk = (ek - ek.amax((-2, -1), keepdim=True)).exp() + 1e-6
        total = fq @ fk.sum(-2)[..., None]
        return fq @ (fk.mT @ v) / total

    return attention


add(
    "random_features_seed",
    random_feature_attention,
    lambda: (real(1, 3, 4), real(1, 4, 4, seed=1), real(1, 4, 2, seed=2)),
    bug="Seeds the global generator for its random features",
    trigger="the generator's state compared before and after",
    missed="a note: who checks a random function seeds it so",
)


# Attention whose output is multiplied by the sigmoid of a gate
def gated_output(wrong):
    class Gated(Function):
        @staticmethod
        def forward(ctx, q, k, v, gate):
            ctx.save_for_backward(q, k, v, gate)
            p = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
            return p @ v * gate.sigmoid()

        @staticmethod
        def backward(ctx, grad_y):
            q, k, v, gate = ctx.saved_tensors
            scale = 1 / math.sqrt(q.shape[-1])
            p = (q @ k.mT * scale).softmax(-1)
            s = gate.sigmoid()
            grad_gate = grad_y * (p @ v) * s * (1 - s)
            grad_o = grad_y.mul_(s) if wrong else grad_y * s
            grad_s = softmax_back(p, grad_o @ v.mT) * scale
            return grad_s @ k, grad_s.mT @ q, p.mT @ grad_o, grad_gate

    def attention(q, k, v, gate):
        sized("q", q, None, None, None)
        same(q, k, v, gate)
        finite(q=q, k=k, v=v)
        return Gated.apply(q, k, v, gate)

    return attention


add(
    "gated_attention_writes",
    gated_output,
    lambda: tuple(real(2, 3, 4, seed=s) for s in range(4)),
    bug="Backward multiplies grad_output by the gate in place",
    trigger="grad_output compared before and after, or shared with another branch",
)
