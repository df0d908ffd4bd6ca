"""Losses of fields and of places."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.seventeenth import add
from tests.verify.unseen.sixteenth import expect


class BendingEnergy(Function):
    STENCILS = (
        ((0, 1, 0), (0, -2, 0), (0, 1, 0)),
        ((0, 0, 0), (1, -2, 1), (0, 0, 0)),
        ((0.25, 0, -0.25), (0, 0, 0), (-0.25, 0, 0.25)),
    )

    @staticmethod
    def seconds(u):
        stencils = torch.tensor(BendingEnergy.STENCILS, dtype=u.dtype, device=u.device)[:, None]
        return stencils, F.conv2d(u.flatten(0, 1)[:, None], stencils)

    @staticmethod
    def weights(u, dy, dx):
        return u.new_tensor([dy**-4, dx**-4, 2 * (dx * dy) ** -2])[:, None, None]

    @staticmethod
    def forward(ctx, u, spacing):
        ctx.save_for_backward(u)
        ctx.spacing = spacing
        _, d = BendingEnergy.seconds(u)
        return (BendingEnergy.weights(u, *spacing) * d.square()).sum(1).mean()

    @staticmethod
    def gradients(ctx, g, spacing):
        (u,) = ctx.saved_tensors
        stencils, d = BendingEnergy.seconds(u)
        d = g * 2 / d[:, 0].numel() * BendingEnergy.weights(u, *spacing) * d
        return F.conv_transpose2d(d, stencils).view(u.shape), None

    @staticmethod
    def backward(ctx, g):
        return BendingEnergy.gradients(ctx, g, ctx.spacing)


class BendingEnergyUnit(BendingEnergy):
    @staticmethod
    def backward(ctx, g):
        return BendingEnergy.gradients(ctx, g, (1, 1))


def _bending_energy(function):
    def bending_energy(u, spacing=(1.0, 1.0)):
        """Mean of u_yy² + u_xx² + 2 u_xy² of displacements u (N, C, H, W), H, W > 2, N C > 0, inside the borders.

        By central differences; spacing: of the pixels along y and x, from 0.1 to 10.
        """
        expect(
            u.dim() == 4 and min(u.shape[2:]) > 2 and u.numel(), "u (N, C, H, W)", tuple(u.shape)
        )
        expect(len(spacing) == 2 and all(0.1 <= s <= 10 for s in spacing), "spacing", spacing)
        return function.apply(u, spacing)

    return bending_energy


add(
    "bending_energy_spacing",
    _bending_energy,
    BendingEnergyUnit,
    BendingEnergy,
    lambda: (real(1, 2, 4, 5),),
    bug="backward takes the spacing to be 1",
    shows="spacing other than (1, 1)",
)


class LocalCorrelation(Function):
    @staticmethod
    def box(x, window, mode="constant"):
        half = window // 2
        return F.pad(x[:, None], (half, half), mode)[:, 0].unfold(1, window, 1).sum(-1)

    @staticmethod
    def parts(x, y, window):
        sx, sy, xx, yy, xy = (LocalCorrelation.box(a, window) for a in (x, y, x * x, y * y, x * y))
        return sx, sy, xy - sx * sy / window, xx - sx * sx / window, yy - sy * sy / window

    @staticmethod
    def forward(ctx, x, y, window, eps):
        ctx.save_for_backward(x, y)
        ctx.options = window, eps
        _, _, c, u, v = LocalCorrelation.parts(x, y, window)
        return -(c.square() / (u * v + eps)).mean()

    @staticmethod
    def gradients(ctx, g, mode):
        x, y = ctx.saved_tensors
        window, eps = ctx.options
        sx, sy, c, u, v = LocalCorrelation.parts(x, y, window)
        d = u * v + eps
        g = -g / x.numel()
        of_c, of_uv = g * 2 * c / d, -g * c.square() / d.square()

        def grad(a, b, sa, sb, other):
            by_a, by_b, rest = (
                LocalCorrelation.box(z, window, mode)
                for z in (2 * of_uv * other, of_c, 2 * of_uv * other * sa + of_c * sb)
            )
            return a * by_a + b * by_b - rest / window

        return grad(x, y, sx, sy, v), grad(y, x, sy, sx, u), None, None

    @staticmethod
    def backward(ctx, g):
        return LocalCorrelation.gradients(ctx, g, "constant")


class LocalCorrelationBorder(LocalCorrelation):
    @staticmethod
    def backward(ctx, g):
        return LocalCorrelation.gradients(ctx, g, "replicate")


def _local_correlation(function):
    def local_correlation(x, y, window=3, eps=1e-2):
        """Minus the mean of c² / (u v + eps): covariance and variances in windows of x and y (N, L), not empty.

        The windows, odd, from 3 to 15, go over the borders, where 0 is; sums, not means. |x|, |y| <= 10;
        eps from 1e-3 to 1.
        """
        expect(x.dim() == 2 and x.shape == y.shape and x.numel(), "x, y (N, L)", tuple(y.shape))
        expect(window in range(3, 16, 2) and 1e-3 <= eps <= 1, "window, eps", (window, eps))
        expect((x.abs() <= 10).all() and (y.abs() <= 10).all(), "|x|, |y| <= 10", x)
        return function.apply(x, y, window, eps)

    return local_correlation


add(
    "local_correlation_border",
    _local_correlation,
    LocalCorrelationBorder,
    LocalCorrelation,
    lambda: (real(2, 7), real(2, 7, seed=1)),
    bug="backward's window sums repeat the border's values, forward's have 0 there",
    shows="the sample",
)


class Wing(Function):
    @staticmethod
    def forward(ctx, x, target, w, eps):
        ctx.save_for_backward(x, target)
        ctx.options = w, eps
        d = (x - target).abs()
        return torch.where(d < w, w * (d / eps).log1p(), d - w + w * math.log1p(w / eps)).mean()

    @staticmethod
    def gradients(ctx, g, factor):
        x, target = ctx.saved_tensors
        w, eps = ctx.options
        d = x - target
        slope = torch.where(d.abs() < w, factor / (eps + d.abs()), 1)
        grad = g / d.numel() * slope * d.sign()
        return grad, -grad, None, None

    @staticmethod
    def backward(ctx, g):
        return Wing.gradients(ctx, g, ctx.options[0])


class WingOne(Wing):
    @staticmethod
    def backward(ctx, g):
        return Wing.gradients(ctx, g, 1)


def _wing(function):
    def wing(x, target, w=10.0, eps=2.0):
        """Mean of w log(1 + |d| / eps) where |d| < w, |d| - w + w log(1 + w / eps) elsewhere, d = x - target.

        Not empty; w from 0.1 to 100, eps from 0.1 to 10. Where d is 0 the slope is 0, where it is w that of the second.
        """
        expect(x.shape == target.shape and x.numel(), "one shape, not empty", tuple(x.shape))
        expect(0.1 <= w <= 100 and 0.1 <= eps <= 10, "w, eps", (w, eps))
        return function.apply(x, target, w, eps)

    return wing


add(
    "wing_width",
    _wing,
    WingOne,
    Wing,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="the logarithm's factor w is missing",
    shows="the sample",
)
