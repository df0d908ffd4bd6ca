"""Eleventh set: normalisation, recurrent cells, scans, activations."""

import math

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen.eleventh import add, leaf, need_dim, rand, randn, up


# RMSNorm, kernel with row strides
class RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, w, eps):
        need_dim(x, 2)
        xf, wf = up(x, w)
        r = torch.rsqrt((xf * xf).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, w, r)
        return (xf * r * wf).to(x.dtype)

    @staticmethod
    def _rows(dy):
        return dy

    @classmethod
    def _bwd(cls, ctx, dy):
        x, w, r = ctx.saved_tensors
        xf, wf, dy = up(x, w, cls._rows(dy))
        h = xf * r
        t = dy * wf
        dx = r * (t - h * (t * h).mean(-1, keepdim=True))
        return dx.to(x.dtype), (dy * h).sum(0).to(w.dtype), None

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return RMSNorm._bwd(ctx, dy)


class RMSNormBad(RMSNorm):
    @staticmethod
    def _rows(dy):
        # the kernel walks rows of n contiguous elements; copy when it cannot
        m, n = dy.shape
        if dy.stride(1) != 1 or dy.stride(0) < n:
            dy = dy.contiguous()
        return torch.as_strided(dy, (m, n), (n, 1), dy.storage_offset())

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return RMSNormBad._bwd(ctx, dy)


add(
    "rmsnorm_row_stride_11",
    lambda x, w, eps=1e-6: RMSNormBad.apply(x, w, eps),
    lambda x, w, eps=1e-6: RMSNorm.apply(x, w, eps),
    lambda: (randn(4, 5, seed=101), randn(5, seed=102, scale=0.2, shift=1.0)),
    "Backward reads grad_output rows at stride n; a grad_output that is a column slice of a "
    "wider tensor (unit column stride, row stride > n, as when the output went into torch.cat "
    "along dim 1) is read wrongly.",
    "https://github.com/Dao-AILab/flash-attention/issues/355",
)


# LayerNorm, blockwise weight gradient
class LayerNorm(Function):
    ACC_F32 = True

    @staticmethod
    def forward(ctx, x, w, b, eps):
        need_dim(x, 2)
        xf, wf, bf = up(x, w, b)
        mu = xf.mean(-1, keepdim=True)
        r = torch.rsqrt((xf - mu).square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, w, mu, r)
        return ((xf - mu) * r * wf + bf).to(x.dtype)

    @classmethod
    def _bwd(cls, ctx, dy):
        x, w, mu, r = ctx.saved_tensors
        xf, wf, dyf = up(x, w, dy)
        h = (xf - mu) * r
        t = dyf * wf
        dx = r * (t - t.mean(-1, keepdim=True) - h * (t * h).mean(-1, keepdim=True))
        acc = xf.dtype if cls.ACC_F32 else x.dtype
        dw = torch.zeros(x.shape[-1], dtype=acc, device=x.device)
        db = torch.zeros(x.shape[-1], dtype=acc, device=x.device)
        for i in range(0, x.shape[0], 8):
            dw += (dyf[i : i + 8] * h[i : i + 8]).sum(0).to(acc)
            db += dyf[i : i + 8].sum(0).to(acc)
        return dx.to(x.dtype), dw.to(w.dtype), db.to(w.dtype), None

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return LayerNorm._bwd(ctx, dy)


class LayerNormBad(LayerNorm):
    ACC_F32 = False

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return LayerNormBad._bwd(ctx, dy)


add(
    "layernorm_dw_accum_11",
    lambda x, w, b, eps=1e-5: LayerNormBad.apply(x, w, b, eps),
    lambda x, w, b, eps=1e-5: LayerNorm.apply(x, w, b, eps),
    lambda: (randn(4, 5, seed=103), randn(5, seed=104, shift=1.0, scale=0.2), randn(5, seed=105)),
    "Weight and bias gradients are summed over row blocks in the input's dtype; exact in "
    "float64, but in bfloat16 with thousands of rows the sums stagnate (4096 rows of ones "
    "give 2048).",
    "https://github.com/linkedin/Liger-Kernel/pull/950",
)


# batch norm module
class BN(Function):
    @staticmethod
    def forward(ctx, x, w, b, rm, rv, training, eps):
        need_dim(x, 2)
        mu, var = (x.mean(0), x.var(0, unbiased=False)) if training else (rm, rv)
        r = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, w, mu, r)
        ctx.training = training
        return (x - mu) * r * w + b

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, mu, r = ctx.saved_tensors
        h = (x - mu) * r
        t = g * w
        dx = r * (t - t.mean(0) - h * (t * h).mean(0)) if ctx.training else r * t
        return dx, (g * h).sum(0), g.sum(0), None, None, None, None


class BNBad(BN):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, mu, r = ctx.saved_tensors
        h = (x - mu) * r
        t = g * w
        dx = r * (t - t.mean(0) - h * (t * h).mean(0))
        return dx, (g * h).sum(0), g.sum(0), None, None, None, None


class BatchNormModule(nn.Module):
    """Batch norm over dim 0; statistics are given, not tracked."""

    def __init__(self, op, eps=1e-5):
        super().__init__()
        self.op, self.eps = op, eps

    def forward(self, x, weight, bias, running_mean, running_var, training=True):
        dt = x.dtype
        x, weight, bias, running_mean, running_var = up(x, weight, bias, running_mean, running_var)
        return self.op.apply(x, weight, bias, running_mean, running_var, training, self.eps).to(dt)


add(
    "batchnorm_module_11",
    BatchNormModule(BNBad),
    BatchNormModule(BN),
    lambda: (
        randn(6, 3, seed=106),
        randn(3, seed=107, shift=1.0, scale=0.2),
        randn(3, seed=108),
        randn(3, seed=109, grad=False),
        rand(3, seed=110, lo=0.5, hi=2.0, grad=False),
    ),
    "Backward always differentiates through the batch statistics; wrong with training=False, "
    "where running statistics are constants.",
    "https://github.com/apache/mxnet/issues/9580",
)


# L2 normalisation, second order
class L2Normalize(Function):
    @staticmethod
    def forward(ctx, x, eps):
        ctx.save_for_backward(x)
        ctx.eps = eps
        return x / x.norm(dim=-1, keepdim=True).clamp_min(eps)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        n = (x * x).sum(-1, keepdim=True)
        small = n <= ctx.eps**2
        n = torch.where(small, torch.ones_like(n), n)
        inv = n.rsqrt()
        full = (g - x * (x * g).sum(-1, keepdim=True) / n) * inv
        return torch.where(small, g / ctx.eps, full), None


class L2NormalizeBad(Function):
    @staticmethod
    def forward(ctx, x, eps):
        n = x.norm(dim=-1, keepdim=True)
        y = x / n.clamp_min(eps)
        ctx.save_for_backward(y)
        ctx.inv, ctx.small = 1 / n.clamp_min(eps), n <= eps
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        full = (g - y * (y * g).sum(-1, keepdim=True)) * ctx.inv
        return torch.where(ctx.small, g * ctx.inv, full), None


add(
    "l2_normalize_second_11",
    lambda x, eps=1e-12: L2NormalizeBad.apply(x, eps),
    lambda x, eps=1e-12: L2Normalize.apply(x, eps),
    lambda: (randn(3, 4, seed=111),),
    "The reciprocal norm is kept as a plain attribute made in forward, a constant for "
    "autograd, so a second derivative (gradient penalty) lacks its dependence on x; first "
    "derivatives are right.",
    "own (cf. https://github.com/pytorch/pytorch/issues/18619)",
)


# weight norm
class WeightNorm(Function):
    @staticmethod
    def forward(ctx, v, g):
        need_dim(v, 2)
        ctx.save_for_backward(v, g)
        return v * (g / v.norm(dim=1, keepdim=True))

    @staticmethod
    def backward(ctx, d):
        v, g = ctx.saved_tensors
        n = v.norm(dim=1, keepdim=True)
        dot = (d * v).sum(1, keepdim=True)
        return g / n * (d - v * dot / (n * n)), dot / n


class WeightNormBad(WeightNorm):
    @staticmethod
    def backward(ctx, d):
        v, g = ctx.saved_tensors
        n = v.norm(dim=1, keepdim=True)
        dot = (d * v).sum(1, keepdim=True)
        return g / n * (d - v * (d * v).sum() / (n * n)), dot / n


add(
    "weight_norm_11",
    lambda v, g: WeightNormBad.apply(v, g),
    lambda v, g: WeightNorm.apply(v, g),
    lambda: (randn(3, 4, seed=112), rand(3, 1, seed=113, lo=0.5, hi=2.0)),
    "The projection term uses the inner product over the whole matrix instead of per output "
    "row; right for one row, shows at the sample with 3 rows.",
    "own",
)


# GRU cell (reset after)
class GRUCell(Function):
    @staticmethod
    def forward(ctx, gx, h, wh, bh):
        xr, xz, xn = gx.chunk(3, 1)
        hr, hz, hn = (h @ wh.t() + bh).chunk(3, 1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + r * hn)
        ctx.save_for_backward(h, wh, r, z, n, hn)
        return (1 - z) * n + z * h

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        h, wh, r, z, n, hn = ctx.saved_tensors
        dn = g * (1 - z) * (1 - n * n)
        dz = g * (h - n) * z * (1 - z)
        dr = dn * hn * r * (1 - r)
        dgh = torch.cat([dr, dz, dn * r], 1)
        return torch.cat([dr, dz, dn], 1), g * z + dgh @ wh, dgh.t() @ h, dgh.sum(0)


class GRUCellBad(GRUCell):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        h, wh, r, z, n, hn = ctx.saved_tensors
        dn = g * (1 - z) * (1 - n * n)
        dz = g * (h - n) * z * (1 - z)
        dr = dn * hn * r * (1 - r)
        dgx = torch.cat([dr, dz, dn], 1)
        dgh = torch.cat([dr, dz, dn * r], 1)
        return dgx, g * z + dgh @ wh, dgh.t() @ h, dgx.sum(0)


add(
    "gru_cell_11",
    lambda *a: GRUCellBad.apply(*a),
    lambda *a: GRUCell.apply(*a),
    lambda: (
        randn(2, 6, seed=114),
        randn(2, 2, seed=115),
        randn(6, 2, seed=116),
        randn(6, seed=117),
    ),
    "The recurrent bias of the candidate gate gets the input-side gradient, without the reset "
    "gate that multiplies it in forward; shows at the sample, only in that bias.",
    "own",
)


# peephole LSTM cell
class PeepholeLSTM(Function):
    @staticmethod
    def forward(ctx, x, h, c, w, b, p):
        zi, zf, zg, zo = (torch.cat([x, h], 1) @ w.t() + b).chunk(4, 1)
        i, f, g = torch.sigmoid(zi + p[0] * c), torch.sigmoid(zf + p[1] * c), torch.tanh(zg)
        c2 = f * c + i * g
        o = torch.sigmoid(zo + p[2] * c2)
        ctx.save_for_backward(x, h, c, w, p, i, f, g, o, c2)
        return o * torch.tanh(c2), c2

    @staticmethod
    def _bwd(ctx, gh, gc, through_output_gate):
        x, h, c, w, p, i, f, g, o, c2 = ctx.saved_tensors
        t = torch.tanh(c2)
        do = gh * t * o * (1 - o)
        dc2 = gc + gh * o * (1 - t * t)
        if through_output_gate:
            dc2 = dc2 + do * p[2]
        di, df, dg = dc2 * g * i * (1 - i), dc2 * c * f * (1 - f), dc2 * i * (1 - g * g)
        dz = torch.cat([di, df, dg, do], 1)
        dxh = dz @ w
        dc = dc2 * f + di * p[0] + df * p[1]
        dp = torch.stack([(di * c).sum(0), (df * c).sum(0), (do * c2).sum(0)])
        n = x.shape[1]
        return dxh[:, :n], dxh[:, n:], dc, dz.t() @ torch.cat([x, h], 1), dz.sum(0), dp

    @staticmethod
    @once_differentiable
    def backward(ctx, gh, gc):
        return PeepholeLSTM._bwd(ctx, gh, gc, True)


class PeepholeLSTMBad(PeepholeLSTM):
    @staticmethod
    @once_differentiable
    def backward(ctx, gh, gc):
        return PeepholeLSTM._bwd(ctx, gh, gc, False)


add(
    "peephole_lstm_11",
    lambda *a: PeepholeLSTMBad.apply(*a),
    lambda *a: PeepholeLSTM.apply(*a),
    lambda: (
        randn(2, 2, seed=118),
        randn(2, 2, seed=119),
        randn(2, 2, seed=120),
        randn(8, 4, seed=121, scale=0.5),
        randn(8, seed=122, scale=0.1),
        leaf([[0.0, 0.0]] * 3),
    ),
    "The new cell's gradient lacks the path through the output gate's peephole weight; "
    "invisible at the usual zero initialisation of the peepholes, wrong once they are trained "
    "away from 0.",
    "own",
)


# chunked linear recurrence
class ChunkScan(Function):
    """h[t] = a[t] * h[t-1] + x[t] along the last dim, in chunks."""

    @staticmethod
    def forward(ctx, a, x, chunk):
        h = torch.empty_like(x)
        s = torch.zeros_like(x[..., 0])
        for t in range(x.shape[-1]):
            s = a[..., t] * s + x[..., t]
            h[..., t] = s
        ctx.save_for_backward(a, h)
        ctx.chunk = chunk
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, h = ctx.saved_tensors
        n, c = a.shape[-1], ctx.chunk
        dx = torch.empty_like(h)
        carry = torch.zeros_like(h[..., 0])
        for lo in range((n - 1) // c * c, -1, -c):
            for t in range(min(lo + c, n) - 1, lo - 1, -1):
                carry = g[..., t] + carry
                dx[..., t] = carry
                carry = carry * a[..., t]
        prev = torch.nn.functional.pad(h[..., :-1], (1, 0))
        return dx * prev, dx, None


class ChunkScanBad(ChunkScan):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, h = ctx.saved_tensors
        n, c = a.shape[-1], ctx.chunk
        dx = torch.empty_like(h)
        carry = torch.zeros_like(h[..., 0])
        for lo in range((n - 1) // c * c, -1, -c):
            hi = min(lo + c, n)
            s = g[..., hi - 1] + carry
            dx[..., hi - 1] = s
            for t in range(hi - 2, lo - 1, -1):
                s = g[..., t] + a[..., t + 1] * s
                dx[..., t] = s
            carry = s
        prev = torch.nn.functional.pad(h[..., :-1], (1, 0))
        return dx * prev, dx, None


add(
    "chunked_scan_11",
    lambda a, x, chunk=8: ChunkScanBad.apply(a, x, chunk),
    lambda a, x, chunk=8: ChunkScan.apply(a, x, chunk),
    lambda: (rand(2, 6, seed=123, lo=0.3, hi=0.95), randn(2, 6, seed=124)),
    "The gradient carried from one chunk to the one before is not multiplied by the decay of "
    "the chunk's first step; right up to 8 steps (one chunk), wrong for longer sequences.",
    "own (cf. https://github.com/state-spaces/mamba/issues/368)",
)


# short causal convolution with state
class ShortConv(Function):
    """x (D,T), weight (D,W), state (D,W-1): the last inputs seen before; returns y and the new state."""

    @staticmethod
    def forward(ctx, x, weight, state):
        t, w = x.shape[1], weight.shape[1]
        xc = torch.cat([state, x], 1)
        ctx.save_for_backward(xc, weight)
        y = sum(weight[:, i : i + 1] * xc[:, i : i + t] for i in range(w))
        return y, xc[:, t:].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g, gs):
        xc, weight = ctx.saved_tensors
        w, t = weight.shape[1], g.shape[1]
        d = torch.zeros_like(xc)
        for i in range(w):
            d[:, i : i + t] += weight[:, i : i + 1] * g
        d[:, t:] += gs
        dw = torch.stack([(g * xc[:, i : i + t]).sum(1) for i in range(w)], 1)
        return d[:, w - 1 :], dw, d[:, : w - 1]


class ShortConvBad(ShortConv):
    @staticmethod
    @once_differentiable
    def backward(ctx, g, gs):
        xc, weight = ctx.saved_tensors
        w, t = weight.shape[1], g.shape[1]
        d = torch.zeros_like(xc)
        for i in range(w):
            d[:, i : i + t] += weight[:, i : i + 1] * g
        dx, ds = d[:, w - 1 :], d[:, : w - 1]
        n = min(t, w - 1)
        dx[:, t - n :] += gs[:, w - 1 - n :]  # the new state is the tail of x
        dw = torch.stack([(g * xc[:, i : i + t]).sum(1) for i in range(w)], 1)
        return dx, dw, ds


add(
    "short_conv_state_11",
    lambda x, w, s: ShortConvBad.apply(x, w, s),
    lambda x, w, s: ShortConv.apply(x, w, s),
    lambda: (randn(2, 5, seed=125), randn(2, 4, seed=126), randn(2, 3, seed=127)),
    "The final state's gradient is only sent to x; for a chunk shorter than W-1 (1 or 2 "
    "tokens at width 4) part of the old state stays in the new one and the old state's "
    "gradient lacks it.",
    "https://github.com/fla-org/flash-linear-attention/pull/1141",
)


# gated linear attention
class GLA(Function):
    """S[t] = exp(g[t]) S[t-1] + k[t] v[t]^T, o[t] = q[t] S[t]; returns o and the final S."""

    @staticmethod
    def forward(ctx, q, k, v, g, s0):
        s, states, out = s0, [s0], []
        for t in range(q.shape[0]):
            s = g[t].exp() * s + torch.outer(k[t], v[t])
            states.append(s)
            out.append(q[t] @ s)
        ctx.save_for_backward(q, k, v, g, torch.stack(states))
        return torch.stack(out), s.clone()

    @staticmethod
    def _bwd(ctx, do, ds):
        q, k, v, g, st = ctx.saved_tensors
        dq, dk, dv, dg = (torch.zeros_like(z) for z in (q, k, v, g))
        for t in range(q.shape[0] - 1, -1, -1):
            ds = ds + torch.outer(q[t], do[t])
            dq[t] = st[t + 1] @ do[t]
            dk[t] = ds @ v[t]
            dv[t] = k[t] @ ds
            dg[t] = (ds * st[t]).sum() * g[t].exp()
            ds = ds * g[t].exp()
        return dq, dk, dv, dg, ds

    @staticmethod
    @once_differentiable
    def backward(ctx, do, ds):
        return GLA._bwd(ctx, do, ds)


class GLABad(GLA):
    @staticmethod
    @once_differentiable
    def backward(ctx, do, ds):
        return GLA._bwd(ctx, do, torch.zeros_like(ds))


add(
    "gated_linear_attention_11",
    lambda *a: GLABad.apply(*a),
    lambda *a: GLA.apply(*a),
    lambda: (
        randn(4, 2, seed=128),
        randn(4, 2, seed=129),
        randn(4, 3, seed=130),
        rand(4, seed=131, lo=-1.0, hi=0.0),
        randn(2, 3, seed=132),
    ),
    "The reverse recurrence starts from zero: the gradient of the returned final state is "
    "dropped; shows at the sample whenever the final state is used (truncated chunks, "
    "caches).",
    "own",
)


# CTC
class CTC(Function):
    """Negative log-likelihood of targets (S,) under log-probabilities (T,C), blank 0."""

    @staticmethod
    def _trellis(lp, targets):
        ext = torch.zeros(2 * len(targets) + 1, dtype=torch.long)
        ext[1::2] = targets
        e, (n, _) = len(ext), lp.shape
        skip = torch.zeros(e, dtype=torch.bool)
        skip[2:] = (ext[2:] != 0) & (ext[2:] != ext[:-2])
        em = lp[:, ext]
        ninf = float("-inf")

        def run(em, skip):
            a = torch.full((n, e), ninf, dtype=lp.dtype)
            a[0, :2] = em[0, :2]
            for t in range(1, n):
                s1 = torch.cat([torch.full((1,), ninf, dtype=lp.dtype), a[t - 1, :-1]])
                s2 = torch.cat([torch.full((2,), ninf, dtype=lp.dtype), a[t - 1, :-2]])
                s2 = torch.where(skip, s2, torch.full_like(s2, ninf))
                a[t] = torch.logsumexp(torch.stack([a[t - 1], s1, s2]), 0) + em[t]
            return a

        alpha = run(em, skip)
        rskip = torch.zeros_like(skip)
        rskip[2:] = skip.flip(0)[:-2]
        beta = run(em.flip(0, 1), rskip).flip(0, 1)
        return ext, em, alpha, beta

    @staticmethod
    def forward(ctx, lp, targets):
        ext, em, alpha, beta = CTC._trellis(lp, targets)
        ll = torch.logsumexp(alpha[-1, -2:], 0)
        if not torch.isfinite(ll):
            raise ValueError("input too short for these targets")
        gamma = torch.exp(alpha + beta - em - ll)
        post = torch.zeros_like(lp).index_add_(1, ext, gamma)
        ctx.save_for_backward(lp, post)
        return -ll

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        _lp, post = ctx.saved_tensors
        return -post * g, None


class CTCBad(CTC):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        lp, post = ctx.saved_tensors
        return (lp.exp() - post) * g, None


add(
    "ctc_logprobs_11",
    lambda lp, y: CTCBad.apply(lp, y),
    lambda lp, y: CTC.apply(lp, y),
    lambda: (
        torch.log_softmax(randn(5, 4, seed=133).detach(), -1).requires_grad_(),
        torch.tensor([2, 1]),
    ),
    "Returns the gradient with respect to unnormalised logits (softmax - posterior) although "
    "the argument is log-probabilities (-posterior); shows at the sample when the argument "
    "itself is looked at.",
    "https://github.com/pytorch/pytorch/issues/52241",
)


# snake activation
class Snake(Function):
    @staticmethod
    def forward(ctx, x, log_alpha):
        need_dim(x, 3)
        ctx.save_for_backward(x, log_alpha)
        a = log_alpha.exp()[:, None]
        return x + torch.sin(a * x).square() / a

    @staticmethod
    def backward(ctx, g):
        x, log_alpha = ctx.saved_tensors
        a = log_alpha.exp()[:, None]
        s2 = torch.sin(2 * a * x)
        da = x * s2 / a - torch.sin(a * x).square() / (a * a)
        return g * (1 + s2), (g * da * a).sum((0, 2))


class SnakeBad(Snake):
    @staticmethod
    def backward(ctx, g):
        x, log_alpha = ctx.saved_tensors
        a = log_alpha.exp()[:, None]
        s2 = torch.sin(2 * a * x)
        da = x * s2 / a - torch.sin(a * x).square() / (a * a)
        return g * (1 + s2), (g * da).sum((0, 2))


add(
    "snake_activation_11",
    lambda x, a: SnakeBad.apply(x, a),
    lambda x, a: Snake.apply(x, a),
    lambda: (randn(2, 3, 4, seed=134), leaf([0.0, 0.0, 0.0])),
    "Returns the gradient of alpha for its logarithm (factor exp(log_alpha) missing); "
    "invisible at the initial value log_alpha=0, wrong once it is trained.",
    "own",
)


# gelu, tanh form
_C = math.sqrt(2 / math.pi)


class GeluTanh(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        xf = up(x)
        return (0.5 * xf * (1 + torch.tanh(_C * (xf + 0.044715 * xf**3)))).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        xf, gf = up(x, g)
        t = torch.tanh(_C * (xf + 0.044715 * xf**3))
        d = 0.5 * (1 + t) + 0.5 * xf * (1 - t * t) * _C * (1 + 3 * 0.044715 * xf * xf)
        return (gf * d).to(x.dtype)


class GeluTanhBad(GeluTanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        xf, gf = up(x, g)
        d = 0.5 * (1 + torch.erf(xf / math.sqrt(2))) + xf * torch.exp(-xf * xf / 2) / math.sqrt(
            2 * math.pi
        )
        return (gf * d).to(x.dtype)


add(
    "gelu_tanh_11",
    lambda x: GeluTanhBad.apply(x),
    lambda x: GeluTanh.apply(x),
    lambda: (randn(3, 5, seed=135, scale=1.5),),
    "Forward is the tanh approximation, backward the derivative of the exact erf form; off by "
    "up to 1e-3 everywhere, shows at the sample to an accurate comparison.",
    "own",
)
