"""Modes, calls, layouts, transforms and types."""

import torch
from torch import nn
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentieth import HALF
from tests.verify.unseen.twentyfifth import add, add_bare, check, same, sized
from tests.verify.unseen.twentysecond import read


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


# A scaled shift y = x + s t with its own rule for vmap
def scaled_shift(wrong):
    class Shift(Function):
        @staticmethod
        def forward(x, s, t):
            return x + s * t

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs[1:])

        @staticmethod
        def backward(ctx, grad_y):
            s, t = ctx.saved_tensors
            return grad_y, grad_y * t, grad_y * s

        @staticmethod
        def vmap(info, in_dims, x, s, t):
            def front(a, d):
                return a.expand(info.batch_size, *a.shape) if d is None else a.movedim(d, 0)

            if wrong:
                first = next(d for d in in_dims if d is not None)
                in_dims = [None if d is None else first for d in in_dims]
            return Shift.apply(*(front(a, d) for a, d in zip((x, s, t), in_dims, strict=True))), 0

    def shift(x, s, t):
        same(x, s, t)
        return Shift.apply(x, s, t)

    return shift


add(
    "scaled_shift_dimensions",
    scaled_shift,
    lambda: (real(3, 3), real(3, 3, seed=1), real(3, 3, seed=2)),
    bug="The rule for vmap takes all batched inputs to have the first one's batch dimension",
    trigger="vmap over different dimensions",
)


# Cartesian from polar coordinates: (r cos a, r sin a)
def from_polar(wrong):
    class FromPolar(Function):
        @staticmethod
        def forward(r, a):
            return r * a.cos(), r * a.sin()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_x, grad_y):
            r, a = ctx.saved_tensors
            grad_r = grad_x * a.cos() + grad_y * a.sin()
            return grad_r, r * (grad_y * a.cos() - grad_x * a.sin())

        @staticmethod
        def jvp(ctx, tangent_r, tangent_a):
            r, a = ctx.saved_tensors
            turn = r * tangent_a
            tangent_x = tangent_r * a.cos() - turn * a.sin()
            return tangent_x, tangent_r * a.sin() + turn * (a.sin() if wrong else a.cos())

    def cartesian(r, a):
        same(r, a)
        return FromPolar.apply(r, a)

    return cartesian


add(
    "from_polar_tangent",
    from_polar,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="The rule for forward mode has the sine twice in the second output",
    trigger="forward mode",
)


# A black box y = sin(x) x^2 whose gradient autograd finds
def black_box(wrong):
    def function(x):
        return x.sin() * x * x

    class Box(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            if not wrong:
                return function(x)
            with torch.enable_grad():
                ctx.x = x.detach().requires_grad_()
                ctx.y = function(ctx.x)
            return ctx.y.detach()

        @staticmethod
        def backward(ctx, grad_y):
            second = torch.is_grad_enabled()
            if wrong:
                return torch.autograd.grad(
                    ctx.y, ctx.x, grad_y, retain_graph=True, create_graph=second
                )
            with torch.enable_grad():
                (x,) = ctx.saved_tensors
                x = x.view_as(x) if second else x.detach().requires_grad_()
                return torch.autograd.grad(function(x), x, grad_y, create_graph=second)

    return lambda x: Box.apply(x)


add(
    "black_box_second",
    black_box,
    lambda: (real(3, 4),),
    bug="The graph was recorded in forward, from a detached copy of x",
    trigger="double backward",
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


# Silu of (N, L, D)
def strided_silu(wrong):
    class Silu(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x.sigmoid()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong:
                grad_y = read(grad_y, (grad_y.stride(0), grad_y.shape[2], grad_y.stride(2)))
            s = x.sigmoid()
            return grad_y * s * (1 + x * (1 - s))

    def silu(x):
        sized("x", x, None, None, None)
        return Silu.apply(x)

    return silu


add(
    "strided_silu_middle",
    strided_silu,
    lambda: (real(2, 3, 4),),
    bug="The kernel is given the outer and the inner stride of grad_output, but not the middle one",
    trigger="a grad_output with N and L exchanged in memory",
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


# Energies of bands of some width: y_b = sum of x^2 in band b
def band_energies(wrong):
    class Energies(Function):
        @staticmethod
        def forward(ctx, x, width):
            ctx.save_for_backward(x)
            ctx.width = width
            bands = x.square().split(width)
            y = torch.zeros(len(bands), device=x.device, dtype=None if wrong else x.dtype)
            for i, band in enumerate(bands):
                y[i] = band.sum()
            return y

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            band = torch.arange(len(x), device=x.device) // ctx.width
            return 2 * x * grad_y.to(x.dtype)[band], None

    def energies(x, width=3):
        sized("x", x, None)
        check(width >= 1, "width: expected a number of at least 1")
        return Energies.apply(x, width)

    return energies


add(
    "band_energies_dtype",
    band_energies,
    lambda: (real(8),),
    bug="The result is made in torch's default dtype, into which float64 numbers are written",
    trigger="float64 x",
)
