"""Attention and normalization."""

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
