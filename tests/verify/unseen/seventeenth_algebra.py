"""Matrices."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.seventeenth import add
from tests.verify.unseen.sixteenth import expect
from tests.verify.unseen.sixteenth_indices import below


class Exponential(Function):
    """The gradient is a block of the exponential of (aᵀ g; 0 aᵀ)."""

    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return torch.matrix_exp(a)

    @staticmethod
    def gradients(ctx, g, transpose):
        (a,) = ctx.saved_tensors
        a, n = transpose(a), a.shape[-1]
        upper = torch.cat((a, g), -1)
        lower = torch.cat((torch.zeros_like(a), a), -1)
        return torch.matrix_exp(torch.cat((upper, lower), -2))[..., :n, n:]

    @staticmethod
    def backward(ctx, g):
        return Exponential.gradients(ctx, g, lambda a: a.mT)


class ExponentialFirst(Exponential):
    @staticmethod
    def backward(ctx, g):
        return Exponential.gradients(ctx, g, lambda a: a.transpose(0, 1))


def _exponential(function):
    def exponential(a):
        """Matrix exponentials of a (*, D, D), D > 0, |a| <= 5."""
        expect(a.dim() > 1 and a.shape[-1] == a.shape[-2] > 0, "a (*, D, D), D > 0", tuple(a.shape))
        expect((a.abs() <= 5).all(), "|a| <= 5", a)
        return function.apply(a)

    return exponential


add(
    "exponential_batch",
    _exponential,
    ExponentialFirst,
    Exponential,
    lambda: (real(3, 3),),
    bug="backward transposes the first two dimensions, not the last",
    shows="batches of matrices",
)


class Residual(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return b - a @ (torch.linalg.pinv(a) @ b)

    @staticmethod
    def gradients(ctx, g, second):
        a, b = ctx.saved_tensors
        inverse = torch.linalg.pinv(a)
        grad = g - a @ (inverse @ g)
        residual = b - a @ (inverse @ b)
        return -grad @ (inverse @ b).mT - second(residual @ (inverse @ g).mT), grad

    @staticmethod
    def backward(ctx, g):
        return Residual.gradients(ctx, g, lambda term: term)


class ResidualFirst(Residual):
    @staticmethod
    def backward(ctx, g):
        return Residual.gradients(ctx, g, torch.zeros_like)


def _residual(function):
    def residual(a, b):
        """b - a a⁺ b, what least squares leave of b (*, M, K) by the columns of a (*, M, D), M >= D > 0, of one batch.

        a's columns are independent: its condition number is below 1e3.
        """
        expect(
            a.dim() == b.dim() > 1
            and a.shape[:-1] == b.shape[:-1]
            and a.shape[-2] >= a.shape[-1] > 0,
            "a (*, M, D), b (*, M, K)",
            tuple(a.shape),
        )
        expect((torch.linalg.cond(a.detach()) < 1e3).all(), "independent columns", a)
        return function.apply(a, b)

    return residual


add(
    "residual_second",
    _residual,
    ResidualFirst,
    Residual,
    lambda: (real(4, 2), real(4, 2, seed=1)),
    bug="the second term of the projection's derivative is left out, as in Kaufman's approximation",
    shows="the sample",
)


class SparseSolve(Function):
    @staticmethod
    def dense(values, places, b):
        size = b.shape[0]
        return values.new_zeros(size, size).index_put(tuple(places), values, accumulate=True)

    @staticmethod
    def forward(ctx, values, places, b):
        x = torch.linalg.solve(SparseSolve.dense(values, places, b), b)
        ctx.save_for_backward(values, places, x)
        return x

    @staticmethod
    def gradients(ctx, g, order):
        values, places, x = ctx.saved_tensors
        grad = torch.linalg.solve(SparseSolve.dense(values, places, x).mT, g)
        row, column = order(places, len(x))
        return -(grad[row] * x[column]).sum(1), None, grad

    @staticmethod
    def backward(ctx, g):
        return SparseSolve.gradients(ctx, g, lambda places, size: places)


class SparseSolveOrder(SparseSolve):
    @staticmethod
    def backward(ctx, g):
        def by_rows(places, size):
            return places[:, (places[0] * size + places[1]).argsort(stable=True)]

        return SparseSolve.gradients(ctx, g, by_rows)


def _sparse_solve(function):
    def sparse_solve(values, places, b):
        """x of A x = b, b (D, K), D > 0: A has values (E,) at places (2, E), row and column, in any order.

        Values at one place are added; A's condition number is below 1e4.
        """
        expect(
            b.dim() == 2 and len(b) and places.shape == (2, *values.shape) and values.dim() == 1,
            "values (E,), places (2, E), b (D, K)",
            tuple(places.shape),
        )
        below(places, len(b))
        a = SparseSolve.dense(values.detach(), places, b)
        expect(torch.linalg.cond(a) < 1e4, "a condition number below 1e4", a)
        return function.apply(values, places, b)

    return sparse_solve


def sparse_sample():
    places = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 2, 0, 1, 1, 2]])
    return (2 + real(6, grad=False).abs()).requires_grad_(), places, real(3, 2, seed=1)


add(
    "sparse_solve_order",
    _sparse_solve,
    SparseSolveOrder,
    SparseSolve,
    sparse_sample,
    bug="the values' gradient is in the order of rows, as backward sorted the places",
    shows="places in another order",
)


class TreeSum(Function):
    @staticmethod
    def laplacian(scores, root):
        eye = torch.eye(root.shape[-1], dtype=torch.bool, device=root.device)
        a = scores.exp().masked_fill(eye, 0)
        return a, torch.diag_embed(a.sum(-2) + root.exp()) - a

    @staticmethod
    def forward(ctx, scores, root):
        ctx.save_for_backward(scores, root)
        return torch.linalg.slogdet(TreeSum.laplacian(scores, root)[1])[1]

    @staticmethod
    def gradients(ctx, g, sign):
        scores, root = ctx.saved_tensors
        a, laplacian = TreeSum.laplacian(scores, root)
        inverse = torch.linalg.inv(laplacian)
        own = inverse.diagonal(0, -2, -1)
        grad = g[..., None, None] * a * (own[..., None, :] - sign * inverse.mT)
        return grad, g[..., None] * root.exp() * own

    @staticmethod
    def backward(ctx, g):
        return TreeSum.gradients(ctx, g, 1)


class TreeSumSign(TreeSum):
    @staticmethod
    def backward(ctx, g):
        return TreeSum.gradients(ctx, g, -1)


def _tree_sum(function):
    def tree_sum(scores, root):
        """log Σ over forests of e^score, of scores (*, L, L), from head to word, and of roots (*, L), L > 0.

        |scores| <= 4; a word's score to itself is not read.
        """
        expect(
            root.dim() and root.shape[-1] and scores.shape == (*root.shape, root.shape[-1]),
            "scores (*, L, L), roots (*, L)",
            tuple(scores.shape),
        )
        expect((scores.abs() <= 4).all() and (root.abs() <= 4).all(), "|scores| <= 4", scores)
        return function.apply(scores, root)

    return tree_sum


add(
    "tree_sum_sign",
    _tree_sum,
    TreeSumSign,
    TreeSum,
    lambda: (real(2, 3, 3), real(2, 3, seed=1)),
    bug="the Laplacian's entries beside its diagonal have a minus, which backward forgets",
    shows="the sample",
)
