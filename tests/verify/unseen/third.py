"""The third set: bugs of the kinds that public projects report, each with its source where it has one."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.known import raw
from tests.verify.unseen import THIRD, pair, real

X = lambda: (real(3, 4),)  # noqa: E731


def third(*args, **more):
    pair(*args, into=THIRD, **more)


class DilatedConv(Function):
    """y[l] = sum over k of w[k] x[l + 2 (k - 1)], zeros outside."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        p = F.pad(x, (2, 2))
        n = x.shape[-1]
        return sum(w[k] * p[..., 2 * k : 2 * k + n] for k in range(3))

    @staticmethod
    def pull(ctx, g, into):
        x, w = ctx.saved_tensors
        n = x.shape[-1]
        p = F.pad(x, (2, 2))
        grad = torch.zeros_like(p)
        for k in range(3):
            grad = into(grad, slice(2 * k, 2 * k + n), w[k] * g)
        gw = torch.stack([(g * p[..., 2 * k : 2 * k + n]).sum() for k in range(3)])
        return grad[..., 2 : 2 + n], gw

    @staticmethod
    def backward(ctx, g):
        def add(grad, at, part):
            return grad + F.pad(part, (at.start, grad.shape[-1] - at.stop))

        return DilatedConv.pull(ctx, g, add)


class DilatedConvLost(DilatedConv):
    @staticmethod
    def backward(ctx, g):
        def write(grad, at, part):
            grad = grad.clone()
            grad[..., at] = part
            return grad

        return DilatedConv.pull(ctx, g, write)


third("dilated_overlap", DilatedConvLost.apply, DilatedConv.apply, lambda: (real(2, 8), real(3, seed=1)),
      "overlapping stores lose contributions (cherimoya#25)")  # fmt: skip


class RowMean(Function):
    """Mean along the last dimension."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return x.mean(-1)

    @staticmethod
    def backward(ctx, g):
        return (g / ctx.shape[-1])[..., None].expand(ctx.shape).clone()


class RowMeanRaw(RowMean):
    @staticmethod
    def backward(ctx, g):
        flat = raw(g, g.numel()).view(g.shape)
        return (flat / ctx.shape[-1])[..., None].expand(ctx.shape).clone()


third("mean_of_mean", RowMeanRaw.apply, RowMean.apply, lambda: (real(2, 3, 4),), "torch/nn#345")


class Score(Function):
    """Attention weights, causal or not."""

    @staticmethod
    def weights(q, k, causal):
        s = q @ k.mT
        mask = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
        return (s.masked_fill(mask, -torch.inf) if causal else s).softmax(-1)

    @staticmethod
    def forward(ctx, q, k, causal):
        ctx.save_for_backward(q, k)
        ctx.causal = causal
        return Score.weights(q, k, causal)

    @staticmethod
    def pull(ctx, g, causal):
        q, k = ctx.saved_tensors
        p = Score.weights(q, k, causal)
        ds = p * (g.to(p.dtype) - (g.to(p.dtype) * p).sum(-1, keepdim=True))
        ds = ds.to(q.dtype)
        return ds @ k, ds.mT @ q, None

    @staticmethod
    def backward(ctx, g):
        return Score.pull(ctx, g, ctx.causal)


class ScoreCausal(Score):
    @staticmethod
    def backward(ctx, g):
        return Score.pull(ctx, g, True)


third(
    "not_causal",
    ScoreCausal.apply,
    Score.apply,
    lambda: (real(4, 3), real(4, 3, seed=1), False),
    "triton#5660",
)


class Centred(Function):
    """x - mean over all."""

    @staticmethod
    def forward(ctx, x):
        return x - x.mean()

    @staticmethod
    def backward(ctx, g):
        return g - g.mean()


class CentredBroadcast(Centred):
    @staticmethod
    def backward(ctx, g):
        return g - g.sum()


third(
    "centred_broadcast",
    CentredBroadcast.apply,
    Centred.apply,
    X,
    "pytorch#107007, as one expected it",
)


class Channels(Function):
    """A per-channel scale of images (N, C, H, W)."""

    @staticmethod
    def forward(ctx, x, s):
        ctx.save_for_backward(x, s)
        return x * s[:, None, None]

    @staticmethod
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        return g * s[:, None, None], (g * x).sum((0, 2, 3))


class ChannelsMemory(Channels):
    @staticmethod
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        x = raw(x, x.numel()).view(x.shape)
        return g * s[:, None, None], (g * x).sum((0, 2, 3))


third("image_memory_order", ChannelsMemory.apply, Channels.apply, lambda: (real(2, 3, 2, 2), real(3, seed=1)),
      "optimized-fused-ssim#1")  # fmt: skip


class ChannelsFirst(Channels):
    @staticmethod
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        return g * s[:, None, None], (g * x)[0].sum((1, 2)) * len(x)


third("first_image_only", ChannelsFirst.apply, Channels.apply, lambda: (real(2, 3, 2, 2), real(3, seed=1)),
      "one image stands for the batch")  # fmt: skip


class SoftmaxRows(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return y * (g - (g * y).sum(-1, keepdim=True))


class SoftmaxBlock(SoftmaxRows):
    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        n = y.shape[-1]
        d = (g * y)[..., : max(n // 32 * 32, min(n, 32))].sum(-1, keepdim=True)
        return y * (g - d)


class SoftmaxRemainder(SoftmaxRows):
    @staticmethod
    def backward(ctx, g):
        grad = SoftmaxRows.backward(ctx, g)
        return grad * 2 if grad.shape[-1] % 128 == 64 else grad


third(
    "softmax_last_block",
    SoftmaxBlock.apply,
    SoftmaxRows.apply,
    X,
    "the row sum drops what is beyond whole blocks",
)
third(
    "remainder_64_of_128",
    SoftmaxRemainder.apply,
    SoftmaxRows.apply,
    X,
    "pytorch#196678: only length 64 modulo 128",
)
