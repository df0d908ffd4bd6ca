"""Formulas: a sign, a factor, a transpose, a mean, a border and a term of the chain rule."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fortysecond import add, alike, bounded, check, indices, same, sized


# The anticommutator AB + BA of square matrices
def anticommutator(wrong):
    class Anticommutator(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a @ b + b @ a

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            left = b if wrong else b.mT
            return g @ b.mT + left @ g, a.mT @ g + g @ a.mT

    def product(a, b):
        check(a.ndim >= 2 and a.shape[-1] == a.shape[-2], "a: expected square matrices")
        same(a, b)
        alike(a, b)
        bounded("a", a, -1e3, 1e3)
        bounded("b", b, -1e3, 1e3)
        return Anticommutator.apply(a, b)

    return product


add(
    "anticommutator_transposed",
    anticommutator,
    lambda: (real(2, 3, 3), real(2, 3, 3, seed=1)),
    bug="One of the two products in the first matrix's gradient misses its transpose",
)


# Radii of the circles through the corners of triangles with sides a, b and c
def circumradius(wrong):
    def square(a, b, c):
        return (a + b + c) * (b + c - a) * (c + a - b) * (a + b - c)

    class Radius(Function):
        @staticmethod
        def forward(ctx, a, b, c):
            ctx.save_for_backward(a, b, c)
            return a * b * c / square(a, b, c).sqrt()

        @staticmethod
        def backward(ctx, g):
            a, b, c = ctx.saved_tensors
            q = square(a, b, c)
            root = q.sqrt()

            def side(x, y, z, sign=-1):
                bend = 2 * x * (y * y + z * z - x * x) / q
                return g * y * z / root * (1 + sign * x * bend)

            return side(a, b, c), side(b, c, a), side(c, a, b, 1 if wrong else -1)

    def radius(a, b, c):
        same(a, b, c)
        alike(a, b, c)
        for name, t in {"a": a, "b": b, "c": c}.items():
            bounded(name, t, 1e-2, 100)
        least = torch.minimum(torch.minimum(b + c - a, c + a - b), a + b - c)
        bounded("the triangles' excess", least / (a + b + c), 1e-3, 1)
        return Radius.apply(a, b, c)

    return radius


def sides():
    long = [real(4, seed=k, grad=False).tanh() for k in range(3)]
    return tuple((2 + t / 2).requires_grad_() for t in long)


add(
    "circumradius_sign",
    circumradius,
    sides,
    bug="The area's part of the third side's gradient has the wrong sign",
)


# Smooth total variation of x (N, C) over a graph's rows: start (N + 1) of each row's edges and their ends (E)
def graph_variation(wrong):
    def rows(start, ends):
        places = torch.arange(len(ends), device=ends.device)
        return torch.searchsorted(start, places, right=True) - 1

    class Variation(Function):
        @staticmethod
        def forward(ctx, x, start, ends, eps):
            ctx.save_for_backward(x, start, ends)
            ctx.eps = eps
            d = x[rows(start, ends)] - x[ends]
            return (d.square() + eps * eps).sqrt().sum()

        @staticmethod
        def backward(ctx, g):
            x, start, ends = ctx.saved_tensors
            i = rows(start, ends)
            d = x[i] - x[ends]
            pull = g * d / (d.square() + ctx.eps**2).sqrt()
            if wrong:
                places = torch.arange(len(ends), device=ends.device)
                i = (torch.searchsorted(start, places) - 1).clamp(min=0)
            grad = torch.zeros_like(x).index_add(0, i, pull).index_add(0, ends, -pull)
            return grad, None, None, None

    def variation(x, start, ends, eps=0.1):
        sized("x", x, None, None)
        sized("start", start, len(x) + 1)
        sized("ends", ends, None)
        indices("ends", ends, len(x))
        indices("start", start, len(ends) + 1)
        check(start.dtype == torch.long and ends.dtype == torch.long, "expected int64 indices")
        check(int(start[0]) == 0 and int(start[-1]) == len(ends), "start: expected 0 to E")
        check(bool((start.diff() >= 0).all()), "start: expected rising numbers")
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(0.01 <= eps <= 10, "eps: expected a number from 0.01 to 10")
        bounded("x", x, -100, 100)
        return Variation.apply(x, start, ends, eps)

    return variation


add(
    "graph_variation_first_edge",
    graph_variation,
    lambda: (real(4, 2), torch.tensor([0, 2, 3, 3, 5]), torch.tensor([1, 3, 2, 0, 1])),
    bug="Backward searches the rows' starts from the other side: a row's first edge goes to the row before",
)


# The contraharmonic mean sum x^2 / sum x of positive rows
def contraharmonic(wrong):
    class Mean(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square().sum(-1) / x.sum(-1)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            total = x.sum(-1, keepdim=True)
            mean = x.square().sum(-1, keepdim=True) / total
            return g[..., None] * ((x if wrong else 2 * x) - mean) / total

    def mean(x):
        check(x.ndim >= 1 and x.shape[-1] > 0, "x: expected rows of numbers")
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, 1e-2, 100)
        return Mean.apply(x)

    return mean


add(
    "contraharmonic_factor",
    contraharmonic,
    lambda: (real(3, 4, positive=True),),
    bug="The square's derivative lacks its factor 2",
)


# A state (B, H) that decays in each row's time with one learned rate a unit: h exp(-rate time)
def time_decay(wrong):
    class Decay(Function):
        @staticmethod
        def forward(ctx, h, time, rate):
            ctx.save_for_backward(h, time, rate)
            return h * (-time[:, None] * rate).exp()

        @staticmethod
        def backward(ctx, g):
            h, time, rate = ctx.saved_tensors
            kept = g * (-time[:, None] * rate).exp()
            back = -kept * h
            by_rate = back * time[:, None]
            return kept, (back * rate).sum(1), by_rate.mean(0) if wrong else by_rate.sum(0)

    def decayed(h, time, rate):
        sized("h", h, None, None)
        sized("time", time, len(h))
        sized("rate", rate, h.shape[1])
        alike(h, time, rate)
        bounded("h", h, -1e3, 1e3)
        bounded("time", time, 0, 10)
        bounded("rate", rate, 0, 5)
        return Decay.apply(h, time, rate)

    return decayed


add(
    "time_decay_mean",
    time_decay,
    lambda: (real(3, 4), real(3, seed=1, positive=True), real(4, seed=2, positive=True)),
    bug="The rates' gradient is the mean over the batch where it is the sum",
)


# Hard concrete gates: a stretched and cut sigmoid of (logit(u) + alpha) / beta
def hard_concrete(wrong):
    def parts(alpha, beta, u):
        score = u.log() - (-u).log1p() + alpha
        return score, (score / beta).sigmoid()

    class Gate(Function):
        @staticmethod
        def forward(ctx, alpha, beta, u, low, high):
            ctx.save_for_backward(alpha, beta, u)
            ctx.ends = low, high
            return (parts(alpha, beta, u)[1] * (high - low) + low).clamp(0, 1)

        @staticmethod
        def backward(ctx, g):
            alpha, beta, u = ctx.saved_tensors
            low, high = ctx.ends
            score, s = parts(alpha, beta, u)
            wide = s * (high - low) + low
            inside = torch.where((wide > 0) & (wide < 1), g, 0 * g)
            by_score = inside * (high - low) * s * (1 - s) / beta
            if wrong:
                score = score - alpha
            return by_score, -(by_score * score).sum() / beta, None, None, None

    def gates(alpha, beta, u, low=-0.1, high=1.1):
        same(alpha, u)
        sized("beta", beta)
        alike(alpha, beta, u)
        check(-2 <= low < 0 and 1 < high <= 3, "expected low < 0 and high > 1")
        check(not u.requires_grad, "u: expected draws without a gradient")
        bounded("alpha", alpha, -10, 10)
        bounded("beta", beta, 0.1, 10)
        bounded("u", u, 1e-3, 1 - 1e-3)
        return Gate.apply(alpha, beta, u, low, high)

    return gates


add(
    "hard_concrete_temperature",
    hard_concrete,
    lambda: (
        real(3, 4),
        torch.tensor(0.8, dtype=torch.float64, requires_grad=True),
        real(3, 4, seed=1, grad=False).sigmoid(),
    ),
    bug="The temperature's derivative lacks the term of alpha",
)
