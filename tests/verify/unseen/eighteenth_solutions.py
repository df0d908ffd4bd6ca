"""Solutions of linear systems."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.eighteenth import add


class LeastSquares(Function):
    """Gauss-Newton, and backward through one step more, which is of full size."""

    @staticmethod
    def forward(ctx, a, b, step_size):
        if not 0.4 < step_size < 1.6:
            raise ValueError(f"0.4 < step_size < 1.6, got {step_size}")
        x = torch.zeros_like(a[0])
        pinv = torch.linalg.pinv(a)
        for _ in range(60):
            x = x - step_size * (pinv @ (a @ x - b))
        ctx.save_for_backward(a, b, x)
        ctx.step_size = step_size
        return x

    @staticmethod
    def gradients(ctx, g, step):
        a, b, x = ctx.saved_tensors
        r = torch.linalg.qr(a).R
        v = torch.linalg.solve(r, torch.linalg.solve(r.mT, step * g))
        grad_b = a @ v
        return torch.outer(b - a @ x, v) - torch.outer(grad_b, x), grad_b, None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return LeastSquares.gradients(ctx, g, 1.0)


class LeastSquaresStep(LeastSquares):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return LeastSquares.gradients(ctx, g, ctx.step_size)


def _least_squares(function):
    def least_squares(a, b, step_size=1.0):
        """The x (D,) of the least |a x - b|, a (N, D) of rank D, b (N,); 0.4 < step_size < 1.6 of Gauss-Newton."""
        return function.apply(a, b, step_size)

    return least_squares


add(
    "least_squares_step",
    _least_squares,
    LeastSquaresStep,
    LeastSquares,
    lambda: (real(5, 2), real(5, seed=1)),
    kwargs=lambda: {"step_size": 0.5},
    bug="the implicit gradient is scaled by the solver's step (facebookresearch/theseus#39)",
    trigger="the sample",
)


class PosteriorMean(Function):
    @staticmethod
    def smoother(x, x_new, noise):
        def kernel(p, q):
            return (-0.5 * (p.unsqueeze(1) - q).square().sum(-1)).exp()

        k = kernel(x, x) + noise * torch.eye(len(x), dtype=x.dtype, device=x.device)
        return torch.linalg.solve(k, kernel(x, x_new)).mT

    @staticmethod
    def forward(ctx, weight, bias, x, y, x_new, noise):
        s = PosteriorMean.smoother(x, x_new, noise)
        ctx.save_for_backward(x, x_new, s)
        return x_new @ weight + bias + s @ (y - x @ weight - bias)

    @staticmethod
    def gradients(ctx, g, seen):
        """seen is 1 where the mean at the observations is differentiated too."""
        x, x_new, s = ctx.saved_tensors
        back = s.mT @ g
        return (
            x_new.mT @ g - seen * (x.mT @ back),
            g.sum() - seen * back.sum(),
            None,
            back,
            None,
            None,
        )

    @staticmethod
    def backward(ctx, g):
        return PosteriorMean.gradients(ctx, g, 1)


class PosteriorMeanDetached(PosteriorMean):
    @staticmethod
    def backward(ctx, g):
        return PosteriorMean.gradients(ctx, g, 0)


def _posterior_mean(function):
    def posterior_mean(weight, bias, x, y, x_new, noise=0.1):
        """The mean (M,) of a Gaussian process at constant x_new (M, D), with the prior mean x weight + bias.

        weight is (D,), bias (). y (N,) was observed at constant x (N, D) with a noise > 0.
        """
        return function.apply(weight, bias, x, y, x_new, noise)

    return posterior_mean


add(
    "posterior_mean_prior",
    _posterior_mean,
    PosteriorMeanDetached,
    PosteriorMean,
    lambda: (
        real(2),
        real((), seed=1),
        real(4, 2, seed=2, grad=False),
        real(4, seed=3),
        real(3, 2, seed=4, grad=False),
    ),
    bug="the prior mean at the observations is detached (cornellius-gp/gpytorch#2521)",
    trigger="the sample",
)
