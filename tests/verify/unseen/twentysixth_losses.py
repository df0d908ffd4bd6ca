"""Losses and densities."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real, whole
from tests.verify.unseen.twentysixth import add, check, finite, indices, positive, same, sized


# Energy distance of two samples: 2 E|x - y| - E|x - x'| - E|y - y'|
def energy_distance(wrong):
    def gaps(x, y):
        return x[:, None] - y

    class Distance(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            within = gaps(x, x).abs().mean() + gaps(y, y).abs().mean()
            return 2 * gaps(x, y).abs().mean() - within

        @staticmethod
        def backward(ctx, grad):
            x, y = ctx.saved_tensors
            n, m = len(x), len(y)
            between = gaps(x, y).sgn()
            grad_x = between.sum(1) / (n * n if wrong else n * m) - gaps(x, x).sgn().sum(1) / n**2
            grad_y = -between.sum(0) / (m * m if wrong else n * m) - gaps(y, y).sgn().sum(1) / m**2
            return 2 * grad * grad_x, 2 * grad * grad_y

    def distance(x, y):
        sized("x", x, None)
        sized("y", y, None)
        return Distance.apply(x, y)

    return distance


add(
    "energy_distance_sizes",
    energy_distance,
    lambda: (real(4), real(4, seed=1)),
    bug="The mean between the samples is differentiated as if both were of one size",
    trigger="samples of two sizes",
)


# KTO's loss of rewards, with the reference point 0.1: mean of 1 - sigmoid(±(r - 0.1))
def kto(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, reward, wanted):
            sign = torch.where(wanted, 1.0, -1.0).to(reward.dtype)
            margin = sign * (reward - 0.1)
            slope = torch.sigmoid(margin) * torch.sigmoid(-margin)
            ctx.save_for_backward(-sign * slope / len(reward))
            return torch.sigmoid(-margin).mean()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            (grad_reward,) = ctx.saved_tensors
            return (grad_reward.clone() if wrong else grad * grad_reward), None

    def loss(reward, wanted):
        sized("reward", reward, None)
        sized("wanted", wanted, len(reward))
        if wanted.dtype != torch.bool:
            raise TypeError(f"wanted: expected booleans, got {wanted.dtype}")
        return Loss.apply(reward, wanted)

    return loss


add(
    "kto_upstream",
    kto,
    lambda: (real(4), torch.tensor([True, False, True, False])),
    bug="The gradient that forward made is returned as it is, whatever grad_output",
    trigger="a grad_output other than 1, as a scaler gives",
)


# Mean squared logarithmic error, numbers below 0 taken for 0
def log_error(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, x, t):
            ctx.save_for_backward(x, t)
            return (x.clamp(min=0).log1p() - t.clamp(min=0).log1p()).square().mean()

        @staticmethod
        def backward(ctx, grad):
            x, t = ctx.saved_tensors
            error = x.clamp(min=0).log1p() - t.clamp(min=0).log1p()
            grad = grad * 2 * error / max(x.numel(), 1)
            grad_x, grad_t = grad / (1 + x.clamp(min=0)), -grad / (1 + t.clamp(min=0))
            return (grad_x, grad_t) if wrong else (grad_x * (x > 0), grad_t * (t > 0))

    def loss(x, t):
        same(x, t)
        return Loss.apply(x, t)

    return loss


add(
    "log_error_below",
    log_error,
    lambda: (real(3, 4, positive=True), real(3, 4, seed=1, positive=True)),
    bug="What forward clamps to 0 has a gradient in backward",
    trigger="numbers below 0",
)


# Mean of the squared hinge
def squared_hinge(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, f, y):
            ctx.save_for_backward(f, y)
            return (1 - y * f).clamp(min=0).square().mean()

        @staticmethod
        def backward(ctx, grad):
            f, y = ctx.saved_tensors
            count = max(len(f) if wrong else f.numel(), 1)
            common = grad * -2 * (1 - y * f).clamp(min=0) / count
            return common * y, common * f

    def loss(f, y):
        same(f, y)
        check(f.ndim >= 1, "f: expected one dimension or more")
        finite(f=f, y=y)
        return Loss.apply(f, y)

    return loss


add(
    "squared_hinge_rows",
    squared_hinge,
    lambda: (real(5), real(5, seed=1, grad=False).sign()),
    bug="Backward divides by the number of rows, forward by that of all elements",
    trigger="more than one score a row",
)


# Soft actor-critic's temperature: -mean(exp(a) (log p + 2))
def temperature_loss(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, a, logp):
            ctx.save_for_backward(a, logp)
            return -(a.exp() * (logp + 2)).mean()

        @staticmethod
        def backward(ctx, grad):
            a, logp = ctx.saved_tensors
            grad_a = -grad * (logp + 2).mean()
            if not wrong:
                grad_a = grad_a * a.exp()
            return grad_a, (-grad * a.exp() / len(logp)).expand_as(logp)

    def loss(a, logp):
        check(a.ndim == 0, "a: expected a scalar")
        sized("logp", logp, None)
        return Loss.apply(a, logp)

    return loss


add(
    "temperature_loss_start",
    temperature_loss,
    lambda: (torch.zeros((), dtype=F64, requires_grad=True), real(4)),
    bug="The log of the temperature gets the temperature's gradient",
    trigger="any log but 0, with which training starts",
)


# Negative log-likelihood of the zero-inflated negative binomial of shape 2
def zero_inflated(wrong):
    shape = 2.0

    class Loss(Function):
        @staticmethod
        def forward(ctx, logit, mean, count):
            ctx.save_for_backward(logit, mean, count)
            empty = -shape * (mean / shape).log1p()
            k = count.to(mean.dtype)
            log_count = (k + shape).lgamma() - (k + 1).lgamma() + empty
            log_count = log_count + k * (mean / (mean + shape)).log()
            either = torch.logaddexp(logit, empty)
            some = torch.logaddexp(logit, torch.zeros_like(logit))
            return some - torch.where(count == 0, either, log_count)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            logit, mean, count = ctx.saved_tensors
            empty = -shape * (mean / shape).log1p()
            inflated = torch.sigmoid(logit - empty)
            if wrong:
                inflated = logit.exp() / (logit.exp() + empty.exp())
            none = count == 0
            k = count.to(mean.dtype)
            grad_logit = torch.sigmoid(logit) - torch.where(none, inflated, 0)
            at_zero = (1 - inflated) * shape / (mean + shape)
            grad_mean = torch.where(none, at_zero, (k + shape) / (mean + shape) - k / mean)
            return grad * grad_logit, grad * grad_mean, None

    def loss(logit, mean, count):
        same(logit, mean, count)
        positive("mean", mean)
        finite(logit=logit)
        indices("count", count, 1000)
        return Loss.apply(logit, mean, count)

    return loss


add(
    "zero_inflated_overflow",
    zero_inflated,
    lambda: (real(6), real(6, seed=1, positive=True), whole(3, 6, seed=2)),
    bug="Backward's share of the extra zeros is a quotient of exponentials",
    trigger="a count of 0 with a large logit",
)


# log Gamma(x; a, b)
def gamma_density(wrong):
    class Density(Function):
        @staticmethod
        def forward(x, a, b):
            return a * b.log() + (a - 1) * x.log() - b * x - a.lgamma()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def slopes(x, a, b):
            return (a - 1) / x - b, b.log() + x.log() - a.digamma(), a / b - x

        @staticmethod
        def backward(ctx, grad_y):
            return tuple(grad_y * s for s in Density.slopes(*ctx.saved_tensors))

        @staticmethod
        def jvp(ctx, *tangents):
            slopes = Density.slopes(*ctx.saved_tensors)
            pairs = list(zip(tangents, slopes, strict=True))[: 2 if wrong else 3]
            zero = torch.zeros_like(slopes[0])
            return sum((t * s for t, s in pairs if t is not None), zero)

    def density(x, a, b):
        same(x, a, b)
        for name, t in (("x", x), ("a", a), ("b", b)):
            positive(name, t)
        return Density.apply(x, a, b)

    return density


add(
    "gamma_density_tangent",
    gamma_density,
    lambda: tuple(real(3, 4, seed=k, positive=True) for k in range(3)),
    bug="The tangent leaves out the rate",
    trigger="forward mode",
)


# Log-density of the binary concrete distribution, of logits y, at a temperature
def concrete(wrong):
    class Density(Function):
        @staticmethod
        def forward(ctx, y, location, temperature):
            if wrong:
                ctx.temperature = temperature
                ctx.save_for_backward(y, location)
            else:
                ctx.save_for_backward(y, location, temperature)
            s = location - temperature * y
            return temperature.log() + s - 2 * torch.logaddexp(s, torch.zeros_like(s))

        @staticmethod
        def backward(ctx, grad):
            if wrong:
                (y, location), temperature = ctx.saved_tensors, ctx.temperature
            else:
                y, location, temperature = ctx.saved_tensors
            grad_s = grad * -torch.tanh((location - temperature * y) / 2)
            return -temperature * grad_s, grad_s, (grad / temperature - grad_s * y).sum()

    def density(y, location, temperature):
        same(y, location)
        check(temperature.ndim == 0, "temperature: expected a scalar")
        positive("temperature", temperature)
        return Density.apply(y, location, temperature)

    return density


add(
    "concrete_annealed",
    concrete,
    lambda: (real(3, 4), real(3, 4, seed=1), torch.tensor(0.7, dtype=F64, requires_grad=True)),
    bug="The temperature is an attribute of ctx, which no version check watches",
    trigger="a temperature annealed in place between forward and backward",
)
