"""The benchmark's families on other functions: precision, coverage, and state beside autograd."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentyfourth import add, add_bare, check, same, sized


# |x|^(4/3)
def power_third(wrong):
    class Power(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.abs() ** (4 / 3)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            factor = torch.tensor(4 / 3, device=x.device) if wrong else 4 / 3
            return grad_y * factor * x.sgn() * x.abs() ** (1 / 3)

    return Power.apply


add(
    "power_third_constant",
    power_third,
    lambda: (real(3, 4),),
    bug="The constant is a tensor of the default dtype, float32",
    trigger="a tolerance below 1e-8",
)


# Sum of each element and the three before it in its row
def moving_sum(wrong):
    class Moving(Function):
        @staticmethod
        def forward(ctx, x):
            n = x.shape[-1]
            padded = F.pad(wide(x), (3, 0))
            return sum(padded[..., k : k + n] for k in range(4)).to(x.dtype)

        @staticmethod
        def backward(ctx, grad_y):
            n = grad_y.shape[-1]
            if wrong:
                total = F.pad(grad_y.cumsum(-1), (1, 3), mode="constant")
                ends = (torch.arange(n, device=grad_y.device) + 4).clamp(max=n)
                return total[..., ends] - total[..., :n]
            padded = F.pad(wide(grad_y), (0, 3))
            return sum(padded[..., k : k + n] for k in range(4)).to(grad_y.dtype)

    def wide(t):
        return t.to(torch.promote_types(t.dtype, torch.float32))

    def moving(x):
        sized("x", x, None, None)
        return Moving.apply(x)

    return moving


add(
    "moving_sum_prefix",
    moving_sum,
    lambda: (real(3, 6),),
    bug="Backward takes differences of running sums, which round, and carry an inf to all that follow",
    trigger="bfloat16, long rows, or a grad_output of several magnitudes",
    own=True,
)


# Columns times a gain
def column_gain(wrong):
    class Gain(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            product = grad_y * x
            return grad_y * w, product.mean(0) * len(x) if wrong else product.sum(0)

    def gain(x, w):
        check(x.ndim == 2 and w.shape == x.shape[1:], "expected x (N, C) and w (C)")
        return Gain.apply(x, w)

    return gain


add(
    "column_gain_empty",
    column_gain,
    lambda: (real(4, 3), real(3, seed=1)),
    bug="The gain's gradient is the mean times the number of rows, 0 / 0 * 0",
    trigger="no rows",
)


# Sum of magnitudes over the last dimension
def row_magnitude(wrong):
    class Magnitude(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.abs().sum(-1)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return grad_y[..., None] * (x / x.abs() if wrong else x.sgn())

    def magnitude(x):
        check(x.ndim >= 1, "x: expected one dimension or more")
        return Magnitude.apply(x)

    return magnitude


add(
    "row_magnitude_zero",
    row_magnitude,
    lambda: (real(3, 4),),
    bug="The sign is had as x / |x|",
    trigger="an element that is 0",
)


# |z|^2
def power_of(wrong):
    class Power(Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return (z * z.conj()).real if z.is_complex() else z * z

        @staticmethod
        def backward(ctx, grad_y):
            (z,) = ctx.saved_tensors
            return 2 * grad_y * (z.conj() if wrong else z)

    return Power.apply


add_bare(
    "power_of_conjugate",
    power_of,
    lambda: (real(3, 4),),
    bug="Backward conjugates, against torch's convention",
    trigger="complex input",
)


# CELU
def celu(wrong):
    class Celu(Function):
        @staticmethod
        def forward(ctx, x, alpha):
            ctx.save_for_backward(x)
            ctx.alpha = 1.0 if wrong else alpha
            return x.clamp(min=0) + alpha * torch.expm1(x.clamp(max=0) / alpha)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return grad_y * torch.where(x > 0, 1, torch.exp(x.clamp(max=0) / ctx.alpha)), None

    def activation(x, *, alpha=1.0):
        check(alpha > 0, "alpha: expected a number > 0")
        return Celu.apply(x, alpha)

    return activation


add(
    "celu_default",
    celu,
    lambda: (real(3, 4),),
    bug="Backward takes alpha to have its default value",
    trigger="the keyword alpha",
    kwargs=lambda: {"alpha": 0.5},
)


# exp(x) and the rows' energy
def exp_and_energy(wrong):
    class Both(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            energy = x.square().sum(-1)
            if wrong:
                ctx.mark_non_differentiable(energy)
            return x.exp(), energy

        @staticmethod
        def backward(ctx, grad_y, grad_energy):
            (x,) = ctx.saved_tensors
            grad_x = grad_y * x.exp()
            return grad_x if wrong else grad_x + 2 * grad_energy[..., None] * x

    def both(x):
        check(x.ndim >= 1, "x: expected one dimension or more")
        return Both.apply(x)

    return both


add(
    "exp_and_energy_marked",
    exp_and_energy,
    lambda: (real(3, 4),),
    bug="The second output is marked as not differentiable, as if it were for the log only",
    trigger="a loss of the second output",
    missed="a note: an output without a gradient may be meant",
)


# Projection on two random directions, always the same
def projection(wrong):
    class Project(Function):
        @staticmethod
        def forward(ctx, x):
            if wrong:
                torch.manual_seed(0)
                matrix = torch.randn(x.shape[1], 2).to(x)
            else:
                generator = torch.Generator().manual_seed(0)
                matrix = torch.randn(x.shape[1], 2, generator=generator).to(x)
            ctx.save_for_backward(matrix)
            return x @ matrix

        @staticmethod
        def backward(ctx, grad_y):
            (matrix,) = ctx.saved_tensors
            return grad_y @ matrix.T

    def project(x):
        sized("x", x, None, None)
        return Project.apply(x)

    return project


add(
    "projection_seed",
    projection,
    lambda: (real(3, 4),),
    bug="Forward seeds the caller's random numbers so that its matrix is the same every time",
    trigger="random numbers drawn before and after the call",
    missed="a note: who checks a random function seeds it so",
)


# Expected place under the softmax
def soft_place(wrong):
    def place(x):
        sized("x", x, None, None)
        p = x.softmax(-1)
        if wrong:
            p = p.detach()
        return (p * torch.arange(x.shape[1], dtype=x.dtype, device=x.device)).sum(-1)

    return place


add(
    "soft_place_detached",
    soft_place,
    lambda: (real(3, 4),),
    bug="The probabilities are detached, so that no gradient is left at all",
)


# 2 x w
def doubled_product(wrong):
    class Product(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return 2 * x * w

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            if wrong and not ctx.needs_input_grad[0]:
                return None, None
            return 2 * grad_y * w, 2 * grad_y * x

    def product(x, w):
        same(x, w)
        return Product.apply(x, w)

    return product


add(
    "doubled_product_first",
    doubled_product,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="Backward stops where x needs no gradient, with that of w",
    trigger="the first layer, whose x is data",
)
