"""Modules: parameters, buffers, training and evaluation."""

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.twentythird import add_bare, sized


def matrix(*shape, seed=5):
    return nn.Parameter(real(*shape, seed=seed).detach())


# Linear layer whose matrix is divided by its norm
def normed_linear(wrong):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = matrix(2, 4)

        def forward(self, x):
            sized("x", x, None, 4)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not wrong):
                norm = self.weight.square().sum().sqrt()
            return x @ (self.weight / norm).T

    return Linear()


add_bare(
    "normed_linear_norm",
    normed_linear,
    lambda: (real(3, 4),),
    bug="The weight's norm is computed under no_grad",
    trigger="the parameter's gradient",
)


# Batch normalisation with running statistics
def batch_norm(wrong):
    class Normalise(Function):
        @staticmethod
        def forward(ctx, x, w, mean, var, training):
            ctx.save_for_backward(x, w, mean, var)
            ctx.training = training
            return ((x - mean) * (var + 1e-5).rsqrt() * w).to(x.dtype)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, w, mean, var = ctx.saved_tensors
            r = (var + 1e-5).rsqrt()
            s = (x - mean) * r
            g = grad_y * w.to(mean.dtype)
            grad_x = g * r
            if ctx.training or wrong:
                grad_x = r * (g - g.mean(0) - s * (g * s).mean(0))
            return grad_x.to(x.dtype), (grad_y * s).sum(0).to(w.dtype), None, None, None

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = matrix(3)
            self.register_buffer("mean", torch.zeros(3, dtype=F64))
            self.register_buffer("var", torch.ones(3, dtype=F64))

        def forward(self, x):
            sized("x", x, None, 3)
            if x.dtype != self.weight.dtype:
                raise TypeError(f"x: expected {self.weight.dtype}, got {x.dtype}")
            wide = torch.promote_types(x.dtype, torch.float32)
            mean, var = self.mean.to(wide, copy=True), self.var.to(wide, copy=True)
            if self.training:
                var, mean = torch.var_mean(x.detach().to(wide), 0, correction=0)
                self.mean.copy_(0.9 * self.mean + 0.1 * mean)
                self.var.copy_(0.9 * self.var + 0.1 * var)
            return Normalise.apply(x, self.weight, mean, var, self.training)

    return Norm()


add_bare(
    "batch_norm_eval",
    batch_norm,
    lambda: (real(5, 3),),
    bug="Backward always goes through the batch's statistics",
    trigger="evaluation",
)
