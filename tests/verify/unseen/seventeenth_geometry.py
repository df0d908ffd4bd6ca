"""Points, meshes and rotations."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.seventeenth import add
from tests.verify.unseen.sixteenth import expect


class FrameError(Function):
    """Points in the frames' own coordinates are compared."""

    @staticmethod
    def errors(r, t, x, target):
        local = torch.einsum("nfji,nfpj->nfpi", r, x[:, None] - t[:, :, None])
        return local - target, ((local - target).square().sum(-1) + 1e-4).sqrt()

    @staticmethod
    def forward(ctx, r, t, x, target, limit, scale):
        ctx.save_for_backward(r, t, x, target)
        ctx.options = limit, scale
        return FrameError.errors(r, t, x, target)[1].clamp(max=limit).mean() / scale

    @staticmethod
    def gradients(ctx, g, scale):
        r, t, x, target = ctx.saved_tensors
        d, e = FrameError.errors(r, t, x, target)
        inside = (e <= ctx.options[0])[..., None]
        d = g / scale / e.numel() * d / e[..., None] * inside
        moved = torch.einsum("nfij,nfpj->nfpi", r, d)
        grad_r = torch.einsum("nfpj,nfpi->nfji", x[:, None] - t[:, :, None], d)
        return grad_r, -moved.sum(2), moved.sum(1), -d, None, None

    @staticmethod
    def backward(ctx, g):
        return FrameError.gradients(ctx, g, ctx.options[1])


class FrameErrorScale(FrameError):
    @staticmethod
    def backward(ctx, g):
        return FrameError.gradients(ctx, g, 1)


def _frame_error(function):
    def frame_error(r, t, x, target, limit=10.0, scale=10.0):
        """Mean over frames F and points P of min(√(|rᵀ(x - t) - target|² + 1e-4), limit) / scale.

        r (N, F, 3, 3), any matrices, t (N, F, 3), x (N, P, 3), target (N, F, P, 3), not empty; limit and scale
        from 0.1 to 100.
        """
        n, f, p = *t.shape[:2], x.shape[1]
        expect(r.shape == (n, f, 3, 3) and t.shape == (n, f, 3), "r (N, F, 3, 3)", tuple(r.shape))
        expect(
            x.shape == (n, p, 3) and target.shape == (n, f, p, 3) and target.numel(),
            "target (N, F, P, 3)",
            tuple(target.shape),
        )
        expect(0.1 <= limit <= 100 and 0.1 <= scale <= 100, "limit, scale", (limit, scale))
        return function.apply(r, t, x, target, limit, scale)

    return frame_error


add(
    "frame_error_scale",
    _frame_error,
    FrameErrorScale,
    FrameError,
    lambda: (
        real(1, 2, 3, 3),
        real(1, 2, 3, seed=1),
        real(1, 4, 3, seed=2),
        real(1, 2, 4, 3, seed=3, grad=False),
    ),
    bug="backward does not divide by the scale",
    shows="the sample",
)


class Superposition(Function):
    """The best rotation is a constant to the gradient."""

    @staticmethod
    def rotation(x, y, proper):
        u, s, v = torch.linalg.svd(x.mT @ y)
        flip = torch.ones_like(s)
        flip[:, 2] = torch.sign(torch.linalg.det(u @ v))
        distinct = s[:, 1] + flip[:, 2] * s[:, 2] > 1e-4 * s[:, 0]
        expect((distinct & (s[:, 0] > 0)).all(), "one best rotation", s)
        return u * flip[:, None] @ v if proper else u @ v

    @staticmethod
    def difference(x, y, proper=True):
        x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
        r = Superposition.rotation(x, y, proper)
        return x - y @ r.mT, r

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return Superposition.difference(x, y)[0].square().sum(-1).mean(1)

    @staticmethod
    def gradients(ctx, g, proper):
        d, r = Superposition.difference(*ctx.saved_tensors, proper)
        d = g[:, None, None] * 2 / d.shape[1] * d
        return d, -d @ r

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Superposition.gradients(ctx, g, True)


class SuperpositionMirror(Superposition):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Superposition.gradients(ctx, g, False)


def _superposition(function):
    def superposition(x, y):
        """Mean squared distances (N,) of points x and y (N, P, 3), P > 2, after the best rotation and translation.

        There is one best rotation: points are not on a line, and not equally far from several.
        """
        expect(
            x.dim() == 3 and x.shape == y.shape and x.shape[2] == 3 and x.shape[1] > 2,
            "x, y (N, P, 3), P > 2",
            tuple(y.shape),
        )
        return function.apply(x, y)

    return superposition


def superposition_sample():
    x = real(2, 5, 3, grad=False)
    return x.requires_grad_(), (x.detach().roll(1, -1) + real(2, 5, 3, seed=1) / 5).detach()


add(
    "superposition_mirror",
    _superposition,
    SuperpositionMirror,
    Superposition,
    superposition_sample,
    bug="backward's rotation is not kept from being a reflection",
    shows="y near the mirror image of x",
)


class Slerp(Function):
    @staticmethod
    def parts(a, b, t):
        na, nb = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (a, b))
        c = (a / na * b / nb).sum(-1, keepdim=True)
        return na, nb, c, c.acos(), t[:, None]

    @staticmethod
    def side(a, b, shortest):
        return torch.where((a * b).sum(-1, keepdim=True) < 0, -1, 1) if shortest else 1

    @staticmethod
    def forward(ctx, a, b, t, shortest):
        ctx.save_for_backward(a, b, t)
        ctx.shortest = shortest
        b = Slerp.side(a, b, shortest) * b
        _, _, _, w, t = Slerp.parts(a, b, t)
        return (((1 - t) * w).sin() * a + (t * w).sin() * b) / w.sin()

    @staticmethod
    def gradients(ctx, g, again):
        a, b, t = ctx.saved_tensors
        side = Slerp.side(a, b, ctx.shortest)
        b = side * b
        na, nb, c, w, t = Slerp.parts(a, b, t)
        s, on_a, on_b = w.sin(), (g * a).sum(-1, keepdim=True), (g * b).sum(-1, keepdim=True)
        wa, wb = (1 - t) * w, t * w
        of_w = on_a * ((1 - t) * wa.cos() * s - wa.sin() * w.cos())
        of_w = of_w + on_b * (t * wb.cos() * s - wb.sin() * w.cos())
        of_c = -of_w / s**3
        grad_a = wa.sin() / s * g + of_c * (b / nb - c * a / na) / na
        grad_b = wb.sin() / s * g + of_c * (a / na - c * b / nb) / nb
        grad_t = w / s * (wb.cos() * on_b - wa.cos() * on_a)
        return grad_a, again(side) * grad_b, grad_t[:, 0], None

    @staticmethod
    def backward(ctx, g):
        return Slerp.gradients(ctx, g, lambda side: side)


class SlerpSide(Slerp):
    @staticmethod
    def backward(ctx, g):
        return Slerp.gradients(ctx, g, lambda side: 1)


def _slerp(function):
    def slerp(a, b, t, shortest=True):
        """Spherical interpolation, at t (N,), from 0 to 1, of the rows of a and b (N, D), by the angle between them.

        The angle is between 0.1 and 3.04; shortest: -b in place of b where it is nearer to a, there from 0.1 to π / 2.
        """
        expect(
            a.dim() == 2 and a.shape == b.shape and t.shape == a.shape[:1],
            "a, b (N, D), t (N,)",
            tuple(t.shape),
        )
        expect(((t >= 0) & (t <= 1)).all(), "t from 0 to 1", t)
        expect((torch.cosine_similarity(a, b).abs() < 0.995).all(), "an angle from 0.1 to 3.04", b)
        return function.apply(a, b, t, shortest)

    return slerp


add(
    "slerp_side",
    _slerp,
    SlerpSide,
    Slerp,
    lambda: (
        real(3, 4, positive=True),
        real(3, 4, seed=1, positive=True),
        torch.tensor([0.2, 0.5, 0.9], dtype=F64, requires_grad=True),
    ),
    bug="the gradient of a row of b that was turned over is not",
    shows="rows more than π / 2 apart",
)


class MobiusAdd(Function):
    @staticmethod
    def parts(x, y, c):
        xy, xx, yy = ((a * b).sum(-1, keepdim=True) for a, b in ((x, y), (x, x), (y, y)))
        return xx, yy, 1 + 2 * c * xy + c * yy, 1 - c * xx, 1 + 2 * c * xy + c**2 * xx * yy

    @staticmethod
    def forward(ctx, x, y, c):
        ctx.save_for_backward(x, y)
        ctx.c = c
        _, _, a, b, d = MobiusAdd.parts(x, y, c)
        return (a * x + b * y) / d

    @staticmethod
    def gradients(ctx, g, square):
        x, y = ctx.saved_tensors
        c = ctx.c
        xx, yy, a, b, d = MobiusAdd.parts(x, y, c)
        u = g / d
        of_d = -(u * (a * x + b * y) / d).sum(-1, keepdim=True)
        of_a, of_b = (u * x).sum(-1, keepdim=True), (u * y).sum(-1, keepdim=True)
        of_xy = 2 * c * (of_a + of_d)
        of_xx, of_yy = square * yy * of_d - c * of_b, square * xx * of_d + c * of_a
        return a * u + of_xy * y + 2 * of_xx * x, b * u + of_xy * x + 2 * of_yy * y, None

    @staticmethod
    def backward(ctx, g):
        return MobiusAdd.gradients(ctx, g, ctx.c**2)


class MobiusAddOnce(MobiusAdd):
    @staticmethod
    def backward(ctx, g):
        return MobiusAdd.gradients(ctx, g, ctx.c)


def _mobius_add(function):
    def mobius_add(x, y, c=1.0):
        """Möbius addition in the ball of curvature -c, c from 0.1 to 4, of x and y (*, D), √c |x| < 0.99."""
        expect(x.dim() and x.shape == y.shape, "x, y (*, D)", tuple(y.shape))
        expect(0.1 <= c <= 4, "c from 0.1 to 4", c)
        inside = ((c * a.square().sum(-1) < 0.99**2).all() for a in (x, y))
        expect(all(inside), "points in the ball", x)
        return function.apply(x, y, c)

    return mobius_add


add(
    "mobius_add_curvature",
    _mobius_add,
    MobiusAddOnce,
    MobiusAdd,
    lambda: tuple((real(3, 2, seed=s, grad=False) / 5).requires_grad_() for s in (0, 1)),
    bug="a factor c is missing where the denominator has c²",
    shows="c other than 1",
)
