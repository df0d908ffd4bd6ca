"""Transforms: second derivatives, forward mode, vmap, compiled paths and what is marked."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
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


# Means and variances of a signal (B, T) within windows
def window_moments(wrong):
    class Moments(Function):
        @staticmethod
        def forward(ctx, x, size):
            ctx.save_for_backward(x)
            ctx.size = size
            windows = x.unfold(1, size, 1)
            mean, variance = windows.mean(-1), windows.var(-1, correction=0)
            if wrong:
                ctx.mark_non_differentiable(variance)
            return mean, variance

        @staticmethod
        def backward(ctx, gm, gv):
            (x,) = ctx.saved_tensors
            windows = x.unfold(1, ctx.size, 1)
            centred = windows - windows.mean(-1, keepdim=True)
            parts = (gm[:, :, None] + 2 * gv[:, :, None] * centred) / ctx.size
            rest = ctx.size - 1
            return sum(F.pad(parts[:, :, k], (k, rest - k)) for k in range(ctx.size)), None

    def moments(x, size=3):
        sized("x", x, None, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(isinstance(size, int) and 1 <= size <= x.shape[1], "size: expected a window within x")
        bounded("x", x, -1e3, 1e3)
        return Moments.apply(x, size)

    return moments


add(
    "window_moments_marked",
    window_moments,
    lambda: (real(2, 6),),
    bug="Forward marks the variances as non-differentiable, as if they were counts",
    trigger="a loss of the variances",
    missed="an output without a gradient may be meant: it is a note",
)


# CurricularFace: cosines (N, C) with a margin at the target, those above it made larger
def curricular(wrong):
    def parts(cosines, target, margin):
        hit = F.one_hot(target, cosines.shape[1]).bool()
        at = cosines.gather(1, target[:, None])
        root = (1 - at.square()).sqrt()
        level = at * math.cos(margin) - root * math.sin(margin)
        return hit, level, math.cos(margin) + at / root * math.sin(margin), cosines > level

    class Curricular(Function):
        @staticmethod
        def forward(ctx, cosines, target, t, margin):
            ctx.save_for_backward(cosines, target)
            ctx.save_for_forward(cosines, target)
            ctx.settings = t, margin
            hit, level, _, hard = parts(cosines, target, margin)
            return torch.where(hit, level, torch.where(hard, cosines * (t + cosines), cosines))

        @staticmethod
        def slope(ctx, mine):
            cosines, target = ctx.saved_tensors
            t, margin = ctx.settings
            hit, _, bend, hard = parts(cosines, target, margin)
            steep = t + mine * cosines
            return torch.where(hit, bend, torch.where(hard, steep, torch.ones_like(steep)))

        @staticmethod
        def backward(ctx, g):
            return g * Curricular.slope(ctx, 2), None, None, None

        @staticmethod
        def jvp(ctx, tangent, *_):
            return tangent * Curricular.slope(ctx, 1 if wrong else 2)

    def logits(cosines, target, t=0.3, margin=0.5):
        sized("cosines", cosines, None, None)
        sized("target", target, len(cosines))
        indices("target", target, cosines.shape[1])
        check(cosines.is_floating_point(), "cosines: expected floating point numbers")
        check(0 <= t <= 1, "t: expected a number from 0 to 1")
        check(0 <= margin <= 1, "margin: expected an angle from 0 to 1")
        bounded("cosines", cosines, -0.99, 0.99)
        return Curricular.apply(cosines, target, t, margin)

    return logits


add(
    "curricular_tangent",
    curricular,
    lambda: (
        (real(4, 3, grad=False) / 3).clamp(-0.9, 0.9).requires_grad_(),
        torch.tensor([0, 2, 1, 1]),
    ),
    bug="The forward-mode rule lacks a term of the hard classes' product",
    trigger="forward mode",
)


# Itakura and Saito's divergence p / q - log(p / q) - 1 of each element
def itakura(wrong):
    class Itakura(Function):
        @staticmethod
        def forward(p, q):
            bounded("p", p, 1e-3, 1e3)
            bounded("q", q, 1e-3, 1e3)
            return p / q - (p / q).log() - 1

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            p, q = ctx.saved_tensors
            return g * (1 / q - 1 / p), g * (q - p) / q.square()

        @staticmethod
        def vmap(info, in_dims, p, q):
            if wrong:
                return Itakura.apply(p, q), 0
            p, q = (
                t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
                for t, d in zip((p, q), in_dims, strict=True)
            )
            return Itakura.apply(p, q), 0

    def divergence(p, q):
        same(p, q)
        alike(p, q)
        return Itakura.apply(p, q)

    return divergence


add(
    "itakura_dims",
    itakura,
    lambda: (real(3, 3, positive=True), real(3, 3, seed=1, positive=True)),
    bug="The vmap rule takes the first dimension of both for the batch",
    trigger="vmap over another dimension",
)


# A step of an epidemic: susceptible and infected after a time dt
def epidemic(wrong):
    class Step(Function):
        @staticmethod
        def forward(ctx, s, i, beta, gamma, dt):
            ctx.save_for_backward(s, i, beta, gamma)
            ctx.dt = dt
            new = dt * beta * s * i
            return s - new, i + new - dt * gamma * i

        @staticmethod
        def backward(ctx, gs, gi):
            s, i, beta, gamma = ctx.saved_tensors
            if wrong:
                beta = beta.detach()
            flow = ctx.dt * (gi - gs)
            by_s = gs + flow * beta * i
            by_i = gi + flow * beta * s - ctx.dt * gi * gamma
            return by_s, by_i, flow * s * i, -ctx.dt * gi * i, None

    def step(s, i, beta, gamma, dt=0.2):
        same(s, i, beta, gamma)
        alike(s, i, beta, gamma)
        check(1e-3 <= dt <= 1, "dt: expected a number from 0.001 to 1")
        for name, t in {"s": s, "i": i, "beta": beta, "gamma": gamma}.items():
            bounded(name, t, 0, 100)
        return Step.apply(s, i, beta, gamma, dt)

    return step


add(
    "epidemic_detached",
    epidemic,
    lambda: tuple(real(4, seed=s, positive=True) for s in range(4)),
    bug="Backward detaches the rate of infection",
    trigger="a second derivative by the rate and the numbers of people",
)


# The scale-invariant ratio of signal to distortion, in decibels, along a dimension
def invariant_ratio(wrong):
    decibels = 10 / math.log(10)

    class Ratio(Function):
        @staticmethod
        def forward(x, s, dim):
            a, xx, ss = (x * s).sum(dim), x.square().sum(dim), s.square().sum(dim)
            cosine = a / (xx * ss).sqrt()
            bounded("x", xx, 1e-6, 1e6)
            bounded("s", ss, 1e-6, 1e6)
            bounded("the cosine's size", cosine.abs(), 1e-3, 0.999)
            return decibels * (a.square().log() - (xx * ss - a.square()).log())

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs[:2])
            ctx.dim = inputs[2]

        @staticmethod
        def backward(ctx, g):
            x, s = ctx.saved_tensors
            a, xx, ss = ((p * q).sum(ctx.dim, keepdim=True) for p, q in ((x, s), (x, x), (s, s)))
            rest = xx * ss - a.square()
            g = 2 * decibels * g.unsqueeze(ctx.dim)
            along = 1 / a + a / rest
            return g * (along * s - ss * x / rest), g * (along * x - xx * s / rest), None

        @staticmethod
        def vmap(info, in_dims, x, s, dim):
            x, s = (
                t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
                for t, d in zip((x, s), in_dims, strict=False)
            )
            return Ratio.apply(x, s, dim if wrong else dim + 1), 0

    def ratio(x, s, dim=-1):
        same(x, s)
        alike(x, s)
        check(-x.ndim <= dim < x.ndim, "dim: expected one of x's dimensions")
        return Ratio.apply(x, s, dim % x.ndim)

    return ratio


add(
    "invariant_ratio_dim",
    invariant_ratio,
    lambda: (real(3, 5), real(3, 5, seed=1)),
    bug="The vmap rule puts the batch first but leaves the dimension's number as it was",
    trigger="vmap",
)


# Cauchy's loss c^2 / 2 log(1 + ((x - y) / c)^2) of each element, with a forward-mode rule
def cauchy_loss(wrong):
    class Cauchy(Function):
        @staticmethod
        def forward(ctx, x, y, c):
            ctx.save_for_backward(x, y)
            ctx.save_for_forward(x, y)
            ctx.set_materialize_grads(False)
            ctx.c = c
            return c * c / 2 * torch.log1p(((x - y) / c).square())

        @staticmethod
        def slope(ctx):
            x, y = ctx.saved_tensors
            return (x - y) / (1 + ((x - y) / ctx.c).square())

        @staticmethod
        def backward(ctx, g):
            if g is None:
                return None, None, None
            grad = g * Cauchy.slope(ctx)
            return grad, -grad, None

        @staticmethod
        def jvp(ctx, tx, ty, _):
            if tx is not None and ty is not None:
                return (tx - ty) * Cauchy.slope(ctx)
            if wrong:
                return (ty if tx is None else tx) * Cauchy.slope(ctx)
            return (-ty if tx is None else tx) * Cauchy.slope(ctx)

    def loss(x, y, c=1.3):
        same(x, y)
        alike(x, y)
        check(0.1 <= c <= 100, "c: expected a number from 0.1 to 100")
        bounded("x", x, -1e3, 1e3)
        bounded("y", y, -1e3, 1e3)
        return Cauchy.apply(x, y, c)

    return loss


add(
    "cauchy_lone_tangent",
    cauchy_loss,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="The forward-mode rule forgets the minus where only the targets have a tangent",
    trigger="forward mode by the targets alone",
)


# FReLU: the larger of x (B, C, T) and a learned filter's output per channel
def funnel(wrong):
    def columns(x, size):
        return F.pad(x, (size // 2, size // 2)).unfold(2, size, 1)

    class Funnel(Function):
        @staticmethod
        def forward(ctx, x, w):
            read = columns(x, w.shape[1])
            ctx.save_for_backward(x, w, read if wrong else None)
            return torch.maximum(x, (read * w[:, None]).sum(-1))

        @staticmethod
        def backward(ctx, g):
            x, w, read = ctx.saved_tensors
            size = w.shape[1]
            read = columns(x, size) if read is None else read
            own = x >= (read * w[:, None]).sum(-1)
            h = torch.where(own, torch.zeros_like(g), g)[..., None]
            parts = h * w[:, None]
            spread = sum(F.pad(parts[..., k], (k, size - 1 - k)) for k in range(size))
            spread = spread[:, :, size // 2 : size // 2 + x.shape[2]]
            return g - h[..., 0] + spread, (h * read).sum((0, 2))

    def activate(x, w):
        sized("x", x, None, None, None)
        sized("w", w, x.shape[1], None)
        check(w.shape[1] % 2 == 1, "w: expected filters of odd length")
        alike(x, w)
        bounded("x", x, -1e3, 1e3)
        bounded("w", w, -1e3, 1e3)
        return Funnel.apply(x, w)

    return activate


add(
    "funnel_columns",
    funnel,
    lambda: (real(2, 2, 5), real(2, 3, seed=1)),
    bug="Backward takes the columns that forward made and saved, which autograd knows nothing of",
    trigger="a second derivative by the filters and the signal",
)


# A soft edit distance: the least cost of steps through a table (N, M) of costs, with a gap's cost and soft minima
def edit_distance(wrong):
    def table(costs, gap, gamma):
        n, m = costs.shape
        rows = [[costs.new_tensor(gap * j) for j in range(m + 1)]]
        for i in range(n):
            row = [costs.new_tensor(gap * (i + 1))]
            for j in range(m):
                ways = [rows[i][j] + costs[i, j], rows[i][j + 1] + gap, row[j] + gap]
                row.append(-gamma * torch.logsumexp(torch.stack(ways) / -gamma, 0))
            rows.append(row)
        return rows

    class Distance(Function):
        @staticmethod
        def forward(ctx, costs, gap, gamma):
            ctx.save_for_backward(costs)
            ctx.settings = gap, gamma
            return table(costs, gap, gamma)[-1][-1].clone()

        @staticmethod
        def backward(ctx, g):
            (costs,) = ctx.saved_tensors
            gap, gamma = ctx.settings
            rows = table(costs, gap, gamma)
            if wrong and torch.compiler.is_compiling():
                gamma = 1.0
            n, m = costs.shape
            flow = [[0.0] * (m + 1) for _ in range(n + 1)]
            flow[n][m] = g
            grad = [[None] * m for _ in range(n)]
            for i in reversed(range(n)):
                for j in reversed(range(m)):
                    here, f = rows[i + 1][j + 1], flow[i + 1][j + 1]
                    match = f * ((here - rows[i][j] - costs[i, j]) / gamma).exp()
                    grad[i][j] = match
                    flow[i][j] = flow[i][j] + match
                    up, left = rows[i][j + 1] + gap, rows[i + 1][j] + gap
                    flow[i][j + 1] = flow[i][j + 1] + f * ((here - up) / gamma).exp()
                    flow[i + 1][j] = flow[i + 1][j] + f * ((here - left) / gamma).exp()
            return torch.stack([torch.stack(row) for row in grad]), None, None

    def distance(costs, gap=0.8, gamma=0.5):
        sized("costs", costs, None, None)
        check(costs.dtype in (torch.float32, torch.float64), "costs: expected float32 or float64")
        check(0 <= gap <= 100, "gap: expected a number from 0 to 100")
        check(0.1 <= gamma <= 10, "gamma: expected a number from 0.1 to 10")
        if not torch.compiler.is_compiling():
            bounded("costs", costs, -100, 100)
        return Distance.apply(costs, gap, gamma)

    return distance


add_bare(
    "edit_distance_compiled",
    edit_distance,
    lambda: (real(2, 3, positive=True),),
    bug="Compiled, backward takes the soft minimum's temperature for 1",
    trigger="torch.compile",
)
