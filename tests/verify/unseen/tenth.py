"""Tenth set: first drafts of a backward, each with a mistake of another kind, half of them right in the sample.

In one file, as it was written before any check ran on it. `source` is the public report or fix that a fault is modelled
on.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.device import DEVICE
from tests.verify.unseen import TENTH, Unseen

MISSED = {
    "lstm_cell": "a note: an output marked as not differentiable may be meant so, as attention's log-sum-exp is",
    "max_readout": "bfloat16 holds no index above 256: shows in half precision, at sizes that are not tried there",
}


def add(name, wrong, right, make_inputs, kwargs, why, source="own"):
    TENTH[f"{name}_10"] = Unseen(
        f"{name}_10", why, wrong, right, make_inputs, lambda: dict(kwargs), MISSED.get(name, "")
    )


# ----------------------------------------------------------------------------- helpers
_HALF = (torch.float16, torch.bfloat16)
_REAL = (*_HALF, torch.float32, torch.float64)


def _check(who, *ts):
    """All tensors dense, real floating, one dtype, one device; returns that dtype."""
    dt = dev = None
    for t in ts:
        if t is None:
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{who}: expected a tensor, got {type(t).__name__}")
        if t.layout is not torch.strided or t.dtype not in _REAL:
            raise TypeError(
                f"{who}: expected a dense real floating tensor, got {t.dtype}, {t.layout}"
            )
        if dt is None:
            dt, dev = t.dtype, t.device
        elif t.dtype != dt or t.device != dev:
            raise TypeError(f"{who}: tensors must share one dtype and device")
    return dt


def _prep(who, *ts):
    """_check, and half types widened to float32 for the computation."""
    dt = _check(who, *ts)
    if dt in _HALF:
        ts = tuple(None if t is None else t.float() for t in ts)
    return (dt, *tuple(ts))


def _index(who, t, size, lo=0):
    """1-D int tensor with entries in [lo, size)."""
    if not isinstance(t, torch.Tensor) or t.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{who}: indices must be an int64/int32 tensor")
    if t.dim() != 1:
        raise ValueError(f"{who}: indices must be one-dimensional")
    known = (
        not torch.compiler.is_compiling()
        and not isinstance(t, FakeTensor)
        and t.device.type != "meta"
    )
    if known and t.numel() and (int(t.min()) < lo or int(t.max()) >= size):
        raise ValueError(f"{who}: index out of range")
    return t.long()


def _num(who, v, lo=None, strict=False):
    if isinstance(v, bool) or not isinstance(v, (int, float)):
        raise TypeError(f"{who}: expected a number, got {type(v).__name__}")
    if not math.isfinite(v) or (lo is not None and (v < lo or (strict and v == lo))):
        raise ValueError(f"{who}: value {v} not allowed")
    return v


def _int(who, v, lo=None):
    if isinstance(v, bool) or not isinstance(v, int):
        raise TypeError(f"{who}: expected an int, got {type(v).__name__}")
    if lo is not None and v < lo:
        raise ValueError(f"{who}: value {v} not allowed")
    return v


def _bool(who, v):
    if not isinstance(v, bool):
        raise TypeError(f"{who}: expected a bool, got {type(v).__name__}")
    return v


def _positive(who, t):
    known = (
        not torch.compiler.is_compiling()
        and not isinstance(t, FakeTensor)
        and t.device.type != "meta"
    )
    if known and bool((t <= 0).any()):
        raise ValueError(f"{who}: must be positive")


def _phi(u):
    """(e^u - 1) / u and its derivative."""
    small = u.abs() < 0.05
    s = torch.where(small, torch.ones_like(u), u)
    t = torch.where(small, u, torch.zeros_like(u))
    p0 = torch.where(
        small,
        1 + t * (1 / 2 + t * (1 / 6 + t * (1 / 24 + t * (1 / 120 + t * (1 / 720 + t / 5040))))),
        torch.expm1(s) / s,
    )
    p1 = torch.where(
        small,
        1 / 2 + t * (1 / 3 + t * (1 / 8 + t * (1 / 30 + t * (1 / 144 + t * (1 / 840 + t / 5760))))),
        (s * s.exp() - torch.expm1(s)) / s / s,
    )
    return p0, p1


def _nograd(who, *ts):
    for t in ts:
        if isinstance(t, torch.Tensor) and t.requires_grad:
            raise ValueError(f"{who}: no gradient is provided for this argument; detach it")


def full_precision(fn):
    """Run a forward or backward with autocast off."""

    @functools.wraps(fn)
    def run(*args):
        with torch.autocast(DEVICE, enabled=False):
            return fn(*args)

    return run


def _gen(seed):
    return torch.Generator().manual_seed(seed)


def _randn(seed, *shape, scale=1.0, grad=True):
    return (scale * torch.randn(*shape, generator=_gen(seed), dtype=torch.float64)).requires_grad_(
        grad
    )


def _rand(seed, *shape, lo=0.0, hi=1.0, grad=True):
    t = lo + (hi - lo) * torch.rand(*shape, generator=_gen(seed), dtype=torch.float64)
    return t.requires_grad_(grad)


# ============================================================ 1 packed SwiGLU
class SwiGLURight(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return gate * torch.sigmoid(gate) * up

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        s = torch.sigmoid(gate)
        d_gate = g * up * (s + gate * s * (1 - s))
        d_up = g * gate * s
        return torch.cat([d_gate, d_up], -1)


class SwiGLUWrong(SwiGLURight):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        s = torch.sigmoid(gate)
        d_gate = g * up * (s + gate * s * (1 - s))
        d_up = g * gate * s
        return torch.cat([d_up, d_gate], -1)


def _swiglu(Fn):
    def swiglu(packed):
        dt, packed = _prep("swiglu", packed)
        if packed.dim() < 1 or packed.shape[-1] % 2 or packed.shape[-1] == 0:
            raise ValueError("swiglu: last dim must be even and not empty")
        return Fn.apply(packed).to(dt)

    return swiglu


add(
    "swiglu_packed",
    _swiglu(SwiGLUWrong),
    _swiglu(SwiGLURight),
    lambda: (_randn(3, 4, 6),),
    {},
    "halves of the packed gradient concatenated in the other order",
)


# ============================================================ 2 RMSNorm
class RMSNormRight(Function):
    @staticmethod
    def forward(ctx, x, w, eps):
        ctx.save_for_backward(x, w)
        ctx.eps = eps
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
        gw, xh = g * w, x * r
        gx = r * (gw - xh * (gw * xh).mean(-1, keepdim=True))
        return gx, (g * x * r).reshape(-1, w.shape[0]).sum(0), None


class RMSNormWrong(RMSNormRight):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
        gw, xh = g * w, x * r
        gx = r * (gw - xh * (g * xh).mean(-1, keepdim=True))
        return gx, (g * x * r).reshape(-1, w.shape[0]).sum(0), None


def _rmsnorm(Fn):
    def rms_norm(x, weight, eps=1e-6):
        dt, x, weight = _prep("rms_norm", x, weight)
        _num("rms_norm eps", eps, 0.0, strict=True)
        if (
            weight.dim() != 1
            or x.dim() < 1
            or x.shape[-1] != weight.shape[0]
            or weight.shape[0] == 0
        ):
            raise ValueError("rms_norm: weight must match a non-empty last dim")
        return Fn.apply(x, weight, eps).to(dt)

    return rms_norm


add(
    "rms_norm",
    _rmsnorm(RMSNormWrong),
    _rmsnorm(RMSNormRight),
    lambda: (_randn(4, 3, 5), _rand(5, 5, lo=0.5, hi=1.5)),
    {"eps": 1e-6},
    "projection term of the input gradient uses g instead of g * weight",
    "https://github.com/karpathy/llm.c/pull/763",
)


# ============================================================ 3 standardise with the unbiased std
class StandardizeRight(Function):
    @staticmethod
    def forward(ctx, x, eps):
        c = x - x.mean(-1, keepdim=True)
        s = (c.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
        ctx.save_for_backward(c, s)
        ctx.eps = eps
        return c / (s + eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        c, s = ctx.saved_tensors
        n = c.shape[-1] - 1
        d = s + ctx.eps
        unit = torch.where(s > 0, c / s, torch.zeros_like(c))
        gc = g / d - unit * (g * c).sum(-1, keepdim=True) / (n * d * d)
        return gc - gc.mean(-1, keepdim=True), None


class StandardizeWrong(StandardizeRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        c, s = ctx.saved_tensors
        n = c.shape[-1]
        d = s + ctx.eps
        unit = torch.where(s > 0, c / s, torch.zeros_like(c))
        gc = g / d - unit * (g * c).sum(-1, keepdim=True) / (n * d * d)
        return gc - gc.mean(-1, keepdim=True), None


def _standardize(Fn):
    def standardize(x, eps=1e-5):
        dt, x = _prep("standardize", x)
        _num("standardize eps", eps, 0.0, strict=True)
        if x.dim() < 1 or x.shape[-1] < 2:
            raise ValueError("standardize: needs at least two entries in the last dim")
        return Fn.apply(x, eps).to(dt)

    return standardize


add(
    "advantage_standardize",
    _standardize(StandardizeWrong),
    _standardize(StandardizeRight),
    lambda: (_randn(6, 3, 6),),
    {"eps": 1e-5},
    "std is the unbiased one (n - 1) but its derivative uses n",
)


# ============================================================ 4 grouped-query attention
class GQARight(Function):
    """q (B, Hq, L, D), k/v (B, Hkv, S, D); query head h reads key head h // (Hq // Hkv)."""

    @staticmethod
    @full_precision
    def forward(ctx, q, k, v):
        rep = q.shape[1] // k.shape[1]
        kk, vv = k.repeat_interleave(rep, 1), v.repeat_interleave(rep, 1)
        p = torch.softmax(q @ kk.mT / math.sqrt(q.shape[-1]), -1)
        ctx.save_for_backward(q, k, v, p)
        return p @ vv

    @staticmethod
    def _expanded(q, k, v, p, g):
        rep = q.shape[1] // k.shape[1]
        kk, vv = k.repeat_interleave(rep, 1), v.repeat_interleave(rep, 1)
        gp = g @ vv.mT
        gs = p * (gp - (gp * p).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
        return gs @ kk, gs.mT @ q, p.mT @ g, rep

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, g):
        q, k, v, p = ctx.saved_tensors
        gq, gk, gv, rep = GQARight._expanded(q, k, v, p, g)
        B, H, S, D = k.shape
        gk = gk.reshape(B, H, rep, S, D).sum(2)
        gv = gv.reshape(B, H, rep, S, D).sum(2)
        return gq, gk, gv


class GQAWrong(GQARight):
    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, g):
        q, k, v, p = ctx.saved_tensors
        gq, gk, gv, rep = GQARight._expanded(q, k, v, p, g)
        B, H, S, D = k.shape
        gk = gk.reshape(B, rep, H, S, D).sum(1)
        gv = gv.reshape(B, rep, H, S, D).sum(1)
        return gq, gk, gv


def _gqa(Fn):
    def gqa(q, k, v):
        dt, q, k, v = _prep("gqa", q, k, v)
        if (
            q.dim() != 4
            or k.dim() != 4
            or k.shape != v.shape
            or q.shape[0] != k.shape[0]
            or q.shape[3] != k.shape[3]
            or k.shape[1] == 0
            or q.shape[1] % k.shape[1]
            or q.shape[3] == 0
            or k.shape[2] == 0
        ):
            raise ValueError("gqa: shapes do not fit")
        return Fn.apply(q, k, v).to(dt)

    return gqa


add(
    "gqa_attention",
    _gqa(GQAWrong),
    _gqa(GQARight),
    lambda: (_randn(7, 1, 4, 3, 2), _randn(8, 1, 2, 4, 2), _randn(9, 1, 2, 4, 2)),
    {},
    "query-head groups split as (rep, Hkv) when summing dk and dv; the forward repeats as (Hkv, rep)",
    "https://github.com/XunhaoLai/native-sparse-attention-triton/issues/27",
)


# ============================================================ 5 diagonal linear scan
class LinearScanRight(Function):
    """h_t = a_t h_{t-1} + x_t over dim 0."""

    @staticmethod
    def forward(ctx, a, x, h0):
        hs, h = [], h0
        for t in range(a.shape[0]):
            h = a[t] * h + x[t]
            hs.append(h)
        h = torch.stack(hs) if hs else torch.empty_like(x)
        ctx.save_for_backward(a, h0, h)
        return h

    @staticmethod
    def backward(ctx, g):
        a, h0, h = ctx.saved_tensors
        T = a.shape[0]
        prev = torch.cat([h0[None], h])[:T]
        ds, d = [], torch.zeros_like(h0)
        for t in reversed(range(T)):
            d = g[t] + d
            ds.append(d)
            d = d * a[t]
        gx = torch.stack(ds[::-1]) if ds else torch.zeros_like(h)
        return gx * prev, gx, d


class LinearScanWrong(LinearScanRight):
    @staticmethod
    def backward(ctx, g):
        a, h0, h = ctx.saved_tensors
        T = a.shape[0]
        ds, d = [], torch.zeros_like(h0)
        for t in reversed(range(T)):
            d = g[t] + d
            ds.append(d)
            d = d * a[t]
        gx = torch.stack(ds[::-1]) if ds else torch.zeros_like(h)
        return gx * h, gx, d


def _linear_scan(Fn):
    def linear_scan(a, x, h0):
        dt, a, x, h0 = _prep("linear_scan", a, x, h0)
        if a.dim() != 2 or a.shape != x.shape or h0.shape != a.shape[1:]:
            raise ValueError("linear_scan: a and x must be (T, D), h0 (D,)")
        return Fn.apply(a, x, h0).to(dt)

    return linear_scan


add(
    "linear_scan",
    _linear_scan(LinearScanWrong),
    _linear_scan(LinearScanRight),
    lambda: (_rand(10, 5, 3, lo=0.3, hi=0.95), _randn(11, 5, 3), _randn(12, 3)),
    {},
    "decay gradient multiplies the adjoint with the state after the step instead of before it",
)


# ============================================================ 6 GRU step
class GRURight(Function):
    """gi = input projection (B, 3H), h (B, H), w (3H, H); order r, z, n."""

    @staticmethod
    @full_precision
    def forward(ctx, gi, h, w):
        ctx.save_for_backward(gi, h, w)
        ir, iz, i_n = gi.chunk(3, 1)
        hr, hz, hn = (h @ w.T).chunk(3, 1)
        r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
        n = torch.tanh(i_n + r * hn)
        return (1 - z) * n + z * h

    @staticmethod
    @full_precision
    def backward(ctx, g):
        gi, h, w = ctx.saved_tensors
        ir, iz, i_n = gi.chunk(3, 1)
        hr, hz, hn = (h @ w.T).chunk(3, 1)
        r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
        n = torch.tanh(i_n + r * hn)
        dn = g * (1 - z) * (1 - n * n)
        dz = g * (h - n) * z * (1 - z)
        dr = dn * hn * r * (1 - r)
        d_gi = torch.cat([dr, dz, dn], 1)
        d_gh = torch.cat([dr, dz, dn * r], 1)
        return d_gi, g * z + d_gh @ w, d_gh.T @ h


class GRUWrong(GRURight):
    @staticmethod
    @full_precision
    def backward(ctx, g):
        gi, h, w = ctx.saved_tensors
        ir, iz, i_n = gi.chunk(3, 1)
        hr, hz, hn = (h @ w.T).chunk(3, 1)
        r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
        n = torch.tanh(i_n + r * hn)
        dn = g * (1 - z) * (1 - n * n)
        dz = g * (h - n) * z * (1 - z)
        dr = dn * hn * r * (1 - r)
        d_gates = torch.cat([dr, dz, dn], 1)
        return d_gates, g * z + d_gates @ w, d_gates.T @ h


def _gru(Fn):
    def gru_step(gi, h, w):
        dt, gi, h, w = _prep("gru_step", gi, h, w)
        if (
            gi.dim() != 2
            or h.dim() != 2
            or h.shape[1] == 0
            or gi.shape != (h.shape[0], 3 * h.shape[1])
            or w.shape != (3 * h.shape[1], h.shape[1])
        ):
            raise ValueError("gru_step: shapes do not fit")
        return Fn.apply(gi, h, w).to(dt)

    return gru_step


add(
    "gru_step",
    _gru(GRUWrong),
    _gru(GRURight),
    lambda: (_randn(13, 2, 9), _randn(14, 2, 3), _randn(15, 9, 3, scale=0.5)),
    {},
    "recurrent side of the candidate gate misses the reset gate (one gate gradient used for both sides)",
)


# ============================================================ 7 modulated deformable sampling (1-D)
class DeformSampleRight(Function):
    """x (C, L), pos (K,), mask (K,): y[c, k] = mask_k * lerp(x[c], pos_k), zeros outside."""

    @staticmethod
    def _taps(x, pos):
        L = x.shape[1]
        p = pos.clamp(-1, L)
        i0 = p.floor()
        w = p - i0
        i0 = i0.long()
        i1 = i0 + 1
        x0 = x[:, i0.clamp(0, L - 1)] * ((i0 >= 0) & (i0 < L))
        x1 = x[:, i1.clamp(0, L - 1)] * ((i1 >= 0) & (i1 < L))
        return i0, i1, w, x0, x1, (pos >= -1) & (pos < L)

    @staticmethod
    def forward(ctx, x, pos, mask):
        ctx.save_for_backward(x, pos, mask)
        _, _, w, x0, x1, _ = DeformSampleRight._taps(x, pos)
        return mask * (x0 * (1 - w) + x1 * w)

    @staticmethod
    def _gx(x, i0, i1, w, gm):
        L = x.shape[1]
        gx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        gx.index_add_(1, i0.clamp(0, L - 1), gm * (1 - w) * ((i0 >= 0) & (i0 < L)))
        gx.index_add_(1, i1.clamp(0, L - 1), gm * w * ((i1 >= 0) & (i1 < L)))
        return gx

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, pos, mask = ctx.saved_tensors
        i0, i1, w, x0, x1, inside = DeformSampleRight._taps(x, pos)
        gx = DeformSampleRight._gx(x, i0, i1, w, g * mask)
        gpos = (g * mask * (x1 - x0)).sum(0) * inside
        gmask = (g * (x0 * (1 - w) + x1 * w)).sum(0)
        return gx, gpos, gmask


class DeformSampleWrong(DeformSampleRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, pos, mask = ctx.saved_tensors
        i0, i1, w, x0, x1, inside = DeformSampleRight._taps(x, pos)
        gx = DeformSampleRight._gx(x, i0, i1, w, g * mask)
        gpos = (g * (x1 - x0)).sum(0) * inside
        gmask = (g * (x0 * (1 - w) + x1 * w)).sum(0)
        return gx, gpos, gmask


def _deform(Fn):
    def deform_sample(x, pos, mask):
        dt, x, pos, mask = _prep("deform_sample", x, pos, mask)
        if x.dim() != 2 or x.shape[1] == 0 or pos.dim() != 1 or mask.shape != pos.shape:
            raise ValueError("deform_sample: x (C, L) with L > 0, pos and mask (K,)")
        return Fn.apply(x, pos, mask).to(dt)

    return deform_sample


add(
    "deform_sample_1d",
    _deform(DeformSampleWrong),
    _deform(DeformSampleRight),
    lambda: (
        _randn(17, 3, 6),
        torch.tensor([0.3, 1.6, 2.2, 3.7, 4.4], dtype=torch.float64, requires_grad=True),
        _rand(18, 5, lo=0.2, hi=0.9),
    ),
    {},
    "offset gradient of a modulated deformable convolution is not multiplied with the modulation mask",
)


# ============================================================ 8 edge softmax (graph attention)
class EdgeSoftmaxRight(Function):
    @staticmethod
    def forward(ctx, score, dst, n):
        top = score.new_full((n,), -math.inf).scatter_reduce(0, dst, score, "amax")
        e = (score - top[dst]).exp()
        z = score.new_zeros(n).index_add(0, dst, e)
        a = e / z[dst]
        ctx.save_for_backward(a, dst)
        ctx.n = n
        return a

    @staticmethod
    def backward(ctx, g):
        a, dst = ctx.saved_tensors
        dot = a.new_zeros(ctx.n).index_add(0, dst, a * g)
        return a * (g - dot[dst]), None, None


class EdgeSoftmaxWrong(EdgeSoftmaxRight):
    @staticmethod
    def backward(ctx, g):
        a, _dst = ctx.saved_tensors
        return a * (g - (a * g).sum()), None, None


def _edge_softmax(Fn):
    def edge_softmax(score, dst, num_nodes):
        dt, score = _prep("edge_softmax", score)
        _int("edge_softmax num_nodes", num_nodes, 0)
        dst = _index("edge_softmax", dst, num_nodes)
        if score.shape != dst.shape:
            raise ValueError("edge_softmax: one score per edge")
        return Fn.apply(score, dst, num_nodes).to(dt)

    return edge_softmax


add(
    "edge_softmax",
    _edge_softmax(EdgeSoftmaxWrong),
    _edge_softmax(EdgeSoftmaxRight),
    lambda: (_randn(19, 7), torch.tensor([0, 0, 1, 1, 1, 2, 2])),
    {"num_nodes": 3},
    "softmax backward sums over all edges instead of the edges of the same destination",
)


# ============================================================ 9 sparse @ dense, values learnable
class SpMMRight(Function):
    @staticmethod
    def forward(ctx, vals, x, row, col, n):
        ctx.save_for_backward(vals, x, row, col)
        return x.new_zeros(n, x.shape[1]).index_add(0, row, vals[:, None] * x[col])

    @staticmethod
    def backward(ctx, g):
        vals, x, row, col = ctx.saved_tensors
        gv = (g[row] * x[col]).sum(1)
        gx = torch.zeros_like(x).index_add(0, col, vals[:, None] * g[row])
        return gv, gx, None, None, None


class SpMMWrong(SpMMRight):
    @staticmethod
    def backward(ctx, g):
        vals, x, row, col = ctx.saved_tensors
        gv = (g[col] * x[row]).sum(1)
        gx = torch.zeros_like(x).index_add(0, col, vals[:, None] * g[row])
        return gv, gx, None, None, None


def _spmm(Fn):
    def spmm(vals, x, row, col, num_rows):
        dt, vals, x = _prep("spmm", vals, x)
        _int("spmm num_rows", num_rows, 0)
        if x.dim() != 2:
            raise ValueError("spmm: x (N, D)")
        row, col = _index("spmm", row, num_rows), _index("spmm", col, x.shape[0])
        if vals.shape != row.shape or row.shape != col.shape:
            raise ValueError("spmm: shapes do not fit")
        return Fn.apply(vals, x, row, col, num_rows).to(dt)

    return spmm


add(
    "spmm_values",
    _spmm(SpMMWrong),
    _spmm(SpMMRight),
    lambda: (
        _randn(20, 6),
        _randn(21, 4, 3),
        torch.tensor([0, 0, 1, 2, 3, 3]),
        torch.tensor([1, 3, 2, 0, 0, 2]),
    ),
    {"num_rows": 4},
    "row and column swapped in the sampled product that gives the gradient of the stored values",
)


# ============================================================ 10 complex linear layer
class ComplexLinearRight(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.mH, x.mH @ g


class ComplexLinearWrong(ComplexLinearRight):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.mT, x.mH @ g


def _complex_linear(Fn):
    def complex_linear(x, w):
        for t in (x, w):
            if not isinstance(t, torch.Tensor) or t.dtype not in (
                torch.complex64,
                torch.complex128,
            ):
                raise TypeError("complex_linear: complex64/complex128 tensors expected")
        if x.dtype != w.dtype:
            raise TypeError("complex_linear: one dtype expected")
        if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[0]:
            raise ValueError("complex_linear: x (N, I), w (I, O)")
        return Fn.apply(x, w)

    return complex_linear


def _crandn(seed, *shape):
    return torch.randn(*shape, generator=_gen(seed), dtype=torch.complex128).requires_grad_()


add(
    "complex_linear",
    _complex_linear(ComplexLinearWrong),
    _complex_linear(ComplexLinearRight),
    lambda: (_crandn(22, 3, 2), _crandn(23, 2, 4)),
    {},
    "input gradient of a complex matrix product without the conjugate",
    "https://github.com/tensorflow/tensorflow/issues/4859",
)


# ============================================================ 11 quaternion to rotation matrix
def _quat_rot(u):
    w, x, y, z = u.unbind(-1)
    return torch.stack(
        [
            1 - 2 * (y * y + z * z),
            2 * (x * y - w * z),
            2 * (x * z + w * y),
            2 * (x * y + w * z),
            1 - 2 * (x * x + z * z),
            2 * (y * z - w * x),
            2 * (x * z - w * y),
            2 * (y * z + w * x),
            1 - 2 * (x * x + y * y),
        ],
        -1,
    ).unflatten(-1, (3, 3))


def _quat_rot_vjp(u, g):
    w, x, y, z = u.unbind(-1)
    (g00, g01, g02), (g10, g11, g12), (g20, g21, g22) = [r.unbind(-1) for r in g.unbind(-2)]
    return torch.stack(
        [
            2 * (-z * g01 + y * g02 + z * g10 - x * g12 - y * g20 + x * g21),
            2
            * (
                y * g01
                + z * g02
                + y * g10
                - 2 * x * g11
                - w * g12
                + z * g20
                + w * g21
                - 2 * x * g22
            ),
            2
            * (
                -2 * y * g00
                + x * g01
                + w * g02
                + x * g10
                + z * g12
                - w * g20
                + z * g21
                - 2 * y * g22
            ),
            2
            * (
                -2 * z * g00
                - w * g01
                + x * g02
                + w * g10
                - 2 * z * g11
                + y * g12
                + x * g20
                + y * g21
            ),
        ],
        -1,
    )


class QuatRight(Function):
    @staticmethod
    def forward(ctx, q):
        ctx.save_for_backward(q)
        return _quat_rot(q / q.norm(dim=-1, keepdim=True))

    @staticmethod
    def backward(ctx, g):
        (q,) = ctx.saved_tensors
        n = q.norm(dim=-1, keepdim=True)
        u = q / n
        gu = _quat_rot_vjp(u, g)
        return (gu - u * (u * gu).sum(-1, keepdim=True)) / n


class QuatWrong(QuatRight):
    @staticmethod
    def backward(ctx, g):
        (q,) = ctx.saved_tensors
        return _quat_rot_vjp(q / q.norm(dim=-1, keepdim=True), g)


def _quat(Fn):
    def quat_to_matrix(q):
        dt, q = _prep("quat_to_matrix", q)
        if q.dim() < 1 or q.shape[-1] != 4:
            raise ValueError("quat_to_matrix: last dim must be 4")
        return Fn.apply(q).to(dt)

    return quat_to_matrix


add(
    "quat_to_matrix",
    _quat(QuatWrong),
    _quat(QuatRight),
    lambda: (_randn(27, 3, 4),),
    {},
    "forward normalises the quaternion, backward ignores the normalisation",
    "https://github.com/nerfstudio-project/gsplat/issues/153",
)


# ============================================================ 12 2-D Gaussian splat weights
class SplatRight(Function):
    """mean (G, 2), conic (G, 3) = (a, b, c), opacity (G,), pts (P, 2) -> (G, P)."""

    @staticmethod
    def forward(ctx, mean, conic, opacity, pts):
        ctx.save_for_backward(mean, conic, opacity, pts)
        d = pts[None] - mean[:, None]
        dx, dy = d.unbind(-1)
        a, b, c = conic[:, :, None].unbind(1)
        return opacity[:, None] * torch.exp(-0.5 * (a * dx * dx + 2 * b * dx * dy + c * dy * dy))

    @staticmethod
    def backward(ctx, g):
        mean, conic, opacity, pts = ctx.saved_tensors
        d = pts[None] - mean[:, None]
        dx, dy = d.unbind(-1)
        a, b, c = conic[:, :, None].unbind(1)
        e = torch.exp(-0.5 * (a * dx * dx + 2 * b * dx * dy + c * dy * dy))
        w = g * opacity[:, None] * e
        gm = torch.stack([w * (a * dx + b * dy), w * (b * dx + c * dy)], -1)
        gc = torch.stack(
            [(-0.5 * w * dx * dx).sum(1), (-w * dx * dy).sum(1), (-0.5 * w * dy * dy).sum(1)], -1
        )
        return gm.sum(1), gc, (g * e).sum(1), -gm.sum(0)


class SplatWrong(SplatRight):
    @staticmethod
    def backward(ctx, g):
        mean, conic, opacity, pts = ctx.saved_tensors
        d = pts[None] - mean[:, None]
        dx, dy = d.unbind(-1)
        a, b, c = conic[:, :, None].unbind(1)
        e = torch.exp(-0.5 * (a * dx * dx + 2 * b * dx * dy + c * dy * dy))
        w = g * opacity[:, None] * e
        gm = torch.stack([w * (a * dx + b * dy), w * (b * dx + c * dy)], -1)
        gc = torch.stack(
            [(-0.5 * w * dx * dx).sum(1), (-0.5 * w * dx * dy).sum(1), (-0.5 * w * dy * dy).sum(1)],
            -1,
        )
        return gm.sum(1), gc, (g * e).sum(1), -gm.sum(0)


def _splat(Fn):
    def splat_weights(mean, conic, opacity, pts):
        dt, mean, conic, opacity, pts = _prep("splat_weights", mean, conic, opacity, pts)
        G = mean.shape[0] if mean.dim() == 2 else -1
        if (
            mean.shape != (G, 2)
            or conic.shape != (G, 3)
            or opacity.shape != (G,)
            or pts.dim() != 2
            or pts.shape[1] != 2
        ):
            raise ValueError("splat_weights: shapes do not fit")
        return Fn.apply(mean, conic, opacity, pts).to(dt)

    return splat_weights


add(
    "splat_weights",
    _splat(SplatWrong),
    _splat(SplatRight),
    lambda: (
        _randn(28, 2, 2),
        torch.tensor([[1.0, 0.3, 0.8], [0.7, -0.2, 1.1]], dtype=torch.float64, requires_grad=True),
        _rand(29, 2, lo=0.3, hi=0.9),
        _randn(30, 4, 2),
    ),
    {},
    "off-diagonal conic entry appears twice in the exponent; its gradient counts it once",
)


# ============================================================ 13 Euler steps of a neural ODE
class EulerODERight(Function):
    @staticmethod
    @full_precision
    def forward(ctx, z, w, b, steps, dt):
        zs = [z]
        for _ in range(steps):
            zs.append(zs[-1] + dt * torch.tanh(zs[-1] @ w.T + b))
        ctx.save_for_backward(w, b, *zs[:-1])
        ctx.dt = dt
        return zs[-1].clone()

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, g):
        w, b, *zs = ctx.saved_tensors
        gw, gb = torch.zeros_like(w), torch.zeros_like(b)
        for z in reversed(zs):
            f = torch.tanh(z @ w.T + b)
            d = ctx.dt * g * (1 - f * f)
            gw = gw + d.T @ z
            gb = gb + d.sum(0)
            g = g + d @ w
        return g.clone(), gw, gb, None, None


class EulerODEWrong(EulerODERight):
    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, g):
        w, b, *zs = ctx.saved_tensors
        gw, gb = torch.zeros_like(w), torch.zeros_like(b)
        for z in reversed(zs):
            f = torch.tanh(z @ w.T + b)
            d = ctx.dt * g * (1 - f * f)
            g = g + d @ w
            d = ctx.dt * g * (1 - f * f)
            gw = gw + d.T @ z
            gb = gb + d.sum(0)
        return g.clone(), gw, gb, None, None


def _euler(Fn):
    def euler_ode(z, w, b, steps, dt=0.1):
        ty, z, w, b = _prep("euler_ode", z, w, b)
        _int("euler_ode steps", steps, 0)
        _num("euler_ode dt", dt)
        if (
            z.dim() != 2
            or z.shape[1] == 0
            or w.shape != (z.shape[1],) * 2
            or b.shape != (z.shape[1],)
        ):
            raise ValueError("euler_ode: shapes do not fit")
        return Fn.apply(z, w, b, steps, dt).to(ty)

    return euler_ode


add(
    "euler_ode",
    _euler(EulerODEWrong),
    _euler(EulerODERight),
    lambda: (_randn(31, 2, 3), _randn(32, 3, 3), _randn(33, 3)),
    {"steps": 4, "dt": 0.25},
    "parameter gradient of a step takes the adjoint already carried past that step",
)


# ============================================================ 14 linear equilibrium layer
class KatzRight(Function):
    """z = A z + x, solved exactly."""

    @staticmethod
    @full_precision
    def forward(ctx, A, x):
        eye = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
        z = torch.linalg.solve(eye - A, x)
        ctx.save_for_backward(A, x, z)
        return z

    @staticmethod
    @full_precision
    def backward(ctx, g):
        A, _x, z = ctx.saved_tensors
        eye = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
        u = torch.linalg.solve((eye - A).T, g)
        return u @ z.T, u


class KatzWrong(KatzRight):
    @staticmethod
    @full_precision
    def backward(ctx, g):
        A, x, _z = ctx.saved_tensors
        eye = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
        u = torch.linalg.solve((eye - A).T, g)
        return u @ x.T, u


def _katz(Fn):
    def equilibrium(A, x):
        dt, A, x = _prep("equilibrium", A, x)
        if A.dim() != 2 or A.shape[0] != A.shape[1] or x.dim() != 2 or x.shape[0] != A.shape[0]:
            raise ValueError("equilibrium: A (n, n), x (n, k)")
        return Fn.apply(A, x).to(dt)

    return equilibrium


add(
    "equilibrium_layer",
    _katz(KatzWrong),
    _katz(KatzRight),
    lambda: (_randn(34, 4, 4, scale=0.2), _randn(35, 4, 2)),
    {},
    "implicit gradient of the matrix is the adjoint times the right-hand side instead of the solution",
)


# ============================================================ 15 biquad (IIR) filter
class BiquadRight(Function):
    """y_t = b0 x_t + b1 x_{t-1} + b2 x_{t-2} - a1 y_{t-1} - a2 y_{t-2}; x (B, T)."""

    @staticmethod
    def forward(ctx, x, b, a):
        xp = F.pad(x, (2, 0))
        y1 = y2 = x.new_zeros(x.shape[0])
        out = []
        for t in range(x.shape[1]):
            y = b[0] * xp[:, t + 2] + b[1] * xp[:, t + 1] + b[2] * xp[:, t] - a[0] * y1 - a[1] * y2
            out.append(y)
            y1, y2 = y, y1
        y = torch.stack(out, 1) if out else torch.empty_like(x)
        ctx.save_for_backward(x, b, a, y)
        return y

    @staticmethod
    def _adjoint(x, a, g):
        d1 = d2 = x.new_zeros(x.shape[0])
        out = []
        for t in reversed(range(x.shape[1])):
            d = g[:, t] - a[0] * d1 - a[1] * d2
            out.append(d)
            d1, d2 = d, d1
        return torch.stack(out[::-1], 1) if out else torch.zeros_like(x)

    @staticmethod
    def backward(ctx, g):
        x, b, a, y = ctx.saved_tensors
        T = x.shape[1]
        d = BiquadRight._adjoint(x, a, g)
        dp, xp, yp = F.pad(d, (0, 2)), F.pad(x, (2, 0)), F.pad(y, (2, 0))
        gx = b[0] * dp[:, :T] + b[1] * dp[:, 1 : T + 1] + b[2] * dp[:, 2 : T + 2]
        gb = torch.stack([(d * xp[:, 2 - k : 2 - k + T]).sum() for k in range(3)])
        ga = torch.stack([-(d * yp[:, 2 - k : 2 - k + T]).sum() for k in (1, 2)])
        return gx, gb, ga


class BiquadWrong(BiquadRight):
    @staticmethod
    def backward(ctx, g):
        x, b, a, y = ctx.saved_tensors
        T = x.shape[1]
        d = BiquadRight._adjoint(x, a, g)
        dp, xp, yp = F.pad(d, (0, 2)), F.pad(x, (2, 0)), F.pad(y, (2, 0))
        gx = b[0] * dp[:, :T] + b[1] * dp[:, 1 : T + 1] + b[2] * dp[:, 2 : T + 2]
        gb = torch.stack([(d * xp[:, 2 - k : 2 - k + T]).sum() for k in range(3)])
        ga = torch.stack([(d * yp[:, 2 - k : 2 - k + T]).sum() for k in (1, 2)])
        return gx, gb, ga


def _biquad(Fn):
    def biquad(x, b, a):
        dt, x, b, a = _prep("biquad", x, b, a)
        if x.dim() != 2 or b.shape != (3,) or a.shape != (2,):
            raise ValueError("biquad: x (B, T), b (3,), a (2,)")
        return Fn.apply(x, b, a).to(dt)

    return biquad


add(
    "biquad",
    _biquad(BiquadWrong),
    _biquad(BiquadRight),
    lambda: (
        _randn(36, 2, 6),
        _randn(37, 3),
        torch.tensor([-0.6, 0.2], dtype=torch.float64, requires_grad=True),
    ),
    {},
    "sign of the feedback coefficients' gradient (they enter with a minus)",
)


# ============================================================ 16 equality-constrained QP layer
class EqQPRight(Function):
    """argmin 1/2 x'Qx + q'x  s.t. Ax = b  (Q symmetric positive definite), by the KKT system."""

    @staticmethod
    def _kkt(Q, A):
        m = A.shape[0]
        top = torch.cat([Q, A.T], 1)
        low = torch.cat([A, A.new_zeros(m, m)], 1)
        return torch.cat([top, low])

    @staticmethod
    @full_precision
    def forward(ctx, Q, q, A, b):
        n = q.shape[0]
        sol = torch.linalg.solve(EqQPRight._kkt(Q, A), torch.cat([-q, b]))
        ctx.save_for_backward(Q, A, sol)
        return sol[:n].clone()

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, g):
        Q, A, sol = ctx.saved_tensors
        n = Q.shape[0]
        u = torch.linalg.solve(EqQPRight._kkt(Q, A).T, torch.cat([g, g.new_zeros(A.shape[0])]))
        ux, ul, x, lam = u[:n], u[n:], sol[:n], sol[n:]
        gA = -torch.outer(ul, x) - torch.outer(lam, ux)
        return -torch.outer(ux, x), -ux, gA, ul


class EqQPWrong(EqQPRight):
    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, g):
        Q, A, sol = ctx.saved_tensors
        n = Q.shape[0]
        u = torch.linalg.solve(EqQPRight._kkt(Q, A).T, torch.cat([g, g.new_zeros(A.shape[0])]))
        ux, ul, x = u[:n], u[n:], sol[:n]
        gA = -torch.outer(ul, x)
        return -torch.outer(ux, x), -ux, gA, ul


def _eqqp(Fn):
    def eq_qp(Q, q, A, b):
        dt, Q, q, A, b = _prep("eq_qp", Q, q, A, b)
        n = q.shape[0] if q.dim() == 1 else -1
        if Q.shape != (n, n) or A.dim() != 2 or A.shape[1] != n or b.shape != (A.shape[0],):
            raise ValueError("eq_qp: shapes do not fit")
        if A.shape[0] > n:
            raise ValueError("eq_qp: more constraints than variables")
        return Fn.apply(Q, q, A, b).to(dt)

    return eq_qp


def _eqqp_inputs():
    m = _randn(40, 4, 4, scale=0.3, grad=False)
    Q = (m @ m.T + torch.eye(4, dtype=torch.float64)).requires_grad_()
    return Q, _randn(41, 4), _randn(42, 2, 4), _randn(43, 2)


add(
    "equality_qp",
    _eqqp(EqQPWrong),
    _eqqp(EqQPRight),
    _eqqp_inputs,
    {},
    "constraint matrix sits in two blocks of the KKT matrix; only one of them is differentiated",
)


# ============================================================ 17 CLIP loss with a learnable temperature
class ClipLossRight(Function):
    @staticmethod
    @full_precision
    def forward(ctx, a, b, s):
        sim = a @ b.T
        z = s.exp() * sim
        ctx.save_for_backward(a, b, s)
        n = a.shape[0]
        d = z.diagonal()
        return ((torch.logsumexp(z, 1) - d).sum() + (torch.logsumexp(z, 0) - d).sum()) / (2 * n)

    @staticmethod
    @full_precision
    def backward(ctx, g):
        a, b, s = ctx.saved_tensors
        n = a.shape[0]
        sim = a @ b.T
        z = s.exp() * sim
        eye = torch.eye(n, dtype=z.dtype, device=z.device)
        gz = g * (z.softmax(1) + z.softmax(0) - 2 * eye) / (2 * n)
        gs = (gz * z).sum()
        gsim = gz * s.exp()
        return gsim @ b, gsim.T @ a, gs


class ClipLossWrong(ClipLossRight):
    @staticmethod
    @full_precision
    def backward(ctx, g):
        a, b, s = ctx.saved_tensors
        n = a.shape[0]
        sim = a @ b.T
        z = s.exp() * sim
        eye = torch.eye(n, dtype=z.dtype, device=z.device)
        gz = g * (z.softmax(1) + z.softmax(0) - 2 * eye) / (2 * n)
        gs = (gz * sim).sum()
        gsim = gz * s.exp()
        return gsim @ b, gsim.T @ a, gs


def _clip_loss(Fn):
    def clip_loss(image, text, log_scale):
        dt, a, b, s = _prep("clip_loss", image, text, log_scale)
        if a.dim() != 2 or a.shape != b.shape or a.shape[0] == 0 or s.dim() != 0:
            raise ValueError("clip_loss: two (N, D) tensors with N > 0 and a 0-d log scale")
        return Fn.apply(a, b, s).to(dt)

    return clip_loss


add(
    "clip_loss",
    _clip_loss(ClipLossWrong),
    _clip_loss(ClipLossRight),
    lambda: (
        _randn(44, 4, 3, scale=0.6),
        _randn(45, 4, 3, scale=0.6),
        torch.tensor(math.log(3.0), dtype=torch.float64, requires_grad=True),
    ),
    {},
    "temperature is stored as a logarithm; its gradient misses the exponential's own derivative",
)


# ============================================================ 18 exponential smoothing, learnable alpha
class EWMARight(Function):
    """s_0 = x_0, s_t = alpha x_t + (1 - alpha) s_{t-1}; x (T, D), alpha (1,)."""

    @staticmethod
    def forward(ctx, x, alpha):
        out = [x[0]] if x.shape[0] else []
        for t in range(1, x.shape[0]):
            out.append(alpha * x[t] + (1 - alpha) * out[-1])
        s = torch.stack(out) if out else torch.empty_like(x)
        ctx.save_for_backward(x, alpha, s)
        return s

    @staticmethod
    def backward(ctx, g):
        x, alpha, s = ctx.saved_tensors
        T = x.shape[0]
        if T == 0:
            return torch.zeros_like(x), torch.zeros_like(alpha)
        ds, d = [], torch.zeros_like(g[0])
        for t in reversed(range(T)):
            d = g[t] + (1 - alpha) * d
            ds.append(d)
        d = torch.stack(ds[::-1])
        gx = torch.cat([d[:1], alpha * d[1:]])
        return gx, (d[1:] * (x[1:] - s[:-1])).sum().reshape(1)


class EWMAWrong(EWMARight):
    @staticmethod
    def backward(ctx, g):
        x, alpha, s = ctx.saved_tensors
        T = x.shape[0]
        if T == 0:
            return torch.zeros_like(x), torch.zeros_like(alpha)
        ds, d = [], torch.zeros_like(g[0])
        for t in reversed(range(T)):
            d = g[t] + (1 - alpha) * d
            ds.append(d)
        d = torch.stack(ds[::-1])
        gx = torch.cat([d[:1], alpha * d[1:]])
        return gx, (g[1:] * (x[1:] - s[:-1])).sum().reshape(1)


def _ewma(Fn):
    def ewma(x, alpha):
        dt, x, alpha = _prep("ewma", x, alpha)
        if x.dim() != 2 or alpha.shape != (1,):
            raise ValueError("ewma: x (T, D), alpha (1,)")
        return Fn.apply(x, alpha).to(dt)

    return ewma


add(
    "ewma",
    _ewma(EWMAWrong),
    _ewma(EWMARight),
    lambda: (_randn(46, 6, 2), torch.tensor([0.3], dtype=torch.float64, requires_grad=True)),
    {},
    "smoothing factor gets the partial derivative of each step, not the one through earlier states",
)


# ============================================================ 19 RankNet pairwise loss
class RankNetRight(Function):
    @staticmethod
    def forward(ctx, s, better):
        ctx.save_for_backward(s, better)
        pair = F.softplus(s[None, :] - s[:, None]) * better
        return pair.sum() / better.sum().clamp(min=1)

    @staticmethod
    def backward(ctx, g):
        s, better = ctx.saved_tensors
        m = torch.sigmoid(s[None, :] - s[:, None]) * better / better.sum().clamp(min=1)
        return g * (m.sum(0) - m.sum(1)), None


class RankNetWrong(RankNetRight):
    @staticmethod
    def backward(ctx, g):
        s, better = ctx.saved_tensors
        m = torch.sigmoid(s[None, :] - s[:, None]) * better / max(better.numel(), 1)
        return g * (m.sum(0) - m.sum(1)), None


def _ranknet(Fn):
    def ranknet(scores, relevance):
        dt, s = _prep("ranknet", scores)
        if not isinstance(relevance, torch.Tensor) or relevance.dtype != torch.int64:
            raise TypeError("ranknet: relevance must be an int64 tensor")
        if s.dim() != 1 or relevance.shape != s.shape:
            raise ValueError("ranknet: one relevance per score")
        better = (relevance[:, None] > relevance[None, :]).to(s.dtype)
        return Fn.apply(s, better).to(dt)

    return ranknet


add(
    "ranknet",
    _ranknet(RankNetWrong),
    _ranknet(RankNetRight),
    lambda: (_randn(47, 5), torch.tensor([2, 0, 1, 0, 2])),
    {},
    "forward averages over the ordered pairs, backward over all n^2 pairs",
)


# ============================================================ 20 1-D Wasserstein distance
class Wasserstein1DRight(Function):
    @staticmethod
    def forward(ctx, x, y):
        xs, ix = x.sort(stable=True)
        ys, iy = y.sort(stable=True)
        ctx.save_for_backward(x, y, ix, iy)
        return (xs - ys).square().mean()

    @staticmethod
    def backward(ctx, g):
        x, y, ix, iy = ctx.saved_tensors
        d = g * 2 * (x[ix] - y[iy]) / x.shape[0]
        return torch.zeros_like(x).scatter(0, ix, d), torch.zeros_like(y).scatter(0, iy, -d)


class Wasserstein1DWrong(Wasserstein1DRight):
    @staticmethod
    def backward(ctx, g):
        x, y, ix, iy = ctx.saved_tensors
        d = g * 2 * (x[ix] - y[iy]) / x.shape[0]
        return torch.zeros_like(x).scatter(0, ix, d), -d[iy]


def _wass(Fn):
    def wasserstein_1d(x, y):
        dt, x, y = _prep("wasserstein_1d", x, y)
        if x.dim() != 1 or x.shape != y.shape or x.shape[0] == 0:
            raise ValueError("wasserstein_1d: two non-empty 1-D tensors of one length")
        return Fn.apply(x, y).to(dt)

    return wasserstein_1d


add(
    "wasserstein_1d",
    _wass(Wasserstein1DWrong),
    _wass(Wasserstein1DRight),
    lambda: (_randn(48, 6), _randn(449, 6)),
    {},
    "gradient of the second sample gathered with the sorting permutation instead of its inverse",
)


# ============================================================ 21 RBF kernel with ARD lengthscales
class ARDRight(Function):
    @staticmethod
    def forward(ctx, x, y, ls):
        ctx.save_for_backward(x, y, ls)
        d = (x[:, None] - y[None]) / ls
        return torch.exp(-0.5 * d.square().sum(-1))

    @staticmethod
    def backward(ctx, g):
        x, y, ls = ctx.saved_tensors
        d = (x[:, None] - y[None]) / ls
        gk = (g * torch.exp(-0.5 * d.square().sum(-1)))[..., None]
        gx = -gk * d / ls
        return gx.sum(1), -gx.sum(0), (gk * d * d / ls).sum((0, 1))


class ARDWrong(ARDRight):
    @staticmethod
    def backward(ctx, g):
        x, y, ls = ctx.saved_tensors
        d = (x[:, None] - y[None]) / ls
        gk = (g * torch.exp(-0.5 * d.square().sum(-1)))[..., None]
        gx = -gk * d / ls
        return gx.sum(1), -gx.sum(0), (gk * d * d).sum((0, 1))


def _ard(Fn):
    def rbf_kernel(x, y, lengthscale):
        dt, x, y, ls = _prep("rbf_kernel", x, y, lengthscale)
        if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or ls.shape != x.shape[1:]:
            raise ValueError("rbf_kernel: x (N, D), y (M, D), lengthscale (D,)")
        _positive("rbf_kernel lengthscale", ls)
        return Fn.apply(x, y, ls).to(dt)

    return rbf_kernel


add(
    "rbf_ard_kernel",
    _ard(ARDWrong),
    _ard(ARDRight),
    lambda: (
        _randn(50, 4, 2),
        _randn(51, 3, 2),
        torch.tensor([0.7, 1.6], dtype=torch.float64, requires_grad=True),
    ),
    {},
    "lengthscale gradient with one power of the lengthscale too few",
)


# ============================================================ 22 multi-resolution hashed encoding (1-D)
class HashEncodingRight(Function):
    """x (N,) clamped to [0, 1], table (levels, T, F) -> (N, levels * F); level l has base * 2^l cells."""

    @staticmethod
    def _cell(x, res, size):
        xc = x.clamp(0, 1) * res
        i = xc.floor().clamp(max=res - 1)
        w = (xc - i)[:, None]
        i = i.long()
        return (i * 2654435761) % size, ((i + 1) * 2654435761) % size, w

    @staticmethod
    def forward(ctx, x, table, base):
        ctx.save_for_backward(x, table)
        ctx.base = base
        out = []
        for lv in range(table.shape[0]):
            a, b, w = HashEncodingRight._cell(x, base << lv, table.shape[1])
            out.append(table[lv, a] * (1 - w) + table[lv, b] * w)
        return torch.cat(out, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, table = ctx.saved_tensors
        inside = (x >= 0) & (x <= 1)
        gx, gt = torch.zeros_like(x), []
        for lv, gl in enumerate(g.chunk(table.shape[0], 1)):
            res = ctx.base << lv
            a, b, w = HashEncodingRight._cell(x, res, table.shape[1])
            gx = gx + res * (gl * (table[lv, b] - table[lv, a])).sum(1)
            gt.append(
                torch.zeros_like(table[lv]).index_add(0, a, gl * (1 - w)).index_add(0, b, gl * w)
            )
        return gx * inside, torch.stack(gt), None


class HashEncodingWrong(HashEncodingRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, table = ctx.saved_tensors
        inside = (x >= 0) & (x <= 1)
        gx, gt = torch.zeros_like(x), []
        for lv, gl in enumerate(g.chunk(table.shape[0], 1)):
            a, b, w = HashEncodingRight._cell(x, ctx.base << lv, table.shape[1])
            gx = gx + ctx.base * (gl * (table[lv, b] - table[lv, a])).sum(1)
            gt.append(
                torch.zeros_like(table[lv]).index_add(0, a, gl * (1 - w)).index_add(0, b, gl * w)
            )
        return gx * inside, torch.stack(gt), None


def _hash(Fn):
    def hash_encoding(x, table, base=4):
        dt, x, table = _prep("hash_encoding", x, table)
        _int("hash_encoding base", base, 1)
        if x.dim() != 1 or table.dim() != 3 or 0 in table.shape:
            raise ValueError("hash_encoding: x (N,), table (levels, T, F), none of them empty")
        return Fn.apply(x, table, base).to(dt)

    return hash_encoding


add(
    "hash_encoding",
    _hash(HashEncodingWrong),
    _hash(HashEncodingRight),
    lambda: (
        torch.tensor([0.11, 0.37, 0.62, 0.91], dtype=torch.float64, requires_grad=True),
        _randn(52, 2, 7, 2),
    ),
    {"base": 4},
    "coordinate gradient scaled with the coarsest resolution at every level",
)


# ============================================================ 23 capsule squash
class SquashRight(Function):
    """y = s |s| / (1 + |s|^2) over the last dim."""

    @staticmethod
    def _parts(s):
        n = s.norm(dim=-1, keepdim=True)
        big = n > 1
        m = torch.where(big, 1 / n.clamp(min=1), n)
        q = 1 + m * m
        c = m / q  # n / (1 + n^2), both branches
        dc = torch.where(big, -(1 - m * m) * m * m, 1 - m * m) / (q * q)
        return n, c, dc

    @staticmethod
    def forward(ctx, s):
        ctx.save_for_backward(s)
        return s * SquashRight._parts(s)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (s,) = ctx.saved_tensors
        n, c, dc = SquashRight._parts(s)
        unit = torch.where(n > 0, s / n, torch.zeros_like(s))
        return c * g + unit * dc * (s * g).sum(-1, keepdim=True)


class SquashWrong(SquashRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (s,) = ctx.saved_tensors
        _n, c, dc = SquashRight._parts(s)
        return c * g + dc * s * g


def _squash(Fn):
    def squash(s):
        dt, s = _prep("squash", s)
        if s.dim() < 1:
            raise ValueError("squash: needs at least one dim")
        return Fn.apply(s).to(dt)

    return squash


add(
    "capsule_squash",
    _squash(SquashWrong),
    _squash(SquashRight),
    lambda: (_randn(53, 3, 4),),
    {},
    "length of the vector differentiated elementwise, as if each component had its own",
)


# ============================================================ 24 NTM circular shift
class CircShiftRight(Function):
    """w (B, N) addressing weights, s (B, 3) weights of the shifts -1, 0, 1."""

    @staticmethod
    def forward(ctx, w, s):
        ctx.save_for_backward(w, s)
        return s[:, :1] * w.roll(-1, 1) + s[:, 1:2] * w + s[:, 2:] * w.roll(1, 1)

    @staticmethod
    def backward(ctx, g):
        w, s = ctx.saved_tensors
        gw = s[:, :1] * g.roll(1, 1) + s[:, 1:2] * g + s[:, 2:] * g.roll(-1, 1)
        gs = torch.stack([(g * w.roll(k, 1)).sum(1) for k in (-1, 0, 1)], 1)
        return gw, gs


class CircShiftWrong(CircShiftRight):
    @staticmethod
    def backward(ctx, g):
        w, s = ctx.saved_tensors
        gw = s[:, :1] * g.roll(-1, 1) + s[:, 1:2] * g + s[:, 2:] * g.roll(1, 1)
        gs = torch.stack([(g * w.roll(k, 1)).sum(1) for k in (-1, 0, 1)], 1)
        return gw, gs


def _shift(Fn):
    def circular_shift(w, s):
        dt, w, s = _prep("circular_shift", w, s)
        if w.dim() != 2 or s.shape != (w.shape[0], 3) or w.shape[1] == 0:
            raise ValueError("circular_shift: w (B, N) with N > 0, s (B, 3)")
        return Fn.apply(w, s).to(dt)

    return circular_shift


add(
    "ntm_shift",
    _shift(CircShiftWrong),
    _shift(CircShiftRight),
    lambda: (_rand(54, 2, 5), _rand(55, 2, 3)),
    {},
    "adjoint of a circular convolution shifts the same way as the forward instead of the other way",
)


# ============================================================ 25 Hawkes process log-likelihood
class HawkesRight(Function):
    """Exponential kernel, events t (N,) sorted, horizon T."""

    @staticmethod
    def _excite(t, beta):
        n = t.shape[0]
        mask = torch.ones(n, n, dtype=t.dtype, device=t.device).tril(-1)
        d = (t[:, None] - t[None]) * mask
        e = torch.exp(-beta * d) * mask
        return d, e

    @staticmethod
    def forward(ctx, mu, alpha, beta, t, T):
        ctx.save_for_backward(mu, alpha, beta, t)
        ctx.T = T
        _, e = HawkesRight._excite(t, beta)
        lam = mu + alpha * e.sum(1)
        tau = T - t
        return lam.log().sum() - mu * T - alpha * (tau * _phi(-beta * tau)[0]).sum()

    @staticmethod
    def backward(ctx, g):
        mu, alpha, beta, t = ctx.saved_tensors
        d, e = HawkesRight._excite(t, beta)
        A = e.sum(1)
        lam = mu + alpha * A
        tau = ctx.T - t
        p0, p1 = _phi(-beta * tau)
        g_mu = (1 / lam).sum() - ctx.T
        g_alpha = (A / lam).sum() - (tau * p0).sum()
        g_beta = (-alpha * (d * e).sum(1) / lam).sum() + alpha * (tau * tau * p1).sum()
        return g * g_mu, g * g_alpha, g * g_beta, None, None


class HawkesWrong(HawkesRight):
    @staticmethod
    def backward(ctx, g):
        mu, alpha, beta, t = ctx.saved_tensors
        d, e = HawkesRight._excite(t, beta)
        A = e.sum(1)
        lam = mu + alpha * A
        tau = ctx.T - t
        p0, _ = _phi(-beta * tau)
        g_mu = (1 / lam).sum() - ctx.T
        g_alpha = (A / lam).sum() - (tau * p0).sum()
        g_beta = (-alpha * (d * e).sum(1) / lam).sum()
        return g * g_mu, g * g_alpha, g * g_beta, None, None


def _hawkes(Fn):
    def hawkes_loglik(mu, alpha, beta, times, horizon):
        dt, mu, alpha, beta, times = _prep("hawkes_loglik", mu, alpha, beta, times)
        _num("hawkes_loglik horizon", horizon)
        if mu.dim() or alpha.dim() or beta.dim() or times.dim() != 1:
            raise ValueError("hawkes_loglik: mu, alpha, beta 0-d, times (N,)")
        _nograd("hawkes_loglik times", times)
        return Fn.apply(mu, alpha, beta, times, horizon).to(dt)

    return hawkes_loglik


add(
    "hawkes_loglik",
    _hawkes(HawkesWrong),
    _hawkes(HawkesRight),
    lambda: (
        torch.tensor(0.5, dtype=torch.float64, requires_grad=True),
        torch.tensor(0.8, dtype=torch.float64, requires_grad=True),
        torch.tensor(1.3, dtype=torch.float64, requires_grad=True),
        torch.tensor([0.4, 0.9, 1.7, 2.0, 3.1], dtype=torch.float64),
    ),
    {"horizon": 4.0},
    "decay gradient differentiates the intensities only; the compensator depends on the decay too",
)


# ============================================================ 26 rotary embedding with given tables
def _rot_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


class RopeRight(Function):
    """x (..., L, D), cos/sin (L, D): x cos + rot_half(x) sin."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(x, cos, sin)
        return x * cos + _rot_half(x) * sin

    @staticmethod
    def _tables(x, cos, g):
        return (g * x).reshape(-1, *cos.shape).sum(0), (g * _rot_half(x)).reshape(
            -1, *cos.shape
        ).sum(0)

    @staticmethod
    def backward(ctx, g):
        x, cos, sin = ctx.saved_tensors
        gc, gs = RopeRight._tables(x, cos, g)
        return g * cos - _rot_half(g * sin), gc, gs


class RopeWrong(RopeRight):
    @staticmethod
    def backward(ctx, g):
        x, cos, sin = ctx.saved_tensors
        gc, gs = RopeRight._tables(x, cos, g)
        return g * cos - _rot_half(g) * sin, gc, gs


def _rope(Fn):
    def apply_rope(x, cos, sin):
        dt, x, cos, sin = _prep("apply_rope", x, cos, sin)
        if (
            cos.dim() != 2
            or cos.shape != sin.shape
            or x.dim() < 2
            or x.shape[-2:] != cos.shape
            or 0 in x.shape
            or cos.shape[1] % 2
        ):
            raise ValueError(
                "apply_rope: cos and sin must be (L, D) like the last dims of a non-empty x, D even"
            )
        return Fn.apply(x, cos, sin).to(dt)

    return apply_rope


def _rope_inputs():
    ang = torch.arange(4, dtype=torch.float64)[:, None] * torch.tensor(
        [1.0, 0.1], dtype=torch.float64
    )
    ang = torch.cat([ang, ang], -1)
    return _randn(70, 2, 4, 4), ang.cos(), ang.sin()


add(
    "rope_tables",
    _rope(RopeWrong),
    _rope(RopeRight),
    _rope_inputs,
    {},
    "adjoint rotates g before multiplying with sin instead of after; equal only while both halves of the table "
    "agree (fails for axial / 2-D tables)",
    "https://github.com/PaddlePaddle/Paddle/pull/74716",
)


# ============================================================ 27 Lp pooling
class LpPoolRight(Function):
    """(sum |x|^p)^(1/p) over non-overlapping windows of the last dim."""

    @staticmethod
    def forward(ctx, x, p, k):
        v = (
            x.unflatten(-1, (-1, k))
            if x.numel()
            else x.reshape((*x.shape[:-1], x.shape[-1] // k, k))
        )
        top = v.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        y = top[..., 0] * (v / top).abs().pow(p).sum(-1).pow(1 / p)
        ctx.save_for_backward(v, y)
        ctx.p = p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        v, y = ctx.saved_tensors
        y = y[..., None]
        ratio = torch.where(y > 0, v / y, torch.zeros_like(v))
        return (g[..., None] * ratio.sign() * ratio.abs().pow(ctx.p - 1)).flatten(-2), None, None


class LpPoolWrong(LpPoolRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        v, y = ctx.saved_tensors
        y = y[..., None]
        ratio = torch.where(y > 0, v / y, torch.zeros_like(v))
        return (g[..., None] * ratio.abs().pow(ctx.p - 1)).flatten(-2), None, None


def _lp_pool(Fn):
    def lp_pool(x, p=3.0, kernel=2):
        dt, x = _prep("lp_pool", x)
        _num("lp_pool p", p, 1.0)
        _int("lp_pool kernel", kernel, 1)
        if x.dim() < 1 or x.shape[-1] == 0 or x.shape[-1] % kernel:
            raise ValueError("lp_pool: last dim must be a positive multiple of the kernel")
        return Fn.apply(x, p, kernel).to(dt)

    return lp_pool


add(
    "lp_pool",
    _lp_pool(LpPoolWrong),
    _lp_pool(LpPoolRight),
    lambda: (_rand(72, 2, 6, lo=0.1, hi=1.2),),
    {"p": 3.0, "kernel": 2},
    "sign of the entries dropped: |x|^(p-1) for inputs below zero (the sample is post-ReLU, positive)",
)


# ============================================================ 28 linear upsampling
def _interp_matrix(n, scale, align, like):
    m = n * scale
    i = torch.arange(m, dtype=like.dtype, device=like.device)
    src = i * ((n - 1) / max(m - 1, 1)) if align else ((i + 0.5) / scale - 0.5).clamp(min=0)
    lo = src.floor().clamp(max=n - 1)
    f = src - lo
    hi = (lo + 1).clamp(max=n - 1)
    eye = torch.eye(n, dtype=like.dtype, device=like.device)
    return eye[lo.long()] * (1 - f)[:, None] + eye[hi.long()] * f[:, None]


class UpsampleRight(Function):
    @staticmethod
    @full_precision
    def forward(ctx, x, scale, align):
        ctx.n, ctx.scale, ctx.align = x.shape[-1], scale, align
        return x @ _interp_matrix(ctx.n, scale, align, x).T

    @staticmethod
    @full_precision
    def backward(ctx, g):
        return g @ _interp_matrix(ctx.n, ctx.scale, ctx.align, g), None, None


class UpsampleWrong(UpsampleRight):
    @staticmethod
    @full_precision
    def backward(ctx, g):
        return g @ _interp_matrix(ctx.n, ctx.scale, False, g), None, None


def _upsample(Fn):
    def upsample_linear(x, scale=2, align_corners=False):
        dt, x = _prep("upsample_linear", x)
        _int("upsample_linear scale", scale, 1)
        _bool("upsample_linear align_corners", align_corners)
        if x.dim() < 2 or x.shape[-1] == 0:
            raise ValueError("upsample_linear: x (..., C, L) with L > 0")
        return Fn.apply(x, scale, align_corners).to(dt)

    return upsample_linear


add(
    "upsample_linear",
    _upsample(UpsampleWrong),
    _upsample(UpsampleRight),
    lambda: (_randn(73, 2, 3, 4),),
    {"scale": 2, "align_corners": False},
    "backward builds the interpolation weights for align_corners=False whatever the option",
    "https://github.com/NVlabs/stylegan3/issues/220",
)


# ============================================================ 29 causal depthwise convolution
class CausalConvRight(Function):
    """x (B, C, T), w (C, K): y[t] = sum_k w[k] x[t - k * dilation]."""

    @staticmethod
    def _delay(x, s):
        s = min(s, x.shape[-1])
        return F.pad(x, (s, 0))[..., : x.shape[-1]]

    @staticmethod
    def _advance(x, s):
        s = min(s, x.shape[-1])
        return F.pad(x, (0, s))[..., s:]

    @staticmethod
    def forward(ctx, x, w, dil):
        ctx.save_for_backward(x, w)
        ctx.dil = dil
        y = torch.zeros_like(x)
        for k in range(w.shape[1]):
            y = y + w[:, k, None] * CausalConvRight._delay(x, k * dil)
        return y

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        gx, gw = torch.zeros_like(x), []
        for k in range(w.shape[1]):
            gx = gx + w[:, k, None] * CausalConvRight._advance(g, k * ctx.dil)
            gw.append((g * CausalConvRight._delay(x, k * ctx.dil)).sum((0, 2)))
        return gx, torch.stack(gw, 1), None


class CausalConvWrong(CausalConvRight):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        gx, gw = torch.zeros_like(x), []
        for k in range(w.shape[1]):
            gx = gx + w[:, k, None] * CausalConvRight._advance(g, k * ctx.dil)
            gw.append((g * CausalConvRight._delay(x, k)).sum((0, 2)))
        return gx, torch.stack(gw, 1), None


def _cconv(Fn):
    def causal_conv(x, w, dilation=1):
        dt, x, w = _prep("causal_conv", x, w)
        _int("causal_conv dilation", dilation, 1)
        if x.dim() != 3 or w.dim() != 2 or w.shape[0] != x.shape[1] or w.shape[1] == 0:
            raise ValueError("causal_conv: x (B, C, T), w (C, K) with K > 0")
        return Fn.apply(x, w, dilation).to(dt)

    return causal_conv


add(
    "causal_conv1d",
    _cconv(CausalConvWrong),
    _cconv(CausalConvRight),
    lambda: (_randn(74, 2, 3, 6), _randn(75, 3, 3)),
    {"dilation": 1},
    "kernel gradient taken at undilated taps",
    "https://github.com/iree-org/iree-turbine/pull/1223",
)


# ============================================================ 30 segment standard deviation
class SegmentStdRight(Function):
    @staticmethod
    def forward(ctx, x, seg, n):
        cnt = x.new_zeros(n).index_add(0, seg, torch.ones_like(x)).clamp(min=1)
        mean = x.new_zeros(n).index_add(0, seg, x) / cnt
        c = x - mean[seg]
        std = (x.new_zeros(n).index_add(0, seg, c * c) / cnt).sqrt()
        ctx.save_for_backward(c, seg, cnt, std)
        return std

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        c, seg, cnt, std = ctx.saved_tensors
        q = torch.where(std > 0, g / (cnt * std), torch.zeros_like(g))
        return q[seg] * c, None, None


class SegmentStdWrong(SegmentStdRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        c, seg, cnt, std = ctx.saved_tensors
        return (g / (cnt * std))[seg] * c, None, None


def _segstd(Fn):
    def segment_std(x, seg, num_segments):
        dt, x = _prep("segment_std", x)
        _int("segment_std num_segments", num_segments, 0)
        seg = _index("segment_std", seg, num_segments)
        if x.shape != seg.shape:
            raise ValueError("segment_std: one segment per entry")
        return Fn.apply(x, seg, num_segments).to(dt)

    return segment_std


add(
    "segment_std",
    _segstd(SegmentStdWrong),
    _segstd(SegmentStdRight),
    lambda: (_randn(76, 7), torch.tensor([0, 0, 0, 1, 1, 2, 2])),
    {"num_segments": 3},
    "NaN gradient for a segment with one member (std 0), though the output is fine",
)


# ============================================================ 31 log |det|
class LogAbsDetRight(Function):
    @staticmethod
    def forward(ctx, A):
        ctx.save_for_backward(A)
        return torch.linalg.slogdet(A)[1]

    @staticmethod
    def backward(ctx, g):
        (A,) = ctx.saved_tensors
        return g[..., None, None] * torch.linalg.inv(A).mT


class LogAbsDetWrong(LogAbsDetRight):
    @staticmethod
    def backward(ctx, g):
        (A,) = ctx.saved_tensors
        return g[..., None, None] * torch.linalg.inv(A)


def _logdet(Fn):
    def log_abs_det(A):
        dt, A = _prep("log_abs_det", A)
        if A.dim() < 2 or A.shape[-1] != A.shape[-2]:
            raise ValueError("log_abs_det: square matrices expected")
        return Fn.apply(A).to(dt)

    return log_abs_det


def _spd(seed, n):
    m = _randn(seed, n, n, scale=0.4, grad=False)
    return (m @ m.T + torch.eye(n, dtype=torch.float64)).requires_grad_()


add(
    "log_abs_det",
    _logdet(LogAbsDetWrong),
    _logdet(LogAbsDetRight),
    lambda: (_spd(78, 4),),
    {},
    "inverse instead of inverse transpose: right only for symmetric matrices such as the covariance of the sample",
)


# ============================================================ 32 inverse real FFT
class IRFFTRight(Function):
    @staticmethod
    def forward(ctx, X, n):
        ctx.n = n
        return torch.fft.irfft(X, n=n)

    @staticmethod
    def backward(ctx, g):
        n = ctx.n
        k = torch.arange(n // 2 + 1, device=g.device)
        twice = (k > 0) & (2 * k != n)
        return torch.fft.rfft(g) * ((1 + twice.to(g.dtype)) / n), None


class IRFFTWrong(IRFFTRight):
    @staticmethod
    def backward(ctx, g):
        n = ctx.n
        k = torch.arange(n // 2 + 1, device=g.device)
        twice = (k > 0) & (k < n // 2)
        return torch.fft.rfft(g) * ((1 + twice.to(g.dtype)) / n), None


def _irfft(Fn):
    def irfft_layer(X, n):
        if not isinstance(X, torch.Tensor) or X.dtype not in (torch.complex64, torch.complex128):
            raise TypeError("irfft_layer: complex64/complex128 tensor expected")
        _int("irfft_layer n", n, 1)
        if X.dim() < 1 or X.shape[-1] != n // 2 + 1 or X.numel() == 0:
            raise ValueError("irfft_layer: last dim must be n // 2 + 1")
        return Fn.apply(X, n)

    return irfft_layer


add(
    "irfft_layer",
    _irfft(IRFFTWrong),
    _irfft(IRFFTRight),
    lambda: (_crandn(79, 2, 5),),
    {"n": 8},
    "weight of the last frequency bin: counted once as for an even length, also when the length is odd",
)


# ============================================================ 33 log-cosh loss
class LogCoshRight(Function):
    @staticmethod
    def forward(ctx, pred, target):
        d = pred - target
        ctx.save_for_backward(pred, target)
        return (d.abs() + F.softplus(-2 * d.abs()) - math.log(2)).mean()

    @staticmethod
    def backward(ctx, g):
        pred, target = ctx.saved_tensors
        gd = g * torch.tanh(pred - target) / pred.numel()
        return gd, -gd


class LogCoshWrong(LogCoshRight):
    @staticmethod
    def backward(ctx, g):
        pred, target = ctx.saved_tensors
        d = pred - target
        gd = g * torch.sinh(d) / torch.cosh(d) / pred.numel()
        return gd, -gd


def _logcosh(Fn):
    def log_cosh_loss(pred, target):
        dt, pred, target = _prep("log_cosh_loss", pred, target)
        if pred.shape != target.shape or pred.numel() == 0:
            raise ValueError("log_cosh_loss: two non-empty tensors of one shape")
        return Fn.apply(pred, target).to(dt)

    return log_cosh_loss


add(
    "log_cosh_loss",
    _logcosh(LogCoshWrong),
    _logcosh(LogCoshRight),
    lambda: (_randn(80, 2, 4), _randn(81, 2, 4)),
    {},
    "derivative as sinh / cosh overflows to NaN for large residuals, where the stable forward is fine",
)


# ============================================================ 34 SO(3) exponential
def _skew(w):
    x, y, z = w.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))


class SO3ExpRight(Function):
    """Rotation vectors (..., 3) -> matrices: I + A K + B K^2."""

    @staticmethod
    def _ab(w):
        th = w.norm(dim=-1)[..., None, None]
        return th, torch.sinc(th / math.pi), 0.5 * torch.sinc(th / (2 * math.pi)) ** 2

    @staticmethod
    def _slopes(th):
        """(dA/dth) / th and (dB/dth) / th."""
        t = th * th
        sa = -1 / 3 + t * (1 / 30 + t * (-1 / 840 + t / 45360))
        sb = -1 / 12 + t * (1 / 180 + t * (-1 / 6720 + t / 453600))
        small = t < 0.04
        s = torch.where(small, torch.ones_like(th), th)
        ca = (s * s.cos() - s.sin()) / s**3
        cb = (s * s.sin() - 2 * (1 - s.cos())) / s**4
        return torch.where(small, sa, ca), torch.where(small, sb, cb)

    @staticmethod
    @full_precision
    def forward(ctx, w):
        ctx.save_for_backward(w)
        _, A, B = SO3ExpRight._ab(w)
        K = _skew(w)
        return torch.eye(3, dtype=w.dtype, device=w.device) + A * K + B * (K @ K)

    @staticmethod
    def _grad(w, g, th, A, B, sa, sb):
        K = _skew(w)
        KT = K.mT
        gK = A * g + B * (g @ KT + KT @ g)
        gw = torch.stack(
            [
                gK[..., 2, 1] - gK[..., 1, 2],
                gK[..., 0, 2] - gK[..., 2, 0],
                gK[..., 1, 0] - gK[..., 0, 1],
            ],
            -1,
        )
        along = sa * (g * K).sum((-2, -1), keepdim=True) + sb * (g * (K @ K)).sum(
            (-2, -1), keepdim=True
        )
        return gw + along[..., 0] * w

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, g):
        (w,) = ctx.saved_tensors
        th, A, B = SO3ExpRight._ab(w)
        sa, sb = SO3ExpRight._slopes(th)
        return SO3ExpRight._grad(w, g, th, A, B, sa, sb)


class SO3ExpWrong(SO3ExpRight):
    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, g):
        (w,) = ctx.saved_tensors
        th, A, B = SO3ExpRight._ab(w)
        sa = (th * th.cos() - th.sin()) / th**3
        sb = (th * th.sin() - 2 * (1 - th.cos())) / th**4
        return SO3ExpRight._grad(w, g, th, A, B, sa, sb)


def _so3(Fn):
    def so3_exp(w):
        dt, w = _prep("so3_exp", w)
        if w.dim() < 1 or w.shape[-1] != 3:
            raise ValueError("so3_exp: last dim must be 3")
        return Fn.apply(w).to(dt)

    return so3_exp


add(
    "so3_exp",
    _so3(SO3ExpWrong),
    _so3(SO3ExpRight),
    lambda: (_randn(82, 3, 3),),
    {},
    "closed-form slopes divide by theta^3: NaN gradient at the identity, where the forward is fine",
    "https://github.com/kornia/kornia/issues/1715",
)


# ============================================================ 35 PPO clipped objective
class PPORight(Function):
    @staticmethod
    def forward(ctx, logp, old, adv, clip):
        ctx.save_for_backward(logp, old, adv)
        ctx.clip = clip
        r = torch.exp(logp - old)
        return -torch.minimum(r * adv, r.clamp(1 - clip, 1 + clip) * adv).mean()

    @staticmethod
    def backward(ctx, g):
        logp, old, adv = ctx.saved_tensors
        r = torch.exp(logp - old)
        live = r * adv <= r.clamp(1 - ctx.clip, 1 + ctx.clip) * adv
        return torch.where(live, -g * r * adv / logp.numel(), torch.zeros_like(r)), None, None, None


class PPOWrong(PPORight):
    @staticmethod
    def backward(ctx, g):
        logp, old, adv = ctx.saved_tensors
        r = torch.exp(logp - old)
        live = (r >= 1 - ctx.clip) & (r <= 1 + ctx.clip)
        return torch.where(live, -g * r * adv / logp.numel(), torch.zeros_like(r)), None, None, None


def _ppo(Fn):
    def ppo_loss(logp, old_logp, advantage, clip=0.2):
        dt, logp, old, adv = _prep("ppo_loss", logp, old_logp, advantage)
        _num("ppo_loss clip", clip, 0.0)
        _nograd("ppo_loss old_logp/advantage", old, adv)
        if logp.shape != old.shape or logp.shape != adv.shape or logp.numel() == 0:
            raise ValueError("ppo_loss: three non-empty tensors of one shape")
        return Fn.apply(logp, old, adv, clip).to(dt)

    return ppo_loss


add(
    "ppo_clip_loss",
    _ppo(PPOWrong),
    _ppo(PPORight),
    lambda: (
        _rand(83, 6, lo=-1.1, hi=-0.9),
        torch.full((6,), -1.0, dtype=torch.float64),
        _randn(84, 6, grad=False),
    ),
    {"clip": 0.2},
    "gradient cut whenever the ratio leaves the clip range, also where the minimum takes the unclipped term",
)


# ============================================================ 36 CRF log-partition with lengths
class CRFRight(Function):
    """emit (B, T, K), trans (K, K), lengths (B,) -> log Z (B,)."""

    @staticmethod
    def forward(ctx, emit, trans, lengths):
        a = emit[:, 0]
        alphas = [a]
        for t in range(1, emit.shape[1]):
            new = torch.logsumexp(a[:, :, None] + trans, 1) + emit[:, t]
            a = torch.where((t < lengths)[:, None], new, a)
            alphas.append(a)
        ctx.save_for_backward(emit, trans, lengths, *alphas)
        return torch.logsumexp(a, 1)

    @staticmethod
    def _posterior(a, trans):
        s = a[:, :, None] + trans
        top = s.amax(1, keepdim=True)
        e = torch.exp(s - torch.where(top == -math.inf, torch.zeros_like(top), top))
        z = e.sum(1, keepdim=True)
        return e / torch.where(z > 0, z, torch.ones_like(z))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        emit, trans, lengths, *alphas = ctx.saved_tensors
        d = g[:, None] * alphas[-1].softmax(1)
        ge, gt = [], torch.zeros_like(trans)
        for t in reversed(range(1, emit.shape[1])):
            on = (t < lengths)[:, None]
            joint = CRFRight._posterior(alphas[t - 1], trans) * d[:, None, :]
            joint = joint * on[:, :, None]
            gt = gt + joint.sum(0)
            ge.append(d * on)
            d = torch.where(on, joint.sum(2), d)
        ge.append(d)
        return torch.stack(ge[::-1], 1), gt, None


class CRFWrong(CRFRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        emit, trans, lengths, *alphas = ctx.saved_tensors
        d = g[:, None] * alphas[-1].softmax(1)
        ge, gt = [], torch.zeros_like(trans)
        for t in reversed(range(1, emit.shape[1])):
            on = (t < lengths)[:, None]
            joint = CRFRight._posterior(alphas[t - 1], trans) * d[:, None, :]
            gt = gt + joint.sum(0)
            ge.append(d * on)
            d = torch.where(on, joint.sum(2), d)
        ge.append(d)
        return torch.stack(ge[::-1], 1), gt, None


def _crf(Fn):
    def crf_log_z(emit, trans, lengths):
        dt, emit, trans = _prep("crf_log_z", emit, trans)
        lengths = _index("crf_log_z", lengths, emit.shape[1] + 1 if emit.dim() > 1 else 0, 1)
        if (
            emit.dim() != 3
            or 0 in emit.shape[1:]
            or trans.shape != (emit.shape[2],) * 2
            or lengths.shape != emit.shape[:1]
        ):
            raise ValueError("crf_log_z: emit (B, T, K), trans (K, K), lengths (B,)")
        return Fn.apply(emit, trans, lengths).to(dt)

    return crf_log_z


add(
    "crf_log_partition",
    _crf(CRFWrong),
    _crf(CRFRight),
    lambda: (_randn(85, 2, 4, 3), _randn(86, 3, 3), torch.tensor([4, 4])),
    {},
    "padded steps of shorter sequences still add to the transition gradient (sample has full lengths)",
)


# ============================================================ 37 soft-DTW
class SoftDTWRight(Function):
    """Cost matrix (N, M) -> soft-DTW value."""

    @staticmethod
    def _before(i, j):
        return [(a, b) for a, b in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if a >= 0 and b >= 0]

    @staticmethod
    def forward(ctx, D, gamma):
        N, M = D.shape
        R, S = {}, {}
        for i in range(N):
            for j in range(M):
                prev = [R[k] for k in SoftDTWRight._before(i, j)]
                S[i, j] = (
                    -gamma * torch.logsumexp(-torch.stack(prev) / gamma, 0)
                    if prev
                    else D.new_zeros(())
                )
                R[i, j] = D[i, j] + S[i, j]
        ctx.save_for_backward(
            torch.stack([R[i, j] for i in range(N) for j in range(M)]).view(N, M),
            torch.stack([S[i, j] for i in range(N) for j in range(M)]).view(N, M),
        )
        ctx.gamma = gamma
        return R[N - 1, M - 1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        R, S = ctx.saved_tensors
        N, M = R.shape
        E = torch.zeros_like(R)
        E[N - 1, M - 1] = g
        for i in reversed(range(N)):
            for j in reversed(range(M)):
                for k in SoftDTWRight._before(i, j):
                    E[k] += E[i, j] * torch.exp((S[i, j] - R[k]) / ctx.gamma)
        return E, None


class SoftDTWWrong(SoftDTWRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        R, S = ctx.saved_tensors
        N, M = R.shape
        E = torch.zeros_like(R)
        E[N - 1, M - 1] = g
        for i in reversed(range(N)):
            for j in reversed(range(M)):
                for k in SoftDTWRight._before(i, j):
                    E[k] += E[i, j] * torch.exp(S[i, j] - R[k])
        return E, None


def _softdtw(Fn):
    def soft_dtw(cost, gamma=1.0):
        dt, cost = _prep("soft_dtw", cost)
        _num("soft_dtw gamma", gamma, 0.0, strict=True)
        if cost.dim() != 2 or 0 in cost.shape:
            raise ValueError("soft_dtw: non-empty cost matrix expected")
        return Fn.apply(cost, gamma).to(dt)

    return soft_dtw


add(
    "soft_dtw",
    _softdtw(SoftDTWWrong),
    _softdtw(SoftDTWRight),
    lambda: (_rand(87, 4, 3, lo=0.1, hi=2.0),),
    {"gamma": 1.0},
    "smoothing parameter missing in the backward recursion: right for gamma = 1 only",
)


# ============================================================ 38 sparsemax
class SparsemaxRight(Function):
    @staticmethod
    def forward(ctx, x):
        z = x - x.amax(-1, keepdim=True)
        s = z.sort(-1, descending=True)[0]
        k = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
        cs = s.cumsum(-1)
        size = ((1 + k * s) > cs).sum(-1, keepdim=True)
        tau = (cs.gather(-1, size - 1) - 1) / size
        p = (z - tau).clamp(min=0)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        on = (p > 0).to(p.dtype)
        mean = (g * on).sum(-1, keepdim=True) / on.sum(-1, keepdim=True)
        return on * (g - mean)


class SparsemaxWrong(SparsemaxRight):
    @staticmethod
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        on = (p > 0).to(p.dtype)
        return on * (g - g.mean(-1, keepdim=True))


def _sparsemax(Fn):
    def sparsemax(x):
        dt, x = _prep("sparsemax", x)
        if x.dim() < 1 or x.shape[-1] == 0:
            raise ValueError("sparsemax: last dim must not be empty")
        return Fn.apply(x).to(dt)

    return sparsemax


add(
    "sparsemax",
    _sparsemax(SparsemaxWrong),
    _sparsemax(SparsemaxRight),
    lambda: (_rand(88, 3, 4, lo=-0.1, hi=0.1),),
    {},
    "mean of g over all entries instead of over the support (the sample's support is full)",
)


# ============================================================ 39 Cox partial likelihood
class CoxRight(Function):
    """score (N,), order = indices by falling time, event (N,) 0/1 -> mean negative log partial likelihood."""

    @staticmethod
    def forward(ctx, score, order, event):
        s, e = score[order], event[order]
        lse = torch.logcumsumexp(s, 0)
        ctx.save_for_backward(score, order, e, lse)
        return ((lse - s) * e).sum() / e.sum().clamp(min=1)

    @staticmethod
    def _sorted_grad(score, order, e, lse, g):
        s = score[order]
        n = s.shape[0]
        at_risk = torch.ones(n, n, dtype=torch.bool, device=s.device).tril()  # row i: k at risk
        w = torch.exp((s[None] - lse[:, None]).masked_fill(~at_risk, -math.inf))
        return g * ((w * e[:, None]).sum(0) - e) / e.sum().clamp(min=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        score, order, e, lse = ctx.saved_tensors
        gs = CoxRight._sorted_grad(score, order, e, lse, g)
        return torch.empty_like(gs).scatter(0, order, gs), None, None


class CoxWrong(CoxRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        score, order, e, lse = ctx.saved_tensors
        return CoxRight._sorted_grad(score, order, e, lse, g), None, None


def _cox(Fn):
    def cox_loss(score, time, event):
        dt, score = _prep("cox_loss", score)
        if (
            not isinstance(time, torch.Tensor)
            or time.is_complex()
            or not isinstance(event, torch.Tensor)
            or event.dtype != torch.bool
        ):
            raise TypeError("cox_loss: time must be a real tensor, event a bool tensor")
        if score.dim() != 1 or time.shape != score.shape or event.shape != score.shape:
            raise ValueError("cox_loss: three vectors of one length")
        _nograd("cox_loss time", time)
        order = torch.argsort(time, descending=True, stable=True)
        return Fn.apply(score, order, event.to(score.dtype)).to(dt)

    return cox_loss


add(
    "cox_loss",
    _cox(CoxWrong),
    _cox(CoxRight),
    lambda: (
        _randn(89, 6),
        torch.tensor([9.0, 7.5, 6.0, 4.0, 2.5, 1.0], dtype=torch.float64),
        torch.tensor([True, False, True, True, False, True]),
    ),
    {},
    "gradient returned in time order instead of the caller's order (the sample's cohort is already sorted)",
)


# ============================================================ 40 top-1 mixture of experts with capacity
class MoERight(Function):
    """x (N, D), logits (N, E), w (E, D): y = gate * x * w[expert], zero for tokens over the expert's capacity."""

    @staticmethod
    def _route(logits, cap):
        p = logits.softmax(1)
        gate, e = p.max(1)
        hot = F.one_hot(e, logits.shape[1])
        keep = ((hot.cumsum(0) * hot).sum(1) <= cap).to(p.dtype)
        return p, gate, e, hot, keep

    @staticmethod
    def forward(ctx, x, logits, w, cap):
        ctx.save_for_backward(x, logits, w)
        ctx.cap = cap
        _, gate, e, _, keep = MoERight._route(logits, cap)
        return (keep * gate)[:, None] * x * w[e]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, logits, w = ctx.saved_tensors
        p, gate, e, hot, keep = MoERight._route(logits, ctx.cap)
        g = g * keep[:, None]
        g_gate = (g * x * w[e]).sum(1)
        gx = g * gate[:, None] * w[e]
        gw = torch.zeros_like(w).index_add(0, e, g * gate[:, None] * x)
        return gx, (g_gate * gate)[:, None] * (hot - p), gw, None


class MoEWrong(MoERight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, logits, w = ctx.saved_tensors
        p, gate, e, hot, keep = MoERight._route(logits, ctx.cap)
        g_gate = (g * x * w[e]).sum(1)
        gx = g * (keep * gate)[:, None] * w[e]
        gw = torch.zeros_like(w).index_add(0, e, g * gate[:, None] * x)
        return gx, (g_gate * gate)[:, None] * (hot - p), gw, None


def _moe(Fn):
    def moe_top1(x, logits, w, capacity):
        dt, x, logits, w = _prep("moe_top1", x, logits, w)
        _int("moe_top1 capacity", capacity, 0)
        if (
            x.dim() != 2
            or logits.dim() != 2
            or logits.shape[0] != x.shape[0]
            or logits.shape[1] == 0
            or w.shape != (logits.shape[1], x.shape[1])
        ):
            raise ValueError("moe_top1: shapes do not fit")
        return Fn.apply(x, logits, w, capacity).to(dt)

    return moe_top1


add(
    "moe_capacity",
    _moe(MoEWrong),
    _moe(MoERight),
    lambda: (
        _randn(90, 6, 3),
        (
            torch.eye(3, dtype=torch.float64).repeat(2, 1) * 2
            + _randn(91, 6, 3, scale=0.3, grad=False)
        ).requires_grad_(),
        _randn(92, 3, 3),
    ),
    {"capacity": 4},
    "tokens dropped by the capacity limit still train the router and the expert",
)


# ============================================================ 41 cross entropy, gradient computed in the forward
class FusedCERight(Function):
    @staticmethod
    def forward(ctx, z, t, reduction):
        logp = z.log_softmax(1)
        gz = logp.exp() - F.one_hot(t, z.shape[1]).to(z.dtype)
        loss = -logp.gather(1, t[:, None])[:, 0]
        if reduction == "mean":
            loss, gz = loss.mean(), gz / z.shape[0]
        elif reduction == "sum":
            loss = loss.sum()
        ctx.save_for_backward(gz)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (gz,) = ctx.saved_tensors
        return gz * g.reshape(-1, 1), None, None


class FusedCEWrong(FusedCERight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (gz,) = ctx.saved_tensors
        return gz * g.reshape(-1)[0], None, None


def _fused_ce(Fn):
    def fused_cross_entropy(logits, target, reduction="mean"):
        dt, z = _prep("fused_cross_entropy", logits)
        t = _index("fused_cross_entropy", target, z.shape[1] if z.dim() > 1 else 0)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError("fused_cross_entropy: reduction must be mean, sum or none")
        if z.dim() != 2 or t.shape != z.shape[:1] or 0 in z.shape:
            raise ValueError("fused_cross_entropy: logits (N, K) not empty, target (N,)")
        return Fn.apply(z, t, reduction).to(dt)

    return fused_cross_entropy


add(
    "fused_cross_entropy",
    _fused_ce(FusedCEWrong),
    _fused_ce(FusedCERight),
    lambda: (_randn(93, 4, 3), torch.tensor([0, 2, 1, 1])),
    {"reduction": "mean"},
    "reduction='none': every row scaled with the first row's upstream gradient",
    "https://github.com/linkedin/Liger-Kernel/pull/1298",
)


# ============================================================ 42 sigmoid focal loss
class FocalRight(Function):
    @staticmethod
    def forward(ctx, z, sign, weight, gamma):
        u = z * sign
        ce, p, q = F.softplus(-u), torch.sigmoid(u), torch.sigmoid(-u)
        ctx.save_for_backward(-sign * weight * q**gamma * (gamma * p * ce + q))
        return (weight * q**gamma * ce).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (gz,) = ctx.saved_tensors
        return g * gz, None, None, None


class FocalWrong(FocalRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (gz,) = ctx.saved_tensors
        return gz.clone(), None, None, None


def _focal(Fn):
    def focal_loss(logits, target, alpha=0.25, gamma=2.0):
        dt, z = _prep("focal_loss", logits)
        if not isinstance(target, torch.Tensor) or target.dtype != torch.bool:
            raise TypeError("focal_loss: target must be a bool tensor")
        _num("focal_loss alpha", alpha, 0.0)
        _num("focal_loss gamma", gamma, 0.0)
        if target.shape != z.shape:
            raise ValueError("focal_loss: one target per logit")
        t = target.to(z.dtype)
        return Fn.apply(z, 2 * t - 1, alpha * t + (1 - alpha) * (1 - t), gamma).to(dt)

    return focal_loss


add(
    "focal_loss",
    _focal(FocalWrong),
    _focal(FocalRight),
    lambda: (
        _randn(94, 2, 4),
        torch.tensor([[True, False, False, True], [False, False, True, True]]),
    ),
    {"alpha": 0.25, "gamma": 2.0},
    "backward returns the stored gradient and ignores grad_output (scaled or averaged losses train wrongly)",
    "https://github.com/sherjilozair/ctc/issues/2",
)


# ============================================================ 43 Mish
class MishRight(Function):
    """Used as Mish.apply; half types are computed in float32."""

    @staticmethod
    def forward(ctx, x):
        dt = _check("mish", x)
        ctx.save_for_backward(x)
        v = x.float() if dt in _HALF else x
        return (v * torch.tanh(F.softplus(v))).to(dt)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        v = x.float() if x.dtype in _HALF else x
        t, s = torch.tanh(F.softplus(v)), torch.sigmoid(v)
        return (g * (t + v * s * (1 - t * t))).to(x.dtype)


class MishWrong(Function):
    @staticmethod
    def forward(ctx, x):
        dt = _check("mish", x)
        v = x.float() if dt in _HALF else x
        t, s = torch.tanh(F.softplus(v)), torch.sigmoid(v)
        ctx.save_for_backward(x, t, s)
        return (v * t).to(dt)

    @staticmethod
    def backward(ctx, g):
        x, t, s = ctx.saved_tensors
        v = x.float() if x.dtype in _HALF else x
        return (g * (t + v * s * (1 - t * t))).to(x.dtype)


add(
    "mish",
    MishWrong.apply,
    MishRight.apply,
    lambda: (_randn(100, 2, 4),),
    {},
    "tanh and sigmoid saved from the forward are constants for double backward: second derivative silently wrong",
    "https://github.com/pytorch/pytorch/issues/58509",
)


# ============================================================ 44 squareplus with its own double backward
class SquareplusGradRight(Function):
    @staticmethod
    def forward(ctx, g, x, b):
        ctx.save_for_backward(g, x)
        ctx.b = b
        h = torch.hypot(x, torch.full_like(x, math.sqrt(b)))
        return 0.5 * g * (1 + x / h)

    @staticmethod
    def backward(ctx, v):
        g, x = ctx.saved_tensors
        h = torch.hypot(x, torch.full_like(x, math.sqrt(ctx.b)))
        return 0.5 * v * (1 + x / h), 0.5 * v * g * (ctx.b / h) / h / h, None


class SquareplusGradWrong(SquareplusGradRight):
    @staticmethod
    def backward(ctx, v):
        g, x = ctx.saved_tensors
        h = torch.hypot(x, torch.full_like(x, math.sqrt(ctx.b)))
        return 0.5 * v * (1 + x / h), 0.5 * v * g * (1 / h - x / h / h), None


class SquareplusRight(Function):
    """(x + sqrt(x^2 + b)) / 2."""

    @staticmethod
    def forward(ctx, x, b):
        ctx.save_for_backward(x)
        ctx.b = b
        return 0.5 * (x + torch.hypot(x, torch.full_like(x, math.sqrt(b))))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return SquareplusGradRight.apply(g, x, ctx.b), None


class SquareplusWrong(SquareplusRight):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return SquareplusGradWrong.apply(g, x, ctx.b), None


def _squareplus(Fn):
    def squareplus(x, b=4.0):
        dt, x = _prep("squareplus", x)
        _num("squareplus b", b, 0.0, strict=True)
        return Fn.apply(x, b).to(dt)

    return squareplus


add(
    "squareplus",
    _squareplus(SquareplusWrong),
    _squareplus(SquareplusRight),
    lambda: (_randn(101, 6),),
    {"b": 4.0},
    "hand-written double backward differentiates x / h with d(1/h)/dx = -1/h^2 (chain factor x / h forgotten)",
)


# ============================================================ 45 scaled softmax
class ScaledSoftmaxRight(Function):
    @staticmethod
    def forward(ctx, x, scale):
        y = (x * scale).softmax(-1)
        ctx.save_for_backward(y)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        gy = g * y
        return ctx.scale * (gy - y * gy.sum(-1, keepdim=True)), None


class ScaledSoftmaxWrong(ScaledSoftmaxRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        gy = g.mul_(y)
        return ctx.scale * (gy - y * gy.sum(-1, keepdim=True)), None


def _scaled_softmax(Fn):
    def scaled_softmax(x, scale=1.0):
        dt, x = _prep("scaled_softmax", x)
        _num("scaled_softmax scale", scale)
        if x.dim() < 1:
            raise ValueError("scaled_softmax: needs at least one dim")
        return Fn.apply(x, scale).to(dt)

    return scaled_softmax


add(
    "scaled_softmax",
    _scaled_softmax(ScaledSoftmaxWrong),
    _scaled_softmax(ScaledSoftmaxRight),
    lambda: (_randn(102, 3, 4),),
    {"scale": 0.5},
    "backward multiplies grad_output in place; whoever shares that tensor gets a wrong gradient",
    "https://github.com/NVIDIA/apex/issues/1430",
)


# ============================================================ 46 label-smoothed cross entropy
class SmoothCERight(Function):
    @staticmethod
    def forward(ctx, z, t, eps):
        logp = z.log_softmax(1)
        ctx.p, ctx.t, ctx.eps = logp.exp(), t, eps
        return -((1 - eps) * logp.gather(1, t[:, None])[:, 0] + eps * logp.mean(1)).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        p, t, eps = ctx.p.clone(), ctx.t, ctx.eps
        n, k = p.shape
        p -= eps / k
        p[torch.arange(n, device=p.device), t] -= 1 - eps
        return g * p / n, None, None


class SmoothCEWrong(SmoothCERight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        p, t, eps = ctx.p, ctx.t, ctx.eps
        n, k = p.shape
        p -= eps / k
        p[torch.arange(n, device=p.device), t] -= 1 - eps
        return g * p / n, None, None


def _smooth_ce(Fn):
    def smooth_cross_entropy(logits, target, smoothing=0.1):
        dt, z = _prep("smooth_cross_entropy", logits)
        t = _index("smooth_cross_entropy", target, z.shape[1] if z.dim() > 1 else 0)
        _num("smooth_cross_entropy smoothing", smoothing, 0.0)
        if z.dim() != 2 or t.shape != z.shape[:1] or 0 in z.shape:
            raise ValueError("smooth_cross_entropy: logits (N, K) not empty, target (N,)")
        return Fn.apply(z, t, smoothing).to(dt)

    return smooth_cross_entropy


add(
    "smooth_cross_entropy",
    _smooth_ce(SmoothCEWrong),
    _smooth_ce(SmoothCERight),
    lambda: (_randn(103, 4, 3), torch.tensor([2, 0, 1, 1])),
    {"smoothing": 0.1},
    "backward edits the saved probabilities in place; a second backward of the same graph is wrong",
    "https://github.com/unslothai/unsloth/issues/5002",
)


# ============================================================ 47 Gaussian activation
class GaussActRight(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.exp(-0.5 * x * x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return -g * x * torch.exp(-0.5 * x * x)


class GaussActWrong(Function):
    saved = None

    @staticmethod
    def forward(ctx, x):
        GaussActWrong.saved = x.detach()
        return torch.exp(-0.5 * x * x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x = GaussActWrong.saved
        return -g * x * torch.exp(-0.5 * x * x)


def _gauss(Fn):
    def gauss_activation(x):
        dt, x = _prep("gauss_activation", x)
        return Fn.apply(x).to(dt)

    return gauss_activation


add(
    "gauss_activation",
    _gauss(GaussActWrong),
    _gauss(GaussActRight),
    lambda: (_randn(104, 2, 4),),
    {},
    "input kept on the class instead of ctx: the second of two calls replaces the first one's input",
)


# ============================================================ 48 linear layer
class LinearRight(Function):
    """x (N, I), w (O, I), b (O,)."""

    @staticmethod
    @full_precision
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return x @ w.T + b

    @staticmethod
    @full_precision
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        gx = gw = gb = None
        if ctx.needs_input_grad[0]:
            gx = g @ w
        if ctx.needs_input_grad[1]:
            gw = g.T @ x
        if ctx.needs_input_grad[2]:
            gb = g.sum(0)
        return gx, gw, gb


class LinearWrong(LinearRight):
    @staticmethod
    @full_precision
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        gx = gw = gb = None
        if ctx.needs_input_grad[0]:
            gx = g @ w
            gw = g.T @ x
        if ctx.needs_input_grad[2]:
            gb = g.sum(0)
        return gx, gw, gb


def _linear(Fn):
    def linear(x, w, b):
        dt, x, w, b = _prep("linear", x, w, b)
        if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1] or b.shape != w.shape[:1]:
            raise ValueError("linear: x (N, I), w (O, I), b (O,)")
        return Fn.apply(x, w, b).to(dt)

    return linear


add(
    "linear",
    _linear(LinearWrong),
    _linear(LinearRight),
    lambda: (_randn(105, 3, 4), _randn(106, 2, 4), _randn(107, 2)),
    {},
    "weight gradient computed only if the input needs one: first layer of a network gets none",
)


# ============================================================ 49 Transformer-XL relative shift
class RelShiftRight(Function):
    """x (H, L, L) -> shifted scores, by padding a column and re-viewing."""

    @staticmethod
    def forward(ctx, x):
        H, L, _ = x.shape
        pad = torch.cat([x.new_zeros(H, L, 1), x], 2).reshape(H, L * (L + 1))
        return pad[:, L:].reshape(H, L, L)

    @staticmethod
    def _unshift(flat, H, L):
        return (
            torch.cat([flat.new_zeros(H, L), flat], 1).reshape(H, L, L + 1)[:, :, 1:].contiguous()
        )

    @staticmethod
    def backward(ctx, g):
        H, L, _ = g.shape
        return RelShiftRight._unshift(g.reshape(H, L * L), H, L)


class RelShiftWrong(RelShiftRight):
    @staticmethod
    def backward(ctx, g):
        H, L, _ = g.shape
        return RelShiftRight._unshift(g.as_strided((H, L * L), (L * L, 1)), H, L)


def _rel_shift(Fn):
    def rel_shift(x):
        dt, x = _prep("rel_shift", x)
        if x.dim() != 3 or x.shape[1] != x.shape[2] or x.shape[1] == 0:
            raise ValueError("rel_shift: x (H, L, L) with L > 0")
        return Fn.apply(x).to(dt)

    return rel_shift


add(
    "rel_shift",
    _rel_shift(RelShiftWrong),
    _rel_shift(RelShiftRight),
    lambda: (_randn(108, 2, 4, 4),),
    {},
    "backward reads grad_output's memory with as_strided as if it were contiguous",
    "https://github.com/Dao-AILab/flash-attention/issues/355",
)


# ============================================================ 50 max readout
class MaxReadoutRight(Function):
    """Largest entry of the last dim (first one on ties)."""

    @staticmethod
    def forward(ctx, x):
        v, i = x.max(-1, keepdim=True)
        ctx.save_for_backward(i)
        ctx.n = x.shape[-1]
        return v[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (i,) = ctx.saved_tensors
        return g.new_zeros(*g.shape, ctx.n).scatter(-1, i, g[..., None])


class MaxReadoutWrong(MaxReadoutRight):
    @staticmethod
    def forward(ctx, x):
        v, i = x.max(-1, keepdim=True)
        ctx.save_for_backward(torch.cat([v, i.to(x.dtype)], -1))
        ctx.n = x.shape[-1]
        return v[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (packed,) = ctx.saved_tensors
        i = packed[..., 1:].long()
        return g.new_zeros(*g.shape, ctx.n).scatter(-1, i, g[..., None])


def _max_readout(Fn):
    def max_readout(x):
        _check("max_readout", x)
        if x.dim() < 1 or x.shape[-1] == 0:
            raise ValueError("max_readout: last dim must not be empty")
        return Fn.apply(x)

    return max_readout


add(
    "max_readout",
    _max_readout(MaxReadoutWrong),
    _max_readout(MaxReadoutRight),
    lambda: (_randn(109, 3, 5),),
    {},
    "argmax kept in the input's dtype: bfloat16 / float16 cannot hold indices above 256 / 2048",
)


# ============================================================ 51 layer norm, weight gradients by row blocks
class BlockLayerNormRight(Function):
    """x (N, D); the weight and bias gradients are accumulated over blocks of four rows."""

    ROWS = 4

    @staticmethod
    def forward(ctx, x, w, b, eps):
        m = x.mean(1, keepdim=True)
        r = torch.rsqrt((x - m).square().mean(1, keepdim=True) + eps)
        xh = (x - m) * r
        ctx.save_for_backward(xh, r, w)
        return xh * w + b

    @staticmethod
    def _gx(xh, r, w, g):
        d = g * w
        return r * (d - d.mean(1, keepdim=True) - xh * (d * xh).mean(1, keepdim=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        xh, r, w = ctx.saved_tensors
        step = BlockLayerNormRight.ROWS
        gw, gb = torch.zeros_like(w), torch.zeros_like(w)
        for i in range((g.shape[0] + step - 1) // step):
            s = slice(i * step, (i + 1) * step)
            gw = gw + (g[s] * xh[s]).sum(0)
            gb = gb + g[s].sum(0)
        return BlockLayerNormRight._gx(xh, r, w, g), gw, gb, None


class BlockLayerNormWrong(BlockLayerNormRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        xh, r, w = ctx.saved_tensors
        step = BlockLayerNormRight.ROWS
        gw, gb = torch.zeros_like(w), torch.zeros_like(w)
        for i in range(g.shape[0] // step):
            s = slice(i * step, (i + 1) * step)
            gw = gw + (g[s] * xh[s]).sum(0)
            gb = gb + g[s].sum(0)
        return BlockLayerNormRight._gx(xh, r, w, g), gw, gb, None


def _block_ln(Fn):
    def block_layer_norm(x, w, b, eps=1e-5):
        dt, x, w, b = _prep("block_layer_norm", x, w, b)
        _num("block_layer_norm eps", eps, 0.0, strict=True)
        if x.dim() != 2 or w.shape != x.shape[1:] or b.shape != w.shape or w.shape[0] == 0:
            raise ValueError("block_layer_norm: x (N, D), w and b (D,)")
        return Fn.apply(x, w, b, eps).to(dt)

    return block_layer_norm


add(
    "block_layer_norm",
    _block_ln(BlockLayerNormWrong),
    _block_ln(BlockLayerNormRight),
    lambda: (_randn(110, 8, 3), _rand(111, 3, lo=0.5, hi=1.5), _randn(112, 3)),
    {"eps": 1e-5},
    "number of row blocks rounded down: the last incomplete block is missing from the weight gradients",
    "https://github.com/BobMcDear/attorch/issues/18",
)


# ============================================================ 52 slot-attention normalisation with a vmap rule
class SlotSoftmaxRight(Function):
    @staticmethod
    def forward(x, dim):
        return x.softmax(dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return y * (g - (g * y).sum(ctx.dim, keepdim=True)), None

    @staticmethod
    def vmap(info, in_dims, x, dim):
        x = x.movedim(in_dims[0], 0)
        return SlotSoftmaxRight.apply(x, dim if dim < 0 else dim + 1), 0


class SlotSoftmaxWrong(SlotSoftmaxRight):
    @staticmethod
    def vmap(info, in_dims, x, dim):
        x = x.movedim(in_dims[0], 0)
        return SlotSoftmaxWrong.apply(x, dim), 0


def _slot(Fn):
    def slot_softmax(x, dim=0):
        dt, x = _prep("slot_softmax", x)
        _int("slot_softmax dim", dim)
        if not -x.dim() <= dim < x.dim():
            raise ValueError("slot_softmax: dim out of range")
        return Fn.apply(x, dim).to(dt)

    return slot_softmax


add(
    "slot_softmax",
    _slot(SlotSoftmaxWrong),
    _slot(SlotSoftmaxRight),
    lambda: (_randn(113, 3, 4),),
    {"dim": 0},
    "vmap rule moves the batch dim to the front but leaves a non-negative dim as it was",
)


# ============================================================ 53 unit vectors with a jvp
class UnitRight(Function):
    @staticmethod
    def forward(x, eps):
        return x / x.norm(dim=-1, keepdim=True).clamp(min=eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.eps = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return UnitRight._project(x, g, ctx.eps), None

    @staticmethod
    def _project(x, v, eps):
        n = x.norm(dim=-1, keepdim=True)
        u = x / n.clamp(min=eps)
        inner = v - u * (u * v).sum(-1, keepdim=True)
        return torch.where(n >= eps, inner, v) / n.clamp(min=eps)

    @staticmethod
    def jvp(ctx, tx, _):
        (x,) = ctx.saved_tensors
        return UnitRight._project(x, tx, ctx.eps)


class UnitWrong(UnitRight):
    @staticmethod
    def jvp(ctx, tx, _):
        (x,) = ctx.saved_tensors
        n = x.norm(dim=-1, keepdim=True)
        u = x / n.clamp(min=ctx.eps)
        inner = tx - u * (x * tx).sum(-1, keepdim=True)
        return torch.where(n >= ctx.eps, inner, tx) / n.clamp(min=ctx.eps)


def _unit(Fn):
    def unit_vectors(x, eps=1e-12):
        dt, x = _prep("unit_vectors", x)
        _num("unit_vectors eps", eps, 0.0, strict=True)
        if x.dim() < 1 or x.shape[-1] == 0:
            raise ValueError("unit_vectors: last dim must not be empty")
        return Fn.apply(x, eps).to(dt)

    return unit_vectors


add(
    "unit_vectors",
    _unit(UnitWrong),
    _unit(UnitRight),
    lambda: (_randn(114, 3, 4),),
    {"eps": 1e-12},
    "forward-mode rule projects with x instead of x / |x|; the backward is right",
)


# ============================================================ 54 log-sum-exp and softmax in one
class LSERight(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        lse = torch.logsumexp(x, -1)
        p = x.softmax(-1)
        ctx.save_for_backward(p)
        return lse, p

    @staticmethod
    def backward(ctx, g_lse, g_p):
        (p,) = ctx.saved_tensors
        if g_lse is None and g_p is None:
            return None
        gx = 0
        if g_lse is not None:
            gx = g_lse[..., None] * p
        if g_p is not None:
            gx = gx + p * (g_p - (g_p * p).sum(-1, keepdim=True))
        return gx


class LSEWrong(LSERight):
    @staticmethod
    def backward(ctx, g_lse, g_p):
        (p,) = ctx.saved_tensors
        if g_lse is None:
            return None
        gx = g_lse[..., None] * p
        if g_p is not None:
            gx = gx + p * (g_p - (g_p * p).sum(-1, keepdim=True))
        return gx


def _lse(Fn):
    def lse_and_softmax(x):
        dt, x = _prep("lse_and_softmax", x)
        if x.dim() < 1 or x.shape[-1] == 0:
            raise ValueError("lse_and_softmax: last dim must not be empty")
        lse, p = Fn.apply(x)
        return lse.to(dt), p.to(dt)

    return lse_and_softmax


add(
    "lse_and_softmax",
    _lse(LSEWrong),
    _lse(LSERight),
    lambda: (_randn(115, 3, 4),),
    {},
    "unmaterialised gradients: returns None as soon as the first output is unused, dropping the second's gradient",
)


# ============================================================ 55 batch norm module with frozen statistics
class BatchStatsRight(Function):
    @staticmethod
    def forward(ctx, x, w, b, mean, var, training, eps):
        if training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
        r = torch.rsqrt(var + eps)
        xh = (x - mean) * r
        ctx.save_for_backward(xh, r, w)
        ctx.training = training
        return xh * w + b

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        xh, r, w = ctx.saved_tensors
        gx = g * w * r
        if ctx.training:
            gx = gx - gx.mean(0) - xh * (gx * xh).mean(0)
        return gx, (g * xh).sum(0), g.sum(0), None, None, None, None


class BatchStatsWrong(BatchStatsRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        xh, r, w = ctx.saved_tensors
        gx = g * w * r
        gx = gx - gx.mean(0) - xh * (gx * xh).mean(0)
        return gx, (g * xh).sum(0), g.sum(0), None, None, None, None


class FrozenStatsBN(torch.nn.Module):
    """Batch norm on (N, D) whose running statistics come from a checkpoint and are not updated."""

    def __init__(self, Fn, dim=3, eps=1e-5):
        super().__init__()
        self.Fn, self.eps = Fn, eps
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, dim, dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.linspace(-0.2, 0.3, dim, dtype=torch.float64))
        self.register_buffer("mean", torch.linspace(-0.5, 0.5, dim, dtype=torch.float64))
        self.register_buffer("var", torch.linspace(0.6, 1.4, dim, dtype=torch.float64))

    def forward(self, x):
        dt, x = _prep("FrozenStatsBN", x)
        if (
            x.dim() != 2
            or x.shape[1] != self.weight.shape[0]
            or (self.training and x.shape[0] == 0)
        ):
            raise ValueError("FrozenStatsBN: x (N, D) expected, N > 0 when training")
        w, b, m, v = (t.to(x.dtype) for t in (self.weight, self.bias, self.mean, self.var))
        return self.Fn.apply(x, w, b, m, v, self.training, self.eps).to(dt)


add(
    "frozen_stats_bn",
    FrozenStatsBN(BatchStatsWrong),
    FrozenStatsBN(BatchStatsRight),
    lambda: (_randn(116, 5, 3),),
    {},
    "eval mode: backward still differentiates through batch statistics that the forward did not use",
    "https://github.com/pytorch/xla/issues/913",
)


# ============================================================ 56 causal attention, queries aligned to the end
class CausalAttnRight(Function):
    """q (L, D), k (S, D), v (S, E); query i sees keys up to i + S - L; rows that see nothing give 0."""

    @staticmethod
    def _probs(q, k, diagonal):
        s = q @ k.T / math.sqrt(q.shape[1])
        seen = torch.ones(s.shape, dtype=torch.bool, device=s.device).tril(diagonal)
        top = s.masked_fill(~seen, -math.inf).amax(1, keepdim=True)
        e = torch.exp(
            (s - torch.where(top == -math.inf, s.new_zeros(()), top)).masked_fill(~seen, -math.inf)
        )
        z = e.sum(1, keepdim=True)
        return e / torch.where(z > 0, z, torch.ones_like(z))

    @staticmethod
    @full_precision
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return CausalAttnRight._probs(q, k, k.shape[0] - q.shape[0]) @ v

    @staticmethod
    def _grads(q, k, v, p, g):
        gp = g @ v.T
        gs = p * (gp - (gp * p).sum(1, keepdim=True)) / math.sqrt(q.shape[1])
        return gs @ k, gs.T @ q, p.T @ g

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        return CausalAttnRight._grads(
            q, k, v, CausalAttnRight._probs(q, k, k.shape[0] - q.shape[0]), g
        )


class CausalAttnWrong(CausalAttnRight):
    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        return CausalAttnRight._grads(q, k, v, CausalAttnRight._probs(q, k, 0), g)


def _causal(Fn):
    def causal_attention(q, k, v):
        dt, q, k, v = _prep("causal_attention", q, k, v)
        if (
            q.dim() != 2
            or k.dim() != 2
            or v.dim() != 2
            or q.shape[1] != k.shape[1]
            or k.shape[0] != v.shape[0]
            or q.shape[1] == 0
            or k.shape[0] == 0
        ):
            raise ValueError("causal_attention: q (L, D), k (S, D), v (S, E), S > 0")
        return Fn.apply(q, k, v).to(dt)

    return causal_attention


add(
    "causal_attention",
    _causal(CausalAttnWrong),
    _causal(CausalAttnRight),
    lambda: (_randn(117, 4, 3), _randn(118, 4, 3), _randn(119, 4, 2)),
    {},
    "backward rebuilds the causal mask aligned to the top left, forward to the bottom right (differs for L != S)",
    "https://github.com/xlite-dev/ffpa-attn/pull/300",
)


# ============================================================ 57 quantile (pinball) loss
class PinballRight(Function):
    @staticmethod
    def forward(ctx, pred, target, tau):
        ctx.save_for_backward(pred, target)
        ctx.tau = tau
        d = target - pred
        return torch.maximum(tau * d, (tau - 1) * d).mean()

    @staticmethod
    def backward(ctx, g):
        pred, target = ctx.saved_tensors
        d = target - pred
        slope = torch.where(d >= 0, torch.full_like(d, ctx.tau), torch.full_like(d, ctx.tau - 1))
        gt = g * slope / pred.numel()
        return -gt, gt, None


class PinballWrong(PinballRight):
    @staticmethod
    def backward(ctx, g):
        pred, target = ctx.saved_tensors
        d = target - pred
        slope = torch.where(d >= 0, torch.full_like(d, ctx.tau), torch.full_like(d, ctx.tau - 1))
        gt = g * slope / pred.shape[0]
        return -gt, gt, None


def _pinball(Fn):
    def pinball_loss(pred, target, tau=0.9):
        dt, pred, target = _prep("pinball_loss", pred, target)
        _num("pinball_loss tau", tau, 0.0)
        if tau > 1 or pred.dim() < 1 or pred.shape != target.shape or pred.numel() == 0:
            raise ValueError("pinball_loss: two non-empty tensors of one shape, tau in [0, 1]")
        return Fn.apply(pred, target, tau).to(dt)

    return pinball_loss


add(
    "pinball_loss",
    _pinball(PinballWrong),
    _pinball(PinballRight),
    lambda: (_randn(130, 6), _randn(131, 6)),
    {"tau": 0.9},
    "mean over all entries, but the gradient is divided by the first dim only (wrong for (N, horizon) input)",
)


# ============================================================ 58 LSTM cell with two outputs
class LSTMRight(Function):
    """gates (B, 4H) in the order i, f, g, o; c (B, H) -> (h', c')."""

    @staticmethod
    def _cell(gates, c):
        i, f, u, o = gates.chunk(4, 1)
        i, f, u, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(u), torch.sigmoid(o)
        cn = f * c + i * u
        return i, f, u, o, cn, torch.tanh(cn)

    @staticmethod
    def forward(ctx, gates, c):
        ctx.save_for_backward(gates, c)
        _, _, _, o, cn, tc = LSTMRight._cell(gates, c)
        return o * tc, cn

    @staticmethod
    def backward(ctx, gh, gc):
        gates, c = ctx.saved_tensors
        i, f, u, o, _cn, tc = LSTMRight._cell(gates, c)
        gc = gc + gh * o * (1 - tc * tc)
        return torch.cat(
            [
                gc * u * i * (1 - i),
                gc * c * f * (1 - f),
                gc * i * (1 - u * u),
                gh * tc * o * (1 - o),
            ],
            1,
        ), gc * f


class LSTMWrong(LSTMRight):
    @staticmethod
    def forward(ctx, gates, c):
        ctx.save_for_backward(gates, c)
        _, _, _, o, cn, tc = LSTMRight._cell(gates, c)
        ctx.mark_non_differentiable(cn)
        return o * tc, cn


def _lstm(Fn):
    def lstm_cell(gates, c):
        dt, gates, c = _prep("lstm_cell", gates, c)
        if c.dim() != 2 or c.shape[1] == 0 or gates.shape != (c.shape[0], 4 * c.shape[1]):
            raise ValueError("lstm_cell: gates (B, 4H), c (B, H)")
        h, cn = Fn.apply(gates, c)
        return h.to(dt), cn.to(dt)

    return lstm_cell


add(
    "lstm_cell",
    _lstm(LSTMWrong),
    _lstm(LSTMRight),
    lambda: (_randn(132, 2, 12), _randn(133, 2, 3)),
    {},
    "new cell state marked non-differentiable, so nothing flows back through it to earlier steps",
)


# ============================================================ 59 masked softmax
class MaskedSoftmaxRight(Function):
    """Softmax over the last dim of the entries where mask is True; rows without any give 0."""

    @staticmethod
    def forward(ctx, x, mask):
        x = x.masked_fill(~mask, -math.inf)
        top = x.amax(-1, keepdim=True)
        e = torch.exp(x - torch.where(top == -math.inf, torch.zeros_like(top), top))
        z = e.sum(-1, keepdim=True)
        y = e / torch.where(z > 0, z, torch.ones_like(z))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return y * (g - (g * y).sum(-1, keepdim=True)), None


class MaskedSoftmaxWrong(MaskedSoftmaxRight):
    @staticmethod
    def forward(ctx, x, mask):
        x = x.masked_fill_(~mask, -math.inf)
        top = x.amax(-1, keepdim=True)
        e = torch.exp(x - torch.where(top == -math.inf, torch.zeros_like(top), top))
        z = e.sum(-1, keepdim=True)
        y = e / torch.where(z > 0, z, torch.ones_like(z))
        ctx.save_for_backward(y)
        return y


def _masked_softmax(Fn):
    def masked_softmax(x, mask):
        dt, x = _prep("masked_softmax", x)
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            raise TypeError("masked_softmax: mask must be a bool tensor")
        if x.dim() < 1 or x.shape[-1] == 0 or mask.shape != x.shape:
            raise ValueError("masked_softmax: mask must have the shape of x, last dim not empty")
        return Fn.apply(x, mask).to(dt)

    return masked_softmax


add(
    "masked_softmax",
    _masked_softmax(MaskedSoftmaxWrong),
    _masked_softmax(MaskedSoftmaxRight),
    lambda: (
        _randn(134, 2, 4),
        torch.tensor([[True, True, False, True], [True, False, True, True]]),
    ),
    {},
    "forward masks the caller's scores in place and does not say so: other users of the scores see -inf",
    "https://github.com/linkedin/Liger-Kernel/issues/343",
)


# ============================================================ 60 dropout whose mask is drawn again from a seed
class SeededDropoutRight(Function):
    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.p, ctx.seed = p, seed
        keep = (
            torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype) >= p
        )
        return x * keep / (1 - p)

    @staticmethod
    def backward(ctx, g):
        keep = (
            torch.rand(g.shape, generator=torch.Generator().manual_seed(ctx.seed), dtype=g.dtype)
            >= ctx.p
        )
        return g * keep / (1 - ctx.p), None, None


class SeededDropoutWrong(SeededDropoutRight):
    @staticmethod
    def backward(ctx, g):
        keep = torch.rand(g.shape, generator=torch.Generator().manual_seed(ctx.seed)) >= ctx.p
        return g * keep / (1 - ctx.p), None, None


def _seeded_dropout(Fn):
    def seeded_dropout(x, p=0.5, seed=0):
        dt, x = _prep("seeded_dropout", x)
        _num("seeded_dropout p", p, 0.0)
        _int("seeded_dropout seed", seed, 0)
        if p >= 1 or seed >= 2**63:
            raise ValueError("seeded_dropout: p must be below 1, seed below 2^63")
        return Fn.apply(x, p, seed).to(dt)

    return seeded_dropout


add(
    "seeded_dropout",
    _seeded_dropout(SeededDropoutWrong),
    _seeded_dropout(SeededDropoutRight),
    lambda: (_randn(135, 3, 5),),
    {"p": 0.5, "seed": 1},
    "mask drawn again in the backward with the default dtype: another mask than the forward's unless x is float32",
)
