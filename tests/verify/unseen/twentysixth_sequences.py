"""Recurrences, returns, segmentations and filters."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.twentysixth import add, check, finite, same, sized


# Minimal gated unit with elementwise recurrence
def minimal_unit(wrong):
    def steps(a, b, u, v, h):
        for t in range(len(a)):
            f = torch.sigmoid(a[t] + u * h)
            c = torch.tanh(b[t] + v * f * h)
            new = (1 - f) * h + f * c
            yield h, f, c, new
            h = new

    class Unit(Function):
        @staticmethod
        def forward(ctx, a, b, u, v, h):
            ctx.save_for_backward(a, b, u, v, h)
            return torch.stack([new for *_, new in steps(a, b, u, v, h)])

        @staticmethod
        def backward(ctx, grad_y):
            a, b, u, v, h0 = ctx.saved_tensors
            grad_h, grad_u, grad_v = torch.zeros_like(h0), 0, 0
            grad_a, grad_b = [], []
            for t, (h, f, c, _) in reversed(list(enumerate(steps(a, b, u, v, h0)))):
                grad_h = grad_h + grad_y[t]
                grad_c = grad_h * f * (1 - c * c)
                grad_f = grad_h * (c - h) + grad_c * v * h
                grad_v = grad_v + (grad_c * f * h).sum(0)
                grad_g = grad_f * f * (1 - f)
                grad_u = grad_u + (grad_g * h).sum(0)
                grad_h = grad_h * (1 - f) + grad_c * v * f + grad_g * u
                grad_a.append(grad_g)
                grad_b.append(grad_c)
            grad_a, grad_b = (torch.stack(g[::-1]) for g in (grad_a, grad_b))
            return grad_a, grad_b, grad_u, grad_v, None if wrong else grad_h

    def unit(a, b, u, v, h):
        sized("a", a, None, None, None)
        same(a, b)
        sized("h", h, *a.shape[1:])
        sized("u", u, a.shape[2])
        same(u, v)
        finite(u=u, v=v)
        return Unit.apply(a, b, u, v, h)

    return unit


add(
    "minimal_unit_start",
    minimal_unit,
    lambda: (
        real(3, 2, 3),
        real(3, 2, 3, seed=1),
        real(3, seed=2),
        real(3, seed=3),
        real(2, 3, seed=4, grad=False),
    ),
    bug="The first state gets no gradient",
    trigger="a first state that requires one",
    missed="a note: an input whose gradient is None, which may be meant",
)


# Independently recurrent network, with the last state as a second output
def independent_rnn(wrong):
    class Network(Function):
        @staticmethod
        def forward(ctx, x, u):
            h, states = torch.zeros_like(x[0]), []
            for step in x:
                h = (step + u * h).clamp(min=0)
                states.append(h)
            y = torch.stack(states)
            ctx.save_for_backward(u, y)
            return y, h.clone()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y, grad_last):
            u, y = ctx.saved_tensors
            if not wrong:
                grad_y = grad_y.clone()
            grad_y[-1] += grad_last
            grad_x, grad_u = torch.empty_like(y), torch.zeros_like(u)
            carry = torch.zeros_like(y[0])
            for t in reversed(range(len(y))):
                grad_x[t] = (grad_y[t] + carry) * (y[t] > 0)
                carry = grad_x[t] * u
                if t:
                    grad_u += (grad_x[t] * y[t - 1]).sum(0)
            return grad_x, grad_u

    def network(x, u):
        sized("x", x, None, None, None)
        sized("u", u, x.shape[2])
        return Network.apply(x, u)

    return network


add(
    "independent_rnn_last",
    independent_rnn,
    lambda: (real(3, 2, 3), real(3, seed=1)),
    bug="The last state's gradient is added to the outputs' grad_output in place",
    trigger="both outputs used and grad_output looked at again, or expanded",
)


# QRNN's pooling: c = f c + (1 - f) z, h = o c
def gated_pooling(wrong):
    class Pooling(Function):
        @staticmethod
        def forward(ctx, a, z, o):
            f, keep = torch.sigmoid(a), torch.sigmoid(-a)
            c, states = torch.zeros_like(z[0]), []
            for t in range(len(z)):
                c = f[t] * c + keep[t] * z[t]
                states.append(c)
            c = torch.stack(states)
            ctx.save_for_backward(f, keep, z, o, c)
            return o * c

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            f, keep, z, o, c = ctx.saved_tensors
            grad_a, grad_z = torch.empty_like(f), torch.empty_like(z)
            carry = torch.zeros_like(z[0])
            for t in reversed(range(len(z))):
                grad_c = grad_y[t] * o[t] + carry
                before = c[t - 1] if t else torch.zeros_like(carry)
                if wrong:
                    before = (c[t] - keep[t] * z[t]) / f[t]
                grad_a[t] = grad_c * (before - z[t]) * f[t] * keep[t]
                grad_z[t] = grad_c * keep[t]
                carry = grad_c * f[t]
            return grad_a, grad_z, grad_y * c

    def pooling(a, z, o):
        sized("a", a, None, None)
        same(a, z, o)
        return Pooling.apply(a, z, o)

    return pooling


add(
    "gated_pooling_closed",
    gated_pooling,
    lambda: (real(4, 3), real(4, 3, seed=1), real(4, 3, seed=2)),
    bug="The state before a step is had back by division by the gate",
    trigger="a gate so far below 0 that it is shut",
)


# Log of the sum over all ways to cut a sequence into segments of scores (T, D)
def segmentations(wrong):
    def totals(s):
        alpha = [s.new_zeros(())]
        for t in range(1, len(s) + 1):
            reach = range(1, min(s.shape[1], t) + 1)
            alpha.append(torch.stack([alpha[t - d] + s[t - 1, d - 1] for d in reach]).logsumexp(0))
        return torch.stack(alpha)

    class Total(Function):
        @staticmethod
        def forward(ctx, s):
            alpha = totals(s)
            ctx.save_for_backward(s, alpha)
            return alpha[-1].clone()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            s, alpha = ctx.saved_tensors
            grad_s, grad_alpha = torch.zeros_like(s), torch.zeros_like(alpha)
            grad_alpha[-1] = grad_y
            for t in reversed(range(1, len(s) + 1)):
                reach = min(s.shape[1], t)
                share = (alpha[t - reach : t].flip(0) + s[t - 1, :reach] - alpha[t]).exp()
                if not wrong:
                    share = torch.where(alpha[t] == -math.inf, 0, share)
                grad_s[t - 1, :reach] = grad_alpha[t] * share
                grad_alpha[t - reach : t] += (grad_alpha[t] * share).flip(0)
            return grad_s

    def total(s):
        sized("s", s, None, None)
        return Total.apply(s)

    return total


add(
    "segmentations_unreachable",
    segmentations,
    lambda: (real(4, 3),),
    bug="A place that no segment reaches has -inf - -inf in its shares",
    trigger="forbidden segments, scores of -inf",
    missed="NaN is what most backwards give beside what is -inf",
)


# Generalised advantages of rewards (T) and values (T + 1)
def advantages(wrong):
    gamma, trace = 0.9, 0.8

    class Advantages(Function):
        @staticmethod
        def forward(ctx, reward, value, done):
            ctx.save_for_backward(done)
            going = (~done).to(reward.dtype)
            error = reward + gamma * going * value[1:] - value[:-1]
            y, carry = torch.empty_like(reward), 0
            for t in reversed(range(len(reward))):
                carry = y[t] = error[t] + gamma * trace * going[t] * carry
            return y

        @staticmethod
        def backward(ctx, grad_y):
            (done,) = ctx.saved_tensors
            going = (~done).to(grad_y.dtype)
            carry, grad_error = grad_y[0], [grad_y[0]]
            for t in range(1, len(grad_y)):
                carry = grad_y[t] + gamma * trace * going[t - 1] * carry
                grad_error.append(carry)
            grad_error = torch.stack(grad_error)
            zero = torch.zeros_like(grad_y[:1])
            after = gamma * grad_error if wrong else gamma * going * grad_error
            return grad_error, torch.cat((zero, after)) - torch.cat((grad_error, zero)), None

    def advantages(reward, value, done):
        sized("reward", reward, None)
        sized("value", value, len(reward) + 1)
        sized("done", done, len(reward))
        if done.dtype != torch.bool:
            raise TypeError(f"done: expected booleans, got {done.dtype}")
        return Advantages.apply(reward, value, done)

    return advantages


add(
    "advantages_done",
    advantages,
    lambda: (real(4), real(5, seed=1), torch.zeros(4, dtype=torch.bool)),
    bug="The next value's gradient passes the end of an episode",
    trigger="an episode that ends",
)


# Feedback comb filter: y[t] = x[t] + a y[t - 3]
def comb(wrong):
    class Comb(Function):
        @staticmethod
        def forward(ctx, x, a):
            y = list(x.unbind(-1))
            for t in range(3, len(y)):
                y[t] = y[t] + a * y[t - 3]
            y = torch.stack(y, -1)
            ctx.save_for_backward(x, a, y)
            return y

        @staticmethod
        def backward(ctx, grad_y):
            x, a, y = ctx.saved_tensors
            grad_x = list(grad_y.unbind(-1))
            for t in reversed(range(len(grad_x) - 3)):
                grad_x[t] = grad_x[t] + a * grad_x[t + 3]
            grad_x = torch.stack(grad_x, -1)
            delayed = (x if wrong else y)[..., :-3]
            return grad_x, (grad_x[..., 3:] * delayed).sum()

    def filtered(x, a):
        check(x.ndim >= 1 and x.shape[-1] >= 1 and a.ndim == 0, "expected x (*, T), a ()")
        return Comb.apply(x, a)

    return filtered


add(
    "comb_input",
    comb,
    lambda: (real(2, 6), torch.tensor(0.6, dtype=F64, requires_grad=True)),
    bug="The feedback's gradient takes the delayed input for the delayed output",
    trigger="more than two periods, seven samples",
)
