"""Geometry."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.twelfth import wide


class Spherical(Function):
    @staticmethod
    def forward(ctx, v):
        x, y, z = wide(v).unbind(-1)
        rho = torch.hypot(x, y)
        out = torch.stack((torch.hypot(rho, z), torch.atan2(rho, z), torch.atan2(y, x)), -1)
        ctx.save_for_backward(v)
        return out.to(v.dtype)

    @staticmethod
    def gradients(ctx, g, norm):
        (v,) = ctx.saved_tensors
        x, y, z = wide(v).unbind(-1)
        to_r, to_theta, to_phi = wide(g).unbind(-1)
        rho = norm(x, y)
        r = norm(rho, z)
        out, down = to_r * rho / r + to_theta / r * (z / r), to_r * z / r - to_theta / r * (rho / r)
        around = to_phi / rho
        grads = out * x / rho - around * (y / rho), out * y / rho + around * (x / rho), down
        return torch.stack(grads, -1).to(v.dtype)

    @staticmethod
    def backward(ctx, g):
        return Spherical.gradients(ctx, g, torch.hypot)


class SphericalSquares(Spherical):
    @staticmethod
    def backward(ctx, g):
        return Spherical.gradients(ctx, g, lambda a, b: (a * a + b * b).sqrt())


def _spherical(function):
    def spherical(v):
        """Radius, angle from z, and angle around z, of points v (*, 3) that are not on the z axis.

        They are 1e-6 away from it at least; coordinates of any size that leaves the radius finite.
        """
        need(v.dim() > 0 and v.shape[-1] == 3, "expected v (*, 3)")
        need(bool((v[..., :2].abs().amax(-1) >= 1e-6).all()), "expected points off the z axis")
        y = function.apply(v)
        need(bool(y.isfinite().all()), "expected a finite radius")
        return y

    return spherical


add(
    "spherical",
    _spherical,
    SphericalSquares,
    Spherical,
    lambda: (real(4, 3),),
    bug="backward's radius is the root of a sum of squares, forward's is hypot",
    trigger="coordinates of 1e160 in float64, 1e20 in float32",
    missed="values whose squares overflow float64 are not tried",
)


class PlaneRotation(Function):
    @staticmethod
    def forward(ctx, x, angle, degrees):
        ctx.save_for_backward(x, angle)
        ctx.unit = math.pi / 180 if degrees else 1.0
        return PlaneRotation.rotate(wide(x), wide(angle) * ctx.unit).to(x.dtype)

    @staticmethod
    def rotate(x, angle):
        (a, b), cos, sin = x.unbind(-1), angle.cos(), angle.sin()
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1)

    @staticmethod
    def gradients(ctx, g, unit):
        x, angle = (wide(t) for t in ctx.saved_tensors)
        back = PlaneRotation.rotate(wide(g), -angle * ctx.unit)
        turned = torch.stack((-x[..., 1], x[..., 0]), -1)
        return back.to(g.dtype), ((back * turned).sum(-1) * unit).to(g.dtype), None

    @staticmethod
    def backward(ctx, g):
        return PlaneRotation.gradients(ctx, g, ctx.unit)


class PlaneRotationRadians(PlaneRotation):
    @staticmethod
    def backward(ctx, g):
        return PlaneRotation.gradients(ctx, g, 1.0)


def _plane_rotation(function):
    def plane_rotation(x, angle, degrees=False):
        """Points x (*, 2) turned counterclockwise by angle (*), in radians or in degrees."""
        need(x.dim() > 0 and x.shape == (*angle.shape, 2), "expected x (*, 2) and angle (*)")
        return function.apply(x, angle, degrees)

    return plane_rotation


add(
    "plane_rotation",
    _plane_rotation,
    PlaneRotationRadians,
    PlaneRotation,
    lambda: (real(3, 2), real(3, seed=1)),
    bug="the angle's gradient is per radian",
    trigger="degrees=True",
)


class QuaternionProduct(Function):
    @staticmethod
    def product(a, b):
        (aw, av), (bw, bv) = a.split((1, 3), -1), b.split((1, 3), -1)
        w = aw * bw - (av * bv).sum(-1, keepdim=True)
        return torch.cat((w, aw * bv + bw * av + torch.linalg.cross(av, bv)), -1)

    @staticmethod
    def conjugate(a):
        return torch.cat((a[..., :1], -a[..., 1:]), -1)

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return QuaternionProduct.product(wide(a), wide(b)).to(a.dtype)

    @staticmethod
    def gradients(ctx, g, need_a, need_b):
        a, b = (wide(t) for t in ctx.saved_tensors)
        product, conjugate = QuaternionProduct.product, QuaternionProduct.conjugate
        grad_a = product(wide(g), conjugate(b)).to(g.dtype) if need_a else None
        return grad_a, product(conjugate(a), wide(g)).to(g.dtype) if need_b else None

    @staticmethod
    def backward(ctx, g):
        return QuaternionProduct.gradients(ctx, g, *ctx.needs_input_grad)


class QuaternionProductOrder(QuaternionProduct):
    @staticmethod
    def backward(ctx, g):
        return QuaternionProduct.gradients(ctx, g, *ctx.needs_input_grad[::-1])


def _quaternion_product(function):
    def quaternion_product(a, b):
        """Hamilton's product of the quaternions a and b (*, 4), real part first."""
        need(a.dim() > 0 and a.shape == b.shape and a.shape[-1] == 4, "expected a and b (*, 4)")
        return function.apply(a, b)

    return quaternion_product


add(
    "quaternion_product",
    _quaternion_product,
    QuaternionProductOrder,
    QuaternionProduct,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="each factor's gradient goes by the other's flag",
    trigger="one factor that needs no gradient",
)
