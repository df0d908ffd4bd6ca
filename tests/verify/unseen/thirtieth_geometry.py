"""Geometry, rendering, physics and linear algebra."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtieth import add, add_bare, bounded, check, sized


# Points in a camera's frame, from the camera's pose (R, t) in the world: (x - t) R
def inverse_pose(wrong):
    class Points(Function):
        @staticmethod
        def forward(ctx, x, r, t):
            ctx.save_for_backward(x, r, t)
            return (x - t) @ r

        @staticmethod
        def backward(ctx, grad_y):
            x, r, t = ctx.saved_tensors
            grad_x = grad_y @ r.mT
            total = grad_x.sum(0)
            return grad_x, (x - t).mT @ grad_y, total if wrong else -total

    def points(x, r, t):
        sized("x", x, None, 3)
        sized("r", r, 3, 3)
        sized("t", t, 3)
        return Points.apply(x, r, t)

    return points


add(
    "inverse_pose_translation",
    inverse_pose,
    lambda: (real(4, 3), real(3, 3, seed=1), real(3, seed=2)),
    bug="The translation's gradient has the sign of the pose that maps to the world",
)


# The distance of points to a torus about the z axis, with radii R and r; slopes are 0 on the axis and on the circle
def torus(wrong):
    class Distance(Function):
        @staticmethod
        def forward(ctx, x, big, small):
            ctx.save_for_backward(x)
            ctx.big = big
            return parts(x, big)[2] - small

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            flat, over, away = parts(x, ctx.big)
            side = grad_y * over / positive(away)
            per = side / (flat if wrong else positive(flat))
            return (
                torch.stack([per * x[:, 0], per * x[:, 1], grad_y * x[:, 2] / positive(away)], 1),
                None,
                None,
            )

    def parts(x, big):
        flat = root(x[:, 0].square() + x[:, 1].square())
        over = flat - big
        return flat, over, root(over.square() + x[:, 2].square())

    def root(q):
        return torch.where(q > 0, torch.where(q > 0, q, 1).sqrt(), 0)

    def positive(t):
        return torch.where(t > 0, t, 1)

    def distance(x, big=1.0, small=0.25):
        sized("x", x, None, 3)
        check(0 < small < big <= 100, "expected radii 0 < small < big")
        bounded("x", x, -1e4, 1e4)
        tiny = (x.abs() < 1e-6) & (x != 0)
        check(not bool(tiny.any()), "x: expected numbers of 1e-6 or more, or 0")
        return Distance.apply(x, float(big), float(small))

    return distance


add(
    "torus_axis",
    torus,
    lambda: (real(4, 3),),
    bug="Backward divides by the distance from the axis",
    trigger="a point on the axis",
)


# The depth that a ray expects: Σ w z / Σ w, and the far depth for a ray that meets nothing
def expected_depth(wrong):
    class Depth(Function):
        @staticmethod
        def forward(ctx, w, z, far):
            ctx.save_for_backward(w, z)
            total = w.sum(1)
            there = torch.where(total > 0, total, 1)
            return torch.where(total > 0, (w * z).sum(1) / there, far)

        @staticmethod
        def backward(ctx, grad_y):
            w, z = ctx.saved_tensors
            total = w.sum(1, keepdim=True)
            met = total > 0
            if not wrong:
                total = torch.where(met, total, 1)
            y = (w * z).sum(1, keepdim=True) / total
            grad = grad_y[:, None] / total
            return torch.where(met | wrong, grad * (z - y), 0), grad * w, None

    def depth(w, z, far=10.0):
        sized("w", w, None, None)
        sized("z", z, *w.shape)
        bounded("w", w, 0, 1)
        small = (w < 1e-3) & (w > 0)
        check(not bool(small.any()), "w: expected weights of 1e-3 or more, or 0")
        bounded("z", z, 0, 1e3)
        return Depth.apply(w, z, float(far))

    return depth


add(
    "expected_depth_empty",
    expected_depth,
    lambda: (
        real(3, 4, grad=False).sigmoid().requires_grad_(),
        real(3, 4, seed=1, positive=True),
    ),
    bug="Backward divides by the total weight, which forward knows apart where it is 0",
    trigger="a ray whose weights are all 0",
)


# The energy of charges at given distances from each other: ½ Σ q_i q_j k_ij
def charges(wrong):
    class Energy(Function):
        @staticmethod
        def forward(ctx, q, k):
            ctx.save_for_backward(q, k)
            return (q @ k @ q) / 2

        @staticmethod
        def backward(ctx, grad_y):
            q, k = ctx.saved_tensors
            field = k @ q / 2 if wrong else (k @ q + k.mT @ q) / 2
            return grad_y * field, grad_y * torch.outer(q, q) / 2

    def energy(q, k):
        sized("q", q, None)
        sized("k", k, len(q), len(q))
        return Energy.apply(q, k)

    return energy


add(
    "charges_half",
    charges,
    lambda: (real(4), real(4, 4, seed=1)),
    bug="The half of the double sum is kept in the potential",
)


# The commutator of two matrices: A B - B A
def commutator(wrong):
    class Commutator(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(a, b):
            return a @ b - b @ a

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            a, b = ctx.saved_tensors
            if wrong:
                return grad_y @ b.mT - b.mT @ grad_y, grad_y @ a.mT - a.mT @ grad_y
            return grad_y @ b.mT - b.mT @ grad_y, a.mT @ grad_y - grad_y @ a.mT

    def function(a, b):
        check(a.ndim >= 2 and a.shape[-1] == a.shape[-2] > 0, "a: expected square matrices")
        check(a.shape == b.shape, "b: expected a's shape")
        return Commutator.apply(a, b)

    return function


add(
    "commutator_sign",
    commutator,
    lambda: (real(3, 3), real(3, 3, seed=1)),
    bug="The second matrix gets the first one's formula, which has the other sign",
)


# The n-th power of a matrix, n = 0, 1, 2, ...
def matrix_power(wrong):
    class Power(Function):
        @staticmethod
        def forward(ctx, a, n):
            ctx.save_for_backward(a)
            ctx.n = n
            return torch.linalg.matrix_power(a, n)

        @staticmethod
        def backward(ctx, grad_y):
            (a,) = ctx.saved_tensors
            if ctx.n == 0 and not wrong:
                return torch.zeros_like(a), None
            total = left = grad_y
            for _ in range(1, ctx.n):
                left = a.mT @ left
                total = total @ a.mT + left
            return total, None

    def power(a, n=2):
        check(a.ndim >= 2 and a.shape[-1] == a.shape[-2] > 0, "a: expected square matrices")
        check(isinstance(n, int) and 0 <= n <= 4, "n: expected an integer from 0 to 4")
        bounded("a", a, -5, 5)
        return Power.apply(a, n)

    return power


add(
    "matrix_power_none",
    matrix_power,
    lambda: (real(3, 3),),
    bug="Backward's loop begins with grad_output, which is the gradient for one factor, not for none",
    trigger="n=0; the default is 2",
)


# A matrix and an update of rank one: A + u vᴴ
def rank_one(wrong):
    class Update(Function):
        @staticmethod
        def forward(ctx, a, u, v):
            ctx.save_for_backward(u, v)
            return a + torch.outer(u, v.conj())

        @staticmethod
        def backward(ctx, grad_y):
            u, v = ctx.saved_tensors
            grad_v = grad_y.mT @ u if wrong else grad_y.mH @ u
            return grad_y, grad_y @ v, grad_v

    def update(a, u, v):
        sized("a", a, None, None)
        sized("u", u, len(a))
        sized("v", v, a.shape[1])
        check(a.dtype == u.dtype == v.dtype, "expected tensors of one dtype")
        return Update.apply(a, u, v)

    return update


add_bare(
    "rank_one_conj",
    rank_one,
    lambda: (real(3, 4), real(3, seed=1), real(4, seed=2)),
    bug="The conjugated vector's gradient takes the transpose, not the adjoint",
    trigger="complex numbers",
)
