"""Products, powers and matrices."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.fourteenth import add, require


class Prod(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.prod()

    @staticmethod
    def others(x):
        """Of each element, the product of the others."""
        one = x.new_ones(1)
        before = torch.cat((one, x[:-1])).cumprod(0)
        return before * torch.cat((one, x[1:].flip(0))).cumprod(0).flip(0)

    @staticmethod
    def backward(ctx, g):
        return g * Prod.others(ctx.saved_tensors[0]).conj()


class ProdPlain(Prod):
    @staticmethod
    def backward(ctx, g):
        return g * Prod.others(ctx.saved_tensors[0])


def _prod(function):
    def prod(x):
        """The product () of the elements of x (N,), N > 0, real or complex."""
        require(x.dim() == 1 and x.numel() > 0, "x must be a vector, and not empty")
        return function.apply(x)

    return prod


add(
    "prod_conjugate",
    _prod,
    ProdPlain,
    Prod,
    lambda: (real(4),),
    bug="the other factors are not conjugated (ml-explore/mlx#3433)",
    trigger="complex numbers",
    takes_complex=True,
)


class Power(Function):
    @staticmethod
    def forward(ctx, x, n):
        ctx.save_for_backward(x)
        ctx.n = n
        return x**n

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if ctx.n == 0:
            return torch.zeros_like(x), None
        return g * ctx.n * Power.apply(x, ctx.n - 1), None


class PowerAgain(Power):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * ctx.n * PowerAgain.apply(x, ctx.n - 1), None


def _power(function):
    def power(x, n=2):
        """x to the power n, a whole number of 0 or more."""
        require(isinstance(n, int) and n >= 0, "n must be a whole number, 0 or more")
        return function.apply(x, n)

    return power


add(
    "power_at_zero",
    _power,
    PowerAgain,
    Power,
    lambda: (real(3, 2),),
    bug="0 times x to the power -1, where the exponent has come down to 0 (HIPS/autograd#116)",
    trigger="a second derivative at x = 0 with n=1, a third one with n=2",
    missed="a NaN of the second order is a note: torch's own functions have it too",
)


class MatVec(Function):
    @staticmethod
    def forward(ctx, a, v):
        ctx.save_for_backward(a, v)
        return a @ v

    @staticmethod
    def backward(ctx, g):
        a, v = ctx.saved_tensors
        return torch.outer(g, v), a.mT @ g


class MatVecZero(MatVec):
    @staticmethod
    def backward(ctx, g):
        _, v = ctx.saved_tensors
        return torch.outer(g, v), torch.zeros_like(v)


def _mat_vec(function):
    def mat_vec(a, v):
        """The matrix a (N, M) times v (M,)."""
        require(a.dim() == 2 and v.dim() == 1, "a must be a matrix, v a vector")
        return function.apply(a, v)

    return mat_vec


add(
    "mat_vec_zero",
    _mat_vec,
    MatVecZero,
    MatVec,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="the rule was meant for matrices, and gives the vector zeros (jax-ml/jax#17496)",
    trigger="a vector that needs a gradient, as a second layer's",
)


class WeightedSum(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x * w).sum()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, g * x


class WeightedSumLeaf(WeightedSum):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w = (a.detach() for a in ctx.saved_tensors)
        out = (x * w).sum().requires_grad_()
        return torch.autograd.grad(
            out, (x.requires_grad_(), w.requires_grad_()), g, allow_unused=True
        )


def _weighted_sum(function):
    def weighted_sum(x, w):
        """The sum () of x w, of one shape."""
        require(x.shape == w.shape, "x and w must be of one shape")
        return function.apply(x, w)

    return weighted_sum


add(
    "weighted_sum_leaf",
    _weighted_sum,
    WeightedSumLeaf,
    WeightedSum,
    lambda: (real(2, 3), real(2, 3, seed=1)),
    bug="backward asks autograd for the gradient of what it computed without a graph: None (pytorch/pytorch#45405)",
    trigger="the sample",
)


class CholeskyOf(Function):
    @staticmethod
    def forward(ctx, values, index):
        low = torch.linalg.cholesky(values[index])
        ctx.save_for_backward(values, index)
        return low

    @staticmethod
    def triangle(ctx, g):
        """The gradient of the lower triangle, as the only part of the matrix that is read."""
        values, index = ctx.saved_tensors
        low = torch.linalg.cholesky(values[index])
        phi = (low.mT @ g.tril()).tril()
        phi = phi - phi.diagonal().diag() / 2
        half = torch.linalg.solve_triangular(low.mT, phi, upper=True)
        half = torch.linalg.solve_triangular(low, half, upper=False, left=False)
        both = half + half.mT
        return both.tril() - both.diagonal().diag() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        values, index = ctx.saved_tensors
        row, column = torch.tril_indices(*index.shape, device=index.device)
        total = torch.zeros_like(values)
        return total.index_add(
            0, index[row, column], CholeskyOf.triangle(ctx, g)[row, column]
        ), None


class CholeskyOfAssigned(CholeskyOf):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        values, index = ctx.saved_tensors
        row, column = torch.tril_indices(*index.shape, device=index.device)
        total = torch.zeros_like(values)
        total[index[row, column]] = CholeskyOf.triangle(ctx, g)[row, column]
        return total, None


def _cholesky_of(function):
    def cholesky_of(values, index):
        """The lower Cholesky factor (D, D), D > 0, of a positive definite matrix values[index].

        values (K,) are the elements it is made of, and index (D, D), symmetric, says where each of them stands.
        """
        good = values.dim() == 1 and index.dim() == 2 and index.shape[0] == index.shape[1] > 0
        require(
            good and bool((index == index.mT).all()), "index must be a symmetric matrix, not empty"
        )
        low = bool(((index >= 0) & (index < len(values))).all())
        require(low, "index must be below K")
        failed = torch.linalg.cholesky_ex(values.detach()[index])[1]
        require(not failed, "the matrix must be positive definite")
        return function.apply(values, index)

    return cholesky_of


add(
    "cholesky_shared",
    _cholesky_of,
    CholeskyOfAssigned,
    CholeskyOf,
    lambda: (
        torch.tensor([2.0, 0.7, 0.3], dtype=F64, requires_grad=True),
        (torch.arange(3).unsqueeze(1) - torch.arange(3)).abs(),
    ),
    bug="the input's adjoints are assigned, not added to: equal elements keep one (stan-dev/math#2364)",
    trigger="a value that stands in several places, as the sample's",
)
