"""Interpolation."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.sixteenth import add, expect


class Spline(Function):
    @staticmethod
    def place(x, heights):
        last = heights.shape[0] - 1
        t = x.clamp(0, 1) * last
        i = t.detach().floor().clamp(max=last - 1).long()
        return t - i, i, last

    @staticmethod
    def forward(ctx, x, heights):
        ctx.save_for_backward(x, heights)
        t, i, _ = Spline.place(x, heights)
        return heights[i] * (1 - t) + heights[i + 1] * t

    @staticmethod
    def gradients(ctx, g, inside):
        x, heights = ctx.saved_tensors
        t, i, last = Spline.place(x, heights)
        grad_x = g * (heights[i + 1] - heights[i]) * last
        grad = torch.zeros_like(heights).index_add(0, i.flatten(), (g * (1 - t)).flatten())
        return torch.where(inside(x), grad_x, 0), grad.index_add(
            0, (i + 1).flatten(), (g * t).flatten()
        )

    @staticmethod
    def backward(ctx, g):
        return Spline.gradients(ctx, g, lambda x: (x >= 0) & (x <= 1))


class SplineOutside(Spline):
    @staticmethod
    def backward(ctx, g):
        return Spline.gradients(ctx, g, lambda x: torch.ones_like(x, dtype=torch.bool))


def _spline(function):
    def spline(x, heights):
        """Piecewise linear function of x (N, *) through heights (K,), K > 1, at equal distances from 0 to 1.

        Below 0 and above 1 it is constant.
        """
        expect(
            x.dim() and heights.dim() == 1 and heights.shape[0] > 1,
            "heights (K,), K > 1",
            tuple(heights.shape),
        )
        return function.apply(x, heights)

    return spline


def unit(*shape, seed=0):
    return torch.rand(
        shape, generator=torch.Generator().manual_seed(seed), dtype=F64
    ).requires_grad_()


add(
    "spline_outside",
    _spline,
    SplineOutside,
    Spline,
    lambda: (unit(3, 4), real(5, seed=1)),
    bug="x's slope is that of the outermost piece even where x is clamped",
    shows="x below 0 or above 1",
)


class Curves(Function):
    @staticmethod
    def place(x, table):
        last = table.shape[1] - 1
        t = x.transpose(0, 1).flatten(1) * last
        i = t.detach().floor().clamp(max=last - 1).long()
        return t - i, i, last

    @staticmethod
    def back(y, x):
        return y.view(x.transpose(0, 1).shape).transpose(0, 1)

    @staticmethod
    def forward(ctx, x, table):
        ctx.save_for_backward(x, table)
        t, i, _ = Curves.place(x, table)
        y = table.gather(1, i) * (1 - t) + table.gather(1, i + 1) * t
        return Curves.back(y, x).contiguous()

    @staticmethod
    def gradients(ctx, g, factor):
        x, table = ctx.saved_tensors
        t, i, last = Curves.place(x, table)
        g = g.transpose(0, 1).flatten(1)
        grad_x = g * (table.gather(1, i + 1) - table.gather(1, i)) * factor(last)
        grad = torch.zeros_like(table).scatter_add(1, i, g * (1 - t)).scatter_add(1, i + 1, g * t)
        return Curves.back(grad_x, x), grad

    @staticmethod
    def backward(ctx, g):
        return Curves.gradients(ctx, g, lambda last: last)


class CurvesUnit(Curves):
    @staticmethod
    def backward(ctx, g):
        return Curves.gradients(ctx, g, lambda last: 1)


def _curves(function):
    def curves(x, table):
        """Each channel of images x (N, C, H, W), from 0 to 1, through its row of table (C, K), K > 1, linearly."""
        expect(
            x.dim() == 4 and table.dim() == 2 and table.shape[0] == x.shape[1],
            "table (C, K)",
            tuple(table.shape),
        )
        expect(table.shape[1] > 1, "K > 1", tuple(table.shape))
        expect(((x >= 0) & (x <= 1)).all(), "x from 0 to 1", x)
        return function.apply(x, table)

    return curves


add(
    "curves_scale",
    _curves,
    CurvesUnit,
    Curves,
    lambda: (unit(2, 3, 2, 2), real(3, 6, seed=1)),
    bug="x's gradient is the difference of neighbours, without the factor K - 1",
    shows="the sample",
)


class Cubic(Function):
    """Keys' kernel, a = -0.75, half-pixel centres; places beyond the ends are clamped."""

    @staticmethod
    def taps(length, size, like):
        place = (torch.arange(size, dtype=F64, device=like.device) + 0.5) * length / size - 0.5
        first = place.floor()
        for offset in (-1, 0, 1, 2):
            d = (place - first - offset).abs()
            near = 1.25 * d**3 - 2.25 * d**2 + 1
            far = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            index = (first + offset).clamp(0, length - 1).long()
            yield index, torch.where(d <= 1, near, far).to(like.dtype)

    @staticmethod
    def forward(ctx, x, size):
        ctx.length, ctx.size = x.shape[-1], size
        return sum(x[..., index] * weight for index, weight in Cubic.taps(x.shape[-1], size, x))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        grad = g.new_zeros(*g.shape[:-1], ctx.length)
        for index, weight in Cubic.taps(ctx.length, ctx.size, g):
            grad.index_add_(-1, index, g * weight)
        return grad, None


class CubicAssigned(Cubic):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        grad = g.new_zeros(*g.shape[:-1], ctx.length)
        for index, weight in Cubic.taps(ctx.length, ctx.size, g):
            grad[..., index] += g * weight
        return grad, None


def _cubic(function):
    def resize_cubic(x, size=8):
        """x (*, L), L > 0, at size places, by cubic convolution; size from 1 to 1000."""
        expect(x.dim() and x.shape[-1], "x (*, L), L > 0", tuple(x.shape))
        expect(isinstance(size, int) and 1 <= size <= 1000, "size from 1 to 1000", size)
        return function.apply(x, size)

    return resize_cubic


add(
    "resize_cubic_assigned",
    _cubic,
    CubicAssigned,
    Cubic,
    lambda: (real(2, 3, 5),),
    bug="grad[..., index] += keeps one of the values that fall on one place",
    shows="a larger size, as in the sample",
)
