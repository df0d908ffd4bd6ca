"""Recurrences and running averages."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.twentyseventh import add, check, positive, same, sized


# Minimal GRU: h = (1 - sigmoid(k)) h + sigmoid(k) c, time first
def minimal_gru(wrong):
    def states(k, c, h):
        all_states = []
        for z, new in zip(torch.sigmoid(k), c, strict=True):
            h = h + z * (new - h)
            all_states.append(h)
        return torch.stack(all_states)

    class Gru(Function):
        @staticmethod
        def forward(ctx, k, c, first):
            ctx.save_for_backward(k, c, first)
            return states(k, c, first)

        @staticmethod
        def backward(ctx, grad_y):
            k, c, first = ctx.saved_tensors
            after = states(k, c, first)
            before = torch.cat([first[None], after[:-1]])
            z = torch.sigmoid(k)
            g, all_g = torch.zeros_like(first), []
            for i in reversed(range(len(k))):
                g = g + grad_y[i]
                all_g.append(g)
                g = g * (1 - z[i])
            grad_h = torch.stack(all_g[::-1])
            old = after if wrong else before
            return grad_h * (c - old) * z * (1 - z), grad_h * z, g

    def gru(k, c, first):
        sized("k", k, None, None)
        same(k, c)
        sized("first", first, k.shape[1])
        return Gru.apply(k, c, first)

    return gru


add(
    "minimal_gru_after",
    minimal_gru,
    lambda: (real(4, 3), real(4, 3, seed=1), real(3, seed=2)),
    bug="The gate's gradient takes the state after the step",
)


# Independent recurrence: h = max(x + u h, 0), time first
def independent(wrong):
    class Independent(Function):
        @staticmethod
        def forward(ctx, x, u):
            ctx.save_for_backward(x, u)
            return states(x, u)[1:]

        @staticmethod
        def backward(ctx, grad_y):
            x, u = ctx.saved_tensors
            h = states(x, u)
            g, grads = torch.zeros_like(u), []
            for i in reversed(range(len(x))):
                on = h[i + 1] >= 0 if wrong else h[i + 1] > 0
                grads.append(torch.where(on, grad_y[i] + u * g, 0))
                g = grads[-1]
            grad_x = torch.stack(grads[::-1])
            return grad_x, (grad_x * h[:-1]).sum(0)

    def states(x, u):
        h = [torch.zeros_like(x[0])]
        for now in x:
            h.append((now + u * h[-1]).clamp(min=0))
        return torch.stack(h)

    def recurrence(x, u):
        sized("x", x, None, None)
        sized("u", u, x.shape[1])
        return Independent.apply(x, u)

    return recurrence


add(
    "independent_mask",
    independent,
    lambda: (real(4, 3), real(3, seed=1)),
    bug="The unit that is off is told by its state, which is never below 0, with >=",
)


# QRNN's pooling: c = f c + (1 - f) z and y = o c, time first, from either end
def gated_pool(wrong):
    class Pool(Function):
        @staticmethod
        def forward(ctx, f, z, o, reverse):
            ctx.save_for_backward(f, z, o)
            ctx.reverse = reverse
            c = cells(*turned(reverse, f, z))
            return o * turned(reverse, c)[0]

        @staticmethod
        def backward(ctx, grad_y):
            f, z, o, grad_y = turned(ctx.reverse and not wrong, *ctx.saved_tensors, grad_y)
            c = cells(f, z)
            before = torch.cat([torch.zeros_like(c[:1]), c[:-1]])
            g, grads = torch.zeros_like(c[0]), []
            for i in reversed(range(len(c))):
                g = g + grad_y[i] * o[i]
                grads.append(g)
                g = g * f[i]
            g = torch.stack(grads[::-1])
            back = (g * (before - z), g * (1 - f), grad_y * c)
            return *turned(ctx.reverse and not wrong, *back), None

    def turned(reverse, *all_t):
        return tuple(t.flip(0) for t in all_t) if reverse else all_t

    def cells(f, z):
        c, all_c = torch.zeros_like(z[0]), []
        for gate, new in zip(f, z, strict=True):
            c = gate * c + (1 - gate) * new
            all_c.append(c)
        return torch.stack(all_c)

    def pool(f, z, o, reverse=False):
        check(f.ndim >= 1 and len(f) >= 1, "f: expected one step at least")
        same(f, z, o)
        return Pool.apply(f, z, o, reverse)

    return pool


add(
    "gated_pool_reverse",
    gated_pool,
    lambda: (real(4, 3), real(4, 3, seed=1), real(4, 3, seed=2)),
    bug="Backward takes the sequence to be read from its start",
    trigger="reverse=True",
)


# Decay between irregular times: h = exp(-rate (t - t before)) h + x
def irregular(wrong):
    class Decay(Function):
        @staticmethod
        def forward(ctx, x, t, rate):
            ctx.save_for_backward(x, t, rate)
            return states(x, torch.exp(-rate * t.diff()))

        @staticmethod
        def backward(ctx, grad_y):
            x, t, rate = ctx.saved_tensors
            gaps = t.diff()
            a = torch.exp(-rate * gaps)
            grad_x = states(grad_y.flip(0), a.flip(0)).flip(0)
            grad_a = a * (grad_x[1:] * states(x, a)[:-1]).sum(1)
            grad_t = rate * (F.pad(grad_a, (0, 1)) - F.pad(grad_a, (1, 0)))
            if wrong:
                e = torch.exp(rate * t)[:, None]
                grad_x = (grad_y / e).flip(0).cumsum(0).flip(0) * e
            return grad_x, grad_t, -(gaps * grad_a).sum()

    def states(x, a):
        h = [x[0]]
        for now, decay in zip(x[1:], a, strict=True):
            h.append(decay * h[-1] + now)
        return torch.stack(h)

    def decay(x, t, rate):
        sized("x", x, None, None)
        sized("t", t, len(x))
        sized("rate", rate)
        positive("rate", rate)
        check(bool(t.isfinite().all() & (t.diff() >= 0).all()), "t: expected ascending times")
        return Decay.apply(x, t, rate)

    return decay


add(
    "irregular_span",
    irregular,
    lambda: (
        real(4, 3),
        torch.tensor([0.0, 0.5, 0.7, 2.0], dtype=F64, requires_grad=True),
        torch.tensor(0.5, dtype=F64, requires_grad=True),
    ),
    bug="Backward weighs a running sum by exp(rate t), which overflows where forward goes by steps",
    trigger="a span of 710 time constants, in float32 of 89, or times since 1970",
)


# Adam's running average: m = b m + (1 - b) x and y = m / (1 - b^t), time first
def corrected(wrong):
    class Average(Function):
        @staticmethod
        def forward(ctx, x, b):
            ctx.b = b
            m, y = torch.zeros_like(x[0]), []
            for i, now in enumerate(x):
                m = b * m + (1 - b) * now
                y.append(m / (1 - b ** (i + 1)))
            return torch.stack(y)

        @staticmethod
        def backward(ctx, grad_y):
            b, n = ctx.b, len(grad_y)
            dtype = None if wrong else grad_y.dtype
            step = torch.arange(1, n + 1, dtype=dtype, device=grad_y.device)
            share = (1 - b) / (1 - b**step)
            g, grads = torch.zeros_like(grad_y[0]), []
            for i in reversed(range(n)):
                g = b * g + grad_y[i] * (share[i : i + 1] if wrong else share[i])
                grads.append(g)
            return torch.stack(grads[::-1]), None

    def average(x, b=0.9):
        sized("x", x, None, None)
        check(0 <= b < 1, "b: expected a number from 0 to below 1")
        return Average.apply(x, b)

    return average


add(
    "corrected_average_float32",
    corrected,
    lambda: (real(4, 3),),
    bug="A number to the power of integers is a tensor of the default dtype, float32",
    trigger="a tolerance below 1e-8",
)
