"""Splats, rays, quaternions."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.fortyfirst import add, alike, bounded, check, same, sized


# The weight of a splat at the distance d (N, 2), by the conic (N, 3)
def conic(wrong):
    class Weight(Function):
        @staticmethod
        def forward(ctx, conic, d):
            y = weight(conic, d)
            ctx.save_for_backward(conic, d)
            return y

        @staticmethod
        def backward(ctx, g):
            conic, d = ctx.saved_tensors
            q = g * weight(conic, d)
            (a, b, c), (x, y) = conic.unbind(1), d.unbind(1)
            cross = -0.5 if wrong else -1
            grad_conic = torch.stack([-0.5 * q * x * x, cross * q * x * y, -0.5 * q * y * y], 1)
            return grad_conic, torch.stack([-q * (a * x + b * y), -q * (b * x + c * y)], 1)

    def weight(conic, d):
        (a, b, c), (x, y) = conic.unbind(1), d.unbind(1)
        return torch.exp(-0.5 * (a * x * x + c * y * y) - b * x * y)

    def value(conic, d):
        sized("conic", conic, None, 3)
        sized("d", d, len(conic), 2)
        alike(conic, d)
        bounded("conic", conic, -3, 3)
        bounded("d", d, -3, 3)
        return Weight.apply(conic, d)

    return value


add(
    "conic_cross",
    conic,
    lambda: (real(3, 3), real(3, 2, seed=1)),
    bug="the mixed entry's gradient has the factor 0.5 of the other two "
    "(graphdeco-inria/gaussian-splatting#551)",
)


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


# The rotation vectors (N, 3) of quaternions (N, 4) of any length
def rotation_vector(wrong):
    def ratio(x):
        near = x < 0.05
        far = torch.where(near, 1, x)
        h = torch.where(near, 1 - x**2 / 3 + x**4 / 5 - x**6 / 7, far.atan() / far)
        slope = (1 / (1 + far**2) - h) / far**2
        series = -2 / 3 + 4 * x**2 / 5 - 6 * x**4 / 7 + 8 * x**6 / 9
        return h, torch.where(near, series, slope)

    class Vector(Function):
        @staticmethod
        def forward(ctx, q):
            ctx.save_for_backward(q)
            w, v = q[:, :1], q[:, 1:]
            return 2 / w * v * ratio(v.norm(dim=1, keepdim=True) / w.abs())[0]

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            (q,) = ctx.saved_tensors
            w, v = q[:, :1], q[:, 1:]
            size = v.norm(dim=1, keepdim=True)
            x = size / w.abs()
            h, slope = ratio(x)
            grad = 2 / w * (g * h + dot(g, v) * slope * v / w**2)
            if wrong:
                grad = torch.where(size == 0, 2 * g, grad)
            return torch.cat([-2 / w**2 * dot(g, v) / (1 + x**2), grad], 1)

    def vector(q):
        sized("q", q, None, 4)
        check(q.is_floating_point(), "q: expected floating point numbers")
        bounded("q", q, -1e2, 1e2)
        check(bool((q[:, 0].abs() > 0.05).all()), "q: expected real parts away from 0")
        return Vector.apply(q)

    return vector


add(
    "identity_slope",
    rotation_vector,
    lambda: (
        torch.tensor(
            [[-1, 0, 0, 0], [2, 0, 0, 0], [0.9, 0.3, -0.4, 0.2]], dtype=F64
        ).requires_grad_(),
    ),
    bug="at the identity the slope is 2, whatever the real part (kornia/kornia#4246)",
    trigger="an identity other than 1, as in the sample",
)
