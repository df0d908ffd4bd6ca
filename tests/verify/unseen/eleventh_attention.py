"""Eleventh set: attention, language-model losses, routing."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen.eleventh import add, randn, up


# softcap attention
class SoftcapAttn(Function):
    @staticmethod
    def forward(ctx, q, k, v, cap):
        ctx.save_for_backward(q, k, v)
        ctx.cap = cap
        qf, kf, vf = up(q, k, v)
        s = qf @ kf.transpose(-1, -2) / math.sqrt(q.shape[-1])
        p = torch.softmax(cap * torch.tanh(s / cap), -1)
        return (p @ vf).to(q.dtype)

    @staticmethod
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        cap, scale = ctx.cap, 1 / math.sqrt(q.shape[-1])
        qf, kf, vf, g = up(q, k, v, g)
        t = torch.tanh(qf @ kf.transpose(-1, -2) * scale / cap)
        p = torch.softmax(cap * t, -1)
        dp = g @ vf.transpose(-1, -2)
        dc = p * (dp - (dp * p).sum(-1, keepdim=True))
        ds = dc * (1 - t * t) * scale
        return (
            (ds @ kf).to(q.dtype),
            (ds.transpose(-1, -2) @ qf).to(k.dtype),
            (p.transpose(-1, -2) @ g).to(v.dtype),
            None,
        )


class SoftcapAttnBad(SoftcapAttn):
    @staticmethod
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        cap, scale = ctx.cap, 1 / math.sqrt(q.shape[-1])
        qf, kf, vf, g = up(q, k, v, g)
        s = cap * torch.tanh(qf @ kf.transpose(-1, -2) * scale / cap)
        p = torch.softmax(s, -1)
        dp = g @ vf.transpose(-1, -2)
        dc = p * (dp - (dp * p).sum(-1, keepdim=True))
        ds = dc * (1 - s * s) * scale
        return (
            (ds @ kf).to(q.dtype),
            (ds.transpose(-1, -2) @ qf).to(k.dtype),
            (p.transpose(-1, -2) @ g).to(v.dtype),
            None,
        )


def softcap_attention(q, k, v, softcap):
    return SoftcapAttn.apply(q, k, v, softcap)


def softcap_attention_w(q, k, v, softcap):
    return SoftcapAttnBad.apply(q, k, v, softcap)


add(
    "softcap_attention_11",
    softcap_attention_w,
    softcap_attention,
    lambda: (randn(2, 3, 4, seed=1), randn(2, 3, 4, seed=2), randn(2, 3, 4, seed=3), 5.0),
    "The tanh derivative is 1-s**2 of the capped score s=cap*tanh(x/cap) instead of "
    "1-(s/cap)**2; wrong for every cap other than 1, shows at the sample (cap 5).",
    "https://github.com/Dao-AILab/flash-attention/pull/1033",
)


# grouped-query attention
class GQA(Function):
    @staticmethod
    def _probs(q, k):
        n = q.shape[1] // k.shape[1]
        kk = k.repeat_interleave(n, 1)
        return torch.softmax(q @ kk.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1), kk, n

    @staticmethod
    def forward(ctx, q, k, v):
        if q.shape[1] % k.shape[1]:
            raise ValueError("query heads must be a multiple of kv heads")
        ctx.save_for_backward(q, k, v)
        p, _, n = GQA._probs(q, k)
        return p @ v.repeat_interleave(n, 1)

    @staticmethod
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        p, kk, n = GQA._probs(q, k)
        vv = v.repeat_interleave(n, 1)
        dp = g @ vv.transpose(-1, -2)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
        dq = ds @ kk
        dk = (ds.transpose(-1, -2) @ q).unflatten(1, (k.shape[1], n)).sum(2)
        dv = (p.transpose(-1, -2) @ g).unflatten(1, (k.shape[1], n)).sum(2)
        return dq, dk, dv


class GQABad(GQA):
    @staticmethod
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        p, kk, n = GQA._probs(q, k)
        vv = v.repeat_interleave(n, 1)
        dp = g @ vv.transpose(-1, -2)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
        dq = ds @ kk
        dk = (ds.transpose(-1, -2) @ q).unflatten(1, (n, k.shape[1])).sum(1)
        dv = (p.transpose(-1, -2) @ g).unflatten(1, (n, k.shape[1])).sum(1)
        return dq, dk, dv


add(
    "gqa_attention_11",
    lambda q, k, v: GQABad.apply(q, k, v),
    lambda q, k, v: GQA.apply(q, k, v),
    lambda: (randn(1, 4, 3, 2, seed=4), randn(1, 1, 3, 2, seed=5), randn(1, 1, 3, 2, seed=6)),
    "dk/dv are reduced over query heads as if heads were interleaved (h % n_kv) while forward "
    "groups them (h // n_share); invisible for MQA (1 kv head) or MHA, wrong for e.g. 4 query "
    "heads with 2 kv heads.",
    "https://github.com/XunhaoLai/native-sparse-attention-triton/issues/27",
)


# causal attention with kv cache
class CausalAttn(Function):
    @staticmethod
    def _p(q, k, diag):
        s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        m = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(diag)
        return torch.softmax(s.masked_fill(~m, -math.inf), -1)

    @staticmethod
    def forward(ctx, q, k, v):
        if k.shape[-2] < q.shape[-2]:
            raise ValueError("fewer keys than queries")
        ctx.save_for_backward(q, k, v)
        return CausalAttn._p(q, k, k.shape[-2] - q.shape[-2]) @ v

    @staticmethod
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        p = CausalAttn._p(q, k, k.shape[-2] - q.shape[-2])
        dp = g @ v.transpose(-1, -2)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
        return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ g


class CausalAttnBad(CausalAttn):
    @staticmethod
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        p = CausalAttn._p(q, k, 0)
        dp = g @ v.transpose(-1, -2)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
        return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ g


add(
    "kvcache_causal_attention_11",
    lambda q, k, v: CausalAttnBad.apply(q, k, v),
    lambda q, k, v: CausalAttn.apply(q, k, v),
    lambda: (randn(2, 3, 4, seed=7), randn(2, 3, 4, seed=8), randn(2, 3, 4, seed=9)),
    "Backward recomputes probabilities with a top-left causal mask, forward aligns it "
    "bottom-right; the same for equal lengths, wrong when there are more keys than queries (2 "
    "queries on 5 keys).",
    "https://github.com/xlite-dev/ffpa-attn/pull/300",
)


# attention returning its log-sum-exp
class AttnLse(Function):
    @staticmethod
    def forward(ctx, q, k, v):
        qf, kf, vf = up(q, k, v)
        s = qf @ kf.transpose(-1, -2) / math.sqrt(q.shape[-1])
        lse = torch.logsumexp(s, -1)
        out = torch.exp(s - lse.unsqueeze(-1)) @ vf
        ctx.save_for_backward(q, k, v)
        return out.to(q.dtype), lse

    @staticmethod
    def backward(ctx, g, g_lse):
        q, k, v = ctx.saved_tensors
        qf, kf, vf, g = up(q, k, v, g)
        scale = 1 / math.sqrt(q.shape[-1])
        p = torch.softmax(qf @ kf.transpose(-1, -2) * scale, -1)
        dp = g @ vf.transpose(-1, -2)
        delta = (dp * p).sum(-1) - g_lse
        ds = p * (dp - delta.unsqueeze(-1)) * scale
        return (
            (ds @ kf).to(q.dtype),
            (ds.transpose(-1, -2) @ qf).to(k.dtype),
            (p.transpose(-1, -2) @ g).to(v.dtype),
        )


class AttnLseBad(AttnLse):
    @staticmethod
    def backward(ctx, g, g_lse):
        q, k, v = ctx.saved_tensors
        qf, kf, vf, g = up(q, k, v, g)
        scale = 1 / math.sqrt(q.shape[-1])
        p = torch.softmax(qf @ kf.transpose(-1, -2) * scale, -1)
        dp = g @ vf.transpose(-1, -2)
        delta = (dp * p).sum(-1)
        ds = p * (dp - delta.unsqueeze(-1)) * scale
        return (
            (ds @ kf).to(q.dtype),
            (ds.transpose(-1, -2) @ qf).to(k.dtype),
            (p.transpose(-1, -2) @ g).to(v.dtype),
        )


add(
    "attention_lse_11",
    lambda q, k, v: AttnLseBad.apply(q, k, v),
    lambda q, k, v: AttnLse.apply(q, k, v),
    lambda: (randn(2, 3, 4, seed=10), randn(2, 4, 4, seed=11), randn(2, 4, 3, seed=12)),
    "The gradient that arrives at the second output (the log-sum-exp, used to merge attention "
    "blocks) is ignored; shows at the sample whenever lse is used.",
    "https://github.com/Dao-AILab/flash-attention/issues/1817",
)


# fused linear + cross entropy
class FusedLinearCE(Function):
    @staticmethod
    def forward(ctx, x, weight, labels, reduction):
        ctx.save_for_backward(x, weight, labels)
        ctx.reduction = reduction
        xf, wf = up(x, weight)
        z = xf @ wf.t()
        loss = torch.logsumexp(z, -1) - z.gather(1, labels[:, None])[:, 0]
        return {"mean": loss.mean, "sum": loss.sum, "none": loss.clone}[reduction]()

    @staticmethod
    def backward(ctx, g):
        x, weight, labels = ctx.saved_tensors
        xf, wf = up(x, weight)
        z = xf @ wf.t()
        d = torch.softmax(z, -1) - torch.nn.functional.one_hot(labels, weight.shape[0]).to(z.dtype)
        rows = g if ctx.reduction == "none" else g.expand(x.shape[0])
        if ctx.reduction == "mean":
            rows = rows / x.shape[0]
        d = d * rows[:, None]
        return (d @ wf).to(x.dtype), (d.t() @ xf).to(weight.dtype), None, None


class FusedLinearCEBad(FusedLinearCE):
    @staticmethod
    def forward(ctx, x, weight, labels, reduction):
        # the gradients are made while the logits are at hand; backward only scales them
        xf, wf = up(x, weight)
        z = xf @ wf.t()
        loss = torch.logsumexp(z, -1) - z.gather(1, labels[:, None])[:, 0]
        d = torch.softmax(z, -1)
        d[torch.arange(x.shape[0]), labels] -= 1
        if reduction == "mean":
            d /= x.shape[0]
        ctx.save_for_backward((d @ wf).to(x.dtype), (d.t() @ xf).to(weight.dtype))
        return {"mean": loss.mean, "sum": loss.sum, "none": loss.clone}[reduction]()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gx, gw = ctx.saved_tensors
        s = g.reshape(-1)[0]
        return gx * s, gw * s, None, None


add(
    "fused_linear_ce_11",
    lambda x, w, y, reduction="mean": FusedLinearCEBad.apply(x, w, y, reduction),
    lambda x, w, y, reduction="mean": FusedLinearCE.apply(x, w, y, reduction),
    lambda: (randn(4, 3, seed=13), randn(5, 3, seed=14), torch.tensor([0, 3, 1, 4])),
    "With reduction='none' every row's gradient (and the row-summed weight gradient) is "
    "scaled by grad_output[0]; right for 'mean' and 'sum', wrong for 'none' with a per-token "
    "weight.",
    "https://github.com/linkedin/Liger-Kernel/pull/1298",
)


# label smoothing with ignore_index
class SmoothCE(Function):
    @staticmethod
    def forward(ctx, z, labels, eps, ignore):
        ctx.save_for_backward(z, labels)
        ctx.eps, ctx.ignore = eps, ignore
        zf = up(z)
        lp = torch.log_softmax(zf, -1)
        keep = labels != ignore
        y = labels.clamp(min=0)
        loss = -(1 - eps) * lp.gather(1, y[:, None])[:, 0] - eps * lp.mean(-1)
        return (loss * keep).sum() / keep.sum().clamp(min=1)

    @staticmethod
    def backward(ctx, g):
        z, labels = ctx.saved_tensors
        zf = up(z)
        keep = labels != ctx.ignore
        t = torch.nn.functional.one_hot(labels.clamp(min=0), z.shape[1]).to(zf.dtype)
        t = t * (1 - ctx.eps) + ctx.eps / z.shape[1]
        d = (torch.softmax(zf, -1) - t) * keep[:, None] / keep.sum().clamp(min=1)
        return (d * g).to(z.dtype), None, None, None


class SmoothCEBad(SmoothCE):
    @staticmethod
    def backward(ctx, g):
        z, labels = ctx.saved_tensors
        zf = up(z)
        keep = labels != ctx.ignore
        t = torch.nn.functional.one_hot(labels.clamp(min=0), z.shape[1]).to(zf.dtype)
        t = t * (1 - ctx.eps) + ctx.eps / z.shape[1]
        d = (torch.softmax(zf, -1) - t) * keep[:, None] / labels.numel()
        return (d * g).to(z.dtype), None, None, None


add(
    "smoothed_ce_ignore_11",
    lambda z, y, smoothing=0.1, ignore_index=-100: SmoothCEBad.apply(z, y, smoothing, ignore_index),
    lambda z, y, smoothing=0.1, ignore_index=-100: SmoothCE.apply(z, y, smoothing, ignore_index),
    lambda: (randn(4, 5, seed=15), torch.tensor([1, 0, 4, 2])),
    "The mean is taken over kept rows in forward but over all rows in backward; wrong as soon "
    "as one label is ignore_index (-100), e.g. padded tokens.",
    "own",
)


# cross entropy with z-loss
class ZLossCE(Function):
    @staticmethod
    def forward(ctx, z, labels, zw):
        ctx.save_for_backward(z, labels)
        ctx.zw = zw
        zf = up(z)
        lse = torch.logsumexp(zf, -1)
        return (lse - zf.gather(1, labels[:, None])[:, 0] + zw * lse * lse).mean()

    @staticmethod
    def backward(ctx, g):
        z, labels = ctx.saved_tensors
        zf = up(z)
        lse = torch.logsumexp(zf, -1, keepdim=True)
        p = torch.exp(zf - lse)
        y = torch.nn.functional.one_hot(labels, z.shape[1]).to(zf.dtype)
        d = p * (1 + 2 * ctx.zw * lse) - y
        return (d * (g / z.shape[0])).to(z.dtype), None, None


class ZLossCEBad(ZLossCE):
    @staticmethod
    def backward(ctx, g):
        z, labels = ctx.saved_tensors
        zf = up(z)
        zf = zf - zf.amax(-1, keepdim=True)  # for stability
        lse = torch.logsumexp(zf, -1, keepdim=True)
        p = torch.exp(zf - lse)
        y = torch.nn.functional.one_hot(labels, z.shape[1]).to(zf.dtype)
        d = p * (1 + 2 * ctx.zw * lse) - y
        return (d * (g / z.shape[0])).to(z.dtype), None, None


add(
    "zloss_ce_11",
    lambda z, y, z_weight: ZLossCEBad.apply(z, y, z_weight),
    lambda z, y, z_weight: ZLossCE.apply(z, y, z_weight),
    lambda: (randn(4, 5, seed=16, shift=1.0), torch.tensor([1, 0, 4, 2]), 0.1),
    "Backward uses the log-sum-exp of the max-shifted logits in the z-loss term 2*w*lse*p, "
    "forward the true one; shows at the sample (row maxima are not 0).",
    "own",
)


# cross entropy that keeps its lse
class LseCE(Function):
    @staticmethod
    def forward(ctx, z, labels):
        zf = up(z)
        lse = torch.logsumexp(zf, -1)
        ctx.save_for_backward(z, labels, lse)
        return lse - zf.gather(1, labels[:, None])[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        z, labels, lse = ctx.saved_tensors
        d = torch.exp(up(z) - lse[:, None])
        d[torch.arange(z.shape[0]), labels] -= 1
        return (d * g[:, None]).to(z.dtype), None


class LseCEBad(LseCE):
    @staticmethod
    def forward(ctx, z, labels):
        zf = up(z)
        lse = torch.logsumexp(zf, -1)
        ctx.save_for_backward(z, labels, lse.to(z.dtype))
        return lse - zf.gather(1, labels[:, None])[:, 0]


add(
    "saved_lse_ce_11",
    lambda z, y: LseCEBad.apply(z, y),
    lambda z, y: LseCE.apply(z, y),
    lambda: (randn(4, 6, seed=17), torch.tensor([1, 0, 5, 2])),
    "The log-sum-exp is kept for backward in the logits' dtype; exact in float32/float64, but "
    "for bfloat16 logits around 40 it is rounded by up to 0.125 and every probability is off "
    "by up to 13 percent (rows of the gradient no longer sum to 0).",
    "own (cf. https://github.com/pytorch/helion/pull/2273)",
)


# fused scaled softmax
class ScaledSoftmax(Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x)
        ctx.scale = scale
        return torch.softmax(up(x) * scale, -1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        y, g = torch.softmax(up(x) * ctx.scale, -1), up(g)
        return (y * (g - (g * y).sum(-1, keepdim=True)) * ctx.scale).to(x.dtype), None


class ScaledSoftmaxBad(ScaledSoftmax):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        y, buf = torch.softmax(up(x) * ctx.scale, -1), g.contiguous()
        gf = up(buf)  # the kernel reads and writes one buffer
        buf.copy_(y * (gf - (gf * y).sum(-1, keepdim=True)) * ctx.scale)
        return buf, None


add(
    "fused_softmax_inplace_11",
    lambda x, scale=1.0: ScaledSoftmaxBad.apply(x, scale),
    lambda x, scale=1.0: ScaledSoftmax.apply(x, scale),
    lambda: (randn(3, 4, seed=18), 0.5),
    "Backward writes its result into the incoming grad_output; the gradient returned is "
    "right, but a residual branch that shares that gradient (softmax(x)+r), or a second "
    "backward with the same grad_outputs tensor, gets a wrong one.",
    "https://github.com/NVIDIA/apex/issues/1430",
)


# MoE router
class TopkRouter(Function):
    @staticmethod
    def forward(ctx, logits, k):
        p = torch.softmax(up(logits), -1)
        v, i = p.topk(k, -1)
        ctx.save_for_backward(logits, i)
        ctx.mark_non_differentiable(i)
        return (v / v.sum(-1, keepdim=True)).to(logits.dtype), i

    @staticmethod
    def backward(ctx, g, _):
        logits, i = ctx.saved_tensors
        g = up(g)
        p = torch.softmax(up(logits), -1)
        v = p.gather(-1, i)
        s = v.sum(-1, keepdim=True)
        dv = (g - (g * v).sum(-1, keepdim=True) / s) / s
        dp = torch.zeros_like(p).scatter(-1, i, dv)
        return (p * (dp - (dp * p).sum(-1, keepdim=True))).to(logits.dtype), None


class TopkRouterBad(TopkRouter):
    @staticmethod
    def backward(ctx, g, _):
        logits, i = ctx.saved_tensors
        g = up(g)
        p = torch.softmax(up(logits), -1)
        v = p.gather(-1, i)
        s = v.sum(-1, keepdim=True)
        dp = torch.zeros_like(p).scatter(-1, i, g / s)
        return (p * (dp - (dp * p).sum(-1, keepdim=True))).to(logits.dtype), None


add(
    "moe_topk_router_11",
    lambda x, k: TopkRouterBad.apply(x, k)[0],
    lambda x, k: TopkRouter.apply(x, k)[0],
    lambda: (randn(3, 5, seed=19), 2),
    "The renormalisation of the top-k weights is treated as a constant divisor (its "
    "derivative is missing); shows at the sample for k > 1.",
    "own",
)
