"""Likelihoods, densities, decisions, similarities."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentyeighth import (
    add,
    check,
    finite,
    indices,
    logarithm_ratio,
    one_dtype,
    positive,
    same,
    sized,
)


# The generalised Pareto distribution's negative log-likelihood; its shape 0 is the exponential
def pareto(wrong):
    class Pareto(Function):
        @staticmethod
        def forward(ctx, x, shape, log_scale):
            ctx.save_for_backward(x, shape, log_scale)
            return likelihood(x, shape, log_scale)

        @staticmethod
        def backward(ctx, grad_l):
            x, shape, log_scale = ctx.saved_tensors
            z = x * torch.exp(-log_scale)
            inner = 1 + shape * z
            by_z = (1 + shape) / inner
            by_shape = (1 + 1 / shape) * z / inner - torch.log1p(shape * z) / shape**2
            return (
                grad_l * by_z * torch.exp(-log_scale),
                grad_l * by_shape.sum(),
                grad_l * (1 - z * by_z).sum(),
            )

    def likelihood(x, shape, log_scale):
        z = x * torch.exp(-log_scale)
        return (log_scale + torch.log1p(shape * z) + z * logarithm_ratio(shape * z)).sum()

    def loss(x, shape, log_scale):
        sized("x", x, None)
        sized("shape", shape)
        sized("log_scale", log_scale)
        one_dtype(x, shape, log_scale)
        finite(x=x)
        finite(shape=shape)
        finite(log_scale=log_scale)
        check(bool((x >= 0).all()), "expected excesses >= 0")
        check(bool((1 + shape * x * torch.exp(-log_scale) > 0).all()), "expected x in the support")
        return (Pareto.apply if wrong else likelihood)(x, shape, log_scale)

    return loss


add(
    "pareto_exponential",
    pareto,
    lambda: (
        real(5, positive=True),
        torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
        real((), seed=2),
    ),
    bug="Forward has the exponential as the limit, backward divides by the shape",
    trigger="a shape of 0",
)


# The multivariate gamma function's logarithm, in p dimensions
def multivariate_gamma(wrong):
    class MultivariateGamma(Function):
        @staticmethod
        def forward(ctx, a, p):
            ctx.save_for_backward(a)
            ctx.p = p
            steps = torch.arange(p, dtype=a.dtype, device=a.device) / 2
            constant = p * (p - 1) / 4 * math.log(math.pi)
            return torch.lgamma(a[..., None] - steps).sum(-1) + constant

        @staticmethod
        def backward(ctx, grad_y):
            (a,) = ctx.saved_tensors
            steps = torch.arange(ctx.p, dtype=a.dtype, device=a.device) / 2
            if wrong:
                steps = steps - 0.5
            return grad_y * torch.digamma(a[..., None] - steps).sum(-1), None

    def log_gamma(a, p=3):
        check(p >= 1, "expected p >= 1")
        finite(a=a)
        check(bool((a > (p - 1) / 2).all()), "expected a > (p - 1) / 2")
        return MultivariateGamma.apply(a, p)

    return log_gamma


add(
    "multivariate_gamma_steps",
    multivariate_gamma,
    lambda: ((real(4, grad=False).abs() + 1.5).requires_grad_(),),
    bug="Backward counts from 0 in the sum over (1 - j) / 2, which is written for j from 1",
)


# Poisson's deviance, 2 (y log(y / m) - y + m)
def poisson_deviance(wrong):
    class Deviance(Function):
        @staticmethod
        def forward(ctx, m, y):
            ctx.save_for_backward(m, y)
            return 2 * (torch.xlogy(y, y) - torch.xlogy(y, m) - y + m)

        @staticmethod
        def backward(ctx, grad_d):
            m, y = ctx.saved_tensors
            by_m = 1 - y / (y / m) * (y / m**2) if wrong else 1 - y / m
            return 2 * grad_d * by_m, None

    def deviance(m, y):
        same(m, y)
        indices("y", y, 2**31)
        positive("m", m)
        return Deviance.apply(m, y.to(m.dtype))

    return deviance


add(
    "poisson_deviance_zero",
    poisson_deviance,
    lambda: (real(5, positive=True), whole(5, 5, seed=1) + 1),
    bug="Backward goes through the ratio under the logarithm, dividing by it",
    trigger="a count of 0",
)


# The log-likelihood of points under the kernel density of the others, by the bandwidth h
def kernel_density(wrong):
    def shares(x, h):
        squares = (x[:, None] - x).square().sum(-1)
        own = torch.eye(len(x), dtype=torch.bool, device=x.device)
        return squares, (-squares / (2 * h * h)).masked_fill(own, -math.inf)

    class Density(Function):
        @staticmethod
        def forward(ctx, x, h):
            ctx.save_for_backward(x, h)
            n, d = x.shape
            constant = math.log(n - 1) + d / 2 * math.log(2 * math.pi) + d * h.log()
            return torch.logsumexp(shares(x, h)[1], 1).sum() - n * constant

        @staticmethod
        def backward(ctx, grad_l):
            x, h = ctx.saved_tensors
            n, d = x.shape
            squares, scores = shares(x, h)
            p = torch.softmax(scores, 1)
            both = (p + p.mT) / (h * h)
            grad_x = (both[..., None] * (x - x[:, None])).sum(1)
            grad_h = (p * squares).sum() / h**3 - n * (1 if wrong else d) / h
            return grad_l * grad_x, grad_l * grad_h

    def likelihood(x, h):
        sized("x", x, None, None)
        sized("h", h)
        one_dtype(x, h)
        check(len(x) >= 2, "expected two points or more")
        positive("h", h)
        return Density.apply(x, h)

    return likelihood


add(
    "kernel_density_bandwidth",
    kernel_density,
    lambda: (real(6, 1), real((), positive=True, seed=1)),
    bug="Backward normalises the kernel by h, not by its power",
    trigger="points of two coordinates or more",
)


# The unbiased variance under reliability weights
def weighted_variance(wrong):
    class Variance(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            total = w.sum()
            squares = (w * (x - (w * x).sum() / total).square()).sum()
            return squares / (total - (w * w).sum() / total)

        @staticmethod
        def backward(ctx, grad_v):
            x, w = ctx.saved_tensors
            total, second = w.sum(), (w * w).sum()
            way = x - (w * x).sum() / total
            size = total - second / total
            slope = 1 if wrong else 1 - 2 * w / total + second / total**2
            variance = (w * way * way).sum() / size
            return grad_v * 2 * w * way / size, grad_v * (way * way - variance * slope) / size

    def variance(x, w):
        sized("x", x, None)
        same(x, w)
        one_dtype(x, w)
        check(len(x) >= 2, "expected two numbers or more")
        positive("w", w)
        return Variance.apply(x, w)

    return variance


add(
    "weighted_variance_correction",
    weighted_variance,
    lambda: (real(5), real(5, positive=True, seed=1)),
    bug="The correction by the squared weights is taken for constant",
)


# Proxy anchors: a loss of the cosines between N samples and C classes' proxies
def proxy_anchor(wrong):
    def exponents(s, label, alpha, delta):
        own = torch.nn.functional.one_hot(label, s.shape[1]).bool()
        near = (-alpha * (s - delta)).masked_fill(~own, -math.inf)
        far = (alpha * (s + delta)).masked_fill(own, -math.inf)
        one = s.new_zeros(1, s.shape[1])
        return own, torch.cat([one, near]), torch.cat([one, far])

    class ProxyAnchor(Function):
        @staticmethod
        def forward(ctx, s, label, alpha, delta):
            ctx.save_for_backward(s, label)
            ctx.alpha, ctx.delta = alpha, delta
            own, near, far = exponents(s, label, alpha, delta)
            pull = near.logsumexp(0).sum() / own.any(0).sum()
            return pull + far.logsumexp(0).mean()

        @staticmethod
        def backward(ctx, grad_l):
            s, label = ctx.saved_tensors
            own, near, far = exponents(s, label, ctx.alpha, ctx.delta)
            seen = s.shape[1] if wrong else own.any(0).sum()
            pull = near.softmax(0)[1:] / seen
            push = far.softmax(0)[1:] / s.shape[1]
            return grad_l * ctx.alpha * (push - pull), None, None, None

    def loss(s, label, alpha=8.0, delta=0.1):
        sized("s", s, None, None)
        sized("label", label, len(s))
        indices("label", label, s.shape[1])
        finite(s=s)
        return ProxyAnchor.apply(s, label.long(), alpha, delta)

    return loss


add(
    "proxy_anchor_absent",
    proxy_anchor,
    lambda: (torch.tanh(real(6, 3, grad=False)).requires_grad_(), torch.tensor([0, 1, 2, 0, 2, 1])),
    bug="Backward divides by all classes, forward by those in the batch",
    trigger="a class without a sample",
)


# A policy's entropy over the actions that are legal
def policy_entropy(wrong):
    class Entropy(Function):
        @staticmethod
        def forward(ctx, z, legal):
            ctx.save_for_backward(z, legal)
            logs = z.masked_fill(~legal, -math.inf).log_softmax(-1)
            p = logs.exp()
            return -(p * torch.where(p > 0, logs, 0)).sum(-1)

        @staticmethod
        def backward(ctx, grad_h):
            z, legal = ctx.saved_tensors
            logs = z.masked_fill(~legal, -math.inf).log_softmax(-1)
            p = logs.exp()
            kept = torch.where(p > 0, logs, 0)
            if not wrong:
                logs = kept
            entropy = -(p * kept).sum(-1, keepdim=True)
            return -grad_h[..., None] * p * (logs + entropy), None

    def measure(z, legal):
        sized("z", z, None, None)
        same(z, legal)
        if legal.dtype != torch.bool:
            raise TypeError(f"legal: expected bool, got {legal.dtype}")
        finite(z=z)
        check(bool(legal.any(-1).all()), "expected a legal action in each row")
        return Entropy.apply(z, legal)

    return measure


add(
    "policy_entropy_illegal",
    policy_entropy,
    lambda: (real(3, 4), torch.ones(3, 4, dtype=torch.bool)),
    bug="Backward multiplies the probability 0 by its logarithm",
    trigger="an action that is not legal",
)
