"""Layers."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.sixteenth import add, expect
from tests.verify.unseen.sixteenth_indices import below


class DyT(Function):
    @staticmethod
    def forward(ctx, x, alpha, w, b):
        y = (alpha * x).tanh() * w + b
        ctx.save_for_backward(x, alpha, w, y)
        return y

    @staticmethod
    def gradients(ctx, g, slope):
        x, alpha, w, y = ctx.saved_tensors
        t = (alpha * x).tanh()
        d = g * w * slope(t, y)
        rows = list(range(x.dim() - 1))
        return d * alpha, (d * x).sum(), (g * t).sum(rows), g.sum(rows)

    @staticmethod
    def backward(ctx, g):
        return DyT.gradients(ctx, g, lambda t, y: 1 - t.square())


class DyTOutput(DyT):
    @staticmethod
    def backward(ctx, g):
        return DyT.gradients(ctx, g, lambda t, y: 1 - y.square())


def _dyt(function):
    def dynamic_tanh(x, alpha, w, b):
        """w tanh(alpha x) + b of x (N, *, D), with alpha (), w and b (D,)."""
        expect(x.dim() > 1 and w.shape == b.shape == x.shape[-1:], "w, b (D,)", tuple(w.shape))
        expect(alpha.dim() == 0, "alpha ()", tuple(alpha.shape))
        return function.apply(x, alpha, w, b)

    return dynamic_tanh


add(
    "dynamic_tanh_output",
    _dyt,
    DyTOutput,
    DyT,
    lambda: (
        real(3, 4),
        torch.tensor(0.5, dtype=F64, requires_grad=True),
        real(4, seed=1),
        real(4, seed=2),
    ),
    bug="1 - y² of the output, which is no longer the tanh",
    shows="the sample",
)


class ResponseNorm(Function):
    """Windows over the channels: size // 2 before, (size - 1) // 2 after, as torch's."""

    @staticmethod
    def window(x, before, after):
        x = F.pad(x.movedim(1, -1), (before, after))
        return x.unfold(-1, before + after + 1, 1).sum(-1).movedim(-1, 1)

    @staticmethod
    def forward(ctx, x, size, alpha, beta, k):
        ctx.save_for_backward(x)
        ctx.options = size, alpha, beta, k
        total = ResponseNorm.window(x.square(), size // 2, (size - 1) // 2)
        return x * (k + alpha / size * total) ** -beta

    @staticmethod
    def gradients(ctx, g, before, after):
        (x,) = ctx.saved_tensors
        size, alpha, beta, k = ctx.options
        base = k + alpha / size * ResponseNorm.window(x.square(), size // 2, (size - 1) // 2)
        back = ResponseNorm.window(g * x * base ** (-beta - 1), before, after)
        return g * base**-beta - 2 * alpha * beta / size * x * back, None, None, None, None

    @staticmethod
    def backward(ctx, g):
        size = ctx.options[0]
        return ResponseNorm.gradients(ctx, g, (size - 1) // 2, size // 2)


class ResponseNormSame(ResponseNorm):
    @staticmethod
    def backward(ctx, g):
        size = ctx.options[0]
        return ResponseNorm.gradients(ctx, g, size // 2, (size - 1) // 2)


def _response_norm(function):
    def response_norm(x, size=5, alpha=0.1, beta=0.75, k=1.0):
        """x (k + alpha / size Σ x²)^-beta, the sum over size neighbours in the channels of x (N, C, *), C > 0.

        size from 1 to 16, alpha from 0 to 10, beta from 0 to 2, k from 0.1 to 10.
        """
        expect(x.dim() > 2 and x.shape[1], "x (N, C, *), C > 0", tuple(x.shape))
        expect(isinstance(size, int) and 1 <= size <= 16, "size from 1 to 16", size)
        expect(
            0 <= alpha <= 10 and 0 <= beta <= 2 and 0.1 <= k <= 10,
            "alpha, beta, k",
            (alpha, beta, k),
        )
        return function.apply(x, size, alpha, beta, k)

    return response_norm


add(
    "response_norm_window",
    _response_norm,
    ResponseNormSame,
    ResponseNorm,
    lambda: (real(2, 6, 3, 3),),
    bug="backward sums over forward's window, not over its mirror image",
    shows="an even size",
)


class StdPool(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.cat((x.mean(-1), x.std(-1, unbiased=False)), 1)

    @staticmethod
    def gradients(ctx, g, divide):
        (x,) = ctx.saved_tensors
        of_mean, of_std = (a[..., None] / x.shape[-1] for a in g.chunk(2, 1))
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return of_mean + of_std * divide(centred, variance)

    @staticmethod
    def backward(ctx, g):
        def divide(centred, variance):
            return centred / torch.where(variance > 0, variance, 1).sqrt()

        return StdPool.gradients(ctx, g, divide)


class StdPoolConstant(StdPool):
    @staticmethod
    def backward(ctx, g):
        return StdPool.gradients(ctx, g, lambda centred, variance: centred / variance.sqrt())


def _std_pool(function):
    def std_pool(x):
        """Means and biased standard deviations (N, 2 C) over time of x (N, C, T), T > 0.

        Where a row is constant the deviation's gradient is 0.
        """
        expect(x.dim() == 3 and x.shape[-1], "x (N, C, T), T > 0", tuple(x.shape))
        return function.apply(x)

    return std_pool


add(
    "std_pool_constant",
    _std_pool,
    StdPoolConstant,
    StdPool,
    lambda: (real(2, 3, 5),),
    bug="0 / 0 where the deviation is 0",
    shows="constant rows, one time step",
)


class WeightedGCN(Function):
    """Edges and self loops, both by the square roots of the degrees."""

    @staticmethod
    def scales(edges, w, nodes):
        return (1 + w.new_zeros(nodes).index_add(0, edges[1], w)).rsqrt()

    @staticmethod
    def forward(ctx, x, edges, w):
        ctx.save_for_backward(x, edges, w)
        s = WeightedGCN.scales(edges, w, x.shape[0])
        source, target = edges
        sent = (w * s[source] * s[target])[:, None] * x[source]
        return (s.square()[:, None] * x).index_add(0, target, sent)

    @staticmethod
    def gradients(ctx, g, of_degrees):
        x, (source, target), w = ctx.saved_tensors
        s = WeightedGCN.scales((source, target), w, x.shape[0])
        weights = w * s[source] * s[target]
        grad_x = (s.square()[:, None] * g).index_add(0, source, weights[:, None] * g[target])
        dots = (g[target] * x[source]).sum(1)
        total = 2 * s.square() * (g * x).sum(1)
        total = total.index_add(0, source, weights * dots).index_add(0, target, weights * dots)
        grad_w = s[source] * s[target] * dots + of_degrees(-total * s.square() / 2)[target]
        return grad_x, None, grad_w

    @staticmethod
    def backward(ctx, g):
        return WeightedGCN.gradients(ctx, g, lambda grad: grad)


class WeightedGCNConstant(WeightedGCN):
    @staticmethod
    def backward(ctx, g):
        return WeightedGCN.gradients(ctx, g, torch.zeros_like)


def _weighted_gcn(function):
    def weighted_gcn(x, edges, w):
        """Sums over the edges (2, E), from and to, of x (N, D) by w / √(d d) and 1 / d, d = 1 + Σ w; w (E,) >= 0."""
        expect(
            x.dim() == 2 and edges.shape == (2, *w.shape) and w.dim() == 1,
            "edges (2, E)",
            tuple(edges.shape),
        )
        below(edges, x.shape[0])
        expect((w >= 0).all(), "w >= 0", w)
        return function.apply(x, edges, w)

    return weighted_gcn


add(
    "weighted_gcn_degrees",
    _weighted_gcn,
    WeightedGCNConstant,
    WeightedGCN,
    lambda: (
        real(3, 2),
        torch.tensor([[0, 1, 2, 0], [1, 2, 0, 2]]),
        real(4, seed=1, positive=True),
    ),
    bug="the degrees are taken to be constants, though they are sums of the weights",
    shows="the sample",
)
