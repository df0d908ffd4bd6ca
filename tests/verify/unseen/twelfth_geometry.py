"""Rotations, renderers, boxes, point sets, molecules."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twelfth import add, as_forward, in_float32, recorded, wide


def _cross(a, b):
    return torch.linalg.cross(a, b, dim=-1)


class Rotate(Function):
    @staticmethod
    def turn(w, r, v):
        t = 2 * _cross(r, v)
        return v + w * t + _cross(r, t)

    @staticmethod
    def forward(ctx, q, v):
        ctx.save_for_backward(q, v)
        u = q / q.norm(dim=-1, keepdim=True)
        return Rotate.turn(u[..., :1], u[..., 1:], v)

    @staticmethod
    def unit_gradient(u, v, g):
        w, r = u[..., :1], u[..., 1:]
        rv, rg = (r * v).sum(-1, keepdim=True), (r * g).sum(-1, keepdim=True)
        grad_w = 2 * (g * _cross(r, v)).sum(-1, keepdim=True)
        grad_r = 2 * (w * _cross(v, g) + g * rv + v * rg - 2 * r * (g * v).sum(-1, keepdim=True))
        return torch.cat([grad_w, grad_r], -1), Rotate.turn(-w, r, g)

    @staticmethod
    def backward(ctx, g):
        q, v = ctx.saved_tensors
        norm = q.norm(dim=-1, keepdim=True)
        u = q / norm
        grad_u, grad_v = Rotate.unit_gradient(u, v, g)
        return (grad_u - u * (u * grad_u).sum(-1, keepdim=True)) / norm, grad_v


class RotateUnprojected(Rotate):
    @staticmethod
    def backward(ctx, g):
        q, v = ctx.saved_tensors
        norm = q.norm(dim=-1, keepdim=True)
        grad_u, grad_v = Rotate.unit_gradient(q / norm, v, g)
        return grad_u / norm, grad_v


def _rotate(function):
    def quaternion_rotate(q, v):
        """Rotate v (N, 3) by the nonzero quaternions q (N, 4), real part first, which are normalised here."""
        return function.apply(q, v)

    return quaternion_rotate


add(
    "quaternion_norm",
    _rotate,
    RotateUnprojected,
    Rotate,
    lambda: (real(2, 4), real(2, 3, seed=1)),
    bug="backward through the normalisation divides by the norm and does not project",
    trigger="the sample",
)


class Exponential(Function):
    """Rodrigues: R = I + a K + b K², a = sin θ / θ, b = (1 - cos θ) / θ²."""

    @staticmethod
    def hat(w):
        x, y, z = w.unbind(-1)
        o = torch.zeros_like(x)
        return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))

    @staticmethod
    def coefficients(w):
        """a, b and their derivatives by θ²; by their series, cut at θ¹⁰, where θ² < 0.1."""
        s = w.square().sum(-1)[..., None, None]
        small = s < 0.1
        t = torch.where(small, 1, s)
        r = t.sqrt()
        sin, cos = r.sin(), r.cos()
        s = torch.where(small, s, 0)
        a = 1 - s / 6 * (1 - s / 20 * (1 - s / 42 * (1 - s / 72 * (1 - s / 110))))
        b = 0.5 - s / 24 * (1 - s / 30 * (1 - s / 56 * (1 - s / 90 * (1 - s / 132))))
        da = -1 / 6 + s / 60 * (1 - s / 28 * (1 - s / 54 * (1 - s / 88)))
        db = -1 / 24 + s / 360 * (1 - s * 3 / 112 * (1 - s * 2 / 135 * (1 - s * 5 / 528)))
        return (
            torch.where(small, a, sin / r),
            torch.where(small, b, (1 - cos) / t),
            torch.where(small, da, (r * cos - sin) / (2 * r * t)),
            torch.where(small, db, (r * sin - 2 * (1 - cos)) / (2 * t.square())),
        )

    @staticmethod
    @recorded
    def forward(ctx, w):
        ctx.save_for_backward(w)
        dtype, w = w.dtype, wide(w)
        a, b, _, _ = Exponential.coefficients(w)
        k = Exponential.hat(w)
        return (torch.eye(3, dtype=w.dtype, device=w.device) + a * k + b * (k @ k)).to(dtype)

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx, g):
        w, g = wide(ctx.saved_tensors[0]), wide(g)
        a, b, da, db = Exponential.coefficients(w)
        k = Exponential.hat(w)
        grad_k = a * g + b * (k.mT @ g + g @ k.mT)
        grad_s = (g * (da * k + db * (k @ k))).sum((-1, -2))
        axis = [grad_k[..., i, j] - grad_k[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0))]
        return torch.stack(axis, -1) + 2 * w * grad_s[..., None]


class ExponentialIdentity(Exponential):
    """The angle's safe norm is constant at 0, and with it everything that is multiplied by it."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (w,) = ctx.saved_tensors
        grad = Exponential.backward(ctx, g)
        return grad.masked_fill((w == 0).all(-1, keepdim=True), 0)


def _exponential(function):
    @in_float32
    def so3_exp(w):
        """Rotation matrices (N, 3, 3) of the rotation vectors w (N, 3); the identity at 0."""
        return function.apply(w)

    return so3_exp


add(
    "so3_identity",
    _exponential,
    ExponentialIdentity,
    Exponential,
    lambda: (real(2, 3),),
    bug="the gradient is 0 at the identity",
    trigger="a zero rotation vector, where an optimisation starts",
)


class Composite(Function):
    """Front to back: Σ T_k α_k c_k + T background, T_k the product of the 1 - α before k."""

    @staticmethod
    def transmittance(alpha):
        """T_0, ..., T_K, one more than there are layers."""
        return torch.cat([torch.ones_like(alpha[:, :1]), (1 - alpha).cumprod(1)], 1)

    @staticmethod
    def forward(ctx, alpha, colour, background):
        t = Composite.transmittance(alpha)
        ctx.save_for_backward(alpha, colour, background)
        out = ((t[:, :-1] * alpha)[..., None] * colour).sum(1)
        return out if background is None else out + t[:, -1:] * background

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        alpha, colour, background = ctx.saved_tensors
        t = Composite.transmittance(alpha)
        behind = torch.zeros_like(g) if background is None else background.expand_as(g)
        grad_alpha = torch.zeros_like(alpha)
        for k in reversed(range(alpha.shape[1])):
            grad_alpha[:, k] = t[:, k] * ((colour[:, k] - behind) * g).sum(-1)
            behind = alpha[:, k, None] * colour[:, k] + (1 - alpha[:, k, None]) * behind
        grad_colour = (t[:, :-1] * alpha)[..., None] * g[:, None]
        return grad_alpha, grad_colour, None if background is None else (t[:, -1:] * g).sum(0)


class CompositeTwice(Composite):
    """The pixel already holds the background, and its share is taken off once more."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        alpha, _, background = ctx.saved_tensors
        grad_alpha, *others = Composite.backward(ctx, g)
        if background is not None:
            last = Composite.transmittance(alpha)[:, -1:]
            grad_alpha = grad_alpha - last / (1 - alpha) * (background * g).sum(-1, keepdim=True)
        return grad_alpha, *others


def _composite(function):
    def composite(alpha, colour, background=None):
        """Blend K layers front to back: alpha (P, K) in [0, 1], colour (P, K, C), background (C,); returns (P, C)."""
        return function.apply(alpha, colour, background)

    return composite


add(
    "splat_background",
    _composite,
    CompositeTwice,
    Composite,
    lambda: (real(2, 3, grad=False).sigmoid().requires_grad_(), real(2, 3, 2, seed=1)),
    bug="the background's share of alpha's gradient is counted twice",
    trigger="a background that is not black",
)


class Lookup(Function):
    @staticmethod
    def cell(table, x):
        i = x.detach().floor().clamp(0, len(table) - 2).long()
        return i, x.clamp(0, len(table) - 1) - i.to(x.dtype)

    @staticmethod
    def forward(ctx, table, x):
        ctx.save_for_backward(table, x)
        i, f = Lookup.cell(table, x)
        return table[i].lerp(table[i + 1], f[:, None])

    @staticmethod
    def inside(table, x):
        return (x >= 0) & (x <= len(table) - 1)

    @classmethod
    def gradients(cls, ctx, g):
        table, x = ctx.saved_tensors
        i, f = Lookup.cell(table, x)
        grad = torch.zeros_like(table).index_add(0, i, (1 - f)[:, None] * g)
        grad = grad.index_add(0, i + 1, f[:, None] * g)
        return grad, (g * (table[i + 1] - table[i])).sum(-1) * cls.inside(table, x)

    @staticmethod
    def backward(ctx, g):
        return Lookup.gradients(ctx, g)


class LookupBeyond(Lookup):
    @staticmethod
    def inside(table, x):
        return torch.ones_like(x)

    @staticmethod
    def backward(ctx, g):
        return LookupBeyond.gradients(ctx, g)


def _lookup(function):
    def interpolate_table(table, x):
        """Linear interpolation between the rows of table (L, C), L > 1, at x (N,); constant outside of [0, L - 1]."""
        return function.apply(table, x)

    return interpolate_table


add(
    "lookup_border",
    _lookup,
    LookupBeyond,
    Lookup,
    lambda: (
        real(4, 2),
        torch.tensor([0.3, 1.6, 2.9, 1.2], dtype=torch.float64, requires_grad=True),
    ),
    bug="a position outside has the slope of the border cell, though it was clamped",
    trigger="positions outside of the table",
)


class BoxMean(Function):
    @staticmethod
    def forward(ctx, feature, boxes):
        ctx.save_for_backward(boxes)
        ctx.shape = feature.shape
        out = feature.new_empty(len(boxes), feature.shape[1])
        for k, (n, top, left, bottom, right) in enumerate(boxes.tolist()):
            out[k] = feature[n, :, top:bottom, left:right].mean((-1, -2))
        return out

    @staticmethod
    def image(n):
        return n

    @classmethod
    def gradients(cls, ctx, g):
        (boxes,) = ctx.saved_tensors
        g = wide(g)
        grad = g.new_zeros(ctx.shape)
        for k, (n, top, left, bottom, right) in enumerate(boxes.tolist()):
            area = (bottom - top) * (right - left)
            grad[cls.image(n), :, top:bottom, left:right] += (g[k] / area)[:, None, None]
        return grad, None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return BoxMean.gradients(ctx, g)


class BoxMeanFirstImage(BoxMean):
    @staticmethod
    def image(n):
        return 0

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return BoxMeanFirstImage.gradients(ctx, g)


def _box_mean(function):
    def box_mean(feature, boxes):
        """Mean of feature (N, C, H, W) in boxes (K, 5): image, top, left, bottom, right, whole numbers, not empty."""
        return function.apply(feature, boxes)

    return box_mean


add(
    "box_image",
    _box_mean,
    BoxMeanFirstImage,
    BoxMean,
    lambda: (real(2, 2, 4, 4), torch.tensor([[0, 0, 0, 2, 3], [0, 1, 1, 4, 4]])),
    bug="every box's gradient goes to the first image",
    trigger="a box in another image of the batch",
)


class Chamfer(Function):
    @staticmethod
    def nearest(x, y):
        square = (x[:, None] - y).square().sum(-1)
        return square.min(1), square.min(0)

    @staticmethod
    def forward(ctx, x, y):
        (to_y, i), (to_x, j) = Chamfer.nearest(x, y)
        ctx.save_for_backward(x, y, i, j)
        return to_y.mean() + to_x.mean()

    @staticmethod
    def scatter(grad, index, value):
        return grad.index_add(0, index, value)

    @classmethod
    def gradients(cls, ctx, g):
        x, y, i, j = ctx.saved_tensors
        pull_x = 2 * g * (x - y[i]) / len(x)
        pull_y = 2 * g * (y - x[j]) / len(y)
        return cls.scatter(pull_x, j, -pull_y), cls.scatter(pull_y, i, -pull_x)

    @staticmethod
    def backward(ctx, g):
        return Chamfer.gradients(ctx, g)


class ChamferOverwritten(Chamfer):
    @staticmethod
    def scatter(grad, index, value):
        return grad.index_put((index,), grad[index] + value)  # grad[index] += value

    @staticmethod
    def backward(ctx, g):
        return ChamferOverwritten.gradients(ctx, g)


def _chamfer(function):
    def chamfer_distance(x, y):
        """Mean squared distance to the nearest point, x (N, D) to y (M, D) and back; neither is empty."""
        return function.apply(x, y)

    return chamfer_distance


add(
    "chamfer_shared",
    _chamfer,
    ChamferOverwritten,
    Chamfer,
    lambda: (
        (3 * torch.eye(3, dtype=torch.float64)).requires_grad_(),
        (3 * torch.eye(3, dtype=torch.float64) + 0.3 * real(3, 3, grad=False)).requires_grad_(),
    ),
    bug="of the points that share a nearest neighbour one gives it its gradient",
    trigger="two points with one nearest neighbour",
)


class Pairs(Function):
    """Lennard-Jones energy; its gradient is differentiated again when forces are fitted."""

    @staticmethod
    def difference(x):
        d = x[:, None] - x
        square = d.square().sum(-1) + torch.eye(len(x), dtype=x.dtype, device=x.device)
        off = 1 - torch.eye(len(x), dtype=x.dtype, device=x.device)
        return d, square, off

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        _, square, off = Pairs.difference(x)
        p = square.pow(-3)
        return 2 * (off * (p.square() - p)).sum()

    @staticmethod
    def force(x, g):
        d, square, off = Pairs.difference(x)
        p = square.pow(-3)
        slope = off * (p - 2 * p.square()) / square
        return 24 * g * (slope[..., None] * d).sum(1)

    @staticmethod
    def backward(ctx, g):
        return Pairs.force(ctx.saved_tensors[0], g)


class PairsDetached(Pairs):
    @staticmethod
    def backward(ctx, g):
        return Pairs.force(ctx.saved_tensors[0].detach(), g)


def _pairs(function):
    def pair_energy(x):
        """Lennard-Jones energy of the points x (N, 3), no two of them in one place; twice differentiable."""
        return function.apply(x)

    return pair_energy


add(
    "energy_detached",
    _pairs,
    PairsDetached,
    Pairs,
    lambda: ((1.5 * torch.eye(4, 3, dtype=torch.float64)).requires_grad_(),),
    bug="backward detaches the positions: the force does not depend on them",
    trigger="a second derivative (a loss on forces)",
)


class Leapfrog(Function):
    """Kick, drift, kick in the potential k q² / 2; backward runs the steps back instead of keeping them."""

    @staticmethod
    def forward(ctx, q, p, k, dt, steps):
        for _ in range(steps):
            p = p - dt / 2 * k * q
            q = q + dt * p
            p = p - dt / 2 * k * q
        ctx.save_for_backward(q, p, k, dt)
        ctx.steps = steps
        return q, p

    @staticmethod
    def last_kick(grad_p, k, q):
        return -(grad_p * k * q).sum() / 2

    @classmethod
    def gradients(cls, ctx, grad_q, grad_p):
        q, p, k, dt = ctx.saved_tensors
        grad_k, grad_dt = torch.zeros_like(k), torch.zeros_like(dt)
        for _ in range(ctx.steps):
            grad_dt = grad_dt + cls.last_kick(grad_p, k, q)
            grad_k = grad_k - dt / 2 * q * grad_p
            grad_q = grad_q - dt / 2 * k * grad_p
            p = p + dt / 2 * k * q
            grad_dt = grad_dt + (p * grad_q).sum()
            grad_p = grad_p + dt * grad_q
            q = q - dt * p
            grad_dt = grad_dt - (grad_p * k * q).sum() / 2
            grad_k = grad_k - dt / 2 * q * grad_p
            grad_q = grad_q - dt / 2 * k * grad_p
            p = p + dt / 2 * k * q
        return grad_q, grad_p, grad_k, grad_dt, None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_p):
        return Leapfrog.gradients(ctx, grad_q, grad_p)


class LeapfrogLastKick(Leapfrog):
    @staticmethod
    def last_kick(grad_p, k, q):
        return 0

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_p):
        return LeapfrogLastKick.gradients(ctx, grad_q, grad_p)


def _leapfrog(function):
    def leapfrog(q, p, k, dt, steps=2):
        """Steps of leapfrog of positions q and momenta p on springs k, all (D,); dt is 0-dim. Returns q, p."""
        return function.apply(q, p, k, dt, steps)

    return leapfrog


add(
    "leapfrog_step",
    _leapfrog,
    LeapfrogLastKick,
    Leapfrog,
    lambda: (
        real(3),
        real(3, seed=1),
        real(3, seed=2, positive=True),
        torch.tensor(0.2, dtype=torch.float64, requires_grad=True),
    ),
    bug="the last kick is left out of the step size's gradient",
    trigger="the sample",
)
