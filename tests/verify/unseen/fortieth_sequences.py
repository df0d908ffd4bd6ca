"""Attention and recurrences."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fortieth import add, alike, bounded, check, same, sized


def softmax_back(p, g):
    return p * (g - (p * g).sum(-1, keepdim=True))


# Queries (H, N, D) share keys and values (G, M, D) by groups of H / G heads
def grouped_heads(wrong):
    def spread(t, heads):
        return t.repeat_interleave(heads // len(t), 0)

    def gather(grad, groups):
        if wrong:
            return grad[:groups]
        return grad.unflatten(0, (groups, -1)).sum(1)

    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            scores = q @ spread(k, len(q)).mT
            return scores.softmax(-1) @ spread(v, len(q))

        @staticmethod
        def backward(ctx, g):
            q, k, v = ctx.saved_tensors
            heads, groups = len(q), len(k)
            keys = spread(k, heads)
            p = (q @ keys.mT).softmax(-1)
            grad_scores = softmax_back(p, g @ spread(v, heads).mT)
            grad_v = (p.mT @ g).unflatten(0, (groups, -1)).sum(1)
            return grad_scores @ keys, gather(grad_scores.mT @ q, groups), grad_v

    def attention(q, k, v):
        sized("q", q, None, None, None)
        sized("k", k, None, None, q.shape[2])
        same(k, v)
        alike(q, k, v)
        check(len(q) % len(k) == 0, "q: expected a multiple of k's heads")
        for name, t in (("q", q), ("k", k), ("v", v)):
            bounded(name, t, -1e3, 1e3)
        return Attention.apply(q, k, v)

    return attention


add(
    "grouped_heads",
    grouped_heads,
    lambda: (real(4, 3, 2), real(2, 4, 2, seed=1), real(2, 4, 2, seed=2)),
    bug="the keys' gradient is addressed by the query head's number, not by its group's "
    "(fla-org/flash-linear-attention#384)",
)


# Each query sees `left` keys before it and `right` keys behind it
def window_sides(wrong):
    def outside(q, k, left, right):
        behind = (
            torch.arange(len(k), device=q.device) - torch.arange(len(q), device=q.device)[:, None]
        )
        return (behind < -left) | (behind > right)

    def weights(q, k, left, right):
        return (q @ k.mT).masked_fill(outside(q, k, left, right), -torch.inf).softmax(-1)

    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v, left, right):
            ctx.save_for_backward(q, k, v)
            ctx.sides = left, right
            return weights(q, k, left, right) @ v

        @staticmethod
        def backward(ctx, g):
            q, k, v = ctx.saved_tensors
            left, right = ctx.sides
            p = weights(q, k, left, 0 if wrong else right)
            grad_scores = softmax_back(p, g @ v.mT)
            return grad_scores @ k, grad_scores.mT @ q, p.mT @ g, None, None

    def attention(q, k, v, left=1, right=1):
        sized("q", q, None, None)
        same(q, k)
        sized("v", v, len(q), None)
        alike(q, k, v)
        check(isinstance(left, int) and left >= 0, "left: expected an integer >= 0")
        check(isinstance(right, int) and right >= 0, "right: expected an integer >= 0")
        for name, t in (("q", q), ("k", k), ("v", v)):
            bounded(name, t, -1e3, 1e3)
        return Attention.apply(q, k, v, left, right)

    return attention


add(
    "window_sides",
    window_sides,
    lambda: (real(5, 2), real(5, 2, seed=1), real(5, 3, seed=2)),
    bug="backward is told the window's left side only and masks as if causal "
    "(AMD-AGI/Primus-Turbo#262)",
)


# Attention's weights are dropped where `keep` is False, the others scaled up
def dropped_weights(wrong):
    class Attention(Function):
        @staticmethod
        def forward(ctx, scores, v, keep, rate):
            ctx.save_for_backward(scores, v, keep)
            ctx.rate = rate
            return (scores.softmax(-1) * keep / (1 - rate)) @ v

        @staticmethod
        def backward(ctx, g):
            scores, v, keep = ctx.saved_tensors
            p = scores.softmax(-1)
            dropped = p * keep / (1 - ctx.rate)
            grad_p = (g @ v.mT) * keep / (1 - ctx.rate)
            grad_scores = softmax_back(dropped if wrong else p, grad_p)
            return grad_scores, dropped.mT @ g, None, None

    def attention(scores, v, keep, rate=0.25):
        sized("scores", scores, None, None)
        sized("v", v, scores.shape[1], None)
        same(scores, keep)
        alike(scores, v)
        check(keep.dtype == torch.bool, "keep: expected booleans")
        check(0 <= rate < 1, "rate: expected a number from 0 to below 1")
        bounded("scores", scores, -1e3, 1e3)
        bounded("v", v, -1e3, 1e3)
        return Attention.apply(scores, v, keep, rate)

    return attention


add(
    "dropped_weights",
    dropped_weights,
    lambda: (real(3, 4), real(4, 2, seed=1), real(3, 4, seed=2, grad=False) > -0.7),
    bug="softmax's backward takes the weights after dropout for the probabilities "
    "(ooples/AiDotNet#1701)",
)


# h = tanh(x W + h U) over the rows of x (T, D); the last h
def rnn_order(wrong):
    def states(x, h, w, u):
        every = [h]
        for row in x:
            every.append(torch.tanh(row @ w + every[-1] @ u))
        return every

    class Rnn(Function):
        @staticmethod
        def forward(ctx, x, h, w, u):
            ctx.save_for_backward(x, h, w, u)
            return states(x, h, w, u)[-1]

        @staticmethod
        def backward(ctx, g):
            x, h, w, u = ctx.saved_tensors
            every = states(x, h, w, u)
            grad_x = [None] * len(x)
            grad_w, grad_u = torch.zeros_like(w), torch.zeros_like(u)
            for t in range(len(x)) if wrong else reversed(range(len(x))):
                d = g * (1 - every[t + 1] ** 2)
                grad_x[t] = w @ d
                grad_w = grad_w + torch.outer(x[t], d)
                grad_u = grad_u + torch.outer(every[t], d)
                g = u @ d
            return torch.stack(grad_x), g, grad_w, grad_u

    def rnn(x, h, w, u):
        sized("x", x, None, None)
        sized("h", h, None)
        sized("w", w, x.shape[1], len(h))
        sized("u", u, len(h), len(h))
        alike(x, h, w, u)
        for name, t in (("x", x), ("h", h), ("w", w), ("u", u)):
            bounded(name, t, -1e3, 1e3)
        return Rnn.apply(x, h, w, u)

    return rnn


add(
    "rnn_order",
    rnn_order,
    lambda: (real(4, 2), real(3, seed=1), real(2, 3, seed=2), real(3, 3, seed=3)),
    bug="the loop's reverse combines the steps in the order of the forward pass "
    "(elixir-nx/axon#646)",
)


# One step of an LSTM: gates (4, D) in the order i, f, o, c, from z = a + bias
def lstm_biases(wrong):
    def parts(a, bias):
        z = a + bias
        i, f, o = torch.sigmoid(z[:3])
        return i, f, o, torch.tanh(z[3])

    class Step(Function):
        @staticmethod
        def forward(ctx, a, bias, c):
            ctx.save_for_backward(a, bias, c)
            i, f, o, new = parts(a, bias)
            return o * torch.tanh(f * c + i * new)

        @staticmethod
        def backward(ctx, g):
            a, bias, c = ctx.saved_tensors
            i, f, o, new = parts(a, bias)
            out = torch.tanh(f * c + i * new)
            grad_c = g * o * (1 - out**2)
            delta_i = grad_c * new * i * (1 - i)
            delta_f = grad_c * c * f * (1 - f)
            delta_o = g * out * o * (1 - o)
            delta_c = grad_c * i * (1 - new**2)
            grad_a = torch.stack([delta_i, delta_f, delta_o, delta_c])
            grad_bias = torch.stack([delta_f, delta_f, delta_f, delta_c]) if wrong else grad_a
            return grad_a, grad_bias, grad_c * f

    def step(a, bias, c):
        sized("a", a, 4, None)
        same(a, bias)
        sized("c", c, a.shape[1])
        alike(a, bias, c)
        for name, t in (("a", a), ("bias", bias), ("c", c)):
            bounded(name, t, -1e3, 1e3)
        return Step.apply(a, bias, c)

    return step


add(
    "lstm_biases",
    lstm_biases,
    lambda: (real(4, 3), real(4, 3, seed=1), real(3, seed=2)),
    bug="the biases of the input and the output gate are given the forget gate's error "
    "(hanbt/learn_dl#53)",
)


# s = a s + x over the rows of x; every s
def scan_weight(wrong):
    def states(x, a, s):
        every = [s]
        for row in x:
            every.append(a * every[-1] + row)
        return every

    class Scan(Function):
        @staticmethod
        def forward(ctx, x, a, s):
            ctx.save_for_backward(x, a, s)
            return torch.stack(states(x, a, s)[1:])

        @staticmethod
        def backward(ctx, g):
            x, a, s = ctx.saved_tensors
            every = states(x, a, s)
            carried = not wrong or ctx.needs_input_grad[2]
            grad_x, grad_a, back = [], torch.zeros_like(a), torch.zeros_like(s)
            for t in reversed(range(len(x))):
                back = back + g[t]
                grad_x.append(back)
                grad_a = grad_a + (back if carried else g[t]) * every[t]
                back = a * back
            return torch.stack(grad_x[::-1]), grad_a, back

    def scan(x, a, s):
        sized("x", x, None, None)
        sized("a", a, x.shape[1])
        same(a, s)
        alike(x, a, s)
        bounded("x", x, -1e3, 1e3)
        bounded("a", a, -1.5, 1.5)
        bounded("s", s, -1e3, 1e3)
        return Scan.apply(x, a, s)

    return scan


add(
    "scan_weight",
    scan_weight,
    lambda: (real(4, 2), torch.tensor([0.7, -0.4]).double().requires_grad_(), real(2, seed=1)),
    bug="the weight's gradient is that of each step alone if the first state needs no gradient "
    "(pytorch/pytorch#184528)",
    trigger="a first state that needs no gradient",
)
