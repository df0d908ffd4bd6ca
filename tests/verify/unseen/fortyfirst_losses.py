"""Costs of alignments, of transport and of collisions."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.fortyfirst import add, alike, bounded, check, indices, same, sized


# Minus the log of the chance that scores (T, C), 0 standing for no label, spell out the labels
def alignment(scores, labels):
    low = scores.new_full((), -1e30)
    states = torch.zeros(2 * len(labels) + 1, dtype=torch.long, device=labels.device)
    states[1::2] = labels
    jump = torch.zeros_like(states, dtype=torch.bool)
    jump[2:] = (states[2:] != 0) & (states[2:] != states[:-2])
    place = torch.arange(len(states), device=labels.device)
    alpha = torch.where(place < 2, scores[0, states], low)
    for row in scores[1:]:
        one = torch.cat([low[None], alpha[:-1]])
        two = torch.where(jump, torch.cat([low[None], low[None], alpha[:-2]]), low)
        alpha = row[states] + torch.stack([alpha, one, two]).logsumexp(0)
    return -alpha[-2:].logsumexp(0)


def gradient(scores, labels):
    with torch.enable_grad():
        leaf = scores.detach().requires_grad_()
        return torch.autograd.grad(alignment(leaf, labels), leaf)[0]


def spelled(scores, labels):
    sized("scores", scores, None, None)
    sized("labels", labels, None)
    check(scores.is_floating_point(), "scores: expected floating point numbers")
    indices("labels", labels, scores.shape[1])
    check(bool((labels > 0).all()), "labels: expected no 0")
    repeats = int((labels[1:] == labels[:-1]).sum())
    check(len(labels) + repeats <= len(scores), "labels: expected no more than fit")
    bounded("scores", scores, -50, 50)


def ctc(wrong):
    class Cost(Function):
        @staticmethod
        def forward(ctx, scores, labels):
            ctx.save_for_backward(scores, labels)
            return alignment(scores, labels)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            scores, labels = ctx.saved_tensors
            grad = gradient(scores, labels)
            if wrong:
                grad = grad + scores.exp()
            return g * grad, None

    def cost(scores, labels):
        spelled(scores, labels)
        return Cost.apply(scores, labels.long())

    return cost


add(
    "ctc_normalised",
    ctc,
    lambda: (real(4, 3).detach().log_softmax(1).requires_grad_(), torch.tensor([1, 2])),
    bug="the gradient takes for granted that the log probabilities come out of a log_softmax "
    "(pytorch/pytorch#52241)",
)


def ctc_logits(wrong):
    class Cost(Function):
        @staticmethod
        def forward(ctx, logits, labels):
            ctx.save_for_backward(logits, labels)
            return alignment(logits.log_softmax(1), labels)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            logits, labels = ctx.saved_tensors
            grad = logits.softmax(1) + gradient(logits.log_softmax(1), labels)
            return grad if wrong else g * grad, None

    def cost(logits, labels):
        spelled(logits, labels)
        return Cost.apply(logits, labels.long())

    return cost


add(
    "ctc_upstream",
    ctc_logits,
    lambda: (real(4, 3), torch.tensor([2, 1])),
    bug="what was done with the cost does not reach the gradient (mcf06/theano_ctc#9)",
    trigger="a grad_output other than 1",
)


# Gromov's cost of a plan t (N, M) between the similarities a (N, N) and b (M, M), with the KL loss
def gromov(wrong):
    class Cost(Function):
        @staticmethod
        def forward(ctx, a, b, t):
            ctx.save_for_backward(a, b, t)
            p, q = t.sum(1), t.sum(0)
            return p @ (a * a.log() - a) @ p + q @ b @ q - (a * (t @ b.log() @ t.mT)).sum()

        @staticmethod
        def backward(ctx, g):
            a, b, t = ctx.saved_tensors
            p, q = t.sum(1), t.sum(0)
            own, log = a * a.log() - a, b.log()
            grad_a = torch.outer(p, p) * a.log() - t @ log @ t.mT
            moved = t.mT @ a @ t / b
            grad_b = torch.outer(q, q) + (moved if wrong else -moved)
            grad_t = ((own + own.mT) @ p)[:, None] + (b + b.mT) @ q
            grad_t = grad_t - a @ t @ log.mT - a.mT @ t @ log
            return g * grad_a, g * grad_b, g * grad_t

    def cost(a, b, t):
        sized("t", t, None, None)
        sized("a", a, t.shape[0], t.shape[0])
        sized("b", b, t.shape[1], t.shape[1])
        alike(a, b, t)
        bounded("a", a, 1e-3, 1e3)
        bounded("b", b, 1e-3, 1e3)
        bounded("t", t, 0, 1e3)
        return Cost.apply(a, b, t)

    return cost


add(
    "gromov_sign",
    gromov,
    lambda: (
        real(3, 3, positive=True),
        real(2, 2, seed=1, positive=True),
        real(3, 2, seed=2, positive=True),
    ),
    bug="one term of the second similarity's gradient has the wrong sign (PythonOT/POT#610)",
)


# The cost of passing an obstacle at 0, at places p (N, 3) with speeds v (N, 3)
def collision(wrong):
    class Cost(Function):
        @staticmethod
        def forward(ctx, p, v):
            ctx.save_for_backward(p, v)
            return torch.exp(-p.norm(dim=1)) * v.norm(dim=1)

        @staticmethod
        def backward(ctx, g):
            p, v = ctx.saved_tensors
            far, speed = p.norm(dim=1, keepdim=True), v.norm(dim=1, keepdim=True)
            near = torch.exp(-far)
            slope = -near * speed
            if wrong:
                slope = slope * near
            return g[:, None] * slope * p / far, g[:, None] * near * v / speed

    def cost(p, v):
        sized("p", p, None, 3)
        same(p, v)
        alike(p, v)
        for name, t in (("p", p), ("v", v)):
            bounded(name, t, -10, 10)
            check(bool((t.norm(dim=1) > 1e-3).all()), f"{name}: expected lengths above 0.001")
        return Cost.apply(p, v)

    return cost


add(
    "collision_factor",
    collision,
    lambda: (real(2, 3), real(2, 3, seed=1)),
    bug="the term with the distance's gradient holds the cost as a factor too many "
    "(HKUST-Aerial-Robotics/grad_traj_optimization#17)",
)
