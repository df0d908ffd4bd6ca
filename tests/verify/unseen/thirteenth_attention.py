"""Attention and causal convolution."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirteenth import add
from tests.verify.unseen.twelfth import softmax_backward


class Attention(Function):
    @staticmethod
    def weights(q, k, causal):
        s = q @ k.mT * q.shape[-1] ** -0.5
        if causal:
            s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf)
        return s.softmax(-1)

    @staticmethod
    def forward(ctx, q, k, v, causal):
        ctx.save_for_backward(q, k, v)
        ctx.causal = causal
        return Attention.weights(q, k, causal) @ v

    @staticmethod
    def gradients(ctx, g, causal):
        q, k, v = ctx.saved_tensors
        p = Attention.weights(q, k, causal)
        d = softmax_backward(p, g @ v.mT) * q.shape[-1] ** -0.5
        return d @ k, d.mT @ q, p.mT @ g, None

    @staticmethod
    def backward(ctx, g):
        return Attention.gradients(ctx, g, ctx.causal)


class AttentionCausal(Attention):
    @staticmethod
    def backward(ctx, g):
        return Attention.gradients(ctx, g, True)


def _attention(function):
    def attention(q, k, v, causal=True):
        """Attention of q, k and v (N, T, D), D > 0; with causal, to no key after the query."""
        return function.apply(q, k, v, causal)

    return attention


add(
    "attention_not_causal",
    _attention,
    AttentionCausal,
    Attention,
    lambda: (real(2, 3, 2), real(2, 3, 2, seed=1), real(2, 3, 2, seed=2)),
    bug="backward masks as if causal (triton-lang/triton#5660)",
    trigger="causal=False",
)


class LinearAttention(Function):
    @staticmethod
    def decay(q, gate):
        """What is left at each step of each one before."""
        t = q.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool, device=q.device).tril()
        if gate is None:
            return causal.to(q.dtype).expand(q.shape[0], t, t)
        past = gate.log().cumsum(-1)
        gap = past.unsqueeze(-1) - past.unsqueeze(-2)
        return gap.masked_fill(~causal, -torch.inf).exp()

    @staticmethod
    def forward(ctx, q, k, v, gate):
        ctx.save_for_backward(q, k, v, gate)
        return (q @ k.mT * LinearAttention.decay(q, gate)) @ v

    @staticmethod
    def gradients(ctx, g, decay):
        q, k, v, gate = ctx.saved_tensors
        d = g @ v.mT * decay
        score = q @ k.mT
        grad_gate = None
        if gate is not None:
            part = d * score
            grad_gate = (part.sum(-1) - part.sum(-2)).flip(-1).cumsum(-1).flip(-1) / gate
        return d @ k, d.mT @ q, (score * decay).mT @ g, grad_gate

    @staticmethod
    def backward(ctx, g):
        q, _, _, gate = ctx.saved_tensors
        return LinearAttention.gradients(ctx, g, LinearAttention.decay(q, gate))


class LinearAttentionUngated(LinearAttention):
    @staticmethod
    def backward(ctx, g):
        q, k, _, gate = ctx.saved_tensors
        grads = list(LinearAttention.backward(ctx, g))
        if gate is None:
            grads[2] = (q @ k.mT).mT @ g
        return tuple(grads)


class LinearAttentionOffset(LinearAttention):
    """The kernel's pointer to the gates lacks the offset of the head."""

    @staticmethod
    def backward(ctx, g):
        q, _, _, gate = ctx.saved_tensors
        if gate is not None:
            gate = gate[:1].expand_as(gate)
        return LinearAttention.gradients(ctx, g, LinearAttention.decay(q, gate))


def _linear_attention(function):
    def linear_attention(q, k, v, gate=None):
        """Causal linear attention of the heads q and k (N, T, D), v (N, T, E).

        gate (N, T), 0 < gate <= 1, is what each step leaves of those before.
        """
        return function.apply(q, k, v, gate)

    return linear_attention


add(
    "linear_attention_ungated",
    _linear_attention,
    LinearAttentionUngated,
    LinearAttention,
    lambda: (real(2, 3, 2), real(2, 3, 2, seed=1), real(2, 3, 2, seed=2)),
    bug="without gates, the values' gradient is not causal (fla-org/flash-linear-attention#6)",
    trigger="the sample",
)
add(
    "linear_attention_offset",
    _linear_attention,
    LinearAttentionOffset,
    LinearAttention,
    lambda: (
        real(2, 3, 2),
        real(2, 3, 2, seed=1),
        real(2, 3, 2, seed=2),
        real(2, 3, seed=3, grad=False).sigmoid().requires_grad_(),
    ),
    bug="backward reads the first head's gates for all (fla-org/flash-linear-attention#1115)",
    trigger="the sample",
)


class CausalConv(Function):
    """Sequences lie one after another: those of the batch, or those that cu_seqlens divides all of it into."""

    @staticmethod
    def taps(x, width, cu_seqlens):
        """x, and x of one to width - 1 steps before within the sequence."""
        n, t, _ = x.shape
        place = torch.arange(n * t, device=x.device)
        owner = place // t if cu_seqlens is None else torch.bucketize(place, cu_seqlens, right=True)
        for k in range(width):
            before = (place - k).clamp(min=0)
            valid = (place >= k) & (owner[before] == owner)
            yield before, valid.unsqueeze(-1)

    @staticmethod
    def forward(ctx, x, w, cu_seqlens):
        ctx.save_for_backward(x, w, cu_seqlens)
        flat = x.flatten(0, 1)
        parts = CausalConv.taps(x, w.shape[1], cu_seqlens)
        y = [flat[at] * ok * w[:, k] for k, (at, ok) in enumerate(parts)]
        return torch.stack(y).sum(0).view_as(x)

    @staticmethod
    def backward(ctx, g):
        x, w, cu_seqlens = ctx.saved_tensors
        flat, g = x.flatten(0, 1), g.flatten(0, 1)
        grad, grad_w = torch.zeros_like(flat), []
        for k, (at, ok) in enumerate(CausalConv.taps(x, w.shape[1], cu_seqlens)):
            grad = grad.index_add(0, at, g * ok * w[:, k])
            grad_w.append((g * ok * flat[at]).sum(0))
        return grad.view_as(x), torch.stack(grad_w, -1), None


class CausalConvBatch(CausalConv):
    """Each row of the batch goes over all sequences once more."""

    @staticmethod
    def backward(ctx, g):
        grad, grad_w, _ = CausalConv.backward(ctx, g)
        packed = ctx.saved_tensors[2] is not None
        return grad, grad_w * g.shape[0] if packed else grad_w, None


def _causal_conv(function):
    def causal_conv(x, w, cu_seqlens=None):
        """Causal convolution of x (N, T, D), N T > 0, with w (D, W), W > 0.

        cu_seqlens (S + 1,), from 0 to N T, divides all N T steps into S sequences.
        """
        return function.apply(x, w, cu_seqlens)

    return causal_conv


add(
    "causal_conv_packed",
    _causal_conv,
    CausalConvBatch,
    CausalConv,
    lambda: (real(2, 4, 2), real(2, 3, seed=1)),
    bug="the weight's gradient counts every sequence N times (fla-org/flash-linear-attention#955)",
    trigger="cu_seqlens with a batch of two",
)
