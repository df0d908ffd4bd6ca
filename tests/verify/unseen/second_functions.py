"""The second set, part one: activations, losses, layers."""

import torch
import torch.nn.functional as F
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
       "only the positive side is linear; the sample is positive")  # fmt: skip


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
