"""Sparse products."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.twelfth import wide


class Coo(Function):
    @staticmethod
    def times(values, rows, cols, x):
        return torch.zeros_like(x).index_add(0, rows, values[:, None] * x[cols])

    @staticmethod
    def forward(ctx, values, rows, cols, x, symmetry):
        ctx.save_for_backward(values, rows, cols, x)
        ctx.symmetry = symmetry
        v, h = wide(values), wide(x)
        y = Coo.times(v, rows, cols, h) + symmetry * Coo.times(v, cols, rows, h)
        return y.to(x.dtype)

    @staticmethod
    def gradients(ctx, g, sign):
        values, rows, cols, x = ctx.saved_tensors
        v, h, d = wide(values), wide(x), wide(g)
        to_v = (d[rows] * h[cols]).sum(-1) + sign * (d[cols] * h[rows]).sum(-1)
        to_x = Coo.times(v, cols, rows, d) + ctx.symmetry * Coo.times(v, rows, cols, d)
        return to_v.to(g.dtype), None, None, to_x.to(g.dtype), None

    @staticmethod
    def backward(ctx, g):
        return Coo.gradients(ctx, g, ctx.symmetry)


class CooSign(Coo):
    @staticmethod
    def backward(ctx, g):
        return Coo.gradients(ctx, g, abs(ctx.symmetry))


def _coo(function):
    def coo_product(values, rows, cols, x, symmetry=0):
        """(A + symmetry Aᵀ) x of x (N, D), symmetry 0, 1 or -1; A has values (P,) at rows, cols (P,).

        Values at one place are added.
        """
        need(x.dim() == 2 and symmetry in {0, 1, -1}, "expected x (N, D) and symmetry 0, 1 or -1")
        need(values.dim() == 1, "expected values (P,)")
        need(values.shape == rows.shape == cols.shape, "expected rows and cols (P,)")
        for index in (rows, cols):
            need(bool(((index >= 0) & (index < len(x))).all()), "expected rows and cols below N")
        return function.apply(values, rows, cols, x, symmetry)

    return coo_product


add(
    "coo_product",
    _coo,
    CooSign,
    Coo,
    lambda: (real(5), whole(4, 5, seed=1), whole(4, 5, seed=2), real(4, 3, seed=3)),
    bug="the values' gradient adds the transposed part where it should subtract it",
    trigger="symmetry=-1",
)


class Sampled(Function):
    @staticmethod
    def forward(ctx, a, b, rows, cols):
        ctx.save_for_backward(a, b, rows, cols)
        return (wide(a)[rows] * wide(b)[cols]).sum(-1).to(a.dtype)

    @staticmethod
    def gradients(ctx, g, accumulate):
        a, b, rows, cols = ctx.saved_tensors
        d = wide(g)[:, None]
        to_a = torch.zeros_like(wide(a)).index_put((rows,), d * wide(b)[cols], accumulate)
        to_b = torch.zeros_like(wide(b)).index_put((cols,), d * wide(a)[rows], accumulate)
        return to_a.to(g.dtype), to_b.to(g.dtype), None, None

    @staticmethod
    def backward(ctx, g):
        return Sampled.gradients(ctx, g, accumulate=True)


class SampledOnce(Sampled):
    @staticmethod
    def backward(ctx, g):
        return Sampled.gradients(ctx, g, accumulate=False)


def _sampled(function):
    def sampled_product(a, b, rows, cols):
        """a bᵀ (P,) at the places rows, cols (P,) alone, of a (N, D) and b (M, D)."""
        need(a.dim() == b.dim() == 2 and a.shape[1] == b.shape[1], "expected a (N, D) and b (M, D)")
        need(rows.dim() == 1 and rows.shape == cols.shape, "expected rows and cols (P,)")
        for index, t in ((rows, a), (cols, b)):
            need(bool(((index >= 0) & (index < len(t))).all()), "expected rows and cols in range")
        return function.apply(a, b, rows, cols)

    return sampled_product


add(
    "sampled_product",
    _sampled,
    SampledOnce,
    Sampled,
    lambda: (real(4, 3), real(5, 3, seed=1), whole(4, 6, seed=2), whole(5, 6, seed=3)),
    bug="rows drawn twice keep the last gradient",
    trigger="the sample: a row twice",
)
