"""Modes, calls, layouts, transforms and types."""

import torch
from torch import nn
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentieth import HALF
from tests.verify.unseen.twentyfifth import add, add_bare, check, same, sized


# A product of complex spectra, which a kernel computes
def spectra(wrong):
    def memory(t):
        """What lies at the tensor's address: a lazy conjugate is not conjugated there."""
        return t.conj() if wrong and t.is_conj() else t

    class Product(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            g = memory(grad_y)
            return g * w.conj(), g * x.conj()

    def product(x, w):
        same(x, w)
        if not (x.is_complex() and w.is_complex()):
            raise TypeError("x, w: expected complex numbers")
        return Product.apply(x, w)

    return product


def spectrum(seed):
    parts = real(3, 4, seed=seed, grad=False), real(3, 4, seed=seed + 10, grad=False)
    return torch.complex(*parts).requires_grad_()


add_bare(
    "spectra_lazy_conjugate",
    spectra,
    lambda: (spectrum(0), spectrum(1)),
    bug="The kernel is given grad_output's address, where a lazy conjugation has not been carried out",
    trigger="a grad_output that is the view conj() of another tensor",
)


# Gaussian smoothing of rows by a matrix of weights
def smoothed_rows(wrong):
    class Smooth(Function):
        kept: dict = {}  # noqa: RUF012

        @staticmethod
        def matrix(like, width):
            i = torch.arange(like.shape[-1], dtype=like.dtype, device=like.device)
            return (-((i[:, None] - i) ** 2) / (2 * width * width)).softmax(1)

        @staticmethod
        def forward(ctx, x, width):
            ctx.width = width
            m = Smooth.matrix(x, width)
            if wrong:
                Smooth.kept.setdefault((x.shape[-1], x.dtype, x.device), m)
            return x @ m.mT

        @staticmethod
        def backward(ctx, grad_y):
            m = Smooth.matrix(grad_y, ctx.width)
            if wrong:
                m = Smooth.kept[grad_y.shape[-1], grad_y.dtype, grad_y.device]
            return grad_y @ m, None

    def smooth(x, width=1.0):
        check(x.ndim >= 1 and x.shape[-1] >= 1, "x: expected (..., L)")
        check(width > 0, "width: expected a positive number")
        return Smooth.apply(x, width)

    return smooth


add(
    "smoothed_rows_width",
    smoothed_rows,
    lambda: (real(2, 5),),
    bug="Backward's table is kept by the rows' length, not by the width",
    trigger="calls with two widths",
)


# A layer that shrinks its input while it is trained
def trained_shrink(wrong):
    class Layer(nn.Module):
        factor = 0.5

        def forward(self, x):
            if x.is_complex():
                raise TypeError(f"x: expected real numbers, got {x.dtype}")
            return Slope.apply(x, self)

    class Slope(Function):
        @staticmethod
        def forward(ctx, x, layer):
            ctx.save_for_backward(x)
            ctx.layer, ctx.training = layer, layer.training
            return x.tanh() * (layer.factor if layer.training else 1)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            training = ctx.layer.training if wrong else ctx.training
            y = x.tanh()
            return grad_y * (1 - y * y) * (ctx.layer.factor if training else 1), None

    return Layer()


add_bare(
    "trained_shrink_mode",
    trained_shrink,
    lambda: (real(3, 4),),
    bug="Backward asks the layer for its mode, which may have changed since forward",
    trigger="eval() between forward and backward",
)


# Unit quaternions: y = q / (|q| + eps)
def unit_quaternion(wrong):
    eps = 1e-8

    def wide(t):
        return t.float() if t.dtype in HALF else t

    def parts(q):
        norm = q.square().sum(-1, keepdim=True)
        zero = norm == 0
        return torch.where(zero, 1, norm).sqrt(), zero

    class Unit(Function):
        @staticmethod
        def forward(ctx, q):
            ctx.save_for_backward(q)
            wider = wide(q)
            return (wider / (torch.linalg.vector_norm(wider, dim=-1, keepdim=True) + eps)).to(
                q.dtype
            )

        @staticmethod
        def backward(ctx, grad_y):
            (q,) = ctx.saved_tensors
            dtype = q.dtype
            if not wrong:
                q, grad_y = wide(q), wide(grad_y)
            norm, zero = parts(q)
            size = torch.where(zero, 0, norm)
            along = (grad_y * q).sum(-1, keepdim=True) / norm
            return (grad_y / (size + eps) - q * along / (size + eps) ** 2).to(dtype)

    def unit(q):
        check(q.ndim >= 1 and q.shape[-1] == 4, "q: expected (..., 4)")
        check(bool(wide(q).square().sum(-1).isfinite().all()), "q: expected finite norms")
        return Unit.apply(q)

    return unit


add(
    "unit_quaternion_half",
    unit_quaternion,
    lambda: (real(3, 4),),
    bug="The floor of 1e-8, which forward adds in float32, is 0 to backward's float16",
    trigger="float16 and a quaternion of zeros",
    own=True,
)


# Rows of probabilities at a low temperature
def cold_softmax(wrong):
    def wide(t):
        return t.float() if t.dtype in HALF else t

    class Softmax(Function):
        @staticmethod
        def forward(ctx, x, temperature):
            ctx.save_for_backward(x)
            ctx.t = temperature
            return (wide(x) / temperature).softmax(-1).to(x.dtype)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            dtype = x.dtype
            if not wrong:
                x, grad_y = wide(x), wide(grad_y)
            p = (x / ctx.t).softmax(-1)
            grad_x = p * (grad_y - (p * grad_y).sum(-1, keepdim=True)) / ctx.t
            return grad_x.to(dtype), None

    def softmax(x, temperature=0.01):
        check(x.ndim >= 1 and x.shape[-1] >= 1, "x: expected one class at least")
        check(temperature > 0, "temperature: expected a positive number")
        return Softmax.apply(x, temperature)

    return softmax


add(
    "cold_softmax_half",
    cold_softmax,
    lambda: (real(3, 4),),
    bug="Backward divides by the temperature in float16, forward in float32",
    trigger="float16 and logits of more than 655",
    own=True,
)


# A scale for each channel, with a fast way where the data needs no gradient
def channel_scale(wrong):
    class Scale(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            return grad_y * w, (grad_y * x).sum_to_size(w.shape)

    def scale(x, w):
        check(x.ndim >= 1, "x: expected (..., D)")
        sized("w", w, x.shape[-1])
        if wrong and not x.requires_grad:
            return x * w.detach()
        return Scale.apply(x, w)

    return scale


add(
    "channel_scale_first_layer",
    channel_scale,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="Where x needs no gradient the way without gradients is taken, though the scale needs one",
    trigger="data that needs no gradient, as in a first layer",
)


# A softmax along the first dimension with its own rule for vmap
def column_softmax(wrong):
    class Softmax(Function):
        @staticmethod
        def forward(x, dim):
            return x.softmax(dim)

        @staticmethod
        def setup_context(ctx, inputs, output):
            x, ctx.dim = inputs
            ctx.save_for_backward(x)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            p = x.softmax(ctx.dim)
            return p * (grad_y - (p * grad_y).sum(ctx.dim, keepdim=True)), None

        @staticmethod
        def vmap(info, in_dims, x, dim):
            return Softmax.apply(x.movedim(in_dims[0], 0), dim if wrong else dim + 1), 0

    def softmax(x):
        check(x.ndim >= 1, "x: expected one dimension at least")
        return Softmax.apply(x, 0)

    return softmax


add(
    "column_softmax_batch",
    column_softmax,
    lambda: (real(3, 4),),
    bug="The rule for vmap keeps the number of the dimension, which is now the batch's",
    trigger="vmap",
)
