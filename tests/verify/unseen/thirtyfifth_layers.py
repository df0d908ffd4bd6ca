"""Layers: norms, convolutions, resizing, linear maps."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtyfifth import (
    add,
    add_bare,
    alike,
    bounded,
    check,
    read_flat,
    same,
    sized,
)


# Each row of (N, D) normed, with a weight and a bias
def layer_norm(wrong):
    def normed(x):
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)
        return centred * scale, scale

    class Norm(Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(x, weight)
            return normed(x)[0] * weight + bias

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            y, scale = normed(x)
            h = g * weight
            grad_x = h - h.mean(-1, keepdim=True) - y * (h * y).mean(-1, keepdim=True)
            first = (len(x) - 1) // 64 * 64 if wrong else 0
            return grad_x * scale, (g * y)[first:].sum(0), g[first:].sum(0)

    def norm(x, weight, bias):
        sized("x", x, None, None)
        sized("weight", weight, x.shape[1])
        sized("bias", bias, x.shape[1])
        alike(x, weight, bias)
        bounded("x", x, -1e3, 1e3)
        bounded("weight", weight, -1e3, 1e3)
        return Norm.apply(x, weight, bias)

    return norm


add(
    "layer_norm_blocks",
    layer_norm,
    lambda: (real(4, 5), real(5, seed=1), real(5, seed=2)),
    bug="the parameters' gradient is stored by each block of 64 rows, not added "
    "(dame-cell/Triformer#2)",
    trigger="more than 64 rows",
)


def pads(x, w, stride, padding):
    """Refuse what is no convolution of (B, C, L) with (O, C, K)."""
    sized("x", x, None, None, None)
    sized("w", w, None, None, None)
    alike(x, w)
    check(isinstance(stride, int) and stride >= 1, "stride: expected an integer >= 1")
    check(isinstance(padding, int) and padding >= 0, "padding: expected an integer >= 0")
    check(x.shape[2] + 2 * padding >= w.shape[2], "w: expected no more taps than the signal has")


def grad_signal(g, w, length, stride, padding):
    full = F.conv_transpose1d(g, w, stride=stride)
    full = F.pad(full, (0, length + 2 * padding - full.shape[-1]))
    return full[..., padding : padding + length]


def windows(x, taps, stride, padding):
    """Return (B, C, places, taps)."""
    return F.pad(x, (padding, padding)).unfold(-1, taps, stride)


def grad_kernel(g, x, taps, stride, padding):
    return torch.einsum("bon,bcnk->ock", g, windows(x, taps, stride, padding))


def conv_rest(wrong):
    class Conv(Function):
        @staticmethod
        def forward(ctx, x, w, stride, padding):
            ctx.save_for_backward(x, w)
            ctx.how = stride, padding
            return F.conv1d(x, w, stride=stride, padding=padding)

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            stride, padding = ctx.how
            grad_x = grad_signal(g, w, x.shape[2], stride, padding)
            if wrong:
                rest = (x.shape[2] + 2 * padding - w.shape[2]) % stride
                read = x.shape[2] - rest
                grad_x = F.pad(grad_x[..., :read], (0, rest))
            return grad_x, grad_kernel(g, x, w.shape[2], stride, padding), None, None

    def conv(x, w, stride=2, padding=1):
        pads(x, w, stride, padding)
        return Conv.apply(x, w, stride, padding)

    return conv


add(
    "conv_rest",
    conv_rest,
    lambda: (real(2, 2, 7), real(3, 2, 3, seed=1)),
    bug="the places that the stride leaves over get no gradient, though the last window reads some "
    "of them (ml-explore/mlx#2187)",
    trigger="a length that leaves a rest, with padding",
)


# Groups of channels, each with its own kernels: x (B, G C, L), w (G O, C, K)
def conv_groups(wrong):
    class Conv(Function):
        @staticmethod
        def forward(ctx, x, w, groups):
            ctx.save_for_backward(x, w)
            ctx.groups = groups
            return F.conv1d(x, w, groups=groups)

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            groups = ctx.groups
            batch, _, places = g.shape
            if wrong:
                by_group = g.reshape(batch, -1, groups, places).transpose(1, 2)
            else:
                by_group = g.reshape(batch, groups, -1, places)
            seen = windows(x, w.shape[2], 1, 0)
            seen = seen.reshape(batch, groups, w.shape[1], places, -1)
            grad_w = torch.einsum("bgon,bgcnk->gock", by_group, seen).reshape(w.shape)
            return F.conv_transpose1d(g, w, groups=groups), grad_w, None

    def conv(x, w, groups=2):
        sized("x", x, None, None, None)
        sized("w", w, None, None, None)
        alike(x, w)
        check(isinstance(groups, int) and groups >= 1, "groups: expected an integer >= 1")
        check(w.shape[0] % groups == 0, "w: expected kernels for each group")
        check(x.shape[1] == groups * w.shape[1], "x: expected the channels of all groups")
        check(x.shape[2] >= w.shape[2], "w: expected no more taps than the signal has")
        return Conv.apply(x, w, groups)

    return conv


add(
    "conv_groups_order",
    conv_groups,
    lambda: (real(2, 4, 5), real(4, 2, 3, seed=1)),
    bug="the kernels' gradient sorts grad_output's channels as if the groups alternated "
    "(pytorch/pytorch#51430)",
    trigger="several groups of several kernels, and a grad_output that is not constant",
)


def conv_plain(wrong):
    class Conv(Function):
        @staticmethod
        def forward(ctx, x, w, stride):
            ctx.save_for_backward(x, w)
            ctx.stride = stride
            return F.conv1d(x, w, stride=stride)

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            grad_w = grad_kernel(g, x, w.shape[2], ctx.stride, 0)
            if wrong:
                grad_w = grad_w / (g.shape[0] * g.shape[2])
            return grad_signal(g, w, x.shape[2], ctx.stride, 0), grad_w, None

    def conv(x, w, stride=1):
        pads(x, w, stride, 0)
        return Conv.apply(x, w, stride)

    return conv


add(
    "conv_averaged",
    conv_plain,
    lambda: (real(2, 2, 6), real(3, 2, 3, seed=1)),
    bug="the kernels' gradient is an average over batch and places (sebgao/cTensor#3)",
)


# One kernel for each channel: x (B, C, L), w (C, K)
def depthwise(wrong):
    class Conv(Function):
        @staticmethod
        def forward(ctx, x, w, stride, padding):
            ctx.save_for_backward(x, w)
            ctx.how = stride, padding
            return F.conv1d(x, w[:, None], stride=stride, padding=padding, groups=len(w))

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            stride, padding = ctx.how
            full = F.conv_transpose1d(g, w[:, None], stride=stride, groups=len(w))
            full = F.pad(full, (0, x.shape[2] + 2 * padding - full.shape[-1]))
            seen = windows(x, w.shape[1], stride, padding)
            grad_w = torch.einsum("bcn,bcnk->ck", g, seen)
            if wrong and len(w) % 8 == 0 and padding > 0:
                missed = (g[:, :, -1:] * seen[:, :, -1, -padding:]).sum(0)
                grad_w = grad_w - F.pad(missed, (w.shape[1] - padding, 0))
            return full[..., padding : padding + x.shape[2]], grad_w, None, None

    def conv(x, w, stride=2, padding=1):
        sized("x", x, None, None, None)
        sized("w", w, x.shape[1], None)
        pads(x, w[:, None], stride, padding)
        check(padding < w.shape[1], "padding: expected less than the taps")
        return Conv.apply(x, w, stride, padding)

    return conv


add(
    "depthwise_eight",
    depthwise,
    lambda: (real(2, 3, 6), real(3, 3, seed=1)),
    bug="the last window's last taps are taken to lie in the padding (pytorch/pytorch#50042)",
    trigger="channels in eights and a length whose last window does not reach the padding",
)


def conv_phases(wrong):
    class Conv(Function):
        @staticmethod
        def forward(ctx, x, w, stride, padding):
            ctx.save_for_backward(x, w)
            ctx.how = stride, padding
            return F.conv1d(x, w, stride=stride, padding=padding)

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            stride, padding = ctx.how
            grad_x = grad_signal(g, w, x.shape[2], stride, padding)
            if wrong:
                place = torch.arange(x.shape[2], device=x.device) + padding
                grad_x = grad_x * (place % stride == 0)
            return grad_x, grad_kernel(g, x, w.shape[2], stride, padding), None, None

    def conv(x, w, stride=2, padding=0):
        pads(x, w, stride, padding)
        return Conv.apply(x, w, stride, padding)

    return conv


add(
    "conv_phases_first",
    conv_phases,
    lambda: (real(2, 2, 7), real(3, 2, 3, seed=1)),
    bug="of the products into which the stride splits the input's gradient only the first is made "
    "(ROCm/rocm-libraries#7732)",
    trigger="a stride above 1 (the sample)",
)


def standardise(x, mean, var, training):
    """Return normed columns of (N, D) and their factors: by their own statistics or by given ones."""
    if training:
        mean, var = x.mean(0), x.var(0, correction=0)
    scale = torch.rsqrt(var + 1e-5)
    return (x - mean) * scale, scale


def through_statistics(h, y):
    return h - h.mean(0) - y * (h * y).mean(0)


def batch_norm(wrong):
    class Norm(Function):
        @staticmethod
        def forward(ctx, x, weight, bias, mean, var, training):
            ctx.save_for_backward(x, weight, mean, var)
            ctx.training = training
            return standardise(x, mean, var, training)[0] * weight + bias

        @staticmethod
        def backward(ctx, g):
            x, weight, mean, var = ctx.saved_tensors
            y, scale = standardise(x, mean, var, ctx.training)
            h = g * weight
            if ctx.training or wrong:
                h = through_statistics(h, y)
            return h * scale, (g * y).sum(0), g.sum(0), None, None, None

    def norm(x, weight, bias, mean, var, training=False):
        sized("x", x, None, None)
        for name, t in {"weight": weight, "bias": bias, "mean": mean, "var": var}.items():
            sized(name, t, x.shape[1])
        alike(x, weight, bias, mean, var)
        bounded("x", x, -1e3, 1e3)
        bounded("weight", weight, -1e3, 1e3)
        bounded("mean", mean, -1e3, 1e3)
        bounded("var", var, 0, 1e6)
        check(not (mean.requires_grad or var.requires_grad), "mean, var: expected constants")
        return Norm.apply(x, weight, bias, mean, var, training)

    return norm


add(
    "batch_norm_eval",
    batch_norm,
    lambda: (
        real(4, 3),
        real(3, seed=1),
        real(3, seed=2),
        real(3, seed=3, grad=False),
        real(3, seed=4, grad=False, positive=True),
    ),
    bug="in eval mode backward goes through the batch's statistics all the same (pytorch/xla#913)",
)


def batch_norm_module(wrong):
    class Norm(Function):
        @staticmethod
        def forward(ctx, x, weight, bias, mean, var, module):
            ctx.save_for_backward(x, weight, mean, var)
            ctx.module, ctx.training = module, module.training
            return standardise(x, mean, var, module.training)[0] * weight + bias

        @staticmethod
        def backward(ctx, g):
            x, weight, mean, var = ctx.saved_tensors
            training = ctx.module.training if wrong else ctx.training
            y, scale = standardise(x, mean, var, training)
            h = through_statistics(g * weight, y) if training else g * weight
            return h * scale, (g * y).sum(0), g.sum(0), None, None, None

    class BatchNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(real(3, seed=1, grad=False))
            self.bias = nn.Parameter(real(3, seed=2, grad=False))
            self.register_buffer("mean", real(3, seed=3, grad=False))
            self.register_buffer("var", real(3, seed=4, grad=False, positive=True))

        def forward(self, x):
            sized("x", x, None, 3)
            alike(x, self.weight)
            bounded("x", x, -1e3, 1e3)
            kept = self.weight, self.bias, self.mean, self.var
            if x.dtype in (torch.float16, torch.bfloat16):
                y = Norm.apply(x.float(), *(t.float() for t in kept), self)
                return y.to(x.dtype)
            return Norm.apply(x, *kept, self)

    return BatchNorm()


add_bare(
    "batch_norm_mode",
    batch_norm_module,
    lambda: (real(4, 3),),
    bug="backward asks for the mode at its own time, not at forward's (apache/mxnet#9580)",
    trigger="another mode at backward than at forward",
)


def rms_norm(wrong):
    class Norm(Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)
            y, h = x * scale, g * weight
            grad_x = scale * (h - y * (h * y).mean(-1, keepdim=True))
            return grad_x, None if wrong else (g * y).sum(0)

    def norm(x, weight):
        sized("x", x, None, None)
        sized("weight", weight, x.shape[1])
        alike(x, weight)
        bounded("x", x, -1e3, 1e3)
        bounded("weight", weight, -1e3, 1e3)
        return Norm.apply(x, weight)

    return norm


add(
    "rms_norm_weight",
    rms_norm,
    lambda: (real(4, 5), real(5, seed=1)),
    bug="None for the weight, as if it were frozen (unslothai/unsloth#4533)",
)


# (N, C, L) normed in groups of channels
def group_norm(wrong):
    def normed(x, groups):
        parts = x.reshape(len(x), groups, -1)
        centred = parts - parts.mean(-1, keepdim=True)
        scale = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)
        return centred * scale, scale

    class Norm(Function):
        @staticmethod
        def forward(ctx, x, weight, bias, groups):
            ctx.save_for_backward(x, weight)
            ctx.groups = groups
            y = normed(x, groups)[0].reshape(x.shape)
            return y * weight[:, None] + bias[:, None]

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            parts, scale = normed(read_flat(x) if wrong else x, ctx.groups)
            h = (g * weight[:, None]).reshape(parts.shape)
            h = h - h.mean(-1, keepdim=True) - parts * (h * parts).mean(-1, keepdim=True)
            grad_weight = (g * parts.reshape(x.shape)).sum((0, 2))
            return (h * scale).reshape(x.shape), grad_weight, g.sum((0, 2)), None

    def norm(x, weight, bias, groups=2):
        sized("x", x, None, None, None)
        sized("weight", weight, x.shape[1])
        sized("bias", bias, x.shape[1])
        alike(x, weight, bias)
        check(
            groups >= 1 and x.shape[1] % groups == 0, "groups: expected a divisor of the channels"
        )
        bounded("x", x, -1e3, 1e3)
        bounded("weight", weight, -1e3, 1e3)
        return Norm.apply(x, weight, bias, groups)

    return norm


add(
    "group_norm_address",
    group_norm,
    lambda: (real(2, 4, 3), real(4, seed=1), real(4, seed=2)),
    bug="backward's kernel reads x at other addresses than forward's: as if it were dense "
    "(linkedin/Liger-Kernel#883)",
    trigger="an x that is not contiguous",
)


# (..., L) stretched linearly to another length, the ends aligned
def stretch(wrong):
    def matrix(length, size, t):
        stride = (length - 1) / (size - 1) if size > 1 else 0.0
        place = torch.arange(size, device=t.device, dtype=torch.float64) * stride
        at = torch.arange(length, device=t.device, dtype=torch.float64)
        return (1 - (place[:, None] - at).abs()).clamp(min=0).to(t.dtype)

    class Stretch(Function):
        @staticmethod
        def forward(ctx, x, size):
            ctx.length = x.shape[-1]
            return x @ matrix(x.shape[-1], size, x).mT

        @staticmethod
        def backward(ctx, g):
            length, size = ctx.length, g.shape[-1]
            m = matrix(length, size, g)
            if wrong and length > 1:
                centre = torch.arange(length, device=g.device) * (size - 1) / (length - 1)
                away = (torch.arange(size, device=g.device)[:, None] - centre).abs()
                m = m * (away <= size / length + 2)
            return g @ m, None

    def resize(x, size=7):
        alike(x)
        check(x.ndim >= 2 and x.shape[-1] >= 1, "x: expected signals")
        bounded("x", x, -1e6, 1e6)
        check(isinstance(size, int) and size >= 1, "size: expected an integer >= 1")
        return Stretch.apply(x, size)

    return resize


add(
    "stretch_window",
    stretch,
    lambda: (real(2, 4),),
    kwargs=lambda: {"size": 12},
    bug="backward looks for a place's outputs in a window sized without the aligned ends "
    "(flagos-ai/FlagGems#5218)",
    trigger="a short signal made much longer (2 to 12)",
)


# Two dense layers with a sigmoid each
def two_layers(wrong):
    class Layers(Function):
        @staticmethod
        def forward(ctx, x, first, second):
            ctx.save_for_backward(x, first, second)
            return torch.sigmoid(torch.sigmoid(x @ first.mT) @ second.mT)

        @staticmethod
        def backward(ctx, g):
            x, first, second = ctx.saved_tensors
            h = torch.sigmoid(x @ first.mT)
            y = torch.sigmoid(h @ second.mT)
            outer = g if wrong else g * y * (1 - y)
            inner = (outer @ second) * h * (1 - h)
            return inner @ first, inner.mT @ x, outer.mT @ h

    def network(x, first, second):
        sized("x", x, None, None)
        sized("first", first, None, x.shape[1])
        sized("second", second, None, first.shape[0])
        alike(x, first, second)
        return Layers.apply(x, first, second)

    return network


add(
    "two_layers_outer",
    two_layers,
    lambda: (real(3, 4), real(5, 4, seed=1), real(2, 5, seed=2)),
    bug="the output's sigmoid has no derivative (Bot-Academy/NeuralNetworkFromScratch#3)",
)


# Two matrices, of which each device holds some columns, stacked
def stack_columns(wrong):
    def by_columns(g, parts):
        shards = g.reshape(-1).chunk(parts)
        return torch.cat([s.reshape(len(g), -1) for s in shards], 1)

    class Stack(Function):
        @staticmethod
        def forward(ctx, a, b, parts):
            ctx.parts = parts
            return torch.stack([a, b])

        @staticmethod
        def backward(ctx, g):
            if wrong:
                return by_columns(g[0], ctx.parts), by_columns(g[1], ctx.parts), None
            return g[0], g[1], None

    def stack(a, b, parts=2):
        sized("a", a, None, None)
        same(a, b)
        alike(a, b)
        check(parts >= 1 and a.shape[1] % parts == 0, "parts: expected a divisor of the columns")
        return Stack.apply(a, b, parts)

    return stack


add(
    "stack_columns_shards",
    stack_columns,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="a device's columns are read from the gradient's memory one after the other "
    "(Oneflow-Inc/oneflow#8194)",
    trigger="a grad_output that is not constant",
)


def shared_linear(wrong):
    calls = [0]

    class Linear(Function):
        @staticmethod
        def forward(ctx, x, weight):
            calls[0] += 1
            ctx.save_for_backward(x, weight)
            ctx.call = calls[0]
            return x @ weight.mT

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            if wrong and ctx.call != calls[0]:
                return g @ weight, None
            return g @ weight, g.mT @ x

    def linear(x, weight):
        sized("x", x, None, None)
        sized("weight", weight, None, x.shape[1])
        alike(x, weight)
        return Linear.apply(x, weight)

    return linear


add(
    "shared_linear_twice",
    shared_linear,
    lambda: (real(3, 4), real(2, 4, seed=1)),
    bug="of a layer that is called several times only the last call gives the weight a gradient "
    "(PaddlePaddle/Paddle#43645)",
    trigger="two calls before backward",
)


# tanh and square of one input
def two_heads(wrong):
    class Heads(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.tanh(x), x * x

        @staticmethod
        def backward(ctx, g, h):
            (x,) = ctx.saved_tensors
            grad = g * (1 - torch.tanh(x) ** 2)
            return h * 2 * x if wrong else grad + h * 2 * x

    def heads(x):
        alike(x)
        bounded("x", x, -1e3, 1e3)
        return Heads.apply(x)

    return heads


add(
    "two_heads_assigned",
    two_heads,
    lambda: (real(3, 4),),
    bug="where gradients are to be added, the last is assigned (apache/mxnet#9497)",
)
