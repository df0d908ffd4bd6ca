"""Losses, scores, transport and the objectives of reinforcement learning."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentyninth import add, bounded, check, same, sized


# The score (CRPS) of a normal forecast, one number each
def normal_score(wrong):
    class Score(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(mean, width, t):
            z = (t - mean) / width
            inner = z * (2 * torch.special.ndtr(z) - 1) + 2 * torch.exp(-z * z / 2) / math.sqrt(
                2 * math.pi
            )
            return width * (inner - 1 / math.sqrt(math.pi))

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            mean, width, t = ctx.saved_tensors
            z = (t - mean) / width
            side = 2 * torch.special.ndtr(z) - 1
            spread = 2 * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) - 1 / math.sqrt(math.pi)
            grad_t = grad_y * side
            return -grad_t, grad_y * spread, -grad_t if wrong else grad_t

    def score(mean, width, t):
        same(mean, width, t)
        bounded("width", width, 1e-3, 1e3)
        bounded("mean", mean, -1e6, 1e6)
        bounded("t", t, -1e6, 1e6)
        return Score.apply(mean, width, t)

    return score


add(
    "normal_score_target",
    normal_score,
    lambda: (real(3, 4), real(3, 4, seed=1, positive=True), real(3, 4, seed=2, grad=False)),
    bug="The target gets the mean's gradient with the same sign",
    trigger="a target that requires grad",
)


# Barron's general loss of residuals, with the shape as a number
def general_loss(wrong):
    class General(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, shape):
            q = x * x
            if shape == 2:
                return q / 2
            if shape == 0:
                return torch.log1p(q / 2)
            d = abs(shape - 2)
            return d / shape * ((q / d + 1) ** (shape / 2) - 1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            x, ctx.shape = inputs
            ctx.save_for_backward(x)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if ctx.shape == 2 and not wrong:
                return grad_y * x, None
            power = (ctx.shape / 2 - 1) * torch.log1p(x * x / abs(ctx.shape - 2))
            return grad_y * x * power.exp(), None

    def loss(x, shape=1.0):
        check(-4 <= shape <= 4, "shape: expected a number from -4 to 4")
        check(shape in (0, 2) or min(abs(shape), abs(shape - 2)) > 1e-2, "shape: too near 0 or 2")
        bounded("x", x, -1e4, 1e4)
        return General.apply(x, float(shape))

    return loss


add(
    "general_loss_square",
    general_loss,
    lambda: (real(3, 4),),
    bug="Forward knows the shape 2 apart, backward takes the power by the logarithm, which is 0 times infinity",
    trigger="shape=2; the default is 1",
)


# Mean log cosh error with a batching rule of its own
def batched_loss(wrong):
    class Loss(Function):
        @staticmethod
        def forward(x, t):
            d = x - t
            return (torch.logaddexp(d, -d) - math.log(2)).mean()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            x, t = ctx.saved_tensors
            g = grad_y * torch.tanh(x - t) / x.numel()
            return g, -g

        @staticmethod
        def vmap(info, in_dims, x, t):
            x, t = (
                a.expand(info.batch_size, *a.shape) if d is None else a.movedim(d, 0)
                for a, d in zip((x, t), in_dims, strict=True)
            )
            if wrong:
                return Loss.apply(x, t).expand(info.batch_size), 0
            d = (x - t).flatten(1)
            return (torch.logaddexp(d, -d) - math.log(2)).mean(1), 0

    def loss(x, t):
        same(x, t)
        check(x.numel() > 0, "expected one number at least")
        return Loss.apply(x, t)

    return loss


add(
    "batched_loss_shared",
    batched_loss,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="The batching rule takes the mean over the batch too and gives it to each sample",
    trigger="vmap",
)


# The dual objective of regularised transport, for the potential of the columns
def transport_dual(wrong):
    class Dual(Function):
        @staticmethod
        def forward(ctx, v, cost, a, b):
            ctx.save_for_backward(v, cost, a, b)
            soft = ((v - cost) + b.log()).logsumexp(1)
            return (b * v).sum() - (a * soft).sum()

        @staticmethod
        def backward(ctx, grad_y):
            v, cost, a, b = ctx.saved_tensors
            share = ((v - cost) + b.log()).softmax(1)
            plan = share / len(a) if wrong else a[:, None] * share
            return grad_y * (b - plan.sum(0)), grad_y * plan, None, None

    def dual(v, cost, a, b):
        sized("cost", cost, None, None)
        sized("a", a, len(cost))
        sized("v", v, cost.shape[1])
        sized("b", b, cost.shape[1])
        check(not a.requires_grad and not b.requires_grad, "a, b: masses are constants")
        for name, mass in (("a", a), ("b", b)):
            bounded(name, mass, 1e-6, 1)
            check(bool((mass.sum() - 1).abs() < 1e-2), f"{name}: expected masses that sum to 1")
        for name, t in (("v", v), ("cost", cost)):
            bounded(name, t, -1e6, 1e6)
        return Dual.apply(v, cost, a, b)

    return dual


add(
    "transport_dual_mass",
    transport_dual,
    lambda: (
        real(4),
        real(3, 4, seed=1, positive=True),
        torch.full((3,), 1 / 3, dtype=torch.float64),
        torch.full((4,), 1 / 4, dtype=torch.float64),
    ),
    bug="Backward takes all rows to be of one mass",
    trigger="masses that differ",
)


# Values of actions from a state's value and advantages, less the mean over the allowed ones
def duelling(wrong):
    class Values(Function):
        @staticmethod
        def forward(ctx, v, a, allowed):
            ctx.save_for_backward(allowed)
            share = allowed.to(a.dtype) / allowed.sum(1, keepdim=True)
            return torch.where(allowed, v[:, None] + a - (a * share).sum(1, keepdim=True), 0)

        @staticmethod
        def backward(ctx, grad_y):
            (allowed,) = ctx.saved_tensors
            g = torch.where(allowed, grad_y, 0)
            total = g.sum(1, keepdim=True)
            if wrong:
                return total[:, 0], torch.where(allowed, g - total / g.shape[1], 0), None
            share = allowed.to(g.dtype) / allowed.sum(1, keepdim=True)
            return total[:, 0], g - total * share, None

    def values(v, a, allowed):
        sized("a", a, None, None)
        sized("v", v, len(a))
        same(a, allowed)
        if allowed.dtype != torch.bool:
            raise TypeError(f"allowed: expected bool, got {allowed.dtype}")
        check(bool(allowed.any(1).all()), "allowed: expected one action at least")
        bounded("a", a, -1e6, 1e6)
        return Values.apply(v, a, allowed)

    return values


add(
    "duelling_forbidden",
    duelling,
    lambda: (real(3), real(3, 4, seed=1), torch.ones(3, 4, dtype=torch.bool)),
    bug="Backward's mean counts the forbidden actions",
    trigger="an action that is not allowed",
)


# Log-probabilities of the taken actions, weighted by exp(advantage / beta), at most `most`
def advantage_weighted(wrong):
    class Weighted(Function):
        @staticmethod
        def forward(ctx, logits, action, advantage, most):
            ctx.save_for_backward(logits, action, advantage)
            ctx.most = most
            log_p = logits.log_softmax(1).gather(1, action[:, None])[:, 0]
            return -(advantage.exp().clamp(max=most) * log_p).sum()

        @staticmethod
        def backward(ctx, grad_y):
            logits, action, advantage = ctx.saved_tensors
            log_p = logits.log_softmax(1)
            weight = advantage.exp().clamp(max=ctx.most)
            one = F.one_hot(action, logits.shape[1])
            grad_logits = grad_y * weight[:, None] * (log_p.exp() - one)
            slope = weight if wrong else torch.where(weight < ctx.most, weight, 0)
            grad_advantage = -grad_y * slope * log_p.gather(1, action[:, None])[:, 0]
            return grad_logits, None, grad_advantage, None

    def loss(logits, action, advantage, most=20.0):
        sized("logits", logits, None, None)
        sized("action", action, len(logits))
        sized("advantage", advantage, len(logits))
        check(action.dtype == torch.int64, "action: expected int64")
        check(bool(((action >= 0) & (action < logits.shape[1])).all()), "action: out of range")
        bounded("logits", logits, -1e6, 1e6)
        bounded("advantage", advantage, -80, 80)
        check(most > 0, "most: expected a positive number")
        return Weighted.apply(logits, action, advantage, most)

    return loss


add(
    "advantage_weighted_cap",
    advantage_weighted,
    lambda: (real(3, 4), whole(4, 3), real(3, seed=1)),
    bug="The advantage has a gradient where its weight is at the cap",
    trigger="an advantage above 3",
)
