"""Traces of products of matrices."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.nineteenth import add, check, same, sized
from tests.verify.unseen.nineteenth_matrices import square


class Congruence(Function):
    @staticmethod
    def forward(ctx, a, b, c):
        ctx.save_for_backward(a, b, c)
        return torch.trace(a @ b @ a.mT @ c)

    @staticmethod
    def gradients(ctx, g, first):
        a, b, c = ctx.saved_tensors
        grad = c.mT @ a @ b.mT
        if first:
            grad = grad + c @ a @ b
        return g * grad, g * (a.mT @ c.mT @ a), g * (a @ b.mT @ a.mT)

    @staticmethod
    def backward(ctx, g):
        return Congruence.gradients(ctx, g, True)


class CongruenceHalf(Congruence):
    @staticmethod
    def backward(ctx, g):
        return Congruence.gradients(ctx, g, False)


def _congruence(function):
    def congruence(a, b, c):
        """tr(a b aᵀ c), of a (N, M), b (M, M) and c (N, N)."""
        sized("a", a, None, None)
        sized("b", b, a.shape[1], a.shape[1])
        sized("c", c, a.shape[0], a.shape[0])
        return function.apply(a, b, c)

    return congruence


add(
    "congruence_half",
    _congruence,
    CongruenceHalf,
    Congruence,
    lambda: (real(3, 2), real(2, 2, seed=1), real(3, 3, seed=2)),
    bug="only the first A is differentiated, giving Cᵀ A Bᵀ (math.stackexchange.com/q/2342457)",
)


class Between(Function):
    @staticmethod
    def forward(ctx, a, x, b):
        ctx.save_for_backward(a, x, b)
        return torch.trace(a @ x @ b)

    @staticmethod
    def gradients(ctx, g, of_x):
        a, x, b = ctx.saved_tensors
        return g * (x @ b).mT, g * of_x(a, b), g * (a @ x).mT

    @staticmethod
    def backward(ctx, g):
        return Between.gradients(ctx, g, lambda a, b: a.mT @ b.mT)


class BetweenSwapped(Between):
    @staticmethod
    def backward(ctx, g):
        return Between.gradients(ctx, g, lambda a, b: (a @ b).mT)


def _between(function):
    def between(a, x, b):
        """tr(a x b), of a, x and b (N, N)."""
        square("a", a)
        same(a, x, b)
        return function.apply(a, x, b)

    return between


add(
    "between_swapped",
    _between,
    BetweenSwapped,
    Between,
    lambda: (real(3, 3), real(3, 3, seed=1), real(3, 3, seed=2)),
    bug="(A B)ᵀ is found instead of Aᵀ Bᵀ (math.stackexchange.com/q/2170842)",
)


class Outer(Function):
    @staticmethod
    def forward(ctx, x, a, b):
        ctx.save_for_backward(x, a, b)
        return torch.trace(x @ b @ x.mT @ a)

    @staticmethod
    def gradients(ctx, g, of_x):
        x, a, b = ctx.saved_tensors
        return g * of_x(x, a, b), g * (x @ b @ x.mT).mT, g * (x.mT @ a.mT @ x)

    @staticmethod
    def backward(ctx, g):
        return Outer.gradients(ctx, g, lambda x, a, b: a @ x @ b + a.mT @ x @ b.mT)


class OuterSymmetric(Outer):
    @staticmethod
    def backward(ctx, g):
        return Outer.gradients(ctx, g, lambda x, a, b: a @ (x @ b.mT + x @ b))


def _outer(function):
    def outer_trace(x, a, b):
        """tr(x b xᵀ a), of x (N, M), a (N, N) and b (M, M)."""
        sized("x", x, None, None)
        sized("a", a, x.shape[0], x.shape[0])
        sized("b", b, x.shape[1], x.shape[1])
        return function.apply(x, a, b)

    return outer_trace


add(
    "outer_trace_symmetric",
    _outer,
    OuterSymmetric,
    Outer,
    lambda: (real(3, 2), real(3, 3, seed=1), real(2, 2, seed=2)),
    bug="A (X Bᵀ + X B) is right for a symmetric A alone (Mathematics Stack Exchange, derivative of Tr(X B Xᵀ A))",
)


class Inner(Function):
    @staticmethod
    def forward(ctx, x, a, b):
        ctx.save_for_backward(x, a, b)
        return torch.trace(x.mT @ a @ x @ b)

    @staticmethod
    def gradients(ctx, g, of_x):
        x, a, b = ctx.saved_tensors
        return g * of_x(x, a, b), g * (x @ b.mT @ x.mT), g * (x.mT @ a @ x).mT

    @staticmethod
    def backward(ctx, g):
        return Inner.gradients(ctx, g, lambda x, a, b: a @ x @ b + a.mT @ x @ b.mT)


class InnerSymmetric(Inner):
    @staticmethod
    def backward(ctx, g):
        return Inner.gradients(ctx, g, lambda x, a, b: (a + a.mT) @ x @ b)


def _inner(function):
    def inner_trace(x, a, b):
        """tr(xᵀ a x b), of x (N, M), a (N, N) and b (M, M)."""
        sized("x", x, None, None)
        sized("a", a, x.shape[0], x.shape[0])
        sized("b", b, x.shape[1], x.shape[1])
        return function.apply(x, a, b)

    return inner_trace


add(
    "inner_trace_symmetric",
    _inner,
    InnerSymmetric,
    Inner,
    lambda: (real(3, 2), real(3, 3, seed=1), real(2, 2, seed=2)),
    bug="(A + Aᵀ) X B is right for a symmetric B alone (Mathematics Stack Exchange, derivative of Tr(Xᵀ A X B))",
)


class Residuals(Function):
    @staticmethod
    def forward(ctx, pi, x, y, precision):
        ctx.save_for_backward(pi, x, y, precision)
        r = y - x @ pi.mT
        return ((r @ precision) * r).sum()

    @staticmethod
    def gradients(ctx, g, sign):
        pi, x, y, precision = ctx.saved_tensors
        d = 2 * g * (y - x @ pi.mT) @ precision
        return -sign * d.mT @ x, -d @ pi, d, None

    @staticmethod
    def backward(ctx, g):
        return Residuals.gradients(ctx, g, 1)


class ResidualsSign(Residuals):
    @staticmethod
    def backward(ctx, g):
        return Residuals.gradients(ctx, g, -1)


def _residuals(function):
    def mahalanobis(pi, x, y, precision):
        """Σ (y - pi x)ᵀ precision (y - pi x) over the rows of x (T, P) and y (T, K), of pi (K, P).

        precision (K, K) is constant and symmetric.
        """
        sized("x", x, None, None)
        sized("y", y, x.shape[0], None)
        sized("pi", pi, y.shape[1], x.shape[1])
        sized("precision", precision, y.shape[1], y.shape[1])
        check(bool((precision == precision.mT).all()), "precision: expected a symmetric matrix")
        return function.apply(pi, x, y, precision)

    return mahalanobis


def _regression():
    root = real(2, 2, seed=3, grad=False)
    precision = root @ root.mT
    precision = (precision + precision.mT) / 2
    return real(2, 3), real(5, 3, seed=1, grad=False), real(5, 2, seed=2, grad=False), precision


add(
    "mahalanobis_sign",
    _residuals,
    ResidualsSign,
    Residuals,
    _regression,
    bug="the minus of y - Π x is not differentiated (math.stackexchange.com/q/1896703)",
)
