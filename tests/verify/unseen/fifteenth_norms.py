"""Norms."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.twelfth import wide


def standard(x, dims):
    """x, centred and scaled over dims, and what scales it."""
    x = x - x.mean(dims, keepdim=True)
    rstd = (x.square().mean(dims, keepdim=True) + 1e-5).rsqrt()
    return x * rstd, rstd


def standard_backward(d, y, rstd, dims):
    mean, dot = d.mean(dims, keepdim=True), (d * y).mean(dims, keepdim=True)
    return rstd * (d - mean - y * dot)


class Instance(Function):
    """Materializes no zeros for an output that is not used."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        y, _ = standard(wide(x), -1)
        return (y * wide(w)[:, None]).to(x.dtype), wide(x).mean(-1).to(x.dtype)

    @staticmethod
    def backward(ctx, g, g_mean):
        x, w = ctx.saved_tensors
        grad_x = grad_w = None
        if g is not None:
            y, rstd = standard(wide(x), -1)
            grad_x = standard_backward(wide(g) * wide(w)[:, None], y, rstd, -1)
            grad_w = (wide(g) * y).sum((0, 2)).to(w.dtype)
        if g_mean is not None:
            to_x = (wide(g_mean) / x.shape[2])[..., None].expand_as(x)
            grad_x = to_x if grad_x is None else grad_x + to_x
        return None if grad_x is None else grad_x.to(x.dtype), grad_w


class InstanceEarly(Instance):
    @staticmethod
    def backward(ctx, g, g_mean):
        return (None, None) if g is None else Instance.backward(ctx, g, g_mean)


def _instance(function):
    def instance_norm(x, w):
        """Instance norm of x (N, C, L), eps 1e-5, with the gains w (C,), and the means (N, C); L > 0."""
        need(x.dim() == 3 and x.shape[2] > 0, "expected x (N, C, L), L > 0")
        need(w.shape == x.shape[1:2], "expected w (C,)")
        return function.apply(x, w)

    return instance_norm


add(
    "instance_norm",
    _instance,
    InstanceEarly,
    Instance,
    lambda: (real(2, 3, 4), real(3, seed=1)),
    bug="no gradient at all where the first output's is None",
    trigger="a loss of the means alone",
)


class LayerNorm2d(Function):
    @staticmethod
    def forward(ctx, x, w, b):
        y, rstd = standard(wide(x), (-2, -1))
        ctx.save_for_backward(y, rstd, w)
        return (y * wide(w) + wide(b)).to(x.dtype)

    @staticmethod
    def gradients(g, y, rstd, w):
        grad_x = standard_backward(wide(g) * wide(w), y, rstd, (-2, -1))
        rows = tuple(range(g.dim() - 2))
        grads = grad_x, (wide(g) * y).sum(rows) if rows else wide(g) * y
        return *(a.to(g.dtype) for a in grads), wide(g).sum(rows).to(g.dtype) if rows else g

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return LayerNorm2d.gradients(g, *ctx.saved_tensors)


class LayerNorm2dOutput(LayerNorm2d):
    """Saves its output in place of what it normalized."""

    @staticmethod
    def forward(ctx, x, w, b):
        y, rstd = standard(wide(x), (-2, -1))
        out = y * wide(w) + wide(b)
        ctx.save_for_backward(out, rstd, w, b)
        return out.to(x.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        out, rstd, w, b = ctx.saved_tensors
        safe = torch.where(w == 0, 1, wide(w))
        return LayerNorm2d.gradients(g, (out - wide(b)) / safe, rstd, w)


def _layer_norm_2d(function):
    def layer_norm_2d(x, w, b):
        """Layer norm of x (*, H, W) over the last two dimensions, eps 1e-5, with w and b (H, W); H, W > 0."""
        need(x.dim() > 1 and x.shape[-2:] == w.shape == b.shape, "expected x (*, H, W) and w, b")
        need(w.numel() > 0, "expected H, W > 0")
        return function.apply(x, w, b)

    return layer_norm_2d


add(
    "layer_norm_2d",
    _layer_norm_2d,
    LayerNorm2dOutput,
    LayerNorm2d,
    lambda: (real(2, 3, 2), real(3, 2, seed=1), real(3, 2, seed=2)),
    bug="the normalized input is got back from the output, divided by the gain",
    trigger="a gain of zero",
)


class PNorm(Function):
    @staticmethod
    def forward(ctx, x, p):
        most = wide(x).abs().amax(-1)
        scaled = wide(x).abs() / torch.where(most == 0, 1, most)[..., None]
        y = most * scaled.pow(p).sum(-1).pow(1 / p)
        ctx.save_for_backward(x, y)
        ctx.p = p
        return y.to(x.dtype)

    @staticmethod
    def slope(x, y, p):
        """sign(x) |x / y|^(p - 1), 0 in a row of zeros."""
        y = y[..., None]
        return x.sign() * (wide(x).abs() / torch.where(y == 0, 1, y)).pow(p - 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return (wide(g)[..., None] * PNorm.slope(x, y, ctx.p)).to(x.dtype), None


class PNormInPlace(PNorm):
    """Clears the rows of zeros in what it was given."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        g[y == 0] = 0
        return (wide(g)[..., None] * PNorm.slope(x, y, ctx.p)).to(x.dtype), None


def _p_norm(function):
    def p_norm(x, p=3.0):
        """(Σ |x|^p)^(1/p) of the rows of x (..., D), D > 0, 1 < p <= 8; the gradient of a row of zeros is 0."""
        need(x.dim() > 0 and x.shape[-1] > 0, "expected x (..., D), D > 0")
        need(1 < p <= 8, "expected 1 < p <= 8")
        return function.apply(x, p)

    return p_norm


add(
    "p_norm",
    _p_norm,
    PNormInPlace,
    PNorm,
    lambda: (real(3, 4),),
    bug="writes zeros into grad_output",
    trigger="a row of zeros, and grad_output looked at again; an expanded one raises",
)


class ResidualNorm(Function):
    """Draws its mask again in backward, from the seed."""

    @staticmethod
    def mask(x, p, seed):
        generator = torch.Generator(x.device).manual_seed(seed)
        draw = torch.rand(x.shape, generator=generator, dtype=torch.float32, device=x.device)
        return wide(draw >= p).to(wide(x).dtype) / (1 - p)

    @staticmethod
    def forward(ctx, x, residual, w, p, seed):
        ctx.save_for_backward(x, residual, w)
        ctx.p, ctx.seed = p, seed
        y, _ = standard(wide(x) * ResidualNorm.mask(x, p, seed) + wide(residual), -1)
        return (y * wide(w)).to(x.dtype)

    @staticmethod
    def gradients(ctx, g, shown):
        x, residual, w = ctx.saved_tensors
        mask = ResidualNorm.mask(x, ctx.p, ctx.seed)
        y, rstd = standard(wide(x) * mask + wide(residual), -1)
        d = standard_backward(wide(g) * wide(w), y, rstd, -1)
        grads = d * shown(mask), d, (wide(g) * y).flatten(0, -2).sum(0)
        return *(a.to(g.dtype) for a in grads), None, None

    @staticmethod
    def backward(ctx, g):
        return ResidualNorm.gradients(ctx, g, lambda mask: mask)


class ResidualNormAnew(ResidualNorm):
    """The branch's gradient goes through a mask with a seed of its own."""

    @staticmethod
    def backward(ctx, g):
        x, seed = ctx.saved_tensors[0], ctx.seed + 1
        return ResidualNorm.gradients(ctx, g, lambda _: ResidualNorm.mask(x, ctx.p, seed))


def _residual_norm(function):
    def residual_norm(x, residual, w, p=0.0, seed=0):
        """Layer norm of dropout(x) + residual, both (*, D), with the gains w (D,), eps 1e-5, D > 0.

        Of x a share p, 0 <= p < 1, is dropped, drawn from seed; what stays is divided by 1 - p.
        """
        need(x.dim() > 1 and x.shape == residual.shape, "expected x and residual (*, D)")
        need(x.shape[-1:] == w.shape and w.numel() > 0, "expected w (D,), D > 0")
        need(0 <= p < 1, "expected 0 <= p < 1")
        return function.apply(x, residual, w, p, seed)

    return residual_norm


add(
    "residual_norm",
    _residual_norm,
    ResidualNormAnew,
    ResidualNorm,
    lambda: (real(3, 4), real(3, 4, seed=1), real(4, seed=2), 0.5),
    bug="backward's mask is drawn from another seed than forward's",
    trigger="the sample",
)
