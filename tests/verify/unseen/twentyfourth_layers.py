"""Everyday mistakes in norms, linear layers, attention, pooling and embeddings."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentyfourth import add, add_bare, check, indices, same, sized


# Layer normalisation with a gain
def layer_norm(wrong):
    class Norm(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return normal(x)[0] * w

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            s, r = normal(x)
            g = grad_y * w
            grad_x = r * (g - g.mean(1, keepdim=True) - s * (g * s).mean(1, keepdim=True))
            return grad_x, (grad_y * (r * x if wrong else s)).sum(0)

    def normal(x):
        centred = x - x.mean(1, keepdim=True)
        r = (centred.square().mean(1, keepdim=True) + 1e-5).rsqrt()
        return centred * r, r

    def norm(x, w):
        sized("x", x, None, None)
        sized("w", w, x.shape[1])
        return Norm.apply(x, w)

    return norm


add(
    "layer_norm_gain",
    layer_norm,
    lambda: (real(4, 3), real(3, seed=1)),
    bug="The gain's gradient takes x over its spread without centring it",
)


# Group normalisation over channels and all places, two groups
def group_norm(wrong):
    class Norm(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return (normal(x)[0].reshape(x.shape)) * like(w, x)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            s, r = normal(x)
            g = (grad_y * like(w, x)).reshape(s.shape)
            n = x.shape[1] // 2 * x.shape[-1] if wrong else s.shape[2]
            mean, along = g.sum(2, keepdim=True) / n, (g * s).sum(2, keepdim=True) / n
            grad_x = (r * (g - mean - s * along)).reshape(x.shape)
            others = [d for d in range(x.ndim) if d != 1]
            return grad_x, (grad_y * s.reshape(x.shape)).sum(others)

    def like(w, x):
        return w.view(-1, *[1] * (x.ndim - 2))

    def normal(x):
        grouped = x.reshape(x.shape[0], 2, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        r = (centred.square().mean(2, keepdim=True) + 1e-5).rsqrt()
        return centred * r, r

    def norm(x, w):
        check(x.ndim >= 3 and x.numel() > 0, "x: expected shape (N, C, *), not empty")
        check(x.shape[1] % 2 == 0, "x: expected an even number of channels")
        sized("w", w, x.shape[1])
        return Norm.apply(x, w)

    return norm


add(
    "group_norm_places",
    group_norm,
    lambda: (real(2, 4, 3), real(4, seed=1)),
    bug="Backward takes the number of places from the last dimension alone, as Liger-Kernel did",
    trigger="images: more than three dimensions",
)


# x A B, of low rank
def low_rank(wrong):
    class LowRank(Function):
        @staticmethod
        def forward(ctx, x, a, b):
            ctx.save_for_backward(x, a, b)
            return x @ a @ b

        @staticmethod
        def backward(ctx, grad_y):
            x, a, b = ctx.saved_tensors
            if not wrong:
                grad_y = grad_y.to(x.dtype)
            with torch.autocast(x.device.type, enabled=False):
                back = grad_y @ b.T
                return back @ a.T, x.T @ back, (x @ a).T @ grad_y

    def product(x, a, b):
        sized("x", x, None, None)
        sized("a", a, x.shape[1], None)
        sized("b", b, a.shape[1], None)
        if not x.dtype == a.dtype == b.dtype or not x.is_floating_point():
            raise TypeError("expected real floating-point tensors of one dtype")
        return LowRank.apply(x, a, b)

    return product


add_bare(
    "low_rank_autocast",
    low_rank,
    lambda: (real(4, 3), real(3, 2, seed=1), real(2, 3, seed=2)),
    bug="Backward multiplies a grad_output of the autocast's dtype with tensors of the input's",
    trigger="torch.autocast",
)


def scores(q, k):
    return q @ k.mT / q.shape[-1] ** 0.5


def softmax_back(p, grad_p):
    return p * (grad_p - (p * grad_p).sum(-1, keepdim=True))


# Attention whose scores are capped softly at 2
def capped_attention(wrong):
    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return (2 * (scores(q, k) / 2).tanh()).softmax(-1) @ v

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            q, k, v = ctx.saved_tensors
            t = (scores(q, k) / 2).tanh()
            p = (2 * t).softmax(-1)
            g = softmax_back(p, grad_y @ v.mT)
            if not wrong:
                g = g * (1 - t * t)
            g = g / q.shape[-1] ** 0.5
            return g @ k, g.mT @ q, p.mT @ grad_y

    def attention(q, k, v):
        sized("q", q, None, None)
        sized("k", k, None, q.shape[1])
        sized("v", v, k.shape[0], None)
        return Attention.apply(q, k, v)

    return attention


add(
    "capped_attention_slope",
    capped_attention,
    lambda: (real(3, 4), real(5, 4, seed=1), real(5, 2, seed=2)),
    bug="Backward leaves out the cap's derivative",
)


# Attention with several heads of queries to each of keys and values
def grouped_attention(wrong):
    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            n = len(q) // len(k)
            k, v = k.repeat_interleave(n, 0), v.repeat_interleave(n, 0)
            return scores(q, k).softmax(-1) @ v

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            q, k, v = ctx.saved_tensors
            n = len(q) // len(k)
            grad_q, grad_k, grad_v = (t.new_zeros(t.shape) for t in (q, k, v))
            for head in range(len(q)):
                group = head // n
                p = scores(q[head], k[group]).softmax(-1)
                g = softmax_back(p, grad_y[head] @ v[group].mT) / q.shape[-1] ** 0.5
                grad_q[head] = g @ k[group]
                if wrong:
                    grad_k[group] = g.mT @ q[head]
                else:
                    grad_k[group] += g.mT @ q[head]
                grad_v[group] += p.mT @ grad_y[head]
            return grad_q, grad_k, grad_v

    def attention(q, k, v):
        sized("q", q, None, None, None)
        sized("k", k, None, None, q.shape[2])
        sized("v", v, k.shape[0], k.shape[1], None)
        check(len(q) % len(k) == 0, "q: expected a multiple of the heads of k")
        return Attention.apply(q, k, v)

    return attention


add(
    "grouped_attention_heads",
    grouped_attention,
    lambda: (real(4, 3, 2), real(2, 3, 2, seed=1), real(2, 3, 2, seed=2)),
    bug="The keys' gradient is written by each head of queries where it should be added",
)


# Mean of rows of a table, where 0 stands for no row
def bag_mean(wrong):
    class Bag(Function):
        @staticmethod
        def forward(ctx, table, bags):
            ctx.save_for_backward(table, bags)
            keep, count = parts(bags)
            return torch.where(keep, table[bags], 0).sum(1) / count

        @staticmethod
        def backward(ctx, grad_y):
            table, bags = ctx.saved_tensors
            keep, count = parts(bags)
            share = grad_y / (bags.shape[1] if wrong else count)
            rows = torch.where(keep, share[:, None, :], 0).flatten(0, 1)
            return grad_y.new_zeros(table.shape).index_add(0, bags.flatten(), rows), None

    def parts(bags):
        keep = bags != 0
        return keep[..., None], keep.sum(1, keepdim=True).clamp(min=1)

    def bag(table, bags):
        sized("table", table, None, None)
        sized("bags", bags, None, None)
        indices("bags", bags, len(table))
        return Bag.apply(table, bags.long())

    return bag


add(
    "bag_mean_padding",
    bag_mean,
    lambda: (real(5, 3), whole(5, 3, 4)),
    bug="Backward divides by the bag's length with its padding",
    trigger="a bag that is not full",
)


# Means over three parts of each row
def adaptive_mean(wrong):
    class Mean(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.shape = x.shape
            return torch.stack([x[:, a:b].mean(1) for a, b in parts(x.shape[1])], 1)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            grad_x = grad_y.new_zeros(ctx.shape)
            for k, (a, b) in enumerate(parts(ctx.shape[1])):
                size = max(ctx.shape[1] // 3, 1) if wrong else b - a
                grad_x[:, a:b] += grad_y[:, k, None] / size
            return grad_x

    def parts(n):
        return [(k * n // 3, -((k + 1) * -n // 3)) for k in range(3)]

    def means(x):
        sized("x", x, None, None)
        return Mean.apply(x)

    return means


add(
    "adaptive_mean_uneven",
    adaptive_mean,
    lambda: (real(2, 6),),
    bug="Backward takes all parts to be of one size",
    trigger="a length that 3 does not divide",
)


# Rows less their mean; long rows by blocks
def centred_rows(wrong):
    class Centre(Function):
        @staticmethod
        def forward(ctx, x):
            return x - x.mean(1, keepdim=True)

        @staticmethod
        def backward(ctx, grad_y):
            if wrong and grad_y.shape[1] > 1024:
                return grad_y - grad_y[:, :1024].mean(1, keepdim=True)
            return grad_y - grad_y.mean(1, keepdim=True)

    def centre(x):
        sized("x", x, None, None)
        return Centre.apply(x)

    return centre


add(
    "centred_rows_long",
    centred_rows,
    lambda: (real(3, 4),),
    bug="The path for long rows takes the mean of their first 1024 elements",
    trigger="rows of 1025 or more",
)


# Minimal gated unit: (1 - f) h + f c
def gated_unit(wrong):
    class Unit(Function):
        @staticmethod
        def forward(ctx, h, gate, candidate):
            ctx.save_for_backward(h, gate, candidate)
            f = gate.sigmoid()
            return (1 - f) * h + f * candidate.tanh()

        @staticmethod
        def backward(ctx, grad_y):
            h, gate, candidate = ctx.saved_tensors
            f, c = gate.sigmoid(), candidate.tanh()
            for_gate = grad_y * (c - h) * f * (1 - f)
            return grad_y * (f if wrong else 1 - f), for_gate, grad_y * f * (1 - c * c)

    def unit(h, gate, candidate):
        same(h, gate, candidate)
        return Unit.apply(h, gate, candidate)

    return unit


add(
    "gated_unit_state",
    gated_unit,
    lambda: (real(3, 4), real(3, 4, seed=1), real(3, 4, seed=2)),
    bug="The old state gets the gate's share of the gradient, the candidate's is right",
)
