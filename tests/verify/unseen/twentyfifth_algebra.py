"""Matrices."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyfifth import add, check, leaf, sized


# Lyapunov's equation A X + X A^T = Q
def lyapunov(wrong):
    def solve(a, q):
        a = a.contiguous()
        eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
        system = torch.kron(a, eye) + torch.kron(eye, a)
        return torch.linalg.solve(system, q.reshape(-1, 1)).reshape(a.shape)

    class Solution(Function):
        @staticmethod
        def forward(ctx, a, q):
            ctx.save_for_backward(a, q)
            return solve(a, q)

        @staticmethod
        def backward(ctx, grad_x):
            a, q = ctx.saved_tensors
            x = solve(a, q)
            y = solve(a if wrong else a.mT, grad_x)
            return -(y @ x.mT + y.mT @ x), y

    def solution(a, q):
        sized("a", a, None, None)
        sized("a", a, len(a), len(a))
        sized("q", q, *a.shape)
        check(bool(a.isfinite().all()), "a: expected finite numbers")
        sums = torch.linalg.eigvals(a.detach())
        gap = (sums[:, None] + sums).abs().min()
        check(bool(gap > 1e-3 * sums.abs().max()), "a: expected one solution")
        return Solution.apply(a, q)

    return solution


def symmetric():
    a = real(3, 3, grad=False)
    return leaf(a @ a.mT + torch.eye(3, dtype=a.dtype))


add(
    "lyapunov_symmetric",
    lyapunov,
    lambda: (symmetric(), real(3, 3, seed=1)),
    bug="Backward solves with A, where it is A^T's turn",
    trigger="an A that is not symmetric",
)


# The matrix exponential
def matrix_exponential(wrong):
    class Exponential(Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return torch.linalg.matrix_exp(a)

        @staticmethod
        def backward(ctx, grad_y):
            (a,) = ctx.saved_tensors
            if wrong:
                return torch.linalg.matrix_exp(a.mT) @ grad_y
            n = a.shape[-1]
            top = torch.cat([a.mT, grad_y], -1)
            bottom = torch.cat([torch.zeros_like(a), a.mT], -1)
            return torch.linalg.matrix_exp(torch.cat([top, bottom], -2))[..., :n, n:]

    def exponential(a):
        check(a.ndim >= 2 and a.shape[-1] == a.shape[-2] >= 1, "a: expected square matrices")
        check(
            bool((a.abs().sum(-1) < 20).all()), "a: expected rows whose sizes sum to less than 20"
        )
        return Exponential.apply(a)

    return exponential


add(
    "matrix_exponential_commuting",
    matrix_exponential,
    lambda: (real(3, 3),),
    bug="The derivative is that of numbers, as if A and its change commuted",
)


# The determinant of 3 x 3 matrices, whose gradient is the matrix of cofactors
def small_determinant(wrong):
    def cofactors(a):
        rows = a.unbind(-2)
        return torch.stack([torch.linalg.cross(rows[i - 2], rows[i - 1]) for i in range(3)], -2)

    class Determinant(Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return (a[..., 0, :] * cofactors(a)[..., 0, :]).sum(-1)

        @staticmethod
        def backward(ctx, grad_y):
            (a,) = ctx.saved_tensors
            c = cofactors(a)
            if wrong:
                c = (a[..., 0, :] * c[..., 0, :]).sum(-1)[..., None, None] * torch.linalg.pinv(a).mT
            return grad_y[..., None, None] * c

    def determinant(a):
        check(a.ndim >= 2 and a.shape[-2:] == (3, 3), "a: expected 3 x 3 matrices")
        check(bool(a.isfinite().all()), "a: expected finite numbers")
        return Determinant.apply(a)

    return determinant


add(
    "small_determinant_singular",
    small_determinant,
    lambda: (real(2, 3, 3),),
    bug="The determinant times the pseudoinverse is 0 where the matrix of cofactors is not",
    trigger="a singular matrix, such as a projection",
)


# A product of matrices whose numbers are kept as logarithms: y_ij = log sum_k exp(a_ik + b_kj)
def log_product(wrong):
    class Product(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return (a[:, :, None] + b).logsumexp(1)

        @staticmethod
        def backward(ctx, grad_y):
            a, b = ctx.saved_tensors
            terms = a[:, :, None] + b
            if wrong:
                g = grad_y[:, None] * (terms - terms.logsumexp(1, keepdim=True)).exp()
            else:
                nothing = (terms == -math.inf).all(1, keepdim=True)
                share = torch.where(nothing, 0, terms).softmax(1)
                g = torch.where(nothing, 0, grad_y[:, None] * share)
            return g.sum(2), g.sum(0)

    def product(a, b):
        sized("a", a, None, None)
        sized("b", b, a.shape[1], None)
        finite = (a < math.inf).all() & (b < math.inf).all()
        check(bool(finite), "a, b: expected logarithms of finite numbers")
        return Product.apply(a, b)

    return product


add(
    "log_product_nothing",
    log_product,
    lambda: (real(3, 4), real(4, 2, seed=1)),
    bug="Where all terms are -inf backward takes the difference of two infinities",
    trigger="a row of zeros, that is of -inf",
    missed="NaN is what most backwards give beside what is -inf",
)


# A symmetric matrix from its n (n + 1) / 2 numbers on and below the diagonal
def unpacked(wrong):
    class Symmetric(Function):
        @staticmethod
        def forward(ctx, x, n):
            ctx.n = n
            i, j = torch.tril_indices(n, n, device=x.device)
            y = x.new_zeros(*x.shape[:-1], n, n)
            y[..., i, j] = x
            y[..., j, i] = x
            return y

        @staticmethod
        def backward(ctx, grad_y):
            i, j = torch.tril_indices(ctx.n, ctx.n, device=grad_y.device)
            below, above = grad_y[..., i, j], grad_y[..., j, i]
            above = below if wrong else above
            return below + torch.where(i != j, above, 0), None

    def symmetric(x, n=3):
        check(n >= 1, "n: expected a number of at least 1")
        check(x.ndim >= 1 and x.shape[-1] == n * (n + 1) // 2, "x: expected n (n + 1) / 2 numbers")
        return Symmetric.apply(x, n)

    return symmetric


add(
    "unpacked_symmetric_grad",
    unpacked,
    lambda: (real(2, 6),),
    bug="Backward doubles the lower triangle of grad_output, as if that were symmetric too",
    trigger="a grad_output that is not symmetric",
)
