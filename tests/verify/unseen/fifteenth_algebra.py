"""Linear algebra."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.twelfth import wide


class Kronecker(Function):
    @staticmethod
    def forward(ctx, a, b, scale):
        ctx.save_for_backward(a, b)
        ctx.scale = scale
        return (scale * torch.kron(wide(a), wide(b))).to(a.dtype)

    @staticmethod
    def gradients(g, a, scaled, scale):
        blocks = wide(g).view(len(a), len(scaled), a.shape[1], scaled.shape[1])
        grad_a = torch.einsum("ikjl,kl->ij", blocks, wide(scaled))
        grad_b = torch.einsum("ikjl,ij->kl", blocks, wide(a)) * scale
        return grad_a.to(g.dtype), grad_b.to(g.dtype), None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return Kronecker.gradients(g.contiguous(), a, wide(b) * ctx.scale, ctx.scale)


class KroneckerInPlace(Kronecker):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return Kronecker.gradients(g.contiguous(), a, b.mul_(ctx.scale), ctx.scale)


def _kronecker(function):
    def kronecker(a, b, scale=1.0):
        """scale a ⊗ b (I K, J L) of a (I, J) and b (K, L)."""
        need(a.dim() == 2 and b.dim() == 2, "expected matrices a and b")
        return function.apply(a, b, scale)

    return kronecker


add(
    "kronecker",
    _kronecker,
    KroneckerInPlace,
    Kronecker,
    lambda: (real(2, 3), real(3, 2, seed=1)),
    bug="scales the saved b in place",
    trigger="a scale, and b looked at after backward; a second backward through one graph",
)


class BilinearForm(Function):
    @staticmethod
    def forward(ctx, x, a, z):
        ctx.save_for_backward(x, a, z)
        return (wide(x) @ wide(a) * wide(z)).sum(-1).to(x.dtype)

    @staticmethod
    def gradients(g, x, a, z):
        d = wide(g)[:, None]
        grads = d * (z @ a.mT), (d * x).mT @ z, d * (x @ a)
        return tuple(t.to(g.dtype) for t in grads)

    @staticmethod
    def backward(ctx, g):
        return BilinearForm.gradients(g, *(wide(t) for t in ctx.saved_tensors))


class BilinearFormData(BilinearForm):
    @staticmethod
    def backward(ctx, g):
        return BilinearForm.gradients(g, *(wide(t.data) for t in ctx.saved_tensors))


def _bilinear_form(function):
    def bilinear_form(x, a, z):
        """xᵀ a z (N,) of the rows of x (N, D) and z (N, E), and a (D, E)."""
        need(x.dim() == z.dim() == 2 and len(x) == len(z), "expected x (N, D) and z (N, E)")
        need(a.shape == (x.shape[1], z.shape[1]), "expected a (D, E)")
        return function.apply(x, a, z)

    return bilinear_form


add(
    "bilinear_form",
    _bilinear_form,
    BilinearFormData,
    BilinearForm,
    lambda: (real(3, 2), real(2, 4, seed=1), real(3, 4, seed=2)),
    bug="backward takes the data of what is saved",
    trigger="a second derivative",
)


class Gram(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (wide(x) @ wide(x).mT).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return ((wide(g) + wide(g).mT) @ wide(x)).to(g.dtype)


class GramOneFactor(Gram):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (wide(g) @ wide(x)).to(g.dtype)


def _gram(function):
    def gram(x):
        """x xᵀ (*, N, N) of x (*, N, D)."""
        need(x.dim() > 1, "expected x (*, N, D)")
        return function.apply(x)

    return gram


add(
    "gram",
    _gram,
    GramOneFactor,
    Gram,
    lambda: (real(3, 4),),
    bug="the product rule's second term is missing",
    trigger="the sample",
)


class DiagonalLowRank(Function):
    """The diagonal's gradient is added up in blocks of rows."""

    block = 32

    @staticmethod
    def forward(ctx, x, d, u, v):
        ctx.save_for_backward(x, d, u, v)
        h = wide(x)
        return (wide(d) * h + h @ wide(v) @ wide(u).mT).to(x.dtype)

    @staticmethod
    def gradients(saved, g, blocks):
        x, d, u, v = (wide(t) for t in saved)
        to_y, to_d = wide(g), torch.zeros_like(d)
        for i in range(blocks):
            rows = slice(i * DiagonalLowRank.block, (i + 1) * DiagonalLowRank.block)
            to_d = to_d + (to_y[rows] * x[rows]).sum(0)
        inner = to_y @ u
        grads = d * to_y + inner @ v.mT, to_d, to_y.mT @ (x @ v), x.mT @ inner
        return tuple(t.to(g.dtype) for t in grads)

    @staticmethod
    def backward(ctx, g):
        blocks = -(-len(g) // DiagonalLowRank.block)
        return DiagonalLowRank.gradients(ctx.saved_tensors, g, blocks)


class DiagonalLowRankTail(DiagonalLowRank):
    @staticmethod
    def backward(ctx, g):
        blocks = max(1, len(g) // DiagonalLowRank.block)
        return DiagonalLowRank.gradients(ctx.saved_tensors, g, blocks)


def _diagonal_low_rank(function):
    def diagonal_low_rank(x, d, u, v):
        """The rows of x (N, D) times diag(d) + u vᵀ, d (D,), u and v (D, R)."""
        need(x.dim() == u.dim() == 2 and x.shape[1:] == d.shape, "expected x (N, D) and d (D,)")
        need(u.shape == v.shape and len(u) == len(d), "expected u and v (D, R)")
        return function.apply(x, d, u, v)

    return diagonal_low_rank


add(
    "diagonal_low_rank",
    _diagonal_low_rank,
    DiagonalLowRankTail,
    DiagonalLowRank,
    lambda: (real(4, 3), real(3, seed=1), real(3, 2, seed=2), real(3, 2, seed=3)),
    bug="the rows after the last full block of 32 are left out of the diagonal's gradient",
    trigger="more than 32 rows, no multiple of 32",
)


class Householder(Function):
    @staticmethod
    def forward(ctx, x, v):
        ctx.save_for_backward(x, v)
        h, n = wide(x), wide(v)
        return (h - 2 * (h @ n)[:, None] * (n / n.square().sum())).to(x.dtype)

    @staticmethod
    def gradients(g, x, v):
        unit = v / v.square().sum()
        along, to = (x @ v)[:, None], (g @ unit)[:, None]
        to_v = (4 * (along * to).sum(0) * unit) - 2 * (to * x).sum(0)
        return g - 2 * to * v, to_v - 2 * (along * g).sum(0) / v.square().sum()

    @staticmethod
    def backward(ctx, g):
        grads = Householder.gradients(wide(g), *(wide(t) for t in ctx.saved_tensors))
        return tuple(t.to(g.dtype) for t in grads)


class HouseholderNarrow(Householder):
    """In the input's dtype."""

    @staticmethod
    def backward(ctx, g):
        return Householder.gradients(g, *ctx.saved_tensors)


def _householder(function):
    def householder(x, v):
        """x - 2 v (v · x) / |v|² of the rows of x (N, D); v (D,) is not 0, |v| from 1e-4 to 1e6."""
        need(x.dim() == 2 and v.shape == x.shape[1:], "expected x (N, D) and v (D,)")
        need(bool(1e-4 <= wide(v).norm() <= 1e6), "expected |v| from 1e-4 to 1e6")
        return function.apply(x, v)

    return householder


add(
    "householder",
    _householder,
    HouseholderNarrow,
    Householder,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="backward takes |v|² in the input's dtype",
    trigger="float16 and |v| above 256",
)
