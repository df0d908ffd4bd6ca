"""Eighth set: what people get wrong who write their first backward, for a layer of a paper or a product.

In one file, as it was written before any check ran on it. `source` is the public report or question that a fault is
modelled on, `field` what it belongs to, `shows` where the wrong one is wrong ("here": in the sample). As mended since:
three twins fail under torch.autocast, and are run outside of it; one failed for an empty input.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import EIGHTH, Unseen, outside_autocast

f32, f64 = torch.float32, torch.float64


AUTOCAST = {"linear_packed_grads", "fir_taps_flipped", "sqrtm_repeated_eigenvalues"}
MISSED = {
    "iir_initial_state_none": "a note: an input that requires no grad in the sample may be meant to have none",
}


def need(cond, msg):
    if not cond:
        raise ValueError(msg)


def floats(*ts):
    for t in ts:
        need(t.dtype in (f32, f64), f"float32 or float64 only, got {t.dtype}")
        need(t.dtype == ts[0].dtype, "all inputs must have the same dtype")


def no_grad_for(ctx, *slots):
    for s in slots:
        need(not ctx.needs_input_grad[s], f"argument {s} is not differentiable here")


def wide(fn):
    """Works in float64 inside; the result has the inputs' dtype."""

    def f(*args):
        dt = next(a.dtype for a in args if torch.is_tensor(a))
        need(dt in (f32, f64), f"float32 or float64 only, got {dt}")
        need(
            all(a.dtype == dt for a in args if torch.is_tensor(a) and a.is_floating_point()),
            "all inputs must have the same dtype",
        )
        return fn.apply(
            *[a.to(f64) if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
        ).to(dt)

    return f


def rn(*shape, seed=0, dtype=f64, grad=True, scale=1.0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    t = (torch.randn(*shape, generator=g, dtype=f64) * scale + shift).to(dtype)
    return t.requires_grad_(grad)


def ru(*shape, seed=0, lo=0.0, hi=1.0, dtype=f64, grad=True):
    g = torch.Generator().manual_seed(seed)
    t = (torch.rand(*shape, generator=g, dtype=f64) * (hi - lo) + lo).to(dtype)
    return t.requires_grad_(grad)


def sc(v, dtype=f64, grad=True):
    return torch.tensor(v, dtype=dtype, requires_grad=grad)


def add(name, wrong, right, make_inputs, why, source="", field="", shows="here"):
    if name in AUTOCAST:
        wrong, right = outside_autocast(wrong), outside_autocast(right)
    EIGHTH[f"{name}_8"] = Unseen(
        f"{name}_8", why, wrong, right, make_inputs, missed=MISSED.get(name, "")
    )


# ---------------------------------------------------------------- activations
class ChannelPReLU(Function):
    """y = x where x > 0, else w[c] * x; x is (N, C, ...)."""

    @staticmethod
    def forward(ctx, x, w):
        floats(x, w)
        need(x.dim() >= 2 and w.shape == (x.shape[1],), "x (N, C, ...), w (C,)")
        ctx.save_for_backward(x, w)
        return torch.where(x > 0, x, x * w.view(1, -1, *[1] * (x.dim() - 2)))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        wb = w.view(1, -1, *[1] * (x.dim() - 2))
        gx = torch.where(x > 0, g, g * wb)
        gw = (
            torch.where(x > 0, torch.zeros_like(x), g * x)
            .transpose(0, 1)
            .reshape(len(w), -1)
            .sum(1)
        )
        return gx, gw


class ChannelPReLULast(ChannelPReLU):
    # the weight is taken along the last axis whenever its length fits there
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        on_last = w.numel() == x.shape[-1]
        wb = w if on_last else w.view(1, -1, *[1] * (x.dim() - 2))
        gx = torch.where(x > 0, g, g * wb)
        t = torch.where(x > 0, torch.zeros_like(x), g * x)
        gw = (
            t.reshape(-1, w.numel()).sum(0)
            if on_last
            else t.transpose(0, 1).reshape(len(w), -1).sum(1)
        )
        return gx, gw


# https://github.com/flagos-ai/FlagGems/issues/4992
add(
    "prelu_channel_axis",
    ChannelPReLULast.apply,
    ChannelPReLU.apply,
    lambda: (rn(2, 3, 4, seed=1), ru(3, seed=2, lo=0.1, hi=0.5)),
    "per-channel slope indexed along the last axis when its length happens to equal C",
    source="https://github.com/flagos-ai/FlagGems/issues/4992",
    field="activation",
    shows="x of 3 or more dims whose last size equals C",
)


class LearnedLeaky(Function):
    """y = x where x > 0, else a * x, a one learnable number."""

    @staticmethod
    def forward(ctx, x, a):
        floats(x, a)
        need(a.dim() == 0, "a must be 0-dim")
        ctx.save_for_backward(x, a)
        return torch.where(x > 0, x, a * x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, a = ctx.saved_tensors
        zero = torch.zeros_like(x)
        return torch.where(x > 0, g, a * g), torch.where(x > 0, zero, g * x).sum()


class LearnedLeakyByOutput(LearnedLeaky):
    # looks at the sign of the output instead of the input
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, a = ctx.saved_tensors
        y = torch.where(x > 0, x, a * x)
        zero = torch.zeros_like(x)
        return torch.where(y > 0, g, a * g), torch.where(y > 0, zero, g * x).sum()


# https://github.com/PaddlePaddle/Paddle/pull/12538
add(
    "leaky_sign_of_output",
    LearnedLeakyByOutput.apply,
    LearnedLeaky.apply,
    lambda: (rn(4, 5, seed=3), sc(0.25)),
    "branch chosen by the sign of the output, which is right only for a positive slope",
    source="https://github.com/PaddlePaddle/Paddle/pull/12538",
    field="activation",
    shows="a negative slope",
)


class Snake(Function):
    """x + sin(a x)^2 / a, a > 0 per channel (last axis)."""

    @staticmethod
    def forward(ctx, x, a):
        floats(x, a)
        need(a.dim() == 1 and x.dim() >= 1 and x.shape[-1] == a.shape[0], "x (..., C), a (C,)")
        need(bool((a > 0).all()), "a must be positive")
        ctx.save_for_backward(x, a)
        z, b = x.to(f64), a.to(f64)
        return (z + torch.sin(b * z) ** 2 / b).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, a = ctx.saved_tensors
        z, b, h = x.to(f64), a.to(f64), g.to(f64)
        s2 = torch.sin(2 * b * z)
        gx = h * (1 + s2)
        ga = h * (z * s2 / b - (torch.sin(b * z) / b) ** 2)
        return gx.to(g.dtype), ga.reshape(-1, a.shape[0]).sum(0).to(g.dtype)


class SnakeNoQuotient(Snake):
    @staticmethod
    def backward(ctx, g):
        x, a = ctx.saved_tensors
        z, b, h = x.to(f64), a.to(f64), g.to(f64)
        s2 = torch.sin(2 * b * z)
        return (h * (1 + s2)).to(g.dtype), (h * z * s2 / b).reshape(-1, a.shape[0]).sum(0).to(
            g.dtype
        )


add(
    "snake_alpha_term",
    SnakeNoQuotient.apply,
    Snake.apply,
    lambda: (rn(4, 3, seed=4), ru(3, seed=5, lo=0.5, hi=2.0)),
    "the 1/a in front is not differentiated: the -sin^2/a^2 term of alpha's gradient is missing",
    field="activation",
)


class Swish(Function):
    """x * sigmoid(b x), learnable b; twice differentiable."""

    @staticmethod
    def forward(ctx, x, b):
        floats(x, b)
        need(b.dim() == 0, "b must be 0-dim")
        ctx.save_for_backward(x, b)
        return x * torch.sigmoid(b * x)

    @staticmethod
    def backward(ctx, g):
        x, b = ctx.saved_tensors
        s = torch.sigmoid(b * x)
        d = s * torch.sigmoid(-b * x)
        return g * (s + b * x * d), (g * x * x * d).sum()


class SwishSavedSigmoid(Swish):
    @staticmethod
    def forward(ctx, x, b):
        floats(x, b)
        need(b.dim() == 0, "b must be 0-dim")
        s = torch.sigmoid(b * x)
        ctx.save_for_backward(x, b, s)
        return x * s

    @staticmethod
    def backward(ctx, g):
        x, b, s = ctx.saved_tensors  # s is neither an input nor an output
        return g * (s + b * x * s * (1 - s)), (g * x * x * s * (1 - s)).sum()


# https://github.com/pytorch/pytorch/issues/58509
add(
    "swish_saved_intermediate",
    SwishSavedSigmoid.apply,
    Swish.apply,
    lambda: (rn(6, seed=6), sc(1.3)),
    "an intermediate is saved: first order right, second order silently treats it as a constant",
    source="https://github.com/pytorch/pytorch/issues/58509",
    field="activation",
    shows="second order",
)


class GeluTanh(Function):
    K = math.sqrt(2 / math.pi)

    @staticmethod
    def forward(ctx, x):
        floats(x)
        ctx.save_for_backward(x)
        return 0.5 * x * (1 + torch.tanh(GeluTanh.K * (x + 0.044715 * x**3)))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        t = torch.tanh(GeluTanh.K * (x + 0.044715 * x**3))
        return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * GeluTanh.K * (1 + 3 * 0.044715 * x**2))


class GeluTanhForgot3(GeluTanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        t = torch.tanh(GeluTanh.K * (x + 0.044715 * x**3))
        return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * GeluTanh.K * (1 + 0.044715 * x**2))


add(
    "gelu_tanh_cubic",
    GeluTanhForgot3.apply,
    GeluTanh.apply,
    lambda: (rn(3, 5, seed=7),),
    "d(x^3) written as x^2: the factor 3 is missing",
    field="activation",
)


class Softplus(Function):
    @staticmethod
    def forward(ctx, x):
        floats(x)
        ctx.save_for_backward(x)
        return x.clamp_min(0) + torch.log1p(torch.exp(-x.abs()))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.sigmoid(x)


class SoftplusNaive(Softplus):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        e = torch.exp(x)
        return g * e / (1 + e)


add(
    "softplus_overflow",
    SoftplusNaive.apply,
    Softplus.apply,
    lambda: (rn(7, seed=8, dtype=f32),),
    "e^x / (1 + e^x) is inf / inf for a large input, though the forward is careful",
    field="activation",
    shows="x above about 88 in float32 (709 in float64)",
)


# ---------------------------------------------------------------- quantizers
class Pact(Function):
    """clamp(x, 0, alpha), learnable alpha > 0."""

    @staticmethod
    def forward(ctx, x, alpha):
        floats(x, alpha)
        need(alpha.dim() == 0 and bool(alpha > 0), "alpha must be 0-dim and positive")
        ctx.save_for_backward(x, alpha)
        return torch.minimum(x.clamp_min(0), alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, alpha = ctx.saved_tensors
        zero = torch.zeros_like(x)
        gx = torch.where((x > 0) & (x < alpha), g, zero)
        return gx, torch.where(x >= alpha, g, zero).sum()


class PactUpperOnly(Pact):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, alpha = ctx.saved_tensors
        zero = torch.zeros_like(x)
        return torch.where(x < alpha, g, zero), torch.where(x >= alpha, g, zero).sum()


add(
    "pact_lower_mask",
    PactUpperOnly.apply,
    Pact.apply,
    lambda: (ru(3, 6, seed=9, lo=0.05, hi=1.9), sc(1.0)),
    "the gradient is not stopped below 0 (written with post-ReLU inputs in mind)",
    field="quantizer",
    shows="negative inputs",
)


class SoftQuant(Function):
    """s * soft_round(clamp(x / s, qn, qp)); soft_round(u) = u - 0.9 sin(2 pi u) / (2 pi)."""

    @staticmethod
    def forward(ctx, x, s, qn=-8, qp=7):
        floats(x, s)
        need(s.dim() == 0 and bool(s > 0), "s must be 0-dim and positive")
        ctx.save_for_backward(x, s)
        ctx.q = (qn, qp)
        u = (x / s).clamp(qn, qp)
        return s * (u - 0.9 * torch.sin(2 * math.pi * u) / (2 * math.pi))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        qn, qp = ctx.q
        r = x / s
        u = r.clamp(qn, qp)
        inside = (r >= qn) & (r <= qp)
        zero = torch.zeros_like(x)
        slope = torch.where(inside, 1 - 0.9 * torch.cos(2 * math.pi * u), zero)
        value = u - 0.9 * torch.sin(2 * math.pi * u) / (2 * math.pi)
        gs = (g * (value - torch.where(inside, r, zero) * slope)).sum()
        return g * slope, gs, None, None


class SoftQuantNoMask(SoftQuant):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        _, gs, _, _ = SoftQuant.backward(ctx, g)
        u = (x / s).clamp(*ctx.q)
        return g * (1 - 0.9 * torch.cos(2 * math.pi * u)), gs, None, None


def _sq(fn):
    return lambda x, s, qn=-8, qp=7: wide(fn)(x, s, qn, qp)


# https://github.com/microsoft/nni/pull/3160
add(
    "soft_quant_range_mask",
    _sq(SoftQuantNoMask),
    _sq(SoftQuant),
    lambda: (rn(4, 5, seed=10, scale=0.15), sc(0.1)),
    "the input's gradient passes outside the quantizer's range too",
    source="https://github.com/microsoft/nni/pull/3160",
    field="quantizer",
    shows="inputs outside [qn s, qp s]",
)


# ---------------------------------------------------------------- losses
class WeightedNLL(Function):
    @staticmethod
    def forward(ctx, logp, target, weight):
        floats(logp)
        no_grad_for(ctx, 2)
        need(logp.dim() == 2 and target.shape == logp.shape[:1], "logp (N, C), target (N,)")
        if weight is None:
            w = torch.ones_like(logp[:, 0])
        else:
            floats(logp, weight)
            w = weight[target]
        need(bool(w.sum() > 0), "the weights of the targets must have a positive sum")
        ctx.save_for_backward(target, w)
        ctx.shape = logp.shape
        return -(w * logp.gather(1, target[:, None])[:, 0]).sum() / w.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        target, w = ctx.saved_tensors
        gx = torch.zeros(ctx.shape, dtype=g.dtype)
        return gx.scatter(1, target[:, None], (-g * w / w.sum())[:, None]), None, None


class WeightedNLLByCount(WeightedNLL):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        target, w = ctx.saved_tensors
        gx = torch.zeros(ctx.shape, dtype=g.dtype)
        return gx.scatter(1, target[:, None], (-g * w / len(w))[:, None]), None, None


def _nll(fn):
    return lambda logp, target, weight=None: fn.apply(logp, target, weight)


# https://github.com/pytorch/pytorch/issues/31295 https://github.com/torch/nn/issues/985
add(
    "nll_mean_denominator",
    _nll(WeightedNLLByCount),
    _nll(WeightedNLL),
    lambda: (
        F.log_softmax(rn(5, 4, seed=11, grad=False), 1).requires_grad_(),
        torch.tensor([1, 0, 3, 3, 2]),
    ),
    "mean reduction divides by N in the backward, by the sum of the weights in the forward",
    source="https://github.com/pytorch/pytorch/issues/31295",
    field="loss",
    shows="class weights whose sum over the targets is not N",
)


class CrossEntropy(Function):
    @staticmethod
    def forward(ctx, x, target, reduction):
        floats(x)
        need(x.dim() == 2 and target.shape == x.shape[:1] and len(x) > 0, "x (N, C), target (N,)")
        need(reduction in ("none", "mean", "sum"), "reduction")
        lp = torch.log_softmax(x, 1)
        ctx.save_for_backward(lp, target)
        ctx.reduction = reduction
        loss = -lp.gather(1, target[:, None])[:, 0]
        return loss if reduction == "none" else getattr(loss, reduction)()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        lp, target = ctx.saved_tensors
        gx = lp.exp()
        gx.scatter_add_(1, target[:, None], -torch.ones_like(gx[:, :1]))
        if ctx.reduction == "mean":
            gx = gx / len(gx)
        return gx * (g[:, None] if ctx.reduction == "none" else g), None, None


class CrossEntropyFirst(CrossEntropy):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        lp, target = ctx.saved_tensors
        gx = lp.exp()
        gx.scatter_add_(1, target[:, None], -torch.ones_like(gx[:, :1]))
        if ctx.reduction == "mean":
            gx = gx / len(gx)
        return gx * g.reshape(-1)[0], None, None  # one scalar for every row


def _ce(fn):
    return lambda x, target, reduction="none": fn.apply(x, target, reduction)


# https://github.com/linkedin/Liger-Kernel/pull/1298
add(
    "cross_entropy_none_scalar_grad",
    _ce(CrossEntropyFirst),
    _ce(CrossEntropy),
    lambda: (rn(4, 3, seed=12), torch.tensor([0, 2, 1, 2])),
    "with reduction='none' every row is scaled by the first row's incoming gradient",
    source="https://github.com/linkedin/Liger-Kernel/pull/1298",
    field="loss",
)


class SmoothedCE(Function):
    @staticmethod
    def forward(ctx, x, target, eps, reduction):
        floats(x)
        need(x.dim() == 2 and target.shape == x.shape[:1] and len(x) > 0, "x (N, C), target (N,)")
        need(0 <= eps < 1 and reduction in ("mean", "sum"), "eps in [0, 1); reduction mean or sum")
        lp = torch.log_softmax(x, 1)
        q = torch.full_like(lp, eps / x.shape[1])
        q.scatter_add_(1, target[:, None], torch.full_like(lp[:, :1], 1 - eps))
        ctx.save_for_backward(lp, q)
        ctx.reduction = reduction
        loss = -(q * lp).sum()
        return loss / len(x) if reduction == "mean" else loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        lp, q = ctx.saved_tensors
        gx = g * (lp.exp() - q)
        return (gx / len(gx) if ctx.reduction == "mean" else gx), None, None, None


class SmoothedCEAlwaysMean(SmoothedCE):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        lp, q = ctx.saved_tensors
        return g * (lp.exp() - q) / len(lp), None, None, None


def _sce(fn):
    return lambda x, target, eps=0.1, reduction="mean": fn.apply(x, target, eps, reduction)


# https://github.com/paiml/aprender/pull/2182
add(
    "smoothed_ce_sum",
    _sce(SmoothedCEAlwaysMean),
    _sce(SmoothedCE),
    lambda: (rn(5, 4, seed=13), torch.tensor([3, 1, 0, 2, 1])),
    "the backward divides by the batch size whatever the reduction",
    source="https://github.com/paiml/aprender/pull/2182",
    field="loss",
    shows="reduction='sum'",
)


class CrfLogZ(Function):
    """Log-partition of a linear-chain CRF: emissions (T, K), transitions (K, K)."""

    @staticmethod
    def forward(ctx, em, tr):
        floats(em, tr)
        T, K = em.shape
        need(T >= 1 and tr.shape == (K, K), "em (T, K), tr (K, K)")
        a = [em[0]]
        for t in range(1, T):
            a.append(torch.logsumexp(a[-1][:, None] + tr, 0) + em[t])
        b = [torch.zeros_like(em[0])]
        for t in range(T - 1, 0, -1):
            b.append(torch.logsumexp(tr + (em[t] + b[-1])[None], 1))
        b.reverse()
        z = torch.logsumexp(a[-1], 0)
        gem = torch.stack([(x + y - z).exp() for x, y in zip(a, b, strict=False)])
        gtr = torch.zeros_like(tr)
        for t in range(1, T):
            gtr = gtr + (a[t - 1][:, None] + tr + (em[t] + b[t])[None] - z).exp()
        ctx.save_for_backward(gem, gtr)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gem, gtr = ctx.saved_tensors
        return g * gem, g * gtr


class CrfLogZIgnore(CrfLogZ):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return ctx.saved_tensors


# https://github.com/SeanNaren/warp-ctc/issues/69
add(
    "crf_ignores_grad_output",
    CrfLogZIgnore.apply,
    CrfLogZ.apply,
    lambda: (rn(4, 3, seed=14), rn(3, 3, seed=15)),
    "gradients are computed in the forward and returned as they are: scaling the loss has no effect",
    source="https://github.com/SeanNaren/warp-ctc/issues/69",
    field="structured prediction",
)


class FocalLoss(Function):
    """Mean binary focal loss on logits; target 0 or 1."""

    @staticmethod
    def forward(ctx, x, target, gamma):
        floats(x)
        no_grad_for(ctx, 1)
        need(target.shape == x.shape and x.numel() > 0, "target must have x's shape")
        need(
            bool(((target == 0) | (target == 1)).all()) and gamma >= 0, "targets 0 or 1, gamma >= 0"
        )
        sign = 2 * target.to(x.dtype) - 1
        ctx.save_for_backward(x, sign)
        ctx.gamma = gamma
        z = x * sign
        return (torch.sigmoid(-z) ** gamma * F.softplus(-z)).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, sign = ctx.saved_tensors
        z = x * sign
        q = torch.sigmoid(-z)
        d = -(q**ctx.gamma) * (q + ctx.gamma * torch.sigmoid(z) * F.softplus(-z))
        return g * d * sign / x.numel(), None, None


class FocalLossDetached(FocalLoss):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, sign = ctx.saved_tensors
        q = torch.sigmoid(-x * sign)
        return g * -(q ** (ctx.gamma + 1)) * sign / x.numel(), None, None


def _focal(fn):
    return lambda x, target, gamma=2.0: fn.apply(x, target, gamma)


# https://github.com/kuangliu/pytorch-retinanet/issues/12
add(
    "focal_factor_constant",
    _focal(FocalLossDetached),
    _focal(FocalLoss),
    lambda: (rn(8, seed=16), torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])),
    "the modulating factor (1 - p)^gamma is taken for a constant weight",
    source="https://github.com/kuangliu/pytorch-retinanet/issues/12",
    field="loss",
)


class Triplet(Function):
    @staticmethod
    def forward(ctx, a, p, n, margin):
        floats(a, p, n)
        need(a.dim() == 2 and a.shape == p.shape == n.shape and len(a) > 0, "a, p, n (N, D)")
        h = ((a - p) ** 2).sum(1) - ((a - n) ** 2).sum(1) + margin
        ctx.save_for_backward(a, p, n, h)
        return h.clamp_min(0).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, p, n, h = ctx.saved_tensors
        c = (2 * g / len(a)) * (h > 0).to(a.dtype)[:, None]
        return c * (n - p), c * (p - a), c * (a - n), None


class TripletSwapped(Triplet):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        ga, gp, gn, _ = Triplet.backward(ctx, g)
        return ga, gn, gp, None


def _tri(fn):
    return lambda a, p, n, margin=1.0: fn.apply(a, p, n, margin)


add(
    "triplet_wrong_order",
    _tri(TripletSwapped),
    _tri(Triplet),
    lambda: (rn(4, 3, seed=17), rn(4, 3, seed=18), rn(4, 3, seed=19)),
    "the gradients of the positive and the negative are returned in each other's place",
    field="contrastive learning",
)


class InfoNCE(Function):
    @staticmethod
    def forward(ctx, q, k, log_t):
        floats(q, k, log_t)
        need(
            q.dim() == 2 and q.shape == k.shape and log_t.dim() == 0 and len(q) > 0,
            "q, k (N, D), log_t 0-dim",
        )
        need(float(log_t) <= 10, "log_t above 10")
        lp = torch.log_softmax(q @ k.T * log_t.exp(), 1)
        ctx.save_for_backward(q, k, log_t, lp)
        return -lp.diagonal().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, log_t, lp = ctx.saved_tensors
        s = log_t.exp()
        d = lp.exp()
        d.diagonal().sub_(1)
        d = d * (g / len(q))
        return s * d @ k, s * d.T @ q, (d * (q @ k.T)).sum() * s


class InfoNCENoTemperature(InfoNCE):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gq, gk, _ = InfoNCE.backward(ctx, g)
        return gq, gk, None


# a None for a learnable argument: https://github.com/unslothai/unsloth/pull/4550
add(
    "infonce_temperature_none",
    wide(InfoNCENoTemperature),
    wide(InfoNCE),
    lambda: (rn(4, 3, seed=20), rn(4, 3, seed=21), sc(0.5)),
    "None for the learnable temperature: it silently never trains",
    source="https://github.com/unslothai/unsloth/pull/4550",
    field="contrastive learning",
)


class GaussKL(Function):
    """KL(N(mu, exp(logvar)) || N(0, 1)), summed over features, mean over the batch."""

    @staticmethod
    def forward(ctx, mu, logvar):
        floats(mu, logvar)
        need(mu.dim() == 2 and mu.shape == logvar.shape and mu.numel() > 0, "mu, logvar (N, D)")
        need(bool((logvar < 80).all()), "a log-variance of 80 or more overflows")
        ctx.save_for_backward(mu, logvar)
        return 0.5 * (mu**2 + torch.expm1(logvar) - logvar).sum() / len(mu)

    @staticmethod
    def backward(ctx, g):
        mu, logvar = ctx.saved_tensors
        return g * mu / len(mu), g * 0.5 * torch.expm1(logvar) / len(mu)


class GaussKLHalf(GaussKL):
    @staticmethod
    def backward(ctx, g):
        mu, logvar = ctx.saved_tensors
        return g * mu / len(mu), g * torch.expm1(logvar) / len(mu)


add(
    "gauss_kl_half",
    GaussKLHalf.apply,
    GaussKL.apply,
    lambda: (rn(4, 3, seed=22), rn(4, 3, seed=23, scale=0.5)),
    "the factor 1/2 of the log-variance's gradient is missing",
    field="probability",
)


class CoxLoss(Function):
    """Negative Cox partial log-likelihood (Breslow) of risk scores r, mean over events."""

    @staticmethod
    def forward(ctx, r, time, event):
        floats(r)
        no_grad_for(ctx, 1, 2)
        need(r.dim() == 1 and r.shape == time.shape == event.shape, "r, time, event (N,)")
        need(bool(event.any()), "at least one event is needed")
        risk = time[None] >= time[:, None]
        lr = r[None].expand(len(r), -1).masked_fill(~risk, -math.inf)
        ev = event.to(r.dtype)
        ctx.save_for_backward(torch.softmax(lr, 1), ev, time)
        return -(ev * (r - torch.logsumexp(lr, 1))).sum() / ev.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        p, ev, _ = ctx.saved_tensors
        return g * (ev @ p - ev) / ev.sum(), None, None


class CoxLossSortedOrder(CoxLoss):
    # works on the samples sorted by falling time and forgets to undo the sort
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        p, ev, time = ctx.saved_tensors
        order = torch.argsort(time, descending=True)
        p, e = p[order][:, order], ev[order]
        return g * (e @ p - e) / ev.sum(), None, None


add(
    "cox_unsorted",
    CoxLossSortedOrder.apply,
    CoxLoss.apply,
    lambda: (
        rn(6, seed=24),
        torch.tensor([9.0, 7.5, 6.0, 4.0, 2.5, 1.0], dtype=f64),
        torch.tensor([True, False, True, True, False, True]),
    ),
    "the gradient is returned in sorted order",
    field="survival analysis",
    shows="times not already sorted, falling",
)


# ---------------------------------------------------------------- normalization
class BatchNormTrain(Function):
    @staticmethod
    def forward(ctx, x, w, b):
        floats(x, w, b)
        need(
            x.dim() == 2 and len(x) > 1 and w.shape == b.shape == x.shape[1:],
            "x (N>1, C), w, b (C,)",
        )
        xc = x - x.mean(0)
        rstd = (xc.pow(2).mean(0) + 1e-5).rsqrt()
        ctx.save_for_backward(xc * rstd, rstd, w)
        return xc * rstd * w + b

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        xh, rstd, w = ctx.saved_tensors
        gw, gb = (g * xh).sum(0), g.sum(0)
        n = len(xh)
        return w * rstd * (g - gb / n - xh * gw / n), gw, gb


class BatchNormStatsConstant(BatchNormTrain):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        xh, rstd, w = ctx.saved_tensors
        return g * w * rstd, (g * xh).sum(0), g.sum(0)


# https://discuss.pytorch.org/t/batchnorm-and-back-propagation/65765
add(
    "batchnorm_stats_constant",
    wide(BatchNormStatsConstant),
    wide(BatchNormTrain),
    lambda: (rn(6, 3, seed=25), ru(3, seed=26, lo=0.5, hi=1.5), rn(3, seed=27)),
    "batch mean and variance are taken for constants",
    source="https://discuss.pytorch.org/t/batchnorm-and-back-propagation/65765",
    field="normalization",
)


class BatchNormModes(Function):
    """x (N, C, L) normalised by batch statistics (training) or by the given running ones."""

    @staticmethod
    def forward(ctx, x, w, b, rm, rv, training):
        floats(x, w, b, rm, rv)
        no_grad_for(ctx, 3, 4)
        need(
            x.dim() == 3 and w.shape == b.shape == rm.shape == rv.shape == (x.shape[1],),
            "x (N, C, L)",
        )
        need(bool((rv >= 0).all()), "a running variance is negative")
        if training:
            need(x.shape[0] * x.shape[2] > 1, "more than one value per channel is needed")
            m = x.mean((0, 2))
            v = (x - m[:, None]).pow(2).mean((0, 2))
        else:
            m, v = rm, rv
        rstd = (v + 1e-5).rsqrt()
        xh = (x - m[:, None]) * rstd[:, None]
        ctx.save_for_backward(xh, rstd, w)
        ctx.training = training
        return xh * w[:, None] + b[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        xh, rstd, w = ctx.saved_tensors
        gw, gb = (g * xh).sum((0, 2)), g.sum((0, 2))
        gx = g
        if ctx.training:
            n = xh.shape[0] * xh.shape[2]
            gx = g - (gb / n)[:, None] - xh * (gw / n)[:, None]
        return gx * (w * rstd)[:, None], gw, gb, None, None, None


class BatchNormTrainFormula(BatchNormModes):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        ctx.training = True
        return BatchNormModes.backward(ctx, g)


def _bnm(fn):
    return lambda x, w, b, rm, rv, training=True: wide(fn)(x, w, b, rm, rv, training)


add(
    "batchnorm_eval_formula",
    _bnm(BatchNormTrainFormula),
    _bnm(BatchNormModes),
    lambda: (
        rn(3, 2, 4, seed=28),
        ru(2, seed=29, lo=0.5, hi=1.5),
        rn(2, seed=30),
        torch.zeros(2, dtype=f64),
        torch.ones(2, dtype=f64),
    ),
    "the training-mode gradient is used in eval mode as well",
    field="normalization",
    shows="training=False",
)


class RMSNormBlocks(Function):
    """RMS norm with a weight; the weight's gradient is summed in blocks of 4 rows."""

    BLOCK = 4

    @staticmethod
    def forward(ctx, x, w):
        floats(x, w)
        need(x.dim() == 2 and len(x) > 0 and w.shape == x.shape[1:], "x (N, D), w (D,)")
        r = (x.pow(2).mean(1, keepdim=True) + 1e-6).rsqrt()
        ctx.save_for_backward(x, w, r)
        return x * r * w

    @staticmethod
    def weight_grad(g, xh, blocks):
        total = torch.zeros_like(g[0])
        for i in range(blocks):
            rows = slice(4 * i, 4 * i + 4)
            total = total + (g[rows] * xh[rows]).sum(0)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, r = ctx.saved_tensors
        xh, gh = x * r, g * w
        gx = r * (gh - xh * (gh * xh).mean(1, keepdim=True))
        return gx, RMSNormBlocks.weight_grad(g, xh, (len(x) + 3) // 4)


class RMSNormBlocksFloor(RMSNormBlocks):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, r = ctx.saved_tensors
        xh, gh = x * r, g * w
        gx = r * (gh - xh * (gh * xh).mean(1, keepdim=True))
        return gx, RMSNormBlocks.weight_grad(g, xh, len(x) // 4)


# https://github.com/BobMcDear/attorch/issues/18
add(
    "rmsnorm_last_block",
    wide(RMSNormBlocksFloor),
    wide(RMSNormBlocks),
    lambda: (rn(8, 3, seed=31), ru(3, seed=32, lo=0.5, hi=1.5)),
    "the number of row blocks is rounded down: the rows of a last, partial block are left out of the weight's gradient",
    source="https://github.com/BobMcDear/attorch/issues/18",
    field="normalization",
    shows="a number of rows that is no multiple of 4",
)


class GroupNorm(Function):
    @staticmethod
    def forward(ctx, x, w, b, groups):
        floats(x, w, b)
        need(x.dim() == 3 and w.shape == b.shape == (x.shape[1],), "x (N, C, L), w, b (C,)")
        need(
            x.shape[1] % groups == 0 and x.shape[1] // groups * x.shape[2] > 1,
            "groups must divide C",
        )
        xg = x.reshape(len(x), groups, -1)
        xc = xg - xg.mean(2, keepdim=True)
        rstd = (xc.pow(2).mean(2, keepdim=True) + 1e-5).rsqrt()
        xh = (xc * rstd).reshape(x.shape)
        ctx.save_for_backward(xh, rstd, w)
        ctx.groups = groups
        return xh * w[:, None] + b[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        xh, rstd, w = ctx.saved_tensors
        gh = (g * w[:, None]).reshape(len(xh), ctx.groups, -1)
        xg = xh.reshape(gh.shape)
        gx = rstd * (gh - gh.mean(2, keepdim=True) - xg * (gh * xg).mean(2, keepdim=True))
        return gx.reshape(xh.shape), (g * xh).sum((0, 2)), g.sum((0, 2)), None


class GroupNormPerChannel(GroupNorm):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        xh, rstd, w = ctx.saved_tensors
        gh = g * w[:, None]
        r = rstd.repeat_interleave(xh.shape[1] // ctx.groups, 1)
        gx = r * (gh - gh.mean(2, keepdim=True) - xh * (gh * xh).mean(2, keepdim=True))
        return gx, (g * xh).sum((0, 2)), g.sum((0, 2)), None


def _gn(fn):
    return lambda x, w, b, groups=2: wide(fn)(x, w, b, groups)


add(
    "groupnorm_axis",
    _gn(GroupNormPerChannel),
    _gn(GroupNorm),
    lambda: (rn(2, 4, 3, seed=33), ru(4, seed=34, lo=0.5, hi=1.5), rn(4, seed=35)),
    "the two means of the input's gradient run over a channel instead of its group",
    field="normalization",
)


# ---------------------------------------------------------------- attention, positions
class Attention(Function):
    @staticmethod
    def forward(ctx, q, k, v):
        floats(q, k, v)
        need(
            q.dim() >= 2
            and q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
            and q.shape[-1] == k.shape[-1]
            and k.shape[-2] == v.shape[-2],
            "q (..., T, D), k (..., S, D), v (..., S, E)",
        )
        ctx.save_for_backward(q, k, v)
        return (Attention.probs(q.to(f64), k.to(f64)) @ v.to(f64)).to(q.dtype)

    @staticmethod
    def probs(q, k):
        return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (q, k, v), dt = [t.to(f64) for t in ctx.saved_tensors], g.dtype
        p, g, scale = Attention.probs(q, k), g.to(f64), 1 / math.sqrt(q.shape[-1])
        gp = g @ v.mT
        gs = p * (gp - (p * gp).sum(-1, keepdim=True)) * scale
        return (gs @ k).to(dt), (gs.mT @ q).to(dt), (p.mT @ g).to(dt)


class AttentionKeyScale(Attention):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (q, k, v), dt = [t.to(f64) for t in ctx.saved_tensors], g.dtype
        p, g, scale = Attention.probs(q, k), g.to(f64), 1 / math.sqrt(q.shape[-1])
        gp = g @ v.mT
        gs = p * (gp - (p * gp).sum(-1, keepdim=True))
        return (gs @ k * scale).to(dt), (gs.mT @ q).to(dt), (p.mT @ g).to(dt)


add(
    "attention_key_scale",
    AttentionKeyScale.apply,
    Attention.apply,
    lambda: (rn(3, 4, seed=36), rn(3, 4, seed=37), rn(3, 4, seed=38)),
    "1/sqrt(d) is applied to the query's gradient only",
    field="attention",
)


class RowKernelAttention(Attention):
    # its "kernel" walks grad_output with row stride D, checking only the last stride
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if g.stride(-1) != 1 or 0 in g.stride():
            g = g.contiguous()
        strides, n = [], 1
        for s in reversed(g.shape):
            strides.insert(0, n)
            n *= s
        return Attention.backward(ctx, torch.as_strided(g, g.shape, strides))


# https://github.com/Dao-AILab/flash-attention/issues/355
add(
    "attention_grad_row_stride",
    RowKernelAttention.apply,
    Attention.apply,
    lambda: (
        rn(3, 2, seed=39, dtype=f32),
        rn(4, 2, seed=40, dtype=f32),
        rn(4, 2, seed=41, dtype=f32),
    ),
    "grad_output is read as if its rows lay one after the other (only its last stride is checked)",
    source="https://github.com/Dao-AILab/flash-attention/issues/355",
    field="attention",
    shows="a grad_output that is a column slice of a wider one (as behind torch.cat), last stride 1",
)


def _angles(T, half, like):
    freq = 10000.0 ** (-torch.arange(half, dtype=f64) / half)
    a = torch.arange(T, dtype=f64)[:, None] * freq
    return a.cos().to(like.dtype), a.sin().to(like.dtype)


class Rope(Function):
    """Rotary embedding, halves layout: x (..., T, D), D even."""

    @staticmethod
    def forward(ctx, x):
        floats(x)
        need(x.dim() >= 2 and x.shape[-1] % 2 == 0, "x (..., T, D) with an even D")
        c, s = _angles(x.shape[-2], x.shape[-1] // 2, x)
        ctx.save_for_backward(c, s)
        a, b = x.chunk(2, -1)
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    @staticmethod
    def backward(ctx, g):
        c, s = ctx.saved_tensors
        a, b = g.chunk(2, -1)
        return torch.cat([a * c + b * s, b * c - a * s], -1)


class RopeSameWay(Rope):
    @staticmethod
    def backward(ctx, g):
        c, s = ctx.saved_tensors
        a, b = g.chunk(2, -1)
        return torch.cat([a * c - b * s, b * c + a * s], -1)


# the right rule, "the same rope with sin negated": https://github.com/huggingface/candle/pull/3612
add(
    "rope_rotation_sign",
    RopeSameWay.apply,
    Rope.apply,
    lambda: (rn(3, 4, seed=42),),
    "the gradient is rotated forwards again instead of back",
    source="https://github.com/huggingface/candle/pull/3612",
    field="positional encoding",
)


class RopePairs(Function):
    """Rotary embedding, interleaved layout."""

    @staticmethod
    def forward(ctx, x):
        floats(x)
        need(x.dim() >= 2 and x.shape[-1] % 2 == 0, "x (..., T, D) with an even D")
        c, s = _angles(x.shape[-2], x.shape[-1] // 2, x)
        ctx.save_for_backward(c, s)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        c, s = ctx.saved_tensors
        a, b = g[..., 0::2], g[..., 1::2]
        return torch.stack([a * c + b * s, b * c - a * s], -1).reshape(g.shape)


class RopePairsInPlace(RopePairs):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        c, s = ctx.saved_tensors
        g = g.contiguous()  # a copy only if it was not
        a, b = g[..., 0::2].clone(), g[..., 1::2].clone()
        g[..., 0::2] = a * c + b * s
        g[..., 1::2] = b * c - a * s
        return g


# https://github.com/unslothai/unsloth/issues/5001
add(
    "rope_writes_grad_output",
    RopePairsInPlace.apply,
    RopePairs.apply,
    lambda: (rn(3, 4, seed=43),),
    "a contiguous grad_output is overwritten in place, so another branch that shares it gets a wrong gradient",
    source="https://github.com/unslothai/unsloth/issues/5001",
    field="positional encoding",
    shows="the output added to something else that needs a gradient (rope(x) + w)",
)


class RelPosBias(Function):
    """scores (..., T, S) + table[clip(j - i, -R, R) + R], table (2R + 1,)."""

    @staticmethod
    def forward(ctx, scores, table):
        floats(scores, table)
        need(
            scores.dim() >= 2 and table.dim() == 1 and len(table) % 2 == 1,
            "scores (..., T, S), table (2R+1,)",
        )
        R = len(table) // 2
        T, S = scores.shape[-2:]
        idx = (torch.arange(S)[None] - torch.arange(T)[:, None]).clamp(-R, R) + R
        ctx.save_for_backward(idx)
        ctx.n = len(table)
        return scores + table[idx]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (idx,) = ctx.saved_tensors
        gt = torch.zeros(ctx.n, dtype=g.dtype)
        return g.clone(), gt.index_add(0, idx.reshape(-1), g.sum_to_size(idx.shape).reshape(-1))


class RelPosBiasAssign(RelPosBias):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (idx,) = ctx.saved_tensors
        gt = torch.zeros(ctx.n, dtype=g.dtype)
        gt[idx.reshape(-1)] = g.reshape(-1, idx.numel()).sum(0)
        return g.clone(), gt


# https://github.com/pytorch/pytorch/issues/1528
add(
    "relpos_bias_duplicates",
    RelPosBiasAssign.apply,
    RelPosBias.apply,
    lambda: (rn(4, 4, seed=44), rn(5, seed=45)),
    "repeated table entries: the gradient is assigned, so only the last use counts",
    source="https://github.com/pytorch/pytorch/issues/1528",
    field="positional encoding",
)


class Embed(Function):
    @staticmethod
    def forward(ctx, idx, weight):
        floats(weight)
        need(weight.dim() == 2 and idx.dtype == torch.int64, "idx int64, weight (V, D)")
        need(
            idx.numel() == 0 or bool((idx >= 0).all() & (idx < len(weight)).all()),
            "index out of range",
        )
        ctx.save_for_backward(idx)
        ctx.shape = weight.shape
        return weight[idx]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (idx,) = ctx.saved_tensors
        gw = torch.zeros(ctx.shape, dtype=g.dtype)
        return None, gw.index_add(0, idx.reshape(-1), g.reshape(-1, ctx.shape[1]))


class EmbedAssign(Embed):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (idx,) = ctx.saved_tensors
        gw = torch.zeros(ctx.shape, dtype=g.dtype)
        gw[idx] = g
        return None, gw


# https://github.com/tenstorrent/tt-metal/issues/6232
add(
    "embedding_duplicates",
    EmbedAssign.apply,
    Embed.apply,
    lambda: (torch.tensor([[4, 1], [0, 3]]), rn(6, 3, seed=46)),
    "rows of a repeated index overwrite each other instead of adding up",
    source="https://github.com/tenstorrent/tt-metal/issues/6232",
    field="embedding",
    shows="an index that occurs twice",
)


# ---------------------------------------------------------------- filters, pooling, images
class CausalFIR(Function):
    """y[t] = sum_k h[k] x[t - k], x (B, T), h (K,), zeros before the start."""

    @staticmethod
    def forward(ctx, x, h):
        floats(x, h)
        need(x.dim() == 2 and h.dim() == 1 and len(h) > 0, "x (B, T), h (K,)")
        frames = F.pad(x, (len(h) - 1, 0)).unfold(-1, len(h), 1)  # (B, T, K)
        ctx.save_for_backward(frames, h)
        return frames @ h.flip(0)

    @staticmethod
    def taps(g, frames):
        return (g[..., None] * frames).sum((0, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        frames, h = ctx.saved_tensors
        gx = F.pad(g, (0, len(h) - 1)).unfold(-1, len(h), 1) @ h
        return gx, CausalFIR.taps(g, frames).flip(0)


class CausalFIRFlipped(CausalFIR):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        frames, h = ctx.saved_tensors
        gx = F.pad(g, (0, len(h) - 1)).unfold(-1, len(h), 1) @ h
        return gx, CausalFIR.taps(g, frames)


add(
    "fir_taps_flipped",
    CausalFIRFlipped.apply,
    CausalFIR.apply,
    lambda: (rn(2, 6, seed=47), rn(3, seed=48)),
    "the taps' gradient is in the unfolded frames' order, not flipped back",
    field="audio filter",
)


class AvgPoolCeil(Function):
    """Average over windows of k with stride k; a last window that overhangs averages what it has."""

    @staticmethod
    def forward(ctx, x, k):
        floats(x)
        need(x.dim() == 2 and k >= 1 and x.shape[1] > 0, "x (N, L), k >= 1")
        L = x.shape[1]
        n = -(-L // k)
        count = torch.full((n,), float(k), dtype=x.dtype)
        count[-1] = L - k * (n - 1)
        ctx.k, ctx.L = k, L
        ctx.save_for_backward(count)
        return F.pad(x, (0, n * k - L)).reshape(len(x), n, k).sum(2) / count

    @staticmethod
    def backward(ctx, g):
        (count,) = ctx.saved_tensors
        return (g / count).repeat_interleave(ctx.k, 1).narrow(1, 0, ctx.L), None


class AvgPoolCeilFullDivisor(AvgPoolCeil):
    @staticmethod
    def backward(ctx, g):
        return (g / ctx.k).repeat_interleave(ctx.k, 1).narrow(1, 0, ctx.L), None


def _pool(fn):
    return lambda x, k=2: fn.apply(x, k)


# https://github.com/pytorch/pytorch/issues/198119 https://github.com/tracel-ai/burn/issues/5604
add(
    "avgpool_ceil_divisor",
    _pool(AvgPoolCeilFullDivisor),
    _pool(AvgPoolCeil),
    lambda: (rn(2, 8, seed=49),),
    "the last, overhanging window is divided by the full kernel size in the backward",
    source="https://github.com/pytorch/pytorch/issues/198119",
    field="pooling",
    shows="a length that is no multiple of k",
)


class LinearResize(Function):
    """Linear interpolation of (N, L) to (N, out) with aligned corners."""

    @staticmethod
    def weights(L, out, dtype):
        pos = torch.arange(out, dtype=f64) * ((L - 1) / (out - 1))
        return (1 - (pos[:, None] - torch.arange(L, dtype=f64)).abs()).clamp_min(0).to(dtype)

    @staticmethod
    def forward(ctx, x, out):
        floats(x)
        need(x.dim() == 2 and x.shape[1] >= 2 and out >= 2, "x (N, L >= 2), out >= 2")
        ctx.L, ctx.out = x.shape[1], out
        return x @ LinearResize.weights(ctx.L, out, x.dtype).T

    @staticmethod
    def backward(ctx, g):
        return g @ LinearResize.weights(ctx.L, ctx.out, g.dtype), None


class LinearResizeWindow(LinearResize):
    @staticmethod
    def backward(ctx, g):
        W = LinearResize.weights(ctx.L, ctx.out, g.dtype)
        reach = -(-ctx.out // ctx.L)  # the scale of the other convention
        centre = torch.arange(ctx.L, dtype=f64) * ((ctx.out - 1) / (ctx.L - 1))
        near = (torch.arange(ctx.out, dtype=f64)[:, None] - centre).abs() <= reach
        return g @ (W * near), None


def _resize(fn):
    return lambda x, out=8: fn.apply(x, out)


# https://github.com/flagos-ai/FlagGems/issues/5218
add(
    "resize_window_short",
    _resize(LinearResizeWindow),
    _resize(LinearResize),
    lambda: (rn(2, 4, seed=50),),
    "an input gathers from a window sized for align_corners=False; farther outputs are dropped",
    source="https://github.com/flagos-ai/FlagGems/issues/5218",
    field="interpolation",
    shows="a large ratio from few samples (2 -> 10)",
)


class FlowWarp(Function):
    """img (H, W) sampled bilinearly at (i + flow[1], j + flow[0]), clamped to the border."""

    @staticmethod
    def corners(img, flow):
        H, W = img.shape
        y = torch.arange(H, dtype=img.dtype)[:, None] + flow[1]
        x = torch.arange(W, dtype=img.dtype)[None] + flow[0]
        iny, inx = (y >= 0) & (y <= H - 1), (x >= 0) & (x <= W - 1)
        y, x = y.clamp(0, H - 1), x.clamp(0, W - 1)
        y0, x0 = y.floor().clamp(0, H - 2), x.floor().clamp(0, W - 2)
        return (y - y0, x - x0, y0.long(), x0.long(), iny, inx)

    @staticmethod
    def forward(ctx, img, flow):
        floats(img, flow)
        need(
            img.dim() == 2 and min(img.shape) >= 2 and flow.shape == (2, *img.shape),
            "img (H, W), flow (2, H, W)",
        )
        ctx.save_for_backward(img, flow)
        fy, fx, y, x, _, _ = FlowWarp.corners(img, flow)
        return (1 - fy) * ((1 - fx) * img[y, x] + fx * img[y, x + 1]) + fy * (
            (1 - fx) * img[y + 1, x] + fx * img[y + 1, x + 1]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        img, flow = ctx.saved_tensors
        fy, fx, y, x, iny, inx = FlowWarp.corners(img, flow)
        W = img.shape[1]
        gi = torch.zeros(img.numel(), dtype=g.dtype)
        for dy, wy in ((0, 1 - fy), (1, fy)):
            for dx, wx in ((0, 1 - fx), (1, fx)):
                gi = gi.index_add(0, ((y + dy) * W + x + dx).reshape(-1), (g * wy * wx).reshape(-1))
        a, b, c, d = img[y, x], img[y, x + 1], img[y + 1, x], img[y + 1, x + 1]
        gx = g * inx * ((1 - fy) * (b - a) + fy * (d - c))
        gy = g * iny * ((1 - fx) * (c - a) + fx * (d - b))
        return gi.view(img.shape), torch.stack([gx, gy])


class FlowWarpSwapped(FlowWarp):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gi, gf = FlowWarp.backward(ctx, g)
        return gi, gf.flip(0)


add(
    "flow_warp_xy",
    FlowWarpSwapped.apply,
    FlowWarp.apply,
    lambda: (rn(4, 4, seed=51), ru(2, 4, 4, seed=52, lo=-0.8, hi=0.8)),
    "the flow's gradient is stacked (dy, dx), the flow itself is (dx, dy)",
    field="image warp",
)


class SmoothTV(Function):
    """Sum of sqrt(d^2 + 1e-4) over the horizontal and vertical differences of an image."""

    EPS = 1e-4

    @staticmethod
    def forward(ctx, x):
        floats(x)
        need(x.dim() == 2, "x (H, W)")
        ctx.save_for_backward(x)
        return sum((x.diff(dim=d).pow(2) + SmoothTV.EPS).sqrt().sum() for d in (0, 1))

    @staticmethod
    def grad(x):
        gx = torch.zeros(x.shape, dtype=x.dtype)
        for d in (0, 1):
            t = x.diff(dim=d)
            t = t / (t.pow(2) + SmoothTV.EPS).sqrt()
            n = x.shape[d]
            gx.narrow(d, 1, n - 1).add_(t)  # gx is new here
            gx.narrow(d, 0, n - 1).sub_(t)
        return gx

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        need(min(x.shape) >= 1, "empty image")
        return g * SmoothTV.grad(x)


class SmoothTVRowMajor(SmoothTV):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if 0 in x.stride():
            x = x.contiguous()
        return g * SmoothTV.grad(torch.as_strided(x, x.shape, (x.shape[1], 1)))


add(
    "tv_row_major_input",
    SmoothTVRowMajor.apply,
    SmoothTV.apply,
    lambda: (rn(4, 4, seed=53),),
    "the saved image is read as row-major memory, whatever its strides",
    field="image",
    shows="a transposed (or otherwise strided) image",
)


# ---------------------------------------------------------------- segments, sorting, cumulative
class SegmentSoftmax(Function):
    """Softmax of edge scores over the edges of each target node."""

    @staticmethod
    def forward(ctx, s, seg, n):
        floats(s)
        need(
            s.dim() == 1 and seg.shape == s.shape and seg.dtype == torch.int64,
            "s (E,), seg (E,) int64",
        )
        need(
            len(seg) == 0 or (int(seg.min()) >= 0 and int(seg.max()) < n), "segment id out of range"
        )
        m = torch.full((n,), -math.inf, dtype=s.dtype).scatter_reduce_(0, seg, s, "amax")
        e = (s - m[seg]).exp()
        p = e / torch.zeros(n, dtype=s.dtype).index_add_(0, seg, e)[seg]
        ctx.save_for_backward(p, seg)
        ctx.n = n
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        p, seg = ctx.saved_tensors
        dot = torch.zeros(ctx.n, dtype=g.dtype).index_add(0, seg, p * g)
        return p * (g - dot[seg]), None, None


class SegmentSoftmaxGlobal(SegmentSoftmax):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        p, _seg = ctx.saved_tensors
        return p * (g - (p * g).sum()), None, None


def _segs(fn):
    return lambda s, seg, n=4: fn.apply(s, seg, n)


add(
    "segment_softmax_global",
    _segs(SegmentSoftmaxGlobal),
    _segs(SegmentSoftmax),
    lambda: (rn(7, seed=54), torch.tensor([0, 2, 0, 1, 2, 2, 1])),
    "the dot product of the softmax rule is summed over all edges instead of each segment",
    field="graph layer",
)


class Maximum(Function):
    """max(a, b); at a tie each gets half."""

    @staticmethod
    def forward(ctx, a, b):
        floats(a, b)
        need(a.shape == b.shape, "same shapes")
        ctx.save_for_backward(a, b)
        return torch.maximum(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        wa = (a > b).to(g.dtype) + 0.5 * (a == b).to(g.dtype)
        return g * wa, g * (1 - wa)


class MaximumBoth(Maximum):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g * (a >= b), g * (b >= a)


# https://github.com/microsoft/onnxruntime/pull/7217
add(
    "maximum_ties",
    MaximumBoth.apply,
    Maximum.apply,
    lambda: (rn(2, 4, seed=55), rn(2, 4, seed=56)),
    "at a tie both get the whole gradient",
    source="https://github.com/microsoft/onnxruntime/pull/7217",
    field="element-wise",
    shows="equal entries",
)


class SortValues(Function):
    @staticmethod
    def forward(ctx, x):
        floats(x)
        need(x.dim() >= 1, "x (..., n)")
        v, i = torch.sort(x, dim=-1, descending=True, stable=True)
        ctx.save_for_backward(i)
        return v

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (i,) = ctx.saved_tensors
        return torch.zeros(i.shape, dtype=g.dtype).scatter(-1, i, g)


class SortValuesGather(SortValues):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (i,) = ctx.saved_tensors
        return g.gather(-1, i)


# https://github.com/ml-explore/mlx/issues/1428
add(
    "sort_inverse_permutation",
    SortValuesGather.apply,
    SortValues.apply,
    lambda: (rn(2, 5, seed=57),),
    "the permutation is applied to the gradient instead of its inverse",
    source="https://github.com/ml-explore/mlx/issues/1428",
    field="sorting",
)


class CumProd(Function):
    """Cumulative product along the last dim."""

    @staticmethod
    def forward(ctx, x):
        floats(x)
        need(x.dim() >= 1 and x.shape[-1] > 0, "x (..., n)")
        y = x.cumprod(-1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        gx, r = [], torch.zeros_like(g[..., 0])
        for i in range(x.shape[-1] - 1, -1, -1):
            r = g[..., i] + (x[..., i + 1] * r if i + 1 < x.shape[-1] else 0)
            gx.insert(0, r * y[..., i - 1] if i > 0 else r)
        return torch.stack(gx, -1)


class CumProdDivide(CumProd):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        s = (g * y).flip(-1).cumsum(-1).flip(-1)
        return torch.where(
            x == 0, torch.zeros_like(s), s / torch.where(x == 0, torch.ones_like(x), x)
        )


# https://github.com/tensorflow/tensorflow/issues/119430
add(
    "cumprod_zeros",
    CumProdDivide.apply,
    CumProd.apply,
    lambda: (rn(2, 5, seed=58),),
    "divides by the input, with 0 where the input is 0",
    source="https://github.com/tensorflow/tensorflow/issues/119430",
    field="cumulative op",
    shows="a zero in the input",
)


# ---------------------------------------------------------------- distances, linear algebra
class PNormDist(Function):
    """Distances of the rows of a (N, D) and b (M, D) in the p-norm, 1 <= p < inf."""

    @staticmethod
    def forward(ctx, a, b, p):
        floats(a, b)
        need(
            a.dim() == 2 and b.dim() == 2 and a.shape[1] == b.shape[1] > 0 and 1 <= p < math.inf,
            "a (N, D), b (M, D), p >= 1",
        )
        d = a[:, None] - b[None]
        m = d.abs().amax(-1, keepdim=True)
        safe = torch.where(m > 0, m, torch.ones_like(m))
        dist = safe * ((d / safe).abs() ** p).sum(-1, keepdim=True) ** (1 / p)
        ctx.save_for_backward(d, dist)
        ctx.p = p
        return dist[..., 0]

    @staticmethod
    def pull(g, d, dist, p):
        safe = torch.where(dist > 0, dist, torch.ones_like(dist))
        t = g[..., None] * d.sign() * (d.abs() / safe) ** (p - 1)
        return t.sum(1), -t.sum(0), None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return PNormDist.pull(g, *ctx.saved_tensors, ctx.p)


class PNormDistTwo(PNormDist):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return PNormDist.pull(g, *ctx.saved_tensors, 2.0)


def _pdist(fn):
    return lambda a, b, p=2.0: fn.apply(a, b, p)


# https://github.com/flagos-ai/FlagGems/issues/5023
add(
    "cdist_ignores_p",
    _pdist(PNormDistTwo),
    _pdist(PNormDist),
    lambda: (rn(3, 2, seed=59), rn(4, 2, seed=60)),
    "the backward is always that of p = 2",
    source="https://github.com/flagos-ai/FlagGems/issues/5023",
    field="distance",
    shows="p other than 2",
)


def _spd(n, seed, batch=()):
    a = rn(*batch, n, n, seed=seed, grad=False)
    return (a @ a.mT / n + torch.eye(n, dtype=f64)).requires_grad_()


class LogAbsDet(Function):
    @staticmethod
    def forward(ctx, A):
        floats(A)
        need(A.dim() >= 2 and A.shape[-1] == A.shape[-2], "A (..., n, n)")
        s, l = torch.linalg.slogdet(A)  # noqa: E741
        need(bool((s != 0).all()), "A is singular")
        ctx.save_for_backward(A)
        return l

    @staticmethod
    def backward(ctx, g):
        (A,) = ctx.saved_tensors
        return g[..., None, None] * torch.linalg.inv(A).mT


class LogAbsDetInverse(LogAbsDet):
    @staticmethod
    def backward(ctx, g):
        (A,) = ctx.saved_tensors
        return g[..., None, None] * torch.linalg.inv(A)


add(
    "logdet_transpose",
    LogAbsDetInverse.apply,
    LogAbsDet.apply,
    lambda: (_spd(3, 61),),
    "the inverse is not transposed",
    field="linear algebra",
    shows="a matrix that is not symmetric",
)


class CholeskySym(Function):
    """Lower Cholesky factor of (A + A^T) / 2."""

    @staticmethod
    def forward(ctx, A):
        floats(A)
        need(A.dim() >= 2 and A.shape[-1] == A.shape[-2], "A (..., n, n)")
        L = torch.linalg.cholesky((A + A.mT) / 2)
        ctx.save_for_backward(L)
        return L

    @staticmethod
    def pull(L, g, half):
        P = (L.mT @ g.tril()).tril()
        if half:
            P = P - 0.5 * torch.diag_embed(P.diagonal(dim1=-2, dim2=-1))
        X = torch.linalg.solve_triangular(L.mT, P, upper=True)
        X = torch.linalg.solve_triangular(L, X, upper=False, left=False)
        return (X + X.mT) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return CholeskySym.pull(ctx.saved_tensors[0], g, True)


class CholeskySymFullDiagonal(CholeskySym):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return CholeskySym.pull(ctx.saved_tensors[0], g, False)


add(
    "cholesky_half_diagonal",
    CholeskySymFullDiagonal.apply,
    CholeskySym.apply,
    lambda: (_spd(3, 62),),
    "the diagonal of tril(L^T g) is not halved",
    field="linear algebra",
)


class SqrtmSPD(Function):
    """Square root of the positive definite (A + A^T) / 2."""

    @staticmethod
    def forward(ctx, A):
        floats(A)
        need(A.dim() >= 2 and A.shape[-1] == A.shape[-2], "A (..., n, n)")
        w, V = torch.linalg.eigh((A + A.mT) / 2)
        need(bool((w > 0).all()), "A must be positive definite")
        ctx.save_for_backward(w, V)
        return V @ (w.sqrt()[..., None] * V.mT)

    @staticmethod
    def pull(V, K, g):
        return V @ (K * (V.mT @ ((g + g.mT) / 2) @ V)) @ V.mT

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        w, V = ctx.saved_tensors
        r = w.sqrt()
        return SqrtmSPD.pull(V, 1 / (r[..., None] + r[..., None, :]), g)


class SqrtmSPDDifference(SqrtmSPD):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        w, V = ctx.saved_tensors
        r = w.sqrt()
        dr, dw = r[..., None] - r[..., None, :], w[..., None] - w[..., None, :]
        same = dw.abs() < 1e-9
        K = torch.where(same, torch.zeros_like(dw), dr / torch.where(same, torch.ones_like(dw), dw))
        return SqrtmSPD.pull(V, K + torch.diag_embed(0.5 / r), g)


# https://github.com/pytorch/pytorch/pull/50942 (repeated eigenvalues)
add(
    "sqrtm_repeated_eigenvalues",
    SqrtmSPDDifference.apply,
    SqrtmSPD.apply,
    lambda: (_spd(3, 63),),
    "the divided difference is set to 0 for equal eigenvalues instead of the derivative",
    source="https://github.com/pytorch/pytorch/pull/50942",
    field="linear algebra",
    shows="repeated eigenvalues (a multiple of the identity)",
)


class Inverse(Function):
    @staticmethod
    def forward(ctx, A):
        floats(A)
        need(A.dim() >= 2 and A.shape[-1] == A.shape[-2], "A (..., n, n)")
        Y = torch.linalg.inv(A)
        ctx.save_for_backward(Y)
        return Y

    @staticmethod
    def backward(ctx, g):
        (Y,) = ctx.saved_tensors
        return -Y.mT @ g @ Y.mT


class InverseNoTranspose(Inverse):
    @staticmethod
    def backward(ctx, g):
        (Y,) = ctx.saved_tensors
        return -Y @ g @ Y


add(
    "inverse_transpose",
    InverseNoTranspose.apply,
    Inverse.apply,
    lambda: ((rn(3, 3, seed=64, grad=False) + 3 * torch.eye(3, dtype=f64)).requires_grad_(),),
    "-Y g Y instead of -Y^T g Y^T",
    field="linear algebra",
)


# ---------------------------------------------------------------- Fourier, optics
class PowerSpectrum(Function):
    """|rfft(x)|^2 / n along the last dim."""

    @staticmethod
    def forward(ctx, x):
        floats(x)
        need(x.dim() >= 1 and x.shape[-1] > 0, "x (..., n)")
        X = torch.fft.rfft(x)
        ctx.save_for_backward(X)
        ctx.n = x.shape[-1]
        return (X.real**2 + X.imag**2) / ctx.n

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (X,) = ctx.saved_tensors
        G = 2 * g * X / ctx.n
        full = F.pad(torch.view_as_real(G).mT, (0, ctx.n - G.shape[-1])).mT.contiguous()
        return torch.fft.ifft(torch.view_as_complex(full)).real * ctx.n


class PowerSpectrumEven(PowerSpectrum):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (X,) = ctx.saved_tensors
        G = 2 * g * X / ctx.n
        h = torch.full((G.shape[-1],), 0.5, dtype=g.dtype)
        h[0] = h[-1] = 1.0  # DC and "the Nyquist bin"
        return torch.fft.irfft(G * h, n=ctx.n) * ctx.n


# https://github.com/ooples/AiDotNet.Tensors/pull/911
add(
    "power_spectrum_odd",
    PowerSpectrumEven.apply,
    PowerSpectrum.apply,
    lambda: (rn(2, 8, seed=65),),
    "the last bin is always taken for the Nyquist bin",
    source="https://github.com/ooples/AiDotNet.Tensors/pull/911",
    field="FFT",
    shows="odd lengths",
)


class Propagate(Function):
    """A complex field u (..., n) through a transfer function H (n,): ifft(fft(u) H)."""

    @staticmethod
    def forward(ctx, u, H):
        need(
            u.dtype in (torch.complex64, torch.complex128) and H.dtype == u.dtype,
            "complex inputs of one dtype",
        )
        need(H.dim() == 1 and u.dim() >= 1 and u.shape[-1] == len(H) > 0, "u (..., n), H (n,)")
        U = torch.fft.fft(u)
        ctx.save_for_backward(U, H)
        return torch.fft.ifft(U * H)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        U, H = ctx.saved_tensors
        G = torch.fft.fft(g)
        gH = (G * U.conj()).reshape(-1, len(H)).sum(0) / len(H)
        return torch.fft.ifft(G * H.conj()), gH


class PropagateNoConj(Propagate):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        U, H = ctx.saved_tensors
        G = torch.fft.fft(g)
        gH = (G * U.conj()).reshape(-1, len(H)).sum(0) / len(H)
        return torch.fft.ifft(G * H), gH


def _cplx(*shape, seed):
    return torch.complex(
        rn(*shape, seed=seed, grad=False), rn(*shape, seed=seed + 500, grad=False)
    ).requires_grad_()


# https://github.com/FluxML/Zygote.jl/issues/151
add(
    "propagate_conjugate",
    PropagateNoConj.apply,
    Propagate.apply,
    lambda: (_cplx(2, 4, seed=66), _cplx(4, seed=67)),
    "the transfer function is not conjugated in the backward",
    source="https://github.com/FluxML/Zygote.jl/issues/151",
    field="optics",
)


# ---------------------------------------------------------------- probability
class SeededDropout(Function):
    @staticmethod
    def forward(ctx, x, p, seed):
        floats(x)
        need(0 <= p < 1, "p in [0, 1)")
        gen = torch.Generator().manual_seed(seed)
        mask = (torch.rand(x.shape, generator=gen, dtype=f64) >= p).to(x.dtype) / (1 - p)
        ctx.save_for_backward(mask)
        ctx.p, ctx.gen = p, gen
        return x * mask

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None, None


class SeededDropoutRedraw(SeededDropout):
    @staticmethod
    def backward(ctx, g):
        mask = (torch.rand(g.shape, generator=ctx.gen, dtype=f64) >= ctx.p).to(g.dtype) / (
            1 - ctx.p
        )
        return g * mask, None, None


def _drop(fn):
    return lambda x, p=0.4, seed=7: fn.apply(x, p, seed)


# https://github.com/microsoft/onnxruntime/pull/19715
add(
    "dropout_redrawn",
    _drop(SeededDropoutRedraw),
    _drop(SeededDropout),
    lambda: (rn(4, 5, seed=68),),
    "the mask is drawn anew in the backward, to save memory, without resetting the generator",
    source="https://github.com/microsoft/onnxruntime/pull/19715",
    field="probability",
)


class StudentLogProb(Function):
    """Log-density of a standard Student t at x, df 0-dim and learnable."""

    @staticmethod
    def forward(ctx, x, df):
        floats(x, df)
        need(df.dim() == 0 and bool(df > 0), "df must be 0-dim and positive")
        ctx.save_for_backward(x, df)
        a, v = x.to(f64), df.to(f64)
        y = (
            torch.lgamma((v + 1) / 2)
            - torch.lgamma(v / 2)
            - 0.5 * torch.log(v * math.pi)
            - (v + 1) / 2 * torch.log1p(a * a / v)
        )
        return y.to(x.dtype)

    @staticmethod
    def grads(ctx, g, with_norm):
        x, df = ctx.saved_tensors
        a, v, h = x.to(f64), df.to(f64), g.to(f64)
        t = a * a
        d = 0.5 * (
            torch.digamma((v + 1) / 2)
            - torch.digamma(v / 2)
            - torch.log1p(t / v)
            + (v + 1) * t / (v * (v + t))
        )
        if with_norm:
            d = d - 0.5 / v
        return (-h * (v + 1) * a / (v + t)).to(x.dtype), (h * d).sum().to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return StudentLogProb.grads(ctx, g, True)


class StudentLogProbNoNorm(StudentLogProb):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return StudentLogProb.grads(ctx, g, False)


add(
    "student_df_term",
    StudentLogProbNoNorm.apply,
    StudentLogProb.apply,
    lambda: (rn(6, seed=69), sc(4.0)),
    "the -1/(2 df) of the normalising constant is missing from df's gradient",
    field="probability",
)


class Sparsemax(Function):
    """Projection onto the simplex along the last dim."""

    @staticmethod
    def forward(ctx, x):
        floats(x)
        need(x.dim() >= 1 and x.shape[-1] > 0, "x (..., n)")
        z = x - x.amax(-1, keepdim=True)
        s, _ = z.sort(-1, descending=True)
        k = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
        c = s.cumsum(-1)
        n = (1 + k * s > c).sum(-1, keepdim=True)
        y = (z - (c.gather(-1, n - 1) - 1) / n.to(x.dtype)).clamp_min(0)
        ctx.save_for_backward(y > 0)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        on = ctx.saved_tensors[0].to(g.dtype)
        v = (g * on).sum(-1) / on.sum(-1)
        return on * (g - v.unsqueeze(-1))


class SparsemaxSqueeze(Sparsemax):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        on = ctx.saved_tensors[0].to(g.dtype)
        v = (g * on).sum(-1) / on.sum(-1, keepdim=True).squeeze()
        return on * (g - v.unsqueeze(-1))


# https://github.com/deep-spin/entmax/issues/13
add(
    "sparsemax_squeeze",
    SparsemaxSqueeze.apply,
    Sparsemax.apply,
    lambda: (rn(2, 4, seed=70),),
    "squeeze() drops a size-1 dimension of the support size, which then broadcasts over the batch",
    source="https://github.com/deep-spin/entmax/issues/13",
    field="attention",
    shows="(B, 1, n) inputs, B > 1",
)


# ---------------------------------------------------------------- simulators, implicit layers
class PendulumEuler(Function):
    """n explicit Euler steps of (theta, omega)' = (omega, -k sin theta); state (B, 2), k 0-dim."""

    @staticmethod
    def step(s, k, dt):
        th, om = s[:, 0], s[:, 1]
        return torch.stack([th + dt * om, om - dt * k * th.sin()], 1)

    @staticmethod
    def forward(ctx, s, k, n, dt):
        floats(s, k)
        need(s.dim() == 2 and s.shape[1] == 2 and k.dim() == 0 and n >= 1, "s (B, 2), k 0-dim")
        need(abs(float(k)) * dt * dt <= 0.25, "step too large for this stiffness: |k| dt^2 > 0.25")
        path, c = [s.to(f64)], k.to(f64)
        for _ in range(n):
            path.append(PendulumEuler.step(path[-1], c, dt))
        ctx.save_for_backward(torch.stack(path), c)
        ctx.dt = dt
        return path[-1].to(s.dtype)

    @staticmethod
    def pull(a, s, k, dt):
        th = s[:, 0]
        gk = -(dt * a[:, 1] * th.sin()).sum()
        return torch.stack([a[:, 0] - dt * k * th.cos() * a[:, 1], a[:, 1] + dt * a[:, 0]], 1), gk

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        path, k = ctx.saved_tensors
        h, gk = g.to(f64), torch.zeros((), dtype=f64)
        for s in path[:-1].flip(0):
            h, d = PendulumEuler.pull(h, s, k, ctx.dt)
            gk = gk + d
        return h.to(g.dtype), gk.to(g.dtype), None, None


class PendulumEulerReversed(PendulumEuler):
    # integrates the state back with -dt instead of storing it; Euler's step is not reversible
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        path, k = ctx.saved_tensors
        s, h, gk = path[-1], g.to(f64), torch.zeros((), dtype=f64)
        for _ in range(len(path) - 1):
            s = PendulumEuler.step(s, k, -ctx.dt)
            h, d = PendulumEuler.pull(h, s, k, ctx.dt)
            gk = gk + d
        return h.to(g.dtype), gk.to(g.dtype), None, None


def _pend(fn):
    return lambda s, k, n=5, dt=0.1: fn.apply(s, k, n, dt)


add(
    "euler_reversed_states",
    _pend(PendulumEulerReversed),
    _pend(PendulumEuler),
    lambda: (rn(2, 2, seed=71), sc(2.0)),
    "the adjoint runs on states integrated backwards, which differ from the forward's",
    field="ODE",
)


class DeqTanh(Function):
    """The fixed point z = tanh(W z + x), x (B, D), spectral norm of W at most 0.9."""

    @staticmethod
    def forward(ctx, x, W):
        floats(x, W)
        D = x.shape[-1]
        need(x.dim() == 2 and W.shape == (D, D) and len(x) > 0, "x (B, D), W (D, D)")
        a, M = x.to(f64), W.to(f64)
        need(
            bool(torch.linalg.matrix_norm(M, 2) <= 0.9),
            "W must have a spectral norm of at most 0.9",
        )
        z = torch.tanh(a)
        for _ in range(400):
            z = torch.tanh(z @ M.T + a)
        ctx.save_for_backward(z, W)
        return z.to(x.dtype)

    @staticmethod
    def solve(d, W, g):
        eye = torch.eye(W.shape[0], dtype=f64)
        J = d[:, :, None] * W  # (B, D, D), row i times d_i
        return torch.linalg.solve(eye - J.mT, g[:, :, None])[:, :, 0] * d

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        z, W = ctx.saved_tensors
        u = DeqTanh.solve(1 - z * z, W.to(f64), g.to(f64))
        return u.to(g.dtype), (u.T @ z).to(g.dtype)


class DeqTanhBatchMean(DeqTanh):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        z, W = ctx.saved_tensors
        d = (1 - z * z).mean(0, keepdim=True).expand_as(z)  # one Jacobian for the whole batch
        u = DeqTanh.solve(d, W.to(f64), g.to(f64))
        return u.to(g.dtype), (u.T @ z).to(g.dtype)


add(
    "deq_one_jacobian",
    DeqTanhBatchMean.apply,
    DeqTanh.apply,
    lambda: (rn(1, 3, seed=72), rn(3, 3, seed=73, scale=0.2)),
    "one Jacobian, the batch's mean, is used for every sample",
    field="implicit layer",
    shows="a batch of 2 or more",
)


class Kepler(Function):
    """Eccentric anomaly E of E - e sin E = M, e 0-dim in [0, 0.9]."""

    @staticmethod
    def forward(ctx, M, e):
        floats(M, e)
        need(e.dim() == 0 and 0 <= float(e) <= 0.9, "e must be 0-dim in [0, 0.9]")
        m, c = M.to(f64), e.to(f64)
        turns = torch.floor(m / (2 * math.pi)) * (2 * math.pi)
        m = m - turns
        E = torch.full_like(m, math.pi)
        for _ in range(60):
            E = E - (E - c * E.sin() - m) / (1 - c * E.cos())
        ctx.save_for_backward(E, c)
        return (E + turns).to(M.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        E, c = ctx.saved_tensors
        h = g.to(f64) / (1 - c * E.cos())
        return h.to(g.dtype), (h * E.sin()).sum().to(g.dtype)


class KeplerSine(Kepler):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        E, c = ctx.saved_tensors
        h = g.to(f64)
        return (h / (1 - c * E.cos())).to(g.dtype), (h * E.sin()).sum().to(g.dtype)


add(
    "kepler_eccentricity",
    KeplerSine.apply,
    Kepler.apply,
    lambda: (ru(5, seed=74, lo=0.3, hi=6.0), sc(0.4)),
    "dE/de is sin E without the division by 1 - e cos E (implicit function theorem half applied)",
    field="orbital mechanics",
)


# ---------------------------------------------------------------- geometry
def _cross(a, b):
    return torch.linalg.cross(a, b, dim=-1)


def _dot(a, b):
    return (a * b).sum(-1, keepdim=True)


class QuatRotate(Function):
    """v (N, 3) rotated by q / |q|, q (N, 4) as (w, x, y, z)."""

    @staticmethod
    def forward(ctx, q, v):
        floats(q, v)
        need(q.dim() == 2 and q.shape[1] == 4 and v.shape == (len(q), 3), "q (N, 4), v (N, 3)")
        n = q.norm(dim=1, keepdim=True)
        need(bool((n > 0).all()), "a zero quaternion has no direction")
        ctx.save_for_backward(q / n, n, v)
        w, u = (q / n)[:, :1], (q / n)[:, 1:]
        t = _cross(u, v)
        return v + 2 * w * t + 2 * _cross(u, t)

    @staticmethod
    def pull(h, v, g):
        w, u = h[:, :1], h[:, 1:]
        gv = g - 2 * w * _cross(u, g) + 2 * _cross(u, _cross(u, g))
        gw = 2 * _dot(g, _cross(u, v))
        gu = 2 * w * _cross(v, g) + 2 * (g * _dot(u, v) + v * _dot(g, u) - 2 * u * _dot(g, v))
        return torch.cat([gw, gu], 1), gv

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        h, n, v = ctx.saved_tensors
        gh, gv = QuatRotate.pull(h, v, g)
        return (gh - h * _dot(h, gh)) / n, gv


class QuatRotateNoProjection(QuatRotate):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        h, n, v = ctx.saved_tensors
        gh, gv = QuatRotate.pull(h, v, g)
        return gh / n, gv


add(
    "quaternion_normalisation",
    QuatRotateNoProjection.apply,
    QuatRotate.apply,
    lambda: (rn(3, 4, seed=75), rn(3, 3, seed=76)),
    "of the normalisation only the scale is differentiated, not the direction",
    field="geometry",
)


class AxisAngle(Function):
    """v (N, 3) rotated by the rotation vector w (N, 3) (Rodrigues)."""

    @staticmethod
    def coef(th2):
        """sin t/t, (1-cos t)/t^2 and their derivatives over t, by series for small t."""
        small = th2 < 1e-2
        t2 = torch.where(small, torch.ones_like(th2), th2)
        t = t2.sqrt()
        s, c = t.sin(), t.cos()
        big = (s / t, (1 - c) / t2, (t * c - s) / (t2 * t), (t * s - 2 * (1 - c)) / (t2 * t2))
        z = torch.where(small, th2, torch.zeros_like(th2))
        ser = (
            1 - z / 6 + z**2 / 120 - z**3 / 5040,
            0.5 - z / 24 + z**2 / 720 - z**3 / 40320,
            -1 / 3 + z / 30 - z**2 / 840 + z**3 / 45360,
            -1 / 12 + z / 180 - z**2 / 6720 + z**3 / 453600,
        )
        return [torch.where(small, a, b) for a, b in zip(ser, big, strict=False)]

    @staticmethod
    def forward(ctx, w, v):
        floats(w, v)
        need(w.dim() == 2 and w.shape[1] == 3 and v.shape == w.shape, "w, v (N, 3)")
        ctx.save_for_backward(w, v)
        a, b = w.to(f64), v.to(f64)
        A, B, _, _ = AxisAngle.coef(_dot(a, a))
        t = _cross(a, b)
        return (b + A * t + B * _cross(a, t)).to(v.dtype)

    @staticmethod
    def grads(ctx, g, coef):
        w, v = ctx.saved_tensors
        a, b, h = w.to(f64), v.to(f64), g.to(f64)
        A, B, dA, dB = coef(_dot(a, a))
        t = _cross(a, b)
        gw = (
            A * _cross(b, h)
            + B * (h * _dot(a, b) + b * _dot(a, h) - 2 * a * _dot(h, b))
            + a * (dA * _dot(h, t) + dB * _dot(h, _cross(a, t)))
        )
        gv = h - A * _cross(a, h) + B * _cross(a, _cross(a, h))
        return gw.to(w.dtype), gv.to(w.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return AxisAngle.grads(ctx, g, AxisAngle.coef)


def _coef_plain(th2):
    t = th2.sqrt()
    s, c = t.sin(), t.cos()
    return s / t, (1 - c) / th2, (t * c - s) / t**3, (t * s - 2 * (1 - c)) / th2**2


class AxisAngleNoSeries(AxisAngle):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return AxisAngle.grads(ctx, g, _coef_plain)


add(
    "rodrigues_zero_angle",
    AxisAngleNoSeries.apply,
    AxisAngle.apply,
    lambda: (rn(3, 3, seed=77), rn(3, 3, seed=78)),
    "the small-angle series guards the forward only: NaN at the identity rotation",
    field="geometry",
    shows="a zero rotation vector (the usual initial value)",
)


# ---------------------------------------------------------------- time series, RL, recurrent
class Ema(Function):
    """y_t = a x_t + (1 - a) y_{t-1}, y_0 = a x_0; x (..., T), a 0-dim in (0, 2), where it is stable."""

    @staticmethod
    def forward(ctx, x, a):
        floats(x, a)
        need(
            x.dim() >= 1 and x.shape[-1] > 0 and a.dim() == 0 and 0 < float(a) < 2,
            "x (..., T), a 0-dim in (0, 2)",
        )
        y = [torch.zeros_like(x[..., 0])]
        for t in range(x.shape[-1]):
            y.append(a * x[..., t] + (1 - a) * y[-1])
        y = torch.stack(y, -1)
        ctx.save_for_backward(x, a, y[..., :-1])
        return y[..., 1:].contiguous()

    @staticmethod
    def carry(g, a):
        lam = [torch.zeros_like(g[..., 0])]
        for t in range(g.shape[-1] - 1, -1, -1):
            lam.insert(0, g[..., t] + (1 - a) * lam[0])
        return torch.stack(lam[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, a, prev = ctx.saved_tensors
        lam = Ema.carry(g, a)
        return a * lam, (lam * (x - prev)).sum()


class EmaDirectOnly(Ema):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, a, prev = ctx.saved_tensors
        return a * Ema.carry(g, a), (g * (x - prev)).sum()


add(
    "ema_smoothing_recurrence",
    EmaDirectOnly.apply,
    Ema.apply,
    lambda: (rn(2, 6, seed=79), sc(0.3)),
    "the smoothing factor's gradient leaves out its effect through the earlier states",
    field="time series",
)


class PPOLoss(Function):
    """-mean(min(r A, clip(r, 1 - eps, 1 + eps) A)), r = exp(logp - old)."""

    @staticmethod
    def forward(ctx, logp, old, adv, eps):
        floats(logp, old, adv)
        no_grad_for(ctx, 1, 2)
        need(
            logp.dim() == 1
            and logp.shape == old.shape == adv.shape
            and len(logp) > 0
            and 0 < eps < 1,
            "logp, old, adv (N,)",
        )
        need(bool(((logp - old).abs() <= 50).all()), "logp and old differ by more than 50")
        r = (logp - old).exp()
        ctx.save_for_backward(r, adv)
        ctx.eps = eps
        return -torch.minimum(r * adv, r.clamp(1 - eps, 1 + eps) * adv).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        r, adv = ctx.saved_tensors
        flows = torch.where(adv >= 0, r < 1 + ctx.eps, r > 1 - ctx.eps)
        d = torch.where(flows, r * adv, torch.zeros_like(r))
        return -g * d / len(r), None, None, None


class PPOLossClipBoth(PPOLoss):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        r, adv = ctx.saved_tensors
        flows = (r > 1 - ctx.eps) & (r < 1 + ctx.eps)
        return -g * torch.where(flows, r * adv, torch.zeros_like(r)) / len(r), None, None, None


def _ppo(fn):
    return lambda logp, old, adv, eps=0.2: fn.apply(logp, old, adv, eps)


def _ppo_inputs():
    old = rn(6, seed=80, grad=False, shift=-1.0)
    return (
        (old + ru(6, seed=81, lo=-0.1, hi=0.1, grad=False)).requires_grad_(),
        old,
        rn(6, seed=82, grad=False),
    )


add(
    "ppo_clip_side",
    _ppo(PPOLossClipBoth),
    _ppo(PPOLoss),
    _ppo_inputs,
    "the gradient is stopped on both sides of the clip range, not only where the clipped term is the smaller",
    field="reinforcement learning",
    shows="ratio below 1-eps with a positive advantage, or above 1+eps with a negative one",
)


class OnePole(Function):
    """y_t = x_t + a y_{t-1} from y0; x (B, T), a 0-dim with |a| < 1, y0 (B,)."""

    @staticmethod
    def forward(ctx, x, a, y0):
        floats(x, a, y0)
        need(
            x.dim() == 2
            and x.shape[1] > 0
            and y0.shape == x.shape[:1]
            and a.dim() == 0
            and abs(float(a)) < 1,
            "x (B, T), a 0-dim with |a| < 1, y0 (B,)",
        )
        y = [y0]
        for t in range(x.shape[1]):
            y.append(x[:, t] + a * y[-1])
        y = torch.stack(y, 1)
        ctx.save_for_backward(a, y[:, :-1])
        return y[:, 1:].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, prev = ctx.saved_tensors
        lam = [g[:, -1]]
        for t in range(g.shape[1] - 2, -1, -1):
            lam.insert(0, g[:, t] + a * lam[0])
        lam = torch.stack(lam, 1)
        return lam, (lam * prev).sum(), a * lam[:, 0]


class OnePoleNoState(OnePole):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gx, ga, _ = OnePole.backward(ctx, g)
        return gx, ga, None


add(
    "iir_initial_state_none",
    OnePoleNoState.apply,
    OnePole.apply,
    lambda: (rn(2, 5, seed=83), sc(0.7), torch.zeros(2, dtype=f64)),
    "None for the initial state, which has a gradient",
    field="audio filter",
    shows="an initial state that requires a gradient (blocks chained by their state)",
)


class LSTMCell(Function):
    """gates (N, 4H) as (i, f, g, o), c (N, H) -> new h, new c."""

    @staticmethod
    def forward(ctx, gates, c):
        floats(gates, c)
        need(
            gates.dim() == 2
            and c.shape == (len(gates), gates.shape[1] // 4)
            and gates.shape[1] % 4 == 0,
            "gates (N, 4H), c (N, H)",
        )
        i, f, u, o = gates.chunk(4, 1)
        i, f, u, o = i.sigmoid(), f.sigmoid(), u.tanh(), o.sigmoid()
        c1 = f * c + i * u
        ctx.save_for_backward(i, f, u, o, c, c1)
        return o * c1.tanh(), c1

    @staticmethod
    @once_differentiable
    def backward(ctx, gh, gc):
        i, f, u, o, c, c1 = ctx.saved_tensors
        th = c1.tanh()
        d = gc + gh * o * (1 - th * th)
        gg = torch.cat(
            [d * u * i * (1 - i), d * c * f * (1 - f), d * i * (1 - u * u), gh * th * o * (1 - o)],
            1,
        )
        return gg, d * f


class LSTMCellHiddenOnly(LSTMCell):
    @staticmethod
    @once_differentiable
    def backward(ctx, gh, gc):
        return LSTMCell.backward(ctx, gh, torch.zeros_like(gh))


add(
    "lstm_ignores_cell_grad",
    LSTMCellHiddenOnly.apply,
    LSTMCell.apply,
    lambda: (rn(2, 8, seed=84), rn(2, 2, seed=85)),
    "the gradient of the second output, the cell state, is left out",
    field="recurrent step",
)


# ---------------------------------------------------------------- forward mode, vmap, state, plumbing
class Squareplus(Function):
    """(x + sqrt(x^2 + 4)) / 2, with a forward-mode rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        floats(x)
        s = torch.sqrt(x * x + 4)
        return 0.5 * torch.where(x >= 0, x + s, 4 / (s + x.abs()))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def slope(x):
        s = torch.sqrt(x * x + 4)
        return 0.5 * torch.where(x >= 0, x + s, 4 / (s + x.abs())) / s

    @staticmethod
    def backward(ctx, g):
        return g * Squareplus.slope(ctx.saved_tensors[0])

    @staticmethod
    def jvp(ctx, t):
        return t * Squareplus.slope(ctx.saved_tensors[0])


class SquareplusJvp(Squareplus):
    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * (1 + x / torch.sqrt(x * x + 4))


add(
    "squareplus_jvp",
    SquareplusJvp.apply,
    Squareplus.apply,
    lambda: (rn(5, seed=86),),
    "the forward-mode rule lacks the factor 1/2",
    field="activation",
    shows="forward-mode AD",
)


class UnitVector(Function):
    """x / sqrt(|x|^2 + 1e-12) along the last dim, with a vmap rule."""

    @staticmethod
    def forward(x):
        floats(x)
        need(x.dim() >= 1, "x (..., D)")
        return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-12)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        n = torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-12)
        u = x / n
        return (g - u * (u * g).sum(-1, keepdim=True)) / n

    @staticmethod
    def vmap(info, in_dims, x):
        need(x.dim() >= 2, "x (..., D)")
        return UnitVector.apply(x.movedim(in_dims[0], 0)), 0


class UnitVectorFirstDim(UnitVector):
    @staticmethod
    def vmap(info, in_dims, x):
        return UnitVectorFirstDim.apply(x), in_dims[0]


add(
    "unit_vector_vmap_dim",
    UnitVectorFirstDim.apply,
    UnitVector.apply,
    lambda: (rn(4, 3, seed=87),),
    "the vmap rule normalises along the last axis even when that is the mapped one",
    field="geometry",
    shows="torch.vmap(f, in_dims=-1)",
)


class _GateFn(Function):
    @staticmethod
    def forward(ctx, x, h, mod):
        floats(x, h)
        need(x.shape == h.shape, "x and h of one shape")
        mod.x, mod.s = x.detach(), torch.sigmoid(h.detach())
        ctx.mod = mod
        return x * mod.s

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, s = ctx.mod.x, ctx.mod.s
        return g * s, g * x * s * (1 - s), None


class GateOnSelf(nn.Module):
    # keeps what the backward needs on the module: the last call's
    def forward(self, x, h):
        return _GateFn.apply(x, h, self)


class _GateFnCtx(Function):
    @staticmethod
    def forward(ctx, x, h):
        floats(x, h)
        need(x.shape == h.shape, "x and h of one shape")
        s = torch.sigmoid(h)
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        return g * s, g * x * s * (1 - s)


class Gate(nn.Module):
    def forward(self, x, h):
        return _GateFnCtx.apply(x, h)


add(
    "gate_state_on_module",
    GateOnSelf(),
    Gate(),
    lambda: (rn(2, 4, seed=88), rn(2, 4, seed=89)),
    "saved tensors live on the module, so a second call before the backward replaces the first one's",
    field="recurrent step",
    shows="two calls (a recurrence, shared weights) before the backward",
)


class LinearNB(Function):
    """x (..., I) @ w (O, I)^T."""

    @staticmethod
    def forward(ctx, x, w):
        floats(x, w)
        need(x.dim() >= 1 and w.dim() == 2 and x.shape[-1] == w.shape[1], "x (..., I), w (O, I)")
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        gx = gw = None
        if ctx.needs_input_grad[0]:
            gx = g @ w
        if ctx.needs_input_grad[1]:
            gw = g.reshape(-1, w.shape[0]).T @ x.reshape(-1, w.shape[1])
        return gx, gw


class LinearNBPacked(LinearNB):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        grads = []
        if ctx.needs_input_grad[0]:
            grads.append(g @ w)
        if ctx.needs_input_grad[1]:
            grads.append(g.reshape(-1, w.shape[0]).T @ x.reshape(-1, w.shape[1]))
        return tuple(grads + [None] * (2 - len(grads)))


# https://github.com/Oneflow-Inc/oneflow/issues/5944 (wrong slot when only one operand needs a gradient)
add(
    "linear_packed_grads",
    LinearNBPacked.apply,
    LinearNB.apply,
    lambda: (rn(2, 3, 4, seed=90), rn(2, 4, seed=91)),
    "only the needed gradients are listed, so they move up one place when x needs none",
    source="https://github.com/Oneflow-Inc/oneflow/issues/5944",
    field="linear layer",
    shows="x without requires_grad (the first layer)",
)


class ColumnScale(Function):
    """x (N, D) * s (D,); half precision accepted, sums kept in float32."""

    @staticmethod
    def forward(ctx, x, s):
        need(
            x.dtype in (torch.float16, torch.bfloat16, f32, f64) and s.dtype == x.dtype,
            "floats of one dtype",
        )
        need(x.dim() == 2 and s.shape == x.shape[1:], "x (N, D), s (D,)")
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        acc = f64 if x.dtype == f64 else f32
        return g * s, (g.to(acc) * x.to(acc)).sum(0).to(x.dtype)


class ColumnScaleRunning(ColumnScale):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        gs = torch.zeros_like(s)
        for a, b in zip(g, x, strict=False):  # running sum in the input's dtype
            gs = gs + a * b
        return g * s, gs


add(
    "scale_half_accumulator",
    ColumnScaleRunning.apply,
    ColumnScale.apply,
    lambda: (rn(8, 3, seed=92, dtype=f32), ru(3, seed=93, lo=0.5, hi=1.5, dtype=f32)),
    "the scale's gradient is summed up in the input's own precision",
    field="mixed precision",
    shows="float16 / bfloat16 with many rows",
)
