"""Signals, convolutions and a step of the heat equation."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.twelfth import wide


class Autocorrelation(Function):
    @staticmethod
    def inside(x, lengths):
        places = torch.arange(x.shape[1], device=x.device)
        return places < lengths[:, None]

    @staticmethod
    def forward(ctx, x, lengths, lags):
        ctx.save_for_backward(x, lengths)
        ctx.lags = lags
        h, total = wide(x).masked_fill(~Autocorrelation.inside(x, lengths), 0), x.shape[1]
        out = [(h[:, : total - lag] * h[:, lag:]).sum(1) for lag in range(lags)]
        return torch.stack(out, 1).to(x.dtype)

    @staticmethod
    def gradients(ctx, g, mask):
        x, lengths = ctx.saved_tensors
        h, total = wide(x).masked_fill(~Autocorrelation.inside(x, lengths), 0), x.shape[1]
        grad = torch.zeros_like(h)
        for lag in range(ctx.lags):
            d = wide(g[:, lag, None])
            grad = grad + F.pad(d * h[:, lag:], (0, lag)) + F.pad(d * h[:, : total - lag], (lag, 0))
        return grad.masked_fill(~mask(x, lengths), 0).to(g.dtype), None, None

    @staticmethod
    def backward(ctx, g):
        return Autocorrelation.gradients(ctx, g, Autocorrelation.inside)


class AutocorrelationPadded(Autocorrelation):
    @staticmethod
    def backward(ctx, g):
        return Autocorrelation.gradients(ctx, g, lambda x, _: torch.ones_like(x, dtype=torch.bool))


def _autocorrelation(function):
    def autocorrelation(x, lengths, lags=3):
        """Σ_t x_t x_(t + k) (N, lags) for k = 0 .. lags - 1, of x (N, T), 0 < lags <= T.

        Of row n the first lengths[n], from 0 to T, are signal, the rest padding.
        """
        need(x.dim() == 2 and 0 < lags <= x.shape[1], "expected x (N, T) and 0 < lags <= T")
        need(lengths.shape == x.shape[:1], "expected lengths (N,)")
        need(bool(((lengths >= 0) & (lengths <= x.shape[1])).all()), "expected lengths up to T")
        return function.apply(x, lengths, lags)

    return autocorrelation


add(
    "autocorrelation",
    _autocorrelation,
    AutocorrelationPadded,
    Autocorrelation,
    lambda: (real(2, 6), torch.tensor([6, 4])),
    bug="the padding gets a gradient",
    trigger="the sample: a length below the longest",
)


class Heat(Function):
    """The diffusivity's gradient is added up in blocks."""

    block = 64

    @staticmethod
    def laplacian(u):
        return u.roll(1) - 2 * u + u.roll(-1)

    @staticmethod
    def forward(ctx, u, kappa):
        ctx.save_for_backward(u, kappa)
        return (wide(u) + wide(kappa) * Heat.laplacian(wide(u))).to(u.dtype)

    @staticmethod
    def gradients(ctx, g, blocks):
        u, kappa = (wide(t) for t in ctx.saved_tensors)
        d, lap, total = wide(g), Heat.laplacian(u), torch.zeros_like(kappa)
        for i in range(blocks):
            part = slice(i * Heat.block, (i + 1) * Heat.block)
            total = total + (d[part] * lap[part]).sum()
        return (d + kappa * Heat.laplacian(d)).to(g.dtype), total.to(g.dtype)

    @staticmethod
    def backward(ctx, g):
        return Heat.gradients(ctx, g, -(-len(g) // Heat.block))


class HeatTail(Heat):
    @staticmethod
    def backward(ctx, g):
        return Heat.gradients(ctx, g, max(1, len(g) // Heat.block))


def _heat(function):
    def heat_step(u, kappa):
        """u + kappa (u_(i-1) - 2 u_i + u_(i+1)) of u (L,), periodic; kappa ()."""
        need(u.dim() == 1 and kappa.dim() == 0, "expected u (L,) and kappa ()")
        return function.apply(u, kappa)

    return heat_step


add(
    "heat_step",
    _heat,
    HeatTail,
    Heat,
    lambda: (real(8), torch.tensor(0.1, dtype=F64, requires_grad=True)),
    bug="what comes after the last full block of 64 is left out of kappa's gradient",
    trigger="more than 64 elements, no multiple of 64",
)


class CosineTransform(Function):
    @staticmethod
    def matrix(x):
        size = x.shape[-1]
        k = torch.arange(size, dtype=wide(x).dtype, device=x.device)
        m = (math.pi / size * k[:, None] * (k + 0.5)).cos() * math.sqrt(2 / size)
        return torch.cat((m[:1] / math.sqrt(2), m[1:]))

    @staticmethod
    def forward(ctx, x):
        return (wide(x) @ CosineTransform.matrix(x).mT).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        return (wide(g) @ CosineTransform.matrix(g)).to(g.dtype)


class CosineTransformSqueezed(CosineTransform):
    @staticmethod
    def backward(ctx, g):
        return (wide(g).squeeze() @ CosineTransform.matrix(g)).to(g.dtype)


def _cosine_transform(function):
    def cosine_transform(x):
        """The orthonormal discrete cosine transform (type 2) of the rows of x (N, D), D > 0."""
        need(x.dim() == 2 and x.shape[1] > 0, "expected x (N, D), D > 0")
        return function.apply(x)

    return cosine_transform


add(
    "cosine_transform",
    _cosine_transform,
    CosineTransformSqueezed,
    CosineTransform,
    lambda: (real(3, 4),),
    bug="backward squeezes all dimensions of size 1",
    trigger="one row, or rows of one element",
)
