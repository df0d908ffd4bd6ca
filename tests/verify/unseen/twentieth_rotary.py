"""Rotary position embeddings."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.nineteenth import uniform
from tests.verify.unseen.twentieth import add, check, same, sized


def turned(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


# y = x cos + turned(x) sin, halves turned against each other
def rotary_tables(wrong):
    class Rotary(Function):
        @staticmethod
        def forward(ctx, x, cos, sin):
            check(x.ndim >= 1 and x.shape[-1] % 2 == 0, "expected an even last dimension")
            same(x, cos, sin)
            ctx.save_for_backward(x, cos, sin)
            return x * cos + turned(x) * sin

        @staticmethod
        def backward(ctx, grad_y):
            x, cos, sin = ctx.saved_tensors
            back = turned(grad_y) * sin if wrong else turned(grad_y * sin)
            return grad_y * cos - back, grad_y * x, grad_y * turned(x)

    return lambda x, cos, sin: Rotary.apply(x, cos, sin)


def tables(length, half):
    angle = torch.arange(length, dtype=F64)[:, None] * 0.5 ** torch.arange(half, dtype=F64)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


add(
    "rotary_two_sines",
    rotary_tables,
    lambda: (real(3, 4), *tables(3, 2)),
    bug="Paddle (pull request 74716): backward turns the gradient and then multiplies by the sines,"
    " which is the same only where both halves have the same sines",
    trigger="tables whose halves differ",
)


def angles(x, offset=0):
    """Angles of the positions in dimension -2 and the pairs in dimension -1."""
    t = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)[:, None] + offset
    half = x.shape[-1] // 2
    return t * 0.1 ** (torch.arange(half, dtype=x.dtype, device=x.device) / half)


def pairs_turned(x, angle):
    a, b = x[..., ::2], x[..., 1::2]
    c, s = angle.cos(), angle.sin()
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)


# neighbours turned against each other
def rotary_neighbours(wrong):
    class Rotary(Function):
        @staticmethod
        def forward(ctx, x):
            check(x.ndim >= 2 and x.shape[-1] % 2 == 0, "expected (*, length, even)")
            return pairs_turned(x, angles(x))

        @staticmethod
        def backward(ctx, grad_y):
            angle = angles(grad_y)
            if not wrong:
                return pairs_turned(grad_y, -angle)
            with torch.no_grad():
                a, b = grad_y[..., ::2].clone(), grad_y[..., 1::2].clone()
                c, s = angle.cos(), angle.sin()
                grad_y[..., ::2] = a * c + b * s
                grad_y[..., 1::2] = b * c - a * s
            return grad_y

    return lambda x: Rotary.apply(x)


add(
    "rotary_in_place",
    rotary_neighbours,
    lambda: (real(3, 4),),
    bug="Backward turns grad_output in place, as an in-place rotary kernel does",
    trigger="whoever else reads grad_output",
)


def rotary_offset(wrong):
    class Rotary(Function):
        @staticmethod
        def forward(ctx, x, offset):
            check(x.ndim >= 2 and x.shape[-1] % 2 == 0, "expected (*, length, even)")
            ctx.offset = offset
            return pairs_turned(x, angles(x, offset))

        @staticmethod
        def backward(ctx, grad_y):
            offset = 0 if wrong else ctx.offset
            angle = angles(grad_y, offset)
            return pairs_turned(grad_y, -angle), None

    return lambda x, offset=0: Rotary.apply(x, offset)


add(
    "rotary_offset",
    rotary_offset,
    lambda: (real(3, 4),),
    bug="Backward turns back from position 0, whatever the offset was",
    trigger="an offset",
    kwargs=lambda: {"offset": 0},
)


# angle = t f; halves turned; f is trained
def rotary_frequencies(wrong):
    class Rotary(Function):
        @staticmethod
        def forward(ctx, x, f):
            sized("x", x, None, None, 2 * f.shape[0] if f.ndim == 1 else 0)
            ctx.save_for_backward(x, f)
            angle = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None] * f
            a, b = x.chunk(2, -1)
            c, s = angle.cos(), angle.sin()
            return torch.cat([a * c - b * s, a * s + b * c], -1)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, f = ctx.saved_tensors
            rows = x.reshape(-1, x.shape[-1])
            g = grad_y.reshape(rows.shape)
            t = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
            here = t.repeat(x.shape[0])
            a, b = rows.chunk(2, -1)
            ga, gb = g.chunk(2, -1)
            angle = here[:, None] * f
            c, s = angle.cos(), angle.sin()
            grad_x = torch.cat([ga * c + gb * s, gb * c - ga * s], -1).reshape(x.shape)
            grad_angle = gb * (a * c - b * s) - ga * (a * s + b * c)
            if wrong:
                here = torch.arange(len(rows), dtype=x.dtype, device=x.device)
            return grad_x, (here[:, None] * grad_angle).sum(0)

    return lambda x, f: Rotary.apply(x, f)


add(
    "rotary_frequencies",
    rotary_frequencies,
    lambda: (real(1, 3, 4), uniform(2, low=0.2, high=1.0, seed=1)),
    bug="The frequencies' gradient counts positions through the flattened batch",
    trigger="a batch of more than one",
)
