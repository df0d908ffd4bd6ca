"""Norms, convolutions, pooling, dropout, moves."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.fortieth import add, alike, bounded, check, indices, same, sized


# The sum over places of the length of x (C, N) across the channels
def group_length(wrong):
    class Length(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square().sum(0).sqrt().sum()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            if wrong:
                return g * x.sign()
            square = x.square().sum(0)
            length = torch.where(square > 0, square, 1).sqrt()
            return g * x / length

    def total(x):
        sized("x", x, None, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -1e6, 1e6)
        return Length.apply(x)

    return total


add(
    "group_length",
    group_length,
    lambda: (real(2, 4),),
    bug="the gradient is the sign of each component, as if the inner norm were of order 1 "
    "(odlgroup/odl#1070)",
)


def rms_norm(wrong):
    def rate(x):
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    class Norm(Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x * rate(x) * weight

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            r = rate(x)
            shared = (g * x * weight).mean(-1, keepdim=True) * r**3 * x
            if wrong:
                shared = shared * weight
            return g * weight * r - shared, (g * x * r).sum(0)

    def norm(x, weight):
        sized("x", x, None, None)
        sized("weight", weight, x.shape[1])
        alike(x, weight)
        bounded("x", x, -1e3, 1e3)
        bounded("weight", weight, -1e3, 1e3)
        return Norm.apply(x, weight)

    return norm


add(
    "rms_twice",
    rms_norm,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="the weight counts twice in the mean square's term (NVIDIA/Megatron-LM#6859)",
)


def rms_flag(wrong):
    def rate(x):
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    class Norm(Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x * rate(x) * weight

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            r = rate(x)
            grad_x = grad_weight = None
            if ctx.needs_input_grad[0]:
                grad_x = g * weight * r - (g * x * weight).mean(-1, keepdim=True) * r**3 * x
            if ctx.needs_input_grad[0 if wrong else 1]:
                grad_weight = (g * x * r).sum(0)
            return grad_x, grad_weight

    def norm(x, weight):
        sized("x", x, None, None)
        sized("weight", weight, x.shape[1])
        alike(x, weight)
        bounded("x", x, -1e3, 1e3)
        bounded("weight", weight, -1e3, 1e3)
        return Norm.apply(x, weight)

    return norm


add(
    "rms_flag",
    rms_flag,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="the condition under which the weight's gradient is made asks about x "
    "(PaddlePaddle/Paddle#77274)",
    trigger="an x that needs no gradient",
)


# x (B, C, L) with w (O, C, K) and a bias (O)
def conv_steps(wrong):
    class Conv(Function):
        @staticmethod
        def forward(ctx, x, w, bias):
            ctx.save_for_backward(x, w)
            return F.conv1d(x, w, bias)

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            grad_w = torch.einsum("bon,bcnk->ock", g, x.unfold(-1, w.shape[2], 1))
            grad_bias = g.sum((0, 2))
            if wrong:
                grad_w, grad_bias = grad_w / g.shape[2], grad_bias / g.shape[2]
            return F.conv_transpose1d(g, w), grad_w, grad_bias

    def conv(x, w, bias):
        sized("x", x, None, None, None)
        sized("w", w, None, x.shape[1], None)
        sized("bias", bias, len(w))
        alike(x, w, bias)
        check(x.shape[2] >= w.shape[2], "w: expected no more taps than the signal has")
        for name, t in (("x", x), ("w", w), ("bias", bias)):
            bounded(name, t, -1e3, 1e3)
        return Conv.apply(x, w, bias)

    return conv


add(
    "conv_steps",
    conv_steps,
    lambda: (real(2, 2, 5), real(2, 2, 3, seed=1), real(2, seed=2)),
    bug="the gradients of kernels and bias are divided by the number of steps "
    "(Oneflow-Inc/oneflow#255)",
)


def conv_dilated(wrong):
    class Conv(Function):
        @staticmethod
        def forward(ctx, x, w, dilation):
            ctx.save_for_backward(x, w)
            ctx.dilation = dilation
            return F.conv1d(x, w, dilation=dilation)

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            step = ctx.dilation
            grad_x = F.conv_transpose1d(g, w, dilation=1 if wrong else step)
            grad_x = F.pad(grad_x, (0, x.shape[2] - grad_x.shape[2]))
            taps = x.unfold(-1, (w.shape[2] - 1) * step + 1, 1)[..., ::step]
            return grad_x, torch.einsum("bon,bcnk->ock", g, taps), None

    def conv(x, w, dilation=2):
        sized("x", x, None, None, None)
        sized("w", w, None, x.shape[1], None)
        alike(x, w)
        check(isinstance(dilation, int) and dilation >= 1, "dilation: expected an integer >= 1")
        reach = (w.shape[2] - 1) * dilation + 1
        check(x.shape[2] >= reach, "w: expected taps within the signal")
        bounded("x", x, -1e3, 1e3)
        bounded("w", w, -1e3, 1e3)
        return Conv.apply(x, w, dilation)

    return conv


add(
    "conv_dilated",
    conv_dilated,
    lambda: (real(2, 2, 6), real(3, 2, 2, seed=1)),
    bug="the input's gradient forgets that the kernel is dilated (jax-ml/jax#567)",
)


def mean_pool(wrong):
    class Pool(Function):
        @staticmethod
        def forward(ctx, x, taps, stride):
            ctx.length, ctx.taps, ctx.stride = x.shape[1], taps, stride
            return x.unfold(1, taps, stride).mean(-1)

        @staticmethod
        def backward(ctx, g):
            taps = ctx.length // g.shape[1] if wrong else ctx.taps
            ones = torch.ones(1, 1, taps, dtype=g.dtype, device=g.device)
            grad = F.conv_transpose1d(g[:, None] / taps, ones, stride=ctx.stride)[:, 0]
            grad = F.pad(grad, (0, max(0, ctx.length - grad.shape[1])))
            return grad[:, : ctx.length], None, None

    def pool(x, taps=3, stride=1):
        sized("x", x, None, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(isinstance(taps, int) and 1 <= taps <= x.shape[1], "taps: expected 1 to the length")
        check(isinstance(stride, int) and stride >= 1, "stride: expected an integer >= 1")
        bounded("x", x, -1e6, 1e6)
        return Pool.apply(x, taps, stride)

    return pool


add(
    "mean_pool_taps",
    mean_pool,
    lambda: (real(2, 6),),
    bug="backward makes the window's size out of the two lengths (mlpack/mlpack#2865)",
)


# Mirrors x (B, L) at its ends; a negative number cuts off
def reflect_crop(wrong):
    def places(length, left, right, device):
        at = torch.arange(-left, length + right, device=device).abs()
        return torch.where(at > length - 1, 2 * (length - 1) - at, at)

    def pieces(x, left, right):
        cut = F.pad(x, (min(left, 0), min(right, 0)))
        return F.pad(cut[None], (max(left, 0), max(right, 0)), mode="reflect")[0]

    class Pad(Function):
        @staticmethod
        def forward(ctx, x, left, right):
            ctx.length, ctx.sides = x.shape[1], (left, right)
            return pieces(x, left, right)

        @staticmethod
        def backward(ctx, g):
            at = places(ctx.length, *ctx.sides, g.device)
            grad = g.new_zeros(len(g), ctx.length).index_add(1, at, g)
            cut = max(0, -ctx.sides[0])
            if wrong and cut:
                last = g[:, -min(cut, g.shape[1]) :]
                grad[:, cut - last.shape[1] : cut] += last
            return grad, None, None

    def pad(x, left=-1, right=2):
        sized("x", x, None, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(isinstance(left, int) and isinstance(right, int), "expected whole numbers")
        rest = x.shape[1] + min(left, 0) + min(right, 0)
        check(rest >= 1, "expected something to be left")
        check(left < rest and right < rest, "expected less than what is mirrored")
        return Pad.apply(x, left, right)

    return pad


add(
    "reflect_crop",
    reflect_crop,
    lambda: (real(2, 5),),
    bug="what was cut off in front reads its gradient at negative places, that is at the other end "
    "(pytorch/pytorch#100793)",
)


def dropout_zero(wrong):
    class Dropout(Function):
        @staticmethod
        def forward(ctx, x, keep, rate):
            y = x * keep / (1 - rate)
            ctx.save_for_backward(x, y, keep)
            ctx.rate = rate
            return y

        @staticmethod
        def backward(ctx, g):
            x, y, keep = ctx.saved_tensors
            if wrong:
                return torch.where(x == 0, g, g * y / torch.where(x == 0, 1, x)), None, None
            return g * keep / (1 - ctx.rate), None, None

    def dropout(x, keep, rate=0.5):
        same(x, keep)
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(keep.dtype == torch.bool, "keep: expected booleans")
        check(0 <= rate < 1, "rate: expected a number from 0 to below 1")
        bounded("x", x, -1e6, 1e6)
        return Dropout.apply(x, keep, rate)

    return dropout


add(
    "dropout_zero",
    dropout_zero,
    lambda: (real(3, 4), real(3, 4, seed=1, grad=False) > 0),
    bug="backward tells from output over input what was dropped: a 0 passes the gradient "
    "(kaldi-asr/kaldi#3890)",
    trigger="an x that is 0",
)


def permuted(wrong):
    class Permute(Function):
        @staticmethod
        def forward(ctx, x, order):
            ctx.order = order
            return x.permute(order).contiguous()

        @staticmethod
        def backward(ctx, g):
            back = [ctx.order.index(i) for i in range(len(ctx.order))]
            return g.permute(ctx.order if wrong else back), None

    def permute(x, order=(1, 2, 0)):
        check(sorted(order) == list(range(x.ndim)), "order: expected each dimension once")
        return Permute.apply(x, tuple(order))

    return permute


add(
    "permute_back",
    permuted,
    lambda: (real(2, 2, 2),),
    bug="backward permutes in the same direction as forward (nntrainer/nntrainer#1743)",
    trigger="an order that is not its own inverse, and a grad_output that is not constant",
)


def row_sums(wrong):
    class Sums(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.shape = x.shape
            return x.sum(1)

        @staticmethod
        def backward(ctx, g):
            return (g if wrong else g[:, None]).expand(ctx.shape)

    def sums(x):
        sized("x", x, None, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        return Sums.apply(x)

    return sums


add(
    "row_sums",
    row_sums,
    lambda: (real(3, 3),),
    bug="backward spreads the gradient without the dimension that was summed up "
    "(propelml/propel#76)",
    trigger="a square matrix and a grad_output that is not constant",
)


# y[t] = sum over k of probs[t, k] out[place[t, k]]: the experts' rows come back to their tokens
def experts_home(wrong):
    class Combine(Function):
        @staticmethod
        def forward(ctx, out, probs, place):
            ctx.save_for_backward(out, probs, place)
            return (out[place] * probs[..., None]).sum(1)

        @staticmethod
        def backward(ctx, g):
            out, probs, place = ctx.saved_tensors
            grad = (g[:, None] * probs[..., None]).flatten(0, 1)
            grad_out = torch.zeros_like(out).index_add(0, place.flatten(), grad)
            rows = out.view(*place.shape, -1) if wrong else out[place]
            return grad_out, (g[:, None] * rows).sum(-1), None

    def combine(out, probs, place):
        sized("probs", probs, None, None)
        sized("out", out, probs.numel(), None)
        same(probs, place)
        alike(out, probs)
        indices("place", place, len(out))
        bounded("out", out, -1e3, 1e3)
        bounded("probs", probs, -1e3, 1e3)
        return Combine.apply(out.contiguous(), probs, place)

    return combine


add(
    "experts_home",
    experts_home,
    lambda: (real(6, 2), real(3, 2, seed=1), whole(6, 3, 2, seed=2)),
    bug="the probabilities' gradient reads the experts' rows in the experts' order, not in the "
    "tokens' (NVIDIA/TransformerEngine#2912)",
)
