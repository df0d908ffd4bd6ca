"""Soft selections, histograms and pools."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real, whole
from tests.verify.unseen.seventeenth import add
from tests.verify.unseen.sixteenth import expect
from tests.verify.unseen.sixteenth_indices import below
from tests.verify.unseen.twelfth import wide


class Tempered(Function):
    """exp_t(x) = (1 + (1 - t) x)^(1 / (1 - t)); its derivative is exp_t(x)^t."""

    @staticmethod
    def power(x, t):
        return (1 + (1 - t) * x) ** (1 / (1 - t))

    @staticmethod
    def forward(ctx, x, t):
        norm = x.amax(-1, keepdim=True)
        for _ in range(50):
            p = Tempered.power(x - norm, t)
            norm = norm + (p.sum(-1, keepdim=True) - 1) / (p**t).sum(-1, keepdim=True)
        ctx.save_for_backward(x, norm)
        ctx.t = t
        return norm

    @staticmethod
    def gradients(ctx, g, shift):
        x, norm = ctx.saved_tensors
        escort = Tempered.power(x - shift(x, norm), ctx.t) ** ctx.t
        return g * escort / escort.sum(-1, keepdim=True), None

    @staticmethod
    def backward(ctx, g):
        return Tempered.gradients(ctx, g, lambda x, norm: norm)


class TemperedLargest(Tempered):
    @staticmethod
    def backward(ctx, g):
        return Tempered.gradients(ctx, g, lambda x, norm: x.amax(-1, keepdim=True))


def _tempered(function):
    def tempered_softmax(x, t=1.5):
        """Probabilities exp_t(x - λ) of sum 1 along the last of x (*, C), C > 0, |x| <= 50; t from 1.1 to 2."""
        expect(x.dim() and x.shape[-1], "x (*, C), C > 0", tuple(x.shape))
        expect(1.1 <= t <= 2, "t from 1.1 to 2", t)
        expect((x.abs() <= 50).all(), "|x| <= 50", x)
        return Tempered.power(x - function.apply(x, t), t)

    return tempered_softmax


add(
    "tempered_softmax_shift",
    _tempered,
    TemperedLargest,
    Tempered,
    lambda: (real(3, 4),),
    bug="backward's weights are of x less its largest, as for a softmax, not less the normaliser",
    shows="the sample",
)


class SoftTopK(Function):
    """The shift by which sigmoids have the sum k."""

    @staticmethod
    def forward(ctx, x, k):
        low, high = -x.amax(-1, keepdim=True) - 40, -x.amin(-1, keepdim=True) + 40
        for _ in range(80):
            middle = (low + high) / 2
            less = (x + middle).sigmoid().sum(-1, keepdim=True) < k
            low, high = torch.where(less, middle, low), torch.where(less, high, middle)
        ctx.save_for_backward(x, middle)
        return middle

    @staticmethod
    def gradients(ctx, g, weights):
        x, shift = ctx.saved_tensors
        return -g * weights(x + shift), None

    @staticmethod
    def backward(ctx, g):
        def weights(z):
            log = torch.nn.functional.logsigmoid
            return (log(z) + log(-z)).softmax(-1)

        return SoftTopK.gradients(ctx, g, weights)


class SoftTopKSlopes(SoftTopK):
    @staticmethod
    def backward(ctx, g):
        def weights(z):
            p = z.sigmoid()
            return p * (1 - p) / (p * (1 - p)).sum(-1, keepdim=True)

        return SoftTopK.gradients(ctx, g, weights)


def _soft_top_k(function):
    def soft_top_k(x, k=2):
        """sigmoid(x + τ), of sum k along the last of x (*, C), |x| <= 1000; k from 1 to C - 1."""
        expect(x.dim() and k in range(1, x.shape[-1]), "x (*, C), 0 < k < C", tuple(x.shape))
        expect((x.abs() <= 1000).all(), "|x| <= 1000", x)
        return (x + function.apply(x, k)).sigmoid()

    return soft_top_k


add(
    "soft_top_k_slopes",
    _soft_top_k,
    SoftTopKSlopes,
    SoftTopK,
    lambda: (real(3, 5),),
    bug="backward divides by the sum of p (1 - p)",
    shows="scores far apart, by 150 in float32, 800 in float64: the sum is 0",
)


class SoftHistogram(Function):
    @staticmethod
    def parts(x, centres, width):
        d = (x[:, None] - centres) / width
        return d, (-d.square() / 2).exp()

    @staticmethod
    def forward(ctx, x, centres, width):
        ctx.save_for_backward(x, centres, width)
        return SoftHistogram.parts(x, centres, width)[1].mean(0)

    @staticmethod
    def gradients(ctx, g, of_width):
        x, centres, width = ctx.saved_tensors
        d, k = SoftHistogram.parts(x, centres, width)
        e = g * k * d / width / len(x)
        return -e.sum(1), e.sum(0), of_width((e * d).sum())

    @staticmethod
    def backward(ctx, g):
        return SoftHistogram.gradients(ctx, g, lambda grad: grad)


class SoftHistogramWidth(SoftHistogram):
    @staticmethod
    def backward(ctx, g):
        return SoftHistogram.gradients(ctx, g, lambda grad: None)


def _soft_histogram(function):
    def soft_histogram(x, centres, width):
        """Means over x (N,), N > 0, of e^(-d² / 2), d = (x - centre) / width, for centres (K,); width () >= 0.05."""
        expect(x.dim() == centres.dim() == 1 and len(x), "x (N,), centres (K,)", tuple(x.shape))
        expect(width.dim() == 0 and width >= 0.05, "width (), at least 0.05", width)
        return function.apply(x, centres, width)

    return soft_histogram


add(
    "soft_histogram_width",
    _soft_histogram,
    SoftHistogramWidth,
    SoftHistogram,
    lambda: (real(5), torch.linspace(-2, 2, 4, dtype=F64), torch.tensor(0.5, dtype=F64)),
    bug="the width gets no gradient",
    shows="a width that requires grad",
    missed="a note: an input whose gradient is None, which may be meant",
)


class LogMeanExp(Function):
    @staticmethod
    def forward(ctx, x, r):
        flat = x.flatten(2)
        p = (r.expand(x.shape[1])[:, None] * flat).logsumexp(2)
        y = (p - flat.new_tensor(flat.shape[2]).log()) / r
        ctx.save_for_backward(x, r, y)
        return y

    @staticmethod
    def gradients(ctx, g, reduce):
        x, r, y = ctx.saved_tensors
        flat = x.flatten(2)
        p = (r.expand(x.shape[1])[:, None] * flat).softmax(2)
        of_r = g * ((p * flat).sum(2) - y) / r
        return (g[..., None] * p).view(x.shape), reduce(of_r, r)

    @staticmethod
    def backward(ctx, g):
        return LogMeanExp.gradients(ctx, g, lambda grad, r: grad.sum_to_size(r.shape))


class LogMeanExpTotal(LogMeanExp):
    @staticmethod
    def backward(ctx, g):
        return LogMeanExp.gradients(ctx, g, lambda grad, r: grad.sum().expand(r.shape))


def _log_mean_exp(function):
    def log_mean_exp_pool(x, r):
        """log(mean e^(r x)) / r over the places of x (N, C, *), not empty, to (N, C); r () or (C,), from 0.1 to 20."""
        expect(x.dim() > 2 and x.numel(), "x (N, C, *), not empty", tuple(x.shape))
        expect(r.shape in ((), x.shape[1:2]), "r () or (C,)", tuple(r.shape))
        expect(((r >= 0.1) & (r <= 20)).all(), "r from 0.1 to 20", r)
        return function.apply(x, r)

    return log_mean_exp_pool


add(
    "log_mean_exp_pool_channels",
    _log_mean_exp,
    LogMeanExpTotal,
    LogMeanExp,
    lambda: (real(2, 3, 4), torch.tensor(2.0, dtype=F64, requires_grad=True)),
    bug="r's gradient is the sum over all channels",
    shows="r (C,)",
)


class BagSum(Function):
    @staticmethod
    def forward(ctx, w, tokens):
        ctx.save_for_backward(tokens)
        ctx.shape, ctx.dtype = w.shape, w.dtype
        return wide(w)[tokens].sum(1).to(w.dtype)

    @staticmethod
    def gradients(ctx, g):
        (tokens,) = ctx.saved_tensors
        grad = g.new_zeros(ctx.shape)
        for place in tokens.unbind(1):
            grad = grad.index_add(0, place, g)
        return grad.to(ctx.dtype), None

    @staticmethod
    def backward(ctx, g):
        return BagSum.gradients(ctx, wide(g))


class BagSumNarrow(BagSum):
    @staticmethod
    def backward(ctx, g):
        return BagSum.gradients(ctx, g)


def _bag_sum(function):
    def bag_sum(w, tokens):
        """Sums (N, D) of the rows of w (V, D) at tokens (N, L); of half precision they are added in float32."""
        expect(w.dim() == tokens.dim() == 2, "w (V, D), tokens (N, L)", tuple(w.shape))
        below(tokens, len(w))
        return function.apply(w, tokens)

    return bag_sum


add(
    "bag_sum_narrow",
    _bag_sum,
    BagSumNarrow,
    BagSum,
    lambda: (real(5, 3), whole(5, 2, 4)),
    bug="backward adds place by place in half precision: a sum of ones stops at 256 in bfloat16",
    shows="bfloat16 or float16 and a token that occurs often",
    half=lambda function: function,
    missed="one row read many times: torch itself adds such gradients up in low precision",
)
