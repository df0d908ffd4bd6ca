"""Rays, isotonic regression and factorisations."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.thirteenth import add


class Radiance(Function):
    """The sum of T_i (1 - exp(-sigma_i step)) e_i, T_i being what the samples before let through."""

    @staticmethod
    def terms(sigma, emission, step):
        past = (sigma * step).cumsum(-1)
        left = (-past).exp()
        before = (sigma * step - past).exp()
        return (before - left) * emission, before - left, left

    @staticmethod
    def forward(ctx, sigma, emission, step):
        ctx.save_for_backward(sigma, emission)
        ctx.step = step
        return Radiance.terms(sigma, emission, step)[0].sum(-1)

    @staticmethod
    def gradients(ctx, g, behind):
        sigma, emission = ctx.saved_tensors
        g = g.unsqueeze(-1)
        terms, weight, left = Radiance.terms(sigma, emission, ctx.step)
        slope = left * emission - behind(terms)
        return g * ctx.step * slope, g * weight, None

    @staticmethod
    def backward(ctx, g):
        return Radiance.gradients(ctx, g, lambda t: t.sum(-1, keepdim=True) - t.cumsum(-1))


class RadianceAll(Radiance):
    @staticmethod
    def backward(ctx, g):
        return Radiance.gradients(ctx, g, lambda t: t.sum(-1, keepdim=True) - t.cumsum(-1) + t)


def _radiance(function):
    def radiance(sigma, emission, step=0.5):
        """Light of N rays with S samples each: densities sigma (N, S), not negative, and emission (N, S)."""
        return function.apply(sigma, emission, step)

    return radiance


add(
    "radiance_remaining",
    _radiance,
    RadianceAll,
    Radiance,
    lambda: (real(2, 4, positive=True), real(2, 4, seed=1)),
    bug="the light behind a sample still has the sample's own (mitsuba-renderer/mitsuba-tutorials#18)",
    trigger="the sample",
)


class Isotonic(Function):
    """The closest row that does not increase: means of blocks."""

    @staticmethod
    def blocks(row):
        """The lengths of the blocks."""
        kept: list[list[float]] = []
        for value in row:
            kept.append([value, 1])
            while len(kept) > 1 and kept[-2][0] / kept[-2][1] < kept[-1][0] / kept[-1][1]:
                total, length = kept.pop()
                kept[-1] = [kept[-1][0] + total, kept[-1][1] + length]
        return [int(length) for _, length in kept]

    @staticmethod
    def means(rows, blocks):
        out = [
            torch.cat([part.mean().expand(part.shape) for part in row.split(lengths)])
            for row, lengths in zip(rows, blocks, strict=True)
        ]
        return torch.stack(out)

    @staticmethod
    def forward(ctx, x):
        ctx.blocks = [Isotonic.blocks(row) for row in x.tolist()]
        return Isotonic.means(x, ctx.blocks)

    @staticmethod
    def backward(ctx, g):
        return Isotonic.means(g, ctx.blocks)


class IsotonicPassed(Isotonic):
    @staticmethod
    def backward(ctx, g):
        return g.clone()


def _isotonic(function):
    def isotonic(x):
        """Isotonic regression, decreasing, of the rows x (N, D), neither 0."""
        return function.apply(x)

    return isotonic


add(
    "isotonic_block",
    _isotonic,
    IsotonicPassed,
    Isotonic,
    lambda: (real(2, 5),),
    bug="an element of a pooled block has the slope of one alone (tensorflow/tensorflow#127234)",
    trigger="rows that increase somewhere, as the sample does",
)


class SolveUpper(Function):
    @staticmethod
    def forward(a, b):
        return torch.linalg.solve_triangular(a, b, upper=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx, g):
        a, x = ctx.saved_tensors
        grad = torch.linalg.solve_triangular(a.mT, g, upper=False)
        return -(grad @ x.mT).triu(), grad

    @staticmethod
    def jvp(ctx, tangent_a, tangent_b):
        a, x = ctx.saved_tensors
        return torch.linalg.solve_triangular(a, tangent_b - tangent_a.triu() @ x, upper=True)


class SolveUpperWhole(SolveUpper):
    @staticmethod
    def jvp(ctx, tangent_a, tangent_b):
        a, x = ctx.saved_tensors
        return torch.linalg.solve_triangular(a, tangent_b - tangent_a @ x, upper=True)


def _solve_upper(function):
    def solve_upper(a, b):
        """The x of a x = b, by the upper triangle of a (D, D), b (D, K), in reverse and forward mode.

        float32 or float64.
        """
        return function.apply(a, b)

    return solve_upper


add(
    "solve_upper_tangent",
    _solve_upper,
    SolveUpperWhole,
    SolveUpper,
    lambda: ((real(3, 3, grad=False) + 4 * torch.eye(3, dtype=F64)).requires_grad_(), real(3, 2)),
    bug="the tangent's lower triangle is not masked (jax-ml/jax#1458)",
    trigger="forward-mode differentiation",
)


class Cholesky(Function):
    @staticmethod
    def forward(ctx, a, upper):
        a = a.mT if upper else a
        factor = torch.linalg.cholesky(a.tril() + a.tril(-1).mT)
        ctx.upper = upper
        ctx.save_for_backward(factor)
        return factor.mT if upper else factor

    @staticmethod
    def symmetric(ctx, g):
        """The gradient of the symmetric matrix."""
        (factor,) = ctx.saved_tensors
        phi = (factor.mT @ (g.mT if ctx.upper else g)).tril()
        phi = phi - phi.diagonal().diag_embed() / 2
        right = torch.linalg.solve_triangular(factor, phi, upper=False, left=False)
        s = torch.linalg.solve_triangular(factor.mT, right, upper=True)
        return (s + s.mT) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        s = Cholesky.symmetric(ctx, g)
        grad = s.tril() + s.tril(-1)
        return grad.mT if ctx.upper else grad, None


class CholeskyGhost(Cholesky):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        s = Cholesky.symmetric(ctx, g)
        return s + s.triu(1) - s.tril(-1) / 2 if ctx.upper else s.tril() + s.tril(-1), None


def _cholesky(function):
    def cholesky(a, upper=False):
        """Cholesky factor of a (D, D), float32 or float64.

        One triangle is read: the lower, or with upper=True the upper.
        """
        return function.apply(a, upper)

    return cholesky


add(
    "cholesky_upper_ghost",
    _cholesky,
    CholeskyGhost,
    Cholesky,
    lambda: ((real(3, 3, grad=False) / 4 + 2 * torch.eye(3, dtype=F64)).requires_grad_(),),
    bug="a gradient for the triangle that is not read (jax-ml/jax#40421)",
    trigger="upper=True",
)
