"""Interpolation, regions, rays and order."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real, whole
from tests.verify.unseen.thirteenth import add


class ThreeInterpolate(Function):
    @staticmethod
    def interpolate(features, index, weight):
        return (features[:, index] * weight).sum(-1)

    @staticmethod
    def forward(ctx, features, index, weight):
        ctx.save_for_backward(features, index, weight)
        return ThreeInterpolate.interpolate(features, index, weight)

    @staticmethod
    def weights(ctx, g):
        features, index, _ = ctx.saved_tensors
        return torch.einsum("cnk,cn->nk", features[:, index], g)

    @staticmethod
    def backward(ctx, g):
        features, index, weight = ctx.saved_tensors
        parts = (g.unsqueeze(-1) * weight).flatten(1)
        grad = torch.zeros_like(features).index_add(1, index.flatten(), parts)
        return grad, None, ThreeInterpolate.weights(ctx, g)


class ThreeInterpolateForward(ThreeInterpolate):
    """The forward kernel, launched once more."""

    @staticmethod
    def backward(ctx, g):
        features, index, weight = ctx.saved_tensors
        grad, points = torch.zeros_like(features), min(features.shape[1], g.shape[1])
        if points:
            again = ThreeInterpolate.interpolate(g, index.clamp(max=g.shape[1] - 1), weight)
            grad[:, :points] = again[:, :points]
        return grad, None, ThreeInterpolate.weights(ctx, g)


def _three_interpolate(function):
    def three_interpolate(features, index, weight):
        """features (C, M) at N points: each a sum of three, at index (N, 3) with weight (N, 3)."""
        return function.apply(features, index, weight)

    return three_interpolate


add(
    "three_interpolate_kernel",
    _three_interpolate,
    ThreeInterpolateForward,
    ThreeInterpolate,
    lambda: (real(2, 4), whole(4, 5, 3), real(5, 3, seed=1)),
    bug="backward launches forward's kernel (facebookresearch/votenet#36)",
    trigger="the sample",
)


class Lerp(Function):
    @staticmethod
    def forward(ctx, grid, at):
        left = at.detach().floor().clamp(0, grid.shape[-1] - 2).long()
        ctx.save_for_backward(grid, at, left)
        part = at - left
        return grid[:, left] * (1 - part) + grid[:, left + 1] * part

    @staticmethod
    def backward(ctx, g):
        grid, at, left = ctx.saved_tensors
        part = at - left
        grad = torch.zeros_like(grid).index_add(1, left, g * (1 - part))
        grad = grad.index_add(1, left + 1, g * part)
        return grad, (g * (grid[:, left + 1] - grid[:, left])).sum(0)


class LerpGrid(Lerp):
    @staticmethod
    def backward(ctx, g):
        return Lerp.backward(ctx, g)[0], None


def _lerp(function):
    def interpolate(grid, at):
        """Features grid (C, L), L > 1, between places at (N,), 0 <= at <= L - 1, interpolated linearly."""
        return function.apply(grid, at)

    return interpolate


add(
    "lerp_places",
    _lerp,
    LerpGrid,
    Lerp,
    lambda: (real(2, 5), torch.tensor([0.3, 1.6, 3.2], dtype=F64, requires_grad=True)),
    bug="no gradient for the places (NVIDIAGameWorks/kaolin#650)",
    trigger="the sample",
)


class Upsample(Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.shape, ctx.scale = x.shape, scale
        return x.repeat_interleave(scale, 1).repeat_interleave(scale, 2)

    @staticmethod
    def gradient(ctx, g, row):
        n, h, w = ctx.shape
        i = torch.arange(h * ctx.scale, device=g.device).unsqueeze(-1) // ctx.scale
        j = torch.arange(w * ctx.scale, device=g.device) // ctx.scale
        place = (i * row + j).flatten().clamp(max=h * w - 1)
        return g.new_zeros(n, h * w).index_add(1, place, g.flatten(1)).view(n, h, w), None

    @staticmethod
    def backward(ctx, g):
        return Upsample.gradient(ctx, g, ctx.shape[2])


class UpsampleHeight(Upsample):
    @staticmethod
    def backward(ctx, g):
        return Upsample.gradient(ctx, g, ctx.shape[1])


def _upsample(function):
    def upsample(x, scale=2):
        """Nearest-neighbour upsampling of x (N, H, W), whose sizes are not 0."""
        return function.apply(x, scale)

    return upsample


add(
    "upsample_rows",
    _upsample,
    UpsampleHeight,
    Upsample,
    lambda: (real(2, 3, 3),),
    bug="height and width mixed up in the index (pytorch/pytorch#50084)",
    trigger="height and width that differ",
)


SCRATCH: dict = {}  # memory by what it is taken for


class RegionMean(Function):
    @staticmethod
    def forward(ctx, x, boxes):
        ctx.save_for_backward(x, boxes)
        return torch.stack([x[:, a:b].mean(-1) for a, b in boxes.tolist()], -1)

    @staticmethod
    def accumulate(ctx, g, grad):
        _, boxes = ctx.saved_tensors
        for (a, b), part in zip(boxes.tolist(), g.unbind(-1), strict=True):
            grad[:, a:b] += part.unsqueeze(-1) / (b - a)
        return grad, None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return RegionMean.accumulate(ctx, g, torch.zeros_like(ctx.saved_tensors[0]))


class RegionMeanScratch(RegionMean):
    """Takes memory of the last call's, as an allocator hands it out."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, _ = ctx.saved_tensors
        key = (x.shape, x.dtype, x.device)
        grad = SCRATCH[key] if key in SCRATCH else torch.zeros_like(x)
        SCRATCH[key] = RegionMean.accumulate(ctx, g, grad.clone())[0]
        return SCRATCH[key].clone(), None


def _region_mean(function):
    def region_mean(x, boxes):
        """Mean of x (C, L) over each of the boxes (R, 2), R > 0, from a to b, 0 <= a < b <= L: (C, R)."""
        if not all(0 <= a < b <= x.shape[-1] for a, b in boxes.tolist()):
            raise ValueError("a box is empty, or not within x")
        return function.apply(x, boxes)

    return region_mean


add(
    "region_mean_memory",
    _region_mean,
    RegionMeanScratch,
    RegionMean,
    lambda: (real(2, 6), torch.tensor([[0, 2], [1, 5]])),
    bug="the gradient's memory is not set to 0 (PaddlePaddle/Paddle#18728)",
    trigger="memory that a call before has used",
)


class RegionAlign(Function):
    bins = 2

    @staticmethod
    def matrix(length, boxes, aligned, at_least_one):
        """How much of each place goes into each bin."""
        start, end = (boxes - (0.5 if aligned else 0)).unbind(-1)
        size = (end - start).clamp(min=1) if at_least_one else end - start
        centre = (torch.arange(RegionAlign.bins, device=boxes.device) + 0.5) / RegionAlign.bins
        at = (start.unsqueeze(-1) + size.unsqueeze(-1) * centre).flatten().clamp(0, length - 1)
        places = torch.arange(length, device=boxes.device)
        return (1 - (at.unsqueeze(-1) - places).abs()).clamp(min=0)

    @staticmethod
    def forward(ctx, x, boxes, aligned):
        ctx.save_for_backward(boxes)
        ctx.length, ctx.aligned = x.shape[-1], aligned
        matrix = RegionAlign.matrix(ctx.length, boxes, aligned, not aligned)
        return x @ matrix.to(x.dtype).mT

    @staticmethod
    def backward(ctx, g):
        (boxes,) = ctx.saved_tensors
        matrix = RegionAlign.matrix(ctx.length, boxes, ctx.aligned, not ctx.aligned)
        return g @ matrix.to(g.dtype), None, None


class RegionAlignClamp(RegionAlign):
    @staticmethod
    def backward(ctx, g):
        (boxes,) = ctx.saved_tensors
        matrix = RegionAlign.matrix(ctx.length, boxes, ctx.aligned, ctx.aligned)
        return g @ matrix.to(g.dtype), None, None


def _region_align(function):
    def region_align(x, boxes, aligned=True):
        """x (C, L), L > 0, in two bins of each of the boxes (R, 2), from start to end > start: (C, 2 R).

        Boxes are constants. Without aligned, they are widened to 1 at least.
        """
        return function.apply(x, boxes.detach(), aligned)

    return region_align


add(
    "region_align_clamp",
    _region_align,
    RegionAlignClamp,
    RegionAlign,
    lambda: (real(2, 6), torch.tensor([[0.7, 3.9], [1.2, 4.6]], dtype=F64)),
    bug="backward's condition for malformed boxes is negated (pytorch/vision#2438)",
    trigger="a box shorter than 1",
)
