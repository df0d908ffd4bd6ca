"""Linear algebra and vectors."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.sixteenth import add, expect


class NuclearNorm(Function):
    @staticmethod
    def forward(ctx, x):
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        expect((s[..., -1:] > 1e-5 * s[..., :1]).all(), "matrices of full rank", s)
        ctx.save_for_backward(u, vh)
        return s.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        u, vh = ctx.saved_tensors
        return g[..., None, None] * (u @ vh)


class NuclearNormTwice(NuclearNorm):
    @staticmethod
    def backward(ctx, g):
        u, vh = ctx.saved_tensors
        return g[..., None, None] * (u @ vh)


def _nuclear_norm(function):
    def nuclear_norm(x):
        """Sum of the singular values of matrices x (*, M, N), to (*).

        Of full rank: the least singular value is more than 1e-5 of the largest.
        """
        expect(x.dim() > 1, "x (*, M, N)", tuple(x.shape))
        return function.apply(x)

    return nuclear_norm


add(
    "nuclear_norm_second",
    _nuclear_norm,
    NuclearNormTwice,
    NuclearNorm,
    lambda: (real(4, 3),),
    bug="u and v are saved by forward: constants to the second derivative, and no once_differentiable",
    shows="double backward",
)


class QuadraticForm(Function):
    @staticmethod
    def forward(ctx, x, a):
        ctx.save_for_backward(x, a)
        return ((x @ a) * x).sum(-1)

    @staticmethod
    def gradients(ctx, g, both):
        x, a = ctx.saved_tensors
        return g[:, None] * (x @ both(a)), x.mT @ (g[:, None] * x)

    @staticmethod
    def backward(ctx, g):
        return QuadraticForm.gradients(ctx, g, lambda a: a + a.mT)


class QuadraticFormTwo(QuadraticForm):
    @staticmethod
    def backward(ctx, g):
        return QuadraticForm.gradients(ctx, g, lambda a: 2 * a.mT)


def _quadratic_form(function):
    def quadratic_form(x, a):
        """xᵀ a x of the rows of x (N, D), with any square matrix a (D, D), to (N,)."""
        expect(x.dim() == 2 and a.shape == (x.shape[1],) * 2, "x (N, D), a (D, D)", tuple(a.shape))
        return function.apply(x, a)

    return quadratic_form


add(
    "quadratic_form_symmetric",
    _quadratic_form,
    QuadraticFormTwo,
    QuadraticForm,
    lambda: (real(4, 3), real(3, 3, seed=1)),
    bug="2 a x, the gradient for a symmetric matrix",
    shows="the sample",
)


class Eigenvalues(Function):
    @staticmethod
    def forward(ctx, a):
        values, vectors = torch.linalg.eigh((a + a.mT) / 2)
        least = 1e-5 * values.abs().amax(-1, keepdim=True)
        expect((values.diff(dim=-1) > least).all(), "distinct eigenvalues", values)
        ctx.save_for_backward(vectors)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (v,) = ctx.saved_tensors
        return (v * g[..., None, :]) @ v.mT


class EigenvaluesRows(Eigenvalues):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (v,) = ctx.saved_tensors
        return (v.mT * g[..., None, :]) @ v


def _eigenvalues(function):
    def eigenvalues(a):
        """Eigenvalues, the least first, of (a + aᵀ) / 2 of a (*, D, D), D > 0.

        They are distinct: further apart than 1e-5 of the largest in magnitude.
        """
        expect(a.dim() > 1 and a.shape[-1] == a.shape[-2] > 0, "a (*, D, D), D > 0", tuple(a.shape))
        return function.apply(a)

    return eigenvalues


add(
    "eigenvalues_rows",
    _eigenvalues,
    EigenvaluesRows,
    Eigenvalues,
    lambda: (real(3, 3),),
    bug="the eigenvectors are taken to be the rows: vᵀ diag(g) v",
    shows="the sample",
)


class TriangularSolve(Function):
    @staticmethod
    def forward(ctx, a, b, upper, unitriangular):
        x = torch.linalg.solve_triangular(a, b, upper=upper, unitriangular=unitriangular)
        ctx.save_for_backward(a, x)
        ctx.options = upper, unitriangular
        return x

    @staticmethod
    def gradients(ctx, g):
        a, x = ctx.saved_tensors
        upper, unit = ctx.options
        grad_b = torch.linalg.solve_triangular(a.mT, g, upper=not upper, unitriangular=unit)
        return -grad_b @ x.mT, grad_b

    @staticmethod
    def backward(ctx, g):
        grad_a, grad_b = TriangularSolve.gradients(ctx, g)
        upper, unit = ctx.options
        grad_a = grad_a.triu(int(unit)) if upper else grad_a.tril(-int(unit))
        return grad_a, grad_b, None, None


class TriangularSolveFull(TriangularSolve):
    @staticmethod
    def backward(ctx, g):
        return *TriangularSolve.gradients(ctx, g), None, None


def _triangular_solve(function):
    def triangular_solve(a, b, upper=False, unitriangular=False):
        """a⁻¹ b of b (D, K), with the lower (upper: the upper) triangle of a (D, D); the rest of a is not read.

        The diagonal of a has no 0; unitriangular takes it to be ones.
        """
        expect(b.dim() == 2 and a.shape == (b.shape[0],) * 2, "a (D, D), b (D, K)", tuple(a.shape))
        expect(unitriangular or (a.diagonal() != 0).all(), "a diagonal without 0", a.diagonal())
        return function.apply(a, b, upper, unitriangular)

    return triangular_solve


def triangular_sample():
    a = (real(3, 3, grad=False).tril() + 3 * torch.eye(3, dtype=F64)).requires_grad_()
    return a, real(3, 2, seed=1)


add(
    "triangular_solve_full",
    _triangular_solve,
    TriangularSolveFull,
    TriangularSolve,
    triangular_sample,
    bug="the gradient of the triangle that is not read is not set to 0",
    shows="the sample",
)


class Cross(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.linalg.cross(a, b)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return torch.linalg.cross(b, g), torch.linalg.cross(g, a)


class CrossSign(Cross):
    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return torch.linalg.cross(b, g), torch.linalg.cross(a, g)


def _cross(function):
    def cross(a, b):
        """Cross products of a and b (*, 3), of one shape."""
        expect(a.shape == b.shape and a.shape[-1:] == (3,), "a, b (*, 3)", tuple(a.shape))
        return function.apply(a, b)

    return cross


add(
    "cross_sign",
    _cross,
    CrossSign,
    Cross,
    lambda: (real(4, 3), real(4, 3, seed=1)),
    bug="b's gradient is a × g, which is of the other sign",
    shows="the sample",
)


class Pinhole(Function):
    @staticmethod
    def forward(ctx, points, focal, centre):
        ctx.save_for_backward(points, focal, centre)
        return focal * points[:, :2] / points[:, 2:] + centre

    @staticmethod
    def gradients(ctx, g, offset):
        points, focal, centre = ctx.saved_tensors
        xy, z = points[:, :2], points[:, 2:]
        uv = focal * xy / z + offset(centre)
        grad_z = -(g * uv).sum(1, keepdim=True) / z
        return torch.cat((g * focal / z, grad_z), 1), (g * xy / z).sum(0), g.sum(0)

    @staticmethod
    def backward(ctx, g):
        return Pinhole.gradients(ctx, g, torch.zeros_like)


class PinholePixel(Pinhole):
    @staticmethod
    def backward(ctx, g):
        return Pinhole.gradients(ctx, g, lambda centre: centre)


def _pinhole(function):
    def pinhole(points, focal, centre):
        """Pixels (N, 2) of points (N, 3) in the camera's frame, z > 0: focal (2,) times x / z, plus centre (2,)."""
        expect(points.dim() == 2 and points.shape[1] == 3, "points (N, 3)", tuple(points.shape))
        expect(focal.shape == centre.shape == (2,), "focal, centre (2,)", tuple(focal.shape))
        expect((points[:, 2] > 0).all(), "z > 0", points[:, 2])
        return function.apply(points, focal, centre)

    return pinhole


def pinhole_sample():
    points = torch.cat((real(4, 2, grad=False), 2 + real(4, 1, seed=1, grad=False).abs()), 1)
    return points.requires_grad_(), real(2, seed=2, positive=True), real(2, seed=3)


add(
    "pinhole_centre",
    _pinhole,
    PinholePixel,
    Pinhole,
    pinhole_sample,
    bug="the depth's gradient is -pixel / z with the centre still in the pixel",
    shows="the sample",
)
