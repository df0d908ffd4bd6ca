"""The second set, part two: products, powers, masks, a parameter."""

import torch
from torch import nn
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.second_functions import second


class Product(Function):
    """A matrix product with a fast path for large operands."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        g = g.to(a.dtype)
        return g @ b.mT, a.mT @ g


class ProductFast(Product):
    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        if a.shape[0] < 64:
            return Product.backward(ctx, g)
        return (g.bfloat16() @ b.mT.bfloat16()).to(a.dtype), (a.mT.bfloat16() @ g.bfloat16()).to(
            b.dtype
        )


class ProductSquare(Product):
    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        g = g.to(a.dtype)
        return g @ b.mT, (g.mT @ a if a.shape[-1] == g.shape[-1] else a.mT @ g)


SQUARE = lambda: (real(3, 3), real(3, 3, seed=1))  # noqa: E731
second("product_fast_path", ProductFast.apply, Product.apply, lambda: (real(3, 4), real(4, 5, seed=1)),
       "bfloat16 from 64 rows on")  # fmt: skip
second(
    "product_transposed",
    ProductSquare.apply,
    Product.apply,
    SQUARE,
    "the second gradient is transposed",
)


class RealPart(Function):
    """Re(z w) for complex z and w."""

    @staticmethod
    def forward(ctx, z, w):
        ctx.save_for_backward(z, w)
        return (z * w).real.clone()

    @staticmethod
    def backward(ctx, g):
        z, w = ctx.saved_tensors
        return g * w.conj(), g * z.conj()


class RealPartOnly(RealPart):
    @staticmethod
    def backward(ctx, g):
        z, w = ctx.saved_tensors
        return g * w.conj(), (g * z.real).to(z.dtype)


def complex_pair():
    return tuple(
        torch.complex(real(4, seed=s, grad=False), real(4, seed=s + 9, grad=False)).requires_grad_()
        for s in (0, 1)
    )


second("imaginary_part_lost", RealPartOnly.apply, RealPart.apply, complex_pair,
       "the gradient of w keeps its real part only")  # fmt: skip


class Power(Function):
    """x^p for x >= 0; 0^p is 0."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(x, p)
        return x**p

    @staticmethod
    def backward(ctx, g):
        x, p = ctx.saved_tensors
        safe = torch.where(x > 0, x, torch.ones_like(x))
        return g * p * x ** (p - 1), g * torch.where(
            x > 0, safe**p * safe.log(), torch.zeros_like(x)
        )


class PowerLog(Power):
    @staticmethod
    def backward(ctx, g):
        x, p = ctx.saved_tensors
        return g * p * x ** (p - 1), g * x**p * x.log()


second("power_of_zero", PowerLog.apply, Power.apply,
       lambda: (real(5, positive=True), (real(5, seed=1, grad=False).abs() + 1.5).requires_grad_()),
       "0 log 0: NaN in the gradient of the exponent")  # fmt: skip


class Smaller(Function):
    """min(x, cap), both differentiable."""

    @staticmethod
    def forward(ctx, x, cap):
        ctx.save_for_backward(x, cap)
        return torch.minimum(x, cap)

    @staticmethod
    def backward(ctx, g):
        x, cap = ctx.saved_tensors
        return g * (x <= cap).to(g.dtype), g * (x > cap).to(g.dtype)


class SmallerBoth(Smaller):
    @staticmethod
    def backward(ctx, g):
        x, cap = ctx.saved_tensors
        return g * (x <= cap).to(g.dtype), g * (x >= cap).to(g.dtype)


second("minimum_equal", SmallerBoth.apply, Smaller.apply, lambda: (real(5), real(5, seed=1)),
       "two equal inputs both get the whole gradient")  # fmt: skip


class MaskedSoftmax(Function):
    """Softmax over what the mask keeps; rows without any are 0."""

    @staticmethod
    def forward(ctx, x, keep):
        y = x.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return y * (g - (g * y).sum(-1, keepdim=True)), None


class MaskedSoftmaxRows(MaskedSoftmax):
    @staticmethod
    def forward(ctx, x, keep):
        ctx.save_for_backward(x, keep)
        return MaskedSoftmax.forward(_Ignored(), x, keep)

    @staticmethod
    def backward(ctx, g):
        x, keep = ctx.saved_tensors
        y = x.masked_fill(~keep, -torch.inf).softmax(-1)
        return y * (g - (g * y).sum(-1, keepdim=True)), None


class _Ignored:
    def save_for_backward(self, *_):
        pass


second("softmax_empty_row", MaskedSoftmaxRows.apply, MaskedSoftmax.apply,
       lambda: (real(3, 4), torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 0]]).bool()),
       "NaN in rows that the mask leaves empty; the sample has none")  # fmt: skip


class Repeat(Function):
    """Nearest-neighbour upsampling by 2."""

    @staticmethod
    def forward(ctx, x):
        return x.repeat_interleave(2, -1)

    @staticmethod
    def backward(ctx, g):
        return g.unflatten(-1, (-1, 2)).sum(-1)


class RepeatMean(Repeat):
    @staticmethod
    def backward(ctx, g):
        return g.unflatten(-1, (-1, 2)).mean(-1)


second(
    "upsample_mean",
    RepeatMean.apply,
    Repeat.apply,
    lambda: (real(2, 5),),
    "averages instead of summing",
)


class Affine(nn.Module):
    """x w + b with a scale that forward takes from .data."""

    def __init__(self, detached):
        super().__init__()
        torch.manual_seed(0)
        self.detached = detached
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x.tanh() * (self.scale.detach() if self.detached else self.scale) + self.bias


second(
    "parameter_detached",
    Affine(True),
    Affine(False),
    lambda: (torch.randn(3, 4),),
    "forward detaches a parameter",
)
