"""The benchmark's families on other functions: formula, upstream, layout, state, transform."""

import math

import torch
from torch import nn
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentyfourth import add, add_bare, check, indices, same, sized


# Inverse of the hyperbolic sine
def arcsinh(wrong):
    class Arcsinh(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.asinh()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return grad_y / (1 + x * x if wrong else torch.hypot(x, torch.ones_like(x)))

    return Arcsinh.apply


add(
    "arcsinh_root",
    arcsinh,
    lambda: (real(3, 4),),
    bug="The derivative lacks its square root",
)


# Logistic function
def logistic(wrong):
    class Logistic(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sigmoid()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong:
                grad_y = grad_y * (10 / grad_y.norm()).clamp(max=1)
            s = x.sigmoid()
            return grad_y * s * (1 - s)

    return Logistic.apply


add(
    "logistic_clipped",
    logistic,
    lambda: (real(3, 4),),
    bug="The gradient's norm is clipped to 10 inside of the layer",
    trigger="a grad_output of a norm above 10, as with a scaled loss",
)


# Logarithm of the softmax over the last dimension
def log_probabilities(wrong):
    class LogSoftmax(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.log_softmax(-1)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            total = x.shape[-1] if wrong else grad_y.sum(-1, keepdim=True)
            return grad_y - x.softmax(-1) * total

    def log_softmax(x):
        check(x.ndim >= 1, "x: expected one dimension or more")
        return LogSoftmax.apply(x)

    return log_softmax


add(
    "log_probabilities_ones",
    log_probabilities,
    lambda: (real(3, 4),),
    bug="The sum of grad_output is taken to be the number of columns",
    trigger="a grad_output other than ones",
)


# Elements of x at places counted row by row
def take(wrong):
    class Take(Function):
        @staticmethod
        def forward(ctx, x, places):
            ctx.save_for_backward(x, places)
            return x.reshape(-1)[places]

        @staticmethod
        def backward(ctx, grad_y):
            x, places = ctx.saved_tensors
            if wrong:
                grad_x = torch.zeros_like(x)
                grad_x.reshape(-1).index_add_(0, places, grad_y)
                return grad_x, None
            return grad_y.new_zeros(x.numel()).index_add(0, places, grad_y).view(x.shape), None

    def elements(x, places):
        sized("places", places, None)
        indices("places", places, x.numel())
        return Take.apply(x, places.long())

    return elements


add(
    "take_copy",
    take,
    lambda: (real(3, 4), whole(12, 6)),
    bug="Backward adds into reshape(-1) of zeros_like(x), which for other strides is a copy",
    trigger="a transposed x",
)


# Exponential less 1
def growth(wrong):
    class Growth(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.expm1()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong:
                grad_y = grad_y.contiguous()
                grad_y = grad_y.as_strided(grad_y.shape, grad_y.stride(), 0)
            return grad_y * x.exp()

    return Growth.apply


add(
    "growth_offset",
    growth,
    lambda: (real(3, 4),),
    bug="The kernel gets the address of grad_output's storage, not of its first element",
    trigger="torch.cat along the first dimension after the function",
)


# Linear layer whose matrix has rows of length 1
def unit_rows(wrong):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(real(2, 4, seed=5).detach())
            self.unit = None

        def forward(self, x):
            sized("x", x, None, 4)
            unit = self.unit
            if unit is None:
                wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
                unit = (wide / wide.square().sum(1, keepdim=True).sqrt()).to(self.weight.dtype)
            if wrong:
                self.unit = unit
            return x @ unit.T

    return Rows()


add_bare(
    "unit_rows_cached",
    unit_rows,
    lambda: (real(3, 4),),
    bug="The normed matrix is kept with its graph, for speed",
    trigger="a second step: the graph is gone, the matrix of before the update",
)


# Rows times a Hann window
def windowed(wrong):
    tables = {}

    class Window(Function):
        @staticmethod
        def forward(ctx, x):
            key = (x.shape, x.dtype, x.device)
            table = tables.get(key)
            if table is None:
                window = torch.hann_window(x.shape[-1], dtype=x.dtype, device=x.device)
                table = window.expand(x.shape).clone()
            if wrong:
                tables[key] = table
            ctx.save_for_backward(table)
            ctx.table = table if wrong else None
            return x * table

        @staticmethod
        def backward(ctx, grad_y):
            if wrong:
                return ctx.table.mul_(grad_y)
            return grad_y * ctx.saved_tensors[0]

    def window(x):
        sized("x", x, None, None)
        return Window.apply(x)

    return window


add(
    "windowed_table",
    windowed,
    lambda: (real(3, 4),),
    bug="Backward multiplies the kept table in place",
    trigger="a second call or backward, with a grad_output other than ones",
)


# Logarithm of the hyperbolic cosine
def log_cosh(wrong):
    class LogCosh(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.abs() + torch.log1p(torch.exp(-2 * x.abs())) - math.log(2)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return grad_y * x.tanh()

        @staticmethod
        def jvp(ctx, tangent):
            (x,) = ctx.saved_tensors
            return tangent * (x.abs() if wrong else x).tanh()

    return LogCosh.apply


add(
    "log_cosh_tangent",
    log_cosh,
    lambda: (real(3, 4),),
    bug="The rule for forward mode takes the derivative at |x|",
    trigger="forward mode and a negative x",
)


# From polar to Cartesian coordinates
def cartesian(wrong):
    class Cartesian(Function):
        @staticmethod
        def forward(r, angle):
            return r * angle.cos(), r * angle.sin()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_x, grad_y):
            r, angle = ctx.saved_tensors
            c, s = angle.cos(), angle.sin()
            return grad_x * c + grad_y * s, r * (grad_y * c - grad_x * s)

        @staticmethod
        def vmap(info, in_dims, r, angle):
            dim_r, dim_angle = in_dims
            if wrong and dim_r is not None and dim_angle is not None:
                dim_angle = dim_r
            n = info.batch_size
            r = r.expand(n, *r.shape) if dim_r is None else r.movedim(dim_r, 0)
            if dim_angle is not None:
                angle = angle.movedim(dim_angle, 0)
            return Cartesian.apply(r, angle.expand(r.shape)), (0, 0)

    def coordinates(r, angle):
        same(r, angle)
        return Cartesian.apply(r, angle)

    return coordinates


add(
    "cartesian_dims",
    cartesian,
    lambda: (real(3, 3), real(3, 3, seed=1)),
    bug="The rule for vmap takes both inputs' batch dimension to be the first input's",
    trigger="vmap with in_dims (0, 1)",
)


# Inverse of the tangent
def arctangent(wrong):
    class Arctan(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.atan()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            grad_x = grad_y / (1 + x * x)
            return grad_x.data if wrong else grad_x

    return Arctan.apply


add(
    "arctangent_data",
    arctangent,
    lambda: (real(3, 4),),
    bug="Backward returns .data, which has no graph",
    trigger="a second derivative",
)
