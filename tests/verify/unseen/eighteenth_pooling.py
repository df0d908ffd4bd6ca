"""Pooling."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.eighteenth import add


class MaxPool3d(Function):
    @staticmethod
    def forward(ctx, x, kernel_size):
        ctx.save_for_backward(x)
        ctx.kernel_size = kernel_size
        return F.max_pool3d(x, kernel_size)

    @staticmethod
    def gradients(ctx, g):
        (x,) = ctx.saved_tensors
        index = F.max_pool3d(x, ctx.kernel_size, return_indices=True)[1]
        grad = torch.zeros_like(x).flatten(2).scatter_add(2, index.flatten(2), g.flatten(2))
        return grad.view_as(x), None

    @staticmethod
    def backward(ctx, g):
        return MaxPool3d.gradients(ctx, g)


class MaxPool3dGrid(MaxPool3d):
    """Blocks of 32 x 8 threads, as many as the swapped sizes need."""

    @staticmethod
    def backward(ctx, g):
        height, width = g.shape[-2:]
        rows, columns = -(-width // 8) * 8, -(-height // 32) * 32
        done = torch.zeros_like(g)
        done[..., :rows, :columns] = 1
        return MaxPool3d.gradients(ctx, g * done)


def _max_pool3d(function):
    def max_pool3d(x, kernel_size=2):
        """The maxima of cubes of x (N, C, T, H, W) that do not overlap; no size is below kernel_size."""
        return function.apply(x, kernel_size)

    return max_pool3d


add(
    "max_pool3d_grid",
    _max_pool3d,
    MaxPool3dGrid,
    MaxPool3d,
    lambda: (real(1, 2, 2, 4, 6),),
    bug="backward's grid takes height for width (pytorch/pytorch#36820)",
    trigger="more than 8 rows and no more than 8 columns of output",
)


class MaxPool2d(Function):
    @staticmethod
    def forward(ctx, x, kernel_size, stride):
        ctx.save_for_backward(x)
        ctx.args = kernel_size, stride
        return F.max_pool2d(x, *ctx.args)

    @staticmethod
    def gradients(ctx, g, into):
        (x,) = ctx.saved_tensors
        index = F.max_pool2d(x, *ctx.args, return_indices=True)[1].flatten(2)
        grad, g = torch.zeros_like(x).flatten(2), g.flatten(2)
        for window in range(g.shape[2]):
            grad = into(grad, 2, index[..., window : window + 1], g[..., window : window + 1])
        return grad.view_as(x), None, None

    @staticmethod
    def backward(ctx, g):
        return MaxPool2d.gradients(ctx, g, torch.scatter_add)


class MaxPool2dAssigned(MaxPool2d):
    @staticmethod
    def backward(ctx, g):
        return MaxPool2d.gradients(ctx, g, torch.scatter)


def _max_pool2d(function):
    def max_pool2d(x, kernel_size=2, stride=None):
        """The maxima in windows of x (N, C, H, W), a stride apart; no size is below kernel_size."""
        return function.apply(x, kernel_size, stride or kernel_size)

    return max_pool2d


add(
    "max_pool2d_overlap",
    _max_pool2d,
    MaxPool2dAssigned,
    MaxPool2d,
    lambda: (real(1, 2, 7, 7),),
    kwargs=lambda: {"kernel_size": 3, "stride": 2},
    bug="a maximum of two windows gets the gradient of one (FluxML/NNlib.jl#205)",
    trigger="the sample",
)


class AvgPool3d(Function):
    @staticmethod
    def forward(ctx, x, kernel_size):
        ctx.save_for_backward(x)
        ctx.kernel_size = kernel_size
        return F.avg_pool3d(x, kernel_size)

    @staticmethod
    def gradients(ctx, g):
        (x,), k = ctx.saved_tensors, ctx.kernel_size
        for dim in (2, 3, 4):
            g = g.repeat_interleave(k, dim)
        room = [x.shape[dim] - g.shape[dim] for dim in (4, 3, 2)]
        return F.pad(g / k**3, (0, room[0], 0, room[1], 0, room[2]))

    @staticmethod
    def backward(ctx, g):
        return AvgPool3d.gradients(ctx, g), None


class AvgPool3dBatch(AvgPool3d):
    """With the channels last, an image starts H W C elements after the one before it."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        grad = AvgPool3d.gradients(ctx, g)
        if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last_3d):
            return grad, None
        images = grad.permute(0, 2, 3, 4, 1).flatten(1)
        flat, stride = torch.zeros_like(images).flatten(), images.shape[1] // x.shape[2]
        for n, image in enumerate(images):
            flat[n * stride : n * stride + image.numel()] += image
        return flat.view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 4, 1, 2, 3), None


def _avg_pool3d(function):
    def avg_pool3d(x, kernel_size=2):
        """The means of cubes of x (N, C, D, H, W) that do not overlap; no size is below kernel_size."""
        return function.apply(x, kernel_size)

    return avg_pool3d


add(
    "avg_pool3d_channels_last",
    _avg_pool3d,
    AvgPool3dBatch,
    AvgPool3d,
    lambda: (real(2, 2, 4, 2, 2),),
    bug="the batch's stride is without the depth (pytorch/pytorch#171869)",
    trigger="a batch of two in channels_last_3d",
)


class AdaptiveAvgPool3d(Function):
    @staticmethod
    def means(size, out, like):
        """The matrix (out, size) of means: window o is from o size // out to its successor's ceiling."""
        o = torch.arange(out, device=like.device).unsqueeze(-1)
        i = torch.arange(size, device=like.device)
        inside = (i >= o * size // out) & (i < -(-(o + 1) * size // out))
        return inside.to(like.dtype) / inside.sum(-1, keepdim=True)

    @staticmethod
    def forward(ctx, x, output_size):
        ctx.shape, ctx.out = x.shape, output_size
        d, h, w = (AdaptiveAvgPool3d.means(size, output_size, x) for size in x.shape[2:])
        return torch.einsum("ncdhw,ad,bh,ew->ncabe", x, d, h, w)

    @staticmethod
    def gradients(ctx, g, select):
        d, h, w = (select(AdaptiveAvgPool3d.means(size, ctx.out, g)) for size in ctx.shape[2:])
        return torch.einsum("ncabe,ad,bh,ew->ncdhw", g, d, h, w), None

    @staticmethod
    def backward(ctx, g):
        return AdaptiveAvgPool3d.gradients(ctx, g, lambda means: means)


class AdaptiveAvgPool3dTwo(AdaptiveAvgPool3d):
    @staticmethod
    def backward(ctx, g):
        return AdaptiveAvgPool3d.gradients(
            ctx, g, lambda means: means * ((means > 0).cumsum(0) <= 2)
        )


def _adaptive_avg_pool3d(function):
    def adaptive_avg_pool3d(x, output_size):
        """The means of x (N, C, D, H, W) in output_size windows along each of the last three, none of them empty."""
        return function.apply(x, output_size)

    return adaptive_avg_pool3d


add(
    "adaptive_avg_pool3d_two",
    _adaptive_avg_pool3d,
    AdaptiveAvgPool3dTwo,
    AdaptiveAvgPool3d,
    lambda: (real(1, 2, 5, 4, 4), 3),
    bug="an input counts in no more than two windows (flagos-ai/FlagGems#3790)",
    trigger="output_size above twice a size",
)
