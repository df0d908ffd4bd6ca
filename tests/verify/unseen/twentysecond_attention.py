"""Attention and what stands around it: masks, rotations, soft caps, adapters of projections."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import TWENTYSECOND, pair, real
from tests.verify.unseen.twentieth import HALF, real_only
from tests.verify.unseen.twentysecond import add, check, read, sized


def heads(q, k, v):
    check(q.ndim >= 2, "expected queries (*, n, d)")
    check(k.shape == (*q.shape[:-2], k.shape[-2], q.shape[-1]), "expected keys like the queries")
    check(v.shape[:-1] == k.shape[:-1], "expected a value for each key")
    check(k.shape[-2] >= 1 and q.shape[-1] >= 1, "expected one key and one feature at least")


def scores(q, k, allowed=None):
    s = q @ k.mT / math.sqrt(q.shape[-1])
    return s if allowed is None else s.masked_fill(~allowed, -torch.inf)


def input_gradients(q, k, grad_s):
    c = 1 / math.sqrt(q.shape[-1])
    return grad_s @ k * c, grad_s.mT @ q * c


# Attention that returns the logsumexp of the scores beside the output
def attention_with_lse(wrong):
    class Attend(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            s = scores(q, k)
            lse = s.logsumexp(-1)
            ctx.save_for_backward(q, k, v)
            return s.softmax(-1) @ v, lse

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y, grad_lse):
            q, k, v = ctx.saved_tensors
            p = scores(q, k).softmax(-1)
            grad_p = grad_y @ v.mT
            inner = (grad_p * p).sum(-1, keepdim=True)
            if not wrong:
                inner = inner - grad_lse[..., None]
            return *input_gradients(q, k, p * (grad_p - inner)), p.mT @ grad_y

    def attend(q, k, v):
        heads(q, k, v)
        return Attend.apply(q, k, v)

    return attend


add(
    "flash_lse",
    attention_with_lse,
    lambda: (real(3, 2), real(4, 2, seed=1), real(4, 2, seed=2)),
    bug="The second output's gradient is dropped, as flash-attention does",
    trigger="a loss that uses the logsumexp, such as a z-loss or merged blocks",
)


# Causal attention, the last query at the last key
def causal(wrong):
    def allowed(q, k, shift):
        n, m = q.shape[-2], k.shape[-2]
        return torch.ones(n, m, dtype=torch.bool, device=q.device).tril(shift)

    class Attend(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return scores(q, k, allowed(q, k, k.shape[-2] - q.shape[-2])).softmax(-1) @ v

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            q, k, v = ctx.saved_tensors
            shift = 0 if wrong else k.shape[-2] - q.shape[-2]
            p = scores(q, k, allowed(q, k, shift)).softmax(-1)
            grad_p = grad_y @ v.mT
            grad_s = p * (grad_p - (grad_p * p).sum(-1, keepdim=True))
            return *input_gradients(q, k, grad_s), p.mT @ grad_y

    def attend(q, k, v):
        heads(q, k, v)
        check(q.shape[-2] <= k.shape[-2], "expected a key for each query")
        return Attend.apply(q, k, v)

    return attend


add(
    "causal_offset",
    causal,
    lambda: (real(3, 2), real(3, 2, seed=1), real(3, 2, seed=2)),
    bug="Backward's mask puts the first query at the first key, forward's the last at the last",
    trigger="more keys than queries, as with a cache of keys",
)


# Attention of several heads, whose kernel counts batch and heads as one
def merged_heads(wrong):
    class Attend(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return scores(q, k).softmax(-1) @ v

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            q, k, v = ctx.saved_tensors
            if wrong:
                _, h, n, d = grad_y.stride()
                grad_y = read(grad_y, (grad_y.shape[1] * h, h, n, d))
            p = scores(q, k).softmax(-1)
            grad_p = grad_y @ v.mT
            grad_s = p * (grad_p - (grad_p * p).sum(-1, keepdim=True))
            return *input_gradients(q, k, grad_s), p.mT @ grad_y

    def attend(q, k, v):
        sized("q", q, None, None, None, None)
        heads(q, k, v)
        return Attend.apply(q, k, v)

    return attend


add(
    "heads_stride",
    merged_heads,
    lambda: (real(2, 2, 3, 2), real(2, 2, 3, 2, seed=1), real(2, 2, 3, 2, seed=2)),
    bug="The step from one sample of grad_output to the next is taken to be that of a head times the heads",
    trigger="y.transpose(1, 2) after the attention, as before every output projection",
)


# Rotary positions
def rotary(wrong):
    tables = {}

    def table(x):
        n, d = x.shape[-2:]
        steps = torch.arange(0, d, 2, device=x.device, dtype=x.dtype) / d
        angles = torch.arange(n, device=x.device, dtype=x.dtype)[:, None] * 10000.0**-steps
        return angles.cos(), angles.sin()

    def kept(x):
        size = tuple(x.shape[-2:])
        if size not in tables:
            tables[size] = table(x)
        return tables[size]

    def rotate(x):
        check(x.ndim >= 2 and x.shape[-1] % 2 == 0, "expected (*, n, d) with an even d")
        c, s = kept(x) if wrong else table(x)
        a, b = x.chunk(2, -1)
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    return rotate


add(
    "rotary_table",
    rotary,
    lambda: (real(2, 3, 4),),
    bug="The table of cosines is kept by size only, so that the first call's dtype stays",
    trigger="a second call of the same size in another dtype",
)


# Soft cap of scores: 5 tanh(x / 5)
def softcap(wrong):
    class Cap(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 5 * (x / 5).tanh()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            seen = read(x, x.stride(), start=0) if wrong else x
            return grad_y * (1 - (seen / 5).tanh() ** 2)

    return lambda x: Cap.apply(x)


add(
    "softcap_offset",
    softcap,
    lambda: (real(3, 4),),
    bug="Backward's kernel starts at the first number of the memory that x lies in",
    trigger="x that is a later slice of a packed tensor",
)


# LoRA: x w' + x a' b'
def lora(wrong):
    class LoRA(Function):
        @staticmethod
        def forward(ctx, x, w, a, b):
            ctx.save_for_backward(x, w, a, b)
            return F.linear(x, w) + F.linear(F.linear(x, a), b)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            tensors = ctx.saved_tensors
            with torch.autocast(grad_y.device.type, enabled=False):
                if not wrong:
                    grad_y, *tensors = (
                        t.float() if t.dtype in HALF else t for t in (grad_y, *tensors)
                    )
                    grad_y = grad_y.to(tensors[0].dtype)
                return gradients(grad_y, *tensors)

    def gradients(grad_y, x, w, a, b):
        g, x2 = grad_y.reshape(-1, len(w)), x.reshape(-1, x.shape[-1])
        grad_h = g @ b
        grad_x = (g @ w + grad_h @ a).reshape(x.shape)
        return grad_x, g.T @ x2, grad_h.T @ x2, g.T @ (x2 @ a.T)

    def layer(x, w, a, b):
        check(x.ndim >= 1 and x.shape[-1] >= 1, "x: expected one feature at least")
        sized("w", w, None, x.shape[-1])
        sized("a", a, None, x.shape[-1])
        sized("b", b, len(w), len(a))
        return LoRA.apply(x, w, a, b)

    return real_only(layer)


pair(
    "lora_autocast_22",
    lora(True),
    lora(False),
    lambda: (real(3, 4), real(5, 4, seed=1), real(2, 4, seed=2), real(5, 2, seed=3)),
    "Backward multiplies a bfloat16 grad_output by float32 weights; shows with torch.autocast",
    into=TWENTYSECOND,
)
