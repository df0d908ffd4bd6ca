"""The fourth set, part three: matrices, convolutions, scans, normalisations."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fourth import Kept, mistake


class Product(Kept):
    """x wᵀ of a square w."""

    value = staticmethod(lambda x, w: x @ w.mT)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        g = g.to(x.dtype)
        return g @ w, g.mT @ x


def square():
    return real(3, 4), real(4, 4, seed=1)


@mistake(Product, "not transposed back: the weight is square", square)
def product_transposed(ctx, g):
    x, w = ctx.saved_tensors
    g = g.to(x.dtype)
    return g @ w.mT, g.mT @ x


@mistake(Product, "the weight's gradient averaged over the batch", square)
def product_mean(ctx, g):
    x, w = ctx.saved_tensors
    g = g.to(x.dtype)
    return g @ w, g.mT @ x / x.shape[0]


class Strided(Function):
    """y[n, l] = sum over k of w[k] x[n, 2 l + k]."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.unfold(-1, len(w), 2) @ w

    @staticmethod
    def pull(ctx, g, start=0):
        x, w = ctx.saved_tensors
        g = g.to(x.dtype)
        spread = torch.stack([g, torch.zeros_like(g)], -1).flatten(-2)  # stride 2
        grad = sum(
            w[k] * F.pad(spread, (k + start, x.shape[-1] - spread.shape[-1] - k - start))
            for k in range(len(w))
        )
        return grad, torch.stack([(g * u).sum() for u in x.unfold(-1, len(w), 2).unbind(-1)])

    @staticmethod
    def backward(ctx, g):
        return Strided.pull(ctx, g)


def signal():
    return real(2, 9), real(3, seed=1)


@mistake(Strided, "the gradient one place further", signal)
def strided_shifted(ctx, g):
    return Strided.pull(ctx, g, 1)


@mistake(Strided, "the kernel flipped", signal)
def strided_flipped(ctx, g):
    grad_x, grad_w = Strided.pull(ctx, g)
    return grad_x, grad_w.flip(0)


class Pooled(Function):
    """Means of three with one zero of padding at either end, which counts."""

    @staticmethod
    def forward(ctx, x):
        p = F.pad(x, (1, 1))
        return (p[..., :-2] + p[..., 1:-1] + p[..., 2:]) / 3

    @staticmethod
    def backward(ctx, g):
        p = F.pad(g, (1, 1))
        return (p[..., :-2] + p[..., 1:-1] + p[..., 2:]) / 3


@mistake(Pooled, "divided by the true neighbours, as without count_include_pad")
def pooled_count(ctx, g):
    count = Pooled.forward(ctx, torch.ones_like(g)) * 3
    p = F.pad(g / count, (1, 1))
    return p[..., :-2] + p[..., 1:-1] + p[..., 2:]


class Scan(Function):
    """h[t] = a h[t-1] + x[t], along the last dimension; a is one number a row."""

    @staticmethod
    def states(x, a):
        h, states = torch.zeros_like(x[..., 0]), []
        for t in range(x.shape[-1]):
            h = a * h + x[..., t]
            states.append(h)
        return torch.stack(states, -1)

    @staticmethod
    def forward(ctx, x, a):
        ctx.save_for_backward(x, a)
        return Scan.states(x, a)

    @staticmethod
    def pull(ctx, g, shift):
        x, a = ctx.saved_tensors
        h = Scan.states(x, a)
        back = Scan.states(g.flip(-1), a).flip(-1)
        before = F.pad(h, (1, -1)) if shift else h
        return back, (back * before).sum(-1).sum_to_size(a.shape)

    @staticmethod
    def backward(ctx, g):
        return Scan.pull(ctx, g, shift=True)


def sequence():
    return real(2, 5), (real(2, seed=1) / 4).detach().requires_grad_()


@mistake(Scan, "the state of this step, not of the one before", sequence)
def scan_step(ctx, g):
    return Scan.pull(ctx, g, shift=False)


@mistake(Scan, "the chain through later steps is cut", sequence)
def scan_truncated(ctx, g):
    x, a = ctx.saved_tensors
    return g.clone(), (g * F.pad(Scan.states(x, a), (1, -1))).sum(-1).sum_to_size(a.shape)


class LayerNorm(Kept):
    value = staticmethod(lambda x: LayerNorm.normal(x)[0])

    @staticmethod
    def normal(x):
        c = x - x.mean(-1, keepdim=True)
        r = ((c * c).mean(-1, keepdim=True) + 1e-5).rsqrt()
        return c * r, r

    @staticmethod
    def backward(ctx, g):
        n, r = LayerNorm.normal(ctx.saved_tensors[0])
        return r * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))


@mistake(LayerNorm, "the mean's part is missing")
def layer_norm_mean(ctx, g):
    n, r = LayerNorm.normal(ctx.saved_tensors[0])
    return r * (g - n * (g * n).mean(-1, keepdim=True))


@mistake(LayerNorm, "the variance taken as constant")
def layer_norm_variance(ctx, g):
    _, r = LayerNorm.normal(ctx.saved_tensors[0])
    return r * (g - g.mean(-1, keepdim=True))


class Unit(Kept):
    """x / sqrt(sum of squares + eps)."""

    value = staticmethod(lambda x: x / ((x * x).sum(-1, keepdim=True) + 1e-3).sqrt())

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        n = ((x * x).sum(-1, keepdim=True) + 1e-3).sqrt()
        return g / n - x * (g * x).sum(-1, keepdim=True) / n**3


@mistake(Unit, "eps outside of the root")
def unit_eps(ctx, g):
    (x,) = ctx.saved_tensors
    n = (x * x).sum(-1, keepdim=True).sqrt() + 1e-3
    return g / n - x * (g * x).sum(-1, keepdim=True) / n**3


class Variance(Kept):
    value = staticmethod(lambda x: x.var(-1))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g[..., None] * 2 * (x - x.mean(-1, keepdim=True)) / (x.shape[-1] - 1)


@mistake(Variance, "n instead of n - 1")
def variance_biased(ctx, g):
    (x,) = ctx.saved_tensors
    return g[..., None] * 2 * (x - x.mean(-1, keepdim=True)) / x.shape[-1]


class Weights(Kept):
    """Attention's weights: softmax(q kᵀ / sqrt(d))."""

    value = staticmethod(lambda q, k: (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1))

    @staticmethod
    def pull(ctx, g, scale):
        q, k = ctx.saved_tensors
        p, g = Weights.value(q, k).to(q.dtype), g.to(q.dtype)
        s = p * (g - (g * p).sum(-1, keepdim=True)) / scale
        return s @ k, s.mT @ q

    @staticmethod
    def backward(ctx, g):
        return Weights.pull(ctx, g, math.sqrt(ctx.saved_tensors[0].shape[-1]))


@mistake(Weights, "the scale forgotten", lambda: (real(3, 4), real(5, 4, seed=1)))
def weights_scale(ctx, g):
    return Weights.pull(ctx, g, 1.0)
