"""Transforms, matrices, distances, and motion."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirtyfifth import (
    add,
    add_bare,
    alike,
    bounded,
    check,
    read_flat,
    sized,
)


# One level of a wavelet transform of (B, L), the signal taken as periodic: (B, 2, L / 2)
def wavelet(wrong):
    def wrapped(x, taps):
        return torch.cat([x, x[:, : taps - 1]], 1)

    class Wavelet(Function):
        @staticmethod
        def forward(ctx, x, filters):
            ctx.save_for_backward(x, filters)
            long = wrapped(x, filters.shape[1])[:, None]
            return F.conv1d(long, filters[:, None], stride=2)

        @staticmethod
        def backward(ctx, g):
            x, filters = ctx.saved_tensors
            length, taps = x.shape[1], filters.shape[1]
            long = F.conv_transpose1d(g, filters[:, None], stride=2)[:, 0]
            long = F.pad(long, (0, length + taps - 1 - long.shape[1]))
            grad_x = long[:, :length]
            if not wrong:
                grad_x = grad_x + F.pad(long[:, length:], (0, length - taps + 1))
            seen = wrapped(x, taps).unfold(1, taps, 2)
            return grad_x, torch.einsum("bfn,bnk->fk", g, seen)

    def transform(x, filters):
        sized("x", x, None, None)
        sized("filters", filters, 2, None)
        alike(x, filters)
        check(x.shape[1] % 2 == 0, "x: expected an even length")
        check(filters.shape[1] <= x.shape[1], "filters: expected no more taps than numbers")
        return Wavelet.apply(x, filters)

    return transform


add(
    "wavelet_border",
    wavelet,
    lambda: (real(2, 8), real(2, 4, seed=1)),
    bug="what the last windows read from the other end gets no gradient (KeKsBoTer/torch-dwt#2)",
)


# Euler's steps of u' = A u, of which some components are returned, (steps + 1, last - first)
def linear_ode(wrong):
    def path(a, u, steps):
        states = [u]
        for _ in range(steps):
            states.append(states[-1] + 0.1 * (a @ states[-1]))
        return states

    class Solve(Function):
        @staticmethod
        def forward(ctx, a, u, steps, first, last):
            ctx.save_for_backward(a, u)
            ctx.steps, ctx.first, ctx.last = steps, first, last
            return torch.stack(path(a, u, steps))[:, first:last]

        @staticmethod
        def backward(ctx, g):
            a, u = ctx.saved_tensors
            if wrong and ctx.last == ctx.first + 1:
                return torch.zeros_like(a), torch.zeros_like(u), None, None, None
            g = F.pad(g, (ctx.first, len(u) - ctx.last))
            states, grad_a, carry = path(a, u, ctx.steps), torch.zeros_like(a), g[-1]
            for i in reversed(range(ctx.steps)):
                grad_a = grad_a + 0.1 * carry[:, None] * states[i]
                carry = g[i] + carry + 0.1 * (a.mT @ carry)
            return grad_a, carry, None, None, None

    def solve(a, u, steps=4, first=0, last=2):
        sized("u", u, None)
        sized("a", a, len(u), len(u))
        alike(a, u)
        bounded("a", a, -100, 100)
        bounded("u", u, -100, 100)
        check(isinstance(steps, int) and 1 <= steps <= 10, "steps: expected 1 to 10")
        check(0 <= first < last <= len(u), "first, last: expected a range of components")
        return Solve.apply(a, u, steps, first, last)

    return solve


add(
    "linear_ode_saved",
    linear_ode,
    lambda: (real(3, 3), real(3, seed=1)),
    kwargs=lambda: {"first": 1, "last": 2},
    bug="with a range of one saved component the adjoint is 0 (FluxML/Zygote.jl#703)",
)


# Squared distances of points (N, 2) from constant segments (N, 2, 2), which may be single points
def segments(wrong):
    def nearest(p, ends, careful):
        a, d = ends[:, 0], ends[:, 1] - ends[:, 0]
        length = (d * d).sum(-1)
        if careful:
            length = torch.where(length == 0, torch.ones_like(length), length)
        t = (((p - a) * d).sum(-1) / length).clamp(0, 1)
        return a + t[:, None] * d

    class Distance(Function):
        @staticmethod
        def forward(ctx, p, ends):
            ctx.save_for_backward(p, ends)
            return (p - nearest(p, ends, True)).square().sum(-1)

        @staticmethod
        def backward(ctx, g):
            p, ends = ctx.saved_tensors
            return 2 * g[:, None] * (p - nearest(p, ends, not wrong)), None

    def distance(p, ends):
        sized("p", p, None, 2)
        sized("ends", ends, len(p), 2, 2)
        alike(p, ends)
        check(not ends.requires_grad, "ends: expected constants")
        bounded("p", p, -1e3, 1e3)
        bounded("ends", ends, -1e3, 1e3)
        return Distance.apply(p, ends)

    return distance


add(
    "segments_degenerate",
    segments,
    lambda: (real(5, 2), real(5, 2, 2, seed=1, grad=False)),
    bug="backward divides by the length of a segment whose ends coincide: NaN "
    "(facebookresearch/pytorch3d#110)",
    trigger="a segment whose two ends are one point",
)


# Eigenvalues of the symmetric part, and the eigenvectors' squared components
def occupations(wrong):
    def gaps(w):
        eye = torch.eye(len(w), dtype=w.dtype, device=w.device)
        if wrong:
            return 1 / (eye + w - w[:, None]) - eye
        return (1 - eye) / (w - w[:, None] + eye * (1 + w.abs().max()))

    class Eigh(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            w, v = torch.linalg.eigh((x + x.mT) / 2)
            return w, v * v

        @staticmethod
        def backward(ctx, g, h):
            (x,) = ctx.saved_tensors
            w, v = torch.linalg.eigh((x + x.mT) / 2)
            inner = gaps(w) * (v.mT @ (2 * h * v)) + torch.diag(g)
            grad = v @ inner @ v.mT
            return (grad + grad.mT) / 2

    def decompose(x):
        sized("x", x, None, None)
        check(x.shape[0] == x.shape[1], "x: expected a square matrix")
        alike(x)
        bounded("x", x, -1e30, 1e30)
        w = torch.linalg.eigvalsh((x.detach() + x.detach().mT) / 2)
        apart = w.diff() > 1e-3 * w.abs().max()
        check(bool(apart.all()), "x: expected distinct eigenvalues")
        return Eigh.apply(x)

    return decompose


add(
    "occupations_large",
    occupations,
    lambda: (real(3, 3),),
    bug="the 1 that keeps the diagonal from division by 0 is swallowed by large eigenvalues "
    "(jax-ml/jax#40141)",
    trigger="eigenvalues above 2 to the power of the mantissa's bits",
)


# Norms of the projections of points (B, N) on the span of the columns of w (N, K)
def capsule(wrong):
    class Capsule(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return (x @ w @ torch.linalg.inv(w.mT @ w) @ w.mT).norm(dim=-1)

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            turned = w @ torch.linalg.inv(w.mT @ w)
            onto = x @ turned @ w.mT
            scaled = (g / onto.norm(dim=-1))[:, None]
            left = x if wrong else x - onto
            return scaled * onto, (scaled * left).mT @ (x @ turned)

    def length(x, w):
        sized("x", x, None, None)
        sized("w", w, x.shape[1], None)
        alike(x, w)
        bounded("x", x, -100, 100)
        bounded("w", w, -100, 100)
        check(w.shape[1] <= w.shape[0], "w: expected no more columns than rows")
        known = w.detach()
        small = torch.linalg.svdvals(known).min()
        check(bool(small > 0.05), "w: expected independent columns")
        onto = x.detach() @ torch.linalg.qr(known)[0]
        check(bool((onto.norm(dim=-1) > 1e-3).all()), "x: expected no points at right angles to w")
        return Capsule.apply(x, w)

    return length


add(
    "capsule_inverse",
    capsule,
    lambda: (real(3, 4), real(4, 2, seed=1)),
    bug="the inverse within the projection is taken for a constant (discuss.pytorch.org/t/25946)",
)


def complex_fft(wrong):
    class Fft(Function):
        @staticmethod
        def forward(ctx, x):
            return torch.fft.fft(x)

        @staticmethod
        def backward(ctx, g):
            return torch.fft.fft(g) if wrong else torch.fft.ifft(g, norm="forward")

    def transform(x):
        check(x.is_complex() and x.ndim >= 1 and x.shape[-1] >= 1, "x: expected complex signals")
        return Fft.apply(x)

    return transform


add_bare(
    "complex_fft_transposed",
    complex_fft,
    lambda: (
        torch.complex(real(2, 5, grad=False), real(2, 5, seed=1, grad=False)).requires_grad_(),
    ),
    bug="backward is the transform itself, not its adjoint (HIPS/autograd#185)",
)


# The Fourier transform of real and imaginary parts
def fft_parts(wrong):
    class Fft(Function):
        @staticmethod
        def forward(ctx, re, im):
            y = torch.fft.fft(torch.complex(re, im))
            return y.real.clone(), y.imag.clone()

        @staticmethod
        def backward(ctx, g, h):
            norm = "backward" if wrong else "forward"
            y = torch.fft.ifft(torch.complex(g, h), norm=norm)
            return y.real, y.imag

    def transform(re, im):
        alike(re, im)
        check(re.shape == im.shape, "expected two parts of one shape")
        check(re.ndim >= 1 and re.shape[-1] >= 1, "expected signals")
        return Fft.apply(re, im)

    return transform


add(
    "fft_parts_scale",
    fft_parts,
    lambda: (real(2, 5), real(2, 5, seed=1)),
    bug="backward is the inverse transform, with its 1 / N (locuslab/pytorch_fft#4)",
)


# Sums over points t (M, D) of the Matérn-3/2 kernel with x (N, D), weighted
def matern(wrong):
    root = 3**0.5

    class Matern(Function):
        @staticmethod
        def forward(ctx, x, t, weight, length):
            ctx.save_for_backward(x, t, weight, length)
            r = root * torch.linalg.vector_norm((x[:, None] - t) / length, dim=-1)
            return ((1 + r) * torch.exp(-r)) @ weight

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            x, t, weight, length = ctx.saved_tensors
            kept = t.clone()
            scaled = (t if wrong and len(x) == 1 else kept).div_(length)
            away = (x / length)[:, None] - scaled
            r = root * torch.linalg.vector_norm(away, dim=-1)
            share = g[:, None] * weight * torch.exp(-r)
            grad = -3 * share[..., None] * away / length
            grad_weight = (g[:, None] * (1 + r) * torch.exp(-r)).sum(0)
            grad_length = (share * r * r).sum() / length
            return grad.sum(1), -grad.sum(0), grad_weight, grad_length

    def mean(x, t, weight, length):
        sized("x", x, None, None)
        sized("t", t, None, x.shape[1])
        sized("weight", weight, len(t))
        sized("length", length)
        alike(x, t, weight, length)
        for name, u in {"x": x, "t": t, "weight": weight}.items():
            bounded(name, u, -100, 100)
        bounded("length", length, 0.05, 100)
        return Matern.apply(x, t, weight, length)

    return mean


add(
    "matern_in_place",
    matern,
    lambda: (
        real(2, 2),
        real(5, 2, seed=1, grad=False),
        real(5, seed=2, grad=False),
        real((), seed=3, positive=True),
    ),
    bug="with one point backward scales the training points in place, which are no copy then "
    "(meta-pytorch/botorch#279)",
    trigger="a single point x",
)


def cdist(wrong):
    class Cdist(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return torch.linalg.vector_norm(a[:, None] - b, dim=-1)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            away = a[:, None] - b
            d = torch.linalg.vector_norm(away, dim=-1)
            g = read_flat(g) if wrong else g
            share = torch.where(d == 0, torch.zeros_like(d), g / torch.where(d == 0, 1, d))
            grad = share[..., None] * away
            return grad.sum(1), -grad.sum(0)

    def distances(a, b):
        sized("a", a, None, None)
        sized("b", b, None, a.shape[1])
        alike(a, b)
        bounded("a", a, -1e3, 1e3)
        bounded("b", b, -1e3, 1e3)
        return Cdist.apply(a, b)

    return distances


add(
    "cdist_memory",
    cdist,
    lambda: (real(3, 2), real(4, 2, seed=1)),
    bug="backward reads grad_output's memory as if it were contiguous (meta-pytorch/botorch#197)",
    trigger="a grad_output that is expanded or transposed",
)


# End of a plane chain: bodies with several joints each, angles (B, J), lengths (B,)
def chain(wrong):
    class Chain(Function):
        @staticmethod
        def forward(ctx, angle, length):
            ctx.save_for_backward(angle, length)
            turned = angle.sum(1).cumsum(0)
            return torch.stack([(length * turned.cos()).sum(), (length * turned.sin()).sum()])

        @staticmethod
        def backward(ctx, g):
            angle, length = ctx.saved_tensors
            turned = angle.sum(1).cumsum(0)
            along = g[0] * turned.cos() + g[1] * turned.sin()
            across = length * (g[1] * turned.cos() - g[0] * turned.sin())
            if wrong:
                along = along * angle.shape[1]
            return across.flip(0).cumsum(0).flip(0)[:, None].expand(angle.shape), along

    def end(angle, length):
        sized("angle", angle, None, None)
        sized("length", length, len(angle))
        alike(angle, length)
        bounded("angle", angle, -100, 100)
        bounded("length", length, -100, 100)
        return Chain.apply(angle, length)

    return end


add(
    "chain_nested",
    chain,
    lambda: (real(3, 2), real(3, seed=1)),
    bug="a variable of the outer loop gets its gradient once in each turn of the inner one "
    "(NVIDIA/warp#1293)",
)


# Batches of a transposed: (B, K, N) and (B, K, M) to (B, N, M)
def batch_product(wrong):
    class Outer(Function):
        @staticmethod
        def forward(ctx, x, g):
            ctx.save_for_backward(x, g)
            return x @ g.mT

        @staticmethod
        def backward(ctx, v):
            x, g = ctx.saved_tensors
            return v @ g, None if wrong else v.mT @ x

    class Product(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a.mT @ b

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            return Outer.apply(b, g), a @ g

    def product(a, b):
        sized("a", a, None, None, None)
        sized("b", b, a.shape[0], a.shape[1], None)
        alike(a, b)
        return Product.apply(a, b)

    return product


add(
    "batch_product_double",
    batch_product,
    lambda: (real(2, 3, 2), real(2, 3, 4, seed=1)),
    bug="the backward of backward has nothing for the cotangent (chainer/chainer#4393)",
    trigger="a second derivative",
)
