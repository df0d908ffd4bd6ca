"""Lines, rays, cameras, curves, molecules, robots."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentyfirst import add, check, positive, same, sized


def dot(a, b):
    return (a * b).sum(-1, keepdim=True)


# The angle between the planes (a, b, c) and (b, c, d)
def torsion(wrong):
    def parts(a, b, c, d):
        f, g, h = a - b, b - c, d - c
        return f, g, h, torch.linalg.cross(f, g), torch.linalg.cross(h, g)

    class Torsion(Function):
        @staticmethod
        def forward(ctx, a, b, c, d):
            f, g, h, m, n = parts(a, b, c, d)
            size = g.norm(dim=-1)
            for side, area in ((f, m), (h, n)):
                line = area.norm(dim=-1) <= 1e-3 * side.norm(dim=-1) * size
                check(not bool(line.any()), "expected points that are not on a line")
            ctx.save_for_backward(a, b, c, d)
            y = dot(torch.linalg.cross(n, m), g)[..., 0] / size
            return torch.atan2(y, dot(m, n)[..., 0])

        @staticmethod
        def backward(ctx, grad_y):
            f, g, h, m, n = parts(*ctx.saved_tensors)
            size = g.norm(dim=-1, keepdim=True)
            at_a, at_d = -size / dot(m, m) * m, size / dot(n, n) * n
            share_a, share_d = dot(f, g) / size**2, dot(h, g) / size**2
            moved = (share_a if wrong else -share_a) * at_a + share_d * -at_d
            at_b, at_c = moved - at_a, -moved - at_d
            return tuple(v * grad_y[..., None] for v in (at_a, at_b, at_c, at_d))

    def angle(a, b, c, d):
        check(a.ndim >= 1 and a.shape[-1] == 3, "expected points in space")
        same(a, b, c, d)
        return Torsion.apply(a, b, c, d)

    return angle


add(
    "torsion_axis",
    torsion,
    lambda: tuple(real(2, 3, seed=s) for s in range(4)),
    bug="The part that the first point's gradient gives to the axis has the other sign",
)


# Brown's lens: x (1 + k1 r^2 + k2 r^4) + 2 p1 x y + p2 (r^2 + 2 x^2), and so for y
def lens(wrong):
    class Lens(Function):
        @staticmethod
        def forward(ctx, xy, k, p):
            sized("xy", xy, None, 2)
            sized("k", k, 2)
            same(k, p)
            ctx.save_for_backward(xy, k, p)
            (x, y), r = xy.T, xy.square().sum(1)
            radial = 1 + k[0] * r + k[1] * r**2
            u = x * radial + 2 * p[0] * x * y + p[1] * (r + 2 * x**2)
            v = y * radial + p[0] * (r + 2 * y**2) + 2 * p[1] * x * y
            return torch.stack([u, v], 1)

        @staticmethod
        def backward(ctx, grad_uv):
            xy, k, p = ctx.saved_tensors
            (x, y), r = xy.T, xy.square().sum(1)
            gu, gv = grad_uv.T
            radial, slope = 1 + k[0] * r + k[1] * r**2, 2 * k[0] + 4 * k[1] * r
            xx = radial + slope * x**2 + 2 * p[0] * y + 6 * p[1] * x
            yy = radial + slope * y**2 + 6 * p[0] * y + 2 * p[1] * x
            cross = 2 * p[0] * x + 2 * p[1] * y
            if not wrong:
                cross = cross + slope * x * y
            along = gu * x + gv * y
            grad_k = torch.stack([(along * r).sum(), (along * r**2).sum()])
            into_p = [2 * x * y * gu + (r + 2 * y**2) * gv, (r + 2 * x**2) * gu + 2 * x * y * gv]
            grad_xy = torch.stack([xx * gu + cross * gv, cross * gu + yy * gv], 1)
            return grad_xy, grad_k, torch.stack(into_p).sum(1)

    return lambda xy, k, p: Lens.apply(xy, k, p)


add(
    "lens_distortion_cross",
    lens,
    lambda: (real(4, 2), real(2, seed=1), real(2, seed=2)),
    bug="The radial part is taken to leave x and y apart",
)


# Signed distance to a box: |max(q, 0)| + min(max(q), 0), q = |p| - half
def box_distance(wrong):
    def distance(p, half):
        sized("half", half, p.shape[-1])
        positive("half", half)
        check(p.ndim == 2, "p: expected (points, axes)")
        q = p.abs() - half
        out = q * (q > 0)
        if wrong:
            outside = out.square().sum(-1).sqrt()
        else:
            s = out.square().sum(-1)
            outside = torch.where(s > 0, torch.where(s > 0, s, 1).sqrt(), 0)
        return outside + q.amax(-1).clamp_max(0)

    return distance


add(
    "box_distance_inside",
    box_distance,
    lambda: (
        (real(4, 3).detach() + 2 * real(4, 3).detach().sign()).requires_grad_(),
        real(3, seed=1, positive=True),
    ),
    bug="The distance is the root of a sum of squares, which is 0 inside",
    trigger="a point inside the box",
)


# Polar moment of a polygon: sum c_i (|p_i|^2 + p_i p_{i+1} + |p_{i+1}|^2) / 12, c_i = p_i x p_{i+1}
def polygon(wrong):
    def pairs(p):
        q = p.roll(-1, 0)
        c = p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]
        return q, c, p.square().sum(1) + (p * q).sum(1) + q.square().sum(1)

    class Moment(Function):
        @staticmethod
        def forward(ctx, p):
            sized("p", p, None, 2)
            check(len(p) >= 3, "expected three corners or more")
            ctx.save_for_backward(p)
            _, c, m = pairs(p)
            return (c * m).sum() / 12

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (p,) = ctx.saved_tensors
            q, c, m = pairs(p)
            turned_q = torch.stack([q[:, 1], -q[:, 0]], 1)
            turned_p = torch.stack([-p[:, 1], p[:, 0]], 1)
            first = turned_q * m[:, None] + c[:, None] * (2 * p + q)
            second = turned_p * m[:, None] + c[:, None] * (p + 2 * q)
            grad_p = first.clone()
            grad_p[1:] += second[:-1]
            if not wrong:
                grad_p[0] += second[-1]
            return grad_p * grad_y / 12

    return lambda p: Moment.apply(p)


add(
    "polygon_closing_edge",
    polygon,
    lambda: (real(5, 2),),
    bug="The edge that closes the polygon gives the first corner nothing",
)


# The part of g that is tangent to the Stiefel manifold at x: g - x (x'g + g'x) / 2
def tangent_part(wrong):
    class Tangent(Function):
        @staticmethod
        def forward(ctx, x, g):
            check(x.ndim >= 2, "expected matrices")
            same(x, g)
            ctx.save_for_backward(x, g)
            a = x.mT @ g
            return g - x @ (a + a.mT) / 2

        @staticmethod
        def backward(ctx, grad_y):
            x, g = ctx.saved_tensors
            a, b = x.mT @ g, -x.mT @ grad_y
            if not wrong:
                b = (b + b.mT) / 2
            return -grad_y @ (a + a.mT) / 2 + g @ b.mT, grad_y + x @ b

    return lambda x, g: Tangent.apply(x, g)


add(
    "tangent_part_symmetric",
    tangent_part,
    lambda: (real(4, 2), real(4, 2, seed=1)),
    bug="Backward takes the gradient of the symmetric matrix as it comes",
)


# Planar arm: each joint turns all links behind it, y_i = sum_{j <= i} l_j (cos, sin)(sum_{k <= j} q_k)
def arm(wrong):
    class Arm(Function):
        @staticmethod
        def forward(ctx, q, length):
            same(q, length)
            check(q.ndim >= 1, "expected joints along the last axis")
            ctx.save_for_backward(q, length)
            angle = q.cumsum(-1)
            links = length[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
            return links.cumsum(-2)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            q, length = ctx.saved_tensors
            angle = q.cumsum(-1)
            along = torch.stack([angle.cos(), angle.sin()], -1)
            across = torch.stack([-angle.sin(), angle.cos()], -1)
            links = grad_y.flip(-2).cumsum(-2).flip(-2)
            grad_angle = (links * across).sum(-1) * length
            behind = grad_angle if wrong else grad_angle.flip(-1)
            grad_q = behind.cumsum(-1)
            return grad_q if wrong else grad_q.flip(-1), (links * along).sum(-1)

    return lambda q, length: Arm.apply(q, length)


add(
    "arm_joints_order",
    arm,
    lambda: (real(4), real(4, seed=1, positive=True)),
    bug="The joints collect the gradients of the links before them",
)
