"""Heads: two softmaxes, a rotation of a part, routed tokens, experts."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.sixteenth import add, expect
from tests.verify.unseen.sixteenth_attention import sample, shapes
from tests.verify.unseen.twelfth import softmax_backward


class DifferentialAttention(Function):
    @staticmethod
    def maps(q, k):
        scale = (q.shape[-1] // 2) ** -0.5
        pairs = zip(q.chunk(2, -1), k.chunk(2, -1), strict=True)
        return [(a @ b.mT * scale).softmax(-1) for a, b in pairs], scale

    @staticmethod
    def forward(ctx, q, k, v, mix):
        ctx.save_for_backward(q, k, v, mix)
        (first, second), _ = DifferentialAttention.maps(q, k)
        return (first - mix * second) @ v

    @staticmethod
    def gradients(ctx, g, factor):
        q, k, v, mix = ctx.saved_tensors
        (first, second), scale = DifferentialAttention.maps(q, k)
        d = g @ v.mT
        grads = (
            softmax_backward(first, d) * scale,
            -factor(mix) * softmax_backward(second, d) * scale,
        )
        grad_q = torch.cat([a @ b for a, b in zip(grads, k.chunk(2, -1), strict=True)], -1)
        grad_k = torch.cat([a.mT @ b for a, b in zip(grads, q.chunk(2, -1), strict=True)], -1)
        return grad_q, grad_k, (first - mix * second).mT @ g, -(d * second).sum()

    @staticmethod
    def backward(ctx, g):
        return DifferentialAttention.gradients(ctx, g, lambda mix: mix)


class DifferentialAttentionMix(DifferentialAttention):
    @staticmethod
    def backward(ctx, g):
        return DifferentialAttention.gradients(ctx, g, torch.ones_like)


def _differential_attention(function):
    def differential_attention(q, k, v, mix):
        """(softmax(q₁ k₁ᵀ / √D) - mix softmax(q₂ k₂ᵀ / √D)) v with the halves of q, k, and mix ().

        q (N, H, T, 2 D), k (N, H, S, 2 D), v (N, H, S, E), D and S > 0.
        """
        shapes(q, k, v)
        expect(q.shape[3] % 2 == 0, "q (N, H, T, 2 D)", tuple(q.shape))
        expect(mix.dim() == 0, "mix ()", tuple(mix.shape))
        return function.apply(q, k, v, mix)

    return differential_attention


add(
    "differential_attention_mix",
    _differential_attention,
    DifferentialAttentionMix,
    DifferentialAttention,
    lambda: (*sample(), torch.tensor(0.8, dtype=F64, requires_grad=True)),
    bug="the second map's scores get no factor mix",
    shows="the sample",
)


class PartialRotary(Function):
    @staticmethod
    def turn(x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        size = 2 * cos.shape[-1]
        return torch.cat((PartialRotary.turn(x[..., :size], cos, sin), x[..., size:]), -1)

    @staticmethod
    def gradients(ctx, g, rest):
        cos, sin = ctx.saved_tensors
        size = 2 * cos.shape[-1]
        turned = PartialRotary.turn(g[..., :size], cos, -sin)
        return torch.cat((turned, rest(g[..., size:])), -1), None, None

    @staticmethod
    def backward(ctx, g):
        return PartialRotary.gradients(ctx, g, lambda g: g)


class PartialRotaryZero(PartialRotary):
    @staticmethod
    def backward(ctx, g):
        return PartialRotary.gradients(ctx, g, torch.zeros_like)


def _partial_rotary(function):
    def partial_rotary(x, cos, sin):
        """The first 2 R of the D features of x (*, T, D) turned by angles whose cos and sin (T, R) are constants.

        Feature i is turned with feature R + i.
        """
        expect(
            x.dim() > 1 and cos.dim() == 2 and cos.shape == sin.shape,
            "cos, sin (T, R)",
            tuple(cos.shape),
        )
        expect(
            cos.shape[0] == x.shape[-2] and 2 * cos.shape[1] <= x.shape[-1],
            "x (*, T, D)",
            tuple(x.shape),
        )
        return function.apply(x, cos.detach(), sin.detach())

    return partial_rotary


def rotary_sample():
    angles = torch.arange(3)[:, None] / torch.tensor([1.0, 100.0], dtype=F64)
    return real(2, 3, 6), angles.cos(), angles.sin()


add(
    "partial_rotary_rest",
    _partial_rotary,
    PartialRotaryZero,
    PartialRotary,
    rotary_sample,
    bug="the gradient of the features that are not turned stays 0",
    shows="the sample",
)


class Dispatch(Function):
    @staticmethod
    def forward(ctx, x, experts):
        order = experts.flatten().argsort(stable=True)
        ctx.save_for_backward(order)
        ctx.k = experts.shape[1]
        return x[order // ctx.k]

    @staticmethod
    def gradients(ctx, g, collect):
        (order,) = ctx.saved_tensors
        return collect(g[order.argsort()]), None

    @staticmethod
    def backward(ctx, g):
        return Dispatch.gradients(ctx, g, lambda g: g.unflatten(0, (-1, ctx.k)).sum(1))


class DispatchAxis(Dispatch):
    @staticmethod
    def backward(ctx, g):
        return Dispatch.gradients(ctx, g, lambda g: g.unflatten(0, (ctx.k, -1)).sum(0))


def _dispatch(function):
    def dispatch(x, experts):
        """The rows of x (N, D), each k times, sorted by expert: (N k, D), for experts (N, k), N and k > 0."""
        expect(
            x.dim() == experts.dim() == 2 and experts.shape[0] == x.shape[0],
            "experts (N, k)",
            tuple(x.shape),
        )
        expect(experts.numel(), "N, k > 0", tuple(experts.shape))
        return function.apply(x, experts)

    return dispatch


add(
    "dispatch_axis",
    _dispatch,
    DispatchAxis,
    Dispatch,
    lambda: (real(3, 4), torch.tensor([[0, 2], [1, 2], [1, 0]])),
    bug="the copies of a token are summed as if they were k blocks of n, not n rows of k",
    shows="the sample",
)


class ExpertLinear(Function):
    @staticmethod
    def forward(ctx, x, w, sizes):
        ctx.save_for_backward(x, w)
        ctx.sizes = sizes.tolist()
        return torch.cat([a @ b for a, b in zip(x.split(ctx.sizes), w.unbind(), strict=True)])

    @staticmethod
    def gradients(ctx, g, keep):
        x, w = ctx.saved_tensors
        parts = [
            p
            for p in zip(x.split(ctx.sizes), g.split(ctx.sizes), w.unbind(), strict=True)
            if keep(p[0])
        ]
        grad_x = torch.cat([d @ b.mT for _, d, b in parts])
        return grad_x, torch.stack([a.mT @ d for a, d, _ in parts]), None

    @staticmethod
    def backward(ctx, g):
        return ExpertLinear.gradients(ctx, g, lambda rows: True)


class ExpertLinearSkip(ExpertLinear):
    @staticmethod
    def backward(ctx, g):
        return ExpertLinear.gradients(ctx, g, len)


def _expert_linear(function):
    def expert_linear(x, w, sizes):
        """Each row of x (N, I), N > 0, times its expert's of w (E, I, O): sizes[0] rows for the first, and so on."""
        expect(
            x.dim() == 2 and w.dim() == 3 and w.shape[1] == x.shape[1],
            "x (N, I), w (E, I, O)",
            tuple(w.shape),
        )
        expect(sizes.shape == w.shape[:1], "sizes (E,)", sizes)
        expect(x.shape[0], "N > 0", tuple(x.shape))
        expect((sizes >= 0).all() & (sizes.sum() == x.shape[0]), "sizes that sum to N", sizes)
        return function.apply(x, w, sizes)

    return expert_linear


add(
    "expert_linear_skip",
    _expert_linear,
    ExpertLinearSkip,
    ExpertLinear,
    lambda: (real(6, 3), real(3, 3, 2, seed=1), torch.tensor([2, 3, 1])),
    bug="experts without rows are skipped, so the stack of weight gradients is too short",
    shows="an expert without rows",
)
