"""Precision: dtypes, accumulators and differences of nearly equal numbers."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.thirtyninth import (
    add,
    add_bare,
    alike,
    bounded,
    check,
    indices,
    same,
    sized,
)


# Hierarchical softmax: for each row x (N, D) the nodes (N, L) on the way to its class and the turns there, smoothed
def tree_loss(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, x, table, nodes, turns, smoothing):
            ctx.save_for_backward(x, table, nodes, turns)
            ctx.smoothing = smoothing
            z = torch.einsum("nd,nld->nl", x, table[nodes])
            wanted = turns.to(x.dtype) * (1 - 2 * smoothing) + smoothing
            return (F.softplus(z) - wanted * z).sum()

        @staticmethod
        def backward(ctx, g):
            x, table, nodes, turns = ctx.saved_tensors
            if wrong:
                wanted = torch.where(turns, 1 - ctx.smoothing, ctx.smoothing)
            else:
                wanted = turns.to(x.dtype) * (1 - 2 * ctx.smoothing) + ctx.smoothing
            z = torch.einsum("nd,nld->nl", x, table[nodes])
            h = g * (z.sigmoid() - wanted)
            rows = (h[:, :, None] * x[:, None]).flatten(0, 1)
            by_table = torch.zeros_like(table).index_add(0, nodes.flatten(), rows)
            return torch.einsum("nl,nld->nd", h, table[nodes]), by_table, None, None, None

    def loss(x, table, nodes, turns, smoothing=0.1):
        sized("x", x, None, None)
        sized("table", table, None, x.shape[1])
        sized("nodes", nodes, len(x), None)
        same(nodes, turns)
        alike(x, table)
        check(turns.dtype == torch.bool, "turns: expected booleans")
        indices("nodes", nodes, len(table))
        check(0 <= smoothing <= 0.4, "smoothing: expected a number from 0 to 0.4")
        bounded("x", x, -100, 100)
        bounded("table", table, -100, 100)
        return Loss.apply(x, table, nodes, turns, smoothing)

    return loss


add(
    "tree_loss_scalars",
    tree_loss,
    lambda: (real(3, 4), real(5, 4, seed=1), whole(5, 3, 2), whole(2, 3, 2, seed=1).bool()),
    bug="Backward makes the smoothed targets by torch.where of two Python numbers, which gives float32",
    trigger="float64 and a tolerance below 1e-8",
)


# Energy per channel, normalised: a filter bank on spectra (T, F), each channel divided by its running mean
def channel_energies(wrong):
    alpha, delta, root, rate, eps = 0.9, 2.0, 0.5, 0.3, 1e-2

    def parts(e):
        run, m = [], e[0]
        for row in e:
            m = (1 - rate) * m + rate * row
            run.append(m)
        level = torch.stack(run) + eps
        return level, e * level**-alpha + delta

    class Energies(Function):
        @staticmethod
        def forward(ctx, x, bank):
            e = x @ bank
            ctx.save_for_backward(x, bank, e)
            wide = e.float() if e.dtype in (torch.bfloat16, torch.float16) else e
            return (parts(wide)[1] ** root - delta**root).to(e.dtype)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            x, bank, e = ctx.saved_tensors
            low = e.dtype in (torch.bfloat16, torch.float16)
            wide = e.float() if low else e
            level, base = parts(wide)
            h = g.to(wide.dtype) * root * base ** (root - 1)
            by_level = -alpha * h * wide * level ** (-alpha - 1)
            by_e = list((h * level**-alpha).unbind(0))
            carry = torch.zeros_like(by_e[0])
            for t in reversed(range(len(by_e))):
                carry = carry + by_level[t]
                by_e[t] = by_e[t] + rate * carry
                carry = (1 - rate) * carry
            by_e[0] = by_e[0] + carry
            by_e = torch.stack(by_e).to(e.dtype if wrong else x.dtype)
            return by_e @ bank.mT, x.mT @ by_e

    def energies(x, bank):
        sized("x", x, None, None)
        sized("bank", bank, x.shape[1], None)
        alike(x, bank)
        bounded("x", x, 0, 100)
        bounded("bank", bank, 0, 100)
        return Energies.apply(x, bank)

    return energies


add_bare(
    "channel_energies_autocast",
    channel_energies,
    lambda: (real(4, 3, positive=True), real(3, 2, seed=1, positive=True)),
    bug="Under autocast backward multiplies bfloat16 by the saved float32 tensors and fails",
    trigger="torch.autocast",
)


# The spherical softmax (x^2 + eps) / sum (x^2 + eps) of weighted classes
def spherical_softmax(wrong):
    class Softmax(Function):
        @staticmethod
        def forward(ctx, x, weight, eps):
            ctx.save_for_backward(x, weight)
            ctx.eps = eps
            a = weight * (x.square() + eps)
            return a / a.sum(-1, keepdim=True)

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            square = x.square() + ctx.eps
            a = weight * square
            total = a.sum(-1, keepdim=True)
            h = (g - (g * a).sum(-1, keepdim=True) / total) / total
            by_weight = (h * square).flatten(0, -2)
            if wrong:
                by_weight = by_weight.to(x.dtype)
            return (2 * x * weight * h).to(x.dtype), by_weight.sum(0).to(weight.dtype), None

    def softmax(x, weight, eps=1e-2):
        check(x.ndim >= 2 and x.numel() > 0, "x: expected rows of numbers")
        sized("weight", weight, x.shape[-1])
        check(
            x.is_floating_point() and weight.is_floating_point(), "expected floating point numbers"
        )
        check(1e-4 <= eps <= 1, "eps: expected a number from 1e-4 to 1")
        bounded("x", x, -100, 100)
        bounded("weight", weight, 1e-2, 100)
        return Softmax.apply(x, weight, eps)

    return softmax


add(
    "spherical_softmax_weight",
    spherical_softmax,
    lambda: (real(3, 4), real(4, seed=1, positive=True)),
    bug="The weights' gradient is rounded to the dtype of x before the sum",
    trigger="x in float32 and weights in float64",
    missed="two inputs of different dtypes, and the eighth digit",
)


# The residual free energy of a gas after Redlich and Kwong: -t log(1 - b / v) - a / (b sqrt(t)) log(1 + b / v)
def residual_energy(wrong):
    class Energy(Function):
        @staticmethod
        def forward(ctx, v, t, a, b):
            ctx.save_for_backward(v, t)
            ctx.settings = a, b
            return -t * torch.log1p(-b / v) - a / b * t.rsqrt() * torch.log1p(b / v)

        @staticmethod
        def backward(ctx, g):
            v, t = ctx.saved_tensors
            a, b = ctx.settings
            repelled = 1 / v - 1 / (v - b) if wrong else -b / (v * (v - b))
            by_v = t * repelled + a * t.rsqrt() / (v * (v + b))
            by_t = a / (2 * b) * t**-1.5 * torch.log1p(b / v) - torch.log1p(-b / v)
            return g * by_v, g * by_t, None, None

    def energy(v, t, a=0.6, b=0.05):
        same(v, t)
        alike(v, t)
        check(0 <= a <= 100, "a: expected a number from 0 to 100")
        check(1e-3 <= b <= 1, "b: expected a number from 0.001 to 1")
        bounded("v", v, 1.5 * b, 1e6)
        bounded("t", t, 0.05, 1e3)
        return Energy.apply(v, t, a, b)

    return energy


add(
    "residual_energy_thin",
    residual_energy,
    lambda: (real(5, positive=True), real(5, seed=1, positive=True)),
    bug="Backward takes the difference of 1 / v and 1 / (v - b), which cancels",
    trigger="a volume far above b, in float32 above all",
    missed="it cancels where the gradient is small beside others, in float32",
)


# Signed distances of a line (a point and a direction) from other lines (N, 3), (N, 3)
def line_distances(wrong):
    def wide(*tensors):
        dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        return (t.to(dtype) for t in tensors)

    def total(rows, dtype):
        if not wrong:
            return rows.sum(0).to(dtype)
        acc = torch.zeros(3, dtype=dtype, device=rows.device)
        for row in rows:
            acc = acc + row.to(dtype)
        return acc

    class Distances(Function):
        @staticmethod
        def forward(ctx, point, way, points, ways):
            ctx.save_for_backward(point, way, points, ways)
            p, d, q, e = wide(point, way, points, ways)
            n = torch.linalg.cross(d.expand_as(e), e)
            return (((q - p) * n).sum(1) / n.norm(dim=1)).to(point.dtype)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            p, d, q, e, g = wide(*ctx.saved_tensors, g)
            dtype = ctx.saved_tensors[0].dtype
            n = torch.linalg.cross(d.expand_as(e), e)
            length = n.norm(dim=1, keepdim=True)
            u = n / length
            g = g[:, None]
            along = g * u
            by_n = g * (q - p - u * ((q - p) * u).sum(1, keepdim=True)) / length
            by_way = torch.linalg.cross(e, by_n)
            by_ways = torch.linalg.cross(by_n, d.expand_as(e))
            return total(-along, dtype), total(by_way, dtype), along.to(dtype), by_ways.to(dtype)

    def distances(point, way, points, ways):
        sized("point", point, 3)
        sized("way", way, 3)
        sized("points", points, None, 3)
        same(points, ways)
        alike(point, way, points, ways)
        for name, t in {"point": point, "points": points}.items():
            bounded(name, t, -100, 100)
        bounded("way", way.detach().float().norm(), 0.1, 10)
        bounded("ways", ways.detach().float().norm(dim=1), 0.1, 10)
        n = torch.linalg.cross(way.detach().float().expand_as(ways), ways.detach().float())
        bounded("the common normal", n.norm(dim=1), 1e-2, 100)
        return Distances.apply(point, way, points, ways)

    return distances


add(
    "line_distances_narrow",
    line_distances,
    lambda: (real(3), real(3, seed=1), real(5, 3, seed=2), real(5, 3, seed=3)),
    bug="The shared line's gradient is summed in the line's own dtype",
    trigger="float16 or bfloat16 and many lines",
    own=True,
)
