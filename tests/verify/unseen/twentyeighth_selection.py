"""Graphs, transport, order, choices."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentyeighth import (
    add,
    check,
    finite,
    indices,
    one_dtype,
    read,
    same,
    sized,
)


# Each graph's mean, graph g having the rows ptr[g] to ptr[g + 1] - 1
def graph_mean(wrong):
    class GraphMean(Function):
        @staticmethod
        def forward(ctx, x, ptr):
            ctx.save_for_backward(ptr)
            ctx.rows = len(x)
            sizes = ptr.diff()
            graph = torch.repeat_interleave(torch.arange(len(sizes), device=x.device), sizes)
            inside = x[int(ptr[0]) : int(ptr[-1])]
            total = x.new_zeros(len(sizes), x.shape[1]).index_add(0, graph, inside)
            return total / sizes.clamp(min=1)[:, None]

        @staticmethod
        def backward(ctx, grad_y):
            (ptr,) = ctx.saved_tensors
            sizes = ptr.diff()
            rows = torch.repeat_interleave(grad_y / sizes.clamp(min=1)[:, None], sizes, 0)
            first = 0 if wrong else int(ptr[0])
            start = grad_y.new_zeros(first, grad_y.shape[1])
            rest = grad_y.new_zeros(ctx.rows - first - len(rows), grad_y.shape[1])
            return torch.cat([start, rows, rest]), None

    def mean(x, ptr):
        sized("x", x, None, None)
        sized("ptr", ptr, None)
        indices("ptr", ptr, len(x) + 1)
        check(len(ptr) >= 2 and bool((ptr.diff() >= 0).all()), "expected rising borders")
        return GraphMean.apply(x, ptr.long())

    return mean


add(
    "graph_mean_start",
    graph_mean,
    lambda: (real(6, 2), torch.tensor([0, 2, 5, 6])),
    bug="Backward puts the rows' gradients at the start",
    trigger="a first graph that does not begin at row 0",
)


# Personalised propagation: two steps of (1 - a) P h + a x
def propagation(wrong):
    class Propagation(Function):
        @staticmethod
        def forward(ctx, x, p, steps, a):
            ctx.save_for_backward(x, p)
            ctx.steps, ctx.a = steps, a
            h = x
            for _ in range(steps):
                h = (1 - a) * (p @ h) + a * x
            return h.clone()

        @staticmethod
        def backward(ctx, grad_h):
            x, p = ctx.saved_tensors
            a, states = ctx.a, [x]
            for _ in range(ctx.steps):
                states.append((1 - a) * (p @ states[-1]) + a * x)
            grad_x, grad_p = torch.zeros_like(x), torch.zeros_like(p)
            for k in reversed(range(ctx.steps)):
                if not wrong or k == ctx.steps - 1:
                    grad_x = grad_x + a * grad_h
                grad_p = grad_p + (1 - a) * grad_h @ states[k].mT
                grad_h = (1 - a) * p.mT @ grad_h
            return grad_x + grad_h, grad_p, None, None

    def propagate(x, p, steps=2, a=0.1):
        sized("x", x, None, None)
        sized("p", p, len(x), len(x))
        one_dtype(x, p)
        check(steps >= 0 and 0 <= a <= 1, "expected steps >= 0 and a share a")
        return Propagation.apply(x, p, steps, a)

    return propagate


add(
    "propagation_teleport",
    propagation,
    lambda: (real(4, 2), real(4, 4, seed=1)),
    bug="Of the shares a x only the last step's has a gradient",
)


# The squared distance of two empirical distributions on the line, of any sizes
def coupled_squares(wrong):
    def plan(n, m, like):
        i = torch.arange(n, device=like.device)[:, None] * m
        j = torch.arange(m, device=like.device) * n
        shared = torch.minimum(i + m, j + n) - torch.maximum(i, j)
        return shared.clamp(min=0).to(like.dtype) / (n * m)

    class Coupled(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            p = plan(len(x), len(y), x)
            return (p * (x.sort().values[:, None] - y.sort().values).square()).sum()

        @staticmethod
        def backward(ctx, grad_d):
            x, y = ctx.saved_tensors
            (x, rows), (y, columns) = x.sort(stable=True), y.sort(stable=True)
            n, m = len(x), len(y)
            if wrong:
                i, j = (torch.arange(k, device=x.device) for k in (n, m))
                by_x = 2 / n * (x - y[i * m // n])
                by_y = 2 / m * (y - x[j * n // m])
            else:
                way = 2 * plan(n, m, x) * (x[:, None] - y)
                by_x, by_y = way.sum(1), -way.sum(0)
            grad_x = torch.zeros_like(x).index_add(0, rows, grad_d * by_x)
            return grad_x, torch.zeros_like(y).index_add(0, columns, grad_d * by_y)

    def distance(x, y):
        sized("x", x, None)
        sized("y", y, None)
        one_dtype(x, y)
        return Coupled.apply(x, y)

    return distance


add(
    "coupled_squares_sizes",
    coupled_squares,
    lambda: (real(5), real(5, seed=1)),
    bug="Backward pairs each number with one of the other sample",
    trigger="samples of two sizes",
)


# Sinkhorn's divergence: the cost of x and y less half of each one's cost with itself
def divergence(wrong):
    def cost(x, y, eps, steps):
        c = (x[:, None] - y).square().sum(-1) / eps
        a = -torch.log(c.new_tensor(float(len(x))))
        b = -torch.log(c.new_tensor(float(len(y))))
        f, g = c.new_zeros(len(x)), c.new_zeros(len(y))
        for _ in range(steps):
            f = -torch.logsumexp(b + g - c, 1)
            g = -torch.logsumexp(a + f[:, None] - c, 0)
        return eps * (f.mean() + g.mean())

    def measure(x, y, eps=0.5, steps=20):
        sized("x", x, None, None)
        sized("y", y, None, x.shape[1])
        one_dtype(x, y)
        check(eps > 0 and steps >= 1, "expected eps > 0 and a step")
        first, second = (x.detach(), y.detach()) if wrong else (x, y)
        own = cost(x, first, eps, steps) + cost(y, second, eps, steps)
        return cost(x, y, eps, steps) - own / 2

    return measure


add(
    "sinkhorn_divergence_self",
    divergence,
    lambda: (real(4, 2), real(3, 2, seed=1)),
    bug="The costs of each with itself see a copy that is detached, and keep their half",
)


# The winsorised mean: the k smallest and largest numbers become the next ones
def winsorised(wrong):
    class Winsorised(Function):
        @staticmethod
        def forward(ctx, x, k):
            values, order = x.sort()
            ctx.save_for_backward(order)
            ctx.k = k
            return values[k : len(x) - k].clone().mean() * (1 - 2 * k / len(x)) + (
                values[k] + values[len(x) - k - 1]
            ) * (k / len(x))

        @staticmethod
        def backward(ctx, grad_m):
            (order,) = ctx.saved_tensors
            n = len(order)
            place = torch.arange(n, device=order.device)
            kept = place.clamp(ctx.k, n - 1 - ctx.k)
            share = torch.ones(n, dtype=grad_m.dtype, device=grad_m.device) / n
            none = torch.zeros_like(share)
            moved = none.index_add(0, kept, share)
            share = torch.where(kept == place, share, 0) if wrong else moved
            return none.index_add(0, order, share) * grad_m, None

    def mean(x, k=1):
        sized("x", x, None)
        check(k >= 0 and len(x) > 2 * k, "expected more than 2 k numbers")
        return Winsorised.apply(x, k)

    return mean


add(
    "winsorised_mean_ends",
    winsorised,
    lambda: (real(7),),
    bug="The numbers at which the ends are cut have a share of one, as in the trimmed mean",
)


# Features of the K nearest points, weighted
def neighbour_features(wrong):
    class Features(Function):
        @staticmethod
        def forward(ctx, f, w, index):
            ctx.save_for_backward(f, w, index)
            return (w[..., None] * f[index]).sum(1)

        @staticmethod
        def backward(ctx, grad_y):
            f, w, index = ctx.saved_tensors
            if wrong:
                grad_y = read(grad_y, f.stride())
            rows = w[..., None] * grad_y[:, None]
            grad_f = torch.zeros_like(f).index_add(0, index.flatten(), rows.reshape(-1, f.shape[1]))
            return grad_f, (f[index] * grad_y[:, None]).sum(-1), None

    def interpolate(f, w, index):
        sized("f", f, None, None)
        sized("w", w, None, None)
        same(w, index)
        indices("index", index, len(f))
        one_dtype(f, w)
        return Features.apply(f, w, index.long())

    return interpolate


add(
    "neighbour_features_strides",
    neighbour_features,
    lambda: (real(5, 4), real(6, 3, positive=True, seed=1), whole(5, 6, 3, seed=2)),
    bug="Backward's kernel is given the table's strides for grad_output too",
    trigger="a transposed or expanded grad_output",
)


# A distribution over atoms, moved by a reward and put on the atoms again (C51)
def categorical_projection(wrong):
    def places(reward, atoms, gamma, low, high):
        z = torch.linspace(low, high, atoms, dtype=reward.dtype, device=reward.device)
        return (reward[:, None] + gamma * z - low) * ((atoms - 1) / (high - low))

    class Projection(Function):
        @staticmethod
        def forward(ctx, p, reward, gamma, low, high):
            ctx.save_for_backward(p, reward)
            ctx.numbers = gamma, low, high
            last = p.shape[1] - 1
            b = places(reward, last + 1, gamma, low, high).clamp(0, last)
            lower = b.floor().clamp(max=last - 1)
            part, lower = b - lower, lower.long()
            moved = torch.zeros_like(p).scatter_add(1, lower, p * (1 - part))
            return moved.scatter_add(1, lower + 1, p * part)

        @staticmethod
        def backward(ctx, grad_m):
            p, reward = ctx.saved_tensors
            gamma, low, high = ctx.numbers
            last = p.shape[1] - 1
            free = places(reward, last + 1, gamma, low, high)
            b = free.clamp(0, last)
            lower = b.detach().floor().clamp(max=last - 1)
            above = grad_m.gather(1, lower.long() + 1)
            below = grad_m.gather(1, lower.long())
            grad_p = below * (1 - (b - lower)) + above * (b - lower)
            if wrong:
                lower, upper = b.detach().floor(), b.detach().ceil()
                grad_p = grad_m.gather(1, lower.long()) * (upper - b)
                grad_p = grad_p + grad_m.gather(1, upper.long()) * (b - lower)
            inside = (free >= 0) & (free <= last)
            slope = torch.where(inside, p * (above - below), 0) * (last / (high - low))
            return grad_p, slope.sum(1), None, None, None

    def project(p, reward, gamma=0.5, low=-10.0, high=10.0):
        sized("p", p, None, None)
        sized("reward", reward, len(p))
        one_dtype(p, reward)
        check(p.shape[1] >= 2 and high > low, "expected two atoms or more")
        finite(reward=reward)
        return Projection.apply(p, reward, gamma, low, high)

    return project


add(
    "categorical_projection_atom",
    categorical_projection,
    lambda: (torch.softmax(real(3, 5, grad=False), -1).requires_grad_(), real(3, seed=1)),
    bug="The weights ceil(b) - b and b - floor(b) are both 0 where b is whole",
    trigger="rewards that move an atom onto an atom, or beyond the ends",
)
