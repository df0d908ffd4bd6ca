"""Attention and sampling by weights."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.seventeenth import add
from tests.verify.unseen.sixteenth import expect
from tests.verify.unseen.sixteenth_attention import sample, shapes
from tests.verify.unseen.twelfth import softmax_backward


class SquaredReluAttention(Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return (q @ k.mT * q.shape[-1] ** -0.5).relu().square() @ v / k.shape[2]

    @staticmethod
    def gradients(ctx, g, count):
        q, k, v = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        r = (q @ k.mT * scale).relu()
        d = 2 * r * (g @ v.mT) * scale / count
        return d @ k, d.mT @ q, r.square().mT @ g / k.shape[2]

    @staticmethod
    def backward(ctx, g):
        return SquaredReluAttention.gradients(ctx, g, ctx.saved_tensors[1].shape[2])


class SquaredReluAttentionSum(SquaredReluAttention):
    @staticmethod
    def backward(ctx, g):
        return SquaredReluAttention.gradients(ctx, g, 1)


def _squared_relu_attention(function):
    def squared_relu_attention(q, k, v):
        """relu(q kᵀ / √D)² v / S of q (N, H, T, D), k (N, H, S, D), v (N, H, S, E), D and S > 0."""
        shapes(q, k, v)
        return function.apply(q, k, v)

    return squared_relu_attention


add(
    "squared_relu_attention_mean",
    _squared_relu_attention,
    SquaredReluAttentionSum,
    SquaredReluAttention,
    sample,
    bug="the scores' gradient is not divided by S",
    shows="the sample",
)


def mix(w, a):
    return torch.einsum("gh,nhts->ngts", w, a)


class TalkingHeads(Function):
    @staticmethod
    def weights(q, k, before, after):
        z = q @ k.mT * q.shape[-1] ** -0.5
        p = mix(before, z).softmax(-1)
        return z, p, mix(after, p)

    @staticmethod
    def forward(ctx, q, k, v, before, after):
        ctx.save_for_backward(q, k, v, before, after)
        return TalkingHeads.weights(q, k, before, after)[2] @ v

    @staticmethod
    def gradients(ctx, g, of_after):
        q, k, v, before, after = ctx.saved_tensors
        z, p, mixed = TalkingHeads.weights(q, k, before, after)
        dm = g @ v.mT
        d = softmax_backward(p, mix(after.mT, dm))
        dz = mix(before.mT, d) * q.shape[-1] ** -0.5
        return (
            dz @ k,
            dz.mT @ q,
            mixed.mT @ g,
            torch.einsum("ngts,nhts->gh", d, z),
            torch.einsum("ngts,nhts->gh", dm, of_after(p, mixed)),
        )

    @staticmethod
    def backward(ctx, g):
        return TalkingHeads.gradients(ctx, g, lambda p, mixed: p)


class TalkingHeadsMixed(TalkingHeads):
    @staticmethod
    def backward(ctx, g):
        return TalkingHeads.gradients(ctx, g, lambda p, mixed: mixed)


def _talking_heads(function):
    def talking_heads(q, k, v, before, after):
        """Attention of q (N, H, T, D), k (N, H, S, D), v (N, H, S, E), D and S > 0, whose heads are mixed.

        before (H, H) mixes the scores, after (H, H) the weights.
        """
        shapes(q, k, v)
        expect(before.shape == after.shape == (q.shape[1],) * 2, "(H, H)", tuple(before.shape))
        return function.apply(q, k, v, before, after)

    return talking_heads


add(
    "talking_heads_mixed",
    _talking_heads,
    TalkingHeadsMixed,
    TalkingHeads,
    lambda: (*sample(), real(2, 2, seed=3), real(2, 2, seed=4)),
    bug="the second mixing's gradient takes the mixed weights, not those that it mixed",
    shows="the sample",
)


class DeformableAttention(Function):
    """A place x is between the values floor(x) and floor(x) + 1; there are zeros outside."""

    @staticmethod
    def places(v, places, scale, shift):
        x = places * scale - shift
        low = x.detach().floor()
        index = low.long().clamp(-2, v.shape[2]) + 2
        return x - low, index.movedim(2, 1).flatten(2), (index + 1).movedim(2, 1).flatten(2)

    @staticmethod
    def read(v, index, shape):
        padded = torch.nn.functional.pad(v, (0, 0, 2, 2))
        out = padded.gather(2, index[..., None].expand(-1, -1, -1, v.shape[3]))
        return out.unflatten(2, (shape[1], shape[3])).movedim(1, 2)

    @staticmethod
    def forward(ctx, v, places, w, scale, shift):
        ctx.save_for_backward(v, places, w)
        ctx.options = scale, shift
        t, low, high = DeformableAttention.places(v, places, scale, shift)
        low, high = (DeformableAttention.read(v, i, w.shape) for i in (low, high))
        t = t[..., None]
        return (w[..., None] * (low + t * (high - low))).sum(3)

    @staticmethod
    def gradients(ctx, g, scale):
        v, places, w = ctx.saved_tensors
        t, *index = DeformableAttention.places(v, places, *ctx.options)
        low, high = (DeformableAttention.read(v, i, w.shape) for i in index)
        g = g[..., None, :]
        grad_w = (g * (low + t[..., None] * (high - low))).sum(-1)
        grad_places = scale * w * (g * (high - low)).sum(-1)
        grad = g.new_zeros(*v.shape[:2], v.shape[2] + 4, v.shape[3])
        for i, share in zip(index, (1 - t, t), strict=True):
            d = ((w * share)[..., None] * g).movedim(2, 1).flatten(2, 3)
            grad = grad.scatter_add(2, i[..., None].expand(-1, -1, -1, v.shape[3]), d)
        return grad[:, :, 2:-2], grad_places, grad_w, None, None

    @staticmethod
    def backward(ctx, g):
        return DeformableAttention.gradients(ctx, g, ctx.options[0])


class DeformableAttentionLength(DeformableAttention):
    @staticmethod
    def backward(ctx, g):
        return DeformableAttention.gradients(ctx, g, ctx.saved_tensors[0].shape[2])


def _deformable_attention(function):
    def deformable_attention(v, places, w, align_corners=False):
        """Sums by w (N, T, H, P) of v (N, H, L, E), L > 0, read at places (N, T, H, P), to (N, T, H, E).

        Between its values it is linear. Place 0 is v's begin and 1 its end, or, if align_corners, the first and last
        value; zeros are outside. At a value itself the slope is that to the right. Places from -1 to 2.
        """
        expect(v.dim() == w.dim() == 4 and w.shape == places.shape, "(N, T, H, P)", tuple(w.shape))
        expect(
            v.shape[0] == w.shape[0] and v.shape[1] == w.shape[2] and v.shape[2],
            "v (N, H, L, E)",
            tuple(v.shape),
        )
        expect(((places >= -1) & (places <= 2)).all(), "places from -1 to 2", places)
        length = v.shape[2]
        scale, shift = (length - 1, 0) if align_corners else (length, 0.5)
        return function.apply(v, places, w, scale, shift)

    return deformable_attention


add(
    "deformable_attention_corners",
    _deformable_attention,
    DeformableAttentionLength,
    DeformableAttention,
    lambda: (
        real(2, 2, 5, 3),
        real(2, 3, 2, 2, seed=1, grad=False).sigmoid().requires_grad_(),
        real(2, 3, 2, 2, seed=2, grad=False).softmax(-1).requires_grad_(),
    ),
    bug="the places' gradient is multiplied by the length, whatever align_corners is",
    shows="align_corners=True",
)


class MonotonicAttention(Function):
    """Row by row: q_j = (1 - p_(j - 1)) q_(j - 1) + a_j of the row before; a = p q."""

    @staticmethod
    def row(p, a):
        q = [a[:, 0]]
        for j in range(1, p.shape[1]):
            q.append((1 - p[:, j - 1]) * q[-1] + a[:, j])
        return torch.stack(q, 1)

    @staticmethod
    def first(p):
        return torch.nn.functional.one_hot(p.new_zeros(len(p)).long(), p.shape[2]).to(p.dtype)

    @staticmethod
    def forward(ctx, p):
        out = [MonotonicAttention.first(p)]
        for now in p.unbind(1):
            out.append(now * MonotonicAttention.row(now, out[-1]))
        out = torch.stack(out[1:], 1)
        ctx.save_for_backward(p, out)
        return out

    @staticmethod
    def step(p, a, d):
        """The gradients of one row's p and of the row before it, a."""
        q = MonotonicAttention.row(p, a)
        last, of_q, of_p = torch.zeros_like(d[:, 0]), [], []
        for j in range(p.shape[1] - 1, -1, -1):
            of_p.append(d[:, j] * q[:, j] - last * q[:, j])
            last = d[:, j] * p[:, j] + last * (1 - p[:, j])
            of_q.append(last)
        return torch.stack(of_p[::-1], 1), torch.stack(of_q[::-1], 1)

    @staticmethod
    def gradients(ctx, g, step):
        p, out = ctx.saved_tensors
        before = [MonotonicAttention.first(p), *out.unbind(1)[:-1]]
        d, parts = torch.zeros_like(p[:, 0]), []
        for now, a, grad in list(zip(p.unbind(1), before, g.unbind(1), strict=True))[::-1]:
            of_p, d = step(now, a, d + grad)
            parts.append(of_p)
        return torch.stack(parts[::-1], 1)

    @staticmethod
    def backward(ctx, g):
        return MonotonicAttention.gradients(ctx, g, MonotonicAttention.step)


class MonotonicAttentionProducts(MonotonicAttention):
    @staticmethod
    def backward(ctx, g):
        def step(p, a, d):
            keep = torch.cat((torch.ones_like(p[:, :1]), (1 - p[:, :-1]).cumprod(1)), 1)
            keep = keep.clamp(min=1e-10)
            share = (a / keep).cumsum(1)
            later = (d * p * keep).flip(1).cumsum(1).flip(1)
            of_keep = torch.cat((later[:, 1:], torch.zeros_like(p[:, :1])), 1) * share
            rest = (1 - p).clamp(min=1e-10)
            return d * keep * share - of_keep / rest, later / keep

        return MonotonicAttention.gradients(ctx, g, step)


def _monotonic_attention(function):
    def monotonic_attention(p):
        """Expected monotonic alignment (N, T, S) where step t stops at s with p (N, T, S), from 0 to 1; T, S > 0.

        The first step begins at the first place, each other where the step before it stopped.
        """
        expect(p.dim() == 3 and p.shape[1] * p.shape[2], "p (N, T, S), T, S > 0", tuple(p.shape))
        expect(((p >= 0) & (p <= 1)).all(), "p from 0 to 1", p)
        return function.apply(p)

    return monotonic_attention


add(
    "monotonic_attention_products",
    _monotonic_attention,
    MonotonicAttentionProducts,
    MonotonicAttention,
    lambda: (real(2, 3, 4, grad=False).sigmoid().requires_grad_(),),
    bug="backward divides by products of 1 - p, kept above 1e-10",
    shows="p of 1, or many places: such products are 0",
)
