"""Splats, rays, quaternions."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.fortyfirst import add, alike, bounded, check, same, sized


# The colour that a splat leaves at 0, by its mean (N, 2) and its covariance (N, 3): xx, xy, yy
def splat(wrong):
    def parts(mean, cov):
        (x, y), (xx, xy, yy) = mean.unbind(1), cov.unbind(1)
        det = xx * yy - xy**2
        v = torch.stack([yy * x - xy * y, xx * y - xy * x], 1) / det[:, None]
        return v, torch.exp(-0.5 * (mean * v).sum(1))

    class Splat(Function):
        @staticmethod
        def forward(ctx, mean, cov, colour):
            ctx.save_for_backward(mean, cov, colour)
            return colour * parts(mean, cov)[1]

        @staticmethod
        def backward(ctx, g):
            mean, cov, colour = ctx.saved_tensors
            v, w = parts(mean, cov)
            q = (g * colour * w)[:, None]
            grad_cov = torch.zeros_like(cov)
            if not wrong:
                x, y = v.unbind(1)
                grad_cov = q * torch.stack([0.5 * x * x, x * y, 0.5 * y * y], 1)
            return -q * v, grad_cov, g * w

    def value(mean, cov, colour):
        sized("mean", mean, None, 2)
        sized("cov", cov, len(mean), 3)
        sized("colour", colour, len(mean))
        alike(mean, cov, colour)
        bounded("mean", mean, -10, 10)
        bounded("cov", cov, -10, 10)
        bounded("colour", colour, -1e3, 1e3)
        xx, xy, yy = cov.unbind(1)
        regular = (xx > 0.05) & (yy > 0.05) & (xx * yy - xy**2 > 0.05)
        check(bool(regular.all()), "cov: expected covariances with a determinant above 0.05")
        return Splat.apply(mean, cov, colour)

    return value


add(
    "splat_shape",
    splat,
    lambda: (
        real(2, 2),
        torch.tensor([[1, 0.2, 0.8], [0.6, -0.3, 1.2]], dtype=F64).requires_grad_(),
        real(2, seed=1),
    ),
    bug="the covariances' gradient is allocated and never filled (ooples/AiDotNet#447)",
)


# The colour and the opacity of rays with densities and colours (R, S), one after the other
def rays(wrong):
    def shares(density, step):
        passed = torch.exp(-step * density.cumsum(1))
        before = torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], 1)
        return passed, before - passed

    class Rays(Function):
        @staticmethod
        def forward(ctx, density, colour, step):
            ctx.save_for_backward(density, colour)
            ctx.step = step
            passed, share = shares(density, step)
            return (share * colour).sum(1), 1 - passed[:, -1]

        @staticmethod
        def backward(ctx, g_colour, g_opacity):
            density, colour = ctx.saved_tensors
            passed, share = shares(density, ctx.step)
            seen = share * colour
            behind = seen.sum(1, keepdim=True) - seen.cumsum(1)
            grad = g_colour[:, None] * (passed * colour - behind)
            left = passed if wrong else passed[:, -1:]
            return ctx.step * (grad + g_opacity[:, None] * left), g_colour[:, None] * share, None

    def render(density, colour, step=0.5):
        sized("density", density, None, None)
        same(density, colour)
        alike(density, colour)
        check(0 < step <= 10, "step: expected a number from 0 to 10")
        bounded("density", density, 0, 1e2)
        bounded("colour", colour, -1e3, 1e3)
        return Rays.apply(density, colour, step)

    return render


add(
    "rays_opacity",
    rays,
    lambda: (real(2, 4, positive=True), real(2, 4, seed=1)),
    bug="what comes from the opacity is weighted with the light left so far, not at the end "
    "(kwea123/ngp_pl#133)",
)


def cross(a, b):
    return torch.linalg.cross(a, b, dim=1)


def dot(a, b):
    return (a * b).sum(1, keepdim=True)


# Points (N, 3) turned by quaternions (N, 4) of any length
def turned(wrong):
    class Turn(Function):
        @staticmethod
        def forward(ctx, q, p):
            ctx.save_for_backward(q, p)
            u = q / q.norm(dim=1, keepdim=True)
            s, v = u[:, :1], u[:, 1:]
            across = cross(v, p)
            return p + 2 * s * across + 2 * cross(v, across)

        @staticmethod
        def backward(ctx, g):
            q, p = ctx.saved_tensors
            size = q.norm(dim=1, keepdim=True)
            u = q / size
            s, v = u[:, :1], u[:, 1:]
            grad_v = s * cross(p, g) + dot(v, p) * g + dot(g, v) * p - 2 * dot(g, p) * v
            grad = 2 * torch.cat([dot(g, cross(v, p)), grad_v], 1)
            if not wrong:
                grad = (grad - u * dot(u, grad)) / size
            across = cross(v, g)
            return grad, g - 2 * s * across + 2 * cross(v, across)

    def turn(q, p):
        sized("q", q, None, 4)
        sized("p", p, len(q), 3)
        alike(q, p)
        bounded("q", q, -1e2, 1e2)
        bounded("p", p, -1e2, 1e2)
        check(bool((q.norm(dim=1) > 0.01).all()), "q: expected lengths above 0.01")
        return Turn.apply(q, p)

    return turn


add(
    "quaternion_length",
    turned,
    lambda: (real(2, 4), real(2, 3, seed=1)),
    bug="the quaternion's gradient leaves out that it is brought to length 1 "
    "(RobotLocomotion/drake#10654)",
)


# Points (N, 3) before a camera on its plane (N, 2), with a radial distortion
def projection(wrong):
    class Project(Function):
        @staticmethod
        def forward(ctx, points, bend):
            ctx.save_for_backward(points)
            ctx.bend = bend
            flat = points[:, :2] / points[:, 2:]
            return flat * (1 + bend * dot(flat, flat))

        @staticmethod
        def backward(ctx, g):
            (points,) = ctx.saved_tensors
            if wrong and ctx.bend != 0:
                return torch.zeros_like(points), None
            far = points[:, 2:]
            flat = points[:, :2] / far
            grad = g * (1 + ctx.bend * dot(flat, flat)) + 2 * ctx.bend * dot(g, flat) * flat
            return torch.cat([grad, -dot(grad, flat)], 1) / far, None

    def project(points, bend=0.1):
        sized("points", points, None, 3)
        check(points.is_floating_point(), "points: expected floating point numbers")
        check(abs(bend) <= 1, "bend: expected a number from -1 to 1")
        bounded("points", points, -10, 10)
        check(bool((points[:, 2] > 0.1).all()), "points: expected depths above 0.1")
        return Project.apply(points, bend)

    return project


add(
    "projection_distorted",
    projection,
    lambda: (real(3, 3, positive=True),),
    bug="with a distorted camera no gradient reaches the points (openvdb/fvdb-core#767)",
    trigger="a distortion, as by default",
)
