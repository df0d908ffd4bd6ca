"""Attention."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.twelfth import softmax_backward, wide


def probabilities(q, k, keep):
    scores = wide(q) @ wide(k).mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~keep, -torch.inf).softmax(-1)


def attention_gradients(g, q, k, v, p):
    """The gradients of queries, keys and values, and that of the scores."""
    d = softmax_backward(p, wide(g) @ wide(v).mT)
    scaled = d * q.shape[-1] ** -0.5
    grads = scaled @ wide(k), scaled.mT @ wide(q), p.mT @ wide(g)
    return *(a.to(g.dtype) for a in grads), d


class Local(Function):
    @staticmethod
    def band(q, window):
        place = torch.arange(q.shape[1], device=q.device)
        return (place[:, None] - place).abs() <= window

    @staticmethod
    def forward(ctx, q, k, v, window):
        ctx.save_for_backward(q, k, v)
        ctx.window = window
        return (probabilities(q, k, Local.band(q, window)) @ wide(v)).to(q.dtype)

    @staticmethod
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        p = probabilities(q, k, Local.band(q, ctx.window))
        return *attention_gradients(g, q, k, v, p)[:3], None


class LocalCached(Local):
    bands: dict = {}  # noqa: RUF012

    @staticmethod
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        key = q.shape[1], q.device
        if key not in LocalCached.bands:
            LocalCached.bands[key] = Local.band(q, ctx.window)
        p = probabilities(q, k, LocalCached.bands[key])
        return *attention_gradients(g, q, k, v, p)[:3], None


def _local(function):
    def local_attention(q, k, v, window=1):
        """softmax(q kᵀ / sqrt(D)) v where |i - j| <= window, of q, k, v (N, T, D), D > 0; window >= 0."""
        need(q.dim() == 3 and q.shape == k.shape == v.shape, "expected three tensors (N, T, D)")
        need(q.shape[2] > 0 and window >= 0, "expected D > 0 and window >= 0")
        return function.apply(q, k, v, window)

    return local_attention


add(
    "local_attention",
    _local,
    LocalCached,
    Local,
    lambda: (real(2, 5, 3), real(2, 5, 3, seed=1), real(2, 5, 3, seed=2)),
    bug="backward's band is kept by the length alone",
    trigger="a second window for one length",
)


class Lengths(Function):
    @staticmethod
    def probabilities(q, k, lengths, bias):
        scores = wide(q) @ wide(k).mT * q.shape[-1] ** -0.5
        scores = scores if bias is None else scores + wide(bias)
        keep = torch.arange(k.shape[1], device=k.device) < lengths[:, None, None]
        return scores.masked_fill(~keep, -torch.inf).softmax(-1)

    @staticmethod
    def forward(ctx, q, k, v, lengths, bias):
        ctx.save_for_backward(q, k, v, lengths, bias)
        return (Lengths.probabilities(q, k, lengths, bias) @ wide(v)).to(q.dtype)

    @staticmethod
    def backward(ctx, g):
        q, k, v, lengths, bias = ctx.saved_tensors
        p = Lengths.probabilities(q, k, lengths, bias)
        *grads, d = attention_gradients(g, q, k, v, p)
        return *grads, None, None if bias is None else d.sum(0).to(g.dtype)


class LengthsNoBias(Lengths):
    @staticmethod
    def backward(ctx, g):
        return *Lengths.backward(ctx, g)[:3], None, None


def _lengths(function):
    def length_attention(q, k, v, lengths, bias=None):
        """softmax(q kᵀ / sqrt(D) + bias) v of q (N, T, D), k and v (N, S, D) and bias (T, S), D > 0.

        Of the keys and values of row n the first lengths[n], from 1 to S, are attended to.
        """
        need(q.dim() == 3 and k.shape == v.shape, "expected q (N, T, D) and k, v (N, S, D)")
        need(k.shape[::2] == q.shape[::2] and q.shape[2] > 0, "expected the keys' N and D > 0")
        need(lengths.shape == q.shape[:1], "expected lengths (N,)")
        need(bool(((lengths > 0) & (lengths <= k.shape[1])).all()), "expected lengths from 1 to S")
        need(bias is None or bias.shape == (q.shape[1], k.shape[1]), "expected bias (T, S)")
        return function.apply(q, k, v, lengths, bias)

    return length_attention


add(
    "length_attention",
    _lengths,
    LengthsNoBias,
    Lengths,
    lambda: (
        *(real(2, 3, 2), real(2, 4, 2, seed=1), real(2, 4, 2, seed=2)),
        *(torch.tensor([4, 2]), real(3, 4, seed=3)),
    ),
    bug="the bias's gradient is None",
    trigger="the sample",
)


class Cosine(Function):
    eps = 1e-6

    @staticmethod
    def unit(x):
        return wide(x) * Cosine.inverse(x)

    @staticmethod
    def inverse(x):
        return (wide(x).square().sum(-1, keepdim=True) + Cosine.eps).rsqrt()

    @staticmethod
    def forward(ctx, q, k, v, scale):
        ctx.save_for_backward(q, k, v, scale)
        p = (Cosine.unit(q) @ Cosine.unit(k).mT * wide(scale)).softmax(-1)
        return (p @ wide(v)).to(q.dtype)

    @staticmethod
    def gradients(ctx, g, needs):
        q, k, v, scale = ctx.saved_tensors
        need_q, need_k, need_v, need_scale = needs
        unit_q, unit_k = Cosine.unit(q), Cosine.unit(k)
        cosines = unit_q @ unit_k.mT
        p = (cosines * wide(scale)).softmax(-1)
        d = softmax_backward(p, wide(g) @ wide(v).mT)
        grad_q = grad_k = grad_v = grad_scale = None
        if need_q:
            to_q = d @ unit_k * wide(scale)
            grad_q = Cosine.inverse(q) * (to_q - unit_q * (unit_q * to_q).sum(-1, keepdim=True))
        if need_k:
            to_k = d.mT @ unit_q * wide(scale)
            grad_k = Cosine.inverse(k) * (to_k - unit_k * (unit_k * to_k).sum(-1, keepdim=True))
        if need_v:
            grad_v = p.mT @ wide(g)
        if need_scale:
            grad_scale = (d * cosines).sum()
        grads = grad_q, grad_k, grad_v, grad_scale
        return tuple(None if a is None else a.to(q.dtype) for a in grads)

    @staticmethod
    def backward(ctx, g):
        return Cosine.gradients(ctx, g, ctx.needs_input_grad)


class CosineOrder(Cosine):
    """As if the order were q, v, k."""

    @staticmethod
    def backward(ctx, g):
        need_q, need_v, need_k, need_scale = ctx.needs_input_grad
        return Cosine.gradients(ctx, g, (need_q, need_k, need_v, need_scale))


def _cosine(function):
    def cosine_attention(q, k, v, scale):
        """softmax(scale u(q) u(k)ᵀ) v, u(x) = x / sqrt(|x|² + 1e-6), of q (N, T, D), k, v (N, S, D), scale ()."""
        need(q.dim() == 3 and k.shape == v.shape, "expected q (N, T, D) and k, v (N, S, D)")
        need(k.shape[::2] == q.shape[::2] and not scale.dim(), "expected the keys' N, D, scale ()")
        return function.apply(q, k, v, scale)

    return cosine_attention


add(
    "cosine_attention",
    _cosine,
    CosineOrder,
    Cosine,
    lambda: (
        *(real(2, 3, 4), real(2, 5, 4, seed=1), real(2, 5, 4, seed=2)),
        torch.tensor(2.0, dtype=F64, requires_grad=True),
    ),
    bug="asks the keys' flag for the values and the values' for the keys",
    trigger="only one of keys and values that needs a gradient",
)
