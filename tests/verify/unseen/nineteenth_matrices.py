"""Functions of matrices."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.nineteenth import add, check, given, same, sized


def square(name, t):
    check(t.ndim == 2 and t.shape[0] == t.shape[1], f"{name}: expected a square matrix")


class Product(Function):
    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return 3 * y @ y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return 3 * (g @ y.mT + y.mT @ g)


class ProductJacobian(Product):
    """Jᵀ g with the Jacobian that was worked out by hand."""

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        rows = [[0, 3, 3, 0], [3, 6, 0, 3], [3, 0, 6, 3], [0, 3, 3, 0]]
        jacobian = torch.tensor(rows, dtype=y.dtype, device=y.device)
        corners = torch.diag(torch.stack((6 * y[0, 0], 0 * y[0, 0], 0 * y[0, 0], 6 * y[1, 1])))
        return ((jacobian + corners).mT @ g.reshape(4)).reshape(2, 2)


def _product(function):
    def product(y):
        """3 y y, of y (2, 2)."""
        sized("y", y, 2, 2)
        return function.apply(y)

    return product


add(
    "product_jacobian",
    _product,
    ProductJacobian,
    Product,
    lambda: (given([[-1.0, 0.0], [1.0, 2.0]]),),
    bug="entries of the Jacobian are 3 and 6 where they are elements of y (mejorcodigo.com/p/66246)",
)


class Inverse(Function):
    @staticmethod
    def forward(ctx, k):
        ctx.save_for_backward(k)
        return torch.linalg.inv(k)

    @staticmethod
    def backward(ctx, g):
        (k,) = ctx.saved_tensors
        inverse = torch.linalg.inv(k).mT
        return -inverse @ g @ inverse


class InverseSquared(Inverse):
    @staticmethod
    def backward(ctx, g):
        (k,) = ctx.saved_tensors
        inverse = torch.linalg.inv(k).mT
        return -inverse @ inverse @ g


def _inverse(function):
    def inverse(k):
        """The inverse of k (N, N), which has one."""
        square("k", k)
        check(bool(torch.linalg.slogdet(k)[0] != 0), "k: expected a matrix that has an inverse")
        return function.apply(k)

    return inverse


def _positive(n, seed=0):
    root = real(n, n, seed=seed, grad=False)
    return (root @ root.mT + torch.eye(n, dtype=root.dtype)).requires_grad_()


add(
    "inverse_squared",
    _inverse,
    InverseSquared,
    Inverse,
    lambda: (_positive(3),),
    bug="the derivative is taken as -K⁻² dK (mathzsolution.com, Derivative of the inverse of a matrix)",
)


class LogDet(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.linalg.slogdet(x)[1]

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.linalg.inv(x).mT


class LogDetStraight(LogDet):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.linalg.inv(x)


def _log_det(function):
    def log_det(x):
        """log det x, of x (N, N) with det x > 0."""
        square("x", x)
        check(bool(torch.linalg.slogdet(x)[0] > 0), "x: expected a positive determinant")
        return function.apply(x)

    return log_det


add(
    "log_det_transpose",
    _log_det,
    LogDetStraight,
    LogDet,
    lambda: (_positive(3),),
    bug="the gradient is X⁻¹ without the transpose (bootmath.com, Why the gradient of log det X is X⁻¹)",
    trigger="x that is not symmetric",
)


class Frobenius(Function):
    @staticmethod
    def forward(ctx, x, a):
        ctx.save_for_backward(x, a)
        return (x - a).square().sum()

    @staticmethod
    def backward(ctx, g):
        x, a = ctx.saved_tensors
        return 2 * g * (x - a), 2 * g * (a - x)


class FrobeniusTrace(Frobenius):
    @staticmethod
    def backward(ctx, g):
        x, a = ctx.saved_tensors
        return g * (2 * x.mT - a - a.mT), 2 * g * (a - x)


def _frobenius(function):
    def frobenius(x, a):
        """|x - a|² of the Frobenius norm, of x and a (N, N)."""
        square("x", x)
        same(x, a)
        return function.apply(x, a)

    return frobenius


add(
    "frobenius_trace",
    _frobenius,
    FrobeniusTrace,
    Frobenius,
    lambda: (real(3, 3), real(3, 3, seed=1)),
    bug="the answer's gradient is 2 Xᵀ - A - Aᵀ (math.techqa.club 1991657)",
)


class Quadratic(Function):
    @staticmethod
    def forward(ctx, x, a, b):
        ctx.save_for_backward(x, a, b)
        return x @ a @ x + b @ x

    @staticmethod
    def backward(ctx, g):
        x, a, b = ctx.saved_tensors
        return g * (2 * a @ x + b), None, g * x


class QuadraticAlone(Quadratic):
    @staticmethod
    def backward(ctx, g):
        x, a, _ = ctx.saved_tensors
        return g * 2 * a @ x, None, g * x


def _quadratic(function):
    def quadratic(x, a, b):
        """xᵀ a x + bᵀ x, of x and b (N,) and a constant symmetric matrix a (N, N)."""
        sized("x", x, None)
        same(x, b)
        sized("a", a, x.shape[0], x.shape[0])
        check(bool((a == a.mT).all()), "a: expected a symmetric matrix")
        return function.apply(x, a, b)

    return quadratic


add(
    "quadratic_linear",
    _quadratic,
    QuadraticAlone,
    Quadratic,
    lambda: (real(3), _positive(3).detach(), real(3, seed=1)),
    bug="the gradient is 2 A x, without b (math.stackexchange.com/q/2247784)",
)


class Polar(Function):
    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        u, _, vh = torch.linalg.svd(a)
        return u @ vh

    @staticmethod
    def turn(a, g):
        """q and the X of p X + X p = qᴴ g - gᴴ q, of a = q p."""
        q = Polar.apply(a)
        p, m = q.mH @ a, q.mH @ g
        eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
        both = torch.kron(p.contiguous(), eye) + torch.kron(eye, p.mT.contiguous())
        return q, torch.linalg.solve(both, (m - m.mH).flatten()).view_as(a)

    @staticmethod
    def backward(ctx, g):
        q, x = Polar.turn(*ctx.saved_tensors, g)
        return q @ x


class PolarReal(Polar):
    @staticmethod
    def backward(ctx, g):
        (a,) = ctx.saved_tensors
        q, x = Polar.turn(a, g)
        vh = torch.linalg.svd(a)[2]
        diagonal = (vh @ x @ vh.mH).diagonal()
        return q @ (x - vh.mH @ torch.diag(diagonal) @ vh)


def _polar(function):
    def polar(a):
        """U Vᴴ of the singular vectors of an invertible a (N, N), real or complex."""
        square("a", a)
        check(bool((torch.linalg.svdvals(a) > 0).all()), "a: expected an invertible matrix")
        return function.apply(a)

    return polar


def _complex(n):
    return (torch.complex(real(n, n, grad=False), real(n, n, seed=1, grad=False)).requires_grad_(),)


add(
    "polar_gauge",
    _polar,
    PolarReal,
    Polar,
    lambda: _complex(3),
    bug="a complex SVD's backward is without the imaginary diagonal (re-ra.xyz, Gauge problem in automatic "
    "differentiation)",
)
