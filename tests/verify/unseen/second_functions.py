"""The second set, part one: activations, losses, layers, indexing."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import SECOND, pair, real, whole

X = lambda: (real(3, 4),)  # noqa: E731


def second(*args, **more):
    pair(*args, into=SECOND, **more)


class SwiGLU(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        s = a.sigmoid()
        return g * b * s * (1 + a * (1 - s)), g * a * s


class SwiGLUGate(SwiGLU):
    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        s = a.sigmoid()
        return g * b * s, g * a * s


second(
    "swiglu_gate",
    SwiGLUGate.apply,
    SwiGLU.apply,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    "silu' is sigmoid",
)


class UnitRows(Function):
    """x / max(|x|, 1/8), row by row."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x / x.norm(dim=-1, keepdim=True).clamp(min=0.125)

    @staticmethod
    def pull(ctx, g, clamped):
        (x,) = ctx.saved_tensors
        n = x.norm(dim=-1, keepdim=True).clamp(min=0.125)
        along = x * (g * x).sum(-1, keepdim=True) / n**3
        inside = x.norm(dim=-1, keepdim=True) < 0.125
        return g / n - (along.masked_fill(inside, 0) if clamped else along)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return UnitRows.pull(ctx, g, clamped=True)


class UnitRowsUnclamped(UnitRows):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return UnitRows.pull(ctx, g, clamped=False)


second(
    "unit_rows_small",
    UnitRowsUnclamped.apply,
    UnitRows.apply,
    X,
    "small rows, where the norm is clamped",
)


class SoftCube(Function):
    """x^3 / 3 inside of [-1, 1], linear outside."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(x.abs() < 1, x**3 / 3, x - 2 * x.sign() / 3)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.clamp(-1, 1).square()


class SoftCubeOutside(SoftCube):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.where(x < 1, x.square(), torch.ones_like(x))


second("soft_cube_negative", SoftCubeOutside.apply, SoftCube.apply, lambda: (real(3, 4, positive=True),),
       "only the positive side is linear; the sample is positive",
       missed="a note: negative inputs are not the sample's")  # fmt: skip


class BlockedCrossEntropy(Function):
    """Cross-entropy per row; the normalizer of backward is summed in blocks of 64 classes."""

    @staticmethod
    def forward(ctx, x, t):
        ctx.save_for_backward(x, t)
        return F.cross_entropy(x, t, reduction="none")

    @staticmethod
    def pull(ctx, g, total):
        x, t = ctx.saved_tensors
        e = (x - x.amax(-1, keepdim=True)).exp()
        return g[:, None] * (e / total(e) - F.one_hot(t, x.shape[-1])), None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return BlockedCrossEntropy.pull(ctx, g, lambda e: e.sum(-1, keepdim=True))


class BlockedCrossEntropyTail(BlockedCrossEntropy):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        def total(e):
            whole_blocks = max(e.shape[-1] // 64 * 64, min(e.shape[-1], 64))
            return e[..., :whole_blocks].sum(-1, keepdim=True)

        return BlockedCrossEntropy.pull(ctx, g, total)


second("cross_entropy_tail", BlockedCrossEntropyTail.apply, BlockedCrossEntropy.apply,
       lambda: (real(4, 5), whole(5, 4)), "classes beyond the last whole block of 64")  # fmt: skip


class Ignore(Function):
    """Mean of -log p over targets other than -1."""

    @staticmethod
    def forward(ctx, x, t):
        ctx.save_for_backward(x, t)
        return F.cross_entropy(x, t, ignore_index=-1)

    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors
        keep = (t != -1)[:, None]
        local = x.softmax(-1) - F.one_hot(t.clamp(min=0), x.shape[-1])
        return g * local * keep / keep.sum(), None


class IgnoreAll(Ignore):
    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors
        keep = (t != -1)[:, None]
        local = x.softmax(-1) - F.one_hot(t.clamp(min=0), x.shape[-1])
        return g * local * keep / len(t), None


second("ignore_minus_one", IgnoreAll.apply, Ignore.apply, lambda: (real(5, 3), whole(3, 5)),
       "divides by all targets; ignored ones are -1, the sample has none")  # fmt: skip


class LSTMOut(Function):
    """h = o tanh(f c + i n)."""

    @staticmethod
    def forward(ctx, f, i, n, o, c):
        ctx.save_for_backward(f, i, n, o, c)
        return o * (f * c + i * n).tanh()

    @staticmethod
    def pull(ctx, g, slope):
        f, i, n, o, c = ctx.saved_tensors
        t = (f * c + i * n).tanh()
        d = g * o * slope(t)
        return d * c, d * n, d * i, g * t, d * f

    @staticmethod
    def backward(ctx, g):
        return LSTMOut.pull(ctx, g, lambda t: 1 - t * t)


class LSTMOutSlope(LSTMOut):
    @staticmethod
    def backward(ctx, g):
        return LSTMOut.pull(ctx, g, lambda t: 1 - t)


second(
    "lstm_tanh",
    LSTMOutSlope.apply,
    LSTMOut.apply,
    lambda: tuple(real(2, 3, seed=s) for s in range(5)),
    "1 - t",
)


class GroupedConv(Function):
    """conv1d with two groups."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return F.conv1d(x, w, groups=2)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        g = g.to(w.dtype)
        gx = torch.nn.grad.conv1d_input(x.shape, w, g, groups=2)
        return gx, torch.nn.grad.conv1d_weight(x, w.shape, g, groups=2)


class GroupedConvSwapped(GroupedConv):
    @staticmethod
    def backward(ctx, g):
        gx, gw = GroupedConv.backward(ctx, g)
        return gx, gw.roll(len(gw) // 2, 0)


second("grouped_conv", GroupedConvSwapped.apply, GroupedConv.apply, lambda: (real(2, 4, 6), real(4, 2, 3, seed=1)),
       "the weight gradients of the two groups are exchanged")  # fmt: skip


class PairMax(Function):
    """Maximum of each two neighbours; an element that is left over is dropped."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        n = x.shape[-1] // 2 * 2
        return torch.maximum(x[..., 0:n:2], x[..., 1:n:2])

    @staticmethod
    def pull(ctx, g):
        (x,) = ctx.saved_tensors
        n = x.shape[-1] // 2 * 2
        left = (x[..., 0:n:2] >= x[..., 1:n:2]).to(g.dtype)
        return torch.stack([g * left, g * (1 - left)], -1).flatten(-2), x.shape[-1] - n

    @staticmethod
    def backward(ctx, g):
        grad, more = PairMax.pull(ctx, g)
        return F.pad(grad, (0, more))


class PairMaxOdd(PairMax):
    @staticmethod
    def backward(ctx, g):
        grad, more = PairMax.pull(ctx, g)
        return F.pad(grad, (more, 0))


second("pool_odd_length", PairMaxOdd.apply, PairMax.apply, lambda: (real(3, 6),),
       "for an odd length the gradient is one place off; the sample's is even")  # fmt: skip


class CumMax(Function):
    @staticmethod
    def forward(ctx, x):
        y, i = x.cummax(-1)
        ctx.save_for_backward(i)
        return y

    @staticmethod
    def backward(ctx, g):
        (i,) = ctx.saved_tensors
        return torch.zeros_like(g).scatter_add(-1, i, g)


class CumMaxAssign(CumMax):
    @staticmethod
    def backward(ctx, g):
        (i,) = ctx.saved_tensors
        return torch.zeros_like(g).scatter(-1, i, g)


second(
    "cummax_assigned",
    CumMaxAssign.apply,
    CumMax.apply,
    lambda: (real(3, 5),),
    "one maximum serves many places",
)


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
