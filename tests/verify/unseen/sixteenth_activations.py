"""Activations."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.sixteenth import add, expect


class GeGLU(Function):
    @staticmethod
    def forward(ctx, x, approximate):
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        a, b = x.chunk(2, -1)
        return a * F.gelu(b, approximate=approximate)

    @staticmethod
    def exact(b):
        cdf = (1 + torch.erf(b / math.sqrt(2))) / 2
        return b * cdf, cdf + b * torch.exp(-b.square() / 2) / math.sqrt(2 * math.pi)

    @staticmethod
    def by_tanh(b):
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (b + 0.044715 * b**3))
        near = b.clamp(-20, 20)  # beyond, 1 - t² is 0 and its factor may be inf
        slope = (1 + t) / 2 + near / 2 * (1 - t.square()) * c * (1 + 3 * 0.044715 * near.square())
        return b * (1 + t) / 2, slope

    @staticmethod
    def gradients(ctx, g, gelu):
        a, b = ctx.saved_tensors[0].chunk(2, -1)
        y, slope = gelu(b)
        return torch.cat((g * y, g * a * slope), -1), None

    @staticmethod
    def backward(ctx, g):
        return GeGLU.gradients(ctx, g, GeGLU.exact if ctx.approximate == "none" else GeGLU.by_tanh)


class GeGLUExact(GeGLU):
    @staticmethod
    def backward(ctx, g):
        return GeGLU.gradients(ctx, g, GeGLU.exact)


def _geglu(function):
    def geglu(x, approximate="none"):
        """a gelu(b) of x (*, 2 D), a its first half, b its second; approximate is "none" or "tanh"."""
        expect(x.dim() and x.shape[-1] % 2 == 0, "x (*, 2 D)", tuple(x.shape))
        expect(approximate in ("none", "tanh"), '"none" or "tanh"', approximate)
        return function.apply(x, approximate)

    return geglu


add(
    "geglu_approximate",
    _geglu,
    GeGLUExact,
    GeGLU,
    lambda: (real(3, 8),),
    bug="backward ignores approximate",
    shows='approximate="tanh"',
)


class RReLU(Function):
    @staticmethod
    def forward(ctx, x, noise, lower, upper, training):
        ctx.save_for_backward(x, noise)
        ctx.options = lower, upper, training
        return torch.where(x >= 0, x, x * RReLU.slope(noise, lower, upper, training))

    @staticmethod
    def slope(noise, lower, upper, training):
        return lower + (upper - lower) * noise if training else (lower + upper) / 2

    @staticmethod
    def backward(ctx, g):
        x, noise = ctx.saved_tensors
        return torch.where(x >= 0, g, g * RReLU.slope(noise, *ctx.options)), None, None, None, None


class RReLUTraining(RReLU):
    @staticmethod
    def backward(ctx, g):
        x, noise = ctx.saved_tensors
        lower, upper, _ = ctx.options
        slope = RReLU.slope(noise, lower, upper, True)
        return torch.where(x >= 0, g, g * slope), None, None, None, None


def _rrelu(function):
    def rrelu(x, noise, lower=1 / 8, upper=1 / 3, training=True):
        """x, or where it is negative x times lower + (upper - lower) noise; not training: times their mean.

        noise, of x's shape, is a constant of numbers drawn from 0 to 1; lower and upper from 0 to 1.
        """
        expect(x.shape == noise.shape, "noise of x's shape", tuple(noise.shape))
        expect(0 <= lower <= upper <= 1, "0 <= lower <= upper <= 1", (lower, upper))
        return function.apply(x, noise.detach(), lower, upper, training)

    return rrelu


def rrelu_sample():
    return real(3, 4), torch.rand(
        3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


add(
    "rrelu_training",
    _rrelu,
    RReLUTraining,
    RReLU,
    rrelu_sample,
    bug="backward ignores training",
    shows="training=False",
)


class Maxout(Function):
    @staticmethod
    def forward(ctx, x, pieces):
        ctx.save_for_backward(x)
        ctx.pieces = pieces
        return x.unflatten(-1, (-1, pieces)).amax(-1)

    @staticmethod
    def gradients(ctx, g, share):
        x = ctx.saved_tensors[0].unflatten(-1, (-1, ctx.pieces))
        at = (x == x.amax(-1, keepdim=True)).to(x.dtype)
        return (g[..., None] * share(at)).flatten(-2), None

    @staticmethod
    def backward(ctx, g):
        return Maxout.gradients(ctx, g, lambda at: at / at.sum(-1, keepdim=True))


class MaxoutTies(Maxout):
    @staticmethod
    def backward(ctx, g):
        return Maxout.gradients(ctx, g, lambda at: at)


def _maxout(function):
    def maxout(x, pieces=2):
        """The largest of each piece: x (*, C pieces), C > 0, to (*, C). Ties share the gradient."""
        expect(isinstance(pieces, int) and pieces > 0, "pieces > 0", pieces)
        expect(
            x.dim() and x.shape[-1] and x.shape[-1] % pieces == 0, "x (*, C pieces)", tuple(x.shape)
        )
        return function.apply(x, pieces)

    return maxout


add(
    "maxout_ties",
    _maxout,
    MaxoutTies,
    Maxout,
    lambda: (real(3, 6),),
    bug="x == max gives every one of the equal elements the whole gradient",
    shows="ties",
)


class RadialLayer(Function):
    @staticmethod
    def bases(x, centres, width):
        u = (x[..., None] - centres) / width
        return u, torch.exp(-u.square())

    @staticmethod
    def forward(ctx, x, w, centres, width):
        ctx.save_for_backward(x, w, centres)
        ctx.width = width
        return torch.einsum("nik,oik->no", RadialLayer.bases(x, centres, width)[1], w)

    @staticmethod
    def gradients(ctx, g, slope):
        x, w, centres = ctx.saved_tensors
        u, b = RadialLayer.bases(x, centres, ctx.width)
        d = torch.einsum("no,oik->nik", g, w)
        grad_x = (d * slope(u, ctx.width) * b).sum(-1)
        return grad_x, torch.einsum("no,nik->oik", g, b), None, None

    @staticmethod
    def backward(ctx, g):
        return RadialLayer.gradients(ctx, g, lambda u, width: -2 * u / width)


class RadialLayerInner(RadialLayer):
    @staticmethod
    def backward(ctx, g):
        return RadialLayer.gradients(ctx, g, lambda u, width: -2 * u)


def _radial_layer(function):
    def radial_layer(x, w, centres, width=0.5):
        """Σ w exp(-((x - c) / width)²) of x (N, I), with w (O, I, K) and the constants c: centres (K,).

        width from 0.05 to 10.
        """
        expect(
            x.dim() == 2 and w.dim() == 3 and w.shape[1] == x.shape[1],
            "x (N, I), w (O, I, K)",
            tuple(w.shape),
        )
        expect(centres.shape == w.shape[2:], "centres (K,)", tuple(centres.shape))
        expect(0.05 <= width <= 10, "width from 0.05 to 10", width)
        return function.apply(x, w, centres.detach(), width)

    return radial_layer


add(
    "radial_layer_width",
    _radial_layer,
    RadialLayerInner,
    RadialLayer,
    lambda: (real(4, 3), real(2, 3, 5, seed=1), torch.linspace(-1, 1, 5, dtype=torch.float64)),
    bug="the inner derivative 1 / width is left out",
    shows="the sample",
)
