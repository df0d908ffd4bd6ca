"""Layers of the last years, first drafts."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fourteenth import add, require


class DynamicTanh(Function):
    @staticmethod
    def forward(ctx, x, alpha, gain, bias):
        t = (alpha * x).tanh()
        y = t * gain + bias
        ctx.save_for_backward(x, alpha, gain, bias)
        return y

    @staticmethod
    def gradients(ctx, g, kept):
        x, alpha, gain, bias = ctx.saved_tensors
        t = (alpha * x).tanh()
        d = g * gain * (1 - kept(t, t * gain + bias) ** 2)
        rows = g.reshape(-1, g.shape[-1])
        return d * alpha, (d * x).sum(), (rows * t.reshape(rows.shape)).sum(0), rows.sum(0)

    @staticmethod
    def backward(ctx, g):
        return DynamicTanh.gradients(ctx, g, lambda t, y: t)


class DynamicTanhOutput(DynamicTanh):
    @staticmethod
    def backward(ctx, g):
        return DynamicTanh.gradients(ctx, g, lambda t, y: y)


def _dynamic_tanh(function):
    def dynamic_tanh(x, alpha, gain, bias):
        """gain tanh(alpha x) + bias of x (..., D), D > 0, with gain and bias (D,), and a scalar alpha ()."""
        require(
            x.dim() > 0 and x.shape[-1] > 0 and alpha.dim() == 0, "x: (..., D), D > 0; alpha: ()"
        )
        require(gain.shape == bias.shape == x.shape[-1:], "gain and bias must be (D,)")
        return function.apply(x, alpha, gain, bias)

    return dynamic_tanh


add(
    "dynamic_tanh_output",
    _dynamic_tanh,
    DynamicTanhOutput,
    DynamicTanh,
    lambda: (real(3, 4), real((), seed=1), real(4, seed=2), real(4, seed=3)),
    bug="1 - y² of the layer's output in place of tanh's",
    trigger="a gain that is not 1, or a bias that is not 0",
)


class GatedRms(Function):
    @staticmethod
    def rms(x):
        rstd = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return x * rstd, rstd

    @staticmethod
    def forward(ctx, x, z, w, norm_first):
        ctx.save_for_backward(x, z, w)
        ctx.norm_first = norm_first
        if norm_first:
            return GatedRms.rms(x)[0] * w * F.silu(z)
        return GatedRms.rms(x * F.silu(z))[0] * w

    @staticmethod
    def gradients(ctx, g, norm_first):
        x, z, w = ctx.saved_tensors
        gate, sigmoid = F.silu(z), z.sigmoid()
        slope = sigmoid * (1 + z * (1 - sigmoid))
        y, rstd = GatedRms.rms(x if norm_first else x * gate)
        d = g * w * (gate if norm_first else 1)
        dx = rstd * (d - y * (d * y).mean(-1, keepdim=True))
        dw = g * y * (gate if norm_first else 1)
        dw = dw.reshape(-1, w.numel()).sum(0)
        if norm_first:
            return dx, g * y * w * slope, dw, None
        return dx * gate, dx * x * slope, dw, None

    @staticmethod
    def backward(ctx, g):
        return GatedRms.gradients(ctx, g, ctx.norm_first)


class GatedRmsOrder(GatedRms):
    @staticmethod
    def backward(ctx, g):
        return GatedRms.gradients(ctx, g, False)


def _gated_rms(function):
    def gated_rms(x, z, w, norm_first=False):
        """RMS norm of x silu(z), times w; or, norm_first, of x, times w silu(z). x, z (..., D), w (D,), D > 0."""
        require(x.shape == z.shape and x.dim() > 0, "x and z must be of one shape")
        require(w.shape == x.shape[-1:] and w.numel() > 0, "w must be (D,), D > 0")
        return function.apply(x, z, w, norm_first)

    return gated_rms


add(
    "gated_rms_order",
    _gated_rms,
    GatedRmsOrder,
    GatedRms,
    lambda: (real(2, 4), real(2, 4, seed=1), real(4, seed=2)),
    bug="backward knows one order of gate and norm",
    trigger="norm_first=True",
)


class NewtonSchulz(Function):
    factors = 3.4445, -4.775, 2.0315

    @staticmethod
    def step(x):
        a, b, c = NewtonSchulz.factors
        square = x @ x.mT
        return a * x + (b * square + c * square @ square) @ x

    @staticmethod
    def step_back(g, x):
        a, b, c = NewtonSchulz.factors
        square = x @ x.mT
        d = g @ x.mT
        d = b * d + c * (d @ square + square @ d)
        return a * g + (b * square + c * square @ square) @ g + (d + d.mT) @ x

    @staticmethod
    def forward(ctx, m, steps):
        ctx.save_for_backward(m)
        ctx.steps = steps
        x = m / m.norm()
        for _ in range(steps):
            x = NewtonSchulz.step(x)
        return x

    @staticmethod
    def gradients(ctx, g, project):
        (m,) = ctx.saved_tensors
        kept = [m / m.norm()]
        for _ in range(ctx.steps - 1):
            kept.append(NewtonSchulz.step(kept[-1]))
        for x in reversed(kept):
            g = NewtonSchulz.step_back(g, x)
        return project(g, kept[0]) / m.norm(), None

    @staticmethod
    def backward(ctx, g):
        return NewtonSchulz.gradients(ctx, g, lambda g, x: g - x * (g * x).sum())


class NewtonSchulzNorm(NewtonSchulz):
    @staticmethod
    def backward(ctx, g):
        return NewtonSchulz.gradients(ctx, g, lambda g, x: g)


def _newton_schulz(function):
    def newton_schulz(m, steps=5):
        """About the orthogonal factor of a matrix m (N, M), by 1 to 10 of Newton and Schulz's steps.

        The matrix's norm is in [1e-6, 1e6].
        """
        size = m.detach().norm()
        require(m.dim() == 2 and bool(1e-6 <= size <= 1e6), "m: a matrix, its norm in [1e-6, 1e6]")
        require(isinstance(steps, int) and 1 <= steps <= 10, "steps must be 1 to 10")
        return function.apply(m, steps)

    return newton_schulz


add(
    "newton_schulz_norm",
    _newton_schulz,
    NewtonSchulzNorm,
    NewtonSchulz,
    lambda: (real(3, 4),),
    bug="the norm by which the matrix is divided is taken for a constant",
    trigger="the sample",
)


class Kan(Function):
    @staticmethod
    def basis(x, count):
        """The bells (N, D, G) at x, how far they are away, and their distance from each other."""
        grid = torch.linspace(-2, 2, count, dtype=x.dtype, device=x.device)
        width = 4 / (count - 1)
        away = x.unsqueeze(-1) - grid
        return (-((away / width) ** 2)).exp(), away, width

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return Kan.basis(x, w.shape[2])[0].flatten(1) @ w.flatten(1).mT

    @staticmethod
    def gradients(ctx, g, power):
        x, w = ctx.saved_tensors
        bell, away, width = Kan.basis(x, w.shape[2])
        slope = -2 * away / width**power * bell
        grad = (torch.einsum("ne,edg->ndg", g, w) * slope).sum(-1)
        return grad, torch.einsum("ne,ndg->edg", g, bell)

    @staticmethod
    def backward(ctx, g):
        return Kan.gradients(ctx, g, 2)


class KanWidth(Kan):
    @staticmethod
    def backward(ctx, g):
        return Kan.gradients(ctx, g, 1)


def _kan(function):
    def kan(x, w):
        """A FastKAN layer (N, E) of x (N, D), with w (E, D, G): G > 1 bells between -2 and 2 for each input."""
        require(x.dim() == 2 and w.dim() == 3, "x must be (N, D), w (E, D, G)")
        require(w.shape[1] == x.shape[1] and w.shape[2] > 1, "w must be (E, D, G), G > 1")
        return function.apply(x, w)

    return kan


add(
    "kan_width",
    _kan,
    KanWidth,
    Kan,
    lambda: (real(3, 2), real(2, 2, 8, seed=1)),
    bug="the bell's slope is divided by its width once, not twice",
    trigger="the sample (any number of bells but 5)",
)


class StandardWeight(Function):
    eps = 1e-5

    @staticmethod
    def standard(w):
        w = w - w.mean(1, keepdim=True)
        std = w.square().mean(1, keepdim=True).sqrt()
        return w / (std + StandardWeight.eps), std

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return StandardWeight.standard(w)[0]

    @staticmethod
    def gradients(ctx, g, eps):
        y, std = StandardWeight.standard(ctx.saved_tensors[0])
        d = g / (std + StandardWeight.eps) - y * (g * y).mean(1, keepdim=True) / (std + eps)
        return d - d.mean(1, keepdim=True)

    @staticmethod
    def backward(ctx, g):
        return StandardWeight.gradients(ctx, g, 0)


class StandardWeightEps(StandardWeight):
    @staticmethod
    def backward(ctx, g):
        return StandardWeight.gradients(ctx, g, StandardWeight.eps)


def _standard_weight(function):
    def standard_weight(w):
        """The rows of w (N, D) less their mean, by their standard deviation plus 1e-5; no row is constant."""
        require(w.dim() == 2 and w.shape[1] > 1, "w must be (N, D), D > 1")
        spread = StandardWeight.standard(w.detach())[1]
        require(bool((spread >= 1e-10).all()), "no row may be constant")
        return function.apply(w)

    return standard_weight


add(
    "standard_weight_eps",
    _standard_weight,
    StandardWeightEps,
    StandardWeight,
    lambda: (real(3, 5),),
    bug="backward takes the deviation plus eps for the deviation",
    trigger="small weights (1e-4 and less)",
)
