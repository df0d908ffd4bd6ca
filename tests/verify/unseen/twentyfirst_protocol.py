"""What a Function owes to the engine: tangents, batches, memory, precision, no history of its own."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentyfirst import add, check, same, sized


# The volume a (b x c)
def volume(wrong):
    cross = torch.linalg.cross

    class Volume(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(a, b, c):
            return (a * cross(b, c)).sum(-1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            a, b, c = ctx.saved_tensors
            g = grad_y[..., None]
            return g * cross(b, c), g * cross(c, a), g * cross(a, b)

        @staticmethod
        def jvp(ctx, tangent_a, tangent_b, tangent_c):
            a, b, c = ctx.saved_tensors
            turned = cross(c, a) if not wrong else cross(a, c)
            moved = tangent_a * cross(b, c) + tangent_b * turned + tangent_c * cross(a, b)
            return moved.sum(-1)

    def product(a, b, c):
        check(a.ndim >= 1 and a.shape[-1] == 3, "expected vectors of space")
        same(a, b, c)
        if not a.dtype == b.dtype == c.dtype:
            raise TypeError("expected vectors of one dtype")
        return Volume.apply(a, b, c)

    return product


add(
    "volume_tangent",
    volume,
    lambda: (real(2, 3), real(2, 3, seed=1), real(2, 3, seed=2)),
    bug="jvp takes the second product the other way round, backward does not",
    trigger="forward mode",
)


# sum p x along the last axis, p = softmax(w), with a rule for vmap
def weighted_mean(wrong):
    class Mean(Function):
        @staticmethod
        def forward(x, w):
            return (x * w.softmax(-1)).sum(-1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            x, w = inputs
            ctx.save_for_backward(x, w)

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            share = w.softmax(-1) * grad_y[..., None]
            y = (x * w.softmax(-1)).sum(-1, keepdim=True)
            return share, share * (x - y)

        @staticmethod
        def vmap(info, in_dims, x, w):
            def first(t, d):
                return t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)

            y = Mean.apply(first(x, in_dims[0]), first(w, in_dims[1]))
            return y, (in_dims[0] or 0) if wrong else 0

    def mean(x, w):
        check(x.ndim >= 1 and x.shape[-1] >= 1, "expected numbers along the last axis")
        same(x, w)
        return Mean.apply(x, w)

    return mean


add(
    "weighted_mean_batch",
    weighted_mean,
    lambda: (real(2, 4), real(2, 4, seed=1)),
    bug="vmap brings the batch to the front, but says that it lies where it came from",
    trigger="vmap over another axis than the first",
)


# y = x (w / |w|)'
def scaled_product(wrong):
    memo = {}

    def scaled(w):
        if not wrong:
            return w / w.norm()
        seen = memo.get("weight")
        if seen is None or seen[0] is not w or seen[1] != w._version:
            value = w / w.norm()
            if torch.is_grad_enabled():
                return value
            memo["weight"] = seen = w, w._version, value
        return seen[2]

    def product(x, w):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        check(bool((w != 0).any()), "w: expected a weight other than 0")
        return x @ scaled(w).T

    return product


add(
    "scaled_product_memo",
    scaled_product,
    lambda: (real(3, 2), real(4, 2, seed=1)),
    bug="The scaled weight is kept from an evaluation without gradients and used in training",
    trigger="a call under no_grad before",
)


# y = tanh(x) sigmoid(g)
def gated_tanh(wrong):
    class Gated(Function):
        @staticmethod
        def forward(ctx, x, g):
            same(x, g)
            saved = (x.bfloat16(), g.bfloat16()) if wrong else (x, g)
            ctx.save_for_backward(*saved)
            return x.tanh() * g.sigmoid()

        @staticmethod
        def backward(ctx, grad_y):
            x, g = (t.to(grad_y.dtype) for t in ctx.saved_tensors)
            y, s = x.tanh(), g.sigmoid()
            return grad_y * (1 - y**2) * s, grad_y * y * s * (1 - s)

    return lambda x, g: Gated.apply(x, g)


add(
    "gated_tanh_compressed",
    gated_tanh,
    lambda: (real(2, 3), real(2, 3, seed=1)),
    bug="Both inputs are kept in bfloat16 to save memory, whatever they come in",
)


# Cauchy's loss log(1 + (x / c)^2), in blocks of four numbers
def cauchy(wrong):
    class Cauchy(Function):
        @staticmethod
        def forward(ctx, x, c):
            check(c > 0, "expected c > 0")
            ctx.save_for_backward(x)
            ctx.c = c
            return torch.log1p((x / c).square())

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            keep = torch.preserve_format if wrong else torch.contiguous_format
            grad_x = torch.zeros_like(x, memory_format=keep)
            out, flat, g = grad_x.reshape(-1), x.reshape(-1), grad_y.reshape(-1)
            for i in range(0, len(flat), 4):
                block = flat[i : i + 4]
                out[i : i + 4] = 2 * block / (ctx.c**2 + block.square()) * g[i : i + 4]
            return grad_x, None

    return lambda x, c=1.0: Cauchy.apply(x, c)


add(
    "cauchy_blocks_lost",
    cauchy,
    lambda: (real(3, 5),),
    bug="The result has the input's strides, so that its flattened form, which the blocks write, is a copy",
    trigger="a transposed input",
)
