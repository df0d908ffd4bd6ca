"""Likelihoods and what they are made of."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.fourteenth import add, require


class Logistic(Function):
    @staticmethod
    def forward(ctx, y, mu, sigma):
        ctx.save_for_backward(y, mu, sigma)
        z = ((y - mu) / sigma).abs()
        return -z - 2 * (-z).exp().log1p() - sigma.log()

    @staticmethod
    def backward(ctx, g):
        y, mu, sigma = ctx.saved_tensors
        z = (y - mu) / sigma
        slope = g * (z / 2).tanh() / sigma
        return -slope, slope, slope * z - g / sigma


class LogisticExp(Logistic):
    @staticmethod
    def backward(ctx, g):
        y, mu, sigma = ctx.saved_tensors
        grad_y, _, grad_sigma = Logistic.backward(ctx, g)
        at_mu, at_y = (mu / sigma).exp(), (y / sigma).exp()
        return grad_y, g * (1 - 2 * at_mu / (at_mu + at_y)) / sigma, grad_sigma


def _logistic(function):
    def logistic(y, mu, sigma):
        """Log density of the logistic distribution at y, with location mu and scale sigma > 0, of one shape."""
        require(y.shape == mu.shape == sigma.shape, "y, mu and sigma must be of one shape")
        require(bool((sigma > 0).all()), "sigma must be positive")
        return function.apply(y, mu, sigma)

    return logistic


add(
    "logistic_location",
    _logistic,
    LogisticExp,
    Logistic,
    lambda: (real(4), real(4, seed=1), real(4, seed=2, positive=True)),
    bug="the location's derivative exponentiates mu / sigma and y / sigma apart (stan-dev/math#3398)",
    trigger="a location of more than 709 scales (88 in float32)",
)


class Evidence(Function):
    @staticmethod
    def forward(ctx, y, u, log_rho, log_sigma):
        ctx.save_for_backward(y, u, log_rho, log_sigma)
        z = (y - log_rho.exp() * u) / log_sigma.exp()
        return -z.square().sum() / 2 - y.numel() * (log_sigma + math.log(2 * math.pi) / 2)

    @staticmethod
    def gradients(ctx, g, factor):
        y, u, log_rho, log_sigma = ctx.saved_tensors
        rho, sigma = log_rho.exp(), log_sigma.exp()
        z = (y - rho * u) / sigma
        grad_y = -g * z / sigma
        return (
            grad_y,
            -rho * grad_y,
            -(grad_y * u).sum() * factor(rho),
            g * (z.square().sum() - y.numel()),
        )

    @staticmethod
    def backward(ctx, g):
        return Evidence.gradients(ctx, g, lambda rho: rho)


class EvidenceScale(Evidence):
    @staticmethod
    def backward(ctx, g):
        return Evidence.gradients(ctx, g, torch.ones_like)


def _evidence(function):
    def evidence(y, u, log_rho, log_sigma):
        """Log likelihood of the data y (N,) around ρ u, with noise σ.

        The logarithms of ρ and σ are scalars () in [-20, 20].
        """
        require(
            y.shape == u.shape and log_rho.dim() == log_sigma.dim() == 0,
            "y as u, log_rho and log_sigma scalars",
        )
        sizes = torch.stack((log_rho, log_sigma)).detach().abs()
        require(bool((sizes <= 20).all()), "log_rho and log_sigma must be in [-20, 20]")
        return function.apply(y, u, log_rho, log_sigma)

    return evidence


add(
    "evidence_log_scale",
    _evidence,
    EvidenceScale,
    Evidence,
    lambda: (real(5), real(5, seed=1), real((), seed=2), real((), seed=3)),
    bug="rho's gradient lacks the factor rho of its logarithm (alan-turing-institute/stat-fem#35)",
    trigger="the sample (any rho but 1)",
)


class Normal(Function):
    @staticmethod
    def forward(ctx, x, mean, cov):
        ctx.save_for_backward(x, mean, cov)
        d = x - mean
        value = d @ torch.linalg.solve(cov, d) + torch.linalg.slogdet(cov)[1]
        return -(value + d.numel() * math.log(2 * math.pi)) / 2

    @staticmethod
    def gradients(ctx, g):
        x, mean, cov = ctx.saved_tensors
        inverse = torch.linalg.inv(cov)
        d = x - mean
        grad_x = -g * (inverse + inverse.mT) @ d / 2
        outer = torch.outer(inverse.mT @ d, inverse @ d)
        return grad_x, -grad_x, g * (outer - inverse.mT) / 2

    @staticmethod
    def backward(ctx, g):
        return Normal.gradients(ctx, g)


class NormalSign(Normal):
    @staticmethod
    def backward(ctx, g):
        grad_x, grad_mean, grad_cov = Normal.gradients(ctx, g)
        return grad_x, grad_mean, -grad_cov


def _normal(function):
    def normal(x, mean, cov):
        """Log density at x (D,), D > 0, of the normal law of a mean (D,) and a covariance (D, D).

        The covariance's eigenvalues have positive real parts; every element of it has its own gradient.
        """
        require(
            x.dim() == 1 and x.numel() > 0 and x.shape == mean.shape,
            "x and mean must be vectors, not empty",
        )
        require(cov.shape == (x.numel(), x.numel()), "cov must be square, of x's length")
        require(
            bool((torch.linalg.eigvals(cov.detach()).real > 0).all()),
            "cov must be positive definite",
        )
        return function.apply(x, mean, cov)

    return normal


def covariance():
    a = real(3, 3, seed=2, grad=False)
    return (a @ a.mT + torch.eye(3, dtype=F64)).requires_grad_()


add(
    "normal_covariance",
    _normal,
    NormalSign,
    Normal,
    lambda: (real(3), real(3, seed=1), covariance()),
    bug="the sign of the covariance's gradient (HIPS/autograd#412)",
    trigger="the sample",
)
