"""Matrices: traces, powers, roots, factors, bilinear forms."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.fortyfirst import add, alike, bounded, check, sized


def trace(wrong):
    class Trace(Function):
        @staticmethod
        def forward(ctx, a):
            ctx.shape = a.shape
            return a.diagonal().sum()

        @staticmethod
        def backward(ctx, g):
            rows, columns = ctx.shape
            at = torch.arange(0, rows * columns, columns + 1, device=g.device)
            if not wrong:
                at = at[: min(rows, columns)]
            return g.new_zeros(rows * columns).index_put((at,), g).view(rows, columns)

    def total(a):
        sized("a", a, None, None)
        check(a.is_floating_point(), "a: expected floating point numbers")
        return Trace.apply(a)

    return total


add(
    "trace_tall",
    trace,
    lambda: (real(4, 2),),
    bug="the places of the diagonal go on after its end (pytorch/pytorch#171704)",
    trigger="at least two rows more than columns, as in the sample",
)


# The part of the drift a x that each coordinate has of itself: y_i = a_ii x_i
def own_drift(wrong):
    class Drift(Function):
        @staticmethod
        def forward(ctx, a, x):
            ctx.save_for_backward(a, x)
            return x * a.diagonal()

        @staticmethod
        def backward(ctx, g):
            a, x = ctx.saved_tensors
            rate = a.sum(1) if wrong else a.diagonal()
            return torch.diag((g * x).sum(0)), g * rate

    def drift(a, x):
        sized("x", x, None, None)
        sized("a", a, x.shape[1], x.shape[1])
        alike(a, x)
        bounded("a", a, -1e3, 1e3)
        bounded("x", x, -1e3, 1e3)
        return Drift.apply(a, x)

    return drift


add(
    "drift_rows",
    own_drift,
    lambda: (real(3, 3), real(2, 3, seed=1)),
    bug="the derivatives are the rows' sums instead of the diagonal (AndreiChertkov/fpcross#2)",
)


def cube(wrong):
    class Cube(Function):
        @staticmethod
        def forward(ctx, m):
            ctx.save_for_backward(m)
            return m @ m @ m

        @staticmethod
        def backward(ctx, g):
            (m,) = ctx.saved_tensors
            t = m.mT
            return 3 * t @ t @ g if wrong else g @ t @ t + t @ g @ t + t @ t @ g

    def power(m):
        sized("m", m, None, m.shape[0])
        check(m.is_floating_point(), "m: expected floating point numbers")
        bounded("m", m, -1e3, 1e3)
        return Cube.apply(m)

    return power


add(
    "cube_commutes",
    cube,
    lambda: (real(3, 3),),
    bug="the derivative of a power is formed as if the matrix and its change commuted "
    "(sympy/sympy#25150)",
)


# The root of a symmetric positive matrix
def root(wrong):
    class Root(Function):
        @staticmethod
        def forward(ctx, a):
            values, u = torch.linalg.eigh((a + a.mT) / 2)
            ctx.save_for_backward(values, u)
            return (u * values.sqrt()) @ u.mT

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            values, u = ctx.saved_tensors
            s = values.sqrt()
            if wrong:
                slopes = (s[:, None] - s) / (values[:, None] - values)
                slopes.diagonal().copy_(0.5 / s)
            else:
                slopes = 1 / (s[:, None] + s)
            grad = u @ (slopes * (u.mT @ g @ u)) @ u.mT
            return (grad + grad.mT) / 2

    def value(a):
        sized("a", a, None, a.shape[0])
        check(a.is_floating_point(), "a: expected floating point numbers")
        bounded("a", a, -10, 10)
        lowest = torch.linalg.eigvalsh((a + a.mT) / 2).min()
        check(bool(lowest > 0.01), "a: expected eigenvalues above 0.01")
        return Root.apply(a)

    return value


add(
    "root_equal",
    root,
    lambda: (torch.diag(torch.tensor([1, 1, 2, 3], dtype=F64)).requires_grad_(),),
    bug="the gradient divides by the differences of the values, which makes NaN (jax-ml/jax#2311)",
    trigger="equal eigenvalues, as in the sample",
)


# The nearest matrix with orthonormal columns
def polar(wrong):
    class Polar(Function):
        @staticmethod
        def forward(ctx, a):
            u, s, vh = torch.linalg.svd(a, full_matrices=False)
            ctx.save_for_backward(u, s, vh)
            return u @ vh

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            u, s, vh = ctx.saved_tensors
            x = u.mT @ g @ vh.mT
            grad = u @ ((x - x.mT) / (s[:, None] + s)) @ vh
            if not wrong:
                grad = grad + ((g - u @ (u.mT @ g)) @ vh.mT / s) @ vh
            return grad

    def nearest(a):
        sized("a", a, None, None)
        check(a.is_floating_point(), "a: expected floating point numbers")
        check(a.shape[0] >= a.shape[1], "a: expected no more columns than rows")
        bounded("a", a, -10, 10)
        check(bool(torch.linalg.svdvals(a).min() > 0.01), "a: expected singular values above 0.01")
        return Polar.apply(a)

    return nearest


add(
    "polar_tall",
    polar,
    lambda: (real(4, 2),),
    bug="the singular vectors' derivative lacks the part outside of the columns' space "
    "(HIPS/autograd#137)",
    trigger="more rows than columns, as in the sample",
)


# y[n, k] = x1[n] w[k] x2[n] + bias[k]
def bilinear(wrong):
    class Bilinear(Function):
        @staticmethod
        def forward(ctx, x1, x2, w, bias):
            ctx.save_for_backward(x1, x2, w)
            return torch.einsum("ni,kij,nj->nk", x1, w, x2) + bias

        @staticmethod
        def backward(ctx, g):
            x1, x2, w = ctx.saved_tensors
            weight = torch.ones_like(g) if wrong else g
            grad_1 = torch.einsum("nk,kij,nj->ni", weight, w, x2)
            grad_2 = torch.einsum("nk,kij,ni->nj", weight, w, x1)
            return grad_1, grad_2, torch.einsum("nk,ni,nj->kij", g, x1, x2), g.sum(0)

    def layer(x1, x2, w, bias):
        sized("x1", x1, None, None)
        sized("x2", x2, len(x1), None)
        sized("w", w, None, x1.shape[1], x2.shape[1])
        sized("bias", bias, len(w))
        alike(x1, x2, w, bias)
        for name, t in (("x1", x1), ("x2", x2), ("w", w), ("bias", bias)):
            bounded(name, t, -1e3, 1e3)
        return Bilinear.apply(x1, x2, w, bias)

    return layer


add(
    "bilinear_weight",
    bilinear,
    lambda: (real(2, 3), real(2, 2, seed=1), real(2, 3, 2, seed=2), real(2, seed=3)),
    bug="the inputs' gradients do not read grad_output (torch/nn#658)",
    trigger="a grad_output other than ones",
)


def bilinear_form(wrong):
    class Form(Function):
        @staticmethod
        def forward(ctx, e1, e2, w):
            ctx.save_for_backward(e1, e2, w)
            return torch.einsum("ni,nj,ijk->nk", e1, e2, w)

        @staticmethod
        def backward(ctx, g):
            e1, e2, w = ctx.saved_tensors
            grad_w = torch.einsum("ni,nj,nk->ijk", e1, e2, g)
            if wrong:
                return torch.zeros_like(e1), torch.zeros_like(e2), grad_w
            grad_1 = torch.einsum("nk,nj,ijk->ni", g, e2, w)
            return grad_1, torch.einsum("nk,ni,ijk->nj", g, e1, w), grad_w

    def form(e1, e2, w):
        sized("e1", e1, None, None)
        sized("e2", e2, len(e1), None)
        sized("w", w, e1.shape[1], e2.shape[1], None)
        alike(e1, e2, w)
        for name, t in (("e1", e1), ("e2", e2), ("w", w)):
            bounded(name, t, -1e3, 1e3)
        return Form.apply(e1, e2, w)

    return form


add(
    "bilinear_zero",
    bilinear_form,
    lambda: (real(2, 2), real(2, 3, seed=1), real(2, 3, 2, seed=2)),
    bug="only the weights get a gradient, the inputs' stay 0 (chainer/chainer#1888)",
)
