"""Linear algebra, complex products, windows, broadcasting."""

import torch
from torch.autograd import Function

from tests.verify.unseen import pair, real


class LogDet(Function):
    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return torch.linalg.slogdet(a)[1]

    @staticmethod
    def backward(ctx, g):
        (a,) = ctx.saved_tensors
        return g[..., None, None] * torch.linalg.inv(a).mT


class LogDetSymmetric(LogDet):
    @staticmethod
    def backward(ctx, g):
        (a,) = ctx.saved_tensors
        return g[..., None, None] * torch.linalg.inv(a)


def spd():
    a = real(3, 3, grad=False)
    return ((a @ a.T + torch.eye(3).double()).requires_grad_(),)


pair(
    "logdet_symmetric",
    LogDetSymmetric.apply,
    LogDet.apply,
    spd,
    "the inverse is not transposed; the sample is symmetric",
)


class Solve(Function):
    @staticmethod
    def forward(ctx, a, b):
        x = torch.linalg.solve(a, b)
        ctx.save_for_backward(a, x)
        return x

    @staticmethod
    def backward(ctx, g):
        a, x = ctx.saved_tensors
        gb = torch.linalg.solve(a.mT, g)
        return -gb @ x.mT, gb


class SolveSign(Solve):
    @staticmethod
    def backward(ctx, g):
        a, x = ctx.saved_tensors
        gb = torch.linalg.solve(a.mT, g)
        return gb @ x.mT, gb


pair(
    "solve_sign",
    SolveSign.apply,
    Solve.apply,
    lambda: (real(3, 3), real(3, 2, seed=1)),
    "sign of the matrix' part",
)


class ComplexMix(Function):
    """z w for complex z and w."""

    @staticmethod
    def forward(ctx, z, w):
        ctx.save_for_backward(z, w)
        return z * w

    @staticmethod
    def backward(ctx, g):
        z, w = ctx.saved_tensors
        return g * w.conj(), g * z.conj()


class ComplexMixHalf(ComplexMix):
    @staticmethod
    def backward(ctx, g):
        z, w = ctx.saved_tensors
        return g * w.conj(), (g * z).conj()


pair(
    "complex_conj_of_product",
    ComplexMixHalf.apply,
    ComplexMix.apply,
    lambda: tuple(
        torch.complex(real(4, seed=s, grad=False), real(4, seed=s + 9, grad=False)).requires_grad_()
        for s in (0, 1)
    ),
    "conj of the product instead of the factor",
)


class Unfold(Function):
    """Windows of 3 with step 1."""

    @staticmethod
    def forward(ctx, x):
        ctx.n = x.shape[-1]
        return x.unfold(
            -1, 3, 1
        ).clone()  # a view as output is differentiated wrongly by torch.compile in 2.13

    @staticmethod
    def backward(ctx, g):
        grad = g.new_zeros(*g.shape[:-2], ctx.n)
        for k in range(3):
            grad[..., k : k + g.shape[-2]] += g[..., k]
        return grad


class UnfoldAssign(Unfold):
    @staticmethod
    def backward(ctx, g):
        grad = g.new_zeros(*g.shape[:-2], ctx.n)
        for k in range(3):
            grad[..., k : k + g.shape[-2]] = g[..., k]
        return grad


pair(
    "unfold_overlap",
    UnfoldAssign.apply,
    Unfold.apply,
    lambda: (real(2, 6),),
    "overlapping windows overwrite",
)


class BroadcastMul(Function):
    """x * s for s of the shape of a row; the gradient of s is summed by hand."""

    @staticmethod
    def forward(ctx, x, s):
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        return g * s, (g * x).sum_to_size(s.shape)


class BroadcastMulSqueeze(BroadcastMul):
    @staticmethod
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        rows = (g.squeeze() * x.squeeze()).reshape(-1, s.shape[-1])
        return g * s, rows.sum(0) if len(x) > 1 else rows.mean() * torch.ones_like(s)


pair(
    "squeeze_batch_of_one",
    BroadcastMulSqueeze.apply,
    BroadcastMul.apply,
    lambda: (real(3, 4), real(4, seed=1)),
    "a batch of one row is averaged",
)
