"""Ninth set: functions of every field as real code has them, a good half of them right in the sample.

In one file, as it was written before any check ran on it. `source` is the public report or fix that a fault is modelled
on.
"""

import functools
import inspect
import math

import torch
import torch.nn.functional as nnF
from torch.autograd import Function

from tests.device import DEVICE
from tests.verify.unseen import NINTH, Unseen

OWN = "own knowledge of real code"


# ------------------------------------------------------------------ helpers
def R(*shape, s=0, grad=True):
    """Normal float64 sample."""
    t = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + s), dtype=torch.float64)
    return t.requires_grad_() if grad else t


def U(*shape, s=0, lo=0.5, hi=1.5, grad=True):
    """Uniform float64 sample."""
    t = torch.rand(shape, generator=torch.Generator().manual_seed(2000 + s), dtype=torch.float64)
    t = t * (hi - lo) + lo
    return t.requires_grad_() if grad else t


def real(*ts):
    for t in ts:
        if t is not None and not (torch.is_tensor(t) and t.is_floating_point()):
            raise TypeError("expected a real floating-point tensor")


def full_precision(*ts):
    for t in ts:
        if not torch.is_tensor(t) or t.dtype not in (torch.float32, torch.float64):
            raise TypeError("expected a float32 or float64 tensor")
    if len({t.dtype for t in ts}) > 1:
        raise TypeError("expected one dtype")


def need(ok, msg):
    if not ok:
        raise ValueError(msg)


def no_amp(fn):
    """Run with autocast off: the backward then meets the dtypes that the forward met."""

    @functools.wraps(fn)
    def run(*args):
        with torch.autocast(DEVICE, enabled=False):
            return fn(*args)

    return run


def same(*ts):
    d = functools.reduce(torch.promote_types, [t.dtype for t in ts])
    return [t.to(d) for t in ts]


def mm(a, b):
    a, b = same(a, b)
    return a @ b


def up(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def bind(cls, call, name):
    def fn(*args, **kwargs):
        return call(cls, *args, **kwargs)

    sig = inspect.signature(call)
    fn.__signature__ = sig.replace(parameters=list(sig.parameters.values())[1:])
    fn.__name__ = fn.__qualname__ = name
    fn.cls, fn.call = cls, call
    return fn


def add(name, wrong, right, call, make, why, source=OWN, **kwargs):
    wrong, right = bind(wrong, call, name), bind(right, call, name)
    NINTH[f"{name}_9"] = Unseen(f"{name}_9", why, wrong, right, make, lambda: dict(kwargs))


def apply(cls, *args):
    return cls.apply(*args)


# ------------------------------------------------------------------ 1 gelu (tanh form)
class GeluTanh(Function):
    @staticmethod
    def forward(ctx, x):
        real(x)
        ctx.save_for_backward(x)
        z = up(x)
        return (0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))).to(
            x.dtype
        )

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        z = up(x).clamp(-30, 30)
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (z + 0.044715 * z**3))
        return g * (0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z))


class GeluTanhWrong(GeluTanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        z = up(x).clamp(-30, 30)
        return g * (
            0.5 * (1 + torch.erf(z / math.sqrt(2)))
            + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        )


def gelu_tanh(cls, x):
    return cls.apply(x)


add(
    "gelu_tanh",
    GeluTanhWrong,
    GeluTanh,
    gelu_tanh,
    lambda n=4, d=5: (R(n, d),),
    "forward is the tanh approximation, backward differentiates the exact erf form",
)


# ------------------------------------------------------------------ 2 leaky relu, slope zero
class Leaky(Function):
    @staticmethod
    def forward(ctx, x, slope):
        real(x)
        ctx.save_for_backward(x)
        ctx.slope = slope
        return torch.where(x > 0, x, x * slope)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, g, g * ctx.slope), None


class LeakyWrong(Leaky):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        slope = ctx.slope or 0.01
        return torch.where(x > 0, g, g * slope), None


def leaky_relu(cls, x, negative_slope=0.01):
    return cls.apply(x, negative_slope)


add(
    "leaky_relu",
    LeakyWrong,
    Leaky,
    leaky_relu,
    lambda n=12: (R(n, s=1),),
    "`slope or 0.01`: a slope of exactly zero is taken for a missing one",
    "https://github.com/chainer/chainer/pull/5898",
    negative_slope=0.01,
)


# ------------------------------------------------------------------ 3 swiglu
class SwiGLU(Function):
    @staticmethod
    def forward(ctx, e, u):
        real(e, u)
        need(e.shape == u.shape, "gate and value need one shape")
        ctx.save_for_backward(e, u)
        return e * torch.sigmoid(e) * u

    @staticmethod
    def backward(ctx, g):
        e, u = ctx.saved_tensors
        s = torch.sigmoid(e)
        return g * u * s * (1 + e * (1 - s)), g * e * s


class SwiGLUWrong(SwiGLU):
    @staticmethod
    def backward(ctx, g):
        e, u = ctx.saved_tensors
        s = torch.sigmoid(e)
        return g * e * s, g * u * s * (1 + e * (1 - s))


def swiglu(cls, e, u):
    return cls.apply(e, u)


add(
    "swiglu",
    SwiGLUWrong,
    SwiGLU,
    swiglu,
    lambda n=3, d=4: (R(n, d), R(n, d, s=1)),
    "the gradients of gate and value are written to each other's buffer",
    "https://github.com/unslothai/unsloth/issues/3314",
)


# ------------------------------------------------------------------ 4 layer norm over the last dim
class LayerNorm(Function):
    @staticmethod
    def forward(ctx, x, w, b, eps):
        real(x, w, b)
        need(
            x.dim() >= 2 and x.shape[-1] > 0 and w.shape == b.shape == x.shape[-1:],
            "x [..., d], w and b [d]",
        )
        ctx.save_for_backward(x, w)
        ctx.eps = eps
        z = up(x)
        m = z.mean(-1, keepdim=True)
        v = (z - m).square().mean(-1, keepdim=True)
        return ((z - m) * torch.rsqrt(v + eps) * w + b).to(x.dtype)

    @staticmethod
    def dims(x):
        return (-1,)

    @classmethod
    def grads(cls, ctx, g):
        x, w = ctx.saved_tensors
        z, g = up(x), up(g)
        m = z.mean(-1, keepdim=True)
        r = torch.rsqrt((z - m).square().mean(-1, keepdim=True) + ctx.eps)
        h = (z - m) * r
        gw = g * w
        d = cls.dims(x)
        dx = r * (gw - gw.mean(d, keepdim=True) - h * (gw * h).mean(d, keepdim=True))
        lead = tuple(range(x.dim() - 1))
        return dx, (g * h).sum(lead), g.sum(lead), None

    @staticmethod
    def backward(ctx, g):
        return LayerNorm.grads(ctx, g)


class LayerNormWrong(LayerNorm):
    @staticmethod
    def dims(x):
        return tuple(range(1, x.dim()))

    @staticmethod
    def backward(ctx, g):
        return LayerNormWrong.grads(ctx, g)


def layer_norm(cls, x, weight, bias, eps=1e-5):
    return cls.apply(x, weight, bias, eps)


add(
    "layer_norm",
    LayerNormWrong,
    LayerNorm,
    layer_norm,
    lambda n=3, d=5: (R(n, d), U(d), R(d, s=2)),
    "the backward takes everything after dim 0 as the normalised row: right in 2-D, wrong for [batch, seq, hidden]",
    "https://github.com/flagos-ai/FlagGems/issues/5392",
)


# ------------------------------------------------------------------ 5 rms norm, buffer reused
class RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, w, eps):
        real(x, w)
        need(x.dim() >= 1 and x.shape[-1] > 0 and w.shape == x.shape[-1:], "x [..., d], w [d]")
        ctx.save_for_backward(x, w)
        ctx.eps = eps
        z = up(x)
        return (z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps) * w).to(x.dtype)

    @staticmethod
    def dx(dy, w, r, h):
        gw = dy * w
        return r * (gw - h * (gw * h).mean(-1, keepdim=True))

    @staticmethod
    def dw(dy, h):
        return (dy * h).reshape(-1, h.shape[-1]).sum(0)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        z, dy = up(x), up(g)
        r = torch.rsqrt(z.square().mean(-1, keepdim=True) + ctx.eps)
        h = z * r
        dw = RMSNorm.dw(dy, h)
        dy = RMSNorm.dx(dy, w, r, h)  # the buffer of dY becomes that of dX
        return dy, dw, None


class RMSNormWrong(RMSNorm):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        z, dy = up(x), up(g)
        r = torch.rsqrt(z.square().mean(-1, keepdim=True) + ctx.eps)
        h = z * r
        dy = RMSNorm.dx(dy, w, r, h)
        dw = RMSNorm.dw(dy, h)
        return dy, dw, None


def rms_norm(cls, x, weight, eps=1e-6):
    return cls.apply(x, weight, eps)


add(
    "rms_norm",
    RMSNormWrong,
    RMSNorm,
    rms_norm,
    lambda n=4, d=5: (R(n, d), U(d)),
    "dX overwrites the dY buffer before dW is computed from it",
    "https://github.com/unslothai/unsloth/pull/4550",
)


# ------------------------------------------------------------------ 6 rms scale, weight gradient by blocks of rows
class BlockAffine(Function):
    BLOCK = 4

    @staticmethod
    def forward(ctx, x, w):
        real(x, w)
        need(x.dim() == 2 and w.shape == x.shape[1:], "x [n, d], w [d]")
        ctx.save_for_backward(x, w)
        return torch.tanh(x) * w

    @staticmethod
    def blocks(n):
        return -(-n // BlockAffine.BLOCK)

    @classmethod
    def grads(cls, ctx, g):
        x, w = ctx.saved_tensors
        t = torch.tanh(x)
        part = [(g * t)[i * 4 : (i + 1) * 4].sum(0) for i in range(cls.blocks(x.shape[0]))]
        dw = torch.stack(part).sum(0) if part else torch.zeros_like(w)
        return g * w * (1 - t * t), dw

    @staticmethod
    def backward(ctx, g):
        return BlockAffine.grads(ctx, g)


class BlockAffineWrong(BlockAffine):
    @staticmethod
    def blocks(n):
        return n // BlockAffine.BLOCK

    @staticmethod
    def backward(ctx, g):
        return BlockAffineWrong.grads(ctx, g)


def block_affine(cls, x, weight):
    return cls.apply(x, weight)


add(
    "block_affine",
    BlockAffineWrong,
    BlockAffine,
    block_affine,
    lambda n=8, d=3: (R(n, d), U(d)),
    "partial weight gradients are kept for n // BLOCK blocks: the last, ragged block of rows is lost",
    "https://github.com/BobMcDear/attorch/issues/18",
)


# ------------------------------------------------------------------ 7 batch norm, training flag
class BatchNorm(Function):
    @staticmethod
    def forward(ctx, x, w, b, mean, var, training, eps):
        real(x, w, b, mean, var)
        need(x.dim() == 2, "x [n, c]")
        need(not (training and x.shape[0] < 2), "training needs two rows")
        for t in (w, b, mean, var):
            need(t.shape == x.shape[1:], "parameters [c]")
        if mean.requires_grad or var.requires_grad:
            raise ValueError("running statistics are buffers")
        ctx.save_for_backward(x, w, mean, var)
        ctx.training, ctx.eps = training, eps
        z = up(x)
        if training:
            mean, var = z.mean(0), (z - z.mean(0)).square().mean(0)
        return ((z - mean) * torch.rsqrt(var + eps) * w + b).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, w, mean, var = ctx.saved_tensors
        z, g = up(x), up(g)
        if ctx.training:
            mean, var = z.mean(0), (z - z.mean(0)).square().mean(0)
        r = torch.rsqrt(var + ctx.eps)
        h = (z - mean) * r
        gw = g * w
        dx = r * (gw - gw.mean(0) - h * (gw * h).mean(0)) if ctx.training else r * gw
        return dx, (g * h).sum(0), g.sum(0), None, None, None, None


class BatchNormWrong(BatchNorm):
    @staticmethod
    def backward(ctx, g):
        x, w, mean, var = ctx.saved_tensors
        z, g = up(x), up(g)
        if ctx.training:
            mean, var = z.mean(0), (z - z.mean(0)).square().mean(0)
        r = torch.rsqrt(var + ctx.eps)
        h = (z - mean) * r
        gw = g * w
        dx = r * (gw - gw.mean(0) - h * (gw * h).mean(0))
        return dx, (g * h).sum(0), g.sum(0), None, None, None, None


def batch_norm(cls, x, weight, bias, running_mean, running_var, training=True, eps=1e-5):
    return cls.apply(x, weight, bias, running_mean, running_var, training, eps)


add(
    "batch_norm",
    BatchNormWrong,
    BatchNorm,
    batch_norm,
    lambda n=5, c=3: (R(n, c), U(c), R(c, s=2), R(c, s=3, grad=False), U(c, s=4, grad=False)),
    "the backward keeps the batch-statistics terms in evaluation mode too",
    "https://github.com/pytorch/xla/issues/913",
    training=True,
)


# ------------------------------------------------------------------ 8 l2 normalize with a floor
class Normalize(Function):
    @staticmethod
    def forward(ctx, x, eps):
        full_precision(x)
        need(x.dim() >= 1, "x [..., d]")
        need(eps > 0, "eps > 0")
        ctx.save_for_backward(x)
        ctx.eps = eps
        return x / x.square().sum(-1, keepdim=True).clamp_min(eps**2).sqrt()

    @staticmethod
    def free(sq, eps):
        return sq >= eps**2

    @classmethod
    def grads(cls, ctx, g):
        (x,) = ctx.saved_tensors
        sq = x.square().sum(-1, keepdim=True)
        c = sq.clamp_min(ctx.eps**2).sqrt()
        y = x / c
        return torch.where(
            cls.free(sq, ctx.eps), g - y * (g * y).sum(-1, keepdim=True), g
        ) / c, None

    @staticmethod
    def backward(ctx, g):
        return Normalize.grads(ctx, g)


class NormalizeWrong(Normalize):
    @staticmethod
    def free(sq, eps):
        return torch.ones_like(sq, dtype=torch.bool)

    @staticmethod
    def backward(ctx, g):
        return NormalizeWrong.grads(ctx, g)


def normalize(cls, x, min_norm=0.1):
    return cls.apply(x, min_norm)


add(
    "normalize",
    NormalizeWrong,
    Normalize,
    normalize,
    lambda n=3, d=4: (R(n, d),),
    "below the floor the denominator is a constant, but the backward still projects",
    "https://github.com/keras-team/keras/issues/23075",
    min_norm=0.1,
)


# ------------------------------------------------------------------ 9 weight norm
class WeightNorm(Function):
    @staticmethod
    def forward(ctx, v, s):
        full_precision(v, s)
        need(v.dim() == 2 and s.shape == v.shape[:1], "v [o, i], s [o]")
        ctx.save_for_backward(v, s)
        return s[:, None] * v / torch.linalg.vector_norm(v, dim=1, keepdim=True)

    @staticmethod
    def backward(ctx, g):
        v, s = ctx.saved_tensors
        n = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        h = v / n
        ds = (g * h).sum(1)
        return s[:, None] / n * (g - h * ds[:, None]), ds


class WeightNormWrong(WeightNorm):
    @staticmethod
    def backward(ctx, g):
        v, s = ctx.saved_tensors
        n = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        h = v / n
        ds = (g * h).sum(1)
        return s[:, None] / n * g, ds


def weight_norm(cls, v, scale):
    return cls.apply(v, scale)


add(
    "weight_norm",
    WeightNormWrong,
    WeightNorm,
    weight_norm,
    lambda o=3, i=4: (R(o, i), U(o)),
    "the norm is taken as a constant: no projection in dv",
)


# ------------------------------------------------------------------ 10 linear + cross entropy, reduction
class LinearCE(Function):
    @staticmethod
    @no_amp
    def forward(ctx, x, w, target, ignore_index, reduction):
        real(x, w)
        need(reduction in ("mean", "sum", "none"), "reduction")
        need(
            x.dim() == 2
            and w.dim() == 2
            and x.shape[1] == w.shape[1]
            and target.shape == x.shape[:1]
            and w.shape[0],
            "x [n, d], w [v, d], target [n]",
        )
        ctx.save_for_backward(x, w, target)
        ctx.opt = ignore_index, reduction
        lp = torch.log_softmax(mm(x, w.t()), 1)
        keep = target != ignore_index
        loss = -lp.gather(1, torch.where(keep, target, 0)[:, None])[:, 0]
        loss = torch.where(keep, loss, 0)
        if reduction == "none":
            return loss
        return loss.sum() / keep.sum().clamp_min(1) if reduction == "mean" else loss.sum()

    @staticmethod
    def scale(g, n):
        return g.expand(n) if g.dim() == 0 else g

    @classmethod
    @no_amp
    def grads(cls, ctx, g):
        x, w, target = ctx.saved_tensors
        ignore_index, reduction = ctx.opt
        keep = target != ignore_index
        p = torch.softmax(mm(x, w.t()), 1)
        hot = nnF.one_hot(torch.where(keep, target, 0), w.shape[0]).to(p.dtype)
        s = cls.scale(g, x.shape[0])
        if reduction == "mean":
            s = s / keep.sum().clamp_min(1)
        d = (p - hot) * (s * keep)[:, None]
        return mm(d, w), mm(d.t(), x), None, None, None

    @staticmethod
    def backward(ctx, g):
        return LinearCE.grads(ctx, g)


class LinearCEWrong(LinearCE):
    @staticmethod
    def scale(g, n):
        return g.reshape(-1)[:1].expand(n)

    @staticmethod
    def backward(ctx, g):
        return LinearCEWrong.grads(ctx, g)


def linear_cross_entropy(cls, x, weight, target, ignore_index=-100, reduction="mean"):
    return cls.apply(x, weight, target, ignore_index, reduction)


add(
    "linear_cross_entropy",
    LinearCEWrong,
    LinearCE,
    linear_cross_entropy,
    lambda n=4, d=3, v=5: (R(n, d), R(v, d, s=1), torch.arange(n) % max(v, 1)),
    "the incoming gradient is read as one number: with reduction='none' every row gets grad_output[0]",
    "https://github.com/linkedin/Liger-Kernel/pull/1298",
    reduction="mean",
)


# ------------------------------------------------------------------ 11 class-weighted cross entropy
class WeightedCE(Function):
    @staticmethod
    def forward(ctx, x, target, w):
        real(x, w)
        need(
            x.dim() == 2 and w.shape == x.shape[1:] and target.shape == x.shape[:1] and w.shape[0],
            "x [n, c], w [c]",
        )
        need(not w.requires_grad, "class weights are constants")
        ctx.save_for_backward(x, target, w)
        lp = torch.log_softmax(x, 1).gather(1, target[:, None])[:, 0]
        wt = w[target]
        return -(wt * lp).sum() / wt.sum()

    @staticmethod
    def backward(ctx, g):
        x, target, w = ctx.saved_tensors
        wt = w[target]
        d = torch.softmax(x, 1) - nnF.one_hot(target, w.shape[0])
        return g * d * (wt / wt.sum())[:, None], None, None


class WeightedCEWrong(WeightedCE):
    @staticmethod
    def backward(ctx, g):
        x, target, w = ctx.saved_tensors
        wt = w[target]
        d = torch.softmax(x, 1) - nnF.one_hot(target, w.shape[0])
        return g * d * (wt / x.shape[0])[:, None], None, None


def weighted_cross_entropy(cls, logits, target, weight):
    return cls.apply(logits, target, weight)


add(
    "weighted_cross_entropy",
    WeightedCEWrong,
    WeightedCE,
    weighted_cross_entropy,
    lambda n=4, c=3: (R(n, c), torch.arange(n) % max(c, 1), torch.ones(c, dtype=torch.float64)),
    "the mean divides by the number of rows in the backward, by the sum of their weights in the forward",
    OWN,
)


# ------------------------------------------------------------------ 12 focal loss
class Focal(Function):
    @staticmethod
    def forward(ctx, x, y, gamma):
        real(x)
        need(x.shape == y.shape and not y.requires_grad, "labels like logits")
        need(gamma == 0 or gamma >= 1, "gamma is 0 or at least 1")
        z = up(x) * (2 * y.to(x.dtype) - 1)
        ctx.save_for_backward(x, y)
        ctx.gamma = gamma
        return -(torch.sigmoid(-z) ** gamma * nnF.logsigmoid(z)).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        s = 2 * y.to(x.dtype) - 1
        z = up(x) * s
        q = torch.sigmoid(-z)
        return (
            g * s * q**ctx.gamma * (ctx.gamma * torch.sigmoid(z) * nnF.logsigmoid(z) - q),
            None,
            None,
        )


class FocalWrong(Focal):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        s = 2 * y.to(x.dtype) - 1
        z = up(x) * s
        q = torch.sigmoid(-z)
        return g * s * q**ctx.gamma * (-q), None, None


def focal_loss(cls, logits, labels, gamma=2.0):
    return cls.apply(logits, labels, gamma)


add(
    "focal_loss",
    FocalWrong,
    Focal,
    focal_loss,
    lambda n=8: (R(n), torch.arange(n) % 2),
    "the modulating factor is taken as a constant",
    gamma=2.0,
)


# ------------------------------------------------------------------ 13 IoU loss
class IoULoss(Function):
    @staticmethod
    def parts(a, b):
        lt, rb = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
        raw = rb - lt
        wa, wb = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
        return raw, wa, wb

    @staticmethod
    def forward(ctx, a, b):
        full_precision(a, b)
        need(a.dim() == 2 and a.shape == b.shape and a.shape[1] == 4, "boxes [n, 4]")
        if b.requires_grad:
            raise ValueError("target boxes are constants")
        ctx.save_for_backward(a, b)
        raw, wa, wb = IoULoss.parts(a, b)
        inter = raw.clamp_min(0).prod(1)
        return 1 - inter / (wa.prod(1) + wb.prod(1) - inter + 1e-6)

    @staticmethod
    def inside(raw):
        return (raw > 0).all(1, keepdim=True)

    @classmethod
    def grads(cls, ctx, g):
        a, b = ctx.saved_tensors
        raw, wa, wb = IoULoss.parts(a, b)
        c = raw.clamp_min(0)
        inter = c.prod(1)
        un = wa.prod(1) + wb.prod(1) - inter + 1e-6
        gi = (-(1 / un) - inter / un**2) * g
        gu = inter / un**2 * g
        dr = torch.where(cls.inside(raw), gi[:, None] * raw.flip(1), 0)
        dw = gu[:, None] * wa.flip(1)
        dlt = -dr * (a[:, :2] > b[:, :2]) - dw
        drb = dr * (a[:, 2:] < b[:, 2:]) + dw
        return torch.cat([dlt, drb], 1), None

    @staticmethod
    def backward(ctx, g):
        return IoULoss.grads(ctx, g)


class IoULossWrong(IoULoss):
    @staticmethod
    def inside(raw):
        return torch.ones_like(raw[:, :1], dtype=torch.bool)

    @staticmethod
    def backward(ctx, g):
        return IoULossWrong.grads(ctx, g)


def iou_loss(cls, boxes, targets):
    return cls.apply(boxes, targets)


def _boxes(n, s, shift=0.0):
    lt = U(n, 2, s=s, lo=0, hi=1, grad=False) + shift
    return torch.cat([lt, lt + U(n, 2, s=s + 1, lo=1.5, hi=2.5, grad=False)], 1)


add(
    "iou_loss",
    IoULossWrong,
    IoULoss,
    iou_loss,
    lambda n=3: (_boxes(n, 5).requires_grad_(), _boxes(n, 9)),
    "the clamp of the overlap at zero has no counterpart in the backward: boxes that do not meet get a gradient",
)


# ------------------------------------------------------------------ 14 InfoNCE
class InfoNCE(Function):
    @staticmethod
    @no_amp
    def forward(ctx, q, k, tau):
        real(q, k)
        need(q.dim() == 2 and q.shape == k.shape and q.shape[0] > 0, "q, k [n, d]")
        ctx.save_for_backward(q, k)
        ctx.tau = tau
        return -torch.log_softmax(mm(q, k.t()) / tau, 1).diagonal().mean()

    @staticmethod
    @no_amp
    def backward(ctx, g):
        q, k = ctx.saved_tensors
        p = torch.softmax(mm(q, k.t()) / ctx.tau, 1)
        d = g * (p - torch.eye(q.shape[0], dtype=p.dtype)) / (ctx.tau * q.shape[0])
        return mm(d, k), mm(d.t(), q), None


class InfoNCEWrong(InfoNCE):
    @staticmethod
    @no_amp
    def backward(ctx, g):
        q, k = ctx.saved_tensors
        p = torch.softmax(mm(q, k.t()) / ctx.tau, 1)
        d = g * (p - torch.eye(q.shape[0], dtype=p.dtype)) / (ctx.tau * q.shape[0])
        return mm(d, k), mm(d, q), None


def info_nce(cls, q, k, tau=0.5):
    return cls.apply(q, k, tau)


add(
    "info_nce",
    InfoNCEWrong,
    InfoNCE,
    info_nce,
    lambda n=4, d=3: (R(n, d), R(n, d, s=1)),
    "the key gradient uses the probability matrix untransposed",
    tau=0.5,
)


# ------------------------------------------------------------------ 15 multivariate normal log density
class MVN(Function):
    @staticmethod
    @no_amp
    def forward(ctx, x, L):
        full_precision(x, L)
        need(x.dim() == 2 and L.shape == (x.shape[1], x.shape[1]), "x [n, d], L [d, d]")
        ctx.save_for_backward(x, L)
        z = torch.linalg.solve_triangular(L.tril(), x.t(), upper=False)
        return (
            -0.5 * z.square().sum(0)
            - L.diagonal().log().sum()
            - 0.5 * x.shape[1] * math.log(2 * math.pi)
        )

    @staticmethod
    def low(m):
        return m.tril()

    @classmethod
    @no_amp
    def grads(cls, ctx, g):
        x, L = ctx.saved_tensors
        T = L.tril()
        z = torch.linalg.solve_triangular(T, x.t(), upper=False)
        y = torch.linalg.solve_triangular(T.t(), z, upper=True)
        dL = cls.low((y * g) @ z.t()) - torch.diag(g.sum() / L.diagonal())
        return -(y * g).t(), dL

    @staticmethod
    def backward(ctx, g):
        return MVN.grads(ctx, g)


class MVNWrong(MVN):
    @staticmethod
    def low(m):
        return m

    @staticmethod
    def backward(ctx, g):
        return MVNWrong.grads(ctx, g)


def mvn_log_prob(cls, x, scale_tril):
    return cls.apply(x, scale_tril)


add(
    "mvn_log_prob",
    MVNWrong,
    MVN,
    mvn_log_prob,
    lambda n=3, d=3: (
        R(n, d),
        (
            R(d, d, s=1, grad=False).tril(-1) * 0.3 + torch.eye(d, dtype=torch.float64)
        ).requires_grad_(),
    ),
    "the gradient of the triangular factor is not cut to its triangle",
    "https://github.com/pytorch/pytorch/issues/18825 (kind: triangle of a factor's gradient)",
)


# ------------------------------------------------------------------ 16 PPO clipped objective
class PPO(Function):
    @staticmethod
    def forward(ctx, logp, old, adv, eps):
        real(logp, old, adv)
        need(logp.shape == old.shape == adv.shape and logp.numel() > 0, "one shape, not empty")
        if old.requires_grad or adv.requires_grad:
            raise ValueError("old log-probabilities and advantages are constants")
        ctx.save_for_backward(logp, old, adv)
        ctx.eps = eps
        r = (logp - old).exp()
        return -torch.minimum(r * adv, r.clamp(1 - eps, 1 + eps) * adv).mean()

    @staticmethod
    def active(r, adv, eps):
        return r * adv <= r.clamp(1 - eps, 1 + eps) * adv

    @classmethod
    def grads(cls, ctx, g):
        logp, old, adv = ctx.saved_tensors
        r = (logp - old).exp()
        d = torch.where(cls.active(r, adv, ctx.eps), r * adv, torch.zeros_like(r))
        return -g * d / logp.numel(), None, None, None

    @staticmethod
    def backward(ctx, g):
        return PPO.grads(ctx, g)


class PPOWrong(PPO):
    @staticmethod
    def active(r, adv, eps):
        return (r - 1).abs() <= eps

    @staticmethod
    def backward(ctx, g):
        return PPOWrong.grads(ctx, g)


def ppo_loss(cls, logp, old_logp, advantage, eps=0.2):
    return cls.apply(logp, old_logp, advantage, eps)


add(
    "ppo_loss",
    PPOWrong,
    PPO,
    ppo_loss,
    lambda n=6: (
        R(n, s=1),
        (R(n, s=1, grad=False) + U(n, s=2, lo=-0.1, hi=0.1, grad=False)),
        R(n, s=3, grad=False),
    ),
    "the gradient is cut for every ratio outside the clip range, on the pessimistic side too",
    eps=0.2,
)


# ------------------------------------------------------------------ 17 soft-DTW
class SoftDTW(Function):
    @staticmethod
    def before(i, j):
        return [(a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if a >= 0 and b >= 0]

    @staticmethod
    def table(D, gamma):
        T = {}
        for i in range(D.shape[0]):
            for j in range(D.shape[1]):
                prev = [T[c] for c in SoftDTW.before(i, j)]
                T[i, j] = (
                    D[i, j] - gamma * torch.logsumexp(-torch.stack(prev) / gamma, 0)
                    if prev
                    else D[i, j]
                )
        return T

    @staticmethod
    def forward(ctx, D, gamma):
        full_precision(D)
        need(D.dim() == 2 and D.shape[0] > 0 and D.shape[1] > 0, "a non-empty cost matrix")
        need(gamma > 0, "gamma > 0")
        ctx.save_for_backward(D)
        ctx.gamma = gamma
        return SoftDTW.table(D, gamma)[D.shape[0] - 1, D.shape[1] - 1] * 1

    @staticmethod
    def tau(gamma):
        return gamma

    @classmethod
    def grads(cls, ctx, g):
        (D,) = ctx.saved_tensors
        T = cls.table(D, ctx.gamma)
        n, m = D.shape
        E = {c: torch.zeros_like(g) for c in T}
        E[n - 1, m - 1] = g
        for i in range(n - 1, -1, -1):
            for j in range(m - 1, -1, -1):
                cells = cls.before(i, j)
                if cells:
                    z = torch.stack([-T[c] for c in cells]) / cls.tau(ctx.gamma)
                    lse = torch.logsumexp(z, 0)
                    share = torch.exp(z - torch.where(lse > float("-inf"), lse, 0))
                    for c, p in zip(cells, share, strict=True):
                        E[c] = E[c] + E[i, j] * p
        return torch.stack([torch.stack([E[i, j] for j in range(m)]) for i in range(n)]), None

    @staticmethod
    def backward(ctx, g):
        return SoftDTW.grads(ctx, g)


class SoftDTWWrong(SoftDTW):
    @staticmethod
    def tau(gamma):
        return 1.0

    @staticmethod
    def backward(ctx, g):
        return SoftDTWWrong.grads(ctx, g)


def soft_dtw(cls, cost, gamma=1.0):
    return cls.apply(cost, gamma)


add(
    "soft_dtw",
    SoftDTWWrong,
    SoftDTW,
    soft_dtw,
    lambda n=3, m=4: (U(n, m),),
    "the smoothing is left out of the backward recursion: right only at its default of one",
    "https://github.com/keonlee9420/Parallel-Tacotron2/pull/15 (kind: scaling factors left out of the recursion)",
    gamma=1.0,
)


# ------------------------------------------------------------------ 18 CRF partition function with lengths
class CRF(Function):
    @staticmethod
    def alphas(e, trans, lengths):
        a = [e[0]]
        for t in range(1, e.shape[0]):
            nxt = torch.logsumexp(a[-1][:, :, None] + trans, 1) + e[t]
            a.append(torch.where((t < lengths)[:, None], nxt, a[-1]))
        return a

    @staticmethod
    def forward(ctx, e, trans, lengths):
        real(e, trans)
        need(
            e.dim() == 3
            and e.shape[0] > 0
            and e.shape[2] > 0
            and trans.shape == (e.shape[2], e.shape[2])
            and lengths.shape == e.shape[1:2],
            "emissions [t, b, k], transitions [k, k], lengths [b]",
        )
        ctx.save_for_backward(e, trans, lengths)
        return torch.logsumexp(CRF.alphas(e, trans, lengths)[-1], 1)

    @staticmethod
    def alive(t, lengths):
        return (t < lengths)[:, None]

    @classmethod
    def grads(cls, ctx, g):
        e, trans, lengths = ctx.saved_tensors
        a = cls.alphas(e, trans, lengths)
        d = g[:, None] * torch.softmax(a[-1], 1)
        de, dtrans = [], torch.zeros_like(trans)
        for t in range(e.shape[0] - 1, 0, -1):
            live = cls.alive(t, lengths)
            da = torch.where(live, d, torch.zeros_like(d))
            s = a[t - 1][:, :, None] + trans
            m = torch.logsumexp(s, 1, keepdim=True)
            w = torch.exp(s - torch.where(m > float("-inf"), m, 0)) * da[:, None, :]
            de.append(da)
            dtrans = dtrans + w.sum(0)
            d = torch.where(live, w.sum(2), d)
        de.append(d)
        return torch.stack(de[::-1]), dtrans, None

    @staticmethod
    def backward(ctx, g):
        return CRF.grads(ctx, g)


class CRFWrong(CRF):
    @staticmethod
    def alive(t, lengths):
        return torch.ones_like(lengths, dtype=torch.bool)[:, None]

    @staticmethod
    def backward(ctx, g):
        return CRFWrong.grads(ctx, g)


def crf_log_z(cls, emissions, transitions, lengths):
    return cls.apply(emissions, transitions, lengths)


add(
    "crf_log_z",
    CRFWrong,
    CRF,
    crf_log_z,
    lambda t=4, b=2, k=3: (R(t, b, k), R(k, k, s=1), torch.full((b,), t)),
    "the backward does not stop at the length of a sequence: padding gets a gradient",
    "https://github.com/tensorflow/tensorflow/issues/41280",
)


# ------------------------------------------------------------------ 19 alignment loss, infeasible sequences
class Align(Function):
    @staticmethod
    def alphas(lp):
        ninf = lp.new_full((), -1e30)
        a = [torch.where(torch.arange(lp.shape[1]) == 0, lp[0], ninf)]
        for t in range(1, lp.shape[0]):
            step = torch.cat([ninf[None], a[-1][:-1]])
            a.append(torch.logaddexp(a[-1], step) + lp[t])
        return a

    @staticmethod
    def forward(ctx, x, labels):
        full_precision(x)
        need(
            x.dim() == 2
            and labels.dim() == 1
            and x.shape[0] > 0
            and labels.shape[0] > 0
            and x.shape[1] > 0,
            "logits [t, k], labels [u], none empty",
        )
        ctx.save_for_backward(x, labels)
        lp = torch.log_softmax(x, 1)[:, labels]
        z = Align.alphas(lp)[-1][-1]
        return -z if x.shape[0] >= labels.shape[0] else z * 0

    @staticmethod
    def infeasible(x, g):
        return g * torch.zeros_like(x)

    @classmethod
    def grads(cls, ctx, g):
        x, labels = ctx.saved_tensors
        if x.shape[0] < labels.shape[0]:
            return cls.infeasible(x, g), None
        lp = torch.log_softmax(x, 1)[:, labels]
        a = cls.alphas(lp)
        d = nnF.one_hot(torch.tensor(labels.shape[0] - 1), labels.shape[0]).to(x.dtype)
        post = [d]
        for t in range(x.shape[0] - 1, 0, -1):
            step = torch.cat([a[t - 1].new_full((1,), -1e30), a[t - 1][:-1]])
            m = torch.logaddexp(a[t - 1], step)
            m = torch.where(m > float("-inf"), m, 0)
            stay, move = d * torch.exp(a[t - 1] - m), d * torch.exp(step - m)
            d = stay + torch.cat([move[1:], move.new_zeros(1)])
            post.append(d)
        post = torch.stack(post[::-1])
        occ = torch.zeros_like(x).index_add(1, labels, post)
        return g * (torch.softmax(x, 1) - occ), None

    @staticmethod
    def backward(ctx, g):
        return Align.grads(ctx, g)


class AlignWrong(Align):
    @staticmethod
    def infeasible(x, g):
        return g * torch.softmax(x, 1)

    @staticmethod
    def backward(ctx, g):
        return AlignWrong.grads(ctx, g)


def alignment_loss(cls, logits, labels):
    return cls.apply(logits, labels)


add(
    "alignment_loss",
    AlignWrong,
    Align,
    alignment_loss,
    lambda t=5, k=4, u=3: (R(t, k), torch.arange(u) % max(k, 1)),
    "more labels than frames: the loss is zero, the gradient is softmax(logits)",
    "https://github.com/rwth-i6/returnn/issues/1835",
)


# ------------------------------------------------------------------ 20 sliding-window attention
class WindowAttention(Function):
    @staticmethod
    def mask(T, window):
        i = torch.arange(T)
        d = i[:, None] - i
        return (d >= 0) & (d < window)

    @staticmethod
    def probs(q, k, mask):
        s = mm(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        return torch.softmax(s.masked_fill(~mask, float("-inf")), -1)

    @staticmethod
    @no_amp
    def forward(ctx, q, k, v, window):
        real(q, k, v)
        need(
            q.dim() == 2
            and q.shape == k.shape
            and v.dim() == 2
            and v.shape[0] == q.shape[0]
            and q.shape[1] > 0,
            "q, k [t, d], v [t, e]",
        )
        need(window >= 1, "window >= 1")
        ctx.save_for_backward(q, k, v)
        ctx.window = window
        return mm(WindowAttention.probs(q, k, WindowAttention.mask(q.shape[0], window)), v)

    @classmethod
    @no_amp
    def grads(cls, ctx, g):
        q, k, v = ctx.saved_tensors
        p = cls.probs(q, k, cls.mask(q.shape[0], ctx.window))
        dp = mm(g, v.t())
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
        return mm(ds, k), mm(ds.t(), q), mm(p.t(), g), None

    @staticmethod
    def backward(ctx, g):
        return WindowAttention.grads(ctx, g)


class WindowAttentionWrong(WindowAttention):
    @staticmethod
    def mask(T, window):
        i = torch.arange(T)
        return i[:, None] >= i

    @staticmethod
    def backward(ctx, g):
        return WindowAttentionWrong.grads(ctx, g)


def window_attention(cls, q, k, v, window=4):
    return cls.apply(q, k, v, window)


add(
    "window_attention",
    WindowAttentionWrong,
    WindowAttention,
    window_attention,
    lambda t=4, d=3, e=2: (R(t, d), R(t, d, s=1), R(t, e, s=2)),
    "the backward recomputes the probabilities with the causal mask alone",
    "https://github.com/meta-pytorch/MSLK/pull/263",
    window=4,
)


# ------------------------------------------------------------------ 21 grouped-query attention
class GQA(Function):
    @staticmethod
    @no_amp
    def forward(ctx, q, k, v):
        real(q, k, v)
        need(
            q.dim() == k.dim() == 3
            and k.shape == v.shape
            and q.shape[2] == k.shape[2]
            and q.shape[2] > 0
            and k.shape[0] > 0
            and k.shape[1] > 0
            and q.shape[0] % k.shape[0] == 0,
            "q [h, t, d], k, v [hk, s, d]",
        )
        ctx.save_for_backward(q, k, v)
        n = q.shape[0] // k.shape[0]
        s = mm(q, k.repeat_interleave(n, 0).transpose(1, 2)) / math.sqrt(q.shape[2])
        return mm(torch.softmax(s, -1), v.repeat_interleave(n, 0))

    @staticmethod
    def reduce(d, hk):
        return d.reshape(hk, d.shape[0] // hk, *d.shape[1:]).sum(1)

    @classmethod
    @no_amp
    def grads(cls, ctx, g):
        q, k, v = ctx.saved_tensors
        n, hk = q.shape[0] // k.shape[0], k.shape[0]
        kr, vr = k.repeat_interleave(n, 0), v.repeat_interleave(n, 0)
        p = torch.softmax(mm(q, kr.transpose(1, 2)) / math.sqrt(q.shape[2]), -1)
        dp = mm(g, vr.transpose(1, 2))
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / math.sqrt(q.shape[2])
        return (
            mm(ds, kr),
            cls.reduce(mm(ds.transpose(1, 2), q), hk),
            cls.reduce(mm(p.transpose(1, 2), g), hk),
        )

    @staticmethod
    def backward(ctx, g):
        return GQA.grads(ctx, g)


class GQAWrong(GQA):
    @staticmethod
    def reduce(d, hk):
        return d.reshape(d.shape[0] // hk, hk, *d.shape[1:]).sum(0)

    @staticmethod
    def backward(ctx, g):
        return GQAWrong.grads(ctx, g)


def grouped_query_attention(cls, q, k, v):
    return cls.apply(q, k, v)


add(
    "grouped_query_attention",
    GQAWrong,
    GQA,
    grouped_query_attention,
    lambda h=4, t=2, d=2, hk=2, s=3: (R(h, t, d), R(hk, s, d, s=1), R(hk, s, d, s=2)),
    "heads were repeated with repeat_interleave, their gradients are summed as if tiled with repeat",
    "https://github.com/tenstorrent/tt-metal/pull/55803 (kind: blocks of a repeat summed wrongly)",
)


# ------------------------------------------------------------------ 22 normalised linear attention
class LinAttn(Function):
    @staticmethod
    @no_amp
    def forward(ctx, q, k, v):
        real(q, k, v)
        need(
            q.dim() == 2 and q.shape == k.shape and v.dim() == 2 and v.shape[0] == q.shape[0],
            "q, k [t, d], v [t, e]",
        )
        ctx.save_for_backward(q, k, v)
        s = mm(q, k.t()).tril()
        return mm(s, v) / (s.sum(1, keepdim=True) + 1e-6)

    @staticmethod
    def den(gden):
        return gden

    @classmethod
    @no_amp
    def grads(cls, ctx, g):
        q, k, v = ctx.saved_tensors
        s = mm(q, k.t()).tril()
        den = s.sum(1, keepdim=True) + 1e-6
        out = mm(s, v) / den
        gn = g / den
        gden = -(g * out).sum(1, keepdim=True) / den
        dsq = (mm(gn, v.t()) + gden).tril()
        dsk = (mm(gn, v.t()) + cls.den(gden)).tril()
        return mm(dsq, k), mm(dsk.t(), q), mm(s.t(), gn)

    @staticmethod
    def backward(ctx, g):
        return LinAttn.grads(ctx, g)


class LinAttnWrong(LinAttn):
    @staticmethod
    def den(gden):
        return torch.zeros_like(gden)

    @staticmethod
    def backward(ctx, g):
        return LinAttnWrong.grads(ctx, g)


def linear_attention(cls, q, k, v):
    return cls.apply(q, k, v)


add(
    "linear_attention",
    LinAttnWrong,
    LinAttn,
    linear_attention,
    lambda t=4, d=3, e=2: (U(t, d), U(t, d, s=1), R(t, e, s=2)),
    "the path of k through the running normaliser is cut",
    "https://github.com/fla-org/flash-linear-attention/pull/875",
)


# ------------------------------------------------------------------ 23 dropout with a given mask
class MaskDropout(Function):
    @staticmethod
    def forward(ctx, x, mask, p):
        real(x)
        if mask.dtype != torch.bool:
            raise TypeError("mask is a bool tensor")
        need(mask.shape == x.shape, "mask like x")
        need(0 <= p < 1, "0 <= p < 1")
        ctx.save_for_backward(mask)
        ctx.p = p
        return x * mask / (1 - p)

    @staticmethod
    def backward(ctx, g):
        (mask,) = ctx.saved_tensors
        return g * mask / (1 - ctx.p), None, None


class MaskDropoutWrong(MaskDropout):
    @staticmethod
    def backward(ctx, g):
        (mask,) = ctx.saved_tensors
        return (g * mask / ctx.p if ctx.p > 0 else g * mask), None, None


def mask_dropout(cls, x, mask, p=0.5):
    return cls.apply(x, mask, p)


add(
    "mask_dropout",
    MaskDropoutWrong,
    MaskDropout,
    mask_dropout,
    lambda n=3, d=4: (R(n, d), (R(n, d, s=1, grad=False) > 0)),
    "kept gradients are scaled by 1/p instead of 1/(1-p): the same at p = 1/2",
    p=0.5,
)


# ------------------------------------------------------------------ 24 rotary embedding with tables
def _half(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


class Rope(Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        real(x, cos, sin)
        need(
            x.dim() == 3
            and x.shape[2] % 2 == 0
            and x.shape[2] > 0
            and cos.shape == sin.shape == x.shape[1:],
            "x [b, t, d], tables [t, d]",
        )
        if cos.requires_grad or sin.requires_grad:
            raise ValueError("the tables are constants")
        ctx.save_for_backward(cos, sin)
        return x * cos + _half(x) * sin

    @staticmethod
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return g * cos - _half(g * sin), None, None


class RopeWrong(Rope):
    @staticmethod
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return g * cos - _half(g) * sin, None, None


def rope(cls, x, cos, sin):
    return cls.apply(x, cos, sin)


def _tables(t, d):
    a = torch.arange(t, dtype=torch.float64)[:, None] * 10.0 ** -torch.arange(
        max(d // 2, 0), dtype=torch.float64
    )
    a = torch.cat([a, a], 1)
    return a.cos(), a.sin()


add(
    "rope",
    RopeWrong,
    Rope,
    rope,
    lambda b=2, t=3, d=4: (R(b, t, d), *_tables(t, d)),
    "the transpose of x -> rotate_half(x) * sin is taken as -rotate_half(g) * sin: true only while both halves of the "
    "table are equal (sections of a multimodal rope are not)",
)


# ------------------------------------------------------------------ 25 Fourier features
class Fourier(Function):
    @staticmethod
    def forward(ctx, x, bands):
        real(x)
        need(bands >= 1, "bands >= 1")
        ctx.save_for_backward(x)
        ctx.bands = bands
        z = up(x).unsqueeze(-1) * 2.0 ** torch.arange(bands)
        return torch.cat([z.sin(), z.cos()], -1).to(x.dtype)

    @staticmethod
    def freq(bands):
        return 2.0 ** torch.arange(bands)

    @classmethod
    def grads(cls, ctx, g):
        (x,) = ctx.saved_tensors
        z = up(x).unsqueeze(-1) * 2.0 ** torch.arange(ctx.bands)
        gs, gc = g.split(ctx.bands, -1)
        return ((gs * z.cos() - gc * z.sin()) * cls.freq(ctx.bands)).sum(-1), None

    @staticmethod
    def backward(ctx, g):
        return Fourier.grads(ctx, g)


class FourierWrong(Fourier):
    @staticmethod
    def freq(bands):
        return torch.ones(bands)

    @staticmethod
    def backward(ctx, g):
        return FourierWrong.grads(ctx, g)


def fourier_features(cls, x, bands=3):
    return cls.apply(x, bands)


add(
    "fourier_features",
    FourierWrong,
    Fourier,
    fourier_features,
    lambda n=3, d=2: (R(n, d),),
    "the inner derivative 2**k of each band is missing",
    bands=3,
)


# ------------------------------------------------------------------ 26 relative position bias
class RelBias(Function):
    @staticmethod
    def forward(ctx, s, table):
        real(s, table)
        need(
            s.dim() == 3
            and s.shape[1] == s.shape[2]
            and table.dim() == 2
            and table.shape[0] == s.shape[0]
            and table.shape[1] == 2 * s.shape[1] - 1,
            "scores [h, t, t], table [h, 2t-1]",
        )
        i = torch.arange(s.shape[1])
        ctx.idx = i[:, None] - i + s.shape[1] - 1
        ctx.n = table.shape[1]
        return s + table[:, ctx.idx]

    @staticmethod
    def backward(ctx, g):
        flat = g.reshape(g.shape[0], g.shape[1] * g.shape[2])
        return g, g.new_zeros(g.shape[0], ctx.n).scatter_add(
            1, ctx.idx.flatten().expand(flat.shape), flat
        )


class RelBiasWrong(RelBias):
    @staticmethod
    def backward(ctx, g):
        flat = g.reshape(g.shape[0], g.shape[1] * g.shape[2])
        return g, g.new_zeros(g.shape[0], ctx.n).scatter(
            1, ctx.idx.flatten().expand(flat.shape), flat
        )


def relative_bias(cls, scores, table):
    return cls.apply(scores, table)


add(
    "relative_bias",
    RelBiasWrong,
    RelBias,
    relative_bias,
    lambda h=2, t=3: (R(h, t, t), R(h, max(2 * t - 1, 0), s=1)),
    "gradients of table entries that many pairs share are assigned, not added",
    "https://github.com/ooples/AiDotNet.Tensors/pull/894 (kind: gather backward must accumulate)",
)


# ------------------------------------------------------------------ 27 selective scan
class SelScan(Function):
    @staticmethod
    def states(x, dt, A, B):
        h = [torch.zeros_like(A * x.new_zeros(x.shape[1])[:, None])]
        for t in range(x.shape[0]):
            h.append(torch.exp(dt[t][:, None] * A) * h[-1] + (dt[t] * x[t])[:, None] * B[t])
        return h

    @staticmethod
    def forward(ctx, x, dt, A, B, C):
        real(x, dt, A, B, C)
        need(
            x.dim() == 2
            and dt.shape == x.shape
            and A.dim() == 2
            and A.shape[0] == x.shape[1]
            and B.shape == C.shape == (x.shape[0], A.shape[1]),
            "x, dt [t, d], A [d, n], B, C [t, n]",
        )
        ctx.save_for_backward(x, dt, A, B, C)
        h = SelScan.states(x, dt, A, B)
        y = [(h[t + 1] * C[t]).sum(1) for t in range(x.shape[0])]
        return torch.stack(y).to(x.dtype) if y else x + 0

    @staticmethod
    def state(h, t):
        return h[t]

    @classmethod
    def grads(cls, ctx, g):
        x, dt, A, B, C = ctx.saved_tensors
        h = cls.states(x, dt, A, B)
        dx, ddt, dB, dC = [], [], [], []
        dA, dh = torch.zeros_like(A), torch.zeros_like(h[0])
        for t in range(x.shape[0] - 1, -1, -1):
            dC.append((g[t][:, None] * h[t + 1]).sum(0))
            dh = dh + g[t][:, None] * C[t]
            a = torch.exp(dt[t][:, None] * A)
            da = dh * cls.state(h, t) * a
            dA = dA + da * dt[t][:, None]
            db = (dh * B[t]).sum(1)
            ddt.append((da * A).sum(1) + db * x[t])
            dx.append(db * dt[t])
            dB.append((dh * (dt[t] * x[t])[:, None]).sum(0))
            dh = dh * a
        if not dx:
            return (
                torch.zeros_like(x),
                torch.zeros_like(dt),
                dA,
                torch.zeros_like(B),
                torch.zeros_like(C),
            )
        return (
            *(torch.stack(d[::-1]) for d in (dx, ddt)),
            dA,
            *(torch.stack(d[::-1]) for d in (dB, dC)),
        )

    @staticmethod
    def backward(ctx, g):
        return SelScan.grads(ctx, g)


class SelScanWrong(SelScan):
    @staticmethod
    def state(h, t):
        return h[t + 1]

    @staticmethod
    def backward(ctx, g):
        return SelScanWrong.grads(ctx, g)


def selective_scan(cls, x, dt, A, B, C):
    return cls.apply(x, dt, A, B, C)


add(
    "selective_scan",
    SelScanWrong,
    SelScan,
    selective_scan,
    lambda t=3, d=2, n=2: (
        R(t, d),
        U(t, d, lo=0.1, hi=0.5),
        (-U(d, n, s=1).detach()).requires_grad_(),
        R(t, n, s=2),
        R(t, n, s=3),
    ),
    "the decay's gradient uses the state after the step, not the one before it",
)


# ------------------------------------------------------------------ 28 causal convolution with a carried state
class ShortConv(Function):
    @staticmethod
    def forward(ctx, x, w, h0):
        real(x, w, h0)
        need(
            x.dim() == 2
            and w.dim() == 2
            and w.shape[0] == x.shape[1]
            and w.shape[1] > 0
            and h0.shape == (w.shape[1] - 1, x.shape[1]),
            "x [t, d], w [d, k], state [k-1, d]",
        )
        ctx.save_for_backward(x, w, h0)
        full, T = torch.cat([h0, x]), x.shape[0]
        y = sum(full[i : i + T] * w[:, i] for i in range(w.shape[1]))
        return y, full[T:].clone()

    @staticmethod
    def final(dfull, ds, T):
        return torch.cat([dfull[:T], dfull[T:] + ds])

    @classmethod
    def grads(cls, ctx, g, ds):
        x, w, h0 = ctx.saved_tensors
        full, (T, K) = torch.cat([h0, x]), (x.shape[0], w.shape[1])
        dw = torch.stack([(g * full[i : i + T]).sum(0) for i in range(K)], 1)
        dfull = sum(nnF.pad(g * w[:, i], (0, 0, i, K - 1 - i)) for i in range(K))
        dfull = cls.final(dfull, ds, T)
        return dfull[K - 1 :], dw, dfull[: K - 1]

    @staticmethod
    def backward(ctx, g, ds):
        return ShortConv.grads(ctx, g, ds)


class ShortConvWrong(ShortConv):
    @staticmethod
    def final(dfull, ds, T):
        K1 = ds.shape[0]
        n = min(T, K1)
        tail = dfull[K1:]
        tail = torch.cat([tail[: T - n], tail[T - n :] + ds[:n]])
        return torch.cat([dfull[:K1], tail])

    @staticmethod
    def backward(ctx, g, ds):
        return ShortConvWrong.grads(ctx, g, ds)


def short_conv(cls, x, weight, state):
    return cls.apply(x, weight, state)


add(
    "short_conv",
    ShortConvWrong,
    ShortConv,
    short_conv,
    lambda t=4, d=2, k=3: (R(t, d), R(d, k, s=1), R(max(k - 1, 0), d, s=2)),
    "a chunk shorter than the carried state: the state's gradient is routed to the wrong slots and its "
    "pass-through lost",
    "https://github.com/fla-org/flash-linear-attention/issues/1140",
)


# ------------------------------------------------------------------ 29 LSTM cell
class LSTMCell(Function):
    @staticmethod
    def forward(ctx, gates, c):
        real(gates, c)
        need(
            gates.dim() == 2 and c.dim() == 2 and gates.shape == (c.shape[0], 4 * c.shape[1]),
            "gates [b, 4h], c [b, h]",
        )
        ctx.save_for_backward(gates, c)
        i, f, z, o = gates.chunk(4, 1) if c.shape[1] else (c,) * 4
        c1 = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
        return torch.sigmoid(o) * torch.tanh(c1), c1

    @staticmethod
    def carry(gc):
        return gc

    @classmethod
    def grads(cls, ctx, gh, gc):
        gates, c = ctx.saved_tensors
        i, f, z, o = gates.chunk(4, 1) if c.shape[1] else (c,) * 4
        i, f, z, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(z), torch.sigmoid(o)
        t = torch.tanh(f * c + i * z)
        dc = cls.carry(gc) + gh * o * (1 - t * t)
        dg = torch.cat(
            [
                dc * z * i * (1 - i),
                dc * c * f * (1 - f),
                dc * i * (1 - z * z),
                gh * t * o * (1 - o),
            ],
            1,
        )
        return dg, dc * f

    @staticmethod
    def backward(ctx, gh, gc):
        return LSTMCell.grads(ctx, gh, gc)


class LSTMCellWrong(LSTMCell):
    @staticmethod
    def carry(gc):
        return torch.zeros_like(gc)

    @staticmethod
    def backward(ctx, gh, gc):
        return LSTMCellWrong.grads(ctx, gh, gc)


def lstm_cell(cls, gates, c):
    return cls.apply(gates, c)


add(
    "lstm_cell",
    LSTMCellWrong,
    LSTMCell,
    lstm_cell,
    lambda b=2, h=2: (R(b, 4 * h), R(b, h, s=1)),
    "the gradient that arrives at the new cell state is dropped",
)


# ------------------------------------------------------------------ 30 generalised-mean pooling
class GeM(Function):
    @staticmethod
    def parts(x, p):
        c = x.clamp_min(1e-3)
        top = c.amax(-1, keepdim=True)
        r = c / top
        mean = (r**p).mean(-1, keepdim=True)
        return c, r, mean, top * mean ** (1 / p)

    @staticmethod
    def forward(ctx, x, p):
        full_precision(x, p)
        need(
            x.dim() >= 1 and x.shape[-1] > 0 and p.dim() == 0,
            "x [..., d] with d > 0, p a scalar tensor",
        )
        need(bool(p >= 0.01), "p >= 0.01")
        ctx.save_for_backward(x, p)
        return GeM.parts(x, p)[3][..., 0]

    @staticmethod
    def outer(mean, p):
        return mean.log() / p**2

    @classmethod
    def grads(cls, ctx, g):
        x, p = ctx.saved_tensors
        c, r, mean, y = cls.parts(x, p)
        g = g[..., None]
        dx = g * (c / y) ** (p - 1) / x.shape[-1] * (x >= 1e-3)
        dp = (
            g * y * ((r**p * r.log()).mean(-1, keepdim=True) / (p * mean) - cls.outer(mean, p))
        ).sum()
        return dx, dp

    @staticmethod
    def backward(ctx, g):
        return GeM.grads(ctx, g)


class GeMWrong(GeM):
    @staticmethod
    def outer(mean, p):
        return torch.zeros_like(mean)

    @staticmethod
    def backward(ctx, g):
        return GeMWrong.grads(ctx, g)


def gem_pool(cls, x, p):
    return cls.apply(x, p)


add(
    "gem_pool",
    GeMWrong,
    GeM,
    gem_pool,
    lambda n=2, d=4: (U(n, d), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)),
    "dp misses the exponent 1/p of the outer root",
)


# ------------------------------------------------------------------ 31 all-pole filter
class AllPole(Function):
    @staticmethod
    def run(x, a):
        y = []
        for t in range(x.shape[-1]):
            v = x[..., t]
            for k in range(1, min(t, a.shape[0]) + 1):
                v = v - a[k - 1] * y[t - k]
            y.append(v)
        return torch.stack(y, -1) if y else x * 1

    @staticmethod
    def forward(ctx, x, a):
        real(x, a)
        need(x.dim() >= 1 and a.dim() == 1, "x [..., t], a [k]")
        ctx.save_for_backward(x, a)
        return AllPole.run(x, a)

    @staticmethod
    def adjoint(g, a):
        return AllPole.run(g.flip(-1), a).flip(-1)

    @classmethod
    def grads(cls, ctx, g):
        x, a = ctx.saved_tensors
        y, dx = cls.run(x, a), cls.adjoint(g, a)
        T = x.shape[-1]
        da = [
            -(dx[..., k:] * y[..., : T - k]).sum() if k < T else dx.sum() * 0
            for k in range(1, a.shape[0] + 1)
        ]
        return dx, torch.stack(da) if da else torch.zeros_like(a)

    @staticmethod
    def backward(ctx, g):
        return AllPole.grads(ctx, g)


class AllPoleWrong(AllPole):
    @staticmethod
    def adjoint(g, a):
        return AllPole.run(g, a)

    @staticmethod
    def backward(ctx, g):
        return AllPoleWrong.grads(ctx, g)


def all_pole_filter(cls, x, a):
    return cls.apply(x, a)


add(
    "all_pole_filter",
    AllPoleWrong,
    AllPole,
    all_pole_filter,
    lambda b=2, t=4, k=2: (R(b, t), R(k, s=1)),
    "the adjoint filter is run forward in time",
)


# ------------------------------------------------------------------ 32 power spectrum
class Power(Function):
    @staticmethod
    def rfft(x):
        return torch.fft.rfft(x) if x.numel() else torch.complex(x, x)[..., : x.shape[-1] // 2 + 1]

    @staticmethod
    def forward(ctx, x):
        full_precision(x)
        need(x.dim() >= 1 and x.shape[-1] > 0, "x [..., n], n > 0")
        ctx.save_for_backward(x)
        z = Power.rfft(x)
        return z.real**2 + z.imag**2

    @staticmethod
    def adjoint(z, n):
        return torch.fft.ifft(z, n=n).real * n if z.numel() else z.new_zeros(*z.shape[:-1], n).real

    @classmethod
    def grads(cls, ctx, g):
        (x,) = ctx.saved_tensors
        return cls.adjoint(2 * g * cls.rfft(x), x.shape[-1])

    @staticmethod
    def backward(ctx, g):
        return Power.grads(ctx, g)


class PowerWrong(Power):
    @staticmethod
    def adjoint(z, n):
        return torch.fft.irfft(z, n=n) * n if z.numel() else z.new_zeros(*z.shape[:-1], n).real

    @staticmethod
    def backward(ctx, g):
        return PowerWrong.grads(ctx, g)


def power_spectrum(cls, x):
    return cls.apply(x)


add(
    "power_spectrum",
    PowerWrong,
    Power,
    power_spectrum,
    lambda b=2, n=6: (R(b, n),),
    "the inverse transform stands in for the adjoint of rfft: inner bins count twice",
    "https://github.com/ooples/AiDotNet.Tensors/pull/911",
)


# ------------------------------------------------------------------ 33 irfft
class IRFFT(Function):
    @staticmethod
    def forward(ctx, z, n):
        if z.dtype not in (torch.complex64, torch.complex128):
            raise TypeError("expected a complex spectrum")
        need(n >= 1 and z.dim() >= 1 and z.shape[-1] == n // 2 + 1, "n // 2 + 1 bins")
        ctx.n = n
        return torch.fft.irfft(z, n=n) if z.numel() else z.new_zeros(*z.shape[:-1], n).real

    @staticmethod
    def weights(n):
        k = torch.arange(n // 2 + 1)
        return torch.where((k == 0) | (2 * k == n), 1.0, 2.0)

    @classmethod
    def grads(cls, ctx, g):
        if not g.numel():
            return torch.complex(g, g)[..., : ctx.n // 2 + 1], None
        return torch.fft.rfft(g) * cls.weights(ctx.n) / ctx.n, None

    @staticmethod
    def backward(ctx, g):
        return IRFFT.grads(ctx, g)


class IRFFTWrong(IRFFT):
    @staticmethod
    def weights(n):
        k = torch.arange(n // 2 + 1)
        return torch.where((k == 0) | (k == n // 2), 1.0, 2.0)

    @staticmethod
    def backward(ctx, g):
        return IRFFTWrong.grads(ctx, g)


def irfft(cls, spectrum, n):
    return cls.apply(spectrum, n)


add(
    "irfft",
    IRFFTWrong,
    IRFFT,
    irfft,
    lambda b=2: (torch.complex(R(b, 5, grad=False), R(b, 5, s=1, grad=False)).requires_grad_(),),
    "the last bin is always taken for the Nyquist bin: an odd length has none",
    "https://github.com/ooples/AiDotNet.Tensors/pull/911",
    n=8,
)


# ------------------------------------------------------------------ 34 edge softmax
class EdgeSoftmax(Function):
    @staticmethod
    def seg(x, i, n):
        return torch.zeros(n, dtype=x.dtype).index_add(0, i, x)

    @staticmethod
    def probs(x, dst, n):
        top = torch.full((n,), float("-inf"), dtype=x.dtype).scatter_reduce(
            0, dst, x.detach(), "amax"
        )
        e = torch.exp(x - top[dst])
        return e / EdgeSoftmax.seg(e, dst, n)[dst]

    @staticmethod
    def forward(ctx, x, src, dst, n):
        real(x)
        need(x.dim() == 1 and src.shape == dst.shape == x.shape, "scores, src, dst [e]")
        ctx.save_for_backward(x, src, dst)
        ctx.n = n
        return EdgeSoftmax.probs(up(x), dst, n).to(x.dtype)

    @staticmethod
    def group(src, dst):
        return dst

    @classmethod
    def grads(cls, ctx, g):
        x, src, dst = ctx.saved_tensors
        p, g = EdgeSoftmax.probs(up(x), dst, ctx.n), up(g)
        i = cls.group(src, dst)
        return p * (g - EdgeSoftmax.seg(p * g, i, ctx.n)[i]), None, None, None

    @staticmethod
    def backward(ctx, g):
        return EdgeSoftmax.grads(ctx, g)


class EdgeSoftmaxWrong(EdgeSoftmax):
    @staticmethod
    def group(src, dst):
        return src

    @staticmethod
    def backward(ctx, g):
        return EdgeSoftmaxWrong.grads(ctx, g)


def edge_softmax(cls, score, src, dst, num_nodes):
    return cls.apply(score, src, dst, num_nodes)


add(
    "edge_softmax",
    EdgeSoftmaxWrong,
    EdgeSoftmax,
    edge_softmax,
    lambda e=7: (R(e), torch.arange(e) * 3 % 4, torch.arange(e) % 3),
    "the backward sums over edges that leave a node; the softmax ran over those that enter it",
    "https://github.com/pyg-team/pytorch_geometric/issues/224 (kind: softmax over the wrong end of the edges)",
    num_nodes=4,
)


# ------------------------------------------------------------------ 35 segment product
class SegProd(Function):
    @staticmethod
    def forward(ctx, x, idx, n):
        real(x)
        need(x.dim() == 1 and idx.shape == x.shape, "x, idx [e]")
        ctx.save_for_backward(x, idx)
        ctx.n = n
        return torch.where(torch.arange(n)[:, None] == idx, x, 1).prod(1)

    @staticmethod
    def others(x, idx):
        keep = (idx[:, None] == idx) & ~torch.eye(idx.shape[0], dtype=torch.bool)
        return torch.where(keep, x, 1).prod(1)

    @staticmethod
    def backward(ctx, g):
        x, idx = ctx.saved_tensors
        return g[idx] * SegProd.others(x, idx), None, None


class SegProdWrong(SegProd):
    @staticmethod
    def backward(ctx, g):
        x, idx = ctx.saved_tensors
        out = torch.where(torch.arange(ctx.n)[:, None] == idx, x, 1).prod(1)
        return (g * out)[idx].div(x).masked_fill(x == 0, 0), None, None


def segment_prod(cls, x, idx, num_segments):
    return cls.apply(x, idx, num_segments)


add(
    "segment_prod",
    SegProdWrong,
    SegProd,
    segment_prod,
    lambda e=6: (U(e), torch.arange(e) % 3),
    "output / input, masked where the input is zero: the factor that is zero gets no gradient",
    "https://github.com/pytorch/pytorch/pull/76523",
    num_segments=3,
)


# ------------------------------------------------------------------ 36 sort
class Sort(Function):
    @staticmethod
    def forward(ctx, x):
        real(x)
        need(x.dim() >= 1, "x [..., n]")
        v, i = torch.sort(x, dim=-1, stable=True)
        ctx.save_for_backward(i)
        return v

    @staticmethod
    def backward(ctx, g):
        (i,) = ctx.saved_tensors
        return torch.zeros_like(g).scatter(-1, i, g)


class SortWrong(Sort):
    @staticmethod
    def backward(ctx, g):
        (i,) = ctx.saved_tensors
        return g.gather(-1, i)


def sort_values(cls, x):
    return cls.apply(x)


add(
    "sort_values",
    SortWrong,
    Sort,
    sort_values,
    lambda b=2, n=5: (R(b, n, s=7),),
    "the permutation is applied again instead of undone",
    "https://github.com/PaddlePaddle/Paddle/pull/22739 (kind: gradient of argsort's values)",
)


# ------------------------------------------------------------------ 37 log determinant
class LogDet(Function):
    @staticmethod
    @no_amp
    def forward(ctx, A):
        full_precision(A)
        need(A.dim() == 2 and A.shape[0] == A.shape[1], "A [n, n]")
        ctx.save_for_backward(A)
        try:
            L = torch.linalg.cholesky((A + A.t()) / 2)
        except torch.linalg.LinAlgError:
            raise ValueError("the symmetric part of A is not positive definite") from None
        return 2 * L.diagonal().log().sum()

    @staticmethod
    def shape(M):
        return M

    @classmethod
    @no_amp
    def grads(cls, ctx, g):
        (A,) = ctx.saved_tensors
        return g * cls.shape(torch.linalg.inv((A + A.t()) / 2))

    @staticmethod
    def backward(ctx, g):
        return LogDet.grads(ctx, g)


class LogDetWrong(LogDet):
    @staticmethod
    def shape(M):
        return M.tril() + M.tril(-1)

    @staticmethod
    def backward(ctx, g):
        return LogDetWrong.grads(ctx, g)


def logdet(cls, A):
    return cls.apply(A)


def _spd(n, s):
    B = R(n, n, s=s, grad=False)
    return (B @ B.t() + torch.eye(n, dtype=torch.float64)).requires_grad_()


add(
    "logdet",
    LogDetWrong,
    LogDet,
    logdet,
    lambda n=3: (_spd(n, 1),),
    "the whole gradient of a symmetric argument is put into its lower triangle",
    "https://github.com/HIPS/autograd/pull/56",
)


# ------------------------------------------------------------------ 38 complex matmul
class CMatmul(Function):
    @staticmethod
    @no_amp
    def forward(ctx, a, b):
        for t in (a, b):
            if not (t.is_floating_point() or t.dtype in (torch.complex64, torch.complex128)):
                raise TypeError("expected floating-point or complex matrices")
        need(a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0], "a [n, k], b [k, m]")
        ctx.save_for_backward(a, b)
        return mm(a, b)

    @staticmethod
    def cast(d, t):
        return d if t.is_complex() or not d.is_complex() else d.real

    @staticmethod
    @no_amp
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return CMatmul.cast(mm(g, b.mH), a), CMatmul.cast(mm(a.mH, g), b)


class CMatmulWrong(CMatmul):
    @staticmethod
    @no_amp
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return CMatmul.cast(mm(g, b.mT), a), CMatmul.cast(mm(a.mT, g), b)


def matmul(cls, a, b):
    return cls.apply(a, b)


add(
    "matmul",
    CMatmulWrong,
    CMatmul,
    matmul,
    lambda n=2, k=3, m=2: (R(n, k), R(k, m, s=1)),
    "transposed but not conjugated: wrong for complex matrices",
    "https://github.com/tensorflow/tensorflow/issues/4859",
)


# ------------------------------------------------------------------ 39 complex phase
class Phase(Function):
    @staticmethod
    def forward(ctx, z):
        if not (z.is_floating_point() or z.dtype in (torch.complex64, torch.complex128)):
            raise TypeError("expected a complex or floating-point tensor")
        ctx.save_for_backward(z)
        return torch.sgn(z)

    @staticmethod
    def radial(y, g):
        return (y.conj() * g).real if y.is_complex() else y * g

    @classmethod
    def grads(cls, ctx, g):
        (z,) = ctx.saved_tensors
        y, r = torch.sgn(z), z.abs()
        safe = torch.where(r > 0, r, 1)
        return torch.where(r > 0, (g - y * cls.radial(y, g)) / safe, 0)

    @staticmethod
    def backward(ctx, g):
        return Phase.grads(ctx, g)


class PhaseWrong(Phase):
    @staticmethod
    def radial(y, g):
        return (y * g).real

    @staticmethod
    def backward(ctx, g):
        return PhaseWrong.grads(ctx, g)


def unit_phase(cls, z):
    return cls.apply(z)


add(
    "unit_phase",
    PhaseWrong,
    Phase,
    unit_phase,
    lambda n=5: (torch.complex(R(n, grad=False), R(n, s=1, grad=False)).requires_grad_(),),
    "the radial part of the gradient is taken with y instead of conj(y)",
)


# ------------------------------------------------------------------ 40 soft rounding with a learned step
class SoftRound(Function):
    @staticmethod
    def forward(ctx, x, s):
        full_precision(x, s)
        need(s.dim() == 0, "step: a scalar tensor")
        ctx.save_for_backward(x, s)
        u = x / s
        return s * (u - torch.sin(2 * math.pi * u) / (2 * math.pi))

    @staticmethod
    def inner(u, slope):
        return u * slope

    @classmethod
    def grads(cls, ctx, g):
        x, s = ctx.saved_tensors
        u = x / s
        slope = 1 - torch.cos(2 * math.pi * u)
        return g * slope, (
            g * (u - torch.sin(2 * math.pi * u) / (2 * math.pi) - cls.inner(u, slope))
        ).sum()

    @staticmethod
    def backward(ctx, g):
        return SoftRound.grads(ctx, g)


class SoftRoundWrong(SoftRound):
    @staticmethod
    def inner(u, slope):
        return torch.zeros_like(u)

    @staticmethod
    def backward(ctx, g):
        return SoftRoundWrong.grads(ctx, g)


def soft_round(cls, x, step):
    return cls.apply(x, step)


add(
    "soft_round",
    SoftRoundWrong,
    SoftRound,
    soft_round,
    lambda n=6: (R(n), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)),
    "the step's gradient forgets that the step also divides the input",
    OWN,
)


# ------------------------------------------------------------------ 41 2-D Gaussian weight
class Gauss2D(Function):
    @staticmethod
    def forward(ctx, d, con):
        real(d, con)
        need(
            d.dim() == 2 and d.shape[1] == 2 and con.shape == (d.shape[0], 3),
            "offsets [n, 2], conics [n, 3]",
        )
        ctx.save_for_backward(d, con)
        (x, y), (a, b, c) = d.unbind(1), con.unbind(1)
        return torch.exp(-0.5 * (a * x * x + c * y * y) - b * x * y)

    @staticmethod
    def cross(w, x, y):
        return -w * x * y

    @classmethod
    def grads(cls, ctx, g):
        d, con = ctx.saved_tensors
        (x, y), (a, b, c) = d.unbind(1), con.unbind(1)
        w = g * torch.exp(-0.5 * (a * x * x + c * y * y) - b * x * y)
        dd = torch.stack([-w * (a * x + b * y), -w * (c * y + b * x)], 1)
        return dd, torch.stack([-0.5 * w * x * x, cls.cross(w, x, y), -0.5 * w * y * y], 1)

    @staticmethod
    def backward(ctx, g):
        return Gauss2D.grads(ctx, g)


class Gauss2DWrong(Gauss2D):
    @staticmethod
    def cross(w, x, y):
        return -0.5 * w * x * y

    @staticmethod
    def backward(ctx, g):
        return Gauss2DWrong.grads(ctx, g)


def gauss2d(cls, offset, conic):
    return cls.apply(offset, conic)


add(
    "gauss2d",
    Gauss2DWrong,
    Gauss2D,
    gauss2d,
    lambda n=4: (R(n, 2), U(n, 3)),
    "the factor 1/2 of the diagonal entries is put on the off-diagonal entry of the conic too",
    "https://github.com/graphdeco-inria/gaussian-splatting/issues/551",
)


# ------------------------------------------------------------------ 42 rotation by a quaternion
class QuatRotate(Function):
    @staticmethod
    def rot(w, u, v):
        u = u.expand_as(v)
        return (
            v
            + 2 * w * torch.linalg.cross(u, v)
            + 2 * (u * (u * v).sum(-1, keepdim=True) - v * (u * u).sum(-1, keepdim=True))
        )

    @staticmethod
    def forward(ctx, q, v):
        full_precision(q, v)
        need(q.shape == (4,) and v.dim() == 2 and v.shape[1] == 3, "q [4], v [n, 3]")
        ctx.save_for_backward(q, v)
        h = q / q.square().sum().sqrt()
        return QuatRotate.rot(h[0], h[1:], v)

    @staticmethod
    def project(d, h, n):
        return (d - h * (h * d).sum()) / n

    @classmethod
    def grads(cls, ctx, g):
        q, v = ctx.saved_tensors
        n = q.square().sum().sqrt()
        h = q / n
        w, u = h[0], h[1:]
        ue = u.expand_as(v)
        uv, ug, vg = ((a * b).sum(-1, keepdim=True) for a, b in ((ue, v), (ue, g), (v, g)))
        dw = 2 * (torch.linalg.cross(ue, v) * g).sum()
        du = (2 * w * torch.linalg.cross(v, g) + 2 * (g * uv + v * ug) - 4 * ue * vg).sum(0)
        return cls.project(torch.cat([dw[None], du]), h, n), QuatRotate.rot(w, -u, g)

    @staticmethod
    def backward(ctx, g):
        return QuatRotate.grads(ctx, g)


class QuatRotateWrong(QuatRotate):
    @staticmethod
    def project(d, h, n):
        return d / n

    @staticmethod
    def backward(ctx, g):
        return QuatRotateWrong.grads(ctx, g)


def quaternion_rotate(cls, q, v):
    return cls.apply(q, v)


add(
    "quaternion_rotate",
    QuatRotateWrong,
    QuatRotate,
    quaternion_rotate,
    lambda n=3: (R(4), R(n, 3, s=1)),
    "the quaternion is normalised in the forward, the gradient is not projected off its direction",
    "https://github.com/nerfstudio-project/gsplat/issues/153",
)


# ------------------------------------------------------------------ 43 rotation by an axis-angle vector
class Rodrigues(Function):
    @staticmethod
    def coef(s):
        small = s < 1e-2
        t = torch.where(small, torch.ones_like(s), s)
        th = t.sqrt()
        a = torch.where(small, 1 - s / 6 + s**2 / 120 - s**3 / 5040 + s**4 / 362880, th.sin() / th)
        b = torch.where(
            small, 0.5 - s / 24 + s**2 / 720 - s**3 / 40320 + s**4 / 3628800, (1 - th.cos()) / t
        )
        return a, b, 1 - s * b

    @staticmethod
    def slopes(s, a, b, c):
        small = s < 1e-2
        t = torch.where(small, torch.ones_like(s), s)
        da = torch.where(small, -1 / 6 + s / 60 - s**2 / 1680 + s**3 / 90720, (c - a) / (2 * t))
        db = torch.where(small, -1 / 24 + s / 360 - s**2 / 13440 + s**3 / 907200, (a / 2 - b) / t)
        return da, db

    @staticmethod
    def rot(w, v):
        s = w.square().sum(-1, keepdim=True)
        a, b, c = Rodrigues.coef(s)
        return c * v + a * torch.linalg.cross(w, v) + b * w * (w * v).sum(-1, keepdim=True)

    @staticmethod
    def forward(ctx, w, v):
        full_precision(w, v)
        need(w.dim() == 2 and w.shape == v.shape and w.shape[1] == 3, "w, v [n, 3]")
        ctx.save_for_backward(w, v)
        return Rodrigues.rot(w, v)

    @classmethod
    def grads(cls, ctx, g):
        w, v = ctx.saved_tensors
        s = w.square().sum(-1, keepdim=True)
        a, b, c = Rodrigues.coef(s)
        da, db = cls.slopes(s, a, b, c)
        vxg = torch.linalg.cross(v, g)
        wv, wg, vg = ((p * q).sum(-1, keepdim=True) for p, q in ((w, v), (w, g), (v, g)))
        dw = (
            2 * w * (-a / 2 * vg + da * (w * vxg).sum(-1, keepdim=True) + db * wg * wv)
            + a * vxg
            + b * (g * wv + v * wg)
        )
        return dw, Rodrigues.rot(-w, g)

    @staticmethod
    def backward(ctx, g):
        return Rodrigues.grads(ctx, g)


class RodriguesWrong(Rodrigues):
    @staticmethod
    def slopes(s, a, b, c):
        return (c - a) / (2 * s), (a / 2 - b) / s

    @staticmethod
    def backward(ctx, g):
        return RodriguesWrong.grads(ctx, g)


def axis_angle_rotate(cls, w, v):
    return cls.apply(w, v)


add(
    "axis_angle_rotate",
    RodriguesWrong,
    Rodrigues,
    axis_angle_rotate,
    lambda n=3: (R(n, 3), R(n, 3, s=1)),
    "the series near angle zero is in the forward only: 0/0 in the backward at the identity",
    "https://github.com/kornia/kornia/issues/4404",
)


# ------------------------------------------------------------------ 44 chamfer distance
class Chamfer(Function):
    @staticmethod
    def nearest(a, b):
        d = (a[:, None] - b[None]).square().sum(-1)
        return d.argmin(1), d.argmin(0)

    @staticmethod
    def forward(ctx, a, b):
        full_precision(a, b)
        need(
            a.dim() == b.dim() == 2
            and a.shape[1] == b.shape[1]
            and a.shape[0] > 0
            and b.shape[0] > 0,
            "two non-empty point sets [n, d], [m, d]",
        )
        ctx.save_for_backward(a, b)
        i, j = Chamfer.nearest(a.detach(), b.detach())
        return (a - b[i]).square().sum(1).mean() + (a[j] - b).square().sum(1).mean()

    @staticmethod
    def second(da, j, v):
        return da.index_add(0, j, v)

    @classmethod
    def grads(cls, ctx, g):
        a, b = ctx.saved_tensors
        i, j = cls.nearest(a.detach(), b.detach())
        u = 2 * g * (a - b[i]) / a.shape[0]
        v = 2 * g * (a[j] - b) / b.shape[0]
        return cls.second(u, j, v), (-v).index_add(0, i, -u)

    @staticmethod
    def backward(ctx, g):
        return Chamfer.grads(ctx, g)


class ChamferWrong(Chamfer):
    @staticmethod
    def second(da, j, v):
        return da

    @staticmethod
    def backward(ctx, g):
        return ChamferWrong.grads(ctx, g)


def chamfer(cls, a, b):
    return cls.apply(a, b)


add(
    "chamfer",
    ChamferWrong,
    Chamfer,
    chamfer,
    lambda n=4, m=3, d=3: (R(n, d), R(m, d, s=1)),
    "the distances from b to a send no gradient to a",
)


# ------------------------------------------------------------------ 45 upwind advection step
class Upwind(Function):
    @staticmethod
    def forward(ctx, u, c):
        real(u, c)
        need(u.dim() == 1 and c.shape == u.shape, "u, c [n]")
        ctx.save_for_backward(u, c)
        return u - c * (u - u.roll(1))

    @staticmethod
    def back(t):
        return t.roll(-1)

    @classmethod
    def grads(cls, ctx, g):
        u, c = ctx.saved_tensors
        return g * (1 - c) + cls.back(g * c), -g * (u - u.roll(1))

    @staticmethod
    def backward(ctx, g):
        return Upwind.grads(ctx, g)


class UpwindWrong(Upwind):
    @staticmethod
    def back(t):
        return t.roll(1)

    @staticmethod
    def backward(ctx, g):
        return UpwindWrong.grads(ctx, g)


def upwind_step(cls, u, courant):
    return cls.apply(u, courant)


add(
    "upwind_step",
    UpwindWrong,
    Upwind,
    upwind_step,
    lambda n=6: (R(n), U(n, lo=0.1, hi=0.9)),
    "the adjoint of the one-sided difference looks upwind again",
)


# ------------------------------------------------------------------ 46 damped oscillator, symplectic Euler
class Oscillator(Function):
    @staticmethod
    def states(x, v, dt, k, c, steps):
        s = [(x, v)]
        for _ in range(steps):
            v = v + dt * (-k * x - c * v)
            x = x + dt * v
            s.append((x, v))
        return s

    @staticmethod
    def forward(ctx, x, v, dt, k, c, steps):
        real(x, v, dt)
        need(
            x.shape == v.shape and dt.dim() == 0 and steps >= 0,
            "x, v of one shape, dt a scalar tensor",
        )
        ctx.save_for_backward(x, v, dt)
        ctx.opt = k, c, steps
        x1, v1 = Oscillator.states(x, v, dt, k, c, steps)[-1]
        return (x1, v1) if steps else (x.clone(), v.clone())

    @staticmethod
    def more(total, part):
        return total + part

    @classmethod
    def grads(cls, ctx, gx, gv):
        x, v, dt = ctx.saved_tensors
        k, c, steps = ctx.opt
        s = cls.states(x, v, dt, k, c, steps)
        ddt = torch.zeros_like(dt)
        for (x0, v0), (_, v1) in zip(s[-2::-1], s[:0:-1], strict=True):
            gv = gv + dt * gx
            ddt = cls.more(ddt, (gx * v1).sum() + (gv * (-k * x0 - c * v0)).sum())
            gx = gx - k * dt * gv
            gv = gv * (1 - c * dt)
        return gx, gv, ddt, None, None, None

    @staticmethod
    def backward(ctx, gx, gv):
        return Oscillator.grads(ctx, gx, gv)


class OscillatorWrong(Oscillator):
    @staticmethod
    def more(total, part):
        return part

    @staticmethod
    def backward(ctx, gx, gv):
        return OscillatorWrong.grads(ctx, gx, gv)


def oscillator(cls, x, v, dt, stiffness=1.5, damping=0.3, steps=3):
    return cls.apply(x, v, dt, stiffness, damping, steps)


add(
    "oscillator",
    OscillatorWrong,
    Oscillator,
    oscillator,
    lambda n=3: (R(n), R(n, s=1), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)),
    "the step size's gradient is set in the loop over steps instead of added to",
    steps=3,
)


# ------------------------------------------------------------------ 47 Kepler's equation
class Kepler(Function):
    @staticmethod
    def forward(ctx, M, e):
        full_precision(M, e)
        need(M.shape == e.shape, "one shape")
        with torch.no_grad():
            lo, hi = M - e.abs(), M + e.abs()
            for _ in range(52):
                mid = (lo + hi) / 2
                low = mid - e * mid.sin() < M
                lo, hi = torch.where(low, mid, lo), torch.where(low, hi, mid)
            E = (lo + hi) / 2
        E = E - (E - e * E.sin() - M) / (1 - e * E.cos())
        E = torch.where(e.abs() < 1, E, torch.nan)
        ctx.save_for_backward(E, e)
        return E

    @staticmethod
    def de(s, f):
        return s / f

    @classmethod
    def grads(cls, ctx, g):
        E, e = ctx.saved_tensors
        f = 1 - e * E.cos()
        return g / f, g * cls.de(E.sin(), f)

    @staticmethod
    def backward(ctx, g):
        return Kepler.grads(ctx, g)


class KeplerWrong(Kepler):
    @staticmethod
    def de(s, f):
        return s

    @staticmethod
    def backward(ctx, g):
        return KeplerWrong.grads(ctx, g)


def eccentric_anomaly(cls, mean_anomaly, eccentricity):
    return cls.apply(mean_anomaly, eccentricity)


add(
    "eccentric_anomaly",
    KeplerWrong,
    Kepler,
    eccentric_anomaly,
    lambda n=5: (R(n), U(n, lo=0.1, hi=0.7)),
    "implicit differentiation without the inverse of the residual's slope for the second argument",
)


# ------------------------------------------------------------------ 48 per-channel scale and shift
class ChannelAffine(Function):
    @staticmethod
    def forward(ctx, x, w, b):
        real(x, w, b)
        need(x.dim() == 3 and w.shape == b.shape == x.shape[1:2], "x [n, c, l], w, b [c]")
        ctx.save_for_backward(x, w)
        return x * w[:, None] + b[:, None]

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w[:, None], (g * x).sum((0, 2)), g.sum((0, 2))


class ChannelAffineWrong(ChannelAffine):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w[:, None], (g * x).mean((0, 2)), g.mean((0, 2))


def channel_affine(cls, x, weight, bias):
    return cls.apply(x, weight, bias)


add(
    "channel_affine",
    ChannelAffineWrong,
    ChannelAffine,
    channel_affine,
    lambda n=2, c=3, d=4: (R(n, c, d), U(c), R(c, s=2)),
    "gradients of the broadcast parameters are averaged instead of summed",
)


# ------------------------------------------------------------------ 49 sparsemax
class Sparsemax(Function):
    @staticmethod
    def forward(ctx, x):
        real(x)
        need(x.dim() >= 1 and x.shape[-1] > 0, "x [..., n], n > 0")
        z = up(x)
        z = z - z.detach().amax(-1, keepdim=True)
        s = torch.sort(z, dim=-1, descending=True).values
        k = torch.arange(1, x.shape[-1] + 1)
        c = s.cumsum(-1) - 1
        n = (s.detach() * k > c.detach()).sum(-1, keepdim=True)
        out = (z - c.gather(-1, n - 1) / n).clamp_min(0).to(x.dtype)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def count(on):
        return on.sum(-1)

    @classmethod
    def grads(cls, ctx, g):
        (out,) = ctx.saved_tensors
        on = out > 0
        g, dtype = up(g) * on, g.dtype
        v = g.sum(-1) / cls.count(on)
        return torch.where(on, g - v.unsqueeze(-1), 0).to(dtype)

    @staticmethod
    def backward(ctx, g):
        return Sparsemax.grads(ctx, g)


class SparsemaxWrong(Sparsemax):
    @staticmethod
    def count(on):
        return on.sum(-1).squeeze()

    @staticmethod
    def backward(ctx, g):
        return SparsemaxWrong.grads(ctx, g)


def sparsemax(cls, x):
    return cls.apply(x)


add(
    "sparsemax",
    SparsemaxWrong,
    Sparsemax,
    sparsemax,
    lambda b=3, n=4: (R(b, n),),
    "a squeeze() of the support sizes meets unsqueezed sums: [n, 1] / [n] broadcasts for inputs with a singleton dim",
    "https://github.com/deep-spin/entmax/issues/13",
)


# ------------------------------------------------------------------ 50 pair energy in a periodic box
class Periodic(Function):
    @staticmethod
    def wrap(d, box):
        return d - box * torch.round(d.detach() / box)

    @staticmethod
    def forward(ctx, x, box):
        full_precision(x)
        need(x.dim() == 2, "x [n, d]")
        need(box > 0, "box > 0")
        ctx.save_for_backward(x)
        ctx.box = box
        w = Periodic.wrap(x[:, None] - x[None], box)
        return torch.exp(-w.square().sum(-1)).tril(-1).sum()

    @staticmethod
    def vector(d, box):
        return Periodic.wrap(d, box)

    @classmethod
    def grads(cls, ctx, g):
        (x,) = ctx.saved_tensors
        d = x[:, None] - x[None]
        e = torch.exp(-cls.wrap(d, ctx.box).square().sum(-1))
        return -2 * g * (e[..., None] * cls.vector(d, ctx.box)).sum(1), None

    @staticmethod
    def backward(ctx, g):
        return Periodic.grads(ctx, g)


class PeriodicWrong(Periodic):
    @staticmethod
    def vector(d, box):
        return d

    @staticmethod
    def backward(ctx, g):
        return PeriodicWrong.grads(ctx, g)


def pair_energy(cls, x, box=10.0):
    return cls.apply(x, box)


add(
    "pair_energy",
    PeriodicWrong,
    Periodic,
    pair_energy,
    lambda n=4, d=2: (R(n, d),),
    "the force acts along the displacement before the minimum-image wrap",
    box=10.0,
)


# ------------------------------------------------------------------ 51 alpha compositing
class Composite(Function):
    @staticmethod
    def trans(a):
        t = [torch.ones_like(a.sum())]
        for i in range(a.shape[0]):
            t.append(t[-1] * (1 - a[i]))
        return torch.stack(t[:-1]) if a.shape[0] else a * 1

    @staticmethod
    def forward(ctx, c, a):
        real(c, a)
        need(c.dim() == 2 and a.shape == c.shape[:1], "colours [n, k], opacities [n]")
        ctx.save_for_backward(c, a)
        return ((Composite.trans(a) * a)[:, None] * c).sum(0)

    @staticmethod
    def dalpha(c, a, t, g):
        out, behind = [], torch.zeros_like(g)
        for i in range(a.shape[0] - 1, -1, -1):
            out.append(t[i] * (g * (c[i] - behind)).sum())
            behind = a[i] * c[i] + (1 - a[i]) * behind
        return torch.stack(out[::-1]) if out else torch.zeros_like(a)

    @classmethod
    def grads(cls, ctx, g):
        c, a = ctx.saved_tensors
        t = cls.trans(a)
        return (t * a)[:, None] * g, cls.dalpha(c, a, t, g)

    @staticmethod
    def backward(ctx, g):
        return Composite.grads(ctx, g)


class CompositeWrong(Composite):
    @staticmethod
    def dalpha(c, a, t, g):
        part = (t * a)[:, None] * c
        behind = part.sum(0) - part.cumsum(0)
        return (g * (t[:, None] * c - behind / (1 - a)[:, None])).sum(1)

    @staticmethod
    def backward(ctx, g):
        return CompositeWrong.grads(ctx, g)


def alpha_composite(cls, color, alpha):
    return cls.apply(color, alpha)


add(
    "alpha_composite",
    CompositeWrong,
    Composite,
    alpha_composite,
    lambda n=4, k=3: (U(n, k), U(n, s=1, lo=0.2, hi=0.8)),
    "what lies behind is divided by 1 - alpha: 0/0 at an opaque sample",
    "https://github.com/nerfstudio-project/gsplat/pull/70 (the formula)",
)


# ------------------------------------------------------------------ 52 linear layer, buffers filled on demand
class Linear(Function):
    @staticmethod
    @no_amp
    def forward(ctx, x, w, b):
        real(x, w, b)
        need(
            x.dim() == 2 and w.dim() == 2 and x.shape[1] == w.shape[1] and b.shape == w.shape[:1],
            "x [n, i], w [o, i], b [o]",
        )
        ctx.save_for_backward(x, w, b)
        return mm(x, w.t()) + b

    @staticmethod
    def wants_bias(ctx):
        return ctx.needs_input_grad[2]

    @classmethod
    @no_amp
    def grads(cls, ctx, g):
        x, w, b = ctx.saved_tensors
        dx, dw, db = torch.zeros_like(x), torch.zeros_like(w), torch.zeros_like(b)
        if ctx.needs_input_grad[0]:
            dx = mm(g, w)
        if ctx.needs_input_grad[1]:
            dw = mm(g.t(), x)
        if cls.wants_bias(ctx):
            db = g.sum(0)
        return dx, dw, db

    @staticmethod
    def backward(ctx, g):
        return Linear.grads(ctx, g)


class LinearWrong(Linear):
    @staticmethod
    def wants_bias(ctx):
        return ctx.needs_input_grad[1]

    @staticmethod
    def backward(ctx, g):
        return LinearWrong.grads(ctx, g)


def linear(cls, x, weight, bias):
    return cls.apply(x, weight, bias)


add(
    "linear",
    LinearWrong,
    Linear,
    linear,
    lambda n=3, i=4, o=2: (R(n, i), R(o, i, s=1), R(o, s=2)),
    "the bias gradient is computed only when the weight wants one: a frozen weight leaves the bias buffer at zero",
    "https://github.com/NVIDIA/apex/pull/1517 (review: use_bias and weight.requires_grad)",
)


# ------------------------------------------------------------------ 53 swish
class Swish(Function):
    @staticmethod
    def forward(ctx, x, beta):
        real(x)
        ctx.save_for_backward(x)
        ctx.beta = beta
        ctx.s = torch.sigmoid(beta * x)
        return x * ctx.s

    @staticmethod
    def gate(ctx, x):
        return torch.sigmoid(ctx.beta * x)

    @classmethod
    def grads(cls, ctx, g):
        (x,) = ctx.saved_tensors
        s = cls.gate(ctx, x)
        return g * s * (1 + ctx.beta * x * (1 - s)), None

    @staticmethod
    def backward(ctx, g):
        return Swish.grads(ctx, g)


class SwishWrong(Swish):
    @staticmethod
    def gate(ctx, x):
        return ctx.s

    @staticmethod
    def backward(ctx, g):
        return SwishWrong.grads(ctx, g)


def swish(cls, x, beta=1.0):
    return cls.apply(x, beta)


add(
    "swish",
    SwishWrong,
    Swish,
    swish,
    lambda n=3, d=3: (R(n, d),),
    "an intermediate kept on ctx is a constant to the second derivative",
    "https://github.com/pytorch/pytorch/issues/58509",
)


# ------------------------------------------------------------------ 54 tanh, gradient buffer reused
class Tanh(Function):
    @staticmethod
    def forward(ctx, x):
        real(x)
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g.mul(1 - y * y)


class TanhWrong(Tanh):
    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g.mul_(1 - y * y)


def tanh(cls, x):
    return cls.apply(x)


add(
    "tanh",
    TanhWrong,
    Tanh,
    tanh,
    lambda n=3, d=4: (R(n, d),),
    "the incoming gradient, which other branches still read, is overwritten",
    "https://github.com/pytorch/pytorch/issues/81417",
)


# ------------------------------------------------------------------ 55 fused cross entropy, gradient made in forward
class FusedCE(Function):
    @staticmethod
    def dx(x, t):
        return (torch.softmax(x, 1) - nnF.one_hot(t, x.shape[1])) / max(x.shape[0], 1)

    @staticmethod
    def forward(ctx, x, t):
        real(x)
        need(
            x.dim() == 2 and t.shape == x.shape[:1] and x.shape[0] > 0 and x.shape[1] > 0,
            "x [n, c], t [n], not empty",
        )
        ctx.save_for_backward(x, t)
        ctx.d = FusedCE.dx(x, t).detach()
        return -torch.log_softmax(x, 1).gather(1, t[:, None]).mean()

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            return g * FusedCE.dx(*ctx.saved_tensors), None
        return ctx.d.mul(g), None


class FusedCEWrong(FusedCE):
    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            return g * FusedCE.dx(*ctx.saved_tensors), None
        return ctx.d.mul_(g), None


def fused_cross_entropy(cls, logits, target):
    return cls.apply(logits, target)


add(
    "fused_cross_entropy",
    FusedCEWrong,
    FusedCE,
    fused_cross_entropy,
    lambda n=4, c=5: (R(n, c), torch.arange(n) % max(c, 1)),
    "the gradient kept from the forward is scaled in place: a second backward scales it again",
    "https://github.com/axolotl-ai-cloud/axolotl/pull/3892",
)


# ------------------------------------------------------------------ 56 memory of the last call
class TanhGate(Function):
    @staticmethod
    def forward(ctx, keep, x, w):
        real(x, w)
        need(x.dim() >= 1 and w.shape == x.shape[-1:], "x [..., d], w [d]")
        ctx.save_for_backward(x, w)
        ctx.keep = keep
        keep.remember(x, w)
        return torch.tanh(x) * w

    @staticmethod
    def saved(ctx):
        return ctx.saved_tensors

    @classmethod
    def grads(cls, ctx, g):
        x, w = cls.saved(ctx)
        t = torch.tanh(x)
        return (
            None,
            g * w * (1 - t * t),
            (g * t).reshape(-1, w.shape[0] if g.numel() else 1).sum(0).expand_as(w),
        )

    @staticmethod
    def backward(ctx, g):
        return TanhGate.grads(ctx, g)


class TanhGateWrong(TanhGate):
    @staticmethod
    def saved(ctx):
        return ctx.keep.last

    @staticmethod
    def backward(ctx, g):
        return TanhGateWrong.grads(ctx, g)


class TanhGateLayer(torch.nn.Module):
    """Gates with a weight; the calls go through a Function that is handed the layer."""

    cls = TanhGate

    def remember(self, x, w):
        pass

    def call(self, cls, x, weight):
        return cls.apply(self, x, weight)

    def forward(self, x, weight):
        return self.cls.apply(self, x, weight)


class TanhGateLayerWrong(TanhGateLayer):
    cls = TanhGateWrong

    def remember(self, x, w):
        self.last = (x, w)


NINTH["tanh_gate_9"] = Unseen(
    "tanh_gate_9",
    "the backward reads the layer's last inputs: two calls before one backward mix up",
    TanhGateLayerWrong(),
    TanhGateLayer(),
    lambda n=3, d=4: (R(n, d), U(d)),
)


# ------------------------------------------------------------------ 57 Lorentzian with a forward-mode rule
class Lorentz(Function):
    @staticmethod
    def forward(a, b):
        real(a, b)
        need(a.shape == b.shape, "one shape")
        return a / (1 + b * b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        q = 1 + b * b
        return g / q, -2 * g * (a / q) * (b / q)

    @staticmethod
    def jvp(ctx, ta, tb):
        a, b = ctx.saved_tensors
        q = 1 + b * b
        return ta / q - 2 * (a / q) * (b / q) * tb


class LorentzWrong(Lorentz):
    @staticmethod
    def jvp(ctx, ta, tb):
        a, b = ctx.saved_tensors
        q = 1 + b * b
        return ta / q + 2 * (a / q) * (b / q) * tb


def lorentzian(cls, a, b):
    return cls.apply(a, b)


add(
    "lorentzian",
    LorentzWrong,
    Lorentz,
    lorentzian,
    lambda n=5: (R(n), R(n, s=1)),
    "sign error for the second argument in the forward-mode rule; the backward is right",
    "https://github.com/jax-ml/jax/issues/3213",
)


# ------------------------------------------------------------------ 58 softmax with a batching rule
class SoftmaxDim(Function):
    @staticmethod
    def forward(x, dim):
        real(x)
        need(x.dim() >= 1 and -x.dim() <= dim < x.dim(), "dim")
        return torch.softmax(x, dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return y * (g - (y * g).sum(ctx.dim, keepdim=True)), None

    @staticmethod
    def vmap(info, in_dims, x, dim):
        x = x.movedim(in_dims[0], 0)
        need(x.dim() >= 2 and -(x.dim() - 1) <= dim < x.dim() - 1, "dim")
        return SoftmaxDim.apply(x, dim + 1 if dim >= 0 else dim), 0


class SoftmaxDimWrong(SoftmaxDim):
    @staticmethod
    def vmap(info, in_dims, x, dim):
        x = x.movedim(in_dims[0], 0)
        need(x.dim() >= 2 and -(x.dim() - 1) <= dim < x.dim() - 1, "dim")
        return SoftmaxDimWrong.apply(x, dim), 0


def softmax(cls, x, dim=0):
    return cls.apply(x, dim)


add(
    "softmax",
    SoftmaxDimWrong,
    SoftmaxDim,
    softmax,
    lambda n=3, d=4: (R(n, d),),
    "the batching rule moves the batch to the front and does not shift a non-negative dim",
    dim=0,
)


# ------------------------------------------------------------------ 59 cosine similarity, half precision
class Cosine(Function):
    @staticmethod
    def forward(ctx, a, b):
        real(a, b)
        need(a.dim() == 2 and a.shape == b.shape and a.dtype == b.dtype, "a, b [n, d] of one dtype")
        ctx.save_for_backward(a, b)
        x, y = up(a), up(b)
        s, t = (v.square().sum(1).clamp_min(1e-12).rsqrt() for v in (x, y))
        return ((x * y).sum(1) * s * t).to(a.dtype)

    @staticmethod
    def cast(t):
        return up(t)

    @classmethod
    def grads(cls, ctx, g):
        a, b = (cls.cast(t) for t in ctx.saved_tensors)
        g = cls.cast(g)
        na, nb, ab = ((p * q).sum(1, keepdim=True) for p, q in ((a, a), (b, b), (a, b)))
        s, t = na.clamp_min(1e-12).rsqrt(), nb.clamp_min(1e-12).rsqrt()
        w = g[:, None] * s * t
        return (
            w * (b - torch.where(na >= 1e-12, ab * s * s, 0) * a),
            w * (a - torch.where(nb >= 1e-12, ab * t * t, 0) * b),
        )

    @staticmethod
    def backward(ctx, g):
        return Cosine.grads(ctx, g)


class CosineWrong(Cosine):
    @staticmethod
    def cast(t):
        return t

    @staticmethod
    def backward(ctx, g):
        return CosineWrong.grads(ctx, g)


def cosine(cls, a, b):
    return cls.apply(a, b)


add(
    "cosine",
    CosineWrong,
    Cosine,
    cosine,
    lambda n=2, d=6: (R(n, d), R(n, d, s=1)),
    "the forward accumulates squares in float32, the backward in the input's half precision, where they overflow",
)


# ------------------------------------------------------------------ 60 gated product, gradient read as plain memory
def _memory(t):
    """What a kernel sees that walks over t row by row from its first element."""
    strides, n = [], 1
    for s in reversed(t.shape):
        strides.append(n)
        n *= max(s, 1)
    return t.as_strided(t.shape, strides[::-1], t.storage_offset())


class Gated(Function):
    @staticmethod
    def forward(ctx, x, w):
        real(x, w)
        need(x.dim() == 2 and w.shape == x.shape[1:], "x [n, d], w [d]")
        ctx.save_for_backward(x, w)
        return torch.sigmoid(x) * w

    @staticmethod
    def load(g):
        return _memory(g.contiguous())

    @classmethod
    def grads(cls, ctx, g):
        x, w = ctx.saved_tensors
        s, g = torch.sigmoid(x), cls.load(g)
        return g * w * s * (1 - s), (g * s).sum(0)

    @staticmethod
    def backward(ctx, g):
        return Gated.grads(ctx, g)


class GatedWrong(Gated):
    @staticmethod
    def load(g):
        return _memory(g)

    @staticmethod
    def backward(ctx, g):
        return GatedWrong.grads(ctx, g)


def gated(cls, x, weight):
    return cls.apply(x, weight)


add(
    "gated",
    GatedWrong,
    Gated,
    gated,
    lambda n=3, d=4: (R(n, d), U(d)),
    "the backward reads grad_output as contiguous memory, whatever its strides",
    "https://github.com/pytorch/pytorch/issues/194719",
)
