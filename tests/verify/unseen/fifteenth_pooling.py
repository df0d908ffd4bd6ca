"""Pooling and sampling."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.twelfth import wide


class MaxPool(Function):
    @staticmethod
    def forward(ctx, x, size):
        ctx.save_for_backward(x)
        ctx.size = size
        return x.unflatten(-1, (-1, size)).amax(-1)

    @staticmethod
    def spread(ctx, g, chosen):
        """Gives every window's gradient to what is chosen of it."""
        windows = ctx.saved_tensors[0].detach().unflatten(-1, (-1, ctx.size))
        return (g[..., None] * chosen(windows).to(g.dtype)).flatten(-2), None

    @staticmethod
    def backward(ctx, g):
        def first(windows):
            index = windows.argmax(-1, keepdim=True)
            return torch.zeros_like(windows).scatter(-1, index, 1)

        return MaxPool.spread(ctx, g, first)


class MaxPoolTies(MaxPool):
    @staticmethod
    def backward(ctx, g):
        return MaxPool.spread(ctx, g, lambda windows: windows == windows.amax(-1, keepdim=True))


def _max_pool(function):
    def max_pool(x, size=2):
        """The maxima (*, L / size) of x (*, L), L > 0, in windows of size > 0, which divides L.

        Of equal ones, one gets the gradient.
        """
        need(x.dim() > 0 and x.shape[-1] > 0, "expected x (*, L), L > 0")
        need(size > 0 and not x.shape[-1] % size, "expected size > 0 that divides L")
        return function.apply(x, size)

    return max_pool


add(
    "max_pool",
    _max_pool,
    MaxPoolTies,
    MaxPool,
    lambda: (real(2, 6),),
    bug="all of the equal maxima get the whole gradient",
    trigger="equal maxima in a window",
)


class AdaptiveAverage(Function):
    @staticmethod
    def matrix(x, size):
        """Row i averages from floor(i L / size) to ceil((i + 1) L / size)."""
        length = x.shape[-1]
        i = torch.arange(size, device=x.device)
        start, end = i * length // size, -(-(i + 1) * length // size)
        place = torch.arange(length, device=x.device)
        inside = (place >= start[:, None]) & (place < end[:, None])
        return inside.to(wide(x).dtype) / (end - start)[:, None]

    @staticmethod
    def forward(ctx, x, size):
        m = AdaptiveAverage.matrix(x, size)
        ctx.save_for_backward(m)
        return (wide(x) @ m.mT).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        (m,) = ctx.saved_tensors
        return (wide(g) @ m).to(g.dtype), None


class AdaptiveAverageReshaped(AdaptiveAverage):
    @staticmethod
    def backward(ctx, g):
        (m,) = ctx.saved_tensors
        rows = wide(g).reshape(g.shape[0] * g.shape[1], -1)
        return (rows @ m).view(*g.shape[:2], -1).to(g.dtype), None


def _adaptive_average(function):
    def adaptive_average(x, size=2):
        """torch's adaptive average pooling of x (N, C, L), L > 0, to (N, C, size), size > 0."""
        need(x.dim() == 3 and x.shape[2] > 0 and size > 0, "expected x (N, C, L), L > 0, size > 0")
        return function.apply(x, size)

    return adaptive_average


add(
    "adaptive_average",
    _adaptive_average,
    AdaptiveAverageReshaped,
    AdaptiveAverage,
    lambda: (real(2, 3, 5), 3),
    bug="backward leaves it to reshape to find a size, which fails for no elements",
    trigger="an empty batch",
)


class NearestUpsample(Function):
    @staticmethod
    def forward(ctx, x, size):
        ctx.length = x.shape[-1]
        i = torch.arange(size, device=x.device) * x.shape[-1] // size
        return x[..., i]

    @staticmethod
    def gradients(ctx, g, clamp):
        """Element j is read from ceil(j S / L) to ceil((j + 1) S / L), a difference of running sums."""
        size = g.shape[-1]
        j = torch.arange(ctx.length, device=g.device)
        start, end = (clamp(-(-k * size // ctx.length), size) for k in (j, j + 1))
        total = torch.nn.functional.pad(wide(g).cumsum(-1), (1, 0))
        return (total[..., end] - total[..., start]).to(g.dtype), None

    @staticmethod
    def backward(ctx, g):
        return NearestUpsample.gradients(ctx, g, lambda place, size: place.clamp(max=size))


class NearestUpsampleEdge(NearestUpsample):
    @staticmethod
    def backward(ctx, g):
        return NearestUpsample.gradients(ctx, g, lambda place, size: place.clamp(max=size - 1))


def _nearest_upsample(function):
    def nearest_upsample(x, size):
        """Element floor(i L / size) of x (*, L), L > 0, at i < size, with size >= L."""
        need(x.dim() > 0 and 0 < x.shape[-1] <= size, "expected x (*, L), L > 0, and size >= L")
        return function.apply(x, size)

    return nearest_upsample


add(
    "nearest_upsample",
    _nearest_upsample,
    NearestUpsampleEdge,
    NearestUpsample,
    lambda: (real(2, 3), 7),
    bug="the end of a range is clamped to the last index, not to the size",
    trigger="the sample",
)


class BilinearSample(Function):
    @staticmethod
    def corners(image, points):
        """Row, column, and both weights, of the four pixels round each point."""
        size = torch.tensor(image.shape[1:], device=points.device)
        low = torch.minimum(points.detach().floor().long().clamp(min=0), size - 2)
        part = wide(points) - low
        for i in (0, 1):
            for j in (0, 1):
                weights = (part[:, 0] if i else 1 - part[:, 0], part[:, 1] if j else 1 - part[:, 1])
                yield low[:, 0] + i, low[:, 1] + j, *weights, 2 * i - 1, 2 * j - 1

    @staticmethod
    def forward(ctx, image, points):
        ctx.save_for_backward(image, points)
        corners = BilinearSample.corners(image, points)
        return sum(wide(image)[:, y, x] * (a * b) for y, x, a, b, _, _ in corners).to(image.dtype)

    @staticmethod
    def gradients(ctx, g, accumulate):
        image, points = ctx.saved_tensors
        d, channels = wide(g), torch.arange(len(image), device=g.device)[:, None]
        to_image, to_y, to_x = torch.zeros_like(wide(image)), 0, 0
        for y, x, a, b, sign_y, sign_x in BilinearSample.corners(image, points):
            part = torch.zeros_like(to_image)
            to_image = to_image + part.index_put((channels, y, x), d * (a * b), accumulate)
            pixel = (d * wide(image)[:, y, x]).sum(0)
            to_y, to_x = to_y + sign_y * pixel * b, to_x + sign_x * pixel * a
        return to_image.to(g.dtype), torch.stack((to_y, to_x), -1).to(g.dtype)

    @staticmethod
    def backward(ctx, g):
        return BilinearSample.gradients(ctx, g, accumulate=True)


class BilinearSampleOnce(BilinearSample):
    @staticmethod
    def backward(ctx, g):
        return BilinearSample.gradients(ctx, g, accumulate=False)


def _bilinear_sample(function):
    def bilinear_sample(image, points):
        """Values (C, P) of image (C, H, W), H, W > 1, at points (P, 2), row and column, within it.

        At a whole coordinate a point's gradient is that of the cell after it, at the last of the one before.
        """
        need(image.dim() == 3 and min(image.shape[1:]) > 1, "expected image (C, H, W), H, W > 1")
        need(points.dim() == 2 and points.shape[1] == 2, "expected points (P, 2)")
        size = torch.tensor(image.shape[1:], device=points.device)
        need(bool(((points >= 0) & (points <= size - 1)).all()), "expected points within the image")
        return function.apply(image, points)

    return bilinear_sample


def points():
    share = torch.rand(5, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    return (share * torch.tensor([3, 4])).requires_grad_()


add(
    "bilinear_sample",
    _bilinear_sample,
    BilinearSampleOnce,
    BilinearSample,
    lambda: (real(2, 4, 5), points()),
    bug="of the points in one cell the last alone reaches the image",
    trigger="two points in one cell",
)
