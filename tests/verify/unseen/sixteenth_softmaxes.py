"""Softmaxes and sums of exponentials."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.sixteenth import add, expect
from tests.verify.unseen.twelfth import softmax_backward


class Gumbel(Function):
    @staticmethod
    def forward(ctx, logits, noise, tau):
        y = ((logits + noise) / tau).softmax(-1)
        ctx.save_for_backward(y)
        ctx.tau = tau
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return softmax_backward(y, g) / ctx.tau, None, None


class GumbelTau(Gumbel):
    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return softmax_backward(y, g), None, None


def _gumbel(function):
    def gumbel_softmax(logits, noise, tau=1.0):
        """softmax((logits + noise) / tau) of logits (*, C), noise a constant of their shape; tau from 0.05 to 100."""
        expect(
            logits.dim() and logits.shape == noise.shape,
            "noise of the logits' shape",
            tuple(noise.shape),
        )
        expect(0.05 <= tau <= 100, "tau from 0.05 to 100", tau)
        return function.apply(logits, noise.detach(), tau)

    return gumbel_softmax


def gumbel_sample():
    uniform = torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return real(3, 4), -(-uniform.log()).log()


add(
    "gumbel_softmax_tau",
    _gumbel,
    GumbelTau,
    Gumbel,
    gumbel_sample,
    bug="the softmax's gradient is not divided by tau",
    shows="tau other than 1",
)


class LogSoftmax(Function):
    @staticmethod
    def forward(ctx, x, dim):
        y = x - x.logsumexp(dim, keepdim=True)
        ctx.save_for_backward(y)
        ctx.dim = dim
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g - y.exp() * g.sum(ctx.dim, keepdim=True), None


class LogSoftmaxLast(LogSoftmax):
    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g - y.exp() * g.sum(-1, keepdim=True), None


def _log_softmax(function):
    def log_softmax(x, dim=-1):
        """x less its logsumexp over dim, one of x's dimensions, of size > 0."""
        expect(-x.dim() <= dim < x.dim(), "one of x's dimensions", dim)
        expect(x.shape[dim], "a size > 0", tuple(x.shape))
        return function.apply(x, dim)

    return log_softmax


add(
    "log_softmax_dim",
    _log_softmax,
    LogSoftmaxLast,
    LogSoftmax,
    lambda: (real(3, 4),),
    bug="backward ignores dim and sums over the last dimension",
    shows="another dim",
)


class CumulativeLogSumExp(Function):
    @staticmethod
    def forward(ctx, x, dim):
        y = x.logcumsumexp(dim)
        ctx.save_for_backward(x, y)
        ctx.dim = dim
        return y

    @staticmethod
    def backward(ctx, g):
        x, y, g = (a.movedim(ctx.dim, -1) for a in (*ctx.saved_tensors, g))
        later = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).tril()
        share = (x[..., None, :] - y[..., None]).masked_fill(~later, -torch.inf).exp()
        return (g[..., None] * share).sum(-2).movedim(-1, ctx.dim), None


class CumulativeLogSumExpFactors(CumulativeLogSumExp):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return x.exp() * (g * (-y).exp()).flip(ctx.dim).cumsum(ctx.dim).flip(ctx.dim), None


def _cumulative_logsumexp(function):
    def cumulative_logsumexp(x, dim=-1):
        """log of the running sums of exp(x) along dim of the finite x (*)."""
        expect(-x.dim() <= dim < x.dim(), "one of x's dimensions", dim)
        return function.apply(x, dim)

    return cumulative_logsumexp


add(
    "cumulative_logsumexp_factors",
    _cumulative_logsumexp,
    CumulativeLogSumExpFactors,
    CumulativeLogSumExp,
    lambda: (real(3, 5),),
    bug="exp(x) times sums of exp(-y): inf times 0",
    shows="x of some hundreds",
)


class SegmentLogSumExp(Function):
    @staticmethod
    def forward(ctx, x, index, segments):
        rows = index[:, None].expand_as(x)
        top = x.new_zeros(segments, x.shape[1]).scatter_reduce(
            0, rows, x.detach(), "amax", include_self=False
        )
        y = torch.zeros_like(top).index_add(0, index, (x - top[index]).exp()).log() + top
        ctx.save_for_backward(x, index, y)
        return y

    @staticmethod
    def gradients(ctx, g, spread):
        x, index, y = ctx.saved_tensors
        return spread(g, index) * (x - spread(y, index)).exp(), None, None

    @staticmethod
    def backward(ctx, g):
        return SegmentLogSumExp.gradients(ctx, g, lambda a, index: a[index])


class SegmentLogSumExpSorted(SegmentLogSumExp):
    @staticmethod
    def backward(ctx, g):
        def spread(a, index):
            return a.repeat_interleave(index.bincount(minlength=a.shape[0]), 0)

        return SegmentLogSumExp.gradients(ctx, g, spread)


def _segment_logsumexp(function):
    def segment_logsumexp(x, index, segments=3):
        """logsumexp (segments, D) of the rows of x (E, D), whose segments index (E,) names: each has a row."""
        expect(
            x.dim() == 2 and index.shape == x.shape[:1], "x (E, D), index (E,)", tuple(index.shape)
        )
        named = set(index.tolist())
        expect(named == set(range(segments)), "a row of each segment", named)
        return function.apply(x, index, segments)

    return segment_logsumexp


add(
    "segment_logsumexp_sorted",
    _segment_logsumexp,
    SegmentLogSumExpSorted,
    SegmentLogSumExp,
    lambda: (real(5, 2), torch.tensor([0, 0, 1, 2, 2])),
    bug="backward repeats each segment's row by its count: right where the index is sorted",
    shows="an index that is not sorted",
)


class TopKGate(Function):
    @staticmethod
    def forward(ctx, logits, k):
        p = logits.softmax(-1)
        weights, index = p.topk(k)
        ctx.save_for_backward(p, index)
        ctx.mark_non_differentiable(index)
        return weights, index

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        p, index = ctx.saved_tensors
        return softmax_backward(p, torch.zeros_like(p).scatter(-1, index, g)), None


class TopKGateChosen(TopKGate):
    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        p, index = ctx.saved_tensors
        chosen = softmax_backward(p.gather(-1, index), g)
        return torch.zeros_like(p).scatter(-1, index, chosen), None


def _top_k_gate(function):
    def top_k_gate(logits, k=2):
        """The k largest of softmax(logits), logits (N, E), not renormalised, and whose they are, both (N, k).

        k from 1 to E.
        """
        expect(logits.dim() == 2, "logits (N, E)", tuple(logits.shape))
        expect(1 <= k <= logits.shape[1], "k from 1 to E", k)
        return function.apply(logits, k)

    return top_k_gate


add(
    "top_k_gate_chosen",
    _top_k_gate,
    TopKGateChosen,
    TopKGate,
    lambda: (real(3, 4),),
    bug="the experts that were not chosen get no gradient, though they are in the denominator",
    shows="the sample",
)


class AutoPool(Function):
    @staticmethod
    def forward(ctx, x, beta):
        ctx.save_for_backward(x, beta)
        return ((x * beta[:, None]).softmax(-1) * x).sum(-1)

    @staticmethod
    def gradients(ctx, g, slope):
        x, beta = ctx.saved_tensors
        p = (x * beta[:, None]).softmax(-1)
        d = x - (p * x).sum(-1, keepdim=True)
        share = g[..., None] * p
        return share * (1 + slope(beta[:, None]) * d), (share * d * x).sum((0, 2))

    @staticmethod
    def backward(ctx, g):
        return AutoPool.gradients(ctx, g, lambda beta: beta)


class AutoPoolOne(AutoPool):
    @staticmethod
    def backward(ctx, g):
        return AutoPool.gradients(ctx, g, lambda beta: 1)


def _auto_pool(function):
    def auto_pool(x, beta):
        """Σ softmax(beta x) x over time of x (N, C, T), T > 0, with beta (C,), to (N, C)."""
        expect(x.dim() == 3 and x.shape[2], "x (N, C, T), T > 0", tuple(x.shape))
        expect(beta.shape == x.shape[1:2], "beta (C,)", tuple(beta.shape))
        return function.apply(x, beta)

    return auto_pool


add(
    "auto_pool_beta",
    _auto_pool,
    AutoPoolOne,
    AutoPool,
    lambda: (real(2, 3, 4), real(3, seed=1)),
    bug="beta is left out of x's gradient",
    shows="the sample",
)
