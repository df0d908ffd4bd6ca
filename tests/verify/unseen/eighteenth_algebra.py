"""Matrices, distances and transport."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.eighteenth import add, uniform


class Sinkhorn(Function):
    @staticmethod
    def steps(m, iters):
        """The matrices after each normalization, of columns or rows, and the sums that divided."""
        r = m.exp()
        for dim in (-2, -1) * iters:
            total = r.sum(dim, keepdim=True)
            r = r / total
            yield dim, r, total

    @staticmethod
    def forward(ctx, m, iters):
        ctx.save_for_backward(m)
        ctx.iters = iters
        return [r for _, r, _ in Sinkhorn.steps(m, iters)][-1]

    @staticmethod
    def backward(ctx, g):
        (m,) = ctx.saved_tensors
        for dim, r, total in reversed(list(Sinkhorn.steps(m, ctx.iters))):
            g = (g - (g * r).sum(dim, keepdim=True)) / total
        return g * m.exp(), None


class SinkhornDoubly(Sinkhorn):
    """The potentials of a matrix all of whose rows and columns sum to 1."""

    @staticmethod
    def backward(ctx, g):
        (m,) = ctx.saved_tensors
        r = [r for _, r, _ in Sinkhorn.steps(m, ctx.iters)][-1]
        rows, columns = (r * g).sum(-1, keepdim=True), (r * g).sum(-2).unsqueeze(-1)
        system = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device) - r.mT @ r
        beta = torch.linalg.pinv(system, rtol=1e-3) @ (columns - r.mT @ rows)
        return r * (g - (rows - r @ beta) - beta.mT), None


def _sinkhorn(function):
    def sinkhorn(m, iters=10):
        """exp(m), m (N, S, S), S > 0, with its columns and then its rows divided by their sums, iters > 0 times."""
        return function.apply(m, iters)

    return sinkhorn


add(
    "sinkhorn_doubly",
    _sinkhorn,
    SinkhornDoubly,
    Sinkhorn,
    lambda: (uniform(2, 4, 4, high=4.0),),
    bug="backward takes the result to be doubly stochastic (deepseek-ai/TileKernels#2)",
    trigger="few iterations, as with iters=1",
)


class EarthMover(Function):
    """Matches greedily, from near to far."""

    @staticmethod
    def distances(xyz1, xyz2):
        return (xyz1.unsqueeze(2) - xyz2.unsqueeze(1)).square().sum(-1)

    @staticmethod
    def match(d):
        n, m = d.shape[1:]
        left = torch.full_like(d[:, :, :1], max(m // n, 1))
        right = torch.full_like(d[:, :1], max(n // m, 1))
        match = torch.zeros_like(d)
        for j in range(7, -3, -1):
            level = 0.0 if j == -2 else -(4.0**j)
            near = (level * d).exp()
            ratio = left / ((near * right).sum(2, keepdim=True) + 1e-9)
            total = (near * ratio).sum(1, keepdim=True) * right
            taken = (right / (total + 1e-9)).clamp(max=1) * right
            right = (right - total).clamp(min=0)
            moved = near * ratio * taken
            match = match + moved
            left = (left - moved.sum(2, keepdim=True)).clamp(min=0)
        return match

    @staticmethod
    def forward(ctx, xyz1, xyz2):
        ctx.save_for_backward(xyz1, xyz2)
        d = EarthMover.distances(xyz1, xyz2)
        return (EarthMover.match(d) * d).sum((1, 2))

    @staticmethod
    def gradients(ctx, g, of_match):
        points = ctx.saved_tensors
        with torch.enable_grad():
            points = [p.detach().requires_grad_() for p in points]
            d = EarthMover.distances(*points)
            cost = (of_match(EarthMover.match(d)) * d).sum((1, 2))
            return torch.autograd.grad(cost, points, g)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return EarthMover.gradients(ctx, g, lambda match: match)


class EarthMoverFixed(EarthMover):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return EarthMover.gradients(ctx, g, torch.detach)


def _earth_mover(function):
    def earth_mover_distance(xyz1, xyz2):
        """What it costs (B,) to move points xyz1 (B, N, 3) to xyz2 (B, M, 3), matched approximately; N, M > 0."""
        return function.apply(xyz1, xyz2)

    return earth_mover_distance


add(
    "earth_mover_match",
    _earth_mover,
    EarthMoverFixed,
    EarthMover,
    lambda: (uniform(2, 4, 3), uniform(2, 5, 3, seed=1, grad=False)),
    bug="backward takes the match to be constant (daerduoCarey/PyTorchEMD#3)",
    trigger="the sample",
)


class CDist(Function):
    @staticmethod
    def forward(ctx, x1, x2, p):
        if p < 1:
            raise ValueError(f"p >= 1, got {p}")
        ctx.save_for_backward(x1, x2)
        ctx.p = p
        return torch.cdist(x1, x2, p, "donot_use_mm_for_euclid_dist")

    @staticmethod
    def gradients(ctx, g, p):
        x1, x2 = ctx.saved_tensors
        diff = x1.unsqueeze(-2) - x2.unsqueeze(-3)
        size = diff.abs()
        dist = torch.cdist(x1, x2, ctx.p, "donot_use_mm_for_euclid_dist").unsqueeze(-1)
        if p == torch.inf:
            share = (size == dist).to(g.dtype)
            share = share / share.sum(-1, keepdim=True)
        else:
            share = (size / dist.where(dist > 0, 1)) ** (p - 1)
        part = diff.sign() * share * g.unsqueeze(-1)
        return part.sum(-2), -part.sum(-3), None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return CDist.gradients(ctx, g, ctx.p)


class CDistEuclid(CDist):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return CDist.gradients(ctx, g, 2.0)


def _cdist(function):
    def cdist(x1, x2, p=2.0):
        """Distances (B, P, R) in the p-norm, p >= 1 or inf, of the points x1 (B, P, M) and x2 (B, R, M), M > 0."""
        return function.apply(x1, x2, p)

    return cdist


add(
    "cdist_euclid",
    _cdist,
    CDistEuclid,
    CDist,
    lambda: (real(2, 3, 4), real(2, 4, 4, seed=1)),
    bug="backward is that of p = 2 (flagos-ai/FlagGems#5023)",
    trigger="p other than 2",
)


class HermitianExp(Function):
    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        values, vectors = torch.linalg.eigh((a + a.mH) / 2)
        return vectors * values.exp().unsqueeze(-2) @ vectors.mH

    @staticmethod
    def gradients(ctx, g, adjoint):
        (a,) = ctx.saved_tensors
        values, vectors = torch.linalg.eigh((a + a.mH) / 2)
        gap, total = (
            values.unsqueeze(-1) - values.unsqueeze(-2),
            values.unsqueeze(-1) + values.unsqueeze(-2),
        )
        slope = (total / 2).exp() * torch.where(gap == 0, 1, (gap / 2).sinh() / (gap / 2))
        d = vectors @ (slope * (adjoint(vectors) @ g @ vectors)) @ vectors.mH
        return (d + d.mH) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return HermitianExp.gradients(ctx, g, torch.adjoint)


class HermitianExpTransposed(HermitianExp):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return HermitianExp.gradients(ctx, g, lambda t: t.mT)


def _hermitian_exp(function):
    def hermitian_exp(a):
        """The matrix exponential of the Hermitian part of a (N, D, D), real or complex, D > 0."""
        return function.apply(a)

    return hermitian_exp


add(
    "hermitian_exp_conj",
    _hermitian_exp,
    HermitianExpTransposed,
    HermitianExp,
    lambda: (
        torch.complex(
            real(2, 3, 3, grad=False), real(2, 3, 3, seed=1, grad=False)
        ).requires_grad_(),
    ),
    bug="the eigenvectors are not conjugated (FluxML/Zygote.jl#366)",
    trigger="the sample",
)


class SVDNorm(Function):
    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        return torch.linalg.norm((u * s) @ vh)

    @staticmethod
    def gradients(ctx, g, inverse):
        """Of the norm through u, s and v, each with its part of the decomposition's gradient."""
        u, s, vh = torch.linalg.svd(ctx.saved_tensors[0], full_matrices=False)
        product = (u * s) @ vh
        w = u.mT @ (g * product / torch.linalg.norm(product)) @ vh.mT
        of_u, of_v = w * s, w.mT * s
        f = inverse((s.square().unsqueeze(-2) - s.square().unsqueeze(-1)) / s[:1] ** 2) / s[:1] ** 2
        inner = (f * (of_u - of_u.mT)) * s + s.unsqueeze(-1) * (f * (of_v - of_v.mT))
        return u @ (inner + torch.diag(w.diagonal())) @ vh

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return SVDNorm.gradients(ctx, g, lambda gap: torch.where(gap.abs() < 1e-6, 0, 1 / gap))


class SVDNormNaN(SVDNorm):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return SVDNorm.gradients(
            ctx,
            g,
            lambda gap: (1 / gap).where(
                ~torch.eye(len(gap), dtype=torch.bool, device=gap.device), 0
            ),
        )


def _svd_norm(function):
    def svd_norm(a):
        """The norm of an invertible matrix a (N, N), N > 0, put together again from its decomposition."""
        return function.apply(a)

    return svd_norm


add(
    "svd_norm_equal",
    _svd_norm,
    SVDNormNaN,
    SVDNorm,
    lambda: (torch.diag(torch.tensor([1.0, 1.0, 2.0, 3.0], dtype=F64)).requires_grad_(),),
    bug="equal singular values divide by 0 (jax-ml/jax#8732)",
    trigger="the sample",
)
