"""Losses, densities and models of data: CTC, cross-entropies, a normal law, a drug's amount."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.thirtyseventh import (
    add,
    alike,
    bounded,
    check,
    indices,
    memory,
    number,
    positive,
    sized,
    tame,
)

LOW = -1e30


def alignment(logits, target):
    """Return -log of the probability that logits (T, C) spell the target; 0 is the blank."""
    logp = logits.log_softmax(-1)
    spell = [0]
    for c in target.tolist():
        spell += [c, 0]
    state = [logp[0, spell[0]], logp[0, spell[1]]]
    state += [logp.new_tensor(LOW)] * (len(spell) - 2)
    for row in logp[1:]:
        new = []
        for i, c in enumerate(spell):
            ways = [state[i]]
            if i > 0:
                ways.append(state[i - 1])
            if i > 1 and c not in (0, spell[i - 2]):
                ways.append(state[i - 2])
            new.append(torch.stack(ways).logsumexp(0) + row[c])
        state = new
    return -torch.stack(state[-2:]).logsumexp(0)


def check_alignment(logits, target, steps):
    """Refuse a target that does not fit."""
    check(target.dtype == torch.int64, "target: expected int64")
    indices("target", target - 1, logits.shape[-1] - 1)
    twice = int((target[1:] == target[:-1]).sum())
    check(steps >= len(target) + twice, "target: expected to fit into the steps")


# CTC of one sequence of logits (T, C)
def ctc(wrong):
    class Ctc(Function):
        @staticmethod
        def forward(ctx, logits, target):
            ctx.save_for_backward(logits, target)
            return alignment(logits, target)

        @staticmethod
        def backward(ctx, g):
            logits, target = ctx.saved_tensors
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                y = alignment(logits, target)
            g = torch.ones_like(g) if wrong else g
            return *torch.autograd.grad(y, logits, g, create_graph=again), None

    def loss(logits, target):
        sized("logits", logits, None, None)
        sized("target", target, None)
        check_alignment(logits, target, len(logits))
        tame(bound=100, logits=logits)
        return Ctc.apply(logits, target)

    return loss


add(
    "ctc_cotangent",
    ctc,
    lambda: (real(5, 3), torch.tensor([1, 2])),
    bug="backward returns the loss's gradient without the cotangent (sherjilozair/ctc#2)",
    trigger="a cotangent other than 1",
)


# CTC of a batch of logits (B, T, C) of several lengths, all targets having one
def ctc_lengths(wrong):
    def losses(logits, target, length):
        each = zip(logits, target, length.tolist(), strict=True)
        return torch.stack([alignment(x[:n], t) for x, t, n in each])

    class Ctc(Function):
        @staticmethod
        def forward(ctx, logits, target, length):
            ctx.save_for_backward(logits, target, length)
            return losses(logits, target, length)

        @staticmethod
        def backward(ctx, g):
            logits, target, length = ctx.saved_tensors
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                y = losses(logits, target, length)
            (grad,) = torch.autograd.grad(y, logits, g, create_graph=again)
            if wrong:
                step = torch.arange(logits.shape[1], device=logits.device)
                behind = (step >= length[:, None])[..., None]
                grad = grad + g[:, None, None] * logits.softmax(-1) * behind
            return grad, None, None

    def loss(logits, target, length):
        sized("logits", logits, None, None, None)
        sized("target", target, len(logits), None)
        sized("length", length, len(logits))
        check(length.dtype == torch.int64, "length: expected int64")
        indices("length", length - 1, logits.shape[1])
        for t, n in zip(target, length.tolist(), strict=True):
            check_alignment(logits, t, n)
        tame(bound=100, logits=logits)
        return Ctc.apply(logits, target, length)

    return loss


add(
    "ctc_lengths_behind",
    ctc_lengths,
    lambda: (real(2, 4, 3), torch.tensor([[1, 2], [2, 2]]), torch.tensor([4, 4])),
    bug="steps behind a sequence's end get their softmax as gradient (tensorflow/tensorflow#41280)",
    trigger="a sequence that is shorter than the batch",
)


# Cross-entropy with smoothed labels, the classes being split over devices
def smoothed_cross_entropy(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, x, target, smoothing, devices):
            ctx.save_for_backward(x, target)
            ctx.smoothing, ctx.devices = smoothing, devices
            n = x.shape[1]
            s = smoothing * n / (n - 1)
            logp = x.log_softmax(-1)
            return -(1 - s) * logp.gather(1, target[:, None])[:, 0] - s * logp.mean(-1)

        @staticmethod
        def backward(ctx, g):
            x, target = ctx.saved_tensors
            n = x.shape[1]
            if wrong:
                n //= ctx.devices
            s = ctx.smoothing * n / (n - 1)
            one = torch.zeros_like(x).scatter(1, target[:, None], 1 - s)
            return g[:, None] * (x.softmax(-1) - one - s / n), None, None, None

    def loss(x, target, smoothing=0.1, devices=2):
        sized("x", x, None, None)
        sized("target", target, len(x))
        check(target.dtype == torch.int64, "target: expected int64")
        indices("target", target, x.shape[1])
        check(isinstance(devices, int) and devices >= 1, "devices: expected a positive integer")
        check(x.shape[1] % devices == 0, "x: expected as many classes on each device")
        check(x.shape[1] // devices >= 2, "x: expected two classes on each device")
        check(0 <= smoothing < 0.5, "smoothing: expected 0 to 0.5")
        tame(x=x)
        return Loss.apply(x, target, smoothing, devices)

    return loss


add(
    "smoothed_cross_entropy_device",
    smoothed_cross_entropy,
    lambda: (real(3, 6), whole(6, 3)),
    bug="backward smooths over one device's classes (NVIDIA/Megatron-LM#7464)",
)


# Cross-entropy of each row
def row_cross_entropy(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, x, target):
            ctx.save_for_backward(x, target)
            return x.logsumexp(-1) - x.gather(1, target[:, None])[:, 0]

        @staticmethod
        def backward(ctx, g):
            x, target = ctx.saved_tensors
            one = torch.zeros_like(x).scatter(1, target[:, None], 1)
            g = memory(g) if wrong else g
            return g[:, None] * (x.softmax(-1) - one), None

    def loss(x, target):
        sized("x", x, None, None)
        sized("target", target, len(x))
        check(target.dtype == torch.int64, "target: expected int64")
        indices("target", target, x.shape[1])
        tame(x=x)
        return Loss.apply(x, target)

    return loss


add(
    "row_cross_entropy_zeros",
    row_cross_entropy,
    lambda: (real(4, 3), whole(3, 4)),
    bug="an expanded cotangent is read as if contiguous: zeros (NVIDIA/Megatron-LM#1750)",
    trigger="a cotangent of one number for all rows, as sum() sends it",
)


# Log-density of rows under a normal law given by a Cholesky factor
def normal_log_density(wrong):
    def standard(x, mean, factor):
        return torch.linalg.solve_triangular(factor.tril(), (x - mean).mT, upper=False)

    class Density(Function):
        @staticmethod
        def forward(ctx, x, mean, factor):
            ctx.save_for_backward(x, mean, factor)
            z = standard(x, mean, factor)
            half = len(mean) * math.log(2 * math.pi) / 2
            return -z.square().sum(0) / 2 - factor.diagonal().log().sum() - half

        @staticmethod
        def backward(ctx, g):
            x, mean, factor = ctx.saved_tensors
            z = standard(x, mean, factor)
            lower = factor.tril()
            back = torch.linalg.solve_triangular(lower.mT, z, upper=True)
            grad = -(g * back).mT
            if wrong:
                back = torch.linalg.solve_triangular(lower, z, upper=False)
            grad_factor = ((g * back) @ z.mT).tril() - torch.diag(g.sum() / factor.diagonal())
            return grad, -grad.sum(0), grad_factor

    def density(x, mean, factor):
        sized("x", x, None, None)
        sized("mean", mean, x.shape[1])
        sized("factor", factor, x.shape[1], x.shape[1])
        tame(bound=100, x=x, mean=mean, factor=factor)
        check(len(mean) <= 8, "mean: expected eight numbers at most")
        bounded("factor", factor, -2, 2)
        bounded("factor's diagonal", factor.diagonal(), 0.5, 2)
        return Density.apply(x, mean, factor)

    return density


add(
    "normal_log_density_factor",
    normal_log_density,
    lambda: (
        real(4, 2),
        real(2, seed=1),
        torch.tensor([[1.2, 0.0], [0.4, 0.7]], dtype=torch.float64, requires_grad=True),
    ),
    bug="the factor's gradient solves with the factor, not its transpose (pyro-ppl/pyro#685)",
)


# -log of the normal density of numbers with one location and one scale
def normal_energy(wrong):
    class Energy(Function):
        @staticmethod
        def forward(ctx, x, loc, scale):
            ctx.save_for_backward(x, loc, scale)
            return ((x - loc) / scale).square() / 2 + scale.log() + math.log(2 * math.pi) / 2

        @staticmethod
        def backward(ctx, g):
            x, loc, scale = ctx.saved_tensors
            d = x - loc
            grad = g * d / scale**2
            slope = d**2 / scale**3 * (2 if wrong else 1)
            return grad, -grad.sum(), (g * (1 / scale - slope)).sum()

    def energy(x, loc, scale):
        check(x.numel() > 0, "x: expected numbers")
        sized("loc", loc)
        sized("scale", scale)
        tame(bound=100, x=x, loc=loc, scale=scale)
        bounded("scale", scale, 0.1, 100)
        return Energy.apply(x, loc, scale)

    return energy


add(
    "normal_energy_square",
    normal_energy,
    lambda: (real(4), number(0.4), number(1.3)),
    bug="the square's factor 2 counts twice in the scale's gradient (pyro-ppl/pyro#1955)",
)


# Points of the simplex (N, D) that maximise <v, x> plus a times the entropy
def entropic_argmax(wrong):
    class Argmax(Function):
        @staticmethod
        def forward(ctx, v, a):
            ctx.save_for_backward(v, a)
            return (v / a).softmax(-1)

        @staticmethod
        def backward(ctx, g):
            v, a = ctx.saved_tensors
            x = (v / a).softmax(-1)
            grad = x * g
            if not wrong:
                grad = grad - x * grad.sum(-1, keepdim=True)
            return grad / a, -(grad * v).sum() / a**2

    def argmax(v, a):
        sized("v", v, None, None)
        sized("a", a)
        tame(bound=100, v=v, a=a)
        bounded("a", a, 0.1, 100)
        return Argmax.apply(v, a)

    return argmax


add(
    "entropic_argmax_constraint",
    entropic_argmax,
    lambda: (real(3, 4), number(0.8)),
    bug="the solution's derivative leaves the constraint out (cvxpy/cvxpylayers#145)",
)


# Probabilities that a unit (B, L) of a block is on, at most one of k, and that any of the block is
def probabilistic_pool(wrong):
    def parts(x, k):
        z = x.unflatten(1, (-1, k))
        m = z.detach().amax(-1, keepdim=True).clamp(min=0)
        e = (z - m).exp()
        total = e.sum(-1, keepdim=True)
        off = (-m).exp() / ((-m).exp() + total)
        return e / ((-m).exp() + total), off[..., 0]

    class Pool(Function):
        @staticmethod
        def forward(ctx, x, k):
            ctx.save_for_backward(x)
            ctx.k = k
            h, off = parts(x, k)
            return h.flatten(1), 1 - off

        @staticmethod
        def backward(ctx, gh, gp):
            (x,) = ctx.saved_tensors
            h, off = parts(x, ctx.k)
            gh = gh.unflatten(1, (-1, ctx.k))
            grad = h * (gh - (gh * h).sum(-1, keepdim=True))
            grad = grad + h * (gp if wrong else gp * off)[..., None]
            return grad.flatten(1), None

    def pool(x, k=2):
        check(isinstance(k, int) and k >= 1, "k: expected a positive integer")
        sized("x", x, None, None)
        check(x.shape[1] % k == 0, "x: expected blocks of k")
        tame(x=x)
        return Pool.apply(x, k)

    return pool


add(
    "probabilistic_pool_off",
    probabilistic_pool,
    lambda: (real(2, 4),),
    bug="the pooled unit's gradient lacks the probability of being off (lisa-lab/pylearn2#353)",
)


# Squared distance of a circuit's expectation, the product of cosines, from a target
def circuit_cost(wrong):
    class Cost(Function):
        @staticmethod
        def forward(ctx, angles, target):
            ctx.save_for_backward(angles, target)
            return (angles.cos().prod() - target).square()

        @staticmethod
        def backward(ctx, g):
            angles, target = ctx.saved_tensors
            d = angles.cos().prod() - target
            turn = torch.eye(len(angles), dtype=g.dtype, device=g.device) * math.pi / 2
            up, down = (angles + turn).cos().prod(-1), (angles - turn).cos().prod(-1)
            slope = (up - down) / 2
            return g * slope if wrong else 2 * g * d * slope, -2 * g * d

    def cost(angles, target):
        sized("angles", angles, None)
        sized("target", target)
        tame(bound=100, angles=angles, target=target)
        return Cost.apply(angles, target)

    return cost


add(
    "circuit_cost_outer",
    circuit_cost,
    lambda: (real(3), number(0.4)),
    bug="the gradient is the circuit's, without the cost's factor (CESGA-Quantum-Spain/cunqa#245)",
)


# A drug's amount at times t: a steady state of one dose each interval, and more doses after it
def steady_amount(wrong):
    def parts(rate, gap, dose, t, more):
        lost = -torch.expm1(-rate * gap)
        steady = dose * (-rate * t).exp() / lost
        n = torch.arange(1, more + 1, dtype=t.dtype, device=t.device)
        age = t[:, None] - n * gap
        return lost, steady, n, age, dose * (-rate * age).exp()

    class Amount(Function):
        @staticmethod
        def forward(ctx, rate, gap, dose, t, more):
            ctx.save_for_backward(rate, gap, dose, t)
            ctx.more = more
            _, steady, _, _, later = parts(rate, gap, dose, t, more)
            return steady + later.sum(1)

        @staticmethod
        def backward(ctx, g):
            rate, gap, dose, t = ctx.saved_tensors
            lost, steady, n, age, later = parts(rate, gap, dose, t, ctx.more)
            y = steady + later.sum(1)
            left = (1 - lost) / lost
            grad_rate = (g * (-steady * (t + gap * left) - (later * age).sum(1))).sum()
            slope = (rate * n * later).sum(1)
            if not wrong:
                slope = slope - steady * rate * left
            return grad_rate, (g * slope).sum(), (g * y).sum() / dose, -g * rate * y, None

    def amount(rate, gap, dose, t, more=1):
        for name, s in {"rate": rate, "gap": gap, "dose": dose}.items():
            sized(name, s)
            bounded(name, s, 0.1, 10)
        sized("t", t, None)
        alike(rate, gap, dose, t)
        check(isinstance(more, int) and 0 <= more <= 10, "more: expected 0 to 10")
        positive("t", t)
        check(
            bool((t >= more * gap).all() & (t <= 200).all()), "t: expected times behind the doses"
        )
        return Amount.apply(rate, gap, dose, t, more)

    return amount


add(
    "steady_amount_interval",
    steady_amount,
    lambda: (
        *(number(s) for s in (0.6, 1.4, 2.0)),
        torch.tensor([1.5, 2.0, 4.0], dtype=torch.float64, requires_grad=True),
    ),
    bug="the steady state gives the interval no gradient (metrumresearchgroup/Torsten#15)",
)
