"""Norms of groups and of batches."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.fifteenth_norms import standard, standard_backward
from tests.verify.unseen.twelfth import wide


class GroupRms(Function):
    @staticmethod
    def normal(x, groups):
        x = wide(x).unflatten(-1, (groups, -1))
        rstd = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return x * rstd, rstd

    @staticmethod
    def forward(ctx, x, w, groups):
        ctx.groups = groups
        y, rstd = GroupRms.normal(x, groups)
        out = y.flatten(-2) * wide(w)
        ctx.save_for_backward(y, rstd, w)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, rstd, w = ctx.saved_tensors
        d = (wide(g) * wide(w)).view(y.shape)
        grad_x = rstd * (d - y * (d * y).mean(-1, keepdim=True))
        grad_w = (wide(g) * y.flatten(-2)).flatten(0, -2).sum(0)
        return grad_x.flatten(-2).to(g.dtype), grad_w.to(g.dtype), None


class GroupRmsOutput(GroupRms):
    """Saves what it returns, gains and all."""

    @staticmethod
    def forward(ctx, x, w, groups):
        ctx.groups = groups
        y, rstd = GroupRms.normal(x, groups)
        out = y.flatten(-2) * wide(w)
        ctx.save_for_backward(out.view(y.shape), rstd, w)
        return out.to(x.dtype, copy=True)


def _group_rms(function):
    def group_rms_norm(x, w, groups=2):
        """RMS norm of x (*, D) in groups of D / groups neighbours, eps 1e-6, with the gains w (D,), D > 0."""
        need(x.dim() > 1 and x.shape[-1:] == w.shape, "expected x (*, D) and w (D,)")
        need(len(w) > 0 and groups > 0 and not len(w) % groups, "expected groups that divide D > 0")
        return function.apply(x, w, groups)

    return group_rms_norm


add(
    "group_rms_norm",
    _group_rms,
    GroupRmsOutput,
    GroupRms,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="the output is saved, and used as if it had no gains",
    trigger="the sample: gains other than one",
)


class BatchNorm(Function):
    """Returns what the running statistics need; materializes no zeros for an output that is not used."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        y, _ = standard(wide(x), 0)
        mean = wide(x).mean(0)
        var = (wide(x) - mean).square().mean(0)
        return (y * wide(w) + wide(b)).to(x.dtype), mean.to(x.dtype), var.to(x.dtype)

    @staticmethod
    def backward(ctx, g, g_mean, g_var):
        x, w = ctx.saved_tensors
        y, rstd = standard(wide(x), 0)
        grad_x, grad_w, grad_b = torch.zeros_like(y), None, None
        if g is not None:
            grad_x = standard_backward(wide(g) * wide(w), y, rstd, 0)
            grad_w, grad_b = (wide(g) * y).sum(0).to(w.dtype), wide(g).sum(0).to(w.dtype)
        if g_mean is not None:
            grad_x = grad_x + wide(g_mean) / len(x)
        if g_var is not None:
            grad_x = grad_x + wide(g_var) * 2 * (wide(x) - wide(x).mean(0)) / len(x)
        return grad_x.to(x.dtype), grad_w, grad_b


class BatchNormTogether(BatchNorm):
    """The statistics' gradients only if both are there."""

    @staticmethod
    def backward(ctx, g, g_mean, g_var):
        if g_mean is None or g_var is None:
            g_mean = g_var = None
        return BatchNorm.backward(ctx, g, g_mean, g_var)


def _batch_norm(function):
    def batch_norm(x, w, b):
        """Batch norm of x (N, C), eps 1e-5, with w and b (C,); its mean and biased variance (C,); N > 0."""
        need(x.dim() == 2 and len(x) > 0, "expected x (N, C), N > 0")
        need(x.shape[1:] == w.shape == b.shape, "expected w and b (C,)")
        return function.apply(x, w, b)

    return batch_norm


add(
    "batch_norm",
    _batch_norm,
    BatchNormTogether,
    BatchNorm,
    lambda: (real(4, 3), real(3, seed=1), real(3, seed=2)),
    bug="the mean's gradient is left out where the variance's is None, and the other way round",
    trigger="a loss of the mean without the variance",
)
