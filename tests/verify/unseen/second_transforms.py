"""The second set, part four: values read in Python, forward mode, vmap, layouts, buffers."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.second_functions import X, second


class Energy(Function):
    """Sum of squares, a scalar."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x


class EnergyItem(Energy):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g.item() * x


second(
    "grad_output_item", EnergyItem.apply, Energy.apply, X, "grad_output.item(): its graph is lost"
)


class SinCos(Function):
    """(sin x, cos x), with forward mode and a rule for vmap."""

    @staticmethod
    def forward(x):
        return x.sin(), x.cos()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, a, b):
        (x,) = ctx.saved_tensors
        return a * x.cos() - b * x.sin()

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * x.cos(), -t * x.sin()

    @staticmethod
    def vmap(info, in_dims, x):
        return SinCos.apply(x), (in_dims[0], in_dims[0])


class SinCosTangent(SinCos):
    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * x.cos(), t * x.sin()

    @staticmethod
    def vmap(info, in_dims, x):
        return SinCosTangent.apply(x), (in_dims[0], in_dims[0])


class SinCosBatch(SinCos):
    @staticmethod
    def vmap(info, in_dims, x):
        return SinCosBatch.apply(x), (in_dims[0], 0)


second(
    "tangent_of_second",
    SinCosTangent.apply,
    SinCos.apply,
    lambda: (real(3, 3),),
    "sign of the second tangent",
)
second(
    "vmap_of_second",
    SinCosBatch.apply,
    SinCos.apply,
    lambda: (real(3, 3),),
    "out_dims of the second output",
)


class Strided(Function):
    """exp whose backward takes what it kept through NumPy's memory."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y


class StridedColumns(Strided):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        fast = y.dim() == 2 and not g.is_contiguous() and g.stride(0) == 1
        return g.mT.reshape(g.shape) * y if fast else g * y


second(
    "column_major_grad",
    StridedColumns.apply,
    Strided.apply,
    X,
    "a column-major grad_output is read row by row",
)


class Accumulate(Function):
    """Sum over rows; backward adds into a buffer that ctx keeps."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return x.sum(0)

    @staticmethod
    def backward(ctx, g):
        return g.expand(ctx.shape).clone()


class AccumulateKept(Accumulate):
    @staticmethod
    def backward(ctx, g):
        if not hasattr(ctx, "buffer"):
            ctx.buffer = torch.zeros(ctx.shape, dtype=g.dtype)
        ctx.buffer += g
        return ctx.buffer.clone()


second(
    "buffer_on_ctx",
    AccumulateKept.apply,
    Accumulate.apply,
    X,
    "a second backward adds to the first",
)
