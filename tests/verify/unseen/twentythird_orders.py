"""Second derivatives, forward mode, vmap and torch.compile."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentythird import add, check, same, sized


# Squareplus: half of x + sqrt(x^2 + b)
def squareplus(wrong):
    class Squareplus(Function):
        @staticmethod
        def forward(ctx, x, b):
            ctx.save_for_backward(x)
            ctx.root = b**0.5
            return (x + torch.hypot(x, torch.full_like(x, ctx.root))) / 2

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            with torch.set_grad_enabled(torch.is_grad_enabled() and not wrong):
                slope = (1 + x / torch.hypot(x, torch.full_like(x, ctx.root))) / 2
            return grad_y * slope, None

    def plus(x, b=4.0):
        check(b > 0, "b: expected a number > 0")
        return Squareplus.apply(x, b)

    return plus


add(
    "squareplus_second",
    squareplus,
    lambda: (real(3, 4),),
    bug="Backward computes the slope under no_grad",
    trigger="a second derivative",
)


# sin(3 x), with a Function of its own for backward
def sine(wrong):
    class Backward(Function):
        @staticmethod
        def forward(ctx, grad_y, x):
            ctx.save_for_backward(grad_y, x)
            return 3 * grad_y * (3 * x).cos()

        @staticmethod
        def backward(ctx, grad):
            grad_y, x = ctx.saved_tensors
            for_y = None if wrong else 3 * grad * (3 * x).cos()
            return for_y, -9 * grad * grad_y * (3 * x).sin()

    class Sine(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (3 * x).sin()

        @staticmethod
        def backward(ctx, grad_y):
            return Backward.apply(grad_y, *ctx.saved_tensors)

    return Sine.apply


add(
    "sine_second",
    sine,
    lambda: (real(3, 4),),
    bug="The double backward gives no gradient to grad_output",
    trigger="a second derivative with a grad_output that depends on x, as a squared error's",
)


# Gated linear unit: x sigmoid(g)
def gated(wrong):
    class Gated(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, g):
            return x * g.sigmoid()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            x, g = ctx.saved_tensors
            s = g.sigmoid()
            return grad_y * s, grad_y * x * (1 - s) * s

        @staticmethod
        def jvp(ctx, tangent_x, tangent_g):
            x, g = ctx.saved_tensors
            s = g.sigmoid()
            return tangent_x * s + tangent_g * x * (s if wrong else (1 - s) * s)

    def unit(x, g):
        same(x, g)
        return Gated.apply(x, g)

    return unit


add(
    "gated_tangent",
    gated,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="The forward mode's rule forgets a factor of the gate's derivative",
    trigger="forward mode",
)


# x w as a Function with a rule for forward mode
def product(wrong):
    class Product(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, w):
            return x * w

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            if grad_y is None:
                return None, None
            x, w = ctx.saved_tensors
            return grad_y * w, grad_y * x

        @staticmethod
        def jvp(ctx, tangent_x, tangent_w):
            x, w = ctx.saved_tensors
            if wrong:
                return tangent_x * w + tangent_w * x
            parts = [t * f for t, f in ((tangent_x, w), (tangent_w, x)) if t is not None]
            return sum(parts) if parts else None

    def times(x, w):
        same(x, w)
        return Product.apply(x, w)

    return times


add(
    "product_tangent",
    product,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="The forward mode's rule fails where an input has no tangent",
    trigger="forward mode with a tangent for one input alone",
)


# Linear layer with a rule for vmap
def batched_linear(wrong):
    class Linear(Function):
        @staticmethod
        def forward(x, w):
            return x @ w.mT

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            return (grad_y @ w).sum_to_size(x.shape), (grad_y.mT @ x).sum_to_size(w.shape)

        @staticmethod
        def vmap(info, in_dims, x, w):
            dim_x, dim_w = in_dims
            x = x if dim_x is None else x.movedim(dim_x, 0)
            if dim_w is not None:
                w = w.movedim(0 if wrong else dim_w, 0)
            return Linear.apply(x, w), 0

    def linear(x, w):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        return Linear.apply(x, w)

    return linear


add(
    "batched_linear_dims",
    batched_linear,
    lambda: (real(4, 3), real(3, 3, seed=1)),
    bug="The rule for vmap takes the weight's batch dimension to be the first",
    trigger="vmap over the weight's last dimension",
)


# Columns standardised over the rows, with a rule for vmap
def whiten(wrong):
    class Whiten(Function):
        @staticmethod
        def forward(x):
            return normal(x)[0]

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            s, r = normal(x)
            return r * (grad_y - grad_y.mean(0) - s * (grad_y * s).mean(0))

        @staticmethod
        def vmap(info, in_dims, x):
            (dim,) = in_dims
            if wrong:
                y = Whiten.apply(x.movedim(dim, 0).flatten(0, 1))
                return y.unflatten(0, (info.batch_size, -1)), 0
            return Whiten.apply(x.movedim(dim, -1)), x.ndim - 1

    def normal(x):
        centred = x - x.mean(0)
        r = (centred.square().mean(0) + 1e-5).rsqrt()
        return centred * r, r

    def norm(x):
        sized("x", x, None, None)
        return Whiten.apply(x)

    return norm


add(
    "whiten_vmap",
    whiten,
    lambda: (real(4, 3),),
    bug="The rule for vmap lays the batch's rows under each other, so that they share mean and spread",
    trigger="vmap",
)


# x sin(x)
def growing_wave(wrong):
    class Wave(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x * x.sin()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            if wrong and not grad_y.any():
                return torch.zeros_like(grad_y)
            (x,) = ctx.saved_tensors
            return grad_y * x.sin() + grad_y * x * x.cos()

    return Wave.apply


add(
    "growing_wave_exit",
    growing_wave,
    lambda: (real(3, 4),),
    bug="Backward looks whether grad_output is 0 throughout, which no batch of them can answer",
    trigger="vmap over backward, or its compilation in one graph",
)


# GELU by the sigmoid: x sigmoid(1.702 x)
def quick_gelu(wrong):
    class Gelu(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * (1.702 * x).sigmoid()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong and torch.compiler.is_compiling():
                inner = (0.7978845608 * (x + 0.044715 * x**3)).tanh()
                slope = 0.7978845608 * (1 + 0.134145 * x**2)
                return grad_y * (0.5 * (1 + inner) + 0.5 * x * (1 - inner**2) * slope)
            s = (1.702 * x).sigmoid()
            return grad_y * s + grad_y * 1.702 * x * (1 - s) * s

    return Gelu.apply


add(
    "quick_gelu_compiled",
    quick_gelu,
    lambda: (real(3, 4),),
    bug="The path for the compiler is another GELU's derivative",
    trigger="torch.compile",
)


# Length of each row, as an operator of torch.library
def lengths(wrong):
    name = "wrong" if wrong else "right"

    @torch.library.custom_op(f"exam23::lengths_{name}", mutates_args=())
    def length(x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(-1).sqrt()

    @length.register_fake
    def _(x):
        shape = x.shape[:-1]
        return x.new_empty((*shape, 1) if wrong else shape)

    def setup(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output)

    def backward(ctx, grad_y):
        x, y = ctx.saved_tensors
        scale = (grad_y / y.where(y != 0, 1)).where(y != 0, 0)
        return x * scale[..., None]

    length.register_autograd(backward, setup_context=setup)
    length.register_vmap(lambda info, in_dims, x: (length(x.movedim(in_dims[0], 0)), 0))

    def norms(x):
        sized("x", x, None, None)
        return length(x)

    return norms


add(
    "lengths_fake",
    lengths,
    lambda: (real(4, 3),),
    bug="The operator's fake kernel promises another shape than it returns",
    trigger="torch.compile",
)
