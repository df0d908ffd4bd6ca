"""Pooling."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirteenth import add


class PatchPool(Function):
    """Max pooling with as long a stride as the kernel."""

    @staticmethod
    def patches(x, k):
        return x.unfold(1, k, k).unfold(2, k, k).flatten(-2)

    @staticmethod
    def forward(ctx, x, k):
        top, where = PatchPool.patches(x, k).max(-1)
        ctx.save_for_backward(where)
        ctx.k = k
        return top

    @staticmethod
    def gradient(where, g, k):
        c, h, w = where.shape
        patches = g.new_zeros(c, h, w, k * k).scatter(-1, where.unsqueeze(-1), g.unsqueeze(-1))
        return patches.view(c, h, w, k, k).transpose(2, 3).reshape(c, h * k, w * k), None

    @staticmethod
    def backward(ctx, g):
        return PatchPool.gradient(ctx.saved_tensors[0], g, ctx.k)


class PatchPoolReturn(PatchPool):
    """The return stands inside of the loop over patches."""

    @staticmethod
    def backward(ctx, g):
        first = torch.zeros_like(g)
        first[:, 0, 0] = g[:, 0, 0]
        return PatchPool.gradient(ctx.saved_tensors[0], first, ctx.k)


def _patch_pool(function):
    def patch_pool(x, kernel_size=2):
        """Largest element of each patch of x (C, H, W), whose height and width kernel_size divides."""
        if x.shape[1] % kernel_size or x.shape[2] % kernel_size:
            raise ValueError("kernel_size must divide height and width")
        return function.apply(x, kernel_size)

    return patch_pool


add(
    "patch_pool_return",
    _patch_pool,
    PatchPoolReturn,
    PatchPool,
    lambda: (real(2, 4, 4),),
    bug="the gradient of the first patch only (riccardoandreoni0/CNN-from-scratch#1)",
    trigger="the sample",
)


class WindowPool(Function):
    @staticmethod
    def forward(ctx, x, k, stride):
        top, where = x.unfold(-1, k, stride).max(-1)
        where = where + stride * torch.arange(where.shape[-1], device=x.device)
        ctx.save_for_backward(where)
        ctx.length = x.shape[-1]
        return top

    @staticmethod
    def backward(ctx, g):
        (where,) = ctx.saved_tensors
        return g.new_zeros(*g.shape[:-1], ctx.length).scatter_add(-1, where, g), None, None


class WindowPoolWritten(WindowPool):
    @staticmethod
    def backward(ctx, g):
        (where,) = ctx.saved_tensors
        return g.new_zeros(*g.shape[:-1], ctx.length).scatter(-1, where, g), None, None


def _window_pool(function):
    def window_pool(x, kernel_size=2, stride=2):
        """Largest element of each window of x (N, L), L >= kernel_size."""
        return function.apply(x, kernel_size, stride)

    return window_pool


add(
    "window_pool_stride",
    _window_pool,
    WindowPoolWritten,
    WindowPool,
    lambda: (real(2, 6),),
    bug="overlapping windows overwrite each other's gradient (devitocodes/joey#5)",
    trigger="stride=1",
)
