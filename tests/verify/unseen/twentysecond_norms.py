"""Normalisation, and what stands beside it: statistics of rows, scales of channels."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentysecond import add, check, read, sized


def rows(x):
    check(x.ndim >= 1 and x.shape[-1] >= 1, "expected one feature at least")


# Layer normalisation without weights
def layer_norm(wrong):
    class Norm(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            d = x - x.mean(-1, keepdim=True)
            return d * (d.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            d = x - x.mean(-1, keepdim=True)
            r = (d.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
            g = grad_y if wrong else grad_y - grad_y.mean(-1, keepdim=True)
            return r * (g - d * r * r * (d * grad_y).mean(-1, keepdim=True))

    def norm(x):
        rows(x)
        return Norm.apply(x)

    return norm


add(
    "layer_norm_mean",
    layer_norm,
    lambda: (real(3, 4),),
    bug="Backward goes through the variance but not through the mean",
)


# Each row over the root of its mean square
def rms_norm(wrong):
    class Norm(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            r = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            inner = (grad_y * x).sum(-1, keepdim=True)
            if not wrong:
                inner = inner / x.shape[-1]
            return r * (grad_y - x * r * r * inner)

    def norm(x):
        rows(x)
        return Norm.apply(x)

    return norm


add(
    "rms_norm_sum",
    rms_norm,
    lambda: (real(3, 4),),
    bug="The product of grad_output and x is summed where forward takes the mean",
)


# (x - mean) / sqrt(var + eps) along the first dimension, as over a batch
def standardise(wrong):
    def moments(x):
        m = x.mean(0)
        return m, ((x - m).square().mean(0) + 1e-5).rsqrt()

    class Standardise(Function):
        @staticmethod
        def forward(ctx, x):
            m, r = moments(x)
            ctx.save_for_backward(*((x, m, r) if wrong else (x,)))
            return (x - m) * r

        @staticmethod
        def backward(ctx, grad_y):
            x, *kept = ctx.saved_tensors
            m, r = kept or moments(x)
            h = (x - m) * r
            return r * (grad_y - grad_y.mean(0) - h * (h * grad_y).mean(0))

    def norm(x):
        check(x.ndim >= 1 and len(x) >= 1, "expected one row at least")
        return Standardise.apply(x)

    return norm


add(
    "standardise_saved",
    standardise,
    lambda: (real(4, 3),),
    bug="Backward takes mean and deviation from forward, which to autograd are constants",
    trigger="double backward",
)


# The standard deviation of rows, which are centred twice because the mean itself is rounded
def deviation(wrong):
    def centred(x):
        d = x - x.mean(-1, keepdim=True)
        return d - d.mean(-1, keepdim=True)

    class Deviation(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return centred(x).square().mean(-1).sqrt()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            d = centred(x)
            if wrong:
                m = x.mean(-1, keepdim=True)
                variance = (x.square().mean(-1, keepdim=True) - m * m).clamp(min=0)
            else:
                variance = d.square().mean(-1, keepdim=True)
            still = variance == 0
            y = torch.where(still, 1, variance).sqrt()
            grad_x = grad_y[..., None] * d / (y * x.shape[-1])
            return torch.where(still, 0, grad_x)

    def deviate(x):
        rows(x)
        return Deviation.apply(x)

    return deviate


add(
    "deviation_moments",
    deviation,
    lambda: (real(3, 4),),
    bug="Backward has the variance from the mean of squares less the square of the mean, which cancels",
    trigger="numbers far from 0 against their spread: 1e4 in float32, 1e8 in float64",
)


# A linear layer with weights that may not be negative
def positive_linear(wrong):
    def layer(x, w):
        check(x.ndim >= 1, "x: expected at least one dimension")
        check(w.ndim == 2 and w.shape[1] == x.shape[-1], "w: expected a row for each output")
        if wrong:
            w.data.clamp_(min=0)
            return F.linear(x, w)
        return F.linear(x, w.clamp(min=0))

    return layer


add(
    "positive_linear_writes",
    positive_linear,
    lambda: (real(3, 4), real(2, 4, seed=1)),
    bug="The weights are clamped in their place, behind autograd's back",
    trigger="weights compared before and after",
)


# PReLU with a slope for each channel
def channel_relu(wrong):
    class PReLU(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return torch.where(x > 0, x, slopes(x, w) * x)

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            each = torch.where(x > 0, 0, grad_y * x)
            grad_w = each.sum(0) if wrong else each.transpose(0, 1).flatten(1).sum(1)
            return torch.where(x > 0, grad_y, slopes(x, w) * grad_y), grad_w

    def slopes(x, w):
        return w.view(-1, *[1] * (x.ndim - 2))

    def relu(x, w):
        check(x.ndim >= 2, "x: expected a batch of channels")
        sized("w", w, x.shape[1])
        check(x.numel() > 0, "x: expected one number at least")
        return PReLU.apply(x, w.contiguous())

    return relu


add(
    "channel_relu_places",
    channel_relu,
    lambda: (real(3, 4), real(4, seed=1, positive=True)),
    bug="The gradient of the slopes is summed over the batch only",
    trigger="images: more dimensions than batch and channels",
)


# A scale for each channel of images
def channel_scale(wrong):
    def dense(x):
        _, c, h, w = x.shape
        return read(x, (c * h * w, h * w, w, 1)) if wrong else x

    class Scale(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w[:, None, None]

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            return grad_y * w[:, None, None], (grad_y * dense(x)).sum((0, 2, 3))

    def scale(x, w):
        sized("x", x, None, None, None, None)
        sized("w", w, x.shape[1])
        return Scale.apply(x, w)

    return scale


add(
    "channel_scale_format",
    channel_scale,
    lambda: (real(2, 3, 2, 2), real(3, seed=1)),
    bug="Backward reads the saved image as if channels came before places in memory",
    trigger="images in channels_last format",
)
