"""Steps of optimisers, differentiated."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyseventh import add, check, same, sized


# Parameters after Adam's steps with these gradients, time first, for learning to learn
def adam(wrong):
    rate, b1, b2, tiny = 0.1, 0.9, 0.99, 1e-3

    def root(v):
        return torch.where(v == 0, 0, torch.where(v == 0, 1, v).sqrt())

    def averages(g):
        m, v = torch.zeros_like(g[0]), torch.zeros_like(g[0])
        for i, now in enumerate(g):
            m, v = b1 * m + (1 - b1) * now, b2 * v + (1 - b2) * now.square()
            yield m / (1 - b1 ** (i + 1)), root(v / (1 - b2 ** (i + 1)))

    class Adam(Function):
        @staticmethod
        def forward(ctx, p, g):
            ctx.save_for_backward(g)
            for m, r in averages(g):
                p = p - rate * m / (r + tiny)
            return p

        @staticmethod
        def backward(ctx, grad_p):
            (g,) = ctx.saved_tensors
            grads = []
            grad_m, grad_v = torch.zeros_like(grad_p), torch.zeros_like(grad_p)
            for i, (m, r) in reversed(list(enumerate(averages(g)))):
                from_m = -rate * grad_p / (r + tiny)
                from_r = -from_m * m / (r + tiny)
                from_v = from_r / (2 * (r if wrong else torch.where(r == 0, 1, r)))
                grad_m = b1 * grad_m + from_m / (1 - b1 ** (i + 1))
                grad_v = b2 * grad_v + from_v / (1 - b2 ** (i + 1))
                grads.append((1 - b1) * grad_m + 2 * (1 - b2) * g[i] * grad_v)
            return grad_p, torch.stack(grads[::-1])

    def steps(p, g):
        sized("p", p, None)
        sized("g", g, None, len(p))
        return Adam.apply(p, g)

    return steps


add(
    "adam_steps_zero",
    adam,
    lambda: (real(4), real(3, 4, seed=1)),
    bug="The root of the squares' average has an infinite slope at 0, and infinity times 0 is NaN",
    trigger="a parameter that has had no gradient yet, as an embedding's row",
)


# One step with momentum: the new parameters and the new velocity
def momentum(wrong):
    class Step(Function):
        @staticmethod
        def forward(ctx, p, g, v, rate, mu, nesterov):
            ctx.rate, ctx.mu, ctx.nesterov = rate, mu, nesterov
            v = mu * v + g
            return p - rate * (g + mu * v if nesterov else v), v

        @staticmethod
        def backward(ctx, grad_p, grad_v):
            ahead = ctx.nesterov and not wrong
            step = -ctx.rate * grad_p
            grad_v = grad_v + (ctx.mu * step if ahead else step)
            grad_g = grad_v + step if ahead else grad_v
            return grad_p, grad_g, ctx.mu * grad_v, None, None, None

    def step(p, g, v, rate=0.1, mu=0.9, nesterov=False):
        same(p, g, v)
        return Step.apply(p, g, v, rate, mu, nesterov)

    return step


add(
    "momentum_nesterov",
    momentum,
    lambda: (real(3, 4), real(3, 4, seed=1), real(3, 4, seed=2)),
    bug="Backward knows plain momentum alone",
    trigger="nesterov=True",
)


# Two gradients, scaled down together to a common norm of at most ``most``
def clipped(wrong):
    class Clip(Function):
        @staticmethod
        def forward(ctx, a, b, most):
            ctx.save_for_backward(a, b)
            ctx.most = most
            scale = (most / norm(a, b)).clamp(max=1)
            return a * scale, b * scale

        @staticmethod
        def backward(ctx, grad_a, grad_b):
            a, b = ctx.saved_tensors
            n = norm(a, b)
            scale = (ctx.most / n).clamp(max=1)
            if not wrong and n > ctx.most:
                a, b = a / n, b / n
                along = (grad_a * a).sum() + (grad_b * b).sum()
                grad_a, grad_b = grad_a - along * a, grad_b - along * b
            return scale * grad_a, scale * grad_b, None

    def norm(a, b):
        return torch.linalg.vector_norm(torch.cat([a.flatten(), b.flatten()]))

    def clip(a, b, most=10.0):
        check(most > 0, "most: expected a positive number")
        return Clip.apply(a, b, most)

    return clip


add(
    "clipped_together_norm",
    clipped,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="Backward takes the scale for a constant",
    trigger="a norm above the largest one allowed",
)
