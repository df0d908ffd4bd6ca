"""Layers."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.seventeenth import add
from tests.verify.unseen.sixteenth import expect


class Adder(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return -(x[:, None] - w).abs().sum(-1)

    @staticmethod
    def gradients(ctx, g, sign):
        x, w = ctx.saved_tensors
        d = g[..., None] * sign(x[:, None] - w)
        return -d.sum(1), d.sum(0)

    @staticmethod
    def backward(ctx, g):
        return Adder.gradients(ctx, g, torch.sign)


class AdderTies(Adder):
    @staticmethod
    def backward(ctx, g):
        return Adder.gradients(ctx, g, lambda d: torch.where(d > 0, 1, -1))


def _adder(function):
    def adder(x, w):
        """-Σ |x - w| over the features of x (N, D) and w (O, D), to (N, O); where they are equal the slope is 0."""
        expect(
            x.dim() == w.dim() == 2 and x.shape[1] == w.shape[1],
            "x (N, D), w (O, D)",
            tuple(w.shape),
        )
        return function.apply(x, w)

    return adder


add(
    "adder_ties",
    _adder,
    AdderTies,
    Adder,
    lambda: (real(3, 4), real(2, 4, seed=1)),
    bug="the slope is 1 or -1, also where an input equals the weight",
    shows="an input equal to the weight, such as zeros",
    missed="at a kink any slope between those of the two sides is right",
)


class InPlaceNorm(Function):
    """Only the output is kept: the normalised input is found from it, by the inverse of what comes after."""

    @staticmethod
    def wide(a, x):
        return a.view(-1, *[1] * (x.dim() - 2))

    @staticmethod
    def forward(ctx, x, w, b, slope, eps):
        dims = [i for i in range(x.dim()) if i != 1]
        mean = x.mean(dims, keepdim=True)
        rstd = (x.var(dims, unbiased=False, keepdim=True) + eps).rsqrt()
        y = F.leaky_relu((x - mean) * rstd * InPlaceNorm.wide(w, x) + InPlaceNorm.wide(b, x), slope)
        ctx.save_for_backward(y, w, b, rstd)
        ctx.slope = slope
        return y

    @staticmethod
    def gradients(ctx, g, slope):
        y, w, b, rstd = ctx.saved_tensors
        dims = [i for i in range(y.dim()) if i != 1]
        slopes = torch.where(y > 0, y.new_tensor(1), slope)
        w, b = InPlaceNorm.wide(w, y), InPlaceNorm.wide(b, y)
        normal, g = (y / slopes - b) / w, g * slopes
        d = g * w
        grad = (
            d - d.mean(dims, keepdim=True) - normal * (d * normal).mean(dims, keepdim=True)
        ) * rstd
        return grad, (g * normal).sum(dims), g.sum(dims), None, None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return InPlaceNorm.gradients(ctx, g, ctx.slope)


class InPlaceNormHundredth(InPlaceNorm):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return InPlaceNorm.gradients(ctx, g, 0.01)


def _in_place_norm(function):
    def in_place_norm(x, w, b, slope=0.01, eps=1e-5):
        """leaky_relu of the batch norm of x (N, C, *), by its own statistics, w and b (C,); N * > 1.

        |w| from 0.1 to 10, |b| <= 10, slope from 0.01 to 1, eps from 1e-6 to 1.
        """
        expect(
            x.dim() > 1 and w.shape == b.shape == x.shape[1:2],
            "x (N, C, *), w, b (C,)",
            tuple(w.shape),
        )
        expect(x.numel() > x.shape[1] > 0, "more than one value of a channel", tuple(x.shape))
        expect(((w.abs() >= 0.1) & (w.abs() <= 10)).all(), "|w| from 0.1 to 10", w)
        expect((b.abs() <= 10).all(), "|b| <= 10", b)
        expect(0.01 <= slope <= 1 and 1e-6 <= eps <= 1, "slope, eps", (slope, eps))
        return function.apply(x, w, b, slope, eps)

    return in_place_norm


add(
    "in_place_norm_slope",
    _in_place_norm,
    InPlaceNormHundredth,
    InPlaceNorm,
    lambda: (real(4, 3, 2), real(3, seed=1, positive=True), real(3, seed=2)),
    bug="backward undoes the activation with the default slope",
    shows="slope other than 0.01",
)


class KeptOutputNorm(Function):
    """The output is kept, not the input: the next layer keeps it anyway."""

    @staticmethod
    def forward(ctx, x, w, b, eps):
        dims = list(range(-w.dim(), 0))
        mean = x.mean(dims, keepdim=True)
        rstd = (x.var(dims, unbiased=False, keepdim=True) + eps).rsqrt()
        y = (x - mean) * rstd * w + b
        ctx.save_for_backward(y, w, b, rstd)
        return y

    @staticmethod
    def gradients(ctx, g, dims):
        y, w, b, rstd = ctx.saved_tensors
        normal = (y - b) / w
        d = g * w
        grad = (
            d - d.mean(dims, keepdim=True) - normal * (d * normal).mean(dims, keepdim=True)
        ) * rstd
        return grad, (g * normal).sum_to_size(w.shape), g.sum_to_size(b.shape), None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return KeptOutputNorm.gradients(ctx, g, list(range(-ctx.saved_tensors[1].dim(), 0)))


class KeptOutputNormLast(KeptOutputNorm):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return KeptOutputNorm.gradients(ctx, g, [-1])


def _kept_output_norm(function):
    def kept_output_norm(x, w, b, eps=1e-5):
        """Layer norm of x over its last dimensions, those of w and b, one or more; not empty.

        |w| from 0.1 to 10, |b| <= 10, eps from 1e-6 to 1.
        """
        expect(w.dim() and w.shape == b.shape and w.numel(), "w, b of one shape", tuple(b.shape))
        expect(x.shape[x.dim() - w.dim() :] == w.shape, "x (*, w's shape)", tuple(x.shape))
        expect(((w.abs() >= 0.1) & (w.abs() <= 10)).all(), "|w| from 0.1 to 10", w)
        expect((b.abs() <= 10).all(), "|b| <= 10", b)
        expect(1e-6 <= eps <= 1, "eps", eps)
        return function.apply(x, w, b, eps)

    return kept_output_norm


add(
    "kept_output_norm_dims",
    _kept_output_norm,
    KeptOutputNormLast,
    KeptOutputNorm,
    lambda: (real(3, 4), real(4, seed=1, positive=True), real(4, seed=2)),
    bug="backward's means are over the last dimension alone",
    shows="w of two dimensions",
)


class GraphNorm(Function):
    @staticmethod
    def means(x, graph, count):
        total = x.new_zeros(count, x.shape[1]).index_add(0, graph, x)
        return (total / torch.bincount(graph, minlength=count).clamp(min=1)[:, None])[graph]

    @staticmethod
    def parts(x, graph, a, count, eps):
        mean = GraphNorm.means(x, graph, count)
        c = x - a * mean
        return mean, c, (GraphNorm.means(c.square(), graph, count) + eps).rsqrt()

    @staticmethod
    def forward(ctx, x, graph, a, w, b, count, eps):
        ctx.save_for_backward(x, graph, a, w)
        ctx.options = count, eps
        _, c, rstd = GraphNorm.parts(x, graph, a, count, eps)
        return c * rstd * w + b

    @staticmethod
    def gradients(ctx, g, through):
        x, graph, a, w = ctx.saved_tensors
        count, eps = ctx.options
        mean, c, rstd = GraphNorm.parts(x, graph, a, count, eps)
        normal, d = c * rstd, g * w
        spread = normal * GraphNorm.means(d * normal, graph, count)
        of_c = (d - spread) * rstd
        of_mean = GraphNorm.means(through(d, spread) * rstd, graph, count)
        return (
            of_c - a * of_mean,
            None,
            -(of_c * mean).sum(0),
            (g * normal).sum(0),
            g.sum(0),
            None,
            None,
        )

    @staticmethod
    def backward(ctx, g):
        return GraphNorm.gradients(ctx, g, lambda d, spread: d - spread)


class GraphNormCentred(GraphNorm):
    @staticmethod
    def backward(ctx, g):
        return GraphNorm.gradients(ctx, g, lambda d, spread: d)


def _graph_norm(function):
    def graph_norm(x, graph, a, w, b, count, eps=1e-5):
        """c / √(mean c² + eps) w + b, c = x - a mean x, of x (N, D); a, w, b (D,); the means are over each graph.

        graph (N,): integers below count, in any order; eps from 1e-6 to 1.
        """
        expect(
            x.dim() == 2 and graph.shape == x.shape[:1], "x (N, D), graph (N,)", tuple(graph.shape)
        )
        expect(a.shape == w.shape == b.shape == x.shape[1:], "a, w, b (D,)", tuple(a.shape))
        expect(((graph >= 0) & (graph < count)).all(), "graph below count", graph)
        expect(1e-6 <= eps <= 1, "eps", eps)
        return function.apply(x, graph, a, w, b, count, eps)

    return graph_norm


add(
    "graph_norm_shift",
    _graph_norm,
    GraphNormCentred,
    GraphNorm,
    lambda: (
        real(5, 3),
        torch.tensor([0, 0, 1, 1, 1]),
        torch.ones(3, dtype=F64, requires_grad=True),
        real(3, seed=2),
        real(3, seed=3),
        2,
    ),
    bug="the deviation's gradient does not go on through the mean: c's mean is taken to be 0",
    shows="a other than 1",
)
