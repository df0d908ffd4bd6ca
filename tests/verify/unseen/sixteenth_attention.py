"""Attention."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.sixteenth import add, expect
from tests.verify.unseen.twelfth import softmax_backward


def shapes(q, k, v):
    expect(q.dim() == k.dim() == v.dim() == 4, "q, k, v (N, H, T, D)", tuple(q.shape))
    expect(q.shape[:2] == k.shape[:2] == v.shape[:2], "the same N and H", tuple(k.shape))
    expect(q.shape[3] == k.shape[3] and q.shape[3], "q and k of one D > 0", tuple(k.shape))
    expect(k.shape[2] == v.shape[2] and k.shape[2], "k and v of one S > 0", tuple(v.shape))


def sample():
    return tuple(real(2, 2, 3, 4, seed=seed) for seed in range(3))


class SigmoidAttention(Function):
    @staticmethod
    def scores(q, k, causal):
        z = q @ k.mT * q.shape[-1] ** -0.5
        hidden = torch.ones(z.shape[-2:], dtype=torch.bool, device=z.device).triu(1)
        return z.masked_fill(hidden, -torch.inf) if causal else z

    @staticmethod
    def forward(ctx, q, k, v, causal):
        ctx.save_for_backward(q, k, v)
        ctx.causal = causal
        return SigmoidAttention.scores(q, k, causal).sigmoid() @ v

    @staticmethod
    def gradients(ctx, g, causal):
        q, k, v = ctx.saved_tensors
        p = SigmoidAttention.scores(q, k, causal).sigmoid()
        d = g @ v.mT * p * (1 - p) * q.shape[-1] ** -0.5
        return d @ k, d.mT @ q, p.mT @ g, None

    @staticmethod
    def backward(ctx, g):
        return SigmoidAttention.gradients(ctx, g, ctx.causal)


class SigmoidAttentionAll(SigmoidAttention):
    @staticmethod
    def backward(ctx, g):
        return SigmoidAttention.gradients(ctx, g, False)


def _sigmoid_attention(function):
    def sigmoid_attention(q, k, v, is_causal=False):
        """sigmoid(q kᵀ / √D) v of q (N, H, T, D), k (N, H, S, D), v (N, H, S, E), D and S > 0.

        is_causal: of T = S, without the places after one's own.
        """
        shapes(q, k, v)
        expect(not is_causal or q.shape[2] == k.shape[2], "T = S", tuple(q.shape))
        return function.apply(q, k, v, is_causal)

    return sigmoid_attention


add(
    "sigmoid_attention_causal",
    _sigmoid_attention,
    SigmoidAttentionAll,
    SigmoidAttention,
    sample,
    bug="backward computes the weights again without the causal mask",
    shows="is_causal=True",
)


class SinkAttention(Function):
    """The sinks are put in at the end: the output is scaled by sigmoid(lse - sink)."""

    @staticmethod
    def weights(q, k, sinks):
        z = q @ k.mT * q.shape[-1] ** -0.5
        lse = z.logsumexp(-1, keepdim=True)
        return (z - lse).exp(), (lse - sinks[:, None, None]).sigmoid()

    @staticmethod
    def forward(ctx, q, k, v, sinks):
        ctx.save_for_backward(q, k, v, sinks)
        p, rest = SinkAttention.weights(q, k, sinks)
        return p @ v * rest

    @staticmethod
    def gradients(ctx, g, share):
        q, k, v, sinks = ctx.saved_tensors
        p, rest = SinkAttention.weights(q, k, sinks)
        delta = (g * (p @ v * rest)).sum(-1, keepdim=True)
        p = share(p, rest)
        d = p * (g @ v.mT - delta) * q.shape[-1] ** -0.5
        return d @ k, d.mT @ q, p.mT @ g, -((1 - rest) * delta).sum((0, 2, 3))

    @staticmethod
    def backward(ctx, g):
        return SinkAttention.gradients(ctx, g, lambda p, rest: p * rest)


class SinkAttentionWithout(SinkAttention):
    @staticmethod
    def backward(ctx, g):
        return SinkAttention.gradients(ctx, g, lambda p, rest: p)


def _sink_attention(function):
    def sink_attention(q, k, v, sinks):
        """Attention of q (N, H, T, D), k (N, H, S, D), v (N, H, S, E), D and S > 0.

        Each row's softmax has one more score, of no value: its head's of sinks (H,).
        """
        shapes(q, k, v)
        expect(sinks.shape == q.shape[1:2], "sinks (H,)", tuple(sinks.shape))
        return function.apply(q, k, v, sinks)

    return sink_attention


add(
    "sink_attention_lse",
    _sink_attention,
    SinkAttentionWithout,
    SinkAttention,
    lambda: (*sample(), real(2, seed=3)),
    bug="backward's weights come from the logsumexp without the sinks",
    shows="the sample",
)


class NormAttention(Function):
    @staticmethod
    def unit(x):
        rnorm = (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        return x * rnorm, rnorm

    @staticmethod
    def forward(ctx, q, k, v, gain):
        ctx.save_for_backward(q, k, v, gain)
        return (gain * NormAttention.unit(q)[0] @ NormAttention.unit(k)[0].mT).softmax(-1) @ v

    @staticmethod
    def gradients(ctx, g, scores):
        q, k, v, gain = ctx.saved_tensors
        (q, rq), (k, rk) = NormAttention.unit(q), NormAttention.unit(k)
        cosine = q @ k.mT
        p = (gain * cosine).softmax(-1)
        d = softmax_backward(p, g @ v.mT)
        grad_q, grad_k = gain * d @ k, gain * d.mT @ q
        grad_q = rq * (grad_q - q * (grad_q * q).sum(-1, keepdim=True))
        grad_k = rk * (grad_k - k * (grad_k * k).sum(-1, keepdim=True))
        return grad_q, grad_k, p.mT @ g, (d * scores(cosine, gain)).sum()

    @staticmethod
    def backward(ctx, g):
        return NormAttention.gradients(ctx, g, lambda cosine, gain: cosine)


class NormAttentionGain(NormAttention):
    @staticmethod
    def backward(ctx, g):
        return NormAttention.gradients(ctx, g, lambda cosine, gain: gain * cosine)


def _norm_attention(function):
    def norm_attention(q, k, v, gain):
        """softmax(gain q̂ k̂ᵀ) v of q (N, H, T, D), k (N, H, S, D), v (N, H, S, E), gain (), D and S > 0.

        q̂ is q / sqrt(Σ q² + 1e-6).
        """
        shapes(q, k, v)
        expect(gain.dim() == 0, "gain ()", tuple(gain.shape))
        return function.apply(q, k, v, gain)

    return norm_attention


add(
    "norm_attention_gain",
    _norm_attention,
    NormAttentionGain,
    NormAttention,
    lambda: (*sample(), torch.tensor(10.0, dtype=F64, requires_grad=True)),
    bug="the gain's gradient takes the scores that are multiplied by it already",
    shows="the sample",
)


class BiasAttention(Function):
    @staticmethod
    def forward(ctx, q, k, v, bias):
        ctx.save_for_backward(q, k, v, bias)
        return (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v

    @staticmethod
    def gradients(ctx, g, of_bias):
        q, k, v, bias = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        p = (q @ k.mT * scale + bias).softmax(-1)
        d = softmax_backward(p, g @ v.mT)
        return (
            d @ k * scale,
            d.mT @ q * scale,
            p.mT @ g,
            (d * of_bias(scale)).sum_to_size(bias.shape),
        )

    @staticmethod
    def backward(ctx, g):
        return BiasAttention.gradients(ctx, g, lambda scale: 1)


class BiasAttentionScaled(BiasAttention):
    @staticmethod
    def backward(ctx, g):
        return BiasAttention.gradients(ctx, g, lambda scale: scale)


def _bias_attention(function):
    def bias_attention(q, k, v, bias):
        """softmax(q kᵀ / √D + bias) v of q (N, H, T, D), k (N, H, S, D), v (N, H, S, E), D and S > 0.

        bias, finite, is (H, T, S) or (N, H, T, S), or has ones in their place.
        """
        shapes(q, k, v)
        full = (*q.shape[:3], k.shape[2])
        fits = 2 < bias.dim() < 5 and all(
            b in (1, n) for b, n in zip(bias.shape[::-1], full[::-1], strict=False)
        )
        expect(fits, f"bias that broadcasts to {full}", tuple(bias.shape))
        return function.apply(q, k, v, bias)

    return bias_attention


add(
    "bias_attention_scaled",
    _bias_attention,
    BiasAttentionScaled,
    BiasAttention,
    lambda: (*sample(), real(2, 3, 3, seed=3)),
    bug="the bias's gradient is multiplied by the scale, which it is added after",
    shows="the sample",
)
