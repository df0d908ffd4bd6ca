"""Equations, rankings, factors and transforms."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyeighth import (
    add,
    check,
    indices,
    one_dtype,
    positive,
    regular,
    sized,
)


# The X of A X + X B = C
def sylvester(wrong):
    class Sylvester(Function):
        @staticmethod
        def forward(ctx, a, b, c):
            n, m = c.shape
            rows = torch.eye(n, dtype=c.dtype, device=c.device)
            columns = torch.eye(m, dtype=c.dtype, device=c.device)
            whole = torch.kron(a.contiguous(), columns) + torch.kron(rows, b.mT.contiguous())
            regular(whole)
            x = torch.linalg.solve(whole, c.reshape(-1)).view(n, m)
            ctx.save_for_backward(a, b, x)
            return x

        @staticmethod
        def backward(ctx, grad_x):
            a, b, x = ctx.saved_tensors
            grad_c = Sylvester.apply(a.mT, b.mT, grad_x)
            grad_b = -grad_c.mT @ x if wrong else -x.mT @ grad_c
            return -grad_c @ x.mT, grad_b, grad_c

    def solve(a, b, c):
        sized("c", c, None, None)
        sized("a", a, len(c), len(c))
        sized("b", b, c.shape[1], c.shape[1])
        one_dtype(a, b, c)
        return Sylvester.apply(a, b, c)

    return solve


def stable(n, seed):
    return (real(n, n, seed=seed, grad=False) + 4 * torch.eye(n)).requires_grad_()


add(
    "sylvester_right_factor",
    sylvester,
    lambda: (stable(3, 0), stable(2, 1), real(3, 2, seed=2)),
    bug="The right factor's gradient is transposed",
)


# Cayley's transform (1 + A)^-1 (1 - A)
def cayley(wrong):
    class Cayley(Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
            regular(one + a)
            return 2 * torch.linalg.inv(one + a) - one

        @staticmethod
        def backward(ctx, grad_q):
            (a,) = ctx.saved_tensors
            one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
            back = torch.linalg.inv(one - a if wrong else (one + a).mT)
            return -2 * back @ grad_q @ back

    def transform(a):
        n = a.shape[-1] if a.ndim else 0
        check(n >= 1, "expected a matrix")
        sized("a", a, n, n)
        return Cayley.apply(a)

    return transform


def skew():
    a = real(4, 4, grad=False)
    return ((a - a.mT) / 2).requires_grad_()


add(
    "cayley_skew",
    cayley,
    lambda: (skew(),),
    bug="Backward writes 1 - A for the transpose of 1 + A",
    trigger="a matrix that is not skew",
)


# Ridge regression's weights
def ridge(wrong):
    def conjugate_gradients(matrix, b):
        x, r = torch.zeros_like(b), b
        p, size = r, r @ r
        for _ in range(3 * len(b)):
            going = size > 1e-18
            image = matrix @ p
            step = torch.where(going, size / torch.where(going, p @ image, 1), 0)
            x, r = x + step * p, r - step * image
            new = r @ r
            p = torch.where(going, r + new / torch.where(going, size, 1) * p, p)
            size = torch.where(going, new, size)
        return x

    class Ridge(Function):
        @staticmethod
        def forward(ctx, x, y, penalty):
            one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            matrix = x.mT @ x + penalty * one
            regular(matrix)
            w = torch.linalg.solve(matrix, x.mT @ y)
            ctx.save_for_backward(x, y, penalty, w)
            return w

        @staticmethod
        def backward(ctx, grad_w):
            x, y, penalty, w = ctx.saved_tensors
            matrix = x.mT @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            v = (conjugate_gradients if wrong else torch.linalg.solve)(matrix, grad_w)
            image = x @ v
            grad_x = torch.outer(y - x @ w, v) - torch.outer(image, w)
            return grad_x, image, -v @ w

    def fit(x, y, penalty):
        sized("x", x, None, None)
        sized("y", y, len(x))
        sized("penalty", penalty)
        one_dtype(x, y, penalty)
        positive("penalty", penalty)
        return Ridge.apply(x, y, penalty)

    return fit


add(
    "ridge_tolerance",
    ridge,
    lambda: (real(6, 3), real(6, seed=1), real((), positive=True, seed=2)),
    bug="Backward's conjugate gradients stop at a residual of 1e-9, not of a share of grad_output",
    trigger="a small grad_output, as of a mean over many rows",
)


# Page rank by links with weights; a page without links leads to all pages
def page_rank(wrong):
    def shares(w, source, target, n, closed):
        total = w.new_zeros(n).index_add(0, source, w)
        p = w.new_zeros(n * n).index_add(0, source * n + target, w).view(n, n)
        linked = torch.zeros(n, dtype=torch.bool, device=w.device).index_fill(0, source, True)
        total = torch.where(linked, total, 1)
        return torch.where(linked[:, None], p / total[:, None], 1 / n if closed else 0), total

    class PageRank(Function):
        @staticmethod
        def forward(ctx, w, source, target, n, damping):
            p, _ = shares(w, source, target, n, True)
            one = torch.eye(n, dtype=w.dtype, device=w.device)
            jump = w.new_full((n,), (1 - damping) / n)
            x = torch.linalg.solve(one - damping * p.mT, jump)
            ctx.save_for_backward(w, source, target, x)
            ctx.n, ctx.damping = n, damping
            return x

        @staticmethod
        def backward(ctx, grad_x):
            w, source, target, x = ctx.saved_tensors
            p, total = shares(w, source, target, ctx.n, not wrong)
            one = torch.eye(ctx.n, dtype=w.dtype, device=w.device)
            grad_p = ctx.damping * torch.outer(x, torch.linalg.solve(one - ctx.damping * p, grad_x))
            mean = (grad_p * p).sum(1)
            return (grad_p[source, target] - mean[source]) / total[source], None, None, None, None

    def rank(w, source, target, pages=4, damping=0.85):
        sized("w", w, None)
        sized("source", source, len(w))
        sized("target", target, len(w))
        indices("source", source, pages)
        indices("target", target, pages)
        positive("w", w)
        check(0 < damping < 1, "expected a damping between 0 and 1")
        return PageRank.apply(w, source.long(), target.long(), pages, damping)

    return rank


add(
    "page_rank_dangling",
    page_rank,
    lambda: (
        real(6, positive=True),
        torch.tensor([0, 0, 1, 2, 3, 3]),
        torch.tensor([1, 2, 3, 0, 1, 2]),
    ),
    bug="Backward's matrix has no way out of a page without links",
    trigger="a page without links",
)


# Three factors' product, entry ijk the sum of a_ir b_jr c_kr
def trilinear(wrong):
    class Trilinear(Function):
        @staticmethod
        def forward(ctx, a, b, c):
            ctx.save_for_backward(a, b, c)
            return torch.einsum("ir,jr,kr->ijk", a, b, c)

        @staticmethod
        def backward(ctx, grad_t):
            a, b, c = ctx.saved_tensors
            rows = grad_t.reshape(len(a), -1)
            first, second = (c, b) if wrong else (b, c)
            columns = (first[:, None] * second).reshape(-1, a.shape[1])
            part = grad_t[..., None] * a[:, None, None]
            grad_b, grad_c = (part * c).sum((0, 2)), (part * b[:, None]).sum((0, 1))
            return rows @ columns, grad_b, grad_c

    def build(a, b, c):
        sized("a", a, None, None)
        sized("b", b, None, a.shape[1])
        sized("c", c, None, a.shape[1])
        one_dtype(a, b, c)
        return Trilinear.apply(a, b, c)

    return build


add(
    "trilinear_unfolding",
    trilinear,
    lambda: (real(2, 3), real(4, 3, seed=1), real(3, 3, seed=2)),
    bug="The first factor's gradient multiplies the others in the order of columns",
)


# Weighted least squares
def weighted_squares(wrong):
    class WeightedSquares(Function):
        @staticmethod
        def forward(ctx, x, w, y):
            matrix = x.mT @ (w[:, None] * x)
            regular(matrix)
            beta = torch.linalg.solve(matrix, x.mT @ (w * y))
            ctx.save_for_backward(x, w, y, beta)
            return beta

        @staticmethod
        def backward(ctx, grad_beta):
            x, w, y, beta = ctx.saved_tensors
            plain = wrong and not ctx.needs_input_grad[0]
            v = torch.linalg.solve(x.mT @ (x if plain else w[:, None] * x), grad_beta)
            left, image = y - x @ beta, x @ v
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = torch.outer(w * left, v) - torch.outer(w * image, beta)
            return grad_x, left * image, w * image

    def fit(x, w, y):
        sized("x", x, None, None)
        sized("w", w, len(x))
        sized("y", y, len(x))
        one_dtype(x, w, y)
        check(len(x) >= x.shape[1], "expected no fewer rows than columns")
        positive("w", w)
        return WeightedSquares.apply(x, w, y)

    return fit


add(
    "weighted_squares_design",
    weighted_squares,
    lambda: (real(6, 2), real(6, positive=True, seed=1), real(6, seed=2)),
    bug="For a design that is not trained backward takes the normal equations without weights",
    trigger="a design that requires no gradient",
)
