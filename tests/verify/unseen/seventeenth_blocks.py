"""Blocks of layers, and what they keep between forward and backward."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.seventeenth import add
from tests.verify.unseen.sixteenth import expect


class SpectralNorm(Function):
    @staticmethod
    def largest(w):
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        expect((s[1:2] < (1 - 1e-3) * s[0]).all() and (s[0] > 0).all(), "one largest", s)
        return u[:, 0], s[0], v[0]

    @staticmethod
    def forward(ctx, w):
        u, s, v = SpectralNorm.largest(w)
        ctx.save_for_backward(w, u, s, v)
        return w / s

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        w, u, s, v = ctx.saved_tensors
        return (g - (g * w).sum() / s * torch.outer(u, v)) / s


class SpectralNormBuffers(SpectralNorm):
    """The vectors are in buffers, one pair for each shape, as a power iteration would go on from them."""

    buffers = {}  # noqa: RUF012

    @staticmethod
    def forward(ctx, w):
        u, s, v = SpectralNorm.largest(w)
        key = w.shape, w.dtype, w.device
        ctx.buffers = SpectralNormBuffers.buffers.setdefault(key, (u.clone(), v.clone()))
        for buffer, value in zip(ctx.buffers, (u, v), strict=True):
            buffer.copy_(value)
        ctx.save_for_backward(w, s)
        return w / s

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        w, s = ctx.saved_tensors
        return (g - (g * w).sum() / s * torch.outer(*ctx.buffers)) / s


def _spectral_norm(function):
    def spectral_norm(w):
        """w / σ of a matrix w (M, N), not empty, by its largest singular value, 0.1 % above the others and not 0."""
        expect(w.dim() == 2 and w.numel(), "w (M, N), not empty", tuple(w.shape))
        return function.apply(w)

    return spectral_norm


add(
    "spectral_norm_buffers",
    _spectral_norm,
    SpectralNormBuffers,
    SpectralNorm,
    lambda: (real(4, 3),),
    bug="backward reads the singular vectors from buffers that the next call of this shape writes over",
    shows="two calls before backward",
)


class Reversible(Function):
    @staticmethod
    def forward(ctx, a, b, w, v):
        ya = a + (b @ w).tanh()
        yb = b + (ya @ v).tanh()
        ctx.save_for_backward(ya, yb, w, v)
        return ya, yb

    @staticmethod
    def gradients(kept, ga, gb):
        """Inputs are found again from the outputs."""
        ya, yb, w, v = kept
        t = (ya @ v).tanh()
        b, d = yb - t, gb * (1 - t.square())
        ga, grad_v = ga + d @ v.mT, ya.mT @ d
        d = ga * (1 - (b @ w).tanh().square())
        return ga, gb + d @ w.mT, b.mT @ d, grad_v

    @staticmethod
    def backward(ctx, ga, gb):
        return Reversible.gradients(ctx.saved_tensors, ga, gb)


class ReversibleShared(Reversible):
    outputs = ()

    @staticmethod
    def forward(ctx, a, b, w, v):
        ctx.save_for_backward(w, v)
        ya = a + (b @ w).tanh()
        ReversibleShared.outputs = ya.detach(), b + (ya @ v).tanh()
        return ya, ReversibleShared.outputs[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, ga, gb):
        return Reversible.gradients((*ReversibleShared.outputs, *ctx.saved_tensors), ga, gb)


def _reversible(function):
    def reversible(a, b, w, v):
        """a' = a + tanh(b w) and b' = b + tanh(a' v), of a, b (N, D), w, v (D, D)."""
        expect(a.dim() == 2 and a.shape == b.shape, "a, b (N, D)", tuple(b.shape))
        expect(w.shape == v.shape == (a.shape[1],) * 2, "w, v (D, D)", tuple(w.shape))
        return function.apply(a, b, w, v)

    return reversible


add(
    "reversible_shared",
    _reversible,
    ReversibleShared,
    Reversible,
    lambda: (real(3, 2), real(3, 2, seed=1), real(2, 2, seed=2), real(2, 2, seed=3)),
    bug="the outputs to go back from are kept on the class: those of the last call",
    shows="two calls before backward",
)


class InvertibleConv(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return w @ x, x.shape[-1] * torch.linalg.slogdet(w)[1]

    @staticmethod
    def gradients(ctx, g, of_logdet):
        x, w = ctx.saved_tensors
        grad_w = (g @ x.mT).sum(0)
        return w.mT @ g, grad_w + x.shape[-1] * of_logdet * torch.linalg.inv(w).mT

    @staticmethod
    def backward(ctx, g, of_logdet):
        return InvertibleConv.gradients(ctx, g, of_logdet)


class InvertibleConvOutput(InvertibleConv):
    @staticmethod
    def backward(ctx, g, of_logdet):
        return InvertibleConv.gradients(ctx, g, 0)


def _invertible_conv(function):
    def invertible_conv(x, w):
        """w x of x (N, C, L) with w (C, C), and L log |det w|; w's condition number is below 1e4."""
        expect(x.dim() == 3 and w.shape == (x.shape[1],) * 2, "x (N, C, L), w (C, C)", w.shape)
        expect(torch.linalg.cond(w.detach()) < 1e4, "a condition number below 1e4", w)
        return function.apply(x, w)

    return invertible_conv


add(
    "invertible_conv_logdet",
    _invertible_conv,
    InvertibleConvOutput,
    InvertibleConv,
    lambda: (real(2, 3, 4), real(3, 3, seed=1)),
    bug="the second output's gradient is ignored",
    shows="the sample",
)


class GroupedLinear(Function):
    """Rows come sorted by expert: each expert's are one block."""

    @staticmethod
    def forward(ctx, x, counts, w):
        ctx.save_for_backward(x, counts, w)
        return torch.cat([r @ m for r, m in zip(x.split(counts.tolist()), w, strict=True)])

    @staticmethod
    def gradients(ctx, g, places):
        x, counts, w = ctx.saved_tensors
        split = counts.tolist()
        grad_x = [r @ m.mT for r, m in zip(g.split(split), w, strict=True)]
        pieces = zip(x.split(split), g.split(split), split, strict=True)
        grad_w = places([(r.mT @ d, n) for r, d, n in pieces])
        return torch.cat(grad_x), None, torch.stack(grad_w)

    @staticmethod
    def backward(ctx, g):
        return GroupedLinear.gradients(ctx, g, lambda pieces: [d for d, _ in pieces])


class GroupedLinearRuns(GroupedLinear):
    @staticmethod
    def backward(ctx, g):
        def first(pieces):
            """Every run's product, at the run's number."""
            runs = [d for d, n in pieces if n]
            return runs + [d for d, n in pieces if not n]

        return GroupedLinear.gradients(ctx, g, first)


def _grouped_linear(function):
    def grouped_linear(x, counts, w):
        """x w of every expert's rows of x (T, D): the first counts[0] rows by w[0], and so on; w (E, D, O), E > 0.

        counts (E,): integers from 0 on, of sum T.
        """
        expect(
            x.dim() == 2 and w.dim() == 3 and x.shape[1] == w.shape[1] and len(w),
            "x (T, D), w (E, D, O)",
            tuple(w.shape),
        )
        expect(counts.shape == w.shape[:1], "counts (E,)", tuple(counts.shape))
        expect((counts >= 0).all() and counts.sum() == len(x), "counts of sum T", counts)
        return function.apply(x, counts, w)

    return grouped_linear


add(
    "grouped_linear_empty",
    _grouped_linear,
    GroupedLinearRuns,
    GroupedLinear,
    lambda: (real(5, 3), torch.tensor([2, 1, 2]), real(3, 3, 2, seed=1)),
    bug="backward numbers the experts that have rows: one without shifts those after it",
    shows="an expert without rows before another with some",
)
