"""Layers of networks: structured products, adapters, normalisation by neighbours, patches, packed rows."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentyfirst import add, check, indices, positive, sized


# Monarch: a blocks of b x b on the rows of x seen as a x b, then b blocks of a x a on its columns
def monarch(wrong):
    class Monarch(Function):
        @staticmethod
        def forward(ctx, x, p, q):
            a, b = p.shape[:2]
            inner = torch.einsum("nij,ijk->nki", x.view(-1, a, b), p)
            ctx.save_for_backward(x, p, q, inner)
            return torch.einsum("nji,jik->nkj", inner, q).reshape(len(x), a * b)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, p, q, inner = ctx.saved_tensors
            a, b = p.shape[:2]
            g = grad_y.reshape(-1, b, a) if wrong else grad_y.reshape(-1, a, b).mT
            grad_inner = torch.einsum("njk,jik->nji", g, q)
            grad_x = torch.einsum("nki,ijk->nij", grad_inner, p).reshape(len(x), a * b)
            grad_p = torch.einsum("nij,nki->ijk", x.view(-1, a, b), grad_inner)
            return grad_x, grad_p, torch.einsum("nji,njk->jik", inner, g)

    def layer(x, p, q):
        sized("p", p, None, None, p.shape[-1])
        a, b = p.shape[:2]
        sized("q", q, b, a, a)
        sized("x", x, None, a * b)
        return Monarch.apply(x.contiguous(), p, q)

    return layer


add(
    "monarch_order",
    monarch,
    lambda: (real(2, 6), real(2, 3, 3, seed=1), real(3, 2, 2, seed=2)),
    bug="Backward reads the output's memory in the order from before its transposition",
    trigger="a grad_output that varies",
)


# DoRA: y = x V' m / |V|, V = w + b a, with the norm of each row of V
def magnitude_adapter(wrong):
    class Adapter(nn.Module):
        def forward(self, x, w, a, b, m):
            v = w + b @ a
            size = v.norm(dim=1)
            check(bool((size > 0).all()), "expected rows other than 0")
            if wrong:
                size = size.detach()
            return x @ v.T * (m / size)

    adapter = Adapter()

    def layer(x, w, a, b, m):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        sized("a", a, None, x.shape[1])
        sized("b", b, len(w), len(a))
        sized("m", m, len(w))
        return adapter(x, w, a, b, m)

    return layer


add(
    "magnitude_adapter_norm",
    magnitude_adapter,
    lambda: (
        real(2, 3),
        real(4, 3, seed=1),
        real(2, 3, seed=2),
        real(4, 2, seed=3),
        real(4, seed=4),
    ),
    bug="The norm is detached to save memory, as DoRA (arXiv 2402.09353, 4.3) proposes",
)


# Divisive normalisation: x_i / sqrt(b_i + sum_j c_ij x_j^2)
def divisive(wrong):
    class Divide(Function):
        @staticmethod
        def forward(ctx, x, b, c):
            d = b + x.square() @ c.T
            ctx.save_for_backward(x, b, c)
            return x * d.rsqrt()

        @staticmethod
        def backward(ctx, grad_y):
            x, b, c = ctx.saved_tensors
            r = (b + x.square() @ c.T).rsqrt()
            grad_d = -grad_y * x * r**3 / 2
            back = grad_d @ (c.T if wrong else c)
            return grad_y * r + 2 * x * back, grad_d.sum(0), grad_d.T @ x.square()

    def layer(x, b, c):
        sized("x", x, None, None)
        sized("b", b, x.shape[1])
        sized("c", c, x.shape[1], x.shape[1])
        positive("b", b)
        check(bool((c >= 0).all()), "c: expected weights >= 0")
        return Divide.apply(x, b, c)

    return layer


def symmetric_weights():
    c = real(3, 3, seed=2, positive=True).detach()
    return ((c + c.T) / 2).requires_grad_()


add(
    "divisive_weights",
    divisive,
    lambda: (real(2, 3), real(3, seed=1, positive=True), symmetric_weights()),
    bug="Backward goes through the weights as forward does",
    trigger="weights that are not symmetric",
)


# Swin: four neighbours become one place with four times the channels, the upper row's second
def patch_merge(wrong):
    corners = [(0, 0), (1, 0), (0, 1), (1, 1)]

    class Merge(Function):
        @staticmethod
        def forward(ctx, x):
            return torch.cat([x[..., i::2, j::2, :] for i, j in corners], -1)

        @staticmethod
        def backward(ctx, grad_y):
            h, w, c = grad_y.shape[-3:]
            grad_x = grad_y.new_zeros(*grad_y.shape[:-3], 2 * h, 2 * w, c // 4)
            order = sorted(corners) if wrong else corners
            for (i, j), part in zip(order, grad_y.chunk(4, -1), strict=True):
                grad_x[..., i::2, j::2, :] = part
            return grad_x

    def merge(x):
        check(x.ndim >= 3, "expected (height, width, channels)")
        check(x.shape[-3] % 2 == 0 and x.shape[-2] % 2 == 0, "expected even sides")
        check(x.numel() > 0, "expected an image that is not empty")
        return Merge.apply(x)

    return merge


add(
    "patch_merge_corners",
    patch_merge,
    lambda: (real(4, 4, 2),),
    bug="Backward takes the four neighbours row by row",
    trigger="a grad_output that varies",
)


# Lightweight convolution: softmaxed taps, one set for each head's channels, over the past
def light_convolution(wrong):
    class Convolve(Function):
        @staticmethod
        def forward(ctx, x, w):
            windows, s = parts(x, w)
            ctx.save_for_backward(x, w)
            return (windows * s).sum(2)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            windows, s = parts(x, w)
            c, k = s.shape
            head = torch.arange(c, device=x.device)
            head = head % len(w) if wrong else head // (c // len(w))
            each = (windows * grad_y[:, :, None]).sum(0)
            taps = each.new_zeros(w.shape).index_add(0, head, each)
            p = w.softmax(1)
            grad_w = p * (taps - (p * taps).sum(1, keepdim=True))
            padded = F.pad(grad_y, (0, 0, 0, k - 1)).unfold(0, k, 1)
            return (padded * s.flip(1)).sum(2), grad_w

    def parts(x, w):
        s = w.softmax(1).repeat_interleave(x.shape[1] // len(w), 0)
        return F.pad(x, (0, 0, w.shape[1] - 1, 0)).unfold(0, w.shape[1], 1), s

    def convolve(x, w):
        sized("x", x, None, None)
        sized("w", w, None, None)
        check(x.shape[1] % len(w) == 0, "expected channels for every head")
        return Convolve.apply(x, w)

    return convolve


add(
    "light_convolution_heads",
    light_convolution,
    lambda: (real(5, 4), real(1, 3, seed=1)),
    bug="Backward deals the channels to the heads in turns",
    trigger="two heads or more",
)


# The mean of each of the sequences that are packed one after the other, 0 of an empty one
def packed_mean(wrong):
    def owner(cuts, n):
        if not wrong:
            places = torch.arange(n, device=cuts.device)
            return torch.searchsorted(cuts, places, right=True) - 1
        marks = torch.zeros(n + 1, dtype=torch.long, device=cuts.device)
        marks[cuts[1:-1]] = 1
        return marks.cumsum(0)[:n]

    class Mean(Function):
        @staticmethod
        def forward(ctx, x, cuts):
            ctx.save_for_backward(cuts)
            ctx.n = len(x)
            pairs = zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)
            return torch.stack([x[a:b].mean(0) if b > a else 0 * x[0] for a, b in pairs])

        @staticmethod
        def backward(ctx, grad_y):
            (cuts,) = ctx.saved_tensors
            share = grad_y / cuts.diff().clamp_min(1)[:, None]
            return share[owner(cuts, ctx.n)], None

    def mean(x, cuts):
        sized("x", x, None, None)
        sized("cuts", cuts, None)
        indices("cuts", cuts, len(x) + 1)
        check(len(cuts) >= 2 and bool((cuts.diff() >= 0).all()), "cuts: expected rising places")
        check(int(cuts[0]) == 0 and int(cuts[-1]) == len(x), "cuts: expected all rows")
        check(bool(x.isfinite().all()), "x: expected finite numbers")
        return Mean.apply(x, cuts)

    return mean


add(
    "packed_mean_empty",
    packed_mean,
    lambda: (real(6, 2), torch.tensor([0, 2, 3, 6])),
    bug="Backward counts the cuts before a row, but two at one place as one",
    trigger="an empty sequence",
)
