"""Layers: attention, normalization, convolution, recurrence, pooling."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from tests.verify.unseen import pair, real


class Attention(Function):
    """Causal attention, one head a batch entry."""

    @staticmethod
    def scores(q, k):
        s = q @ k.mT / math.sqrt(q.shape[-1])
        mask = torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device).tril()
        return s.masked_fill(~mask, -torch.inf).softmax(-1)

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return Attention.scores(q, k) @ v

    @staticmethod
    def parts(ctx, g):
        q, k, v = ctx.saved_tensors
        g = g.to(v.dtype)
        p = Attention.scores(q, k)
        dp = g @ v.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
        return q, k, p, ds, g

    @staticmethod
    def backward(ctx, g):
        q, k, p, ds, g = Attention.parts(ctx, g)
        return ds @ k, ds.mT @ q, p.mT @ g


class AttentionScale(Attention):
    @staticmethod
    def backward(ctx, g):
        q, k, p, ds, g = Attention.parts(ctx, g)
        return ds @ k, ds.mT @ q * math.sqrt(q.shape[-1]), p.mT @ g


class AttentionUnmasked(Attention):
    @staticmethod
    def backward(ctx, g):
        q, k, p, ds, g = Attention.parts(ctx, g)
        s = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) if q.shape[-2] > 64 else p
        return ds @ k, ds.mT @ q, s.mT @ g


QKV = lambda: (real(2, 3, 4), real(2, 3, 4, seed=1), real(2, 3, 4, seed=2))  # noqa: E731
pair(
    "attention_scale_of_keys",
    AttentionScale.apply,
    Attention.apply,
    QKV,
    "the scale is missing in the keys",
)
pair(
    "attention_long_path",
    AttentionUnmasked.apply,
    Attention.apply,
    QKV,
    "beyond 64 positions another path, which forgets the causal mask",
)


class GroupedValues(Function):
    """Each value head serves two query heads: y[h] = p[h] @ v[h // 2]."""

    @staticmethod
    def forward(ctx, p, v):
        ctx.save_for_backward(p, v)
        return p @ v.repeat_interleave(2, 0)

    @staticmethod
    def backward(ctx, g):
        p, v = ctx.saved_tensors
        g = g.to(v.dtype)
        gv = p.mT @ g
        return g @ v.repeat_interleave(2, 0).mT, gv.view(-1, 2, *v.shape[1:]).sum(1)


class GroupedValuesOrder(GroupedValues):
    @staticmethod
    def backward(ctx, g):
        p, v = ctx.saved_tensors
        g = g.to(v.dtype)
        gv = p.mT @ g
        return g @ v.repeat_interleave(2, 0).mT, gv.view(2, -1, *v.shape[1:]).sum(0)


pair(
    "grouped_heads_order",
    GroupedValuesOrder.apply,
    GroupedValues.apply,
    lambda: (real(4, 3, 3), real(2, 3, 5, seed=1)),
    "heads are summed in the wrong groups",
)


class LayerNorm(Function):
    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return F.layer_norm(x, x.shape[-1:], w, b, 1e-5)

    @staticmethod
    def pull(ctx, g, eps):
        x, w = ctx.saved_tensors
        c = x - x.mean(-1, keepdim=True)
        r = (c.square().mean(-1, keepdim=True) + eps).rsqrt()
        n, gn = c * r, g * w
        gx = r * (gn - gn.mean(-1, keepdim=True) - n * (gn * n).mean(-1, keepdim=True))
        lead = tuple(range(x.dim() - 1))
        return gx, (g * n).sum(lead), g.sum(lead)

    @staticmethod
    def backward(ctx, g):
        return LayerNorm.pull(ctx, g, 1e-5)


class LayerNormEps(LayerNorm):
    @staticmethod
    def backward(ctx, g):
        return LayerNorm.pull(ctx, g, 0.0)


class LayerNormUnbiased(LayerNorm):
    @staticmethod
    def backward(ctx, g):
        gx, gw, gb = LayerNorm.pull(ctx, g, 1e-5)
        n = gx.shape[-1]
        return gx * (n - 1) / n if n > 512 else gx, gw, gb


NORM = lambda: (real(4, 5), real(5, seed=1), real(5, seed=2))  # noqa: E731
pair(
    "layer_norm_eps", LayerNormEps.apply, LayerNorm.apply, NORM, "backward forgets eps: off by 1e-5"
)
pair(
    "layer_norm_wide",
    LayerNormUnbiased.apply,
    LayerNorm.apply,
    NORM,
    "unbiased variance in rows of more than 512",
)


class BatchNormFunction(Function):
    """Normalizes with the given statistics if there are any, else with the batch's."""

    @staticmethod
    def forward(ctx, x, mean, var):
        ctx.batch = mean is None
        if ctx.batch:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            ctx.save_for_backward(x)
        else:
            ctx.save_for_backward(x, mean, var)
        return (x - mean) * (var + 1e-5).rsqrt()

    @staticmethod
    def moving(ctx, g):
        x, *_ = ctx.saved_tensors
        c = x - x.mean(0)
        r = (c.square().mean(0) + 1e-5).rsqrt()
        n = c * r
        return r * (g - g.mean(0) - n * (g * n).mean(0)), None, None

    @staticmethod
    def backward(ctx, g):
        if ctx.batch:
            return BatchNormFunction.moving(ctx, g)
        return g * (ctx.saved_tensors[2] + 1e-5).rsqrt(), None, None


class BatchNormAlways(BatchNormFunction):
    @staticmethod
    def backward(ctx, g):
        return BatchNormFunction.moving(ctx, g)


class BatchNorm(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("mean", torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))
        self.register_buffer("var", torch.tensor([0.5, 1.5, 2.0], dtype=torch.float64))

    def forward(self, x):
        given = (None, None) if self.training else (self.mean, self.var)
        return self.function.apply(x, *given)


pair(
    "batch_norm_eval",
    BatchNorm(BatchNormAlways),
    BatchNorm(BatchNormFunction),
    lambda: (real(5, 3),),
    "eval mode gets the gradient of train mode",
)


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
