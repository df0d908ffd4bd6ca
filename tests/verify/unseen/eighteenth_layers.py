"""Layers and filters."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.eighteenth import add


class BatchNormPerActivation(Function):
    @staticmethod
    def normal(x):
        x = x - x.mean(0)
        inv = (x.square().mean(0) + 1e-5).rsqrt()
        return x * inv, inv

    @staticmethod
    def forward(ctx, x, scale, bias):
        ctx.save_for_backward(x, scale)
        return scale * BatchNormPerActivation.normal(x)[0] + bias

    @staticmethod
    def gradients(ctx, dy, element):
        x, scale = ctx.saved_tensors
        xhat, inv = BatchNormPerActivation.normal(x)
        dxhat = (dy * scale).sum(0)
        tmp1 = xhat * (dy * scale * xhat).sum(0) + dxhat
        tmp2 = len(x) * element(dy * scale, dxhat) - tmp1
        return inv / len(x) * tmp2, (dy * xhat).sum(0), dy.sum(0)

    @staticmethod
    def backward(ctx, dy):
        return BatchNormPerActivation.gradients(ctx, dy, lambda d, total: d)


class BatchNormPerActivationTotal(BatchNormPerActivation):
    @staticmethod
    def backward(ctx, dy):
        return BatchNormPerActivation.gradients(ctx, dy, lambda d, total: total)


def _batch_norm(function):
    def batch_norm(x, scale, bias):
        """x (N, *), N > 0, normalised over the batch at each place, with scale and bias (*)."""
        return function.apply(x, scale, bias)

    return batch_norm


add(
    "batch_norm_element",
    _batch_norm,
    BatchNormPerActivationTotal,
    BatchNormPerActivation,
    lambda: (real(4, 2, 3), real(2, 3, seed=1), real(2, 3, seed=2)),
    bug="the batch's sum stands where the element's gradient belongs (ROCm/MIOpen#104)",
    trigger="the sample",
)


class LayerNorm(Function):
    @staticmethod
    def normal(x):
        x = x - x.mean(-1, keepdim=True)
        rstd = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return x * rstd, rstd

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return LayerNorm.normal(x)[0] * weight + bias

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        y, rstd = LayerNorm.normal(x)
        d = g * weight
        grad = rstd * (d - d.mean(-1, keepdim=True) - y * (d * y).mean(-1, keepdim=True))
        rows = tuple(range(x.dim() - 1))
        return grad, (g * y).sum(rows), g.sum(rows)


class LayerNormInput(LayerNorm):
    @staticmethod
    def backward(ctx, g):
        return LayerNorm.backward(ctx, g)[0], None, None


def _layer_norm(function):
    def layer_norm(x, weight, bias):
        """Layer norm of the rows of x (N, T, D), D > 0, with weight and bias (D,)."""
        return function.apply(x, weight, bias)

    return layer_norm


add(
    "layer_norm_weight",
    _layer_norm,
    LayerNormInput,
    LayerNorm,
    lambda: (real(2, 3, 4), real(4, seed=1), real(4, seed=2)),
    bug="the input alone gets a gradient (candle-org/candle#95)",
    trigger="the sample",
)


class LFilter(Function):
    @staticmethod
    def forward(ctx, x, numerator):
        ctx.save_for_backward(numerator)
        steps = x.shape[-1]
        taps = [c * F.pad(x, (k, 0))[..., :steps] for k, c in enumerate(numerator)]
        return torch.stack(taps).sum(0)

    @staticmethod
    def backward(ctx, g):
        steps = g.shape[-1]
        taps = [
            c * F.pad(g, (0, k))[..., k : k + steps] for k, c in enumerate(ctx.saved_tensors[0])
        ]
        return torch.stack(taps).sum(0), None


class LFilterIdentity(LFilter):
    @staticmethod
    def backward(ctx, g):
        return g.clone(), None


def _lfilter(function):
    def lfilter(x, numerator):
        """x (T,) filtered by the constant coefficients numerator (K,), K > 0, the first of them for no delay."""
        return function.apply(x, numerator)

    return lfilter


add(
    "lfilter_identity",
    _lfilter,
    LFilterIdentity,
    LFilter,
    lambda: (real(10), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)),
    bug="the cotangent is passed on as it is (Trusted-AI/adversarial-robustness-toolbox#992)",
    trigger="the sample",
)
