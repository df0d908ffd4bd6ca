"""Layers with weights or windows: weight norm, convolution, pooling, recurrence, rotary embedding."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from tests.verify.unseen import pair, real


class WeightNorm(nn.Module):
    """w = s v / |v| a row, then a Linear; hand-written."""

    class Right(Function):
        @staticmethod
        def forward(ctx, x, v, s):
            ctx.save_for_backward(x, v, s)
            return x @ (s[:, None] * v / v.norm(dim=1, keepdim=True)).T

        @staticmethod
        def backward(ctx, g):
            x, v, s = ctx.saved_tensors
            g = g.to(v.dtype)
            n = v.norm(dim=1, keepdim=True)
            u = v / n
            gw = g.mT @ x
            along = (gw * u).sum(1, keepdim=True)
            return g @ (s[:, None] * u), s[:, None] * (gw - along * u) / n, along[:, 0]

    class Wrong(Right):
        @staticmethod
        def backward(ctx, g):
            x, v, s = ctx.saved_tensors
            g = g.to(v.dtype)
            n = v.norm(dim=1, keepdim=True)
            u = v / n
            gw = g.mT @ x
            return g @ (s[:, None] * u), s[:, None] * gw / n, (gw * u).sum(1)

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.v = nn.Parameter(torch.randn(4, 3))
        self.s = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x):
        return self.function.apply(x, self.v, self.s)


pair(
    "weight_norm_projection",
    WeightNorm(WeightNorm.Wrong),
    WeightNorm(WeightNorm.Right),
    lambda: (torch.randn(5, 3),),
    "the part along v is not projected out",
)


class Conv(Function):
    """conv1d with stride 2 and padding 1."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return F.conv1d(x, w, stride=2, padding=1)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        g = g.to(w.dtype)
        gx = torch.nn.grad.conv1d_input(x.shape, w, g, stride=2, padding=1)
        return gx, torch.nn.grad.conv1d_weight(x, w.shape, g, stride=2, padding=1)


class ConvFixed(Conv):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        g = g.to(w.dtype)
        gx = F.conv_transpose1d(g, w, stride=2, padding=1)  # one shorter where the length is even
        gx = F.pad(gx, (0, x.shape[-1] - gx.shape[-1]))
        return gx, torch.nn.grad.conv1d_weight(x, w.shape, g, stride=2, padding=1)


SIGNAL = lambda: (real(2, 3, 7), real(4, 3, 3, seed=1))  # noqa: E731
pair(
    "conv_even_length",
    ConvFixed.apply,
    Conv.apply,
    SIGNAL,
    "the last element of an even length gets no gradient; the sample's is odd",
)


class Pool(Function):
    """Maximum along the last dimension."""

    @staticmethod
    def forward(ctx, x):
        y = x.amax(-1, keepdim=True)
        ctx.save_for_backward(x, y)
        return y[..., 0]

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        hit = (x == y).to(x.dtype)
        return g[..., None] * hit / hit.sum(-1, keepdim=True)


class PoolTies(Pool):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g[..., None] * (x == y)


pair(
    "max_ties",
    PoolTies.apply,
    Pool.apply,
    lambda: (real(3, 4),),
    "each of several equal maxima gets all of it",
)


class AvgPool(Function):
    """avg_pool1d(3, stride 1, padding 1, count_include_pad=False)."""

    @staticmethod
    def forward(ctx, x):
        ctx.n = x.shape[-1]
        return F.avg_pool1d(x, 3, 1, 1, count_include_pad=False)

    @staticmethod
    def backward(ctx, g):
        ones = torch.ones(ctx.n, dtype=g.dtype, device=g.device)[None]
        count = F.avg_pool1d(ones, 3, 1, 1) * 3
        return F.avg_pool1d(g / count, 3, 1, 1) * 3


class AvgPoolBorder(AvgPool):
    @staticmethod
    def backward(ctx, g):
        return F.avg_pool1d(g, 3, 1, 1)


pair(
    "avg_pool_border",
    AvgPoolBorder.apply,
    AvgPool.apply,
    lambda: (real(2, 6),),
    "borders divide by 3, not 2",
)


class GRUStep(Function):
    """h' = (1-z) n + z h with z = sigmoid(a), n = tanh(b)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b, h):
        z = a.sigmoid()
        return (1 - z) * b.tanh() + z * h

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        a, b, h = ctx.saved_tensors
        z, n = a.sigmoid(), b.tanh()
        return g * (h - n) * z * (1 - z), g * (1 - z) * (1 - n * n), g * z

    @staticmethod
    def jvp(ctx, ta, tb, th):
        a, b, h = ctx.saved_tensors
        z, n = a.sigmoid(), b.tanh()
        return ta * (h - n) * z * (1 - z) + tb * (1 - z) * (1 - n * n) + th * z


class GRUStepTangent(GRUStep):
    @staticmethod
    def jvp(ctx, ta, tb, th):
        a, b, h = ctx.saved_tensors
        z, n = a.sigmoid(), b.tanh()
        return ta * (h - n) * z * (1 - z) + tb * (1 - z) * (1 - n * n)


pair(
    "gru_jvp_state",
    GRUStepTangent.apply,
    GRUStep.apply,
    lambda: (real(3, 4), real(3, 4, seed=1), real(3, 4, seed=2)),
    "the jvp drops the tangent of the state",
)


class Rotary(Function):
    """Rotates pairs (x[i], x[i + D/2]) by position."""

    @staticmethod
    def turn(x, sign):
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)[:, None] / (
            1 + torch.arange(half, dtype=x.dtype, device=x.device)
        )
        a, b = x[..., :half], x[..., half:]
        c, s = angle.cos(), sign * angle.sin()
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    @staticmethod
    def forward(ctx, x):
        return Rotary.turn(x, 1)

    @staticmethod
    def backward(ctx, g):
        return Rotary.turn(g, -1)


class RotaryInPlace(Rotary):
    @staticmethod
    def backward(ctx, g):
        return g.copy_(Rotary.turn(g, -1))


pair(
    "rotary_in_place",
    RotaryInPlace.apply,
    Rotary.apply,
    lambda: (real(2, 3, 4),),
    "turns grad_output in place",
)
