"""Attention."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyseventh import add, check, same, sized


# Scores with a learned bias for each distance, those beyond the table's end sharing its last entry
def distance_bias(wrong):
    def places(n, m, reach, device):
        return torch.arange(m, device=device) - torch.arange(n, device=device)[:, None] + reach

    class Bias(Function):
        @staticmethod
        def forward(ctx, s, table):
            ctx.size = len(table)
            place = places(s.shape[1], s.shape[2], len(table) // 2, s.device)
            return s + table[place.clamp(0, len(table) - 1)]

        @staticmethod
        def backward(ctx, grad_y):
            place = places(grad_y.shape[1], grad_y.shape[2], ctx.size // 2, grad_y.device)
            g = grad_y.sum(0)
            if wrong:
                g = torch.where((place >= 0) & (place < ctx.size), g, 0)
            place = place.clamp(0, ctx.size - 1).flatten()
            return grad_y, grad_y.new_zeros(ctx.size).index_add(0, place, g.flatten())

    def bias(s, table):
        sized("s", s, None, None, None)
        sized("table", table, None)
        check(len(table) % 2 == 1, "table: expected an odd number of distances")
        return Bias.apply(s, table)

    return bias


add(
    "clamped_distance",
    distance_bias,
    lambda: (real(2, 3, 3), real(5, seed=1)),
    bug="Distances that are clamped to the table's ends give them no gradient",
    trigger="sequences longer than the table's reach",
)


# Causal attention of several documents in one row
def packed(wrong):
    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v, document):
            ctx.save_for_backward(q, k, v, document)
            return weights(q, k, document) @ v

        @staticmethod
        def backward(ctx, grad_y):
            q, k, v, document = ctx.saved_tensors
            p = weights(q, k, torch.zeros_like(document) if wrong else document)
            grad_p = grad_y @ v.T
            grad_s = p * (grad_p - (grad_p * p).sum(1, keepdim=True)) / q.shape[1] ** 0.5
            return grad_s @ k, grad_s.T @ q, p.T @ grad_y, None

    def weights(q, k, document):
        row = torch.arange(len(q), device=q.device)
        seen = (row <= row[:, None]) & (document == document[:, None])
        return (q @ k.T / q.shape[1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(1)

    def attention(q, k, v, document):
        sized("q", q, None, None)
        same(q, k, v)
        sized("document", document, len(q))
        check(not document.is_floating_point(), "document: expected integers")
        return Attention.apply(q, k, v, document)

    return attention


add(
    "packed_documents",
    packed,
    lambda: (*(real(4, 3, seed=i) for i in range(3)), torch.zeros(4, dtype=torch.int64)),
    bug="Backward's mask is causal, but knows no documents",
    trigger="two documents or more",
)


# Attention to the places within a window, and to the first few of all
def windowed(wrong):
    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v, reach, first):
            ctx.save_for_backward(q, k, v)
            ctx.reach, ctx.first = reach, first
            return weights(q, k, reach, first) @ v

        @staticmethod
        def backward(ctx, grad_y):
            q, k, v = ctx.saved_tensors
            p = weights(q, k, ctx.reach, 0 if wrong else ctx.first)
            grad_p = grad_y @ v.T
            grad_s = p * (grad_p - (grad_p * p).sum(1, keepdim=True)) / q.shape[1] ** 0.5
            return grad_s @ k, grad_s.T @ q, p.T @ grad_y, None, None

    def weights(q, k, reach, first):
        place = torch.arange(len(q), device=q.device)
        seen = ((place - place[:, None]).abs() <= reach) | (place < first)
        return (q @ k.T / q.shape[1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(1)

    def attention(q, k, v, reach=1, first=0):
        sized("q", q, None, None)
        same(q, k, v)
        check(reach >= 0 and first >= 0, "reach, first: expected no negative numbers")
        return Attention.apply(q, k, v, reach, first)

    return attention


add(
    "windowed_first",
    windowed,
    lambda: tuple(real(4, 3, seed=i) for i in range(3)),
    bug="Backward's mask has the window, not the first places, which all see",
    trigger="first=1 or more, as in the sample",
    kwargs=lambda: {"first": 1},
)
