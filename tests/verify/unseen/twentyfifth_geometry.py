"""Geometry and physics."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentyfifth import add, check, leaf, same, sized


# The bearing of a point: a = arctan2(y, x)
def bearing(wrong):
    class Bearing(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(y, x):
            return torch.atan2(y, x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_a):
            y, x = ctx.saved_tensors
            if wrong:
                d = (y * y + x * x).clamp(min=1e-7)
                return grad_a * x / d, -grad_a * y / d
            r = torch.hypot(y, x)
            return grad_a * (x / r) / r, -grad_a * (y / r) / r

    def angle(y, x):
        same(y, x)
        r = torch.hypot(y, x)
        check(bool(((r > 0) & r.isfinite()).all()), "y, x: expected points other than the origin")
        return Bearing.apply(y, x)

    return angle


add(
    "bearing_near",
    bearing,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="The squared distance is clamped in backward, which makes the gradient of near points small",
    trigger="points nearer to the origin than 3e-4",
)


# The angle between places on a sphere, given (latitude, longitude), from the haversine h
def great_circle(wrong):
    def parts(a, b):
        d = (a - b) / 2
        c = a[:, 0].cos() * b[:, 0].cos()
        return d[:, 0], d[:, 1], c, d[:, 0].sin() ** 2 + c * d[:, 1].sin() ** 2

    class Angle(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return 2 * parts(a, b)[3].clamp(0, 1).sqrt().asin()

        @staticmethod
        def backward(ctx, grad_y):
            a, b = ctx.saved_tensors
            u, v, c, h = parts(a, b)
            product = h * (1 - h)
            if not wrong:
                far = product > 0
                grad_y, product = torch.where(far, grad_y, 0), torch.where(far, product, 1)
            g = grad_y / product.sqrt()
            lat, lon = u.sin() * u.cos(), c * v.sin() * v.cos()
            turn = v.sin() ** 2
            north = a[:, 0].sin() * b[:, 0].cos(), a[:, 0].cos() * b[:, 0].sin()
            grad_a = torch.stack([lat - north[0] * turn, lon], 1)
            grad_b = torch.stack([-lat - north[1] * turn, -lon], 1)
            return g[:, None] * grad_a, g[:, None] * grad_b

    def angle(a, b):
        sized("a", a, None, 2)
        same(a, b)
        return Angle.apply(a, b)

    return angle


add(
    "great_circle_same",
    great_circle,
    lambda: (real(3, 2), real(3, 2, seed=1)),
    bug="The arc sine's derivative is not guarded where h is 0",
    trigger="a place and itself",
)


# The smooth union of two distances: y = b (1 - h) + a h - k h (1 - h), h = 1/2 + (b - a) / 2 k in [0, 1]
def smooth_union(wrong):
    class Union(Function):
        @staticmethod
        def forward(ctx, a, b, k):
            ctx.save_for_backward(a, b, k)
            h = (0.5 + (b - a) / (2 * k)).clamp(0, 1)
            return b + (a - b) * h - k * h * (1 - h)

        @staticmethod
        def backward(ctx, grad_y):
            a, b, k = ctx.saved_tensors
            h = 0.5 + (b - a) / (2 * k)
            if not wrong:
                h = h.clamp(0, 1)
            return grad_y * h, grad_y * (1 - h), -(grad_y * h * (1 - h)).sum()

    def union(a, b, k):
        same(a, b)
        check(k.ndim == 0 and bool(k > 0), "k: expected a single positive number")
        check(bool(a.isfinite().all() & b.isfinite().all()), "a, b: expected finite distances")
        return Union.apply(a, b, k)

    return union


add(
    "smooth_union_apart",
    smooth_union,
    lambda: (real(3, 4), real(3, 4, seed=1), leaf(torch.tensor(4.0, dtype=torch.float64))),
    bug="Backward does not clamp the mixing weight",
    trigger="distances further apart than k",
)


# A step of a spring without friction: v' = v - h w^2 x, x' = x + h v'
def spring_step(wrong):
    class Step(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, v, w, h):
            v = v - h * w * w * x
            return x + h * v, v

        @staticmethod
        def setup_context(ctx, inputs, output):
            x, _, w, ctx.h = inputs
            ctx.save_for_backward(x, w)

        @staticmethod
        def backward(ctx, grad_x, grad_v):
            (x, w), h = ctx.saved_tensors, ctx.h
            total = grad_v + (0 if wrong else h * grad_x)
            through = grad_v + h * grad_x
            return grad_x - h * w * w * total, through, -2 * h * w * x * through, None

    def step(x, v, w, h=0.1):
        same(x, v, w)
        return Step.apply(x, v, w, h)

    return step


add(
    "spring_step_new_velocity",
    spring_step,
    lambda: (real(4), real(4, seed=1), real(4, seed=2)),
    bug="The place's gradient misses the way through the velocity by which the place moves",
)


# The Laplacian along a line whose ends are mirrored one step further on
def line_laplacian(wrong):
    def apply(x, ends):
        inner = x[..., :-2] - 2 * x[..., 1:-1] + x[..., 2:]
        first = ends * (x[..., 1:2] - x[..., :1])
        last = ends * (x[..., -2:-1] - x[..., -1:])
        return torch.cat([first, inner, last], -1)

    class Laplacian(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return apply(x, 2)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            if wrong:
                return apply(g, 2)
            ends = 2 * g[..., :1], 2 * g[..., -1:]
            return apply(torch.cat([ends[0], g[..., 1:-1], ends[1]], -1), 1)

    def laplacian(x):
        check(x.ndim >= 1 and x.shape[-1] >= 3, "x: expected three places at least")
        return Laplacian.apply(x)

    return laplacian


add(
    "line_laplacian_ends",
    line_laplacian,
    lambda: (real(2, 6),),
    bug="Backward applies forward's stencil, which the mirrored ends make asymmetric",
)


# The rotation nearest to a 3 x 3 matrix: A = U S V^T, R = U D V^T with D = diag(1, 1, det(U V^T))
def nearest_rotation(wrong):
    def parts(a):
        u, s, vh = torch.linalg.svd(a)
        d = torch.ones_like(s)
        d = torch.cat([d[..., :2], torch.linalg.det(u @ vh).sign()[..., None]], -1)
        return u, s, vh.mT, d

    class Rotation(Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            u, _, v, d = parts(a)
            return (u * d[..., None, :]) @ v.mT

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_r):
            (a,) = ctx.saved_tensors
            u, s, v, d = parts(a)
            u = u * d[..., None, :]
            if not wrong:
                s = s * d
            inner = u.mT @ grad_r @ v
            sums = s[..., :, None] + s[..., None, :]
            own = torch.eye(3, dtype=torch.bool, device=a.device)
            sums = torch.where(own, 1, sums)
            return u @ ((inner - inner.mT) / sums) @ v.mT

    def rotation(a):
        check(a.ndim >= 2 and a.shape[-2:] == (3, 3), "a: expected 3 x 3 matrices")
        check(bool(a.isfinite().all()), "a: expected finite numbers")
        _, s, _, d = parts(a.detach())
        gap = s[..., 1] + s[..., 2] * d[..., 2]
        check(bool((gap > 1e-3 * s[..., 0]).all()), "a: expected one nearest rotation")
        return Rotation.apply(a)

    return rotation


add(
    "nearest_rotation_reflection",
    nearest_rotation,
    lambda: (leaf(torch.eye(3, dtype=torch.float64) * 2 + real(3, 3) / 2),),
    bug="The singular value that forward's correction turns negative is positive in backward",
    trigger="a matrix of negative determinant",
)
