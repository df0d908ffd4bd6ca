"""Layers, with what goes wrong between a layer and the engine: layouts, state, memory, higher orders."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.twelfth import add, as_forward, in_float32, recorded, wide


class SquaredRelu(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu().square()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x.relu()


class SquaredReluFlat(SquaredRelu):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        grad = torch.empty_like(x)  # keeps the strides of x
        grad.as_strided((x.numel(),), (1,)).copy_((2 * g * x.relu()).reshape(-1))
        return grad


def _squared_relu(function):
    def squared_relu(x):
        """relu(x)² of x (any shape)."""
        return function.apply(x)

    return squared_relu


add(
    "relu_layout",
    _squared_relu,
    SquaredReluFlat,
    SquaredRelu,
    lambda: (real(3, 4),),
    bug="backward writes row by row into memory laid out as the input's",
    trigger="a transposed input",
)


class Gain(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def dense(g):
        return g

    @classmethod
    def gradients(cls, ctx, g):
        x, w = ctx.saved_tensors
        g = cls.dense(g)
        return g * w, (g * x).sum_to_size(w.shape)

    @staticmethod
    def backward(ctx, g):
        return Gain.gradients(ctx, g)


class GainStrides(Gain):
    @staticmethod
    def dense(g):
        if 0 in g.stride():  # sum() hands an expanded gradient
            return g.contiguous()
        strides = torch.empty(g.shape, device="meta").stride()
        return g.as_strided(g.shape, strides, g.storage_offset())

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return GainStrides.gradients(ctx, g)


def _gain(function):
    def channel_gain(x, w):
        """x w of x (..., C) and the gains w (C,)."""
        return function.apply(x, w)

    return channel_gain


add(
    "gain_grad_layout",
    _gain,
    GainStrides,
    Gain,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="backward reads grad_output as if it were contiguous",
    trigger="a transposed grad_output",
)


class GainAccumulated(Gain):
    """Rows are added up in blocks of 4, into a sum of the gradient's dtype."""

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        total = torch.zeros_like(w)
        for rows in (g * x).flatten(0, -2).split(4):
            total = total + rows.sum(0)
        return g * w, total


class GainSecond(Gain):
    """Accumulates in float32."""

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        total = torch.zeros_like(wide(w))
        for rows in (g * x).flatten(0, -2).split(4):
            total = total + wide(rows).sum(0)
        return g * w, total.to(w.dtype)


def _gain_rows(function):
    def row_gain(x, w):
        """x w of x (N, C) and the gains w (C,); any float dtype, sums in float32 at least."""
        return function.apply(x, w)

    return row_gain


add(
    "gain_narrow_sum",
    _gain_rows,
    GainAccumulated,
    GainSecond,
    lambda: (real(5, 3), real(3, seed=1)),
    bug="the gain's gradient is summed up in bfloat16",
    trigger="bfloat16 and thousands of rows of one sign",
)


class Mish(Function):
    """Keeps the input alone, and differentiates the formula again in backward."""

    @staticmethod
    def formula(x):
        return x * F.softplus(x).tanh()

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return Mish.formula(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if again else x.detach().requires_grad_()
            return torch.autograd.grad(Mish.formula(x), x, g, create_graph=again)[0]


class MishDetached(Mish):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(Mish.formula(x), x, g, create_graph=again)[0]


def _mish(function):
    def mish(x):
        """x tanh(softplus(x)) of x (any shape), twice differentiable."""
        return function.apply(x)

    return mish


add(
    "mish_recomputed",
    _mish,
    MishDetached,
    Mish,
    lambda: (real(2, 3),),
    bug="backward recomputes from a detached input: the second derivative lacks the term by x",
    trigger="a second derivative",
)


class Swish(Function):
    @staticmethod
    def forward(ctx, x, beta):
        ctx.save_for_backward(x)
        ctx.beta = beta
        return x * (beta * x).sigmoid()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = (ctx.beta * x).sigmoid()
        return g * s * (1 + ctx.beta * x * (1 - s)), None


class SwishAttribute(Swish):
    @staticmethod
    def forward(ctx, x, beta):
        ctx.x, ctx.beta = x.detach(), beta
        return x * (beta * x).sigmoid()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        s = (ctx.beta * ctx.x).sigmoid()
        return g * s * (1 + ctx.beta * ctx.x * (1 - s)), None


def _swish(function):
    def swish(x, beta=1.0):
        """x sigmoid(beta x) of x (any shape)."""
        return function.apply(x, beta)

    return swish


add(
    "swish_unsaved",
    _swish,
    SwishAttribute,
    Swish,
    lambda: (real(2, 3),),
    bug="the input lies on ctx, past save_for_backward's check of its version",
    trigger="an input changed in place before backward, where the twin raises",
)


class AddNorm(Function):
    """The sum x + r, and the sum over its root mean square."""

    @staticmethod
    def forward(ctx, x, r):
        s = x + r
        rms = (s.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        ctx.save_for_backward(x, r)
        return s / rms, s

    @staticmethod
    def norm_gradient(ctx, g):
        x, r = ctx.saved_tensors
        s = x + r
        rms = (s.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return (g - s * (g * s).mean(-1, keepdim=True) / rms.square()) / rms

    @staticmethod
    def backward(ctx, g, grad_s):
        grad = AddNorm.norm_gradient(ctx, g) + grad_s
        return grad, grad


class AddNormInPlace(AddNorm):
    @staticmethod
    @once_differentiable
    def backward(ctx, g, grad_s):
        grad = AddNorm.norm_gradient(ctx, g)
        grad = grad_s.add_(grad) if grad_s.is_contiguous() else grad_s + grad
        return grad, grad


def _add_norm(function):
    def add_norm(x, r):
        """RMS norm of x + r (*, D), and x + r itself for the next block."""
        return function.apply(x, r)

    return add_norm


add(
    "add_norm_grad_written",
    _add_norm,
    AddNormInPlace,
    AddNorm,
    lambda: (real(2, 4), real(2, 4, seed=1)),
    bug="backward adds into the second output's grad_output",
    trigger="a grad_output that is used again after backward",
)


class Gate(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        s = a.sigmoid()
        return g * b * s * (1 + a * (1 - s)), g * a * s


class GateReused(Gate):
    """The gradients are written over the gates, which "nobody needs after backward"."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        grad_a, grad_b = Gate.backward(ctx, g)
        a.data.copy_(grad_a)
        b.data.copy_(grad_b)
        return grad_a, grad_b


def _gate(function):
    def swiglu(a, b):
        """silu(a) b of a and b of one shape."""
        return function.apply(a, b)

    return swiglu


add(
    "swiglu_memory",
    _gate,
    GateReused,
    Gate,
    lambda: (real(2, 3), real(2, 3, seed=1)),
    bug="backward writes its results over the inputs",
    trigger="a second backward, or inputs used after it; a single backward is right",
)


class LowRank(Function):
    @staticmethod
    @recorded
    def forward(ctx, x, w, a, b, scale):
        ctx.save_for_backward(x, w, a, b)
        ctx.scale = scale
        return x @ w.mT + scale * (x @ a.mT @ b.mT)

    @staticmethod
    @as_forward
    def backward(ctx, g):
        x, w, a, b = ctx.saved_tensors
        need = ctx.needs_input_grad
        gb = ctx.scale * (g @ b)
        grad_x = g @ w + gb @ a if need[0] else None
        rows, flat = x.flatten(0, -2), g.flatten(0, -2)
        grad_w = flat.mT @ rows if need[1] else None
        grad_a = gb.flatten(0, -2).mT @ rows if need[2] else None
        return (
            grad_x,
            grad_w,
            grad_a,
            ctx.scale * (flat.mT @ (rows @ a.mT)) if need[3] else None,
            None,
        )


class LowRankFrozen(LowRank):
    @staticmethod
    @as_forward
    def backward(ctx, g):
        w = ctx.saved_tensors[1]
        grads = list(LowRank.backward(ctx, g))
        if grads[0] is not None and not ctx.needs_input_grad[2]:
            grads[0] = g @ w  # the adapter is off
        return tuple(grads)


def _low_rank(function):
    @in_float32
    def lora_linear(x, w, a, b, scale=2.0):
        """x wᵀ + scale x aᵀ bᵀ of x (N, ..., D), w (E, D), a (R, D), b (E, R); a frozen adapter is still applied."""
        return function.apply(x, w, a, b, scale)

    return lora_linear


add(
    "lora_frozen",
    _low_rank,
    LowRankFrozen,
    LowRank,
    lambda: (real(3, 4), real(5, 4, seed=1), real(2, 4, seed=2), real(5, 2, seed=3)),
    bug="without a gradient for a, the input's gradient lacks the adapter's path",
    trigger="a.requires_grad False",
)


class Shrink(Function):
    @staticmethod
    def forward(ctx, x, threshold):
        ctx.save_for_backward(x, threshold)
        return x.sign() * (x.abs() - threshold).relu()

    @staticmethod
    def backward(ctx, g):
        x, threshold = ctx.saved_tensors
        g = g * (x.abs() > threshold)
        return g, -(g * x.sign()).sum_to_size(threshold.shape)


class ShrinkSign(Shrink):
    @staticmethod
    def backward(ctx, g):
        x, threshold = ctx.saved_tensors
        g = g * (x.abs() > threshold)
        return g, -g.sum_to_size(threshold.shape)


def _shrink(function):
    def soft_shrink(x, threshold):
        """sign(x) max(|x| - threshold, 0) of x (N, D), threshold (D,) > 0 (a layer of ISTA)."""
        return function.apply(x, threshold)

    return soft_shrink


add(
    "shrink_sign",
    _shrink,
    ShrinkSign,
    Shrink,
    lambda: (real(4, 3), torch.full((3,), 0.2, dtype=F64, requires_grad=True)),
    bug="the threshold's gradient lacks sign(x)",
    trigger="the sample",
)


class Standard(Function):
    @staticmethod
    def normal(x):
        x = x - x.mean(-1, keepdim=True)
        rstd = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return x * rstd, rstd

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return Standard.normal(x)[0]

    @staticmethod
    def backward(ctx, g):
        y, rstd = Standard.normal(ctx.saved_tensors[0])
        return rstd * (g - g.mean(-1, keepdim=True) - y * (g * y).mean(-1, keepdim=True))


class StandardMean(Standard):
    @staticmethod
    def backward(ctx, g):
        y, rstd = Standard.normal(ctx.saved_tensors[0])
        return rstd * (g - y * (g * y).mean(-1, keepdim=True))


def _standard(function):
    def standardise(x):
        """Layer norm without weights of x (*, D), D > 0."""
        return function.apply(x)

    return standardise


add(
    "standardise_mean",
    _standard,
    StandardMean,
    Standard,
    lambda: (real(2, 5),),
    bug="the mean's own gradient is missing",
    trigger="the sample",
)


class Strided(Function):
    @staticmethod
    @recorded
    def forward(ctx, x, w, stride):
        ctx.save_for_backward(x, w)
        ctx.stride = stride
        return F.conv1d(x, w, stride=stride)

    @staticmethod
    def fill(rest):
        return 0, rest  # samples at the end that no window reaches

    @classmethod
    def gradients(cls, ctx, g):
        x, w = ctx.saved_tensors
        grad = F.conv_transpose1d(g, w, stride=ctx.stride)
        grad = F.pad(grad, cls.fill(x.shape[-1] - grad.shape[-1]))
        windows = x.unfold(-1, w.shape[-1], ctx.stride)
        return grad, torch.einsum("nilk,nol->oik", windows, g), None

    @staticmethod
    @as_forward
    def backward(ctx, g):
        return Strided.gradients(ctx, g)


class StridedLeft(Strided):
    @staticmethod
    def fill(rest):
        return rest, 0

    @staticmethod
    @as_forward
    def backward(ctx, g):
        return StridedLeft.gradients(ctx, g)


def _strided(function):
    @in_float32
    def strided_conv(x, w, stride=2):
        """Convolution without padding of x (N, I, L), L >= K, with w (O, I, K)."""
        return function.apply(x, w, stride)

    return strided_conv


add(
    "conv_remainder",
    _strided,
    StridedLeft,
    Strided,
    lambda: (real(2, 2, 7), real(3, 2, 3, seed=1)),
    bug="samples left over at the end get their zeros at the start",
    trigger="a length with a remainder, (L - K) % stride != 0",
)


class Decay(Function):
    """x exp(-w), with forward mode."""

    @staticmethod
    def forward(x, w):
        return x * (-w).exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        grad = g * (-w).exp()
        return grad, -grad * x

    @staticmethod
    def jvp(ctx, tangent_x, tangent_w):
        x, w = ctx.saved_tensors
        return (tangent_x - tangent_w * x) * (-w).exp()


class DecayTangent(Decay):
    @staticmethod
    def jvp(ctx, tangent_x, tangent_w):
        x, w = ctx.saved_tensors
        return (tangent_x + tangent_w * x) * (-w).exp()


def _decay(function):
    def decay(x, w):
        """x exp(-w) of x and w of one shape, in reverse and in forward mode."""
        return function.apply(x, w)

    return decay


add(
    "decay_tangent",
    _decay,
    DecayTangent,
    Decay,
    lambda: (real(2, 3), real(2, 3, seed=1)),
    bug="the sign of the second tangent in jvp",
    trigger="forward-mode differentiation",
)


class Norm(Function):
    @staticmethod
    def forward(ctx, x, mean, var, training):
        if training:
            mean, var = x.mean(0), x.var(0, correction=0)
        ctx.training = training
        ctx.save_for_backward(x, mean, var)
        return (x - mean) * (var + 1e-5).rsqrt()

    @staticmethod
    def by_batch(ctx):
        return ctx.training

    @classmethod
    def gradients(cls, ctx, g):
        x, mean, var = ctx.saved_tensors
        rstd = (var + 1e-5).rsqrt()
        if not cls.by_batch(ctx):
            return g * rstd, None, None, None
        y = (x - mean) * rstd
        return rstd * (g - g.mean(0) - y * (g * y).mean(0)), None, None, None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Norm.gradients(ctx, g)


class NormAlwaysBatch(Norm):
    @staticmethod
    def by_batch(ctx):
        return True

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return NormAlwaysBatch.gradients(ctx, g)


class BatchNorm(nn.Module):
    """Batch norm of x (N, C), N > 0: by the batch's statistics in training, in eval mode by the stored ones."""

    def __init__(self, function, features=3):
        super().__init__()
        self.function = function
        self.register_buffer("mean", torch.linspace(-0.5, 0.5, features, dtype=F64))
        self.register_buffer("var", torch.linspace(0.5, 2, features, dtype=F64))

    def forward(self, x):
        mean, var = self.mean.to(x.dtype), self.var.to(x.dtype)
        return self.function.apply(x, mean, var, self.training)


add(
    "batch_norm_eval",
    BatchNorm,
    NormAlwaysBatch,
    Norm,
    lambda: (real(4, 3),),
    bug="eval mode has the gradient of training",
    trigger="module.eval()",
)


class Log1p(Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.save_for_backward(x)
        return x.square().log1p()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x / (1 + x.square()), None


class Log1pKept(Log1p):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        layer.kept = x.detach()
        return x.square().log1p()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x = ctx.layer.kept
        return 2 * g * x / (1 + x.square()), None


class Compressor(nn.Module):
    """log(1 + x²) of x (any shape)."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x, self)


add(
    "compressor_shared",
    Compressor,
    Log1pKept,
    Log1p,
    lambda: (real(2, 3),),
    bug="backward reads the input of the module's last call",
    trigger="two calls of one module before backward (shared weights)",
)
