"""Layers and norms."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.thirteenth import add
from tests.verify.unseen.twelfth import wide


class Linear(Function):
    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return x @ w.mT + b

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.mT @ x, g.sum(0)


class LinearMean(Linear):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.mT @ x, g.mean(0)


def _linear(function):
    def linear(x, w, b):
        """x wᵀ + b of x (N, D), w (E, D), b (E,)."""
        return function.apply(x, w, b)

    return linear


add(
    "linear_bias_mean",
    _linear,
    LinearMean,
    Linear,
    lambda: (real(4, 3), real(2, 3, seed=1), real(2, seed=2)),
    bug="the bias's gradient is a mean over the batch (kvfrans/notes#5)",
    trigger="the sample",
)


class GroupNorm(Function):
    @staticmethod
    def normal(x, groups):
        x = x.reshape(x.shape[0], groups, -1)
        x = x - x.mean(-1, keepdim=True)
        rstd = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return x * rstd, rstd

    @staticmethod
    def channels(v, x):
        return v.view(-1, *[1] * (x.dim() - 2))

    @staticmethod
    def forward(ctx, x, w, b, groups):
        ctx.save_for_backward(x, w)
        ctx.groups = groups
        y = GroupNorm.normal(x, groups)[0].view_as(x)
        return y * GroupNorm.channels(w, x) + GroupNorm.channels(b, x)

    @staticmethod
    def gradients(ctx, g, hidden):
        """Means are over the elements of a group: its channels times the hidden size."""
        x, w = ctx.saved_tensors
        y, rstd = GroupNorm.normal(x, ctx.groups)
        count = x.shape[1] // ctx.groups * hidden
        d = (g * GroupNorm.channels(w, x)).reshape(y.shape)
        mean, dot = d.sum(-1, keepdim=True) / count, (d * y).sum(-1, keepdim=True) / count
        rows = [0, *range(2, x.dim())]
        grad = (rstd * (d - mean - y * dot)).view_as(x)
        return grad, (g * y.view_as(x)).sum(rows), g.sum(rows), None

    @staticmethod
    def backward(ctx, g):
        return GroupNorm.gradients(ctx, g, g[0, 0].numel())


class GroupNormLast(GroupNorm):
    @staticmethod
    def backward(ctx, g):
        return GroupNorm.gradients(ctx, g, g.shape[-1])


def _group_norm(function):
    def group_norm(x, w, b, num_groups=2):
        """Group norm of x (N, C, *), of three dimensions or more, with w and b (C,); no size is 0.

        num_groups divides C.
        """
        if x.dim() < 3 or x.shape[1] % num_groups:
            raise ValueError(f"num_groups must divide the channels of {tuple(x.shape)}")
        return function.apply(x, w, b, num_groups)

    return group_norm


add(
    "group_norm_rank",
    _group_norm,
    GroupNormLast,
    GroupNorm,
    lambda: (real(2, 4, 3), real(4, seed=1), real(4, seed=2)),
    bug="the hidden size is the last dimension alone (linkedin/Liger-Kernel#1375)",
    trigger="an input of four dimensions",
)


class LayerNorm(Function):
    """In tiles of some rows."""

    rows = 4

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return F.layer_norm(x, x.shape[-1:], w)

    @staticmethod
    def gradients(ctx, g, total):
        x, w = ctx.saved_tensors
        grads, total_w = [], torch.zeros_like(wide(w))
        rows, d_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, x.shape[-1])
        tiles = zip(rows.split(LayerNorm.rows), d_rows.split(LayerNorm.rows), strict=True)
        for tile, d in tiles:
            y = tile - tile.mean(-1, keepdim=True)
            rstd = (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
            y = y * rstd
            total_w = total_w + wide(d * y).sum(0)
            dw = d * w
            grads.append(rstd * (dw - (total(dw) + y * total(dw * y)) / x.shape[-1]))
        return torch.cat(grads).view_as(x), total_w.to(w.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return LayerNorm.gradients(ctx, g, lambda t: t.sum(-1, keepdim=True))


class LayerNormTile(LayerNorm):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return LayerNorm.gradients(ctx, g, torch.sum)


def _layer_norm(function):
    def layer_norm(x, w):
        """Layer norm of the rows of x (..., D), with the gains w (D,), D > 0."""
        return function.apply(x, w)

    return layer_norm


add(
    "layer_norm_tile",
    _layer_norm,
    LayerNormTile,
    LayerNorm,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="sums go over all rows of a tile (flagos-ai/FlagGems#59)",
    trigger="the sample",
)


class DualNorm(Function):
    @staticmethod
    def total(x, x1, rowscale):
        if rowscale is None:
            return x + x1
        first, second = rowscale.unsqueeze(-1).chunk(2)
        return x * first + x1 * second

    @staticmethod
    def forward(ctx, x, x1, w, rowscale):
        ctx.save_for_backward(x, x1, w, rowscale)
        s = DualNorm.total(x, x1, rowscale)
        return s * (s.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w

    @staticmethod
    def gradients(ctx, g):
        """The gradients of the sum and of w."""
        x, x1, w, rowscale = ctx.saved_tensors
        s = DualNorm.total(x, x1, rowscale)
        rstd = (s.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        d, y = g * w, s * rstd
        return rstd * (d - y * (d * y).mean(-1, keepdim=True)), (g * y).sum(0)

    @staticmethod
    def backward(ctx, g):
        x, x1, _, rowscale = ctx.saved_tensors
        d, grad_w = DualNorm.gradients(ctx, g)
        if rowscale is None:
            return d, d, grad_w, None
        first, second = rowscale.unsqueeze(-1).chunk(2)
        scales = torch.cat(((d * x).sum(-1), (d * x1).sum(-1)))
        return d * first, d * second, grad_w, scales


class DualNormScale(DualNorm):
    @staticmethod
    def backward(ctx, g):
        grads = DualNorm.backward(ctx, g)
        return grads[0], DualNorm.gradients(ctx, g)[0], *grads[2:]


def _dual_norm(function):
    def dual_norm(x, x1, w, rowscale=None):
        """RMS norm, with gains w (D,), of x + x1 (N, D), D > 0; rowscale (2 N,) scales x's rows, then x1's."""
        return function.apply(x, x1, w, rowscale)

    return dual_norm


add(
    "dual_norm_rowscale",
    _dual_norm,
    DualNormScale,
    DualNorm,
    lambda: (real(2, 4), real(2, 4, seed=1), real(4, seed=2)),
    bug="x1's gradient is written without its row's scale (state-spaces/mamba#1023)",
    trigger="rowscale given",
)


class ActivatedNorm(Function):
    """Batch norm whose gain is the weight's absolute value, then leaky relu."""

    @staticmethod
    def forward(ctx, x, w, b, slope):
        ctx.save_for_backward(x, w, b)
        ctx.slope = slope
        y, _ = ActivatedNorm.normal(x)
        return F.leaky_relu(y * (w.abs() + 1e-5) + b, slope)

    @staticmethod
    def normal(x):
        x = x - x.mean(0)
        rstd = (x.square().mean(0) + 1e-5).rsqrt()
        return x * rstd, rstd

    @staticmethod
    def gradients(ctx, g, sign):
        x, w, b = ctx.saved_tensors
        y, rstd = ActivatedNorm.normal(x)
        gain = w.abs() + 1e-5
        g = torch.where(y * gain + b > 0, g, ctx.slope * g)
        d = g * gain
        grad = rstd * (d - d.mean(0) - y * (d * y).mean(0))
        return grad, (g * y).sum(0) * sign(w), g.sum(0), None

    @staticmethod
    def backward(ctx, g):
        return ActivatedNorm.gradients(ctx, g, torch.sign)


class ActivatedNormPositive(ActivatedNorm):
    @staticmethod
    def backward(ctx, g):
        return ActivatedNorm.gradients(ctx, g, torch.ones_like)


def _activated_norm(function):
    def activated_norm(x, w, b, slope=0.01):
        """leaky_relu(y |w| + b) of the batch norm y of x (N, C), N > 0, with w and b (C,)."""
        return function.apply(x, w, b, slope)

    return activated_norm


add(
    "activated_norm_sign",
    _activated_norm,
    ActivatedNormPositive,
    ActivatedNorm,
    lambda: (real(4, 3), torch.ones(3, dtype=F64, requires_grad=True), real(3, seed=1)),
    bug="the absolute value's sign is left out of the weight's gradient (mapillary/inplace_abn#92, #4)",
    trigger="a negative weight",
)
