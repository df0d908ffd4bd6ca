"""A density and a random field."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.nineteenth import add, check, given, same, sized


class Normal(Function):
    @staticmethod
    def covariance(packed, n):
        rows, columns = torch.tril_indices(n, n, device=packed.device)
        lower = torch.zeros(n, n, dtype=packed.dtype, device=packed.device)
        lower = lower.index_put((rows, columns), packed)
        return lower + lower.tril(-1).mT

    @staticmethod
    def forward(ctx, x, mu, packed):
        ctx.save_for_backward(x, mu, packed)
        cov = Normal.covariance(packed, x.shape[0])
        d = x - mu
        square = d @ torch.linalg.solve(cov, d)
        return -0.5 * (square + torch.linalg.slogdet(cov)[1] + x.shape[0] * math.log(2 * math.pi))

    @staticmethod
    def gradients(ctx, g, symmetric):
        x, mu, packed = ctx.saved_tensors
        n = x.shape[0]
        inverse = torch.linalg.inv(Normal.covariance(packed, n))
        pull = inverse @ (x - mu)
        a = -0.5 * (inverse - torch.outer(pull, pull))
        rows, columns = torch.tril_indices(n, n, device=a.device)
        return -g * pull, g * pull, g * symmetric(a)[rows, columns]

    @staticmethod
    def backward(ctx, g):
        return Normal.gradients(ctx, g, lambda a: 2 * a - torch.diag(a.diagonal()))


class NormalOnce(Normal):
    @staticmethod
    def backward(ctx, g):
        return Normal.gradients(ctx, g, lambda a: a)


def _normal(function):
    def normal_log_prob(x, mu, packed):
        """log density at x of a normal distribution, of x and mu (N,).

        packed (N (N + 1) / 2,) holds the rows of the covariance's lower triangle; the covariance is positive definite.
        """
        sized("x", x, None)
        same(x, mu)
        n = x.shape[0]
        sized("packed", packed, n * (n + 1) // 2)
        definite = torch.linalg.cholesky_ex(Normal.covariance(packed.detach(), n))[1] == 0
        check(bool(definite), "packed: expected a positive definite covariance")
        return function.apply(x, mu, packed)

    return normal_log_prob


add(
    "normal_log_prob_packed",
    _normal,
    NormalOnce,
    Normal,
    lambda: (given([1.0, 2.0], grad=False), given([1.0, 1.0]), given([1.0, 0.5, 1.0])),
    bug="covariances that stand in two places count once (stats.stackexchange.com/q/252198)",
)


class Matern(Function):
    @staticmethod
    def laplacian(w):
        n = w.shape[0]
        eye = torch.eye(n, dtype=w.dtype, device=w.device)
        near = torch.ones(max(n - 1, 0), dtype=w.dtype, device=w.device)
        beside = torch.diag(near, 1) if n > 1 else torch.zeros_like(eye)
        return beside + beside.mT - 2 * eye, eye

    @staticmethod
    def forward(ctx, length, sigma, w):
        ctx.save_for_backward(length, sigma, w)
        d, eye = Matern.laplacian(w)
        return torch.linalg.solve(eye - length.square() * d, sigma * length.sqrt() * w)

    @staticmethod
    def backward(ctx, g):
        length, sigma, w = ctx.saved_tensors
        d, eye = Matern.laplacian(w)
        system = eye - length.square() * d
        u = torch.linalg.solve(system, length.sqrt() * w)
        back = torch.linalg.solve(system.mT, g)
        of_length = sigma * (back @ (2 * length * (d @ u) + w / (2 * length.sqrt())))
        return of_length, u @ g, sigma * length.sqrt() * back


class MaternInverted(Matern):
    @staticmethod
    def backward(ctx, g):
        length, _, w = ctx.saved_tensors
        d, eye = Matern.laplacian(w)
        system, s = eye - length.square() * d, length.sqrt()
        u = torch.linalg.solve(system, s * w)
        dudl = torch.linalg.solve(-2 * length * d, 0.5 * s * w / length)
        return dudl @ g, u @ g, torch.linalg.solve(system.mT, g) / s


def _matern(function):
    def matern_field(length, sigma, w):
        """(I - length² D)⁻¹ sigma √length w, of noise w (N,) and numbers length > 0 and sigma.

        D is the second difference with zeros at both ends.
        """
        sized("length", length)
        sized("sigma", sigma)
        sized("w", w, None)
        check(bool(length > 0), "length: expected length > 0")
        return function.apply(length, sigma, w)

    return matern_field


add(
    "matern_field_adjoint",
    _matern,
    MaternInverted,
    Matern,
    lambda: (given(1.0), given(1.0), real(5)),
    bug="the inverse's derivative is the inverse of a derivative, and σ is missing (Julia forum, BoundsError in Zygote "
    "custom adjoint)",
)
