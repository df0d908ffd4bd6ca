"""Precision: autocast, half types, sums over many rows."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentythird import add, add_bare, check, indices, sized


def wide(t):
    """Return half types as float32."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


# Rows looked up in a table and projected
def looked_up(wrong):
    class Project(Function):
        @staticmethod
        def forward(ctx, x, w, i):
            ctx.save_for_backward(x, w, i)
            return x[i] @ w.T

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, w, i = ctx.saved_tensors
            g = wide(grad_y)
            rows = (g @ wide(w)).to(grad_y.dtype if wrong else x.dtype)
            sums = torch.zeros_like(x if wrong else wide(x))
            grad_x = sums.index_add(0, i, rows if wrong else wide(rows)).to(x.dtype)
            return grad_x, (g.T @ wide(x[i])).to(w.dtype), None

    def project(x, w, i):
        if x.is_complex() or w.is_complex():
            raise TypeError("expected real tensors")
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        sized("i", i, None)
        indices("i", i, len(x))
        return Project.apply(x, w, i)

    return project


add_bare(
    "looked_up_autocast",
    looked_up,
    lambda: (real(4, 3), real(2, 3, seed=1), whole(4, 5)),
    bug="Backward adds rows of the output's dtype to a table of the input's",
    trigger="torch.autocast",
)


# Standardised rows
def layer_norm(wrong):
    class Norm(Function):
        @staticmethod
        def forward(ctx, x, eps):
            ctx.save_for_backward(x)
            ctx.eps = eps
            return normal(x, eps)[0].to(x.dtype)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            s, r = normal(x, ctx.eps)
            n = x.shape[1]
            g = grad_y if wrong else wide(grad_y)
            s, r = s.to(g.dtype), r.to(g.dtype)
            total = n * g - g.sum(1, keepdim=True) - s * (g * s).sum(1, keepdim=True)
            return (r / n * total).to(x.dtype), None

    def normal(x, eps):
        centred = wide(x) - wide(x).mean(1, keepdim=True)
        r = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
        return centred * r, r

    def norm(x, eps=1e-5):
        sized("x", x, None, None)
        check(eps > 0, "eps: expected a number > 0")
        return Norm.apply(x, eps)

    return norm


add(
    "layer_norm_half",
    layer_norm,
    lambda: (real(3, 6),),
    bug="Backward multiplies grad_output by the row's length in its own dtype",
    trigger="float16 with a loss scale of 16384",
    own=True,
)


# Softmax of the rows
def row_softmax(wrong):
    class Softmax(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return wide(x).softmax(1).to(x.dtype)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            e = x.exp()
            p = wide(e / e.sum(1, keepdim=True)) if wrong else wide(x).softmax(1)
            g = wide(grad_y)
            return (p * (g - (g * p).sum(1, keepdim=True))).to(x.dtype)

    def softmax(x):
        sized("x", x, None, None)
        return Softmax.apply(x)

    return softmax


add(
    "row_softmax_overflow",
    row_softmax,
    lambda: (real(3, 4),),
    bug="Backward takes exponentials without taking off the largest first",
    trigger="logits above 11 in float16, 88 in float32, 709 in float64",
    own=True,
)


# Embedding
def embedding(wrong):
    class Embedding(Function):
        @staticmethod
        def forward(ctx, w, i):
            ctx.save_for_backward(i)
            ctx.rows = len(w)
            return w[i]

        @staticmethod
        def backward(ctx, grad_y):
            (i,) = ctx.saved_tensors
            g = grad_y if wrong else wide(grad_y)
            sums = g.new_zeros(ctx.rows, g.shape[1])
            if wrong:
                for row, place in zip(g, i.tolist(), strict=True):
                    sums[place] = sums[place] + row
                return sums, None
            return sums.index_add(0, i, g).to(grad_y.dtype), None

    def embed(w, i):
        sized("w", w, None, None)
        sized("i", i, None)
        indices("i", i, len(w))
        return Embedding.apply(w, i)

    return embed


add(
    "embedding_sum",
    embedding,
    lambda: (real(3, 2), whole(3, 6)),
    bug="A row's gradient is summed in its own dtype, where small addends are lost",
    trigger="bfloat16 and a row looked up hundreds of times",
    missed="torch's own embedding sums so, too",
    own=True,
)
