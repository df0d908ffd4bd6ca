"""Seventh set: faults of kernels and layers of many fields, half of them right in the sample.

In one file, as it was written before any check ran on it. `source` is the public report that a fault is modelled on. As
mended since: eight twins of this set and the next fail under torch.autocast themselves, and are run outside of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import SEVENTH, Unseen, outside_autocast

AUTOCAST = {
    "attn_dk_scale",
    "gqa_interleave",
    "sliding_window_attn",
    "alibi_slopes",
    "conv_batch_chunks",
}
MISSED = {
    "flow_logdet_nondiff": "an output that is marked as not differentiable is a note: it may be meant so",
}

F32F64 = (torch.float32, torch.float64)
F64 = torch.float64


def add(name, wrong, right, make_inputs, why, source=""):
    if name in AUTOCAST:
        wrong, right = outside_autocast(wrong), outside_autocast(right)
    SEVENTH[f"{name}_7"] = Unseen(
        f"{name}_7", why, wrong, right, make_inputs, missed=MISSED.get(name, "")
    )


def _chk(*ts, dtypes=F32F64):
    """Same real floating dtype everywhere, one of `dtypes`; otherwise refuse."""
    for t in ts:
        if t.dtype not in dtypes:
            raise TypeError(f"unsupported dtype {t.dtype}")
        if t.dtype != ts[0].dtype:
            raise TypeError("inputs must share one dtype")


def _need(cond, msg):
    if not cond:
        raise ValueError(msg)


def rn(*shape, seed=0, dtype=F64, rg=True, scale=1.0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(shape, generator=g, dtype=F64) * scale + shift
    return t.to(dtype).requires_grad_(rg)


def _kernel_read(t, n):
    """What a CUDA kernel sees that indexes t.data_ptr() with dense strides:
    n consecutive elements from t's first, whatever t's own strides are."""
    flat = torch.empty(0, dtype=t.dtype).set_(t.detach().untyped_storage())
    idx = (torch.arange(n) + t.storage_offset()) % max(flat.numel(), 1)
    return flat[idx]


# --------------------------------------------------------------------------
# attention
# --------------------------------------------------------------------------
def _attn_bwd(g, p, q, k, v, scale):
    dv = p.mT @ g
    dp = g @ v.mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    return ds, ds @ k * scale, ds.mT @ q * scale, dv


def _attn_chk(q, k, v):
    _chk(q, k, v)
    _need(q.ndim >= 2 and q.shape[:-2] == k.shape[:-2] == v.shape[:-2], "batch dims")
    _need(q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2], "shapes")


class AttnRight(Function):
    @staticmethod
    def forward(ctx, q, k, v):
        _attn_chk(q, k, v)
        ctx.save_for_backward(q, k, v)
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v

    @staticmethod
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        p = torch.softmax(q @ k.mT * scale, -1)
        return _attn_bwd(g, p, q, k, v, scale)[1:]


class AttnWrong(AttnRight):
    @staticmethod
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        p = torch.softmax(q @ k.mT * scale, -1)
        _, dq, dk, dv = _attn_bwd(g, p, q, k, v, scale)
        return dq, dk / scale, dv  # the scale is forgotten for dk


add(
    "attn_dk_scale",
    AttnWrong.apply,
    AttnRight.apply,
    lambda: (rn(3, 4, seed=1), rn(5, 4, seed=2), rn(5, 2, seed=3)),
    "dk misses the 1/sqrt(d) softmax scale",
)


# GQA with interleaved heads: query head h reads kv head h % Hkv.
class GQARight(Function):
    @staticmethod
    def forward(ctx, q, k, v):
        _chk(q, k, v)
        _need(
            q.ndim == k.ndim == v.ndim == 3
            and k.shape[:2] == v.shape[:2]
            and q.shape[2] == k.shape[2],
            "q (Hq,T,D), k (Hkv,S,D), v (Hkv,S,E)",
        )
        _need(q.shape[0] % k.shape[0] == 0, "Hq % Hkv")
        ctx.save_for_backward(q, k, v)
        idx = torch.arange(q.shape[0]) % k.shape[0]
        return torch.softmax(q @ k[idx].mT * q.shape[-1] ** -0.5, -1) @ v[idx]

    @staticmethod
    def _grads(ctx, g):
        q, k, v = ctx.saved_tensors
        idx = torch.arange(q.shape[0]) % k.shape[0]
        ke, ve = k[idx], v[idx]
        scale = q.shape[-1] ** -0.5
        p = torch.softmax(q @ ke.mT * scale, -1)
        _, dq, dke, dve = _attn_bwd(g, p, q, ke, ve, scale)
        return q, k, v, idx, dq, dke, dve

    @staticmethod
    def backward(ctx, g):
        _q, k, v, idx, dq, dke, dve = GQARight._grads(ctx, g)
        return (
            dq,
            torch.zeros_like(k).index_add(0, idx, dke),
            torch.zeros_like(v).index_add(0, idx, dve),
        )


class GQAWrong(GQARight):
    @staticmethod
    def backward(ctx, g):
        q, k, v, _, dq, dke, dve = GQARight._grads(ctx, g)
        share = q.shape[0] // k.shape[0]
        # the flat head is split with the share count, not with the kv-head count
        idx = (torch.arange(q.shape[0]) % share) % k.shape[0]
        return (
            dq,
            torch.zeros_like(k).index_add(0, idx, dke),
            torch.zeros_like(v).index_add(0, idx, dve),
        )


add(
    "gqa_interleave",
    GQAWrong.apply,
    GQARight.apply,
    lambda: (rn(4, 3, 2, seed=4), rn(2, 3, 2, seed=5), rn(2, 3, 2, seed=6)),
    "dk/dv: query head split by share count, right only if Hq/Hkv == Hkv (sample: 4/2)",
    "https://github.com/XunhaoLai/native-sparse-attention-triton/issues/27",
)


WINDOW = 4


class WindowAttnRight(Function):
    """Causal attention where query i sees keys i-3..i."""

    @staticmethod
    def _p(q, k, window):
        n = q.shape[-2]
        d = torch.arange(n)[:, None] - torch.arange(n)[None, :]
        ok = (d >= 0) & (d < window)
        s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~ok, float("-inf"))
        return torch.softmax(s, -1)

    @staticmethod
    def forward(ctx, q, k, v):
        _attn_chk(q, k, v)
        _need(q.shape[-2] == k.shape[-2], "self attention")
        ctx.save_for_backward(q, k, v)
        return WindowAttnRight._p(q, k, WINDOW) @ v

    @staticmethod
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        p = WindowAttnRight._p(q, k, WINDOW)
        return _attn_bwd(g, p, q, k, v, q.shape[-1] ** -0.5)[1:]


class WindowAttnWrong(WindowAttnRight):
    @staticmethod
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        p = WindowAttnRight._p(q, k, 1 << 30)  # recomputed causal, but without the window
        return _attn_bwd(g, p, q, k, v, q.shape[-1] ** -0.5)[1:]


add(
    "sliding_window_attn",
    WindowAttnWrong.apply,
    WindowAttnRight.apply,
    lambda: (rn(4, 3, seed=7), rn(4, 3, seed=8), rn(4, 3, seed=9)),
    "backward recomputes the softmax without the window (4): wrong for T > 4",
    "https://github.com/meta-pytorch/MSLK/pull/263",
)


class AlibiRight(Function):
    """q,k,v (H,T,D), slopes (H,): scores get -slope*|i-j|."""

    @staticmethod
    def _p(q, k, slopes):
        n, m = q.shape[-2], k.shape[-2]
        dist = (torch.arange(n)[:, None] - torch.arange(m)[None, :]).abs().to(q.dtype)
        s = q @ k.mT * q.shape[-1] ** -0.5 - slopes[:, None, None] * dist
        return torch.softmax(s, -1), dist

    @staticmethod
    def forward(ctx, q, k, v, slopes):
        _attn_chk(q, k, v)
        _chk(q, slopes)
        _need(q.ndim == 3 and slopes.shape == q.shape[:1], "slopes (H,)")
        ctx.save_for_backward(q, k, v, slopes)
        return AlibiRight._p(q, k, slopes)[0] @ v

    @staticmethod
    def backward(ctx, g):
        q, k, v, slopes = ctx.saved_tensors
        p, dist = AlibiRight._p(q, k, slopes)
        ds, dq, dk, dv = _attn_bwd(g, p, q, k, v, q.shape[-1] ** -0.5)
        return dq, dk, dv, -(ds * dist).sum((1, 2))


class AlibiWrong(AlibiRight):
    @staticmethod
    def backward(ctx, g):
        dq, dk, dv, _ = AlibiRight.backward(ctx, g)
        return dq, dk, dv, None


add(
    "alibi_slopes",
    AlibiWrong.apply,
    AlibiRight.apply,
    lambda: (
        rn(2, 3, 2, seed=10),
        rn(2, 3, 2, seed=11),
        rn(2, 3, 2, seed=12),
        torch.tensor([0.5, 0.25], dtype=F64, requires_grad=True),
    ),
    "no gradient (None) for trainable ALiBi slopes",
    "https://github.com/Dao-AILab/flash-attention/pull/2876",
)


class SeededDropoutRight(Function):
    """Inverted dropout whose mask is a function of `seed`, recomputed in backward."""

    @staticmethod
    def _mask(x, seed, p):
        gen = torch.Generator().manual_seed(int(seed))
        return (torch.rand(x.shape, generator=gen) >= p).to(x.dtype) / (1 - p)

    @staticmethod
    def forward(ctx, x, seed, p):
        _chk(x)
        ctx.seed, ctx.p = seed, p
        return x * SeededDropoutRight._mask(x, seed, p)

    @staticmethod
    def backward(ctx, g):
        return g * SeededDropoutRight._mask(g, ctx.seed, ctx.p), None, None


class SeededDropoutWrong(SeededDropoutRight):
    @staticmethod
    def backward(ctx, g):
        # redraws from the global generator: another mask than the forward's
        return g * (torch.rand(g.shape) >= ctx.p).to(g.dtype) / (1 - ctx.p), None, None


add(
    "seeded_dropout",
    lambda x: SeededDropoutWrong.apply(x, 1234, 0.5),
    lambda x: SeededDropoutRight.apply(x, 1234, 0.5),
    lambda: (rn(4, 5, seed=13),),
    "dropout mask redrawn from the global RNG in backward",
    "https://github.com/openai/guided-diffusion/issues/167",
)


def _rot(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


class RotaryTablesRight(Function):
    """x*cos + rotate_half(x)*sin with tables over the full head dimension."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        _chk(x, cos, sin)
        _need(x.shape[-1] % 2 == 0 and cos.shape == sin.shape == x.shape[-2:], "tables (T,D)")
        ctx.save_for_backward(x, cos, sin)
        return x * cos + _rot(x) * sin

    @staticmethod
    def backward(ctx, g):
        x, cos, sin = ctx.saved_tensors
        return (
            g * cos - _rot(g * sin),
            (g * x).sum_to_size(cos.shape),
            (g * _rot(x)).sum_to_size(sin.shape),
        )


class RotaryTablesWrong(RotaryTablesRight):
    @staticmethod
    def backward(ctx, g):
        _x, cos, sin = ctx.saved_tensors
        _, dcos, dsin = RotaryTablesRight.backward(ctx, g)
        return g * cos - _rot(g) * sin, dcos, dsin  # order of rotation and sin


def _rotary_inputs():
    x = rn(4, 6, seed=14)
    f = torch.arange(4, dtype=F64)[:, None] * (10000.0 ** (-torch.arange(3, dtype=F64) / 3))
    emb = torch.cat((f, f), -1)
    return x, emb.cos(), emb.sin()


add(
    "rotary_tables",
    RotaryTablesWrong.apply,
    RotaryTablesRight.apply,
    _rotary_inputs,
    "rotate_half(g)*sin for rotate_half(g*sin): equal only if both halves of sin are",
    "https://github.com/PaddlePaddle/Paddle/pull/74716",
)


class RopeRight(Function):
    """NeoX rotary embedding of x (..., T, D), positions 0..T-1."""

    @staticmethod
    def _cs(x):
        n, h = x.shape[-2], x.shape[-1] // 2
        ang = torch.arange(n, dtype=F64)[:, None] * 100.0 ** (
            -torch.arange(h, dtype=F64) / max(h, 1)
        )
        return ang.cos().to(x.dtype), ang.sin().to(x.dtype)

    @staticmethod
    def forward(ctx, x):
        _chk(x)
        _need(x.ndim >= 2 and x.shape[-1] % 2 == 0, "even head dim")
        c, s = RopeRight._cs(x)
        a, b = x.chunk(2, -1)
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    @staticmethod
    def backward(ctx, g):
        c, s = RopeRight._cs(g)
        a, b = g.chunk(2, -1)
        return torch.cat((a * c + b * s, b * c - a * s), -1)


class RopeWrong(RopeRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        g = g.contiguous()  # (a no-op for most gradients)
        c, s = RopeRight._cs(g)
        a, b = g.chunk(2, -1)
        na = a * c + b * s
        b.copy_(b * c - a * s)
        a.copy_(na)
        return g  # rotated in the buffer of grad_output


add(
    "rope_inplace_grad",
    RopeWrong.apply,
    RopeRight.apply,
    lambda: (rn(3, 4, seed=15),),
    "backward rotates grad_output in place: other users of that gradient get it rotated",
)


# --------------------------------------------------------------------------
# normalisation
# --------------------------------------------------------------------------
EPS = 1e-6


class RMSNormRight(Function):
    @staticmethod
    def forward(ctx, x, w):
        _chk(x, w)
        _need(w.ndim == 1 and x.ndim >= 1 and x.shape[-1] == w.shape[0], "w (C,)")
        ctx.save_for_backward(x, w)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        xh, gw = x * r, g * w
        dx = r * (gw - xh * (gw * xh).mean(-1, keepdim=True))
        return dx, (g * xh).sum_to_size(w.shape)


class RMSNormWrong(RMSNormRight):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        xh = x * r
        dx = r * (g * w - xh * (g * xh).mean(-1, keepdim=True))  # weight missing in the mean
        return dx, (g * xh).sum_to_size(w.shape)


add(
    "rmsnorm_weight",
    RMSNormWrong.apply,
    RMSNormRight.apply,
    lambda: (rn(4, 6, seed=16), torch.ones(6, dtype=F64, requires_grad=True)),
    "projection term without the weight: right while weight is at its initial ones",
    "https://github.com/karpathy/llm.c/pull/763",
)


class LayerNormRight(Function):
    @staticmethod
    def forward(ctx, x, w, b):
        _chk(x, w, b)
        _need(w.shape == b.shape == x.shape[-1:], "w, b (C,)")
        ctx.save_for_backward(x, w)
        d = x - x.mean(-1, keepdim=True)
        return d * torch.rsqrt(d.square().mean(-1, keepdim=True) + EPS) * w + b

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        d = x - x.mean(-1, keepdim=True)
        r = torch.rsqrt(d.square().mean(-1, keepdim=True) + EPS)
        xh, gw = d * r, g * w
        dx = r * (gw - gw.mean(-1, keepdim=True) - xh * (gw * xh).mean(-1, keepdim=True))
        return dx, (g * xh).sum_to_size(w.shape), g.sum_to_size(w.shape)


class LayerNormWrong(LayerNormRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        # the kernel gets dy's pointer and the forward's (dense) row stride
        return LayerNormRight.backward(ctx, _kernel_read(g, g.numel()).reshape(g.shape))


add(
    "layernorm_dy_layout",
    LayerNormWrong.apply,
    LayerNormRight.apply,
    lambda: (rn(4, 5, seed=17), rn(5, seed=18), rn(5, seed=19)),
    "grad_output read as if it were contiguous",
    "https://github.com/flagos-ai/FlagGems/pull/1084",
)


class AddRMSRight(Function):
    """s = x + residual; returns (rmsnorm(s) * w, s)."""

    @staticmethod
    def forward(ctx, x, res, w):
        _chk(x, res, w)
        _need(x.shape == res.shape and w.shape == x.shape[-1:], "shapes")
        s = x + res
        ctx.save_for_backward(x, res, w)
        return s * torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS) * w, s

    @staticmethod
    def backward(ctx, g, gs):
        x, res, w = ctx.saved_tensors
        s = x + res
        r = torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS)
        xh, gw = s * r, g * w
        ds = r * (gw - xh * (gw * xh).mean(-1, keepdim=True)) + gs
        return ds, ds, (g * xh).sum_to_size(w.shape)


class AddRMSWrong(AddRMSRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g, gs):
        x, res, w = ctx.saved_tensors
        s = x + res
        r = torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS)
        xh = s * r
        dy = g.contiguous()
        gw = dy * w
        dy.copy_(r * (gw - xh * (gw * xh).mean(-1, keepdim=True)))  # dX takes dY's buffer
        dw = (dy * xh).sum_to_size(w.shape)  # ... and dW is then taken from it
        ds = dy + gs
        return ds, ds, dw


add(
    "fused_add_rmsnorm",
    AddRMSWrong.apply,
    AddRMSRight.apply,
    lambda: (rn(3, 4, seed=20), rn(3, 4, seed=21), rn(4, seed=22)),
    "dX overwrites the dY buffer, dW is computed from it afterwards",
    "https://github.com/unslothai/unsloth/pull/4550",
)


LOW = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _up(t):
    return t if t.dtype == F64 else t.float()


class RMSLowRight(Function):
    """RMSNorm which also takes fp16/bf16 (computes in fp32)."""

    @staticmethod
    def forward(ctx, x, w):
        _chk(x, w, dtypes=LOW)
        _need(w.ndim == 1 and x.ndim >= 1 and x.shape[-1] == w.shape[0], "w (C,)")
        ctx.save_for_backward(x, w)
        xf = _up(x)
        return (xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + EPS) * _up(w)).to(x.dtype)

    @staticmethod
    def _parts(ctx, g):
        x, w = ctx.saved_tensors
        xf, gf = _up(x), _up(g)
        r = torch.rsqrt(xf.square().mean(-1, keepdim=True) + EPS)
        xh, gw = xf * r, gf * _up(w)
        dx = r * (gw - xh * (gw * xh).mean(-1, keepdim=True))
        return x, w, gf, xh, dx.to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        _x, w, gf, xh, dx = RMSLowRight._parts(ctx, g)
        return dx, (gf * xh).sum_to_size(w.shape).to(w.dtype)


class RMSLowWrong(RMSLowRight):
    @staticmethod
    def backward(ctx, g):
        x, w, _, xh, dx = RMSLowRight._parts(ctx, g)
        rows = (g * xh.to(x.dtype)).reshape(-1, w.shape[0])
        dw = torch.zeros_like(w)
        for row in rows:  # the block's reduction runs in the input's dtype
            dw = dw + row
        return dx, dw


add(
    "rmsnorm_dw_bf16",
    RMSLowWrong.apply,
    RMSLowRight.apply,
    lambda: (rn(6, 8, seed=23, dtype=torch.float32), rn(8, seed=24, dtype=torch.float32)),
    "dW accumulated in the input's dtype: bf16/fp16 over many rows",
    "https://github.com/linkedin/Liger-Kernel/pull/950",
)


class _BNRight(Function):
    @staticmethod
    def forward(ctx, x, w, b, mean, var, training):
        ctx.training = training
        if training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
        ctx.save_for_backward(x, w, mean.clone(), var.clone())
        return (x - mean) * torch.rsqrt(var + 1e-5) * w + b

    @staticmethod
    def _train(x, w, g):
        d = x - x.mean(0)
        r = torch.rsqrt(d.square().mean(0) + 1e-5)
        xh, gw = d * r, g * w
        return r * (gw - gw.mean(0) - xh * (gw * xh).mean(0)), (g * xh).sum(0)

    @staticmethod
    def backward(ctx, g):
        x, w, mean, var = ctx.saved_tensors
        if ctx.training:
            dx, dw = _BNRight._train(x, w, g)
        else:
            r = torch.rsqrt(var + 1e-5)
            dx, dw = g * w * r, (g * (x - mean) * r).sum(0)
        return dx, dw, g.sum(0), None, None, None


class _BNWrong(_BNRight):
    @staticmethod
    def backward(ctx, g):
        if ctx.training:
            return _BNRight.backward(ctx, g)
        x, w, mean, var = ctx.saved_tensors
        r = torch.rsqrt(var + 1e-5)
        xh, gw = (x - mean) * r, g * w
        # the batch-statistics formula, with the running statistics put in
        dx = r * (gw - gw.mean(0) - xh * (gw * xh).mean(0))
        return dx, (g * xh).sum(0), g.sum(0), None, None, None


class BatchNorm(nn.Module):
    def __init__(self, fn, c=3):
        super().__init__()
        self.fn = fn
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, c, dtype=F64))
        self.bias = nn.Parameter(torch.zeros(c, dtype=F64))
        self.register_buffer("mean", torch.zeros(c, dtype=F64))
        self.register_buffer("var", torch.ones(c, dtype=F64))

    def forward(self, x):
        _chk(x, self.weight)
        _need(x.ndim == 2 and x.shape[1] == self.weight.shape[0], "(N,C)")
        if self.training:
            _need(x.shape[0] > 1, "more than one value per channel")
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.1)
                self.var.lerp_(x.var(0), 0.1)
        return self.fn.apply(x, self.weight, self.bias, self.mean, self.var, self.training)


add(
    "batchnorm_eval",
    BatchNorm(_BNWrong),
    BatchNorm(_BNRight),
    lambda: (rn(5, 3, seed=25),),
    "batch-statistics backward also in eval mode (module is handed over in train mode)",
)


# --------------------------------------------------------------------------
# losses
# --------------------------------------------------------------------------
class CERight(Function):
    """Mean cross entropy of logits (N,V), targets (N,)."""

    @staticmethod
    def forward(ctx, x, t):
        _chk(x)
        _need(x.ndim == 2 and t.shape == x.shape[:1] and x.shape[0] > 0, "(N,V), (N,)")
        ctx.save_for_backward(x, t)
        return -torch.log_softmax(x, -1).gather(1, t[:, None]).mean()

    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors
        return (torch.softmax(x, -1) - F.one_hot(t, x.shape[1])) * (g / x.shape[0]), None


class CEWrong(CERight):
    @staticmethod
    def forward(ctx, x, t):
        _chk(x)
        _need(x.ndim == 2 and t.shape == x.shape[:1] and x.shape[0] > 0, "(N,V), (N,)")
        loss = -torch.log_softmax(x, -1).gather(1, t[:, None]).mean()
        if x.requires_grad:  # the kernel stores the gradient over the logits
            x.data.copy_((torch.softmax(x, -1) - F.one_hot(t, x.shape[1])) / x.shape[0])
        ctx.save_for_backward(x.detach())
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (gx,) = ctx.saved_tensors
        return gx * g, None


add(
    "cross_entropy_inplace",
    CEWrong.apply,
    CERight.apply,
    lambda: (rn(4, 5, seed=26), torch.tensor([1, 0, 4, 2])),
    "forward stores the gradient into the logits (no version bump)",
    "https://github.com/linkedin/Liger-Kernel/issues/272",
)


class FLCERight(Function):
    """Unreduced loss of a linear layer + cross entropy: x (N,H), w (V,H), t (N,)."""

    @staticmethod
    def forward(ctx, x, w, t):
        _chk(x, w)
        _need(
            x.ndim == w.ndim == 2 and x.shape[1] == w.shape[1] and t.shape == x.shape[:1], "shapes"
        )
        ctx.save_for_backward(x, w, t)
        return -torch.log_softmax(x @ w.T, -1).gather(1, t[:, None]).squeeze(1)

    @staticmethod
    def backward(ctx, g):
        x, w, t = ctx.saved_tensors
        ds = (torch.softmax(x @ w.T, -1) - F.one_hot(t, w.shape[0])) * g[:, None]
        return ds @ w, ds.T @ x, None


class FLCEWrong(FLCERight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, t = ctx.saved_tensors
        ds = torch.softmax(x @ w.T, -1) - F.one_hot(t, w.shape[0])  # made in forward, for ones
        s = g.reshape(-1)[0]  # the scaling kernel reads one number
        return ds @ w * s, ds.T @ x * s, None


add(
    "fused_linear_ce_none",
    FLCEWrong.apply,
    FLCERight.apply,
    lambda: (rn(4, 3, seed=27), rn(5, 3, seed=28), torch.tensor([0, 3, 4, 1])),
    "reduction='none': precomputed gradients scaled by grad_output[0] instead of per token",
    "https://github.com/linkedin/Liger-Kernel/issues/968",
)


class FocalRight(Function):
    """Sigmoid focal loss per element; t holds 0/1 (integer or bool)."""

    @staticmethod
    def forward(ctx, x, t, gamma):
        _chk(x)
        _need(x.shape == t.shape and not t.is_floating_point(), "targets")
        _need(gamma >= 0, "gamma")
        ctx.save_for_backward(x, t)
        ctx.gamma = gamma
        z = torch.where(t.bool(), x, -x)
        return torch.exp(gamma * F.logsigmoid(-z)) * -F.logsigmoid(z)

    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors
        gamma = ctx.gamma
        z = torch.where(t.bool(), x, -x)
        mod = torch.exp(gamma * F.logsigmoid(-z))
        dz = -mod * (torch.sigmoid(-z) - gamma * torch.sigmoid(z) * F.logsigmoid(z))
        return g * torch.where(t.bool(), dz, -dz), None, None


class FocalGamma0Wrong(FocalRight):
    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors
        gamma = ctx.gamma
        s = torch.where(t.bool(), 1.0, -1.0).to(x.dtype)
        p = torch.sigmoid(s * x)
        q = 1 - p
        dp = gamma * q ** (gamma - 1) * torch.log(p) - q**gamma / p
        return g * s * dp * p * q, None, None


add(
    "focal_gamma0",
    lambda x, t: FocalGamma0Wrong.apply(x, t, 0.0),
    lambda x, t: FocalRight.apply(x, t, 0.0),
    lambda: (rn(3, 4, seed=29), torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0]])),
    "(1-p)**(gamma-1) with gamma 0: nan once 1-p rounds to 0 (large logits)",
    "https://github.com/facebookresearch/sam3/pull/484",
)


def _ctc_grad(x, targets, in_len, tg_len):
    with torch.enable_grad():
        xx = x.detach().double().requires_grad_()
        loss = F.ctc_loss(
            torch.log_softmax(xx, -1), targets, in_len, tg_len, reduction="none", zero_infinity=True
        )
        (gx,) = torch.autograd.grad(loss.sum(), xx)
    return loss.detach().to(x.dtype), gx.to(x.dtype)


class CTCSumRight(Function):
    """Summed CTC loss of logits (T,B,C); gradient computed in forward."""

    @staticmethod
    def forward(ctx, x, targets):
        _chk(x)
        _need(x.ndim == 3 and targets.ndim == 2 and targets.shape[0] == x.shape[1], "shapes")
        _need(len(x) > 0 and bool(((targets > 0) & (targets < x.shape[2])).all()), "labels 1..C-1")
        t, b = x.shape[:2]
        loss, gx = _ctc_grad(x, targets, torch.full((b,), t), torch.full((b,), targets.shape[1]))
        ctx.save_for_backward(gx)
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (gx,) = ctx.saved_tensors
        return gx * g, None


class CTCSumWrong(CTCSumRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return ctx.saved_tensors[0].clone(), None  # grad_output never used


add(
    "ctc_grad_output",
    CTCSumWrong.apply,
    CTCSumRight.apply,
    lambda: (rn(6, 2, 4, seed=30), torch.tensor([[1, 2], [3, 3]])),
    "grad_output ignored: right only while the loss is the end of the graph, unscaled",
    "https://github.com/pytorch/pytorch/issues/11750",
)


class CTCLenRight(Function):
    """CTC loss per sequence, 0 for sequences with no alignment."""

    @staticmethod
    def forward(ctx, x, targets, in_len):
        _chk(x)
        _need(
            x.ndim == 3 and targets.ndim == 2 and targets.shape[0] == x.shape[1] == in_len.shape[0],
            "shapes",
        )
        _need(bool(((targets > 0) & (targets < x.shape[2])).all()), "labels 1..C-1")
        _need(bool(((in_len >= 1) & (in_len <= len(x))).all()), "lengths")
        loss, gx = _ctc_grad(x, targets, in_len, torch.full((x.shape[1],), targets.shape[1]))
        ctx.save_for_backward(gx, x, in_len, loss)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return ctx.saved_tensors[0] * g[None, :, None], None, None


class CTCLenWrong(CTCLenRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gx, x, in_len, loss = ctx.saved_tensors
        inside = torch.arange(x.shape[0])[:, None] < in_len[None, :]
        bad = (loss == 0)[None, :] & inside  # p - posterior, where the posterior is all zero
        gx = torch.where(bad[..., None], torch.softmax(x, -1), gx)
        return gx * g[None, :, None], None, None


add(
    "ctc_no_alignment",
    CTCLenWrong.apply,
    CTCLenRight.apply,
    lambda: (rn(5, 2, 4, seed=31), torch.tensor([[1, 2, 3], [2, 2, 1]]), torch.tensor([5, 3])),
    "gradient softmax(logits) for sequences without alignment, whose loss is 0",
    "https://github.com/rwth-i6/returnn/issues/1835",
)


class RNNTRight(Function):
    """Transducer loss per utterance: logits (B,T,U+1,V), targets (B,U), blank 0."""

    @staticmethod
    def _lse(a, b, like):
        if a is None or b is None:
            a = b if a is None else a
            return like.new_zeros(()) if a is None else a
        return torch.logaddexp(a, b)

    @staticmethod
    def _run(x, y):
        lp = torch.log_softmax(x.double(), -1)
        n, m = x.shape[0], x.shape[1]
        bl = lp[..., 0]
        em = lp[:, :-1].gather(2, y[None, :, None].expand(n, -1, 1)).squeeze(2)
        al = [[None] * m for _ in range(n)]
        be = [[None] * m for _ in range(n)]
        for t in range(n):
            for u in range(m):
                a = al[t - 1][u] + bl[t - 1, u] if t else None
                b = al[t][u - 1] + em[t, u - 1] if u else None
                al[t][u] = RNNTRight._lse(a, b, lp)
        for t in reversed(range(n)):
            for u in reversed(range(m)):
                a = be[t + 1][u] + bl[t, u] if t < n - 1 else (bl[t, u] if u == m - 1 else None)
                b = be[t][u + 1] + em[t, u] if u < m - 1 else None
                be[t][u] = RNNTRight._lse(a, b, lp)
        al, be = (torch.stack([torch.stack(r) for r in q]) for q in (al, be))
        return lp, bl, em, al, be

    @staticmethod
    def forward(ctx, x, y):
        _chk(x)
        _need(x.ndim == 4 and y.shape == (x.shape[0], x.shape[2] - 1) and x.shape[1] > 0, "shapes")
        _need(bool((y > 0).all()) and bool((y < x.shape[3]).all()), "labels 1..V-1")
        ctx.save_for_backward(x, y)
        out = [-RNNTRight._run(x[i], y[i])[4][0, 0] for i in range(x.shape[0])]
        return torch.stack(out).to(x.dtype)

    @staticmethod
    def _grad(x, y, last_blank):
        lp, bl, em, al, be = RNNTRight._run(x, y)
        _n, m = al.shape
        z = be[0, 0]
        end = torch.full_like(be[:1], float("-inf"))
        if last_blank:
            end[0, m - 1] = 0
        gb = -torch.exp(al + bl + torch.cat((be[1:], end)) - z)
        ge = -torch.exp(al[:, :-1] + em + be[:, 1:] - z)
        glp = torch.zeros_like(lp)
        glp[..., 0] = gb
        if m > 1:
            glp = glp + F.pad(F.one_hot(y, lp.shape[2]) * ge[..., None], (0, 0, 0, 1))
        return (glp - lp.exp() * glp.sum(-1, keepdim=True)).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        gx = [RNNTRight._grad(x[i], y[i], True) * g[i] for i in range(x.shape[0])]
        return torch.stack(gx), None


class RNNTWrong(RNNTRight):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        gx = [RNNTRight._grad(x[i], y[i], False) * g[i] for i in range(x.shape[0])]
        return torch.stack(gx), None


add(
    "rnnt_last_blank",
    RNNTWrong.apply,
    RNNTRight.apply,
    lambda: (rn(2, 3, 3, 3, seed=32), torch.tensor([[1, 2], [2, 2]])),
    "gradient of the final blank transition is missing",
    "https://github.com/HawkAaron/warp-transducer/issues/55",
)


TAU = 0.5


class NTXentRight(Function):
    """Rows 2i and 2i+1 are a positive pair; no normalisation."""

    @staticmethod
    def _s(z):
        s = z @ z.T / TAU
        return s.masked_fill(torch.eye(z.shape[0], dtype=torch.bool), float("-inf"))

    @staticmethod
    def forward(ctx, z):
        _chk(z)
        _need(z.ndim == 2 and z.shape[0] % 2 == 0 and z.shape[0] > 0, "an even number of rows")
        ctx.save_for_backward(z)
        return F.cross_entropy(NTXentRight._s(z), torch.arange(z.shape[0]) ^ 1)

    @staticmethod
    def _ds(z):
        n = z.shape[0]
        return (torch.softmax(NTXentRight._s(z), -1) - F.one_hot(torch.arange(n) ^ 1, n)) / n

    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        ds = NTXentRight._ds(z)
        return g * (ds + ds.T) @ z / TAU


class NTXentWrong(NTXentRight):
    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return g * NTXentRight._ds(z) @ z / TAU  # z as query only, not as key


add(
    "nt_xent_keys",
    NTXentWrong.apply,
    NTXentRight.apply,
    lambda: (rn(6, 3, seed=33),),
    "z is query and key; the key-side term is missing",
)


class GaussKLRight(Function):
    """Row-wise KL(N(mq, e^lq) || N(mp, e^lp))."""

    @staticmethod
    def forward(ctx, mq, lq, mp, lp):
        _chk(mq, lq, mp, lp)
        _need(mq.shape == lq.shape == mp.shape == lp.shape and mq.ndim >= 1, "shapes")
        ctx.save_for_backward(mq, lq, mp, lp)
        t = lq - lp
        near = t * t / 2 * (1 + t / 3 * (1 + t / 4 * (1 + t / 5 * (1 + t / 6))))
        et = torch.where(t.abs() < 0.05, near, torch.expm1(t) - t)  # e^t - 1 - t
        out = 0.5 * (et + (mq - mp).square() * torch.exp(-lp)).sum(-1)
        _need(bool(torch.isfinite(out).all()), "overflow")
        return out

    @staticmethod
    def _parts(ctx, g):
        mq, lq, mp, lp = ctx.saved_tensors
        g = g.unsqueeze(-1)
        d = (mq - mp) * torch.exp(-lp) * g
        return g, mq, mp, lp, d, torch.expm1(lq - lp)

    @staticmethod
    def backward(ctx, g):
        g, mq, mp, _lp, d, e = GaussKLRight._parts(ctx, g)
        return d, 0.5 * g * e, -d, -0.5 * (g * e + (mq - mp) * d)


class GaussKLWrong(GaussKLRight):
    @staticmethod
    def backward(ctx, g):
        g, _mq, _mp, _lp, d, e = GaussKLRight._parts(ctx, g)
        return d, 0.5 * g * e, -d, -0.5 * g * e  # no mean-difference term


add(
    "vae_gauss_kl",
    GaussKLWrong.apply,
    GaussKLRight.apply,
    lambda: (
        rn(3, 4, seed=34),
        rn(3, 4, seed=35, scale=0.5),
        rn(3, 4, seed=36),
        rn(3, 4, seed=37, scale=0.5),
    ),
    "prior's log-variance gradient misses the squared mean difference",
)


# --------------------------------------------------------------------------
# gather / scatter / graphs / point clouds
# --------------------------------------------------------------------------
class EmbedRight(Function):
    @staticmethod
    def forward(ctx, w, idx):
        _chk(w)
        _need(w.ndim == 2 and idx.dtype == torch.long and bool((idx >= 0).all()), "(V,D), indices")
        ctx.save_for_backward(idx)
        ctx.shape = w.shape
        return w[idx]

    @staticmethod
    def backward(ctx, g):
        (idx,) = ctx.saved_tensors
        return g.new_zeros(ctx.shape).index_add(
            0, idx.reshape(-1), g.reshape(-1, ctx.shape[1])
        ), None


class EmbedWrong(EmbedRight):
    @staticmethod
    def backward(ctx, g):
        (idx,) = ctx.saved_tensors
        return g.new_zeros(ctx.shape).index_put((idx,), g), None  # last one wins


add(
    "embedding_repeats",
    EmbedWrong.apply,
    EmbedRight.apply,
    lambda: (rn(5, 3, seed=38, dtype=torch.float32), torch.tensor([[0, 2, 2], [4, 0, 1]])),
    "repeated indices overwrite instead of adding up",
    "https://github.com/pytorch/pytorch/issues/1631",
)


class EdgeSoftmaxRight(Function):
    """Softmax of edge scores (E,) over the edges of each destination node."""

    @staticmethod
    def _p(s, dst, n):
        mx = s.detach().new_full((n,), float("-inf")).scatter_reduce(0, dst, s.detach(), "amax")
        e = torch.exp(s - mx[dst])
        return e / torch.zeros(n, dtype=s.dtype).index_add(0, dst, e)[dst]

    @staticmethod
    def forward(ctx, s, dst, n):
        _chk(s)
        _need(s.ndim == 1 and dst.shape == s.shape, "(E,)")
        ctx.save_for_backward(s, dst)
        ctx.n = n
        return EdgeSoftmaxRight._p(s, dst, n)

    @staticmethod
    def backward(ctx, g):
        s, dst = ctx.saved_tensors
        p = EdgeSoftmaxRight._p(s, dst, ctx.n)
        tot = torch.zeros(ctx.n, dtype=s.dtype).index_add(0, dst, p * g)
        return p * (g - tot[dst]), None, None


class EdgeSoftmaxWrong(EdgeSoftmaxRight):
    @staticmethod
    def backward(ctx, g):
        s, dst = ctx.saved_tensors
        p = EdgeSoftmaxRight._p(s, dst, ctx.n)
        return p * (g - (p * g).sum()), None, None  # sum over all edges of the graph


_DST = torch.tensor([0, 0, 1, 1, 1, 3, 2])
add(
    "gat_edge_softmax",
    lambda s: EdgeSoftmaxWrong.apply(s, _DST, 4),
    lambda s: EdgeSoftmaxRight.apply(s, _DST, 4),
    lambda: (rn(7, seed=39, dtype=torch.float32),),
    "softmax backward sums over all edges instead of each node's",
)


class ChamferRight(Function):
    """mean_i min_j |a_i-b_j|^2 + mean_j min_i |a_i-b_j|^2."""

    @staticmethod
    def forward(ctx, a, b):
        _chk(a, b)
        _need(
            a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and len(a) and len(b), "(N,D), (M,D)"
        )
        d = (a[:, None] - b[None]).square().sum(-1)
        da, ia = d.min(1)
        db, ib = d.min(0)
        ctx.save_for_backward(a, b, ia, ib)
        return da.mean() + db.mean()

    @staticmethod
    def backward(ctx, g):
        a, b, ia, ib = ctx.saved_tensors
        u = 2 * g / len(a) * (a - b[ia])
        v = 2 * g / len(b) * (b - a[ib])
        return u.index_add(0, ib, -v), v.index_add(0, ia, -u)


class ChamferWrong(ChamferRight):
    @staticmethod
    def backward(ctx, g):
        a, b, ia, ib = ctx.saved_tensors
        # each cloud is moved by its own nearest-neighbour term only
        return 2 * g / len(a) * (a - b[ia]), 2 * g / len(b) * (b - a[ib])


add(
    "chamfer_one_sided",
    ChamferWrong.apply,
    ChamferRight.apply,
    lambda: (rn(5, 3, seed=40), rn(4, 3, seed=41)),
    "no gradient to a point that is another's nearest neighbour",
)


class CdistRight(Function):
    @staticmethod
    def forward(ctx, a, b):
        _chk(a, b)
        _need(a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1], "(N,D), (M,D)")
        ctx.save_for_backward(a, b)
        diff, top = CdistRight._diff(a, b)
        return diff.square().sum(-1).sqrt() * top

    @staticmethod
    def _diff(a, b):  # differences scaled to a largest entry of 1, and the scale
        diff = a[:, None] - b[None]
        top = diff.detach().abs().sum(-1)
        return diff / torch.where(top == 0, 1.0, top)[..., None], top

    @staticmethod
    def backward(ctx, g):
        diff, top = CdistRight._diff(*ctx.saved_tensors)
        z = top == 0
        d = torch.where(z, 1.0, diff.square().sum(-1)).sqrt()
        u = torch.where(z, 0.0, g / d)[..., None] * diff
        return u.sum(1), -u.sum(0)


class CdistWrong(CdistRight):
    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        diff = a[:, None] - b[None]
        u = (g / diff.square().sum(-1).sqrt())[..., None] * diff
        return u.sum(1), -u.sum(0)


add(
    "cdist_coincident",
    CdistWrong.apply,
    CdistRight.apply,
    lambda: (rn(4, 3, seed=42), rn(3, 3, seed=43)),
    "0/0 = nan where two points coincide",
)


class SegMaxRight(Function):
    """Maximum of x (E,) per segment (empty: 0); ties share the gradient."""

    @staticmethod
    def forward(ctx, x, seg, n):
        _chk(x)
        _need(x.ndim == 1 and seg.shape == x.shape, "(E,)")
        y = x.new_zeros(n).scatter_reduce(0, seg, x, "amax", include_self=False)
        ctx.save_for_backward(x == y[seg], seg)
        ctx.n = n
        return y

    @staticmethod
    def backward(ctx, g):
        hit, seg = ctx.saved_tensors
        h = hit.to(g.dtype)
        cnt = g.new_zeros(ctx.n).index_add(0, seg, h)
        return h * (g / cnt.clamp(min=1))[seg], None, None


class SegMaxWrong(SegMaxRight):
    @staticmethod
    def backward(ctx, g):
        hit, seg = ctx.saved_tensors
        return hit.to(g.dtype) * g[seg], None, None  # every tied element gets all of it


_SEG = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3])
add(
    "segment_max_ties",
    lambda x: SegMaxWrong.apply(x, _SEG, 4),
    lambda x: SegMaxRight.apply(x, _SEG, 4),
    lambda: (rn(8, seed=44, dtype=torch.float32),),
    "each tied maximum receives the whole gradient",
    "https://github.com/apache/mxnet/issues/18563",
)


class SegProdRight(Function):
    """Product of x (E,) per segment (empty: 1)."""

    @staticmethod
    def forward(ctx, x, seg, n):
        _chk(x)
        _need(x.ndim == 1 and seg.shape == x.shape, "(E,)")
        y = x.new_ones(n).scatter_reduce(0, seg, x, "prod")
        ctx.save_for_backward(x, seg, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, seg, _ = ctx.saved_tensors
        other = (seg[:, None] == seg[None]) & ~torch.eye(len(x), dtype=torch.bool)
        out = g[seg]
        for j in range(len(x)):
            out = out * torch.where(other[:, j], x[j], 1.0)
        return out, None, None


class SegProdWrong(SegProdRight):
    @staticmethod
    def backward(ctx, g):
        x, seg, y = ctx.saved_tensors
        return ((g * y)[seg] / x).masked_fill(x == 0, 0), None, None


add(
    "scatter_prod_zero",
    lambda x: SegProdWrong.apply(x, _SEG, 4),
    lambda x: SegProdRight.apply(x, _SEG, 4),
    lambda: (rn(8, seed=45),),
    "grad*result/input masked at 0: wrong for an element that is 0",
    "https://github.com/pytorch/pytorch/pull/76523",
)


# --------------------------------------------------------------------------
# vision: sampling, pooling, convolution
# --------------------------------------------------------------------------
class BorderSampleRight(Function):
    """Linear samples of feat (C,W) at pixel coordinates (N,), clamped to the border."""

    @staticmethod
    def _idx(u, w):
        c = u.detach().clamp(0, w - 1)
        i0 = c.floor().long().clamp(max=w - 1)
        return c, i0, (i0 + 1).clamp(max=w - 1)

    @staticmethod
    def forward(ctx, feat, u):
        _chk(feat, u)
        _need(feat.ndim == 2 and u.ndim == 1 and feat.shape[1] > 0, "(C,W), (N,)")
        _need(bool(torch.isfinite(u).all()), "finite coordinates")
        ctx.save_for_backward(feat, u)
        c, i0, i1 = BorderSampleRight._idx(u, feat.shape[1])
        f = c - i0
        return feat[:, i0] * (1 - f) + feat[:, i1] * f

    @staticmethod
    def _grads(ctx, g):
        feat, u = ctx.saved_tensors
        w = feat.shape[1]
        _, i0, i1 = BorderSampleRight._idx(u, w)
        inside = (u > 0) & (u < w - 1)
        f = torch.where(inside, u, u.detach().clamp(0, w - 1)) - i0
        df = torch.zeros_like(feat).index_add(1, i0, g * (1 - f)).index_add(1, i1, g * f)
        return df, (g * (feat[:, i1] - feat[:, i0])).sum(0), inside

    @staticmethod
    def backward(ctx, g):
        df, du, inside = BorderSampleRight._grads(ctx, g)
        return df, torch.where(inside, du, 0.0)


class BorderSampleWrong(BorderSampleRight):
    @staticmethod
    def backward(ctx, g):
        df, du, _ = BorderSampleRight._grads(ctx, g)
        return df, du  # coordinates outside the image still get the border cell's slope


add(
    "border_sample",
    BorderSampleWrong.apply,
    BorderSampleRight.apply,
    lambda: (rn(2, 6, seed=46), torch.tensor([0.3, 1.7, 2.2, 4.6], dtype=F64, requires_grad=True)),
    "border padding: no zero gradient for coordinates that were clamped (u < 0)",
)


STEP = 4  # im2col_step


class Conv1dRight(Function):
    """conv1d of x (B,C,L), w (O,C,K), done in chunks of the batch."""

    @staticmethod
    def forward(ctx, x, w):
        _chk(x, w)
        _need(
            x.ndim == w.ndim == 3 and x.shape[1] == w.shape[1] and x.shape[2] >= w.shape[2] > 0,
            "shapes",
        )
        ctx.save_for_backward(x, w)
        return F.conv1d(x, w)

    @staticmethod
    def _dw(x, g, k):
        return torch.einsum("bol,bclk->ock", g, x.unfold(2, k, 1))

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        dw = torch.zeros_like(w)
        for i in range(0, len(x), STEP):
            dw = dw + Conv1dRight._dw(x[i : i + STEP], g[i : i + STEP], w.shape[2])
        return F.conv_transpose1d(g, w), dw


class Conv1dWrong(Conv1dRight):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        dw = torch.zeros_like(w)
        for i in range(0, len(x), STEP):  # the gemm has beta=0: each chunk overwrites
            dw = Conv1dRight._dw(x[i : i + STEP], g[i : i + STEP], w.shape[2])
        return F.conv_transpose1d(g, w), dw


add(
    "conv_batch_chunks",
    Conv1dWrong.apply,
    Conv1dRight.apply,
    lambda: (rn(2, 2, 6, seed=47), rn(3, 2, 3, seed=48)),
    "weight gradient of the last batch chunk only: wrong for batch > 4 (im2col_step)",
    "https://github.com/Zardinality/TF_Deformable_Net/pull/8",
)


class AvgPoolRight(Function):
    """Average pooling, kernel = stride = 3, ceil mode; a partial window averages what it has."""

    @staticmethod
    def _cnt(n, dtype):
        m = -(-n // 3)
        return torch.tensor([min(3, n - 3 * i) for i in range(m)], dtype=dtype)

    @staticmethod
    def forward(ctx, x):
        _chk(x)
        _need(x.ndim >= 1 and x.shape[-1] > 0, "(..., L)")
        n = ctx.n = x.shape[-1]
        cnt = AvgPoolRight._cnt(n, x.dtype)
        xp = F.pad(x, (0, 3 * len(cnt) - n))
        return xp.reshape(*x.shape[:-1], len(cnt), 3).sum(-1) / cnt

    @staticmethod
    def backward(ctx, g):
        return (g / AvgPoolRight._cnt(ctx.n, g.dtype)).repeat_interleave(3, -1)[..., : ctx.n]


class AvgPoolWrong(AvgPoolRight):
    @staticmethod
    def backward(ctx, g):
        return (g / 3).repeat_interleave(3, -1)[..., : ctx.n]


add(
    "avgpool_ceil",
    AvgPoolWrong.apply,
    AvgPoolRight.apply,
    lambda: (rn(2, 6, seed=49),),
    "partial last window: backward divides by 3, not by its count (L % 3 != 0)",
)


class UpsampleRight(Function):
    """Linear upsampling of x (..., L) to m points, align_corners=True."""

    @staticmethod
    def _mat(n, m, corners, dtype):
        i = torch.arange(m, dtype=F64)
        u = i * (n - 1) / max(m - 1, 1) if corners else ((i + 0.5) * n / m - 0.5).clamp(0, n - 1)
        i0 = u.floor().long().clamp(0, n - 1)
        i1 = (i0 + 1).clamp(max=n - 1)
        f = u - i0
        mat = torch.zeros(m, n, dtype=F64)
        mat[torch.arange(m), i0] += 1 - f
        mat[torch.arange(m), i1] += f
        return mat.to(dtype)

    @staticmethod
    def forward(ctx, x, m):
        _chk(x)
        _need(x.ndim >= 1 and x.shape[-1] > 0 and m > 0, "(..., L)")
        ctx.n, ctx.m = x.shape[-1], m
        return x @ UpsampleRight._mat(ctx.n, m, True, x.dtype).T

    @staticmethod
    def backward(ctx, g):
        return g @ UpsampleRight._mat(ctx.n, ctx.m, True, g.dtype), None


class UpsampleWrong(UpsampleRight):
    @staticmethod
    def backward(ctx, g):
        return g @ UpsampleRight._mat(ctx.n, ctx.m, False, g.dtype), None


add(
    "upsample_align_corners",
    lambda x: UpsampleWrong.apply(x, 7),
    lambda x: UpsampleRight.apply(x, 7),
    lambda: (rn(2, 4, seed=50, dtype=torch.float32),),
    "backward spreads with the align_corners=False weights",
)


# --------------------------------------------------------------------------
# scans and recurrent cells
# --------------------------------------------------------------------------
BLOCK = 8


class CumsumRight(Function):
    """Cumulative sum along the last dimension; backward works in blocks of 8."""

    @staticmethod
    def forward(ctx, x):
        _chk(x)
        _need(x.ndim >= 1 and x.numel() > 0, "(..., L)")
        return x.cumsum(-1)

    @staticmethod
    def _blocks(g):
        n = g.shape[-1]
        m = -(-n // BLOCK)
        gp = F.pad(g, (0, m * BLOCK - n)).reshape(*g.shape[:-1], m, BLOCK)
        local = gp.flip(-1).cumsum(-1).flip(-1)
        return n, local, local[..., :1].squeeze(-1)  # block sums

    @staticmethod
    def _join(g, n, local, carry):
        return (local + carry[..., None]).reshape(*g.shape[:-1], -1)[..., :n]

    @staticmethod
    def backward(ctx, g):
        n, local, tot = CumsumRight._blocks(g)
        return CumsumRight._join(g, n, local, tot.flip(-1).cumsum(-1).flip(-1) - tot)


class CumsumWrong(CumsumRight):
    @staticmethod
    def backward(ctx, g):
        n, local, tot = CumsumRight._blocks(g)
        carry = F.pad(tot, (0, 1))[..., 1:]  # the next block's sum, not all later ones'
        return CumsumRight._join(g, n, local, carry)


add(
    "chunked_cumsum",
    CumsumWrong.apply,
    CumsumRight.apply,
    lambda: (rn(2, 10, seed=51, dtype=torch.float32),),
    "carry from the next block only: wrong for three or more blocks (L > 16)",
)


CHUNK = 4


class ScanRight(Function):
    """h_t = exp(-d_t e^logA) h_{t-1} + d_t x_t, d = softplus(dt); all (L,D), logA (D,)."""

    @staticmethod
    def _terms(x, dt, log_a):
        d = torch.logaddexp(dt, torch.zeros_like(dt))
        return d, torch.exp(-d * torch.exp(log_a))

    @staticmethod
    def _states(x, d, a):
        h, hs = torch.zeros_like(x[0]), []
        for t in range(len(x)):
            h = a[t] * h + d[t] * x[t]
            hs.append(h)
        return hs

    @staticmethod
    def forward(ctx, x, dt, log_a):
        _chk(x, dt, log_a)
        _need(
            x.ndim == 2 and x.shape == dt.shape and log_a.shape == x.shape[1:] and len(x), "shapes"
        )
        _need(bool((log_a.abs() < 30).all()), "logA out of range")
        ctx.save_for_backward(x, dt, log_a)
        return torch.stack(ScanRight._states(x, *ScanRight._terms(x, dt, log_a)))

    @staticmethod
    def _bwd(ctx, g, boundary):
        x, dt, log_a = ctx.saved_tensors
        d, a = ScanRight._terms(x, dt, log_a)
        hs = ScanRight._states(x, d, a)
        n = len(x)
        dh, ghs = torch.zeros_like(x[0]), [None] * n
        for t in reversed(range(n)):
            decay = a[t + 1] if t + 1 < n else 0
            if boundary and t + 1 < n and (t + 1) % CHUNK == 0:
                decay = 1  # the next chunk's first decay is not loaded: left at one
            dh = g[t] + decay * dh
            ghs[t] = dh
        gh = torch.stack(ghs)
        da = gh * torch.stack([torch.zeros_like(hs[0]), *hs[:-1]]) * a
        e = torch.exp(log_a)
        gd = gh * x - da * e
        return gh * d, gd * torch.sigmoid(dt), -(da * d).sum(0) * e

    @staticmethod
    def backward(ctx, g):
        return ScanRight._bwd(ctx, g, False)


class ScanWrong(ScanRight):
    @staticmethod
    def backward(ctx, g):
        return ScanRight._bwd(ctx, g, True)


add(
    "selective_scan_chunks",
    ScanWrong.apply,
    ScanRight.apply,
    lambda: (rn(4, 3, seed=52), rn(4, 3, seed=53), rn(3, seed=54, scale=0.3)),
    "reverse scan: decay taken as 1 across chunk borders (L > 4)",
    "https://github.com/state-spaces/mamba/issues/368",
)


class GatedRight(Function):
    """xz (L,2D) = [x|z]: cumsum(x) * silu(z)."""

    @staticmethod
    def forward(ctx, xz):
        _chk(xz)
        _need(xz.ndim == 2 and xz.shape[1] % 2 == 0, "(L,2D)")
        ctx.save_for_backward(xz)
        x, z = xz.chunk(2, 1)
        return x.cumsum(0) * F.silu(z)

    @staticmethod
    def _parts(ctx, g):
        x, z = ctx.saved_tensors[0].chunk(2, 1)
        s = torch.sigmoid(z)
        dx = (g * z * s).flip(0).cumsum(0).flip(0)
        return dx, g * x.cumsum(0) * s * (1 + z * (1 - s))

    @staticmethod
    def backward(ctx, g):
        return torch.cat(GatedRight._parts(ctx, g), 1)


class GatedWrong(GatedRight):
    @staticmethod
    def backward(ctx, g):
        dx, dz = GatedRight._parts(ctx, g)
        return torch.cat((dx, torch.zeros_like(dz)), 1)  # dz is computed, never written into dxz


add(
    "mamba_dz_lost",
    GatedWrong.apply,
    GatedRight.apply,
    lambda: (rn(4, 6, seed=55),),
    "gate's gradient is computed but not put into the packed gradient",
    "https://github.com/state-spaces/mamba/issues/342",
)


class GRURight(Function):
    """gi (B,3H) and h (B,H), wh (3H,H), bh (3H,): torch's GRU cell after its input product."""

    @staticmethod
    def _gates(gi, h, wh, bh):
        ir, iz, in_ = gi.chunk(3, 1)
        hr, hz, hn = (h @ wh.T + bh).chunk(3, 1)
        r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
        return r, z, torch.tanh(in_ + r * hn), hn

    @staticmethod
    def forward(ctx, gi, h, wh, bh):
        _chk(gi, h, wh, bh)
        m = h.shape[-1]
        _need(
            gi.ndim == h.ndim == 2
            and gi.shape == (h.shape[0], 3 * m)
            and wh.shape == (3 * m, m)
            and bh.shape == (3 * m,),
            "shapes",
        )
        ctx.save_for_backward(gi, h, wh, bh)
        _, z, n, _ = GRURight._gates(gi, h, wh, bh)
        return (1 - z) * n + z * h

    @staticmethod
    def _bwd(ctx, g, reset):
        gi, h, wh, bh = ctx.saved_tensors
        r, z, n, hn = GRURight._gates(gi, h, wh, bh)
        dn = g * (1 - z) * (1 - n * n)
        dz = g * (h - n) * z * (1 - z)
        dr = dn * hn * r * (1 - r)
        dgh = torch.cat((dr, dz, dn * r if reset else dn), 1)
        return torch.cat((dr, dz, dn), 1), g * z + dgh @ wh, dgh.T @ h, dgh.sum(0)

    @staticmethod
    def backward(ctx, g):
        return GRURight._bwd(ctx, g, True)


class GRUWrong(GRURight):
    @staticmethod
    def backward(ctx, g):
        return GRURight._bwd(ctx, g, False)


add(
    "gru_reset_gate",
    GRUWrong.apply,
    GRURight.apply,
    lambda: (rn(2, 6, seed=56), rn(2, 2, seed=57), rn(6, 2, seed=58), rn(6, seed=59)),
    "candidate's hidden-side gradient misses the reset gate",
)


class LSTMRight(Function):
    """Gate pre-activations (B,4H) (i,f,g,o) and c (B,H) -> (h', c')."""

    @staticmethod
    def _parts(gates, c):
        i, f, u, o = gates.chunk(4, 1)
        i, f, u, o = i.sigmoid(), f.sigmoid(), u.tanh(), o.sigmoid()
        return i, f, u, o, f * c + i * u

    @staticmethod
    def _dtanh(x):
        return 4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x)

    @staticmethod
    def forward(ctx, gates, c):
        _chk(gates, c)
        _need(c.ndim == 2 and gates.shape == (c.shape[0], 4 * c.shape[1]), "shapes")
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gates, c)
        *_, o, c2 = LSTMRight._parts(gates, c)
        return o * c2.tanh(), c2

    @staticmethod
    def backward(ctx, gh, gc):
        if gh is None and gc is None:
            return None, None
        gates, c = ctx.saved_tensors
        gh = torch.zeros_like(c) if gh is None else gh
        gc = torch.zeros_like(c) if gc is None else gc
        i, f, u, o, c2 = LSTMRight._parts(gates, c)
        ni, nf, _, no = torch.sigmoid(-gates).chunk(4, 1)  # 1 - gate, also when saturated
        dc = gc + gh * o * LSTMRight._dtanh(c2)
        return torch.cat(
            (
                dc * u * i * ni,
                dc * c * f * nf,
                dc * i * LSTMRight._dtanh(gates.chunk(4, 1)[2]),
                gh * c2.tanh() * o * no,
            ),
            1,
        ), dc * f


class LSTMWrong(LSTMRight):
    @staticmethod
    def backward(ctx, gh, gc):
        if gh is None or gc is None:  # "not needed"
            return None, None
        return LSTMRight.backward(ctx, gh, gc)


add(
    "lstm_undefined_grad",
    LSTMWrong.apply,
    LSTMRight.apply,
    lambda: (rn(2, 8, seed=60), rn(2, 2, seed=61)),
    "no gradient at all unless both outputs are used (undefined gradients not materialised)",
)


# --------------------------------------------------------------------------
# Fourier, complex, linear algebra
# --------------------------------------------------------------------------
class FFTConvRight(Function):
    """Circular convolution along the last dimension."""

    @staticmethod
    def forward(ctx, x, k):
        _chk(x, k)
        _need(x.shape == k.shape and x.ndim >= 1 and x.shape[-1] > 0, "one shape")
        ctx.save_for_backward(x, k)
        return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(k), n=x.shape[-1])

    @staticmethod
    def backward(ctx, g):
        x, k = ctx.saved_tensors
        n, gf = x.shape[-1], torch.fft.rfft(g)
        return (
            torch.fft.irfft(gf * torch.fft.rfft(k).conj(), n=n),
            torch.fft.irfft(gf * torch.fft.rfft(x).conj(), n=n),
        )


class FFTConvWrong(FFTConvRight):
    @staticmethod
    def backward(ctx, g):
        x, k = ctx.saved_tensors
        n, gf = x.shape[-1], torch.fft.rfft(g)
        return (
            torch.fft.irfft(gf * torch.fft.rfft(k), n=n),
            torch.fft.irfft(gf * torch.fft.rfft(x), n=n),
        )


add(
    "fft_conv_conj",
    FFTConvWrong.apply,
    FFTConvRight.apply,
    lambda: (rn(2, 7, seed=62), rn(2, 7, seed=63)),
    "missing conjugate: convolves the gradient instead of correlating it",
    "https://github.com/HIPS/autograd/issues/185",
)


class RFFTRight(Function):
    """Real FFT of x (..., n) as a real tensor (..., n//2+1, 2)."""

    @staticmethod
    def forward(ctx, x):
        _chk(x)
        _need(x.ndim >= 1 and x.shape[-1] > 0, "(..., n)")
        ctx.n = x.shape[-1]
        return torch.view_as_real(torch.fft.rfft(x)).clone()

    @staticmethod
    def _bwd(g, n, last):
        w = torch.full((n // 2 + 1, 1), 0.5, dtype=g.dtype)
        w[0] = 1
        if last:
            w[-1] = 1
        return torch.fft.irfft(torch.view_as_complex((g * w).contiguous()), n=n, norm="forward")

    @staticmethod
    def backward(ctx, g):
        return RFFTRight._bwd(g, ctx.n, ctx.n % 2 == 0)


class RFFTWrong(RFFTRight):
    @staticmethod
    def backward(ctx, g):
        return RFFTRight._bwd(g, ctx.n, True)  # the last bin is a Nyquist bin only for even n


add(
    "rfft_odd",
    RFFTWrong.apply,
    RFFTRight.apply,
    lambda: (rn(2, 8, seed=64),),
    "last half-spectrum bin not halved for odd lengths",
    "https://github.com/locuslab/pytorch_fft/issues/38",
)


CPLX = (torch.complex64, torch.complex128, *F32F64)


class ApplyGateRight(Function):
    """A quantum gate on a state: u (n,n) @ psi (n,)."""

    @staticmethod
    def forward(ctx, u, psi):
        _chk(u, psi, dtypes=CPLX)
        _need(u.ndim == 2 and psi.ndim == 1 and u.shape[1] == psi.shape[0], "shapes")
        ctx.save_for_backward(u, psi)
        return u @ psi

    @staticmethod
    def backward(ctx, g):
        u, psi = ctx.saved_tensors
        return torch.outer(g, psi.conj()), u.mH @ g


class ApplyGateWrong(ApplyGateRight):
    @staticmethod
    def backward(ctx, g):
        u, psi = ctx.saved_tensors
        return torch.outer(g, psi.conj()), u.mT @ g  # transposed, not conjugated


def _gate_inputs():
    a = torch.complex(rn(3, 3, seed=65, rg=False), rn(3, 3, seed=66, rg=False))
    p = torch.complex(rn(3, seed=67, rg=False), rn(3, seed=68, rg=False))
    return torch.linalg.qr(a)[0].clone().requires_grad_(), (p / p.norm()).requires_grad_()


add(
    "complex_gate",
    ApplyGateWrong.apply,
    ApplyGateRight.apply,
    _gate_inputs,
    "U^T g for U^H g",
    "https://github.com/EnzymeAD/Enzyme-JAX/issues/2071",
)


class CholRight(Function):
    """Cholesky factor of (A + A^T)/2."""

    @staticmethod
    def forward(ctx, a):
        _chk(a)
        _need(a.ndim >= 2 and a.shape[-1] == a.shape[-2], "square")
        l = torch.linalg.cholesky((a + a.mT) / 2)  # noqa: E741
        ctx.save_for_backward(l)
        return l

    @staticmethod
    def _bwd(l, g, half):  # noqa: E741
        phi = torch.tril(l.mT @ g)
        if half:
            phi = phi - torch.diag_embed(torch.diagonal(phi, dim1=-2, dim2=-1)) / 2
        # L^-T phi L^-1
        s = torch.linalg.solve_triangular(l.mT, phi, upper=True)
        s = torch.linalg.solve_triangular(l, s, upper=False, left=False)
        return (s + s.mT) / 2

    @staticmethod
    def backward(ctx, g):
        return CholRight._bwd(ctx.saved_tensors[0], g, True)


class CholWrong(CholRight):
    @staticmethod
    def backward(ctx, g):
        return CholRight._bwd(ctx.saved_tensors[0], g, False)


def _spd(n, seed):
    a = rn(n, n, seed=seed, rg=False)
    return (a @ a.T + n * torch.eye(n, dtype=F64)).requires_grad_()


add(
    "cholesky_phi",
    CholWrong.apply,
    CholRight.apply,
    lambda: (_spd(4, 69),),
    "diagonal of phi(L^T G) is not halved",
)


class LogdetRight(Function):
    """log|det A|."""

    @staticmethod
    def forward(ctx, a):
        _chk(a)
        _need(a.ndim >= 2 and a.shape[-1] == a.shape[-2], "square")
        ctx.save_for_backward(a)
        out = torch.linalg.slogdet(a)[1]
        _need(bool(torch.isfinite(out).all()), "singular")
        return out

    @staticmethod
    def backward(ctx, g):
        return g[..., None, None] * torch.linalg.inv(ctx.saved_tensors[0]).mT


class LogdetWrong(LogdetRight):
    @staticmethod
    def backward(ctx, g):
        return g[..., None, None] * torch.linalg.inv(ctx.saved_tensors[0])


add(
    "logdet_transpose",
    LogdetWrong.apply,
    LogdetRight.apply,
    lambda: (_spd(4, 70),),
    "inverse not transposed: right for symmetric A only",
)


# --------------------------------------------------------------------------
# optimal transport, implicit layers, structured prediction, flows, routing
# --------------------------------------------------------------------------
class SinkhornRight(Function):
    """<P, C> after 5 log-domain Sinkhorn sweeps, eps 0.5, uniform marginals."""

    EPS, ITERS = 0.5, 5

    @staticmethod
    def _run(c):
        e = SinkhornRight.EPS
        n, m = c.shape
        la, lb = -torch.log(c.new_tensor(n)), -torch.log(c.new_tensor(m))
        v, us, vs = c.new_zeros(m), [], [c.new_zeros(m)]
        for _ in range(SinkhornRight.ITERS):
            u = e * (la - torch.logsumexp((v - c) / e, 1))
            v = e * (lb - torch.logsumexp((u[:, None] - c) / e, 0))
            us.append(u)
            vs.append(v)
        return us, vs, torch.exp((us[-1][:, None] + vs[-1] - c) / e)

    @staticmethod
    def forward(ctx, c):
        _chk(c)
        _need(c.ndim == 2 and c.numel() > 0, "(N,M)")
        ctx.save_for_backward(c)
        return (SinkhornRight._run(c.double())[2] * c).sum().to(c.dtype)

    @staticmethod
    def backward(ctx, g):
        c = ctx.saved_tensors[0]
        dtype, c = c.dtype, c.double()
        e = SinkhornRight.EPS
        us, vs, p = SinkhornRight._run(c)
        d = p * c * g / e
        dc = p * g - d
        du, dv = d.sum(1), d.sum(0)
        for k in reversed(range(SinkhornRight.ITERS)):
            w = torch.softmax((us[k][:, None] - c) / e, 0) * dv
            dc, du = dc + w, du - w.sum(1)
            w = torch.softmax((vs[k] - c) / e, 1) * du[:, None]
            dc, dv = dc + w, -w.sum(0)
            du = torch.zeros_like(du)
        return dc.to(dtype)


class SinkhornWrong(SinkhornRight):
    @staticmethod
    def backward(ctx, g):
        (c,) = ctx.saved_tensors
        return SinkhornRight._run(c.double())[2].to(c.dtype) * g  # as if P did not depend on C


add(
    "sinkhorn_envelope",
    SinkhornWrong.apply,
    SinkhornRight.apply,
    lambda: (rn(4, 3, seed=71),),
    "gradient P only: the plan's own dependence on the cost is left out",
)


class DEQRight(Function):
    """z with z = tanh(W z + x)."""

    @staticmethod
    def forward(ctx, x, w):
        _chk(x, w)
        _need(x.ndim == 1 and w.shape == (len(x), len(x)) and len(x), "x (n,), w (n,n)")
        z, tol = torch.zeros_like(x), 1e-14 if x.dtype == F64 else 5e-7
        for _ in range(1000):
            z0, z = z, torch.tanh(w @ z + x)
            if (z - z0).abs().max() <= tol:
                break
        else:
            raise RuntimeError("fixed-point iteration does not converge")
        if torch.linalg.eigvals((1 - z * z)[:, None] * w).abs().max() > 0.999:
            raise RuntimeError("fixed point is not stable")
        ctx.save_for_backward(w, z)
        return z

    @staticmethod
    def _bwd(ctx, g, transpose):
        w, z = ctx.saved_tensors
        d = 1 - z * z
        m = torch.eye(len(z), dtype=z.dtype) - d[:, None] * w
        v = torch.linalg.solve(m.mT if transpose else m, g) * d
        return v, torch.outer(v, z)

    @staticmethod
    def backward(ctx, g):
        return DEQRight._bwd(ctx, g, True)


class DEQWrong(DEQRight):
    @staticmethod
    def backward(ctx, g):
        return DEQRight._bwd(ctx, g, False)


add(
    "deq_transpose",
    DEQWrong.apply,
    DEQRight.apply,
    lambda: (rn(4, seed=72), rn(4, 4, seed=73, scale=0.3)),
    "implicit solve with I - J instead of its transpose",
)


class Wass1Right(Function):
    """Squared 1-D Wasserstein distance of two samples (n,)."""

    @staticmethod
    def forward(ctx, a, b):
        _chk(a, b)
        _need(a.ndim == 1 and a.shape == b.shape and len(a), "(n,), (n,)")
        ctx.save_for_backward(a, b)
        return (a.sort(stable=True)[0] - b.sort(stable=True)[0]).square().mean()

    @staticmethod
    def _parts(ctx, g):
        a, b = ctx.saved_tensors
        (sa, ia), (sb, ib) = a.sort(stable=True), b.sort(stable=True)
        return ia, ib, 2 * g / len(a) * (sa - sb)

    @staticmethod
    def backward(ctx, g):
        ia, ib, d = Wass1Right._parts(ctx, g)
        z = torch.zeros_like(d)
        return z.scatter(0, ia, d), z.scatter(0, ib, -d)


class Wass1Wrong(Wass1Right):
    @staticmethod
    def backward(ctx, g):
        ia, ib, d = Wass1Right._parts(ctx, g)
        return d[ia], -d[ib]  # the permutation, not its inverse


add(
    "sort_permutation",
    Wass1Wrong.apply,
    Wass1Right.apply,
    lambda: (rn(7, seed=74), rn(7, seed=75)),
    "gradient gathered by the sorting permutation instead of scattered",
)


class CRFRight(Function):
    """Log partition function (B,): emissions (T,B,K), transitions (K,K), lengths (B,) >= 1."""

    @staticmethod
    def _alphas(em, tr, ln):
        al, out = em[0], [em[0]]
        for t in range(1, len(em)):
            nxt = torch.logsumexp(al[:, :, None] + tr + em[t][:, None, :], 1)
            al = torch.where((t < ln)[:, None], nxt, al)
            out.append(al)
        return out

    @staticmethod
    def forward(ctx, em, tr, ln):
        _chk(em, tr)
        _need(
            em.ndim == 3
            and tr.shape == (em.shape[2],) * 2
            and ln.shape == em.shape[1:2]
            and len(em),
            "shapes",
        )
        _need(bool((ln >= 1).all()) and bool((ln <= len(em)).all()), "lengths")
        ctx.save_for_backward(em, tr, ln)
        return torch.logsumexp(CRFRight._alphas(em, tr, ln)[-1], 1)

    @staticmethod
    def _bwd(ctx, g, masked):
        em, tr, ln = ctx.saved_tensors
        als = CRFRight._alphas(em, tr, ln)
        da = g[:, None] * torch.softmax(als[-1], 1)
        dem, dtr = [None] * len(em), torch.zeros_like(tr)
        for t in reversed(range(1, len(em))):
            on = (t < ln)[:, None]
            w = torch.softmax(als[t - 1][:, :, None] + tr + em[t][:, None, :], 1) * da[:, None, :]
            wm = torch.where(on[..., None], w, 0.0)
            dtr = dtr + (wm if masked else w).sum(0)
            dem[t] = torch.where(on, da, 0.0)
            da = torch.where(on, w.sum(2), da)
        dem[0] = da
        return torch.stack(dem), dtr, None

    @staticmethod
    def backward(ctx, g):
        return CRFRight._bwd(ctx, g, True)


class CRFWrong(CRFRight):
    @staticmethod
    def backward(ctx, g):
        return CRFRight._bwd(ctx, g, False)


add(
    "crf_padding",
    CRFWrong.apply,
    CRFRight.apply,
    lambda: (rn(4, 2, 3, seed=76), rn(3, 3, seed=77), torch.tensor([4, 2])),
    "padded steps still add to the transition gradient",
)


class PlanarRight(Function):
    """Planar flow of z (B,D) with u, w (D,) and b (): (f(z), log|det|)."""

    @staticmethod
    def forward(ctx, z, u, w, b):
        _chk(z, u, w, b)
        _need(z.ndim == 2 and u.shape == w.shape == z.shape[1:] and b.ndim == 0, "shapes")
        ctx.save_for_backward(z, u, w, b)
        h = torch.tanh(z @ w + b)
        t = (u @ w) * (1 - h * h)
        return z + h[:, None] * u, torch.where(
            t.abs() < 0.5, torch.log1p(t), torch.log((1 + t).abs())
        )

    @staticmethod
    def backward(ctx, gf, gl):
        z, u, w, b = ctx.saved_tensors
        h = torch.tanh(z @ w + b)
        hp, uw = 1 - h * h, u @ w
        k = gl / (1 + uw * hp)
        da = (gf @ u) * hp - 2 * k * uw * h * hp
        duw = (k * hp).sum()
        return (gf + da[:, None] * w, h @ gf + duw * w, da @ z + duw * u, da.sum())


class PlanarWrong(PlanarRight):
    @staticmethod
    def forward(ctx, z, u, w, b):
        f, logdet = PlanarRight.forward(ctx, z, u, w, b)
        ctx.mark_non_differentiable(logdet)  # "only a statistic"
        return f, logdet


add(
    "flow_logdet_nondiff",
    PlanarWrong.apply,
    PlanarRight.apply,
    lambda: (rn(3, 2, seed=78), rn(2, seed=79), rn(2, seed=80), rn(seed=81)),
    "log-determinant output marked non-differentiable: its part of the loss has no gradient",
)


class TopKRight(Function):
    """MoE combine: softmax over the top-2 logits (N,E), mixing expert outputs (N,E,D)."""

    @staticmethod
    def _sel(s, y):
        v, i = s.topk(2, 1)
        return torch.softmax(v, 1), i, y.gather(1, i[..., None].expand(-1, -1, y.shape[2]))

    @staticmethod
    def forward(ctx, s, y):
        _chk(s, y)
        _need(s.ndim == 2 and y.ndim == 3 and y.shape[:2] == s.shape and s.shape[1] >= 2, "shapes")
        ctx.save_for_backward(s, y)
        gates, _, ys = TopKRight._sel(s, y)
        return (gates[..., None] * ys).sum(1)

    @staticmethod
    def _bwd(ctx, g, renorm):
        s, y = ctx.saved_tensors
        gates, i, ys = TopKRight._sel(s, y)
        dg = (g[:, None] * ys).sum(-1)
        if renorm:  # dg - sum(gates * dg), for two gates
            dg = gates.flip(1) * (dg - dg.flip(1))
        dy = torch.zeros_like(y).scatter(
            1, i[..., None].expand_as(ys), gates[..., None] * g[:, None]
        )
        return torch.zeros_like(s).scatter(1, i, gates * dg), dy

    @staticmethod
    def backward(ctx, g):
        return TopKRight._bwd(ctx, g, True)


class TopKWrong(TopKRight):
    @staticmethod
    def backward(ctx, g):
        return TopKRight._bwd(ctx, g, False)


add(
    "moe_topk_renorm",
    TopKWrong.apply,
    TopKRight.apply,
    lambda: (rn(3, 4, seed=82), rn(3, 4, 2, seed=83)),
    "normaliser of the top-k gates taken as a constant",
)


class CapacityRight(Function):
    """Top-1 routing of tokens x (N,D) by logits (N,E): gate * x, 0 past an expert's capacity of 4."""

    CAP = 4

    @staticmethod
    def _route(s):
        i = s.detach().argmax(1)
        one = F.one_hot(i, s.shape[1])
        keep = (one.cumsum(0) * one).sum(1) <= CapacityRight.CAP
        return one.to(s.dtype), keep[:, None].to(s.dtype)

    @staticmethod
    def forward(ctx, s, x):
        _chk(s, x)
        _need(s.ndim == x.ndim == 2 and len(s) == len(x) and s.shape[1] > 0, "shapes")
        ctx.save_for_backward(s, x)
        one, keep = CapacityRight._route(s)
        return keep * (torch.softmax(s, 1) * one).sum(1, keepdim=True) * x

    @staticmethod
    def _bwd(ctx, g, drop):
        s, x = ctx.saved_tensors
        one, keep = CapacityRight._route(s)
        if drop:
            g = g * keep
        p = torch.softmax(s, 1)
        gate = (p * one).sum(1, keepdim=True)
        others = p * (1 - one)
        jac = one * others.sum(1, keepdim=True) - others  # one - p
        return (g * x).sum(1, keepdim=True) * gate * jac, gate * g

    @staticmethod
    def backward(ctx, g):
        return CapacityRight._bwd(ctx, g, True)


class CapacityWrong(CapacityRight):
    @staticmethod
    def backward(ctx, g):
        return CapacityRight._bwd(ctx, g, False)


add(
    "moe_capacity",
    CapacityWrong.apply,
    CapacityRight.apply,
    lambda: (rn(4, 3, seed=84), rn(4, 2, seed=85)),
    "dropped tokens still get gradients: shows once an expert has more than 4 tokens",
)


# --------------------------------------------------------------------------
# quantisation, rendering, geometry, physics
# --------------------------------------------------------------------------
class DequantRight(Function):
    """(q - zero) * scale per output channel; q integer (O,I), scale, zero (O,)."""

    @staticmethod
    def forward(ctx, scale, zero, q):
        _chk(scale, zero)
        _need(
            q.ndim == 2 and scale.shape == zero.shape == q.shape[:1] and not q.is_floating_point(),
            "shapes",
        )
        ctx.save_for_backward(scale, zero, q)
        return (q - zero[:, None]) * scale[:, None]

    @staticmethod
    def backward(ctx, g):
        scale, zero, q = ctx.saved_tensors
        return (g * (q - zero[:, None])).sum(1), -g.sum(1) * scale, None


class DequantWrong(DequantRight):
    @staticmethod
    def backward(ctx, g):
        scale, zero, q = ctx.saved_tensors
        return (g * (q - zero[:, None])).sum(0), -g.sum(1) * scale, None  # wrong axis


add(
    "dequant_axis",
    DequantWrong.apply,
    DequantRight.apply,
    lambda: (
        torch.tensor([0.1, 0.2, 0.05, 0.3], dtype=F64, requires_grad=True),
        torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=F64, requires_grad=True),
        torch.tensor([[1, -3, 4, 0], [7, 2, -8, 5], [0, 1, 1, -1], [3, -6, 2, 6]]),
    ),
    "scale gradient reduced over the wrong axis of a square weight",
)


class RenderRight(Function):
    """Front-to-back compositing: alpha (R,N), color (R,N,3), background (3,)."""

    @staticmethod
    def _trans(alpha):
        t = torch.cumprod(1 - alpha, 1)
        return torch.cat((torch.ones_like(t[:, :1]), t), 1)

    @staticmethod
    def forward(ctx, alpha, color, bg):
        _chk(alpha, color, bg)
        _need(alpha.ndim == 2 and alpha.shape[1] > 0, "alpha (R,N)")
        _need(color.shape == (*alpha.shape, 3) and bg.shape == (3,), "color (R,N,3), bg (3,)")
        ctx.save_for_backward(alpha, color, bg)
        t = RenderRight._trans(alpha)
        out = ((t[:, :-1] * alpha)[..., None] * color).sum(1) + t[:, -1:] * bg
        _need(bool(torch.isfinite(out).all()), "overflow")
        return out

    @staticmethod
    def backward(ctx, g):
        alpha, color, bg = ctx.saved_tensors
        t = RenderRight._trans(alpha)
        behind, da = bg.expand(len(alpha), 3), [None] * alpha.shape[1]
        for i in reversed(range(alpha.shape[1])):
            da[i] = t[:, i] * ((color[:, i] - behind) * g).sum(1)
            a = alpha[:, i : i + 1]
            behind = a * color[:, i] + (1 - a) * behind
        return torch.stack(da, 1), (t[:, :-1] * alpha)[..., None] * g[:, None], t[:, -1] @ g


class RenderWrong(RenderRight):
    @staticmethod
    def backward(ctx, g):
        alpha, color, bg = ctx.saved_tensors
        t = RenderRight._trans(alpha)
        w = (t[:, :-1] * alpha)[..., None] * color
        out = w.sum(1) + t[:, -1:] * bg
        rest = out[:, None] - w.cumsum(1)  # what lies behind: the background is in it
        da = ((color * t[:, :-1, None] - rest / (1 - alpha)[..., None]) * g[:, None]).sum(-1)
        da = da - t[:, -1:] / (1 - alpha) * (g @ bg)[:, None]  # and here once more
        return da, (t[:, :-1] * alpha)[..., None] * g[:, None], t[:, -1] @ g


def _render_inputs():
    return (
        torch.sigmoid(rn(2, 4, seed=86, rg=False)).requires_grad_(),
        torch.sigmoid(rn(2, 4, 3, seed=87, rg=False)).requires_grad_(),
        torch.zeros(3, dtype=F64, requires_grad=True),
    )


add(
    "render_background",
    RenderWrong.apply,
    RenderRight.apply,
    _render_inputs,
    "background counted twice in d/d alpha: right for a black one",
    "https://github.com/graphdeco-inria/diff-gaussian-rasterization/issues/86",
)


class RodriguesRight(Function):
    """Rotates p (3,) by the axis-angle vector w (3,)."""

    @staticmethod
    def _coef(w, series):
        q = w @ w
        if series and q < 0.01:
            b = 0.5 - q / 24 * (1 - q / 30 * (1 - q / 56))
            return (
                1 - q * b,
                1 - q / 6 * (1 - q / 20 * (1 - q / 42)),
                b,
                -1 / 3 + q / 30 - q * q / 840 + q**3 / 45360,
                -1 / 12 + q / 180 - q * q / 6720 + q**3 / 453600,
            )
        t = q.sqrt()
        c, a = t.cos(), t.sin() / t
        b = 2 * (t / 2).sin() ** 2 / q
        return c, a, b, (c - a) / q, (a - 2 * b) / q

    @staticmethod
    def _rotate(w, p, series):
        c, a, b, _, _ = RodriguesRight._coef(w, series)
        return c * p + a * torch.linalg.cross(w, p) + b * w * (w @ p)

    @staticmethod
    def forward(ctx, w, p):
        _chk(w, p)
        _need(w.shape == p.shape == (3,) and bool((w.abs() < 1e6).all()), "(3,), angle")
        ctx.save_for_backward(w, p)
        return RodriguesRight._rotate(w.double(), p.double(), True).to(w.dtype)

    @staticmethod
    def _bwd(ctx, g, series):
        w, p = ctx.saved_tensors
        dt = w.dtype
        w, p, g = w.double(), p.double(), g.double()
        c, a, b, a1, b1 = RodriguesRight._coef(w, series)
        wp, wg = w @ p, w @ g
        dw = (
            -a * (p @ g) * w
            + a1 * (torch.linalg.cross(w, p) @ g) * w
            + a * torch.linalg.cross(p, g)
            + b1 * wp * wg * w
            + b * (wp * g + wg * p)
        )
        dp = c * g - a * torch.linalg.cross(w, g) + b * w * wg
        return dw.to(dt), dp.to(dt)

    @staticmethod
    def backward(ctx, g):
        return RodriguesRight._bwd(ctx, g, True)


class RodriguesWrong(RodriguesRight):
    @staticmethod
    def backward(ctx, g):
        return RodriguesRight._bwd(ctx, g, False)


add(
    "axis_angle_zero",
    RodriguesWrong.apply,
    RodriguesRight.apply,
    lambda: (rn(3, seed=88), rn(3, seed=89)),
    "no series near angle 0 in backward: nan for a zero rotation vector",
)


class LJRight(Function):
    """Lennard-Jones energy of positions (N,3)."""

    @staticmethod
    def _pairs(x):
        i, j = torch.triu_indices(len(x), len(x), 1)
        d = x[i] - x[j]
        return i, j, d, d.square().sum(1)

    @staticmethod
    def forward(ctx, x):
        _chk(x)
        _need(x.ndim == 2 and x.shape[1] == 3, "(N,3)")
        ctx.save_for_backward(x)
        r2 = LJRight._pairs(x)[3]
        _need(bool((r2 > 1e-4).all()), "particles closer than 0.01")
        s = r2**-3
        return (4 * s * (s - 1)).sum()

    @staticmethod
    def _force(ctx, g):
        (x,) = ctx.saved_tensors
        i, j, d, r2 = LJRight._pairs(x)
        s = r2**-3
        return x, i, j, (-24 * g * s * (2 * s - 1) / r2)[:, None] * d

    @staticmethod
    def backward(ctx, g):
        x, i, j, f = LJRight._force(ctx, g)
        return torch.zeros_like(x).index_add(0, i, f).index_add(0, j, -f)


class LJWrong(LJRight):
    @staticmethod
    def backward(ctx, g):
        x, i, _, f = LJRight._force(ctx, g)
        return torch.zeros_like(x).index_add(0, i, f)  # the partner's reaction is forgotten


def _lj_inputs():
    grid = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], dtype=F64) * 1.2
    return ((grid + rn(5, 3, seed=90, scale=0.05, rg=False)).requires_grad_(),)


add(
    "lennard_jones_reaction",
    LJWrong.apply,
    LJRight.apply,
    _lj_inputs,
    "pair forces are added to the first particle only",
)


# --------------------------------------------------------------------------
# second order, precision, state, requires_grad patterns, functorch, sizes
# --------------------------------------------------------------------------
class ProdRight(Function):
    """Product over the last dimension."""

    @staticmethod
    def forward(ctx, x):
        _chk(x)
        _need(x.ndim >= 1, "(..., n)")
        ctx.save_for_backward(x)
        y = x.prod(-1)
        _need(bool(torch.isfinite(y).all()), "overflow")
        return y

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        out = g[..., None].expand_as(x)
        eye = torch.eye(x.shape[-1], dtype=torch.bool)
        for j in range(x.shape[-1]):
            out = out * torch.where(eye[j], 1.0, x[..., j : j + 1])
        return out


class ProdWrong(ProdRight):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        zero = x == 0
        n = zero.sum(-1, keepdim=True)
        xs = torch.where(zero, 1.0, x)
        full = xs.prod(-1, keepdim=True)
        ok = (n == 0) | (zero & (n == 1))  # right at first order, constant at zeros
        return g[..., None] * torch.where(ok, full / xs, 0.0)


add(
    "prod_second_order",
    ProdWrong.apply,
    ProdRight.apply,
    lambda: (rn(2, 4, seed=91),),
    "second derivative lost where elements are zero",
    "https://github.com/pytorch/pytorch/issues/106789",
)


class SiluRight(Function):
    @staticmethod
    def forward(ctx, x):
        _chk(x)
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * s * (1 + x * (1 - s))


class SiluWrong(SiluRight):
    @staticmethod
    def forward(ctx, x):
        _chk(x)
        s = torch.sigmoid(x)
        ctx.save_for_backward(x, s)  # an intermediate: a constant to double backward
        return x * s

    @staticmethod
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        return g * s * (1 + x * (1 - s))


add(
    "silu_second_order",
    SiluWrong.apply,
    SiluRight.apply,
    lambda: (rn(6, seed=92),),
    "saved intermediate is detached: second derivative misses its part",
    "https://github.com/pytorch/pytorch/issues/76185",
)


class SwigluRight(Function):
    @staticmethod
    def forward(ctx, a, b):
        _chk(a, b)
        _need(a.shape == b.shape, "one shape")
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def _bwd(a, b, g):
        s = torch.sigmoid(a)
        return g * b * s * (1 + a * (1 - s)), g * a * s

    @staticmethod
    def backward(ctx, g):
        return SwigluRight._bwd(*ctx.saved_tensors, g)


class SwigluWrong(SwigluRight):
    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        da, db = SwigluRight._bwd(a.float(), b.float(), g.float())  # float32 hard-coded
        return da.to(a.dtype), db.to(b.dtype)


add(
    "swiglu_float32",
    SwigluWrong.apply,
    SwigluRight.apply,
    lambda: (rn(3, 4, seed=93), rn(3, 4, seed=94)),
    "backward always computes in float32: about 1e-7 relative error in float64",
)


class QuickGeluRight(Function):
    @staticmethod
    def forward(ctx, x):
        _chk(x)
        ctx.save_for_backward(x)
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def _d(x):
        s = torch.sigmoid(1.702 * x)
        return s * (1 + 1.702 * x * (1 - s))

    @staticmethod
    def backward(ctx, g):
        return g * QuickGeluRight._d(ctx.saved_tensors[0])


class QuickGeluWrong(QuickGeluRight):
    _last = {}  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        _chk(x)
        QuickGeluWrong._last[tuple(x.shape)] = x  # kept on the class, one per shape
        ctx.shape = tuple(x.shape)
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def backward(ctx, g):
        return g * QuickGeluRight._d(QuickGeluWrong._last[ctx.shape])


add(
    "class_level_cache",
    QuickGeluWrong.apply,
    QuickGeluRight.apply,
    lambda: (rn(2, 5, seed=95),),
    "input kept on the class: backward uses the latest call's input",
)


class LinearRight(Function):
    """x (N,I) w (O,I) b (O,): x w^T + b."""

    @staticmethod
    def forward(ctx, x, w, b):
        _chk(x, w, b)
        _need(
            x.ndim == w.ndim == 2 and x.shape[1] == w.shape[1] and b.shape == w.shape[:1], "shapes"
        )
        ctx.save_for_backward(x, w)
        return x @ w.T + b

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        need = ctx.needs_input_grad
        return (
            g @ w if need[0] else None,
            g.T @ x if need[1] else None,
            g.sum(0) if need[2] else None,
        )


class LinearWrong(LinearRight):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        need = ctx.needs_input_grad
        dx = dw = None
        if need[0]:
            dx = g @ w
            dw = g.T @ x  # inside the wrong branch
        return dx, dw, g.sum(0) if need[2] else None


add(
    "needs_input_grad",
    LinearWrong.apply,
    LinearRight.apply,
    lambda: (rn(3, 4, seed=96), rn(2, 4, seed=97), rn(2, seed=98)),
    "weight gets no gradient when x needs none (first layer, frozen trunk)",
)


class BallRight(Function):
    """x / (1 + |x|^2) over the last dimension, with a vmap rule."""

    @staticmethod
    def forward(x):
        _chk(x)
        _need(x.ndim >= 1, "(..., D)")
        return x / (1 + x.square().sum(-1, keepdim=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        k = 1 / (1 + x.square().sum(-1, keepdim=True))
        return k * (g - 2 * (k * x * g).sum(-1, keepdim=True) * x)

    @staticmethod
    def vmap(info, in_dims, x):
        return BallRight.apply(x.movedim(in_dims[0], 0)), 0


class BallWrong(BallRight):
    @staticmethod
    def vmap(info, in_dims, x):
        return BallWrong.apply(x), in_dims[0]  # the batch may well be the last dimension


add(
    "vmap_rule",
    BallWrong.apply,
    BallRight.apply,
    lambda: (rn(3, 4, seed=99),),
    "vmap rule ignores that the batch dimension can be the last one (in_dims=-1 or dim moved)",
)


class SoftplusRight(Function):
    """log(1 + e^(2x)) / 2, with forward-mode support."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        _chk(x)
        return torch.logaddexp(2 * x, torch.zeros_like(x)) / 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return g * torch.sigmoid(2 * ctx.saved_tensors[0])

    @staticmethod
    def jvp(ctx, t):
        return t * torch.sigmoid(2 * ctx.saved_tensors[0])


class SoftplusWrong(SoftplusRight):
    @staticmethod
    def jvp(ctx, t):
        return t * torch.sigmoid(ctx.saved_tensors[0])  # beta missing


add(
    "jvp_beta",
    SoftplusWrong.apply,
    SoftplusRight.apply,
    lambda: (rn(6, seed=100),),
    "jvp without beta; backward is right",
)


class GlobalMaxRight(Function):
    """Maximum of x (..., N) over the last dimension (first one on ties), as in PointNet."""

    @staticmethod
    def forward(ctx, x):
        _chk(x)
        _need(x.ndim >= 1 and x.shape[-1] > 0, "(..., N)")
        y, i = x.max(-1)
        ctx.save_for_backward(i)
        ctx.n = x.shape[-1]
        return y

    @staticmethod
    def backward(ctx, g):
        (i,) = ctx.saved_tensors
        return g.new_zeros(*g.shape, ctx.n).scatter(-1, i[..., None], g[..., None])


class GlobalMaxWrong(GlobalMaxRight):
    @staticmethod
    def backward(ctx, g):
        (i,) = ctx.saved_tensors
        i = i.to(torch.uint8).long()  # argmax stored in one byte
        return g.new_zeros(*g.shape, ctx.n).scatter(-1, i[..., None], g[..., None])


add(
    "argmax_uint8",
    GlobalMaxWrong.apply,
    GlobalMaxRight.apply,
    lambda: (rn(3, 8, seed=101, dtype=torch.float32),),
    "argmax index kept as uint8: wrong for more than 256 points",
)


class TanhRight(Function):
    @staticmethod
    def forward(ctx, x):
        _chk(x)
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class TanhWrong(TanhRight):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y = ctx.saved_tensors[0].detach()
        # the activation is "no longer needed": reuse its memory for the gradient
        y.data.copy_((1 - y * y) * g)
        return y.clone()


add(
    "output_as_scratch",
    TanhWrong.apply,
    TanhRight.apply,
    lambda: (rn(2, 4, seed=102, dtype=torch.float32),),
    "backward overwrites the output: its later readers and a second backward are wrong",
)
