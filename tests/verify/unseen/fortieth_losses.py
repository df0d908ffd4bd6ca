"""Losses, densities, tables."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.fortieth import add, alike, bounded, check, indices, positive, same, sized


def focal_checks(x, target, gamma):
    same(x, target)
    check(target.dtype == torch.bool, "target: expected booleans")
    check(x.is_floating_point(), "x: expected floating point numbers")
    check(0 <= gamma <= 10, "gamma: expected a number from 0 to 10")
    bounded("x", x, -1e3, 1e3)


# (1 - p) ** gamma times -log p, where p is the probability of what is true
def focal_constant(wrong):
    class Focal(Function):
        @staticmethod
        def forward(ctx, z, gamma):
            ctx.save_for_backward(z)
            ctx.gamma = gamma
            return torch.exp(-gamma * F.softplus(z)) * F.softplus(-z)

        @staticmethod
        def backward(ctx, g):
            (z,) = ctx.saved_tensors
            gamma = ctx.gamma
            slope = -torch.sigmoid(-z)
            if not wrong:
                slope = slope - gamma * torch.sigmoid(z) * F.softplus(-z)
            return g * torch.exp(-gamma * F.softplus(z)) * slope, None

    def focal(x, target, gamma=2.0):
        focal_checks(x, target, gamma)
        return Focal.apply(torch.where(target, x, -x), gamma).mean()

    return focal


add(
    "focal_constant",
    focal_constant,
    lambda: (real(5), real(5, seed=1, grad=False) > 0),
    bug="nothing goes back through the factor that weighs the example (openpifpaf/openpifpaf#244)",
)


def focal_saturated(wrong):
    class Focal(Function):
        @staticmethod
        def forward(ctx, z, gamma):
            ctx.save_for_backward(z)
            ctx.gamma = gamma
            return torch.exp(-gamma * F.softplus(z)) * F.softplus(-z)

        @staticmethod
        def backward(ctx, g):
            (z,) = ctx.saved_tensors
            gamma = ctx.gamma
            p = torch.sigmoid(z)
            factor = torch.exp(-gamma * F.softplus(z))
            slope = -gamma * (1 - p) ** (gamma - 1) * p * (1 - p) if wrong else -gamma * factor * p
            return g * (slope * F.softplus(-z) - factor * torch.sigmoid(-z)), None

    def focal(x, target, gamma=0.5):
        focal_checks(x, target, gamma)
        return Focal.apply(torch.where(target, x, -x), gamma)

    return focal


add(
    "focal_saturated",
    focal_saturated,
    lambda: (real(5), real(5, seed=1, grad=False) > 0),
    bug="0 to the power gamma - 1: NaN where a probability is 1 (kornia/kornia#918)",
    trigger="a score so large that its probability rounds to 1",
)


# How much nearer the positive should be than the negative, over rows (N, D)
def triplet_same(wrong):
    def length(d):
        return d.square().sum(1, keepdim=True).sqrt()

    def unit(d):
        square = d.square().sum(1, keepdim=True)
        if wrong:
            return d / square.sqrt()
        return d / torch.where(square > 0, square, 1).sqrt()

    class Triplet(Function):
        @staticmethod
        def forward(ctx, anchor, near, far, margin):
            ctx.save_for_backward(anchor, near, far)
            ctx.margin = margin
            return F.relu(length(anchor - near) - length(anchor - far) + margin).mean()

        @staticmethod
        def backward(ctx, g):
            anchor, near, far = ctx.saved_tensors
            short = length(anchor - near) - length(anchor - far) + ctx.margin > 0
            rate = g / len(anchor)
            to_near = torch.where(short, unit(anchor - near), 0) * rate
            to_far = torch.where(short, unit(anchor - far), 0) * rate
            return to_near - to_far, -to_near, to_far, None

    def triplet(anchor, near, far, margin=1.0):
        sized("anchor", anchor, None, None)
        same(anchor, near, far)
        alike(anchor, near, far)
        for name, t in (("anchor", anchor), ("near", near), ("far", far)):
            bounded(name, t, -1e3, 1e3)
        return Triplet.apply(anchor, near, far, margin)

    return triplet


add(
    "triplet_same",
    triplet_same,
    lambda: (real(3, 2), real(3, 2, seed=1), real(3, 2, seed=2)),
    bug="a positive that equals its anchor has 0 / 0 for a direction: NaN "
    "(tensorflow/tensorflow#30199)",
    trigger="an anchor and a positive that are equal",
)


# The cross-entropy of probabilities, summed up, and its gradient as a Function of its own
def entropy_second(wrong):
    class Slope(Function):
        @staticmethod
        def forward(ctx, g, x, target):
            ctx.save_for_backward(g, x, target)
            return g * (x - target) / (x * (1 - x))

        @staticmethod
        def backward(ctx, h):
            g, x, target = ctx.saved_tensors
            bell = x * (1 - x)
            grad_x = h * g * (bell - (x - target) * (1 - 2 * x)) / bell**2
            if wrong:
                grad_x = grad_x / x.numel()
            return (h * (x - target) / bell).sum(), grad_x, -h * g / bell

    class Entropy(Function):
        @staticmethod
        def forward(ctx, x, target):
            ctx.save_for_backward(x, target)
            return -(target * x.log() + (1 - target) * torch.log1p(-x)).sum()

        @staticmethod
        def backward(ctx, g):
            x, target = ctx.saved_tensors
            return Slope.apply(g, x, target), g * (torch.log1p(-x) - x.log())

    def entropy(x, target):
        same(x, target)
        alike(x, target)
        bounded("x", x, 1e-3, 1 - 1e-3)
        bounded("target", target, -10, 10)
        return Entropy.apply(x, target)

    return entropy


add(
    "entropy_second",
    entropy_second,
    lambda: (
        torch.tensor([0.2, 0.7, 0.4]).double().requires_grad_(),
        torch.tensor([0.0, 1.0, 1.0]).double(),
    ),
    bug="the gradient's own gradient is that of the mean, where the sum was taken "
    "(pytorch/pytorch#59477)",
    trigger="a second derivative",
)


# The squared distance of means without its bias: samples (N, K), expected (K)
def moments_unbiased(wrong):
    class Distance(Function):
        @staticmethod
        def forward(ctx, x, expected):
            ctx.save_for_backward(x, expected)
            return ((x.mean(0) - expected).square() - x.var(0) / len(x)).mean()

        @staticmethod
        def backward(ctx, g):
            x, expected = ctx.saved_tensors
            n, k = x.shape
            error = 2 * (x.mean(0) - expected)
            spread = 2 * (x - x.mean(0)) / (n - 1)
            grad_x = (error / n).expand_as(x) if wrong else (error - spread) / n
            return g * grad_x / k, -g * error / k

    def distance(x, expected):
        sized("x", x, None, None)
        check(len(x) >= 2, "x: expected two samples or more")
        sized("expected", expected, x.shape[1])
        alike(x, expected)
        bounded("x", x, -1e3, 1e3)
        bounded("expected", expected, -1e3, 1e3)
        return Distance.apply(x, expected)

    return distance


add(
    "moments_unbiased",
    moments_unbiased,
    lambda: (real(4, 2), real(2, seed=1)),
    bug="the standard deviation in the correction of the bias is taken for a constant "
    "(PennyLaneAI/pennylane#10025)",
)


def logit_normal(wrong):
    class LogDensity(Function):
        @staticmethod
        def forward(ctx, x, mu, sigma):
            ctx.save_for_backward(x, mu, sigma)
            score = (torch.logit(x) - mu) / sigma
            rest = torch.log(x * (1 - x)) + sigma.log() + 0.5 * math.log(2 * math.pi)
            return -0.5 * score**2 - rest

        @staticmethod
        def backward(ctx, g):
            x, mu, sigma = ctx.saved_tensors
            score = (torch.logit(x) - mu) / sigma
            seen = (x.log() - mu) / sigma if wrong else score
            grad_x = (2 * x - 1 - seen / sigma) / (x * (1 - x))
            return g * grad_x, g * score / sigma, g * (score**2 - 1) / sigma

    def log_density(x, mu, sigma):
        same(x, mu, sigma)
        alike(x, mu, sigma)
        bounded("x", x, 1e-3, 1 - 1e-3)
        bounded("mu", mu, -100, 100)
        bounded("sigma", sigma, 1e-2, 100)
        return LogDensity.apply(x, mu, sigma)

    return log_density


add(
    "logit_normal",
    logit_normal,
    lambda: (
        torch.tensor([0.2, 0.5, 0.9]).double().requires_grad_(),
        real(3, seed=1),
        real(3, seed=2, positive=True),
    ),
    bug="the density's slope has log(x) where logit(x) belongs (JuliaStats/Distributions.jl#1221)",
)


# log density of z = x ** power, where log x is a standard normal
def power_cached(wrong):
    class LogDensity(Function):
        @staticmethod
        def forward(ctx, z, power):
            ctx.save_for_backward(z, power)
            log = z.log()
            return -0.5 * (log / power) ** 2 - 0.5 * math.log(2 * math.pi) - power.log() - log

        @staticmethod
        def backward(ctx, g):
            z, power = ctx.saved_tensors
            log = z.log()
            by_z = -(log / power**2 + 1) / z
            by_power = -log / power - 1 / power if wrong else log**2 / power**3 - 1 / power
            return g * by_z, (g * by_power).sum()

    def log_density(z, power):
        sized("z", z, None)
        sized("power", power)
        alike(z, power)
        positive("z", z)
        bounded("z", z, 1e-3, 1e3)
        bounded("power", power, 0.1, 100)
        return LogDensity.apply(z, power)

    return log_density


add(
    "power_cached",
    power_cached,
    lambda: (real(4, positive=True), torch.tensor(2.0).double().requires_grad_()),
    bug="the base variable comes from the transform's cache, where the power is a constant "
    "(pytorch/pytorch#59822)",
)


# The largest of each bag's rows, feature by feature: bags (B, L) of rows of a table (N, D)
def bag_largest(wrong):
    class Largest(Function):
        @staticmethod
        def forward(ctx, table, bags):
            ctx.save_for_backward(table, bags)
            return table[bags].max(1).values

        @staticmethod
        def backward(ctx, g):
            table, bags = ctx.saved_tensors
            rows = table[bags]
            if wrong:
                share = (g / bags.shape[1])[:, None].expand_as(rows)
            else:
                first = rows.max(1, keepdim=True).indices
                share = torch.zeros_like(rows).scatter(1, first, g[:, None])
            grad = torch.zeros_like(table)
            return grad.index_add(0, bags.flatten(), share.flatten(0, 1)), None

    def largest(table, bags):
        sized("table", table, None, None)
        sized("bags", bags, None, None)
        check(table.is_floating_point(), "table: expected floating point numbers")
        indices("bags", bags, len(table))
        bounded("table", table, -1e6, 1e6)
        return Largest.apply(table, bags)

    return largest


add(
    "bag_largest",
    bag_largest,
    lambda: (real(5, 3), whole(5, 2, 3, seed=1)),
    bug="a bag's maximum gets the gradient of its mean (flagos-ai/FlagGems#5220)",
)


# A weighted sum of each bag's rows, from which the padding's row is left out
def bag_weights(wrong):
    class Total(Function):
        @staticmethod
        def forward(ctx, table, bags, weights, padding):
            ctx.save_for_backward(table, bags, weights)
            ctx.padding = padding
            return (table[bags] * (weights * (bags != padding))[..., None]).sum(1)

        @staticmethod
        def backward(ctx, g):
            table, bags, weights = ctx.saved_tensors
            there = bags != ctx.padding
            share = g[:, None] * (weights * there)[..., None]
            grad = torch.zeros_like(table).index_add(0, bags.flatten(), share.flatten(0, 1))
            grad_weights = (g[:, None] * table[bags]).sum(-1)
            if not wrong:
                grad_weights = grad_weights * there
            return grad, None, grad_weights, None

    def total(table, bags, weights, padding=0):
        sized("table", table, None, None)
        sized("bags", bags, None, None)
        same(bags, weights)
        alike(table, weights)
        indices("bags", bags, len(table))
        check(isinstance(padding, int), "padding: expected an integer")
        bounded("table", table, -1e3, 1e3)
        bounded("weights", weights, -1e3, 1e3)
        return Total.apply(table, bags, weights, padding)

    return total


add(
    "bag_weights",
    bag_weights,
    lambda: (real(4, 2), torch.tensor([[1, 0, 3], [2, 1, 0]]), real(2, 3, seed=1)),
    bug="the weight of an index that is padding gets a gradient (flagos-ai/FlagGems#3683)",
)


def last_of_each(at):
    """Return True where no later place holds the same index."""
    return torch.triu(at[:, None] == at, 1).sum(1) == 0


# Rows of x are replaced by src's, a later one winning over an earlier one
def replaced_rows(wrong):
    class Replace(Function):
        @staticmethod
        def forward(ctx, x, at, src):
            ctx.save_for_backward(at)
            last = last_of_each(at)
            return x.index_copy(0, at[last], src[last])

        @staticmethod
        def backward(ctx, g):
            (at,) = ctx.saved_tensors
            grad_src = g[at] if wrong else g[at] * last_of_each(at)[:, None]
            return g.index_fill(0, at, 0), None, grad_src

    def replace(x, at, src):
        sized("x", x, None, None)
        sized("at", at, None)
        sized("src", src, len(at), x.shape[1])
        alike(x, src)
        indices("at", at, len(x))
        return Replace.apply(x, at, src)

    return replace


add(
    "replaced_rows",
    replaced_rows,
    lambda: (real(4, 2), torch.tensor([1, 3, 1]), real(3, 2, seed=1)),
    bug="rows that a later one has overwritten get its gradient too (tensorflow/tensorflow#56961)",
)


def gathered_half(wrong):
    class Gather(Function):
        @staticmethod
        def forward(ctx, x, at):
            ctx.save_for_backward(at)
            ctx.places = len(x)
            return x[at]

        @staticmethod
        def backward(ctx, g):
            (at,) = ctx.saved_tensors
            if wrong:
                grad = g.new_zeros(ctx.places)
                for i, value in zip(at.tolist(), g, strict=True):
                    grad[i] += value
                return grad, None
            exact = g if g.dtype == torch.float64 else g.float()
            return exact.new_zeros(ctx.places).index_add(0, at, exact).to(g.dtype), None

    def gather(x, at):
        sized("x", x, None)
        sized("at", at, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        indices("at", at, len(x))
        return Gather.apply(x, at)

    return gather


add(
    "gathered_half",
    gathered_half,
    lambda: (real(3), whole(3, 8, seed=1)),
    own=True,
    bug="gradients are added up in the half type in which they come (flagos-ai/FlagGems#4295)",
    trigger="a half type, and an index that occurs some hundred times",
    missed="a lookup's sum in a half type, as torch's own embedding has it",
)
