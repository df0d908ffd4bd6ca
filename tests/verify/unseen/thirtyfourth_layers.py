"""Layers: sampling, attention, gates, embeddings, norms, compositing."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.thirtyfourth import (
    add,
    add_bare,
    alike,
    bounded,
    check,
    indices,
    read_flat,
    same,
    sized,
)


# Each place of a signal (B, C, L) reads, linearly interpolated, at its offset (B, L); outside are zeros
def deformable(wrong):
    def neighbours(x, place, low):
        found = []
        for i in (low, low + 1):
            inside = (i >= 0) & (i < x.shape[-1])
            row = i.clamp(0, x.shape[-1] - 1)[:, None].expand_as(x)
            found.append((row, inside[:, None].to(x.dtype)))
        return found, (place - low)[:, None]

    class Sample(Function):
        @staticmethod
        def forward(ctx, x, offset):
            ctx.save_for_backward(x, offset)
            place = offset + torch.arange(x.shape[-1], device=x.device)
            ((i, in_i), (j, in_j)), t = neighbours(x, place, place.floor().long())
            return (1 - t) * x.gather(-1, i) * in_i + t * x.gather(-1, j) * in_j

        @staticmethod
        def backward(ctx, g):
            x, offset = ctx.saved_tensors
            place = offset + torch.arange(x.shape[-1], device=x.device)
            low = place.long() if wrong else place.floor().long()
            ((i, in_i), (j, in_j)), t = neighbours(x, place, low)
            grad_x = torch.zeros_like(x).scatter_add(-1, i, g * (1 - t) * in_i)
            grad_x = grad_x.scatter_add(-1, j, g * t * in_j)
            return grad_x, (g * (x.gather(-1, j) * in_j - x.gather(-1, i) * in_i)).sum(1)

    def sample(x, offset):
        sized("x", x, None, None, None)
        sized("offset", offset, x.shape[0], x.shape[2])
        alike(x, offset)
        bounded("x", x, -1e3, 1e3)
        bounded("offset", offset, -1e3, 1e3)
        return Sample.apply(x, offset)

    return sample


add(
    "deformable_truncates",
    deformable,
    lambda: (real(2, 3, 7), real(2, 7, seed=1)),
    bug="Backward truncates the place to an integer where forward takes the floor",
    trigger="places between -1 and 0 (one in this sample)",
)


# Cross attention whose mask says which keys count; where none does, the output is 0
def cross_attention(wrong):
    def weights(q, k, keep, careful):
        s = q @ k.mT * q.shape[-1] ** -0.5
        keep = keep[:, None].expand_as(s)
        if careful:
            alive = keep.any(-1, keepdim=True)
            s = s.masked_fill(~keep & alive, -torch.inf)
            return torch.where(alive, s.softmax(-1), torch.zeros_like(s))
        return s.masked_fill(~keep, -torch.inf).softmax(-1)

    class Attend(Function):
        @staticmethod
        def forward(ctx, q, k, v, keep):
            ctx.save_for_backward(q, k, v, keep)
            return weights(q, k, keep, True) @ v

        @staticmethod
        def backward(ctx, g):
            q, k, v, keep = ctx.saved_tensors
            p = weights(q, k, keep, not wrong)
            grad_p = g @ v.mT
            grad_s = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
            return grad_s @ k, grad_s.mT @ q, p.mT @ g, None

    def attend(q, k, v, keep):
        sized("q", q, None, None, None)
        sized("k", k, q.shape[0], None, q.shape[2])
        sized("v", v, q.shape[0], k.shape[1], None)
        sized("keep", keep, q.shape[0], k.shape[1])
        alike(q, k, v)
        check(keep.dtype == torch.bool, "keep: expected booleans")
        for name, t in {"q": q, "k": k, "v": v}.items():
            bounded(name, t, -100, 100)
        return Attend.apply(q, k, v, keep)

    return attend


add(
    "cross_attention_nothing",
    cross_attention,
    lambda: (
        real(2, 3, 4),
        real(2, 5, 4, seed=1),
        real(2, 5, 2, seed=2),
        torch.tensor([[True, True, True, True, False], [True, True, False, False, False]]),
    ),
    bug="Backward's softmax lacks the case that no key counts: NaN",
    trigger="a batch entry all of whose keys are masked",
)


# x = [a, b] along the last dimension: a gelu(b)
def geglu(wrong):
    def slope(b):
        cdf = (1 + torch.erf(b * 0.5**0.5)) / 2
        return cdf + b.clamp(-40, 40) * torch.exp(-b * b / 2) * 0.3989422804014327

    class Geglu(Function):
        @staticmethod
        def forward(x):
            a, b = x.chunk(2, -1)
            return a * F.gelu(b)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            a, b = x.chunk(2, -1)
            return torch.cat([g * F.gelu(b), g * a * slope(b)], -1)

        @staticmethod
        def vmap(info, in_dims, x):
            (dim,) = in_dims if isinstance(in_dims, tuple) else (in_dims,)
            if wrong:
                return Geglu.apply(x), dim
            return Geglu.apply(x.movedim(dim, 0)), 0

    def gate(x):
        check(x.ndim >= 1 and x.shape[-1] % 2 == 0, "x: expected an even last dimension")
        check(x.is_floating_point(), "expected floating point numbers")
        return Geglu.apply(x)

    return gate


add(
    "geglu_vmap",
    geglu,
    lambda: (real(3, 8),),
    bug="The vmap rule keeps the batch dimension in its place, even the last, which is split",
    trigger="vmap over the last dimension",
)


# Colours (R, N, 3) composited from front to back with opacities (R, N)
def composite(wrong):
    def shares(opacity):
        through = torch.cumprod(1 - opacity, -1)
        return torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], -1)

    class Composite(Function):
        @staticmethod
        def forward(ctx, colour, opacity):
            ctx.save_for_backward(colour, opacity)
            return ((shares(opacity) * opacity)[..., None] * colour).sum(1)

        @staticmethod
        def backward(ctx, g):
            colour, opacity = ctx.saved_tensors
            light = shares(opacity)
            value = (colour * g[:, None]).sum(-1)
            grad_colour = (light * opacity)[..., None] * g[:, None]
            if wrong:
                w = light * opacity * value
                behind = w.sum(-1, keepdim=True) - w.cumsum(-1)
                return grad_colour, light * value - behind / (1 - opacity).clamp(min=1e-10)
            behind, rows = torch.zeros_like(value[:, 0]), []
            for i in reversed(range(value.shape[1])):
                rows.append(light[:, i] * (value[:, i] - behind))
                behind = opacity[:, i] * value[:, i] + (1 - opacity[:, i]) * behind
            return grad_colour, torch.stack(rows[::-1], -1)

    def over(colour, opacity):
        sized("colour", colour, None, None, 3)
        sized("opacity", opacity, *colour.shape[:2])
        alike(colour, opacity)
        bounded("colour", colour, -100, 100)
        bounded("opacity", opacity, 0, 1)
        return Composite.apply(colour, opacity)

    return over


add(
    "composite_opaque",
    composite,
    lambda: (real(2, 5, 3), real(2, 5, seed=1, grad=False).sigmoid().requires_grad_()),
    bug="Backward divides what lies behind by the transparency, clamped at 1e-10",
    trigger="an opacity of 1 that is not the last",
)


# silu(a) b over flat memory in blocks of 128
def swiglu_blocks(wrong):
    class Swiglu(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return F.silu(a) * b

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            s = a.sigmoid()
            grad_a, grad_b = g * b * s * (1 + a * (1 - s)), g * a * s
            if wrong:
                done = max(a.numel() // 128, 1) * 128
                live = (torch.arange(a.numel(), device=a.device) < done).view(a.shape)
                grad_a, grad_b = grad_a * live, grad_b * live
            return grad_a, grad_b

    def gate(a, b):
        same(a, b)
        alike(a, b)
        bounded("a", a, -1e3, 1e3)
        bounded("b", b, -1e3, 1e3)
        return Swiglu.apply(a, b)

    return gate


add(
    "swiglu_blocks_rest",
    swiglu_blocks,
    lambda: (real(3, 8), real(3, 8, seed=1)),
    bug="Backward's number of blocks is rounded down: the rest gets a gradient of 0",
    trigger="more than 128 numbers, no multiple of 128",
)


# A map (C, H, W) read at places (N, 2) from -1 to 1, (x, y), corners aligned; outside counts the border
def grid_read(wrong):
    def corners(m, place):
        size = torch.tensor([m.shape[2] - 1, m.shape[1] - 1], device=m.device, dtype=place.dtype)
        p = ((place + 1) / 2 * size).clamp(min=0)
        p = torch.minimum(p, size)
        low = torch.minimum(p.floor(), (size - 1).clamp(min=0))
        t = p - low
        x, y = low.long().unbind(-1)
        x1, y1 = (x + 1).clamp(max=m.shape[2] - 1), (y + 1).clamp(max=m.shape[1] - 1)
        return x, y, x1, y1, t[:, 0], t[:, 1], size

    class Read(Function):
        @staticmethod
        def forward(ctx, m, place):
            ctx.save_for_backward(m, place)
            x, y, x1, y1, s, t, _ = corners(m, place)
            top = m[:, y, x] * (1 - s) + m[:, y, x1] * s
            return top * (1 - t) + (m[:, y1, x] * (1 - s) + m[:, y1, x1] * s) * t

        @staticmethod
        def backward(ctx, g):
            m, place = ctx.saved_tensors
            x, y, x1, y1, s, t, size = corners(m, place)
            flat = torch.zeros_like(m).flatten(1)
            for j, i, w in (
                (y, x, (1 - s) * (1 - t)),
                (y, x1, s * (1 - t)),
                (y1, x, (1 - s) * t),
                (y1, x1, s * t),
            ):
                flat = flat.index_add(1, j * m.shape[2] + i, g * w)
            a, b, c, d = m[:, y, x], m[:, y, x1], m[:, y1, x], m[:, y1, x1]
            grad_x = (g * ((b - a) * (1 - t) + (d - c) * t)).sum(0)
            grad_y = (g * ((c - a) * (1 - s) + (d - b) * s)).sum(0)
            grad_place = torch.stack([grad_x, grad_y], -1) * size / 2
            if not wrong:
                grad_place = torch.where(place.abs() <= 1, grad_place, torch.zeros_like(place))
            return flat.view(m.shape), grad_place

    def read(m, place):
        sized("m", m, None, None, None)
        sized("place", place, None, 2)
        alike(m, place)
        bounded("m", m, -1e3, 1e3)
        bounded("place", place, -100, 100)
        return Read.apply(m, place)

    return read


add(
    "grid_read_outside",
    grid_read,
    lambda: (real(2, 4, 5), (real(6, 2, seed=1, grad=False).tanh() * 0.9).requires_grad_()),
    bug="A place that was clamped to the border gets the gradient of the border's place",
    trigger="a place outside of the map",
)


# Weighted sums of a table's rows; places with the padding's id do not count
def bag(wrong):
    class Bag(Function):
        @staticmethod
        def forward(ctx, table, weight, ids, padding):
            ctx.save_for_backward(table, weight, ids)
            ctx.padding = padding
            live = (ids != padding).to(table.dtype)
            return ((weight * live)[..., None] * table[ids]).sum(1)

        @staticmethod
        def backward(ctx, g):
            table, weight, ids = ctx.saved_tensors
            live = (ids != ctx.padding).to(table.dtype)
            rows = (weight * live)[..., None] * g[:, None]
            grad_table = torch.zeros_like(table).index_add(0, ids.flatten(), rows.flatten(0, 1))
            grad_weight = (table[ids] * g[:, None]).sum(-1)
            return grad_table, grad_weight if wrong else grad_weight * live, None, None

    def embed(table, weight, ids, padding=0):
        sized("table", table, None, None)
        sized("weight", weight, None, None)
        sized("ids", ids, *weight.shape)
        indices("ids", ids, len(table))
        alike(table, weight)
        bounded("table", table, -1e4, 1e4)
        bounded("weight", weight, -1e4, 1e4)
        return Bag.apply(table, weight, ids, padding)

    return embed


add(
    "bag_padding_weight",
    bag,
    lambda: (
        real(6, 3),
        real(2, 4, seed=1),
        torch.tensor([[3, 1, 5, 0], [2, 2, 0, 0]]),
    ),
    bug="The weights of padded places get a gradient",
    trigger="ids with the padding, as the sample has",
)


# RMS norm with a gain, gated: it takes half types and computes in float32
def gated_norm(wrong):
    def up(t):
        return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t

    class Norm(Function):
        @staticmethod
        def forward(ctx, x, z, gain):
            ctx.save_for_backward(x, z, gain)
            h, z, w = up(x), up(z), up(gain)
            r = torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)
            return (h * r * w * F.silu(z)).to(x.dtype)

        @staticmethod
        def backward(ctx, grad_y):
            x, z, gain = ctx.saved_tensors
            square = up(x.square()) if wrong else up(x).square()
            r = torch.rsqrt(square.mean(-1, keepdim=True) + 1e-5)
            h, z, w, g = up(x), up(z), up(gain), up(grad_y)
            s = z.sigmoid()
            n = h * r
            grad_n = g * w * z * s
            grad_h = r * (grad_n - n * (grad_n * n).mean(-1, keepdim=True))
            grad_z = g * n * w * s * (1 + z * (1 - s))
            grad_gain = (g * n * z * s).flatten(0, -2).sum(0)
            return grad_h.to(x.dtype), grad_z.to(x.dtype), grad_gain.to(x.dtype)

    def norm(x, z, gain):
        check(x.ndim >= 2 and x.numel() > 0, "x: expected two dimensions at least")
        same(x, z)
        sized("gain", gain, x.shape[-1])
        alike(x, z, gain)
        bounded("x", x, -1e4, 1e4)
        bounded("z", z, -1e2, 1e2)
        bounded("gain", gain, -1e2, 1e2)
        return Norm.apply(x, z, gain)

    return norm


add(
    "gated_norm_square",
    gated_norm,
    lambda: (real(2, 3, 6), real(2, 3, 6, seed=1), real(6, seed=2)),
    bug="Backward squares x in its own type, in which float16 overflows",
    trigger="float16 with numbers above 256",
    own=True,
)


# A linear layer whose weight is divided by its spectral norm, of which the singular vectors are kept
def spectral_linear(wrong):
    def up(t):
        return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t

    class Divide(Function):
        @staticmethod
        def forward(ctx, w, u, v, constant):
            ctx.save_for_backward(w, u, v)
            ctx.constant = constant
            norm = (up(w) * up(u)[:, None] * up(v)).sum()
            return (up(w) / norm).to(w.dtype)

        @staticmethod
        def backward(ctx, g):
            w, u, v = ctx.saved_tensors
            dtype = w.dtype
            w, u, v, g = up(w), up(u), up(v), up(g)
            norm = (w * u[:, None] * v).sum()
            if ctx.constant:
                return (g / norm).to(dtype), None, None, None
            along = (g * w).sum() / norm
            return ((g - along * u[:, None] * v) / norm).to(dtype), None, None, None

    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            w = real(3, 4, seed=5, grad=False)
            u, _, v = torch.linalg.svd(w)
            self.weight, self.bias = nn.Parameter(w), nn.Parameter(real(3, seed=6, grad=False))
            self.register_buffer("u", u[:, 0].clone())
            self.register_buffer("v", v[0].clone())

        def forward(self, x):
            w = Divide.apply(self.weight, self.u, self.v, wrong and not self.training)
            return x @ w.mT + self.bias

    return Spectral()


add_bare(
    "spectral_eval",
    spectral_linear,
    lambda: (real(5, 4),),
    bug="In eval mode backward takes the spectral norm for a constant, as if the weight were frozen",
    trigger="eval mode with a weight that trains",
)


# Rotary embedding of (B, T, D) from position `offset` on, halves as pairs
def rotary(wrong):
    def angles(x, offset):
        half = x.shape[-1] // 2
        place = torch.arange(offset, offset + x.shape[1], device=x.device, dtype=F64)
        speed = 100.0 ** (-torch.arange(half, device=x.device, dtype=F64) / half)
        angle = place[:, None] * speed
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    class Rotary(Function):
        @staticmethod
        def forward(ctx, x, offset):
            ctx.offset = offset
            cos, sin = angles(x, offset)
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        @staticmethod
        def backward(ctx, g):
            cos, sin = angles(g, ctx.offset)
            a, b = (read_flat(g) if wrong else g).chunk(2, -1)
            return torch.cat([a * cos + b * sin, b * cos - a * sin], -1), None

    def rotate(x, offset=0):
        sized("x", x, None, None, None)
        check(x.shape[-1] % 2 == 0, "x: expected an even last dimension")
        check(isinstance(offset, int) and offset >= 0, "offset: expected an integer >= 0")
        check(x.is_floating_point(), "expected floating point numbers")
        return Rotary.apply(x, offset)

    return rotate


add(
    "rotary_memory",
    rotary,
    lambda: (real(2, 3, 4),),
    kwargs=lambda: {"offset": 3},
    bug="Backward reads grad_output's memory as if it were contiguous",
    trigger="a grad_output that is expanded or transposed",
)
