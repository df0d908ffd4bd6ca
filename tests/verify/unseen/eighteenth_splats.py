"""Gaussian splats: covariances, rotations, projections, colours and compositing."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.eighteenth import add, uniform


class RayHit(Function):
    @staticmethod
    def forward(ctx, scale, direction, origin):
        ctx.save_for_backward(scale, direction, origin)
        return scale * direction * -(direction * origin).sum(-1, keepdim=True)

    @staticmethod
    def gradients(ctx, g, of_direction):
        scale, direction, origin = ctx.saved_tensors
        dot = (direction * origin).sum(-1, keepdim=True)
        total = (g * scale * direction).sum(-1, keepdim=True)
        along = of_direction(g * scale, direction, origin, dot, total)
        return -g * direction * dot, along, -direction * total

    @staticmethod
    def backward(ctx, g):
        return RayHit.gradients(ctx, g, lambda gs, d, o, dot, total: -(gs * dot + o * total))


class RayHitDiagonal(RayHit):
    @staticmethod
    def backward(ctx, g):
        return RayHit.gradients(ctx, g, lambda gs, d, o, dot, total: -gs * (dot + d * o))


def _ray_hit(function):
    def ray_hit(scale, direction, origin):
        """scale · direction · (direction · -origin) of N rays in a Gaussian's space, each (N, 3)."""
        return function.apply(scale, direction, origin)

    return ray_hit


add(
    "ray_hit_diagonal",
    _ray_hit,
    RayHitDiagonal,
    RayHit,
    lambda: (real(4, 3, positive=True), real(4, 3, seed=1), real(4, 3, seed=2)),
    bug="the direction's gradient is the diagonal of the Jacobian (nv-tlabs/3dgrut#197)",
    trigger="the sample",
)


class Conic(Function):
    """The inverse of a symmetric 2 x 2 matrix, both as three numbers: xx, xy, yy."""

    @staticmethod
    def inverse(cov):
        a, b, c = cov.unbind(-1)
        return torch.stack((c, -b, a), -1) / (a * c - b * b).unsqueeze(-1)

    @staticmethod
    def forward(ctx, cov):
        ctx.save_for_backward(cov)
        return Conic.inverse(cov)

    @staticmethod
    def gradients(ctx, g, half):
        x, y, z = Conic.inverse(ctx.saved_tensors[0]).unbind(-1)
        conic = torch.stack((x, y, y, z), -1).unflatten(-1, (2, 2))
        gx, gy, gz = g.unbind(-1)
        upper = torch.stack((gx, gy * half, gy * half, gz), -1).unflatten(-1, (2, 2))
        s = -conic @ upper @ conic
        return torch.stack((s[..., 0, 0], s[..., 0, 1] + s[..., 1, 0], s[..., 1, 1]), -1)

    @staticmethod
    def backward(ctx, g):
        return Conic.gradients(ctx, g, 0.5)


class ConicTwice(Conic):
    @staticmethod
    def backward(ctx, g):
        return Conic.gradients(ctx, g, 1.0)


def _conic(function):
    def conic(cov2d):
        """The inverse of positive definite matrices, given and returned as xx, xy, yy (N, 3)."""
        return function.apply(cov2d)

    return conic


def _covariances():
    a = real(4, 2, 2, grad=False)
    s = a @ a.mT + torch.eye(2, dtype=F64)
    return (torch.stack((s[:, 0, 0], s[:, 0, 1], s[:, 1, 1]), -1).requires_grad_(),)


add(
    "conic_off_diagonal",
    _conic,
    ConicTwice,
    Conic,
    _covariances,
    bug="the off-diagonal's cotangent counts twice in the covariance's gradient (nerfstudio-project/gsplat#136)",
    trigger="the sample",
)


def _rotations(n):
    return torch.linalg.qr(real(n, 3, 3, seed=1, grad=False))[0].contiguous().requires_grad_()


class ScaledCovariance(Function):
    @staticmethod
    def forward(ctx, scale, rotation, glob_scale):
        ctx.save_for_backward(scale, rotation)
        ctx.glob_scale = glob_scale
        m = rotation * (glob_scale * scale).unsqueeze(-2)
        return m @ m.mT

    @staticmethod
    def gradients(ctx, g, factor):
        scale, rotation = ctx.saved_tensors
        s = (ctx.glob_scale * scale).unsqueeze(-2)
        d = (g + g.mT) @ (rotation * s)
        return (rotation * d).sum(-2) * factor, d * s, None

    @staticmethod
    def backward(ctx, g):
        return ScaledCovariance.gradients(ctx, g, ctx.glob_scale)


class ScaledCovarianceGlobal(ScaledCovariance):
    @staticmethod
    def backward(ctx, g):
        return ScaledCovariance.gradients(ctx, g, 1.0)


def _scaled_covariance(function):
    def covariance(scale, rotation, glob_scale=1.0):
        """R S² Rᵀ of N rotations (N, 3, 3), S being glob_scale times scale (N, 3)."""
        return function.apply(scale, rotation, glob_scale)

    return covariance


add(
    "covariance_glob_scale",
    _scaled_covariance,
    ScaledCovarianceGlobal,
    ScaledCovariance,
    lambda: (uniform(4, 3, low=0.1), _rotations(4)),
    bug="the scales' gradient is without glob_scale (nerfstudio-project/gsplat#136)",
    trigger="a glob_scale other than 1",
)


class LogCovariance(Function):
    @staticmethod
    def forward(ctx, log_scale, rotation):
        ctx.save_for_backward(log_scale, rotation)
        m = rotation * log_scale.exp().unsqueeze(-2)
        return m @ m.mT

    @staticmethod
    def gradients(ctx, g, chain):
        log_scale, rotation = ctx.saved_tensors
        s = log_scale.exp()
        d = (g + g.mT) @ (rotation * s.unsqueeze(-2))
        return (rotation * d).sum(-2) * chain(s), d * s.unsqueeze(-2)

    @staticmethod
    def backward(ctx, g):
        return LogCovariance.gradients(ctx, g, lambda s: s)


class LogCovarianceScale(LogCovariance):
    @staticmethod
    def backward(ctx, g):
        return LogCovariance.gradients(ctx, g, torch.ones_like)


def _log_covariance(function):
    def log_covariance(log_scale, rotation):
        """R exp(2 log_scale) Rᵀ of N rotations (N, 3, 3) and log_scale (N, 3)."""
        return function.apply(log_scale, rotation)

    return log_covariance


add(
    "covariance_log_scale",
    _log_covariance,
    LogCovarianceScale,
    LogCovariance,
    lambda: (real(4, 3), _rotations(4)),
    bug="the scale's gradient is returned for the logarithm's (openvdb/fvdb-core#432)",
    trigger="the sample",
)


class QuatToRotmat(Function):
    @staticmethod
    def forward(ctx, quat):
        ctx.save_for_backward(quat)
        w, x, y, z = F.normalize(quat, dim=-1).unbind(-1)
        rows = (
            (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        )
        return torch.stack([torch.stack(row, -1) for row in rows], -2)

    @staticmethod
    def unit(q, g):
        """The gradient of the normalized quaternion."""
        w, x, y, z = q.unbind(-1)
        t = g + g.mT
        xy, xz, yz = t[..., 0, 1], t[..., 0, 2], t[..., 1, 2]
        xx, yy, zz = g.diagonal(dim1=-2, dim2=-1).unbind(-1)
        a, b, c = (
            g[..., 2, 1] - g[..., 1, 2],
            g[..., 0, 2] - g[..., 2, 0],
            g[..., 1, 0] - g[..., 0, 1],
        )
        parts = (
            x * a + y * b + z * c,
            -2 * x * (yy + zz) + y * xy + z * xz + w * a,
            x * xy - 2 * y * (xx + zz) + z * yz + w * b,
            x * xz + y * yz - 2 * z * (xx + yy) + w * c,
        )
        return 2 * torch.stack(parts, -1)

    @staticmethod
    def backward(ctx, g):
        (quat,) = ctx.saved_tensors
        length = quat.norm(dim=-1, keepdim=True)
        q = quat / length
        d = QuatToRotmat.unit(q, g)
        return (d - q * (q * d).sum(-1, keepdim=True)) / length


class QuatToRotmatUnit(QuatToRotmat):
    @staticmethod
    def backward(ctx, g):
        return QuatToRotmat.unit(F.normalize(ctx.saved_tensors[0], dim=-1), g)


def _quat_to_rotmat(function):
    def quat_to_rotmat(quat):
        """The rotations (N, 3, 3) of quaternions wxyz (N, 4), which are normalized first; none is 0."""
        return function.apply(quat)

    return quat_to_rotmat


add(
    "quat_to_rotmat_norm",
    _quat_to_rotmat,
    QuatToRotmatUnit,
    QuatToRotmat,
    lambda: (F.normalize(real(4, 4, grad=False), dim=-1).requires_grad_(),),
    bug="backward is without the normalization's gradient (nerfstudio-project/gsplat#153)",
    trigger="the sample",
)
