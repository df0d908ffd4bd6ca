"""Transforms: second derivatives, forward mode, vmap and compiled paths."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fortysecond import (
    add,
    add_bare,
    alike,
    bounded,
    check,
    indices,
    same,
    sized,
)


# A carrier whose frequency the signal (B, T) modulates: cos(carrier t + depth cumsum(x))
def frequency_modulate(wrong):
    def phase(x, depth, carrier):
        t = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
        return carrier * t + depth * x.cumsum(1)

    class Modulate(Function):
        @staticmethod
        def forward(ctx, x, depth, carrier):
            ctx.save_for_backward(x, depth)
            ctx.carrier = carrier
            return phase(x, depth, carrier).cos()

        @staticmethod
        def backward(ctx, g):
            x, depth = ctx.saved_tensors
            turn = phase(x.detach() if wrong else x, depth, ctx.carrier)
            by_phase = -g * turn.sin()
            by_x = depth * by_phase.flip(1).cumsum(1).flip(1)
            return by_x, (by_phase * x.cumsum(1)).sum(), None

    def modulated(x, depth, carrier=0.8):
        sized("x", x, None, None)
        sized("depth", depth)
        alike(x, depth)
        check(0 <= carrier <= 3, "carrier: expected a number from 0 to 3")
        bounded("x", x, -10, 10)
        bounded("depth", depth, 0, 10)
        return Modulate.apply(x, depth, carrier)

    return modulated


add(
    "frequency_modulate_detached",
    frequency_modulate,
    lambda: (real(2, 4), torch.tensor(0.6, dtype=torch.float64, requires_grad=True)),
    bug="Backward computes the phase from the detached signal",
    trigger="a second derivative by the signal",
)


# An alpha-beta tracker's positions of measurements (B, T): it starts at the first, at rest
def tracker(wrong):
    class Tracker(Function):
        @staticmethod
        def forward(ctx, z, alpha, beta):
            ctx.gains = alpha, beta
            x, v = z[:, 0], torch.zeros_like(z[:, 0])
            places = [x]
            for t in range(1, z.shape[1]):
                ahead = x + v
                rest = z[:, t] - ahead
                x, v = ahead + alpha * rest, v + beta * rest
                places.append(x)
            return torch.stack(places, 1)

        @staticmethod
        def backward(ctx, g):
            alpha, beta = ctx.gains
            if wrong and torch.compiler.is_compiling():
                beta = 0.0
            grads = []
            by_x, by_v = torch.zeros_like(g[:, 0]), torch.zeros_like(g[:, 0])
            for t in reversed(range(1, g.shape[1])):
                by_x = by_x + g[:, t]
                by_rest = alpha * by_x + beta * by_v
                grads.append(by_rest)
                by_x = by_x - by_rest
                by_v = by_v + by_x
            grads.append(by_x + g[:, 0])
            return torch.stack(grads[::-1], 1), None, None

    def places(z, alpha=0.6, beta=0.3):
        sized("z", z, None, None)
        check(z.dtype in (torch.float32, torch.float64), "z: expected float32 or float64")
        check(0 < alpha <= 1 and 0 <= beta <= 1, "expected gains up to 1")
        if not torch.compiler.is_compiling():
            bounded("z", z, -1e3, 1e3)
        return Tracker.apply(z, alpha, beta)

    return places


add_bare(
    "alpha_beta_compiled",
    tracker,
    lambda: (real(2, 5),),
    bug="Compiled, backward takes the speed's gain for 0",
    trigger="torch.compile",
)


# Elo's update of the ratings of two players after a game: both new ratings
def elo(wrong):
    class Elo(Function):
        @staticmethod
        def forward(a, b, score):
            for name, t in {"a": a, "b": b}.items():
                bounded(name, t, -10, 10)
            bounded("score", score, 0, 1)
            gain = 0.5 * (score - (a - b).sigmoid())
            return a + gain, b - gain

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs[:2])

        @staticmethod
        def backward(ctx, ga, gb):
            a, b = ctx.saved_tensors
            hope = (a - b).sigmoid()
            both = 0.5 * (ga - gb)
            by_gap = both * hope * (1 - hope)
            return ga - by_gap, gb + by_gap, both

        @staticmethod
        def vmap(info, in_dims, a, b, score):
            if wrong:
                return Elo.apply(a, b, score), (0, 0)
            a, b, score = (
                t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
                for t, d in zip((a, b, score), in_dims, strict=True)
            )
            return Elo.apply(a, b, score), (0, 0)

    def update(a, b, score):
        same(a, b, score)
        alike(a, b, score)
        return Elo.apply(a, b, score)

    return update


add(
    "elo_vmap_dims",
    elo,
    lambda: (
        real(3, 4, grad=False).tanh().requires_grad_(),
        real(3, 4, seed=1, grad=False).tanh().requires_grad_(),
        real(3, 4, seed=2, grad=False).sigmoid().requires_grad_(),
    ),
    bug="The vmap rule takes the first dimension for the mapped one, whatever in_dims says",
    trigger="vmap over another dimension than the first",
)


# Attention pooling of nodes x (N, D) by scores (N,) within their graphs (N,): the softmax's mean of each graph
def attention_pool(wrong):
    class Pool(Function):
        @staticmethod
        def total(t, graph, count):
            return t.new_zeros(count, *t.shape[1:]).index_add(0, graph, t)

        @staticmethod
        def parts(x, scores, graph, count):
            weights = scores.exp()
            shares = weights / Pool.total(weights, graph, count)[graph]
            return shares, Pool.total(shares[:, None] * x, graph, count)

        @staticmethod
        def forward(ctx, x, scores, graph, count):
            ctx.save_for_backward(x, scores, graph)
            ctx.save_for_forward(x, scores, graph)
            ctx.count = count
            return Pool.parts(x, scores, graph, count)[1]

        @staticmethod
        def backward(ctx, g):
            x, scores, graph = ctx.saved_tensors
            shares, mean = Pool.parts(x, scores, graph, ctx.count)
            here = g[graph]
            by_scores = shares * (here * (x - mean[graph])).sum(1)
            return shares[:, None] * here, by_scores, None, None

        @staticmethod
        def jvp(ctx, tx, ts, *_):
            x, scores, graph = ctx.saved_tensors
            shares, mean = Pool.parts(x, scores, graph, ctx.count)
            off = x if wrong else x - mean[graph]
            return Pool.total(shares[:, None] * (tx + ts[:, None] * off), graph, ctx.count)

    def pooled(x, scores, graph):
        sized("x", x, None, None)
        sized("scores", scores, len(x))
        sized("graph", graph, len(x))
        indices("graph", graph, len(x))
        check(graph.dtype == torch.long, "graph: expected int64 indices")
        alike(x, scores)
        count = int(graph.max()) + 1
        check(bool((graph.bincount() > 0).all()), "graph: expected a node of each graph")
        bounded("x", x, -1e3, 1e3)
        bounded("scores", scores, -20, 20)
        return Pool.apply(x, scores, graph, count)

    return pooled


add(
    "attention_pool_tangent",
    attention_pool,
    lambda: (real(5, 2), real(5, seed=1), torch.tensor([0, 0, 1, 1, 1])),
    bug="The forward-mode rule lacks the tangent of the softmax's denominator",
    trigger="forward mode",
)


# Sersic's profile of a galaxy's light at distances r: exp(-b ((r / radius)^(1 / n) - 1))
def sersic(wrong):
    class Profile(Function):
        @staticmethod
        def forward(ctx, r, radius, n):
            ctx.save_for_backward(r, radius)
            ctx.n = n
            return (-(2 * n - 1 / 3) * ((r / radius) ** (1 / n) - 1)).exp()

        @staticmethod
        def backward(ctx, g):
            r, radius = ctx.saved_tensors
            b = 2 * ctx.n - 1 / 3
            with torch.set_grad_enabled(torch.is_grad_enabled() and not wrong):
                power = (r / radius) ** (1 / ctx.n)
            slope = g * (-b / ctx.n) * power * (-b * (power - 1)).exp()
            return slope / r, -slope.sum() / radius, None

    def profile(r, radius, n=2.0):
        sized("radius", radius)
        alike(r, radius)
        check(0.5 <= n <= 6, "n: expected a number from 0.5 to 6")
        bounded("r", r, 0.01, 100)
        bounded("radius", radius, 0.1, 100)
        return Profile.apply(r, radius, n)

    return profile


add(
    "sersic_no_grad",
    sersic,
    lambda: (real(4, positive=True), torch.tensor(0.9, dtype=torch.float64, requires_grad=True)),
    bug="Backward computes the power under no_grad: a second derivative lacks what hangs on it",
    trigger="a second derivative by the distances",
)


# Steps of the logistic map x -> r x (1 - x) from each start with its own r
def logistic_map(wrong):
    def states(x, r, steps):
        path = [x]
        for _ in range(steps):
            path.append(r * path[-1] * (1 - path[-1]))
        return path

    class Map(Function):
        @staticmethod
        def forward(ctx, x, r, steps):
            path = states(x, r, steps)
            ctx.steps = steps
            ctx.save_for_backward(x, r, *(path[1:-1] if wrong else ()))
            return path[-1].clone()

        @staticmethod
        def backward(ctx, g):
            x, r, *path = ctx.saved_tensors
            path = [x, *path] if wrong else states(x, r, ctx.steps)[:-1]
            by_r = torch.zeros_like(r)
            for at in reversed(path):
                by_r = by_r + g * at * (1 - at)
                g = g * r * (1 - 2 * at)
            return g, by_r, None

    def mapped(x, r, steps=3):
        same(x, r)
        alike(x, r)
        check(isinstance(steps, int) and 1 <= steps <= 6, "steps: expected an integer from 1 to 6")
        bounded("x", x, 0, 1)
        bounded("r", r, 0, 4)
        return Map.apply(x, r, steps)

    return mapped


add(
    "logistic_map_kept_path",
    logistic_map,
    lambda: (
        real(4, grad=False).sigmoid().requires_grad_(),
        (2 + real(4, seed=1, grad=False).tanh()).requires_grad_(),
    ),
    bug="Forward saves the states between, which autograd knows nothing of",
    trigger="a second derivative",
)
