"""Attention, experts and positions."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyfifth import add, check, leaf, same, sized


def heads(q, k, v):
    """Refuse anything but (N, L, D) queries and (N, M, D) keys and values."""
    sized("q", q, None, None, None)
    sized("k", k, len(q), None, q.shape[2])
    sized("v", v, *k.shape)


def attention_grads(grad_y, p, q, k, v, scale):
    """The gradients of (scores, q, k, v) from the weights p of softmax(scale q k^T) v."""
    grad_p = grad_y @ v.mT
    grad_s = p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
    return grad_s, scale * grad_s @ k, scale * grad_s.mT @ q, p.mT @ grad_y


# Attention with a bias (L, M) that the samples share
def shared_bias(wrong):
    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v, bias):
            ctx.save_for_backward(q, k, v, bias)
            return (q @ k.mT / math.sqrt(q.shape[2]) + bias).softmax(-1) @ v

        @staticmethod
        def backward(ctx, grad_y):
            q, k, v, bias = ctx.saved_tensors
            scale = 1 / math.sqrt(q.shape[2])
            p = (q @ k.mT * scale + bias).softmax(-1)
            grad_s, *grads = attention_grads(grad_y, p, q, k, v, scale)
            return *grads, grad_s[0] if wrong else grad_s.sum(0)

    def attention(q, k, v, bias):
        heads(q, k, v)
        sized("bias", bias, q.shape[1], k.shape[1])
        return Attention.apply(q, k, v, bias)

    return attention


add(
    "shared_bias_first",
    shared_bias,
    lambda: (real(1, 3, 4), real(1, 5, 4, seed=1), real(1, 5, 4, seed=2), real(3, 5, seed=3)),
    bug="The bias gets the first sample's gradient; the kernel was tried on one sample",
    trigger="two samples",
)


# Attention in a band: place i sees the places j with |i - j| < width
def band(wrong):
    class Attention(Function):
        @staticmethod
        def weights(q, k, width):
            i = torch.arange(q.shape[1], device=q.device)
            far = (i[:, None] - i).abs() >= width
            scores = q @ k.mT / math.sqrt(q.shape[2])
            return scores.masked_fill(far, -math.inf).softmax(-1)

        @staticmethod
        def forward(ctx, q, k, v, width):
            ctx.save_for_backward(q, k, v)
            ctx.width = width
            return Attention.weights(q, k, width) @ v

        @staticmethod
        def backward(ctx, grad_y):
            q, k, v = ctx.saved_tensors
            p = Attention.weights(q, k, ctx.width + (1 if wrong else 0))
            _, *grads = attention_grads(grad_y, p, q, k, v, 1 / math.sqrt(q.shape[2]))
            return *grads, None

    def attention(q, k, v, width=4):
        heads(q, k, v)
        same(q, k)
        check(width >= 1, "width: expected a number of at least 1")
        return Attention.apply(q, k, v, width)

    return attention


add(
    "band_edge",
    band,
    lambda: (real(2, 4, 3), real(2, 4, 3, seed=1), real(2, 4, 3, seed=2)),
    bug="Backward's band is one place wider on each side",
    trigger="a sequence longer than the band is wide",
)


# Cosine similarities times a learned scale that ends at 100: y = exp(min(s, ln 100)) q k^T of unit rows
def capped_cosine(wrong):
    class Similarity(Function):
        @staticmethod
        def forward(ctx, q, k, s):
            ctx.save_for_backward(q, k, s)
            return s.clamp(max=math.log(100)).exp() * (q @ k.mT)

        @staticmethod
        def backward(ctx, grad_y):
            q, k, s = ctx.saved_tensors
            scale = s.clamp(max=math.log(100)).exp()
            grad_s = (grad_y * (q @ k.mT)).sum() * scale
            if not wrong:
                grad_s = torch.where(s <= math.log(100), grad_s, 0)
            return scale * grad_y @ k, scale * grad_y.mT @ q, grad_s

    def unit(t):
        return t / t.square().sum(-1, keepdim=True).add(1e-6).sqrt()

    def similarity(q, k, s):
        sized("q", q, None, None)
        sized("k", k, None, q.shape[1])
        check(s.ndim == 0, "s: expected a single number")
        return Similarity.apply(unit(q), unit(k), s)

    return similarity


add(
    "capped_cosine_scale",
    capped_cosine,
    lambda: (real(3, 4), real(5, 4, seed=1), leaf(torch.tensor(2.6, dtype=torch.float64))),
    bug="Backward knows nothing of the cap on the scale, which keeps growing behind it",
    trigger="a scale that has reached 100",
)


# Rotary positions in an image: half of the pairs turn with the row, half with the column
def image_rotary(wrong):
    def angles(h, w, pairs, like, columns):
        place = torch.arange(h * w, device=like.device)
        speed = 10 ** -torch.arange(pairs // 2, dtype=like.dtype, device=like.device)
        row, column = place // columns, place % columns
        return torch.cat([row[:, None] * speed, column[:, None] * speed], 1)

    def turn(x, a):
        u, v = x[..., 0::2], x[..., 1::2]
        y = u * a.cos() - v * a.sin(), u * a.sin() + v * a.cos()
        return torch.stack(y, -1).reshape(x.shape)

    class Rotary(Function):
        @staticmethod
        def forward(x):
            n, h, w, d = x.shape
            a = angles(h, w, d // 2, x, w)
            return turn(x.reshape(n, h * w, d), a).reshape(x.shape)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad_y):
            n, h, w, d = grad_y.shape
            a = angles(h, w, d // 2, grad_y, h if wrong else w)
            return turn(grad_y.reshape(n, h * w, d), -a).reshape(grad_y.shape)

    def rotary(x):
        sized("x", x, None, None, None, None)
        check(x.shape[3] % 4 == 0, "x: expected a last dimension that 4 divides")
        return Rotary.apply(x)

    return rotary


add(
    "image_rotary_square",
    image_rotary,
    lambda: (real(1, 3, 3, 4),),
    bug="Backward finds row and column by the image's height",
    trigger="an image that is not square",
)


# The router's penalty: the mean over all tokens of lse(x)^2
def router_penalty(wrong):
    class Penalty(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.logsumexp(-1).square().mean()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            tokens = x.shape[0] if wrong else x[..., 0].numel()
            return grad_y * 2 / tokens * x.logsumexp(-1, keepdim=True) * x.softmax(-1)

    def penalty(x):
        check(x.ndim >= 2 and x.numel() > 0, "x: expected (..., E) with one token at least")
        return Penalty.apply(x)

    return penalty


add(
    "router_penalty_tokens",
    router_penalty,
    lambda: (real(4, 3),),
    bug="Backward divides by the first dimension where forward takes the mean over all tokens",
    trigger="(N, L, E) logits",
)
