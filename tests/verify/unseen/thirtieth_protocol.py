"""The protocol of Functions, custom operators, transforms, and the layouts of what backward gets and returns."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtieth import add, bounded, check, same, sized


# Length and angle of points in the plane
def polar(wrong):
    class Polar(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x, y)
            return torch.hypot(x, y), torch.atan2(y, x)

        @staticmethod
        def backward(ctx, grad_r, grad_angle):
            x, y = ctx.saved_tensors
            if grad_r is None and (wrong or grad_angle is None):
                return None, None
            r = torch.hypot(x, y)
            grad_x = grad_y = torch.zeros_like(x)
            if grad_r is not None:
                grad_x, grad_y = grad_r * x / r, grad_r * y / r
            if grad_angle is not None:
                turn = grad_angle / r / r
                grad_x, grad_y = grad_x - turn * y, grad_y + turn * x
            return grad_x, grad_y

    def coordinates(x, y):
        same(x, y)
        bounded("x", x, -1e4, 1e4)
        bounded("y", y, -1e4, 1e4)
        check(bool((x.abs() > 1e-2).all()), "x: expected points off the y axis, and off 0")
        return Polar.apply(x, y)

    return coordinates


add(
    "polar_parts_undefined",
    polar,
    lambda: (real(3, 4, positive=True), real(3, 4, seed=1)),
    bug="Backward returns early where the first output got no gradient",
    trigger="the second output used alone",
)


# x³, its derivative a Function with a batching rule of its own
def cube(wrong):
    class Slope(Function):
        @staticmethod
        def forward(grad_y, x):
            return 3 * grad_y * x * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            grad_y, x = ctx.saved_tensors
            return 3 * grad * x * x, 6 * grad * grad_y * x

        @staticmethod
        def vmap(info, in_dims, grad_y, x):
            if wrong and None not in in_dims:
                return Slope.apply(grad_y, x), in_dims[0]
            grad_y, x = (
                t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
                for t, d in zip((grad_y, x), in_dims, strict=True)
            )
            return Slope.apply(grad_y, x), 0

    class Cube(Function):
        @staticmethod
        def forward(x):
            return x**3

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return Slope.apply(grad_y, x)

        @staticmethod
        def vmap(info, in_dims, x):
            return Cube.apply(x), in_dims[0]

    return lambda x: Cube.apply(x)


add(
    "cube_backward_vmap",
    cube,
    lambda: (real(3, 3),),
    bug="The derivative's batching rule takes grad_output and the input to be batched along one dimension",
    trigger="vmap over a gradient, the input batched along 1 and grad_output along 0",
)


# The energy of pairs: Σ_ij exp(-(x_i - y_j)²)
def pair_bumps(wrong):
    class Energy(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return (-(x[:, None] - y).square()).exp().sum()

        @staticmethod
        def backward(ctx, grad_out):
            x, y = ctx.saved_tensors
            with torch.set_grad_enabled(torch.is_grad_enabled() and not wrong):
                gap = x[:, None] - y
                pull = -2 * gap * (-gap.square()).exp()
                of_x, of_y = pull.sum(1), -pull.sum(0)
            return grad_out * of_x, grad_out * of_y

    def energy(x, y):
        sized("x", x, None)
        sized("y", y, None)
        bounded("x", x, -1e4, 1e4)
        bounded("y", y, -1e4, 1e4)
        return Energy.apply(x, y)

    return energy


add(
    "pair_bumps_no_grad",
    pair_bumps,
    lambda: (real(4), real(3, seed=1)),
    bug="Backward works under no_grad to save memory, so its result hangs on grad_output only",
    trigger="a second derivative",
)


# Σ over the last dimension of x², a registered operator
def energies(wrong):
    @torch.library.custom_op(
        f"torchbp_thirtieth::row_energies_{'wrong' if wrong else 'right'}", mutates_args=()
    )
    def row_energies(x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(-1).contiguous()

    @row_energies.register_fake
    def _(x):
        return x.new_empty((*x.shape[:-1], 1) if wrong else x.shape[:-1])

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        return 2 * grad_y[..., None] * x

    row_energies.register_autograd(backward, setup_context=setup_context)

    def function(x):
        check(x.ndim >= 1, "x: expected one dimension at least")
        return row_energies(x)

    return function


add(
    "row_energies_fake",
    energies,
    lambda: (real(3, 4),),
    bug="The operator's fake version keeps the dimension that is summed over",
    trigger="torch.compile, or the operator on fake tensors",
)


# Softplus, whose backward knows that y.sum() gives one number for all
def softplus(wrong):
    class Softplus(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.logaddexp(x, torch.zeros_like(x))

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            steps = [s for s, n in zip(grad_y.stride(), grad_y.shape, strict=True) if n > 1]
            constant = any(s == 0 for s in steps) if wrong else all(s == 0 for s in steps)
            if constant and steps and not torch.is_grad_enabled():
                grad_y = grad_y[(slice(0, 1),) * grad_y.ndim]
            return grad_y * x.sigmoid()

    def function(x):
        bounded("x", x, -1e4, 1e4)
        return Softplus.apply(x)

    return function


add(
    "expanded_grad_constant",
    softplus,
    lambda: (real(3, 4),),
    bug="A grad_output that is expanded along one dimension is taken for one number",
    trigger="y.sum(0) and then something else than a sum",
)


# exp(-x²), whose gradient a kernel writes one number after the other
def bell(wrong):
    class Bell(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (-x * x).exp()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            grad_x = -2 * grad_y * x * (-x * x).exp()
            if not wrong:
                return grad_x
            memory = torch.empty_like(x)
            memory.as_strided((memory.numel(),), (1,)).copy_(grad_x.flatten())
            return memory

    def function(x):
        bounded("x", x, -1e4, 1e4)
        return Bell.apply(x)

    return function


add(
    "empty_like_flat",
    bell,
    lambda: (real(3, 4),),
    bug="The gradient's memory is made by empty_like, which keeps the input's strides, and written row by row",
    trigger="a transposed input",
)


# A product that keeps what its flags say that backward will need
def frugal_product(wrong):
    class Product(Function):
        @staticmethod
        def forward(ctx, x, w):
            need_x, need_w = ctx.needs_input_grad
            if wrong:
                ctx.save_for_backward(x if need_x else None, w if need_w else None)
            else:
                ctx.save_for_backward(x if need_w else None, w if need_x else None)
            return x * w

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            need_x, need_w = ctx.needs_input_grad
            return grad_y * w if need_x else None, grad_y * x if need_w else None

    def product(x, w):
        same(x, w)
        return Product.apply(x, w)

    return product


add(
    "product_saves_flags",
    frugal_product,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="Each factor is kept when it needs a gradient itself, where the other one's gradient needs it",
    trigger="one factor frozen",
)


# sin(x), with what backward needs on a stack of the layer's own
def stacked_sine(wrong):
    stack = []

    class Sine(Function):
        @staticmethod
        def forward(ctx, x):
            if not wrong:
                ctx.save_for_backward(x)
            elif ctx.needs_input_grad[0]:
                stack.append(x)
            return x.sin()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = (stack.pop(),) if wrong else ctx.saved_tensors
            return grad_y * x.cos()

    return lambda x: Sine.apply(x)


add(
    "stack_order_shared",
    stacked_sine,
    lambda: (real(3, 4),),
    bug="Inputs lie on a stack that backward pops, as if it ran in the exact reverse of forward",
    trigger="two calls whose backwards run in the order of the calls",
)
