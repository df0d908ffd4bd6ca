"""Norms, layers of networks, Modules, attention."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirtythird import add, add_bare, bounded, check, read_flat, sized


# Global response normalisation, channels last: gain * x * n + bias + x, n each channel's norm over their mean
def response_norm(wrong):
    eps = 0.1

    class Norm(Function):
        @staticmethod
        def forward(ctx, x, gain, bias):
            ctx.save_for_backward(x, gain)
            norm = x.square().sum((1, 2), keepdim=True).sqrt()
            return gain * x * norm / (norm.mean(-1, keepdim=True) + eps) + bias + x

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, gain = ctx.saved_tensors
            norm = x.square().sum((1, 2), keepdim=True).sqrt()
            mean = norm.mean(-1, keepdim=True) + eps
            share = norm / mean
            grad_share = (grad_y * gain * x).sum((1, 2), keepdim=True)
            grad_norm = grad_share / mean
            if not wrong:
                grad_norm = grad_norm - (grad_share * norm).mean(-1, keepdim=True) / mean**2
            direction = torch.where(norm > 0, x / torch.where(norm > 0, norm, 1), 0)
            grad_x = grad_y * (1 + gain * share) + grad_norm * direction
            return grad_x, (grad_y * x * share).sum((0, 1, 2)), grad_y.sum((0, 1, 2))

    def function(x, gain, bias):
        sized("x", x, None, None, None, None)
        sized("gain", gain, x.shape[-1])
        sized("bias", bias, x.shape[-1])
        for t in (x, gain, bias):
            bounded("arguments", t, -1e3, 1e3)
        return Norm.apply(x, gain, bias)

    return function


add(
    "response_norm_mean",
    response_norm,
    lambda: (real(2, 3, 3, 4), real(4, seed=1), real(4, seed=2)),
    bug="The mean of the channels' norms is taken as a constant",
)


# max(x, floor) with a learned floor per channel
def floor_unit(wrong):
    class Unit(Function):
        @staticmethod
        def forward(ctx, x, floor):
            ctx.save_for_backward(x, floor)
            return torch.maximum(x, floor)

        @staticmethod
        def backward(ctx, grad_y):
            x, floor = ctx.saved_tensors
            above = x >= floor
            below = x <= floor if wrong else ~above
            return grad_y * above, (grad_y * below).sum_to_size(floor.shape)

    def function(x, floor):
        check(x.ndim >= 1, "x: expected channels last")
        sized("floor", floor, x.shape[-1])
        bounded("x", x, -1e4, 1e4)
        bounded("floor", floor, -1e4, 1e4)
        return Unit.apply(x, floor)

    return function


add(
    "floor_unit_equal",
    floor_unit,
    lambda: (real(5, 3), real(3, seed=1)),
    bug="At equality both x and the floor get the whole gradient",
    trigger="x equal to its floor, as 0 and a floor that starts at 0",
)


# x / rms(x) over channels, the second dimension
def pixel_norm(wrong):
    eps = 1e-8

    class Norm(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * (x.square().mean(1, keepdim=True) + eps).rsqrt()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            scale = (x.square().mean(1, keepdim=True) + eps).rsqrt()
            along = (grad_y * x).mean(-1 if wrong else 1, keepdim=True)
            return scale * grad_y - x * scale**3 * along

    def function(x):
        check(x.ndim >= 2 and x.shape[1] >= 1, "x: expected channels second")
        bounded("x", x, -1e4, 1e4)
        return Norm.apply(x)

    return function


add(
    "pixel_norm_axis",
    pixel_norm,
    lambda: (real(3, 4),),
    bug="backward's mean runs over the last dimension, not over the channels",
    trigger="an image: more dimensions than two",
)


# x over the largest |x| of its block of four, or over 0.01
def block_scaled(wrong):
    size, floor = 4, 1e-2

    class Scaled(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            blocks = F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
            y = blocks / blocks.abs().amax(-1, keepdim=True).clamp(min=floor)
            return y.flatten(-2)[..., : x.shape[-1]].contiguous()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            n = x.shape[-1]
            blocks, g = (F.pad(t, (0, -n % size)).unflatten(-1, (-1, size)) for t in (x, grad_y))
            top, at = blocks.abs().max(-1, keepdim=True)
            by_top = -(g * blocks).sum(-1, keepdim=True) / top.clamp(min=floor) ** 2
            by_top = torch.where(top > floor, by_top, 0)
            if wrong:
                by_top[..., n // size :, :] = 0
            signed = by_top * blocks.gather(-1, at).sign()
            grad = (g / top.clamp(min=floor)).scatter_add(-1, at, signed)
            return grad.flatten(-2)[..., :n].contiguous()

    def function(x):
        check(x.ndim >= 1 and x.shape[-1] >= 1, "x: expected numbers")
        bounded("x", x, -1e4, 1e4)
        return Scaled.apply(x)

    return function


add(
    "block_scaled_rest",
    block_scaled,
    lambda: (real(3, 8),),
    bug="The largest number's own gradient is added in whole blocks only",
    trigger="a size that is no multiple of four",
)


# relu(x w1) w2 over 32 tokens at a time, to save memory
def chunked_mlp(wrong):
    class Mlp(Function):
        @staticmethod
        def forward(ctx, x, w1, w2):
            ctx.save_for_backward(x, w1, w2)
            return torch.cat([(rows @ w1).relu() @ w2 for rows in x.split(32)])

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, w1, w2 = ctx.saved_tensors
            grad_x = []
            grad_1, grad_2 = torch.zeros_like(w1), torch.zeros_like(w2)
            for rows, g in zip(x.split(32), grad_y.split(32), strict=True):
                hidden = (rows @ w1).relu()
                grad_pre = (g @ w2.mT) * (hidden > 0)
                grad_x.append(grad_pre @ w1.mT)
                if wrong:
                    grad_1, grad_2 = rows.mT @ grad_pre, hidden.mT @ g
                else:
                    grad_1 += rows.mT @ grad_pre
                    grad_2 += hidden.mT @ g
            return torch.cat(grad_x), grad_1, grad_2

    def function(x, w1, w2):
        sized("x", x, None, None)
        sized("w1", w1, x.shape[1], None)
        sized("w2", w2, w1.shape[1], None)
        for t in (x, w1, w2):
            bounded("arguments", t, -1e3, 1e3)
        return Mlp.apply(x, w1, w2)

    return function


add(
    "chunked_mlp_assigned",
    chunked_mlp,
    lambda: (real(5, 3), real(3, 4, seed=1), real(4, 2, seed=2)),
    bug="The weights' gradients are those of the last chunk, not the sum",
    trigger="more than 32 tokens",
)


# sigmoid(x a) * (x b), as it is used under autocast
def gated_features(wrong):
    class Features(Function):
        @staticmethod
        def forward(ctx, x, a, b):
            s, v = (x @ a).sigmoid(), x @ b
            ctx.save_for_backward(x, a, b, s, v)
            return s * v

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, a, b, s, v = ctx.saved_tensors
            types = x.dtype, a.dtype, b.dtype
            with torch.autocast(x.device.type, enabled=False):
                if not wrong:
                    wide = torch.promote_types(torch.promote_types(*types[:2]), types[2])
                    x, a, b, s, v, grad_y = (t.to(wide) for t in (x, a, b, s, v, grad_y))
                grad_a, grad_b = grad_y * v * s * (1 - s), grad_y * s
                grads = grad_a @ a.mT + grad_b @ b.mT, x.mT @ grad_a, x.mT @ grad_b
                return tuple(g.to(dtype) for g, dtype in zip(grads, types, strict=True))

    def function(x, a, b):
        sized("x", x, None, None)
        sized("a", a, x.shape[1], None)
        sized("b", b, *a.shape)
        for t in (x, a, b):
            check(not t.is_complex(), "expected real numbers")
            bounded("arguments", t, -100, 100)
        return Features.apply(x, a, b)

    return function


add_bare(
    "gated_features_autocast",
    gated_features,
    lambda: (real(5, 3), real(3, 4, seed=1), real(3, 4, seed=2)),
    bug="Under autocast the saved inputs are float32 and the gradient bfloat16: their product fails",
    trigger="torch.autocast",
)


# A 1 x 1 convolution whose kernel reads the saved image by its own addresses
def pointwise_conv(wrong):
    class Conv(Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return torch.einsum("nchw,dc->ndhw", x, weight)

        @staticmethod
        def backward(ctx, grad_y):
            x, weight = ctx.saved_tensors
            x = read_flat(x) if wrong else x
            grad_x = torch.einsum("ndhw,dc->nchw", grad_y, weight)
            return grad_x, torch.einsum("ndhw,nchw->dc", grad_y, x)

    def function(x, weight):
        sized("x", x, None, None, None, None)
        sized("weight", weight, None, x.shape[1])
        bounded("x", x, -1e4, 1e4)
        bounded("weight", weight, -1e4, 1e4)
        return Conv.apply(x, weight)

    return function


add(
    "pointwise_conv_format",
    pointwise_conv,
    lambda: (real(2, 3, 4, 4), real(2, 3, seed=1)),
    bug="backward reads the image as if it were contiguous",
    trigger="an image in channels_last, or a transposed one",
)


# Pooling by exponential weights over pairs
def soft_pool(wrong):
    class Pool(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            pairs = x.unflatten(-1, (-1, 2))
            return (pairs.softmax(-1) * pairs).sum(-1)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            pairs = x.unflatten(-1, (-1, 2))
            p = pairs.softmax(-1)
            y = (p * pairs).sum(-1, keepdim=True)
            slope = p if wrong else p * (1 + pairs - y)
            return (grad_y[..., None] * slope).flatten(-2)

    def function(x):
        check(x.ndim >= 1 and x.shape[-1] >= 2, "x: expected two numbers at least")
        check(x.shape[-1] % 2 == 0, "x: expected an even size")
        bounded("x", x, -1e3, 1e3)
        return Pool.apply(x)

    return function


add(
    "soft_pool_weights",
    soft_pool,
    lambda: (real(3, 8),),
    bug="The weights are taken as constants",
)


# Tokens times sines of their places, from a table that is kept between calls
def place_waves(wrong):
    tables = {}

    def table(n, d, like):
        key = (n, d) if wrong else (n, d, like.dtype, like.device)
        if key not in tables:
            at = torch.arange(n, device=like.device)[:, None].to(like.dtype)
            rates = torch.arange(1, d + 1, device=like.device).to(like.dtype)
            tables[key] = (at / rates).cos()
            while len(tables) > 8:
                del tables[next(iter(tables))]
        return tables[key]

    class Waves(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * table(*x.shape[-2:], x).to(x)

        @staticmethod
        def backward(ctx, grad_y):
            return grad_y * table(*grad_y.shape[-2:], grad_y).to(grad_y)

    def function(x):
        check(x.ndim >= 2, "x: expected tokens and channels")
        bounded("x", x, -1e4, 1e4)
        return Waves.apply(x)

    return function


add(
    "place_waves_first_type",
    place_waves,
    lambda: (real(2, 5, 3),),
    bug="The table is kept by its size alone: it stays of the first call's type",
    trigger="a call in float32, then one in float64",
    missed="a table that is kept of a call in float32 and met in float64, at one size",
)


# Tokens pooled by a learned query: Σ softmax(x q) x
def token_pool(wrong):
    class Pool(Function):
        @staticmethod
        def forward(ctx, x, query):
            p = (x @ query).softmax(-1)
            ctx.save_for_backward(x, query, p)
            return (p[..., None] * x).sum(-2)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, query, p = ctx.saved_tensors
            along = (x @ grad_y[..., None])[..., 0]
            centred = along - (p * along).sum(-1, keepdim=True)
            grad_x = p[..., None] * grad_y[..., None, :]
            scores = torch.mul(p, centred, out=p.data) if wrong else p * centred
            return grad_x + scores[..., None] * query, (scores[..., None] * x).flatten(0, -2).sum(0)

    def function(x, query):
        check(x.ndim >= 2 and x.shape[-2] >= 1, "x: expected tokens and channels")
        sized("query", query, x.shape[-1])
        bounded("x", x, -1e3, 1e3)
        bounded("query", query, -1e3, 1e3)
        return Pool.apply(x, query)

    return function


add(
    "token_pool_written",
    token_pool,
    lambda: (real(2, 5, 3), real(3, seed=1)),
    bug="backward writes the scores' gradient over the saved weights, past autograd's count of changes",
    trigger="backward twice through one graph",
)


# A linear layer whose rows have mean 0; in eval its weight is kept from the first call on
def centred_linear(wrong):
    class Centred(Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ (weight - weight.mean(1, keepdim=True)).mT

        @staticmethod
        def backward(ctx, grad_y):
            x, weight = ctx.saved_tensors
            grad = grad_y.flatten(0, -2).mT @ x.flatten(0, -2)
            centred = weight - weight.mean(1, keepdim=True)
            return grad_y @ centred, grad - grad.mean(1, keepdim=True)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(real(3, 4, seed=1, grad=False))
            self.kept = None

        def forward(self, x):
            check(x.ndim >= 2 and x.shape[-1] == 4, "x: expected four channels last")
            check(x.dtype == self.weight.dtype, "x: expected the weight's dtype")
            bounded("x", x, -1e4, 1e4)
            with torch.autocast(x.device.type, enabled=False):
                if not wrong or self.training:
                    self.kept = None
                    return Centred.apply(x, self.weight)
                if self.kept is None:
                    self.kept = (self.weight - self.weight.mean(1, keepdim=True)).detach()
                return x @ self.kept.mT

    return Layer()


add_bare(
    "centred_linear_kept",
    centred_linear,
    lambda: (real(5, 4),),
    bug="In eval the centred weight is kept from the first call on, without a gradient",
    trigger="eval with a weight that is trained or loaded anew",
)


# Stick-breaking attention: a_ij = b_ij Π_(j < k < i) (1 - b_ik), b the scores' sigmoid
def stick_breaking(wrong):
    def weights(scores):
        before = torch.ones_like(scores, dtype=torch.bool).tril(-1)
        rest = torch.where(before, F.logsigmoid(-scores), 0)
        following = rest.flip(-1).cumsum(-1).flip(-1) - rest
        return torch.where(before, (F.logsigmoid(scores) + following).exp(), 0), before

    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return weights(q @ k.mT / math.sqrt(q.shape[-1]))[0] @ v

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            q, k, v = ctx.saved_tensors
            scale = 1 / math.sqrt(q.shape[-1])
            scores = q @ k.mT * scale
            a, before = weights(scores)
            grad_log = grad_y @ v.mT * a
            earlier = grad_log.cumsum(-1)
            if not wrong:
                earlier = earlier - grad_log
            b = scores.sigmoid()
            grad_scores = torch.where(before, grad_log * (1 - b) - earlier * b, 0) * scale
            return grad_scores @ k, grad_scores.mT @ q, a.mT @ grad_y

    def function(q, k, v):
        check(q.ndim >= 2 and q.shape[-1] >= 1, "q: expected tokens and channels")
        sized("k", k, *q.shape)
        sized("v", v, *q.shape[:-1], None)
        for t in (q, k, v):
            bounded("arguments", t, -1e3, 1e3)
        return Attention.apply(q, k, v)

    return function


add(
    "stick_breaking_inclusive",
    stick_breaking,
    lambda: (real(5, 3), real(5, 3, seed=1), real(5, 2, seed=2)),
    bug="The sum over earlier keys counts the key itself",
)


# Attention by sigmoids with a bias of -log of the number of keys
def sigmoid_attention(wrong):
    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            return (scores - math.log(k.shape[-2])).sigmoid() @ v

        @staticmethod
        def backward(ctx, grad_y):
            q, k, v = ctx.saved_tensors
            scale = 1 / math.sqrt(q.shape[-1])
            n = q.shape[-2] if wrong else k.shape[-2]
            p = (q @ k.mT * scale - math.log(n)).sigmoid()
            grad_scores = grad_y @ v.mT * p * (1 - p) * scale
            return grad_scores @ k, grad_scores.mT @ q, p.mT @ grad_y

    def function(q, k, v):
        sized("q", q, None, None, None)
        sized("k", k, q.shape[0], None, q.shape[2])
        sized("v", v, *k.shape[:2], None)
        for t in (q, k, v):
            bounded("arguments", t, -1e3, 1e3)
        return Attention.apply(q, k, v)

    return function


add(
    "sigmoid_attention_keys",
    sigmoid_attention,
    lambda: (real(2, 4, 3), real(2, 4, 3, seed=1), real(2, 4, 3, seed=2)),
    bug="backward's bias counts the queries, not the keys",
    trigger="cross attention: not as many keys as queries",
)


# Attention that returns the heads' mean map too
def mapped_attention(wrong):
    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            p = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
            return p @ v, p.mean(1)

        @staticmethod
        def backward(ctx, grad_y, grad_map):
            q, k, v = ctx.saved_tensors
            scale = 1 / math.sqrt(q.shape[-1])
            p = (q @ k.mT * scale).softmax(-1)
            by_map = grad_map[:, None] if wrong else grad_map[:, None] / q.shape[1]
            grad_p = grad_y @ v.mT + by_map
            grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * scale
            return grad_scores @ k, grad_scores.mT @ q, p.mT @ grad_y

    def function(q, k, v):
        sized("q", q, None, None, None, None)
        sized("k", k, *q.shape[:2], None, q.shape[3])
        sized("v", v, *k.shape[:3], None)
        for t in (q, k, v):
            bounded("arguments", t, -1e3, 1e3)
        return Attention.apply(q, k, v)

    return function


add(
    "mapped_attention_heads",
    mapped_attention,
    lambda: (real(1, 2, 3, 4), real(1, 2, 3, 4, seed=1), real(1, 2, 3, 4, seed=2)),
    bug="The mean map's gradient is not divided by the number of heads",
    trigger="the map's gradient other than the same for all keys",
)
