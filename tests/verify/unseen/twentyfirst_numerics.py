"""Angles, polynomials, determinants and their kin."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentyfirst import add, check, positive, same, sized


# The angle of the point (x, y), from atan2
def polar_angle(wrong):
    class Angle(Function):
        @staticmethod
        def forward(ctx, y, x):
            same(y, x)
            check(bool(((y != 0) | (x != 0)).all()), "the origin has no angle")
            ctx.save_for_backward(y, x)
            return torch.atan2(y, x)

        @staticmethod
        def backward(ctx, grad):
            y, x = ctx.saved_tensors
            if wrong:
                r = 1 / (y.square() + x.square())
                return x * r * grad, -y * r * grad
            dtype = torch.promote_types(torch.promote_types(y.dtype, x.dtype), torch.float32)
            y, x, grad = y.to(dtype), x.to(dtype), grad.to(dtype)
            r = torch.hypot(y, x)
            return x / r * (grad / r), -y / r * (grad / r)

    return lambda y, x: Angle.apply(y, x)


add(
    "polar_angle_small",
    polar_angle,
    lambda: (real(4), real(4, seed=1)),
    bug="pytorch (issue 193040): the reciprocal of the squares' sum overflows where the derivative does not",
    trigger="sides of 0.002 in float16",
    missed="an intermediate beyond float16's range, for numbers far smaller than the sample's only",
    own=True,
)


# log e_k(x), the sum over all sets of k of the products of their numbers
def subset_sum(wrong):
    def elementary(x, k):
        e = [torch.ones_like(x[0])] + [torch.zeros_like(x[0])] * k
        for v in x:
            e = [e[0]] + [e[j] + v * e[j - 1] for j in range(1, k + 1)]
        return e[k]

    class LogSum(Function):
        @staticmethod
        def forward(ctx, x, k):
            e = elementary(x, k)
            check(bool((e > 0) & e.isfinite()), "x: the products leave the range of the dtype")
            ctx.save_for_backward(x, e)
            ctx.k = k
            return e.log()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, e = ctx.saved_tensors
            if wrong:
                return grad_y * (elementary(x, ctx.k - 1) / e).expand_as(x), None
            rest = [torch.cat([x[:i], x[i + 1 :], x.new_zeros(1)]) for i in range(len(x))]
            return grad_y * torch.stack([elementary(r, ctx.k - 1) for r in rest]) / e, None

    def log_sum(x, k=2):
        sized("x", x, None)
        positive("x", x)
        check(1 <= k <= len(x), "k: expected 1 to the number of elements")
        return LogSum.apply(x, k)

    return log_sum


add(
    "subset_sum_excluded",
    subset_sum,
    lambda: (real(4, positive=True),),
    bug="A number's gradient holds the sets in which it is already",
)


# Matrix-tree theorem: the log of the sum over all trees of the products of their edges, a root's weight r
def tree_sum(wrong):
    def laplacian(a, r):
        a = a * (1 - torch.eye(len(a), dtype=a.dtype, device=a.device))
        m = torch.diag(a.sum(0)) - a
        return torch.cat([r[None], m[1:]])

    class LogSum(Function):
        @staticmethod
        def forward(ctx, a, r):
            m = laplacian(a, r)
            ctx.save_for_backward(m)
            return torch.linalg.slogdet(m).logabsdet

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (m,) = ctx.saved_tensors
            grad_m = torch.linalg.inv(m).T * grad_y
            grad_r = grad_m[0]
            inner = grad_m
            if not wrong:
                inner = torch.cat([torch.zeros_like(grad_m[:1]), grad_m[1:]])
            grad_a = inner.diagonal() - inner
            return grad_a, grad_r

    def log_sum(a, r):
        sized("a", a, None, a.shape[0])
        sized("r", r, len(a))
        positive("a", a)
        positive("r", r)
        check(
            bool(a.max() / a.min() < 1e4) and bool(r.max() / r.min() < 1e4), "weights too far apart"
        )
        return LogSum.apply(a, r)

    return log_sum


add(
    "tree_sum_root",
    tree_sum,
    lambda: (real(4, 4, positive=True), real(4, seed=1, positive=True)),
    bug="The row that the roots replace still gives the edges a gradient",
)
