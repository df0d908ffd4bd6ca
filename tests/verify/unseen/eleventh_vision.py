"""Eleventh set: splatting, rendering, rotations, sampling, detection losses, point sets."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen.eleventh import add, leaf, need_dim, rand, randn, up


# quaternion + scale -> covariance
def _rotmat(q):
    w, x, y, z = q.unbind(-1)
    return torch.stack(
        [
            1 - 2 * (y * y + z * z),
            2 * (x * y - w * z),
            2 * (x * z + w * y),
            2 * (x * y + w * z),
            1 - 2 * (x * x + z * z),
            2 * (y * z - w * x),
            2 * (x * z - w * y),
            2 * (y * z + w * x),
            1 - 2 * (x * x + y * y),
        ],
        -1,
    ).unflatten(-1, (3, 3))


def _rotmat_vjp(q, d):
    w, x, y, z = q.unbind(-1)

    def e(i, j):
        return d[..., i, j]

    return 2 * torch.stack(
        [
            x * (e(2, 1) - e(1, 2)) + y * (e(0, 2) - e(2, 0)) + z * (e(1, 0) - e(0, 1)),
            -2 * x * (e(1, 1) + e(2, 2))
            + y * (e(1, 0) + e(0, 1))
            + z * (e(2, 0) + e(0, 2))
            + w * (e(2, 1) - e(1, 2)),
            x * (e(1, 0) + e(0, 1))
            - 2 * y * (e(0, 0) + e(2, 2))
            + z * (e(2, 1) + e(1, 2))
            + w * (e(0, 2) - e(2, 0)),
            x * (e(2, 0) + e(0, 2))
            + y * (e(2, 1) + e(1, 2))
            - 2 * z * (e(0, 0) + e(1, 1))
            + w * (e(1, 0) - e(0, 1)),
        ],
        -1,
    )


class QuatScaleCov(Function):
    @staticmethod
    def forward(ctx, q, s):
        ctx.save_for_backward(q, s)
        m = _rotmat(q / q.norm(dim=-1, keepdim=True)) * s[..., None, :]
        return m @ m.transpose(-1, -2)

    @staticmethod
    def backward(ctx, g):
        q, s = ctx.saved_tensors
        n = q.norm(dim=-1, keepdim=True)
        u = q / n
        r = _rotmat(u)
        dm = (g + g.transpose(-1, -2)) @ (r * s[..., None, :])
        du = _rotmat_vjp(u, dm * s[..., None, :])
        return (du - u * (u * du).sum(-1, keepdim=True)) / n, (dm * r).sum(-2)


class QuatScaleCovBad(QuatScaleCov):
    @staticmethod
    def backward(ctx, g):
        q, s = ctx.saved_tensors
        u = q / q.norm(dim=-1, keepdim=True)
        r = _rotmat(u)
        dm = (g + g.transpose(-1, -2)) @ (r * s[..., None, :])
        return _rotmat_vjp(u, dm * s[..., None, :]), (dm * r).sum(-2)


add(
    "gsplat_quat_covar_11",
    lambda q, s: QuatScaleCovBad.apply(q, s),
    lambda q, s: QuatScaleCov.apply(q, s),
    lambda: (randn(3, 4, seed=201), rand(3, 3, seed=202, lo=0.3, hi=1.5)),
    "Forward normalises the quaternion, backward does not differentiate the normalisation (no "
    "projection, no 1/|q|); shows at the sample (non-unit quaternions).",
    "https://github.com/nerfstudio-project/gsplat/issues/153",
)


# 2x2 covariance -> conic
class Conic(Function):
    @staticmethod
    def forward(ctx, cov):
        ctx.save_for_backward(cov)
        a, b, c = cov.unbind(-1)
        return torch.stack([c, -b, a], -1) / (a * c - b * b)[..., None]

    @staticmethod
    def _grads(cov, g):
        a, b, c = cov.unbind(-1)
        p = torch.stack([c, -b, -b, a], -1).unflatten(-1, (2, 2)) / (a * c - b * b)[..., None, None]
        gm = torch.stack([g[..., 0], g[..., 1] / 2, g[..., 1] / 2, g[..., 2]], -1).unflatten(
            -1, (2, 2)
        )
        return -(p @ gm @ p)

    @staticmethod
    def backward(ctx, g):
        (cov,) = ctx.saved_tensors
        d = Conic._grads(cov, g)
        return torch.stack([d[..., 0, 0], 2 * d[..., 0, 1], d[..., 1, 1]], -1)


class ConicBad(Conic):
    @staticmethod
    def backward(ctx, g):
        (cov,) = ctx.saved_tensors
        d = Conic._grads(cov, g)
        return torch.stack([d[..., 0, 0], d[..., 0, 1], d[..., 1, 1]], -1)


add(
    "conic_inverse_11",
    lambda c: ConicBad.apply(c),
    lambda c: Conic.apply(c),
    lambda: (leaf([[1.0, 0.2, 0.7], [2.0, -0.6, 1.1], [0.6, 0.1, 0.9]]),),
    "The off-diagonal entry stands for two elements of the symmetric covariance but gets the "
    "gradient of one (factor 2 missing); shows at the sample.",
    "https://github.com/nerfstudio-project/gsplat/pull/136",
)


# alpha compositing
class Composite(Function):
    """alpha (R,N), color (R,N,C) front to back -> (R,C)."""

    @staticmethod
    def forward(ctx, alpha, color):
        ctx.save_for_backward(alpha, color)
        t = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha[:, :-1]], 1), 1)
        return ((t * alpha)[..., None] * color).sum(1)

    @staticmethod
    def backward(ctx, g):
        alpha, color = ctx.saved_tensors
        t = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha[:, :-1]], 1), 1)
        gc = (color * g[:, None]).sum(-1)
        behind, da = torch.zeros_like(gc[:, 0]), [None] * alpha.shape[1]
        for i in range(alpha.shape[1] - 1, -1, -1):
            da[i] = t[:, i] * (gc[:, i] - behind)
            behind = alpha[:, i] * gc[:, i] + (1 - alpha[:, i]) * behind
        return torch.stack(da, 1), (t * alpha)[..., None] * g[:, None]


class CompositeBad(Composite):
    @staticmethod
    def backward(ctx, g):
        alpha, color = ctx.saved_tensors
        t = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha[:, :-1]], 1), 1)
        w = t * alpha
        gc = (color * g[:, None]).sum(-1)
        wc = w * gc
        behind = wc.sum(1, keepdim=True) - wc.cumsum(1)
        da = t * gc - behind / (1 - alpha).clamp_min(1e-10)
        return da, w[..., None] * g[:, None]


add(
    "alpha_composite_11",
    lambda a, c: CompositeBad.apply(a, c),
    lambda a, c: Composite.apply(a, c),
    lambda: (rand(2, 4, seed=203, lo=0.1, hi=0.8), rand(2, 4, 3, seed=204)),
    "The colour behind a sample is recovered by dividing by 1-alpha (clamped); at a fully "
    "opaque sample (alpha exactly 1) everything behind is already multiplied by 0 and its "
    "gradient loses that term.",
    "own",
)


# quaternion -> axis-angle
class QuatLog(Function):
    """wxyz quaternion of any length -> rotation vector with angle in [-pi, pi]."""

    @staticmethod
    def forward(ctx, q):
        w, v = q[..., :1], q[..., 1:]
        sg = torch.where(w < 0, -torch.ones_like(w), torch.ones_like(w))
        s2 = (v * v).sum(-1, keepdim=True)
        s = s2.sqrt()
        small = s2 < 1e-8 * w * w
        k = 2 * torch.atan2(s * sg, w * sg) / torch.where(s2 > 0, s, torch.ones_like(s))
        ws = torch.where(small, w, torch.ones_like(w))
        k = torch.where(small, 2 / ws * (1 - s2 / (3 * ws * ws)), k)
        ctx.save_for_backward(q, k)
        return v * k

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k = ctx.saved_tensors
        w, v = q[..., :1], q[..., 1:]
        s2 = (v * v).sum(-1, keepdim=True)
        n2 = s2 + w * w
        small = s2 < 1e-8 * w * w
        ws = torch.where(small, w, torch.ones_like(w))
        kv = torch.where(
            small, -4 / (3 * ws**3), (2 * w / n2 - k) / torch.where(small, torch.ones_like(s2), s2)
        )
        gv = (g * v).sum(-1, keepdim=True)
        return torch.cat([-2 / n2 * gv, g * k + v * kv * gv], -1)


class QuatLogBad(QuatLog):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k = ctx.saved_tensors
        w, v = q[..., :1], q[..., 1:]
        s2 = (v * v).sum(-1, keepdim=True)
        n2 = s2 + w * w
        at0 = s2 == 0  # identity: k is 2 there
        k = torch.where(at0, torch.full_like(k, 2.0), k)
        kv = torch.where(
            at0, torch.zeros_like(k), (2 * w / n2 - k) / torch.where(at0, torch.ones_like(s2), s2)
        )
        gv = (g * v).sum(-1, keepdim=True)
        return torch.cat([-2 / n2 * gv, g * k + v * kv * gv], -1)


add(
    "quat_log_identity_11",
    lambda q: QuatLogBad.apply(q),
    lambda q: QuatLog.apply(q),
    lambda: (randn(3, 4, seed=205),),
    "At an identity rotation the factor 2/w is taken as 2; right at (1,0,0,0), wrong sign at "
    "(-1,0,0,0) and wrong size at (2,0,0,0), which are the same rotation.",
    "https://github.com/kornia/kornia/issues/4237",
)


# 1-D sampling with reflection
def _reflect(x, span):
    t = torch.remainder(x.abs(), 2 * span)
    back = t > span
    sign = torch.where(x < 0, -1.0, 1.0) * torch.where(back, -1.0, 1.0)
    return torch.where(back, 2 * span - t, t), sign.to(x.dtype)


class ReflectSample(Function):
    """img (C,W) sampled linearly at pixel coordinates x (P,), reflected at 0 and W-1."""

    @staticmethod
    def _setup(img, x):
        if img.shape[1] < 2:
            raise ValueError("need at least two pixels")
        xr, sign = _reflect(x, img.shape[1] - 1)
        i = xr.detach().floor().clamp(0, img.shape[1] - 2).long()
        return xr - i, sign, i

    @staticmethod
    def forward(ctx, img, x):
        ctx.save_for_backward(img, x)
        f, _, i = ReflectSample._setup(img, x)
        return img[:, i] * (1 - f) + img[:, i + 1] * f

    @staticmethod
    def backward(ctx, g):
        img, x = ctx.saved_tensors
        f, sign, i = ReflectSample._setup(img, x)
        dimg = torch.zeros_like(img).index_add(1, i, g * (1 - f)).index_add(1, i + 1, g * f)
        return dimg, ((img[:, i + 1] - img[:, i]) * g).sum(0) * sign


class ReflectSampleBad(ReflectSample):
    @staticmethod
    def backward(ctx, g):
        img, x = ctx.saved_tensors
        f, _sign, i = ReflectSample._setup(img, x)
        dimg = torch.zeros_like(img).index_add(1, i, g * (1 - f)).index_add(1, i + 1, g * f)
        return dimg, ((img[:, i + 1] - img[:, i]) * g).sum(0)


add(
    "reflect_sample1d_11",
    lambda im, x: ReflectSampleBad.apply(im, x),
    lambda im, x: ReflectSample.apply(im, x),
    lambda: (randn(2, 6, seed=206), leaf([0.3, 2.6, 4.45, 1.2])),
    "The coordinate gradient lacks the sign change of the reflection; right for coordinates "
    "inside [0, W-1], negated for those just outside (-0.4, W-0.3).",
    "https://github.com/pytorch/pytorch/issues/23925",
)


# bilinear grid sample
class GridSample(Function):
    """img (H,W), grid (P,2) of (x,y) in [-1,1], bilinear, zeros outside, align_corners=False."""

    @staticmethod
    def _corners(img, grid):
        h, w = img.shape
        x = ((grid[:, 0] + 1) * w - 1) / 2
        y = ((grid[:, 1] + 1) * h - 1) / 2
        x0, y0 = x.detach().floor(), y.detach().floor()
        out = []
        for dy in (0, 1):
            for dx in (0, 1):
                xi, yi = (x0 + dx).long(), (y0 + dy).long()
                ok = ((xi >= 0) & (xi < w) & (yi >= 0) & (yi < h)).to(img.dtype)
                lin = yi.clamp(0, h - 1) * w + xi.clamp(0, w - 1)
                wx, wy = (x - x0 if dx else 1 - (x - x0)), (y - y0 if dy else 1 - (y - y0))
                out.append((lin, ok, wx, wy, 2 * dx - 1, 2 * dy - 1))
        return out

    @staticmethod
    def forward(ctx, img, grid):
        ctx.save_for_backward(img, grid)
        flat = img.reshape(-1)
        return sum(
            flat[at] * ok * wx * wy for at, ok, wx, wy, _, _ in GridSample._corners(img, grid)
        )

    @staticmethod
    def _bwd(ctx, g, sx, sy):
        img, grid = ctx.saved_tensors
        flat, dflat = img.reshape(-1), torch.zeros(img.numel(), dtype=img.dtype)
        gx = gy = 0
        for at, ok, wx, wy, ux, uy in GridSample._corners(img, grid):
            dflat = dflat.index_add(0, at, g * ok * wx * wy)
            gx = gx + flat[at] * ok * wy * ux
            gy = gy + flat[at] * ok * wx * uy
        return dflat.view_as(img), torch.stack([gx * g * sx, gy * g * sy], 1)

    @staticmethod
    def backward(ctx, g):
        h, w = ctx.saved_tensors[0].shape
        return GridSample._bwd(ctx, g, w / 2, h / 2)


class GridSampleBad(GridSample):
    @staticmethod
    def backward(ctx, g):
        h, w = ctx.saved_tensors[0].shape
        return GridSample._bwd(ctx, g, (w - 1) / 2, (h - 1) / 2)


add(
    "grid_sample_scale_11",
    lambda im, gr: GridSampleBad.apply(im, gr),
    lambda im, gr: GridSample.apply(im, gr),
    lambda: (randn(4, 5, seed=207), rand(4, 2, seed=208, lo=-0.9, hi=0.9)),
    "The grid gradient is scaled by (size-1)/2, the factor of align_corners=True, while "
    "forward unnormalises with size/2; shows at the sample.",
    "own (cf. https://github.com/NVlabs/stylegan3/issues/220)",
)


# chamfer distance
class Chamfer(Function):
    @staticmethod
    def forward(ctx, x, y):
        d = (x[:, None] - y[None]).square().sum(-1)
        dx, ix = d.min(1)
        dy, iy = d.min(0)
        ctx.save_for_backward(x, y, ix, iy)
        return dx.mean() + dy.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, y, ix, iy = ctx.saved_tensors
        ax = 2 * g / x.shape[0] * (x - y[ix])
        ay = 2 * g / y.shape[0] * (y - x[iy])
        return ax.index_add(0, iy, -ay), ay.index_add(0, ix, -ax)


class ChamferBad(Chamfer):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, y, ix, iy = ctx.saved_tensors
        ax = 2 * g / x.shape[0] * (x - y[ix])
        ay = 2 * g / y.shape[0] * (y - x[iy])
        gx, gy = ax.clone(), ay.clone()
        gx[iy] -= ay
        gy[ix] -= ax
        return gx, gy


def _chamfer_inputs():
    y = randn(5, 3, seed=209, scale=2.0, grad=False)
    x = y[torch.tensor([3, 0, 4, 1, 2])] + randn(5, 3, seed=210, scale=0.05, grad=False)
    return x.requires_grad_(), y.requires_grad_()


add(
    "chamfer_11",
    lambda x, y: ChamferBad.apply(x, y),
    lambda x, y: Chamfer.apply(x, y),
    _chamfer_inputs,
    "Gradients to matched points are subtracted by indexed assignment, which keeps only one "
    "of several; right when the matching is one to one, wrong when two points share a nearest "
    "neighbour (as with clouds of different sizes).",
    "own",
)


# PReLU that keeps its output
class PReLU(Function):
    @staticmethod
    def forward(ctx, x, w):
        need_dim(x, 2)
        ctx.save_for_backward(x, w)
        return torch.where(x > 0, x, w * x)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        z = torch.zeros_like(x)
        return torch.where(x > 0, g, w * g), torch.where(x > 0, z, g * x).sum(0)


class PReLUBad(Function):
    @staticmethod
    def forward(ctx, x, w):
        need_dim(x, 2)
        y = torch.where(x > 0, x, w * x)
        ctx.save_for_backward(y, w)  # x can be had back from y
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, w = ctx.saved_tensors
        x = torch.where(y > 0, y, y / w)
        return torch.where(y > 0, g, w * g), torch.where(y > 0, torch.zeros_like(x), g * x).sum(0)


add(
    "prelu_saved_output_11",
    lambda x, w: PReLUBad.apply(x, w),
    lambda x, w: PReLU.apply(x, w),
    lambda: (randn(4, 3, seed=211), leaf([0.25, 0.1, 0.5])),
    "Only the output is kept and its sign taken for the input's; right for positive slopes, "
    "wrong once a learned slope is negative (e.g. w=-0.3, then negative inputs give positive "
    "outputs).",
    "https://github.com/pytorch/pytorch/issues/31938",
)


# sigmoid focal loss
class Focal(Function):
    @staticmethod
    def _parts(x, t):
        xf = up(x)
        s = 2 * t - 1
        pt = torch.sigmoid(s * xf)
        return s, pt, torch.nn.functional.softplus(-s * xf)

    @staticmethod
    def forward(ctx, x, t, alpha, gamma):
        ctx.save_for_backward(x, t)
        ctx.a = (alpha, gamma)
        t = up(t)
        _s, pt, ce = Focal._parts(x, t)
        at = alpha * t + (1 - alpha) * (1 - t)
        return (at * (1 - pt) ** gamma * ce).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors
        alpha, gamma = ctx.a
        t = up(t)
        s, pt, ce = Focal._parts(x, t)
        at = alpha * t + (1 - alpha) * (1 - t)
        d = -s * at * (1 - pt) ** gamma * ((1 - pt) + gamma * pt * ce)
        return (up(g) * d).to(x.dtype), None, None, None


class FocalBad(Focal):
    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors
        alpha, gamma = ctx.a
        t = up(t)
        s, pt, _ce = Focal._parts(x, t)
        at = alpha * t + (1 - alpha) * (1 - t)
        d = -s * at * (1 - pt) ** gamma * (1 - pt)
        return (up(g) * d).to(x.dtype), None, None, None


add(
    "focal_loss_11",
    lambda x, t, alpha=0.25, gamma=2.0: FocalBad.apply(x, t, alpha, gamma),
    lambda x, t, alpha=0.25, gamma=2.0: Focal.apply(x, t, alpha, gamma),
    lambda: (randn(4, 3, seed=212), (rand(4, 3, seed=213, grad=False) > 0.5).double()),
    "The modulating factor (1-p)^gamma is treated as a constant weight; shows at the sample, "
    "right only for gamma=0.",
    "own",
)


# dice loss with squared denominator
class Dice(Function):
    @staticmethod
    def forward(ctx, p, t, smooth):
        need_dim(p, 2)
        ctx.save_for_backward(p, t)
        ctx.smooth = smooth
        i, d = 2 * (p * t).sum(-1) + smooth, (p * p).sum(-1) + (t * t).sum(-1) + smooth
        return 1 - i / d

    @staticmethod
    def _bwd(ctx, g, k):
        p, t = ctx.saved_tensors
        i = (2 * (p * t).sum(-1) + ctx.smooth)[:, None]
        d = ((p * p).sum(-1) + (t * t).sum(-1) + ctx.smooth)[:, None]
        return -g[:, None] * (2 * t * d - i * k * p) / (d * d), None, None

    @staticmethod
    def backward(ctx, g):
        return Dice._bwd(ctx, g, 2)


class DiceBad(Dice):
    @staticmethod
    def backward(ctx, g):
        return Dice._bwd(ctx, g, 1)


add(
    "dice_squared_11",
    lambda p, t, smooth=1.0: DiceBad.apply(p, t, smooth),
    lambda p, t, smooth=1.0: Dice.apply(p, t, smooth),
    lambda: (rand(2, 6, seed=214), (rand(2, 6, seed=215, grad=False) > 0.5).double()),
    "The squared prediction in the denominator is differentiated as p instead of 2p; shows at "
    "the sample.",
    "own",
)


# spherical harmonics l=2
_S3 = math.sqrt(3.0)


class SphHarm2(Function):
    @staticmethod
    def forward(ctx, r):
        ctx.save_for_backward(r)
        x, y, z = r.unbind(-1)
        return torch.stack(
            [
                _S3 * x * z,
                _S3 * x * y,
                y * y - (x * x + z * z) / 2,
                _S3 * y * z,
                _S3 / 2 * (z * z - x * x),
            ],
            -1,
        )

    @staticmethod
    def backward(ctx, g):
        (r,) = ctx.saved_tensors
        x, y, z = r.unbind(-1)
        a, b, c, d, e = g.unbind(-1)
        return torch.stack(
            [
                _S3 * (z * a + y * b - x * e) - x * c,
                _S3 * (x * b + z * d) + 2 * y * c,
                _S3 * (x * a + y * d + z * e) - z * c,
            ],
            -1,
        )


class SphHarm2Bad(SphHarm2):
    @staticmethod
    def backward(ctx, g):
        (r,) = ctx.saved_tensors
        x, y, z = r.unbind(-1)
        a, b, c, d, e = g.unbind(-1)
        return torch.stack(
            [
                _S3 * (z * a + y * b - x * e),
                _S3 * (x * b + z * d) + 3 * y * c,
                _S3 * (x * a + y * d + z * e),
            ],
            -1,
        )


add(
    "sph_harm_l2_11",
    lambda r: SphHarm2Bad.apply(r),
    lambda r: SphHarm2.apply(r),
    lambda: (randn(4, 3, seed=216),),
    "The zonal component y^2-(x^2+z^2)/2 is differentiated as (3y^2-1)/2, which agrees with "
    "it only on the unit sphere (tangentially); shows at the sample.",
    "own",
)
