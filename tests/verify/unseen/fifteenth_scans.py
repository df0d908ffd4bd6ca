"""Recurrences."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real, whole
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.twelfth import wide


class Elman(Function):
    @staticmethod
    def states(x, w, h):
        out = [h]
        for now in x.unbind(1):
            out.append((now + out[-1] @ w.mT).tanh())
        return out

    @staticmethod
    def forward(ctx, x, w, h):
        ctx.save_for_backward(x, w, h)
        return torch.stack(Elman.states(wide(x), wide(w), wide(h))[1:], 1).to(x.dtype)

    @staticmethod
    def gradients(ctx, g, stays):
        x, w, h = (wide(t) for t in ctx.saved_tensors)
        states = Elman.states(x, w, h)
        d, parts, grad_w = torch.zeros_like(h), [], torch.zeros_like(w)
        for t in range(x.shape[1] - 1, -1, -1):
            part = (d + wide(g[:, t])) * (1 - states[t + 1].square())
            parts.append(part)
            grad_w = grad_w + part.mT @ states[t]
            d = part @ w if stays(t) else torch.zeros_like(h)
        return tuple(a.to(g.dtype) for a in (torch.stack(parts[::-1], 1), grad_w, d))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Elman.gradients(ctx, g, lambda _: True)


class ElmanTruncated(Elman):
    """In chunks of eight steps, each of which starts from the detached end of the one before."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Elman.gradients(ctx, g, lambda t: t == 0 or t % 8)


def _elman(function):
    def elman_rnn(x, w, h):
        """States h = tanh(x_t + w h) (N, T, D) of x (N, T, D), T > 0, w (D, D), from h (N, D) on."""
        need(x.dim() == 3 and x.shape[1] > 0, "expected x (N, T, D), T > 0")
        need(
            h.shape == x.shape[::2] and w.shape == (x.shape[2],) * 2, "expected w (D, D), h (N, D)"
        )
        return function.apply(x, w, h)

    return elman_rnn


add(
    "elman_rnn",
    _elman,
    ElmanTruncated,
    Elman,
    lambda: (real(2, 4, 3), real(3, 3, seed=1), real(2, 3, seed=2)),
    bug="the state that goes from one chunk of 8 steps to the next is detached",
    trigger="more than 8 steps",
)


class MinimalGated(Function):
    @staticmethod
    def step(a, b, u, v, h):
        gate = (a + u * h).sigmoid()
        return gate, (b + v * gate * h).tanh()

    @staticmethod
    def states(a, b, u, v):
        out = [torch.zeros_like(a[:, 0])]
        for t in range(a.shape[1]):
            gate, new = MinimalGated.step(a[:, t], b[:, t], u, v, out[-1])
            out.append(out[-1] + gate * (new - out[-1]))
        return out

    @staticmethod
    def forward(ctx, a, b, u, v):
        ctx.save_for_backward(a, b, u, v)
        states = MinimalGated.states(*(wide(t) for t in (a, b, u, v)))
        return torch.stack(states[1:], 1).to(a.dtype)

    @staticmethod
    def gradients(ctx, g, shift):
        a, b, u, v = (wide(t) for t in ctx.saved_tensors)
        states = MinimalGated.states(a, b, u, v)
        d, to_u, to_v = (torch.zeros_like(states[0]) for _ in range(3))
        to_a, to_b = [], []
        for t in range(a.shape[1] - 1, -1, -1):
            h = states[t]
            gate, new = MinimalGated.step(a[:, t], b[:, t], u, v, h)
            d = d + wide(g[:, t])
            inner = d * gate * (1 - new.square())
            outer = (d * (new - h) + inner * v * h) * gate * (1 - gate)
            to_a.append(outer)
            to_b.append(inner)
            to_u, to_v = to_u + outer * states[t + shift], to_v + inner * gate * h
            d = d * (1 - gate) + inner * v * gate + outer * u
        grads = torch.stack(to_a[::-1], 1), torch.stack(to_b[::-1], 1), to_u.sum(0), to_v.sum(0)
        return tuple(t.to(g.dtype) for t in grads)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return MinimalGated.gradients(ctx, g, 0)


class MinimalGatedLater(MinimalGated):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return MinimalGated.gradients(ctx, g, 1)


def _minimal_gated(function):
    def minimal_gated(a, b, u, v):
        """States h + f (tanh(b_t + v f h) - h), f = sigmoid(a_t + u h), from h = 0 on.

        a and b are (N, T, D), T > 0, u and v (D,).
        """
        need(
            a.dim() == 3 and a.shape == b.shape and a.shape[1] > 0, "expected a, b (N, T, D), T > 0"
        )
        need(u.shape == v.shape == a.shape[2:], "expected u and v (D,)")
        return function.apply(a, b, u, v)

    return minimal_gated


add(
    "minimal_gated",
    _minimal_gated,
    MinimalGatedLater,
    MinimalGated,
    lambda: (real(2, 3, 4), real(2, 3, 4, seed=1), real(4, seed=2), real(4, seed=3)),
    bug="the gate's weight meets the state after the step, not the one before",
    trigger="the sample",
)


class Leaky(Function):
    @staticmethod
    def states(x, reset, leak):
        out = [torch.zeros_like(x[0])]
        for now, cleared in zip(x, reset, strict=True):
            out.append(now + leak * out[-1].masked_fill(cleared, 0))
        return out

    @staticmethod
    def forward(ctx, x, reset, leak):
        ctx.save_for_backward(x, reset, leak)
        return torch.stack(Leaky.states(wide(x), reset, wide(leak))[1:]).to(x.dtype)

    @staticmethod
    def gradients(ctx, g, mask):
        x, reset, leak = ctx.saved_tensors
        states, leak = Leaky.states(wide(x), reset, wide(leak)), wide(leak)
        d, parts, to_leak = torch.zeros_like(states[0]), [], torch.zeros_like(leak)
        for t in range(len(x) - 1, -1, -1):
            d = d + wide(g[t])
            parts.append(d)
            to_leak = to_leak + (d * states[t].masked_fill(reset[t], 0)).sum()
            d = leak * d.masked_fill(mask(t), 0)
        return torch.stack(parts[::-1]).to(g.dtype), None, to_leak.to(g.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        reset = ctx.saved_tensors[1]
        return Leaky.gradients(ctx, g, lambda t: reset[t])


class LeakyBefore(Leaky):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        reset = ctx.saved_tensors[1]
        return Leaky.gradients(ctx, g, lambda t: reset[t - 1])


def _leaky(function):
    def leaky_integrator(x, reset, leak):
        """States h = x_t + leak h (T, N) of x (T, N), T > 0, from 0 on, leak ().

        Where reset (T, N), boolean, is set, h is 0 before the step.
        """
        need(x.dim() == 2 and len(x) > 0 and leak.dim() == 0, "expected x (T, N), T > 0, leak ()")
        need(reset.shape == x.shape and reset.dtype == torch.bool, "expected reset (T, N), boolean")
        return function.apply(x, reset, leak)

    return leaky_integrator


add(
    "leaky_integrator",
    _leaky,
    LeakyBefore,
    Leaky,
    lambda: (
        *(real(5, 3), whole(2, 5, 3, seed=1) > 0),
        torch.tensor(0.9, dtype=F64, requires_grad=True),
    ),
    bug="backward masks with the resets of the step before",
    trigger="the sample: a reset",
)


class Returns(Function):
    @staticmethod
    def forward(ctx, rewards, last, discount):
        ctx.discount, ctx.last = discount, len(last)
        total, out = wide(last), []
        for now in wide(rewards).unbind(1)[::-1]:
            total = now + discount * total
            out.append(total)
        return torch.stack(out[::-1], 1).to(rewards.dtype)

    @staticmethod
    def gradients(ctx, g, onto):
        d, out = torch.zeros_like(wide(g[:, 0])), []
        for now in wide(g).unbind(1):
            d = now + ctx.discount * d
            out.append(d)
        rows = torch.arange(len(g), device=g.device) % ctx.last
        grads = torch.stack(out, 1), onto(d.new_zeros(ctx.last), rows, ctx.discount * d)
        return *(a.to(g.dtype) for a in grads), None

    @staticmethod
    def backward(ctx, g):
        return Returns.gradients(ctx, g, lambda grad, rows, d: grad.index_add(0, rows, d))


class ReturnsAssigned(Returns):
    @staticmethod
    def backward(ctx, g):
        return Returns.gradients(ctx, g, lambda grad, rows, d: grad.index_put((rows,), d))


def _returns(function):
    def discounted_returns(rewards, last, discount=0.9):
        """R_t = r_t + discount R_(t+1) (N, T) of rewards (N, T), N, T > 0; after them comes last (N,) or (1,)."""
        need(rewards.dim() == 2 and min(rewards.shape) > 0, "expected rewards (N, T), N, T > 0")
        need(last.dim() == 1 and len(last) in {1, len(rewards)}, "expected last (N,) or (1,)")
        return function.apply(rewards, last, discount)

    return discounted_returns


add(
    "discounted_returns",
    _returns,
    ReturnsAssigned,
    Returns,
    lambda: (real(3, 4), real(3, seed=1)),
    bug="the gradient of a value for all rows is that of one row",
    trigger="last (1,) and two rows",
)
