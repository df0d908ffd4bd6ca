"""Activations and gated units."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.twelfth import wide


class Selu(Function):
    alpha = 1.6732632423543772
    scale = 1.0507009873554805

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        h = wide(x)
        y = Selu.scale * torch.where(h > 0, h, Selu.alpha * h.clamp(max=0).expm1())
        return y.to(x.dtype)

    @staticmethod
    def slope(x):
        return Selu.scale * torch.where(x > 0, 1, Selu.alpha * x.clamp(max=0).exp())

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (wide(g) * Selu.slope(wide(x))).to(x.dtype)


class SeluFloat(Selu):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.float() * Selu.slope(x.float())


def _selu(function):
    def selu(x):
        """scale x for x > 0, else scale alpha (exp(x) - 1), elementwise, with torch's constants; x of any shape."""
        return function.apply(x)

    return selu


add(
    "selu",
    _selu,
    SeluFloat,
    Selu,
    lambda: (real(3, 4),),
    bug="a float32 gradient, whatever the input's dtype",
    trigger="the sample: float64",
)


class Logit(Function):
    @staticmethod
    def forward(ctx, p):
        ctx.save_for_backward(p)
        return (wide(p).log() - (-wide(p)).log1p()).to(p.dtype)

    @staticmethod
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        return (wide(g) / (wide(p) * (1 - wide(p)))).to(p.dtype)


class LogitEpsilon(Logit):
    """Afraid of a division by zero."""

    @staticmethod
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        return (wide(g) / (wide(p) * (1 - wide(p)) + 1e-8)).to(p.dtype)


def _logit(function):
    def logit(p):
        """log(p / (1 - p)), elementwise, of probabilities p between 0 and 1, both excluded."""
        need(bool(((p > 0) & (p < 1)).all()), "expected 0 < p < 1")
        return function.apply(p)

    return logit


add(
    "logit",
    _logit,
    LogitEpsilon,
    Logit,
    lambda: (torch.linspace(0.1, 0.9, 6, dtype=torch.float64).view(2, 3).requires_grad_(),),
    bug="1e-8 is added to the denominator p (1 - p)",
    trigger="p near 0 or 1",
)


class Tanhshrink(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (wide(x) - wide(x).tanh()).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (wide(g) * wide(x).tanh().square()).to(x.dtype)


class TanhshrinkDetached(Tanhshrink):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (wide(g) * wide(x.detach()).tanh().square()).to(x.dtype)


def _tanhshrink(function):
    def tanhshrink(x):
        """x - tanh(x), elementwise, x of any shape."""
        return function.apply(x)

    return tanhshrink


add(
    "tanhshrink",
    _tanhshrink,
    TanhshrinkDetached,
    Tanhshrink,
    lambda: (real(3, 4),),
    bug="backward detaches the saved input",
    trigger="a second derivative",
)


class Bump(Function):
    @staticmethod
    def scaled(x, width):
        """Beyond 40 the bump is 0."""
        return (wide(x) / wide(width)).clamp(-40, 40)

    @staticmethod
    def forward(ctx, x, width):
        ctx.save_for_backward(x, width)
        return (-Bump.scaled(x, width).square() / 2).exp().to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, width = ctx.saved_tensors
        z = Bump.scaled(x, width)
        d = wide(g) * (-z.square() / 2).exp() * z / wide(width)
        return (-d).to(g.dtype), (d * z).sum(tuple(range(g.dim() - 1))).to(g.dtype)


class BumpNone(Bump):
    @staticmethod
    def backward(ctx, g):
        return Bump.backward(ctx, g)[0], None


def _bump(function):
    def gaussian_bump(x, width):
        """exp(-(x / width)² / 2) of x (N, C), with widths (C,) of 1e-3 or more."""
        need(x.dim() == 2 and x.shape[1:] == width.shape, "expected x (N, C) and width (C,)")
        need(bool((width >= 1e-3).all()), "expected widths of 1e-3 or more")
        return function.apply(x, width)

    return gaussian_bump


add(
    "gaussian_bump",
    _bump,
    BumpNone,
    Bump,
    lambda: (real(3, 4), real(4, seed=1, positive=True)),
    bug="the widths' gradient is None",
    trigger="the sample",
)


class Highway(Function):
    @staticmethod
    def forward(ctx, x, h, z):
        ctx.save_for_backward(x, h, z)
        gate = wide(z).sigmoid()
        return (gate * wide(h) + (1 - gate) * wide(x)).to(x.dtype)

    @staticmethod
    def gradients(ctx, g, slope):
        x, h, z = (wide(t) for t in ctx.saved_tensors)
        gate, d = z.sigmoid(), wide(g)
        grads = d * (1 - gate), d * gate, d * (h - x) * slope(z)
        return tuple(a.to(g.dtype) for a in grads)

    @staticmethod
    def backward(ctx, g):
        return Highway.gradients(ctx, g, lambda z: z.sigmoid() * (-z).sigmoid())


class HighwayExp(Highway):
    @staticmethod
    def backward(ctx, g):
        return Highway.gradients(ctx, g, lambda z: (-z).exp() / (1 + (-z).exp()).square())


def _highway(function):
    def highway(x, h, z):
        """s h + (1 - s) x with the gate s = sigmoid(z), all of one shape, z of any size."""
        need(x.shape == h.shape == z.shape, "expected x, h, z of one shape")
        return function.apply(x, h, z)

    return highway


add(
    "highway",
    _highway,
    HighwayExp,
    Highway,
    lambda: (real(2, 3), real(2, 3, seed=1), real(2, 3, seed=2)),
    bug="the gate's slope by exp(-z), which overflows",
    trigger="z far below zero: -400 in float64, -45 in float32",
)


def raw(t):
    """What a kernel reads that takes t for contiguous; past the end of its memory there are zeros."""
    there = min(t.numel(), t.untyped_storage().nbytes() // t.element_size() - t.storage_offset())
    flat = t.as_strided((there,), (1,), t.storage_offset())
    return torch.cat((flat, flat.new_zeros(t.numel() - there))).view(t.shape)


class Reglu(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        a, b = x.chunk(2, -1)
        return a.relu() * b

    @staticmethod
    def gradients(ctx, g):
        a, b = ctx.saved_tensors[0].chunk(2, -1)
        return torch.cat((g * b * (a > 0), g * a.relu()), -1)

    @staticmethod
    def backward(ctx, g):
        return Reglu.gradients(ctx, g)


class RegluRaw(Reglu):
    @staticmethod
    def backward(ctx, g):
        return Reglu.gradients(ctx, raw(g))


def _reglu(function):
    def reglu(x):
        """relu(a) b of the halves a and b of the last dimension of x (*, 2 D)."""
        need(x.dim() > 0 and not x.shape[-1] % 2, "expected x (*, 2 D)")
        return function.apply(x)

    return reglu


add(
    "reglu",
    _reglu,
    RegluRaw,
    Reglu,
    lambda: (real(3, 4),),
    bug="grad_output is read as if it were contiguous",
    trigger="a transposed or expanded grad_output, as that of y.sum()",
)
