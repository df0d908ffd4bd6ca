"""Convolutions and pooling."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.nineteenth import add, check, sized


class Image(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x.unfold(1, w.shape[0], 1).unfold(2, w.shape[1], 1) * w).sum((-2, -1))

    @staticmethod
    def gradients(ctx, g, turn):
        x, w = ctx.saved_tensors
        height, width = w.shape
        dx = sum(
            F.pad(g * w[a, b], (b, width - 1 - b, a, height - 1 - a))
            for a in range(height)
            for b in range(width)
        )
        windows = x.unfold(1, height, 1).unfold(2, width, 1)
        return dx, turn((g[..., None, None] * windows).sum((0, 1, 2)))

    @staticmethod
    def backward(ctx, g):
        return Image.gradients(ctx, g, lambda dw: dw)


class ImageReversed(Image):
    @staticmethod
    def backward(ctx, g):
        return Image.gradients(ctx, g, lambda dw: dw.flip(0, 1))


def _image(function):
    def convolve(x, w):
        """Cross-correlation of images x (N, H, W) with w (K, L), 0 < K <= H and 0 < L <= W."""
        sized("x", x, None, None, None)
        sized("w", w, None, None)
        fits = all(0 < k <= n for k, n in zip(w.shape, x.shape[1:], strict=True))
        check(fits, "w: expected a kernel that the images hold")
        return function.apply(x, w)

    return convolve


add(
    "convolve_order",
    _image,
    ImageReversed,
    Image,
    lambda: (real(2, 5, 5), real(3, 3, seed=1)),
    bug="the correlation's arguments are swapped, so the weight's gradient is reversed (end-to-end-machine-learning"
    ".teachable.com course 322, 2.5)",
)


class ConvLayer(Function):
    @staticmethod
    def places(padded, size, stride):
        rows, columns = (
            range(0, padded.shape[1] - size + 1, stride),
            range(0, padded.shape[2] - size + 1, stride),
        )
        return rows, columns

    @staticmethod
    def forward(ctx, a_prev, w, b, stride, pad):
        ctx.save_for_backward(a_prev, w, b)
        ctx.options = stride, pad
        padded, size = F.pad(a_prev, (0, 0, pad, pad, pad, pad)), w.shape[0]
        rows, columns = ConvLayer.places(padded, size, stride)
        out = [
            torch.stack(
                [
                    torch.einsum("nabc,abck->nk", padded[:, i : i + size, j : j + size], w)
                    for j in columns
                ],
                1,
            )
            for i in rows
        ]
        return torch.stack(out, 1) + b

    @staticmethod
    def gradients(ctx, dz, turn):
        a_prev, w, _ = ctx.saved_tensors
        stride, pad = ctx.options
        padded, size = F.pad(a_prev, (0, 0, pad, pad, pad, pad)), w.shape[0]
        rows, columns = ConvLayer.places(padded, size, stride)
        da, dw = torch.zeros_like(padded), torch.zeros_like(w)
        for h, i in enumerate(rows):
            for v, j in enumerate(columns):
                d = dz[:, h, v]
                part = torch.einsum("nk,abck->nabc", d, turn(w))
                right, below = padded.shape[2] - j - size, padded.shape[1] - i - size
                da = da + F.pad(part, (0, 0, j, right, i, below))
                window = padded[:, i : i + size, j : j + size]
                dw = dw + torch.einsum("nk,nabc->abck", d, window)
        da = da[:, pad : pad + a_prev.shape[1], pad : pad + a_prev.shape[2]]
        return da, dw, dz.sum((0, 1, 2), keepdim=True), None, None

    @staticmethod
    def backward(ctx, dz):
        return ConvLayer.gradients(ctx, dz, lambda w: w)


class ConvLayerTurned(ConvLayer):
    @staticmethod
    def backward(ctx, dz):
        return ConvLayer.gradients(ctx, dz, lambda w: w.flip(0, 1))


def _conv_layer(function):
    def conv_layer(a_prev, w, b, stride=1, pad=0):
        """Convolution layer of a_prev (N, H, W, C) with w (F, F, C, K), F > 0, and b (1, 1, 1, K).

        stride > 0, pad >= 0, and the padded images hold the filter.
        """
        sized("a_prev", a_prev, None, None, None, None)
        sized("w", w, None, None, a_prev.shape[3], None)
        sized("w", w, w.shape[0], w.shape[0], None, None)
        sized("b", b, 1, 1, 1, w.shape[3])
        check(stride > 0 and pad >= 0, "expected stride > 0 and pad >= 0")
        fits = 0 < w.shape[0] <= min(a_prev.shape[1:3]) + 2 * pad
        check(fits, "w: expected a filter that the padded images hold")
        return function.apply(a_prev, w, b, stride, pad)

    return conv_layer


add(
    "conv_layer_turned",
    _conv_layer,
    ConvLayerTurned,
    ConvLayer,
    lambda: (real(2, 4, 4, 2), real(2, 2, 2, 3, seed=1), real(1, 1, 1, 3, seed=2)),
    kwargs=lambda: {"stride": 2, "pad": 2},
    bug="the filter is turned by 180° where windows are added up (community.deeplearning.ai/t/121204)",
)


class Transposed(Function):
    @staticmethod
    def forward(ctx, x, k, stride, padding):
        ctx.save_for_backward(x, k)
        ctx.options = stride, padding
        y = F.conv_transpose2d(x.unsqueeze(1), k[None, None], stride=stride, padding=padding)
        return y.squeeze(1)

    @staticmethod
    def gradients(ctx, g):
        x, k = ctx.saved_tensors
        stride, padding = ctx.options
        dx = F.conv2d(g.unsqueeze(1), k[None, None], stride=stride, padding=padding).squeeze(1)
        wide = F.pad(g, (padding,) * 4)
        windows = wide.unfold(1, k.shape[0], stride).unfold(2, k.shape[1], stride)
        return dx, (x[..., None, None] * windows).sum((0, 1, 2)), None, None

    @staticmethod
    def backward(ctx, g):
        return Transposed.gradients(ctx, g)


class TransposedOutput(Transposed):
    @staticmethod
    def backward(ctx, g):
        x, k = ctx.saved_tensors
        stride, padding = ctx.options
        y = F.conv_transpose2d(x.unsqueeze(1), k[None, None], stride=stride, padding=padding)
        return Transposed.gradients(ctx, y.squeeze(1))


def _transposed(function):
    def transposed(x, k, stride=1, padding=0):
        """Transposed convolution of x (N, H, W), H, W > 0, with k (K, L).

        stride > 0, padding >= 0, and something is left of (H - 1) stride + K - 2 padding and of the width.
        """
        sized("x", x, None, None, None)
        sized("k", k, None, None)
        check(stride > 0 and padding >= 0, "expected stride > 0 and padding >= 0")
        check(min(*x.shape[1:], *k.shape) > 0, "expected images and a kernel that are not empty")
        left = (
            (n - 1) * stride + m - 2 * padding for n, m in zip(x.shape[1:], k.shape, strict=True)
        )
        check(min(left) > 0, "padding: expected less than the output")
        return function.apply(x, k, stride, padding)

    return transposed


add(
    "transposed_output",
    _transposed,
    TransposedOutput,
    Transposed,
    lambda: (real(2, 3, 3), real(3, 3, seed=1)),
    kwargs=lambda: {"stride": 2, "padding": 1},
    bug="the answer convolves with the output Y where its gradient belongs (stats.stackexchange.com/q/617755)",
)


class PoolReshape(Function):
    @staticmethod
    def cells(x, size):
        n, c, h, w = x.shape
        return x.reshape(n, c, h // size, size, w // size, size)

    @staticmethod
    def forward(ctx, x, size):
        ctx.save_for_backward(x)
        ctx.size = size
        return PoolReshape.cells(x, size).amax((3, 5))

    @staticmethod
    def gradients(ctx, dout, share):
        (x,) = ctx.saved_tensors
        cells = PoolReshape.cells(x, ctx.size)
        mask = (cells == cells.amax((3, 5), keepdim=True)).to(x.dtype)
        return (share(mask) * dout[:, :, :, None, :, None]).reshape(x.shape), None

    @staticmethod
    def backward(ctx, dout):
        return PoolReshape.gradients(ctx, dout, lambda m: m / m.sum((3, 5), keepdim=True))


class PoolReshapeAll(PoolReshape):
    @staticmethod
    def backward(ctx, dout):
        return PoolReshape.gradients(ctx, dout, lambda m: m)


def _pool(function):
    def max_pool(x, size=2):
        """Maxima of the size × size windows of x (N, C, H, W); size > 0 divides H and W.

        Where a window holds its maximum several times, these share the gradient equally.
        """
        sized("x", x, None, None, None, None)
        check(size > 0, "size: expected size > 0")
        check(
            x.shape[2] % size == 0 and x.shape[3] % size == 0, "size: expected a divisor of H and W"
        )
        return function.apply(x, size)

    return max_pool


add(
    "max_pool_ties",
    _pool,
    PoolReshapeAll,
    PoolReshape,
    lambda: (real(2, 3, 4, 4),),
    bug="every one of several equal maxima gets the whole gradient (CS231n fast_layers, max_pool_backward_reshape)",
    trigger="a window that holds its maximum twice",
)
