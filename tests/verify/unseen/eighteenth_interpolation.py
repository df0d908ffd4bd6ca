"""Interpolation."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.eighteenth import add, memory, sampling


class Upsample(Function):
    @staticmethod
    def half_pixel(size, scale, like):
        place = (
            torch.arange(size * scale, device=like.device, dtype=like.dtype) + 0.5
        ) / scale - 0.5
        return sampling(place.clamp(0, size - 1), size)

    @staticmethod
    def corners(size, scale, like):
        place = torch.arange(size * scale, device=like.device, dtype=like.dtype)
        return sampling(place * ((size - 1) / max(size * scale - 1, 1)), size)

    @staticmethod
    def forward(ctx, x, scale):
        ctx.shape, ctx.scale = x.shape, scale
        rows, columns = (Upsample.half_pixel(size, scale, x) for size in x.shape[-2:])
        return rows @ x @ columns.mT

    @staticmethod
    def gradients(ctx, g, places):
        rows, columns = (places(size, ctx.scale, g) for size in ctx.shape[-2:])
        return rows.mT @ g @ columns, None

    @staticmethod
    def backward(ctx, g):
        return Upsample.gradients(ctx, g, Upsample.half_pixel)


class UpsampleCorners(Upsample):
    @staticmethod
    def backward(ctx, g):
        return Upsample.gradients(ctx, g, Upsample.corners)


def _upsample(function):
    def upsample_bilinear(x, scale=2):
        """x (N, C, H, W), scale times as large, interpolated between the centres of pixels; H, W > 0."""
        return function.apply(x, scale)

    return upsample_bilinear


add(
    "upsample_corners",
    _upsample,
    UpsampleCorners,
    Upsample,
    lambda: (real(1, 2, 3, 4),),
    bug="backward aligns the corners, forward the pixels' centres (ooples/AiDotNet.Tensors#80)",
    trigger="the sample",
)


class RoIAlign(Function):
    @staticmethod
    def matrices(start, end, out, size, like):
        """Each bin is the mean of two places."""
        step = (end - start) / (2 * out)
        place = start + (torch.arange(2 * out, device=like.device, dtype=like.dtype) + 0.5) * step
        return sampling(place.clamp(0, size - 1), size).unflatten(0, (out, 2)).mean(1)

    @staticmethod
    def bins(x, rois, out):
        for roi in rois:
            n, x1, y1, x2, y2 = roi.unbind()
            rows = RoIAlign.matrices(y1, y2, out, x.shape[-2], x)
            yield int(n), rows, RoIAlign.matrices(x1, x2, out, x.shape[-1], x)

    @staticmethod
    def forward(ctx, x, rois, output_size):
        ctx.save_for_backward(x, rois)
        ctx.output_size = output_size
        return torch.stack(
            [rows @ x[n] @ columns.mT for n, rows, columns in RoIAlign.bins(x, rois, output_size)]
        )

    @staticmethod
    def gradients(ctx, g):
        x, rois = ctx.saved_tensors
        grad = torch.zeros_like(x)
        for d, (n, rows, columns) in zip(g, RoIAlign.bins(x, rois, ctx.output_size), strict=True):
            grad[n] += rows.mT @ d @ columns
        return grad, None, None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return RoIAlign.gradients(ctx, g)


class RoIAlignMemory(RoIAlign):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return RoIAlign.gradients(ctx, memory(g))


def _roi_align(function):
    def roi_align(x, rois, output_size=2):
        """Means (K, C, output_size, output_size) in the bins of constant boxes of x (N, C, H, W), H, W > 0.

        rois (K, 5), K > 0: the image's number, x1, y1, x2, y2.
        """
        return function.apply(x, rois, output_size)

    return roi_align


add(
    "roi_align_contiguous",
    _roi_align,
    RoIAlignMemory,
    RoIAlign,
    lambda: (
        real(2, 2, 4, 4),
        torch.tensor([[0, 0.3, 0.2, 2.9, 3.1], [1, 0.5, 1.1, 3.2, 2.4]], dtype=torch.float64),
    ),
    bug="backward takes the cotangent to be contiguous (open-mmlab/mmcv#737)",
    trigger="a cotangent that is transposed or expanded",
)
