"""Rotations, cameras, rays, triangles, splats."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyeighth import add, check, finite, one_dtype, positive, same, sized


# A rotation's quaternion, by the largest of its four numbers
def matrix_to_quaternion(wrong):
    def branches(m):
        a, b, c = m[:, 0, 0], m[:, 1, 1], m[:, 2, 2]
        squares = torch.stack([1 + a + b + c, 1 + a - b - c, 1 - a + b - c, 1 - a - b + c], -1)
        x, y, z = m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]
        xy, xz, yz = m[:, 1, 0] + m[:, 0, 1], m[:, 2, 0] + m[:, 0, 2], m[:, 2, 1] + m[:, 1, 2]
        w, i, j, k = squares.unbind(-1)
        rows = [w, x, y, z, x, i, xy, xz, y, xy, j, yz, z, xz, yz, k]
        return squares, torch.stack(rows, -1).view(-1, 4, 4)

    def quaternion(m):
        squares, rows = branches(m)
        best = squares.argmax(-1, keepdim=True)
        row = rows.gather(1, best[..., None].expand(-1, 1, 4))[:, 0]
        return row / (2 * squares.gather(1, best).sqrt())

    class Quaternion(Function):
        @staticmethod
        def forward(ctx, m):
            ctx.save_for_backward(m)
            return quaternion(m)

        @staticmethod
        def backward(ctx, grad_q):
            (m,) = ctx.saved_tensors
            squares, rows = branches(m)
            root = squares[:, 0].sqrt()
            turn = grad_q[:, 1:] / (2 * root[:, None])
            pull = (turn * rows[:, 0, 1:]).sum(-1)
            trace = grad_q[:, 0] / (4 * root) - pull / (2 * squares[:, 0])
            x, y, z = turn.unbind(-1)
            return torch.stack([trace, -z, y, z, trace, -x, -y, x, trace], -1).view(-1, 3, 3)

    def convert(m):
        sized("m", m, None, 3, 3)
        one = torch.eye(3, dtype=m.dtype, device=m.device)
        off = (m @ m.mT - one).abs() < 0.05
        check(bool(off.all()) and bool((torch.linalg.det(m) > 0).all()), "expected rotations")
        return Quaternion.apply(m) if wrong else quaternion(m)

    return convert


def small_turns():
    m = 0.3 * real(2, 3, 3, grad=False)
    return torch.linalg.matrix_exp(m - m.mT).requires_grad_()


add(
    "matrix_to_quaternion_trace",
    matrix_to_quaternion,
    lambda: (small_turns(),),
    bug="Backward is that of the trace's branch, whichever forward took",
    trigger="a rotation by more than 120 degrees",
)


# An equidistant fisheye lens: the angle theta to the axis at the radius theta (1 + k theta^2)
def fisheye(wrong):
    def image(p, k):
        x, y, z = p.unbind(-1)
        u, v = x / z, y / z
        q = u * u + v * v
        small = q < 1e-3
        near = torch.where(small, q, 0)
        series = 1 - near / 3 + near**2 / 5 - near**3 / 7 + near**4 / 9 - near**5 / 11
        root = torch.where(small, 1, q).sqrt()
        ratio = torch.where(small, series, torch.atan(root) / root)
        scale = ratio * (1 + k * q * ratio**2)
        return torch.stack([scale * u, scale * v], -1)

    class Fisheye(Function):
        @staticmethod
        def forward(ctx, p, k):
            ctx.save_for_backward(p, k)
            return image(p, k)

        @staticmethod
        def backward(ctx, grad_u):
            p, k = ctx.saved_tensors
            flat, z = p[:, :2], p[:, 2]
            r = flat.norm(dim=-1)
            way = flat / r[:, None]
            theta = torch.atan2(r, z)
            along = (grad_u * way).sum(-1)
            slope = along * (1 + 3 * k * theta**2) / (r * r + z * z)
            around = (theta + k * theta**3) / r
            grad_flat = around[:, None] * (grad_u - along[:, None] * way)
            grad_flat = grad_flat + (slope * z)[:, None] * way
            grad_p = torch.cat([grad_flat, -(slope * r)[:, None]], -1)
            return grad_p, (along * theta**3).sum()

    def project(p, k):
        sized("p", p, None, 3)
        sized("k", k)
        one_dtype(p, k)
        finite(p=p)
        positive("depth", p[:, 2])
        return Fisheye.apply(p, k) if wrong else image(p, k)

    return project


def before(n, seed=0):
    p = real(n, 3, grad=False, seed=seed)
    return torch.cat([p[:, :2], p[:, 2:].abs() + 0.5], 1).requires_grad_()


add(
    "fisheye_axis",
    fisheye,
    lambda: (before(4), real((), seed=1)),
    bug="Backward divides by the distance to the axis",
    trigger="a point on the optical axis",
)


# Where rays meet a sphere: the first point before an origin outside, the second for one inside
def ray_sphere(wrong):
    class RaySphere(Function):
        @staticmethod
        def forward(ctx, o, d, c, r):
            m = o - c
            a, b = (d * d).sum(-1), (d * m).sum(-1)
            rest = (m * m).sum(-1) - r * r
            root = (b * b - a * rest).sqrt()
            t = (-b - torch.where(rest > 0, root, -root)) / a
            ctx.save_for_backward(o, d, c, r, t)
            return t

        @staticmethod
        def backward(ctx, grad_t):
            o, d, c, r, t = ctx.saved_tensors
            if wrong:
                a, b = (d * d).sum(-1), (d * (o - c)).sum(-1)
                t = (-b - (b * b - a * ((o - c).square().sum(-1) - r * r)).sqrt()) / a
            normal = o + t[:, None] * d - c
            k = -grad_t / (normal * d).sum(-1)
            grad_o = k[:, None] * normal
            return grad_o, t[:, None] * grad_o, -grad_o.sum(0), -(k * r).sum()

    def distance(o, d, c, r):
        sized("o", o, None, 3)
        sized("d", d, len(o), 3)
        sized("c", c, 3)
        sized("r", r)
        one_dtype(o, d, c, r)
        positive("r", r)
        m = o - c
        a, b, rest = (d * d).sum(-1), (d * m).sum(-1), (m * m).sum(-1) - r * r
        check(bool((b * b - a * rest > 0).all()), "expected rays that meet the sphere")
        check(bool((rest != 0).all()), "expected no origin on the sphere")
        return RaySphere.apply(o, d, c, r)

    return distance


def rays():
    o = torch.tensor([[-3.0, 0.2, 0.1], [0.3, -4.0, 0.2]], dtype=torch.float64)
    d = torch.tensor([[1.0, 0.1, -0.05], [0.0, 0.9, 0.1]], dtype=torch.float64)
    c, r = torch.tensor([0.1, 0.2, 0.1], dtype=torch.float64), torch.tensor(1.2).double()
    return tuple(t.requires_grad_() for t in (o, d, c, r))


add(
    "ray_sphere_inside",
    ray_sphere,
    rays,
    bug="Backward takes the first point where the ray meets the sphere",
    trigger="an origin inside of the sphere",
)


# Points seen by an affine camera, a 2 x 4 matrix
def affine_camera(wrong):
    class Camera(Function):
        generate_vmap_rule = not wrong

        @staticmethod
        def forward(a, p):
            return p @ a[..., :3].mT + a[..., None, :, 3]

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_u):
            a, p = ctx.saved_tensors
            grad_a = torch.cat([grad_u.mT @ p, grad_u.sum(-2)[..., None]], -1)
            return grad_a, grad_u @ a[..., :3]

    class OneCamera(Camera):
        @staticmethod
        def vmap(info, in_dims, a, p):
            size = info.batch_size
            p = p.expand(size, *p.shape) if in_dims[1] is None else p.movedim(in_dims[1], 0)
            a = a if in_dims[0] is None else a.select(in_dims[0], 0)
            return OneCamera.apply(a, p.reshape(-1, 3)).view(size, -1, 2), 0

    def project(a, p):
        sized("a", a, 2, 4)
        sized("p", p, None, 3)
        one_dtype(a, p)
        return (OneCamera if wrong else Camera).apply(a, p)

    return project


add(
    "affine_camera_first",
    affine_camera,
    lambda: (real(2, 4), real(5, 3, seed=1)),
    bug="The rule for vmap takes the first camera for the whole batch",
    trigger="vmap over cameras",
)


# Interpolation over a triangle seen in perspective: weights w, depths z, values v at its corners
def perspective(wrong):
    class Perspective(Function):
        @staticmethod
        def forward(ctx, w, z, v):
            ctx.save_for_backward(w, z, v)
            share = w / z
            return (share * v).sum(-1) / share.sum(-1)

        @staticmethod
        def backward(ctx, grad_y):
            w, z, v = ctx.saved_tensors
            share = w / z
            total = share.sum(-1, keepdim=True)
            part = share / total
            y = (part * v).sum(-1, keepdim=True)
            grad_part = grad_y[..., None] * (v - y)
            by_z = -grad_y[..., None] * v if wrong else -grad_part
            return grad_part / z / total, by_z * part / z, grad_y[..., None] * part

    def interpolate(w, z, v):
        sized("w", w, None, 3)
        same(w, z, v)
        one_dtype(w, z, v)
        positive("w", w)
        positive("z", z)
        return Perspective.apply(w, z, v)

    return interpolate


add(
    "perspective_depth",
    perspective,
    lambda: (real(4, 3, positive=True), real(4, 3, positive=True, seed=1), real(4, 3, seed=2)),
    bug="The depths' gradient leaves the sum of the shares out",
)


# What widening a splat's covariance (a, b; b, c) by s must take from its opacity
def compensation(wrong):
    class Compensation(Function):
        @staticmethod
        def forward(ctx, cov, s):
            ctx.save_for_backward(cov)
            ctx.s = s
            a, b, c = cov.unbind(-1)
            return ((a * c - b * b) / ((a + s) * (c + s) - b * b)).sqrt()

        @staticmethod
        def backward(ctx, grad_r):
            (cov,) = ctx.saved_tensors
            (a, b, c), s = cov.unbind(-1), ctx.s
            before, after = a * c - b * b, (a + s) * (c + s) - b * b
            half = grad_r * (before / after).sqrt() / 2
            by_a, by_b, by_c = c / before, -2 * b / before, a / before
            if not wrong:
                by_a, by_c = by_a - (c + s) / after, by_c - (a + s) / after
                by_b = by_b + 2 * b / after
            return torch.stack([half * by_a, half * by_b, half * by_c], -1), None

    def compensate(cov, s=0.3):
        sized("cov", cov, None, 3)
        check(s > 0, "expected s > 0")
        finite(cov=cov)
        a, b, c = cov.unbind(-1)
        fits = (a > 0) & (c > 0) & (a * c - b * b > 0)
        check(bool(fits.all()), "expected positive definite matrices")
        return Compensation.apply(cov, s)

    return compensate


def covariances():
    a, c = real(4, positive=True, grad=False) + 0.5, real(4, positive=True, seed=1, grad=False)
    b = 0.8 * (a * c).sqrt() * torch.tanh(real(4, seed=2, grad=False))
    return torch.stack([a, b, c], -1).requires_grad_()


add(
    "compensation_widened",
    compensation,
    lambda: (covariances(),),
    bug="The widened matrix's determinant is taken for constant",
)
