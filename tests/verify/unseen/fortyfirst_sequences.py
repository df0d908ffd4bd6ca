"""Running sums, frames of signals, steps in time."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.fortyfirst import add, alike, bounded, check, same, sized


# The share of x[b, j] in the running sum at i, that is exp(x[b, j] - y[b, i]) for j <= i
def shares(x, y):
    places = torch.arange(x.shape[1], device=x.device)
    gap = torch.where(places <= places[:, None], x[:, None] - y[..., None], -float("inf"))
    return gap.exp()


def running_log(wrong):
    class Running(Function):
        @staticmethod
        def forward(ctx, x):
            y = x.logcumsumexp(1)
            ctx.save_for_backward(x, y)
            return y

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            if wrong:
                g = g * (-y).exp()
            return (g[..., None] * shares(x, y)).sum(1)

    def running(x):
        sized("x", x, None, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -50, 50)
        return Running.apply(x)

    return running


add(
    "logcumsum_twice",
    running_log,
    lambda: (real(2, 4),),
    bug="the gradient is divided by the running sums twice (pytorch/pytorch#32876)",
)


def running_far(wrong):
    class Running(Function):
        @staticmethod
        def forward(ctx, x):
            y = x.logcumsumexp(1)
            ctx.save_for_backward(x, y)
            return y

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            if not wrong:
                return (g[..., None] * shares(x, y)).sum(1)
            part = (x - x.amax(1, keepdim=True)).exp()
            total = part.cumsum(1)
            rate = torch.where(total > 0, g / torch.where(total > 0, total, 1), 0)
            return part * rate.flip(1).cumsum(1).flip(1)

    def running(x):
        sized("x", x, None, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -2e3, 2e3)
        return Running.apply(x)

    return running


add(
    "logcumsum_far",
    running_far,
    lambda: (torch.tensor([[-400, 401, -797], [400, -398, -1201]], dtype=F64).requires_grad_(),),
    bug="the first numbers lose their derivative where a far larger one follows "
    "(pytorch/pytorch#196705)",
    trigger="numbers more than 750 apart, as in the sample",
)


# A signal (L) seen through a bell at places that are the running sums of hops (T)
def frames(wrong):
    def gaps(signal, hops):
        places = torch.arange(len(signal), dtype=hops.dtype, device=hops.device)
        return places - hops.cumsum(0)[:, None]

    class Frames(Function):
        @staticmethod
        def forward(ctx, signal, hops):
            ctx.save_for_backward(signal, hops)
            return torch.exp(-gaps(signal, hops).square() / 2) @ signal

        @staticmethod
        def backward(ctx, g):
            signal, hops = ctx.saved_tensors
            gap = gaps(signal, hops)
            bell = torch.exp(-gap.square() / 2)
            moved = g * ((bell * gap) @ signal)
            if wrong:
                moved = torch.cat([moved[:1], torch.zeros_like(moved[1:])])
            return g @ bell, moved.flip(0).cumsum(0).flip(0)

    def seen(signal, hops):
        sized("signal", signal, None)
        sized("hops", hops, None)
        alike(signal, hops)
        bounded("signal", signal, -1e3, 1e3)
        bounded("hops", hops, -1e2, 1e2)
        return Frames.apply(signal, hops)

    return seen


add(
    "frames_first",
    frames,
    lambda: (real(8), real(3, seed=1, positive=True)),
    bug="the windows move with the first frame alone, so that later hops get no gradient "
    "(maxime-leiber/dstft#23)",
)


# Decay: the states (T, B) at times (T) out of a start and rates (B)
def decay(wrong):
    class Decay(Function):
        @staticmethod
        def forward(ctx, start, rate, times):
            ctx.save_for_backward(start, rate, times)
            return start * torch.exp(-rate * times[:, None])

        @staticmethod
        def backward(ctx, g):
            start, rate, times = ctx.saved_tensors
            left = torch.exp(-rate * times[:, None])
            y = start * left
            grad_times = (g * -rate * y).sum(1)
            grad_rate = (g * -times[:, None] * y).sum(0)
            return (g * left).sum(0), grad_rate, -grad_times if wrong else grad_times

    def states(start, rate, times):
        sized("start", start, None)
        sized("times", times, None)
        same(start, rate)
        alike(start, rate, times)
        bounded("start", start, -1e3, 1e3)
        bounded("rate", rate, -5, 5)
        bounded("times", times, -5, 5)
        return Decay.apply(start, rate, times)

    return states


add(
    "times_sign",
    decay,
    lambda: (real(2), real(2, seed=1), real(3, seed=2)),
    bug="the gradients of the times come with the wrong sign (rtqichen/torchdiffeq#199)",
)


# Euler's steps of y' = sin(k t) y
def driven(wrong):
    step, count = 0.3, 5

    class Driven(Function):
        @staticmethod
        def forward(ctx, y, k):
            ctx.save_for_backward(y, k)
            for n in range(count):
                y = y * (1 + step * torch.sin(k * step * n))
            return y

        @staticmethod
        def backward(ctx, g):
            y, k = ctx.saved_tensors
            states = [y]
            for n in range(count - 1):
                states.append(states[-1] * (1 + step * torch.sin(k * step * n)))
            grad_k = torch.zeros_like(k)
            for n in reversed(range(count)):
                t = step * (count - 1 - n if wrong else n)
                grad_k = grad_k + g * states[n] * step * t * torch.cos(k * t)
                g = g * (1 + step * torch.sin(k * t))
            return g, grad_k

    def end(y, k):
        sized("y", y, None)
        same(y, k)
        alike(y, k)
        bounded("y", y, -1e3, 1e3)
        bounded("k", k, -10, 10)
        return Driven.apply(y, k)

    return end


add(
    "adjoint_time",
    driven,
    lambda: (real(3), real(3, seed=1)),
    bug="while the adjoint goes back the time goes on (dynamiqs/dynamiqs#51)",
)
