"""The third set, part two: memory, bags, slopes, norms, distances, caches."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.third import X, third


class Expanded(Function):
    """sin, whose backward walks through the input's memory when that is not dense."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class ExpandedInput(Expanded):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        grad = g * x.cos()
        return grad / x.shape[0] if x.dim() and x.stride(0) == 0 else grad


third(
    "expanded_input", ExpandedInput.apply, Expanded.apply, X, "pytorch#30303: an input of stride 0"
)


class Bag(Function):
    """Mean of the embeddings of each row of indices; -1 is padding."""

    @staticmethod
    def forward(ctx, w, i):
        ctx.save_for_backward(i)
        ctx.rows = len(w)
        keep = (i >= 0)[..., None]
        return (w[i.clamp(min=0)] * keep).sum(-2) / keep.sum(-2).clamp(min=1)

    @staticmethod
    def pull(ctx, g, keep, count):
        (i,) = ctx.saved_tensors
        wide = torch.promote_types(g.dtype, torch.float32)
        rows = ((g / count)[..., None, :] * keep).to(wide).flatten(0, -2)
        grad = torch.zeros(ctx.rows, g.shape[-1], dtype=wide, device=g.device)
        return grad.index_add(0, i.clamp(min=0).flatten(), rows).to(g.dtype), None

    @staticmethod
    def backward(ctx, g):
        keep = (ctx.saved_tensors[0] >= 0)[..., None]
        return Bag.pull(ctx, g, keep, keep.sum(-2).clamp(min=1))


class BagPadding(Bag):
    @staticmethod
    def backward(ctx, g):
        keep = (ctx.saved_tensors[0] >= 0)[..., None]
        return Bag.pull(ctx, g, torch.ones_like(keep), keep.sum(-2).clamp(min=1))


class BagCount(Bag):
    @staticmethod
    def backward(ctx, g):
        i = ctx.saved_tensors[0]
        return Bag.pull(ctx, g, (i >= 0)[..., None], i.shape[-1])


INDEX = lambda: (real(6, 3), whole(6, 4, 2))  # noqa: E731
third("bag_padding", BagPadding.apply, Bag.apply, INDEX, "padding gets the gradient of row 0")
third("bag_count", BagCount.apply, Bag.apply, INDEX, "padding is counted in the mean")


class Rational(Function):
    """x / (1 + exp(-b x)) with a learnable b, a scalar."""

    @staticmethod
    def forward(ctx, x, b):
        ctx.save_for_backward(x, b)
        return x * (b * x).sigmoid()

    @staticmethod
    def pull(ctx, g, total):
        x, b = ctx.saved_tensors
        s = (b * x).sigmoid()
        return g * (s + b * x * s * (1 - s)), total(g * x * x * s * (1 - s))

    @staticmethod
    def backward(ctx, g):
        return Rational.pull(ctx, g, torch.sum)


class RationalMean(Rational):
    @staticmethod
    def backward(ctx, g):
        return Rational.pull(ctx, g, torch.mean)


class RationalMissing(Rational):
    @staticmethod
    def backward(ctx, g):
        x, b = ctx.saved_tensors
        gx, gb = Rational.backward(ctx, g)
        return gx - g * b * x * (b * x).sigmoid() * (1 - (b * x).sigmoid()) + g * x * (
            b * x
        ).sigmoid() * (1 - (b * x).sigmoid()), gb


SWISH = lambda: (real(3, 4), torch.tensor(1.0, dtype=torch.float64, requires_grad=True))  # noqa: E731
third(
    "swish_slope_mean",
    RationalMean.apply,
    Rational.apply,
    SWISH,
    "the slope's gradient is averaged",
)
third(
    "swish_slope_one",
    RationalMissing.apply,
    Rational.apply,
    SWISH,
    "right for b = 1 only; the sample has b = 1",
)


class Norm(Function):
    """x / sqrt(mean(x^2) + eps) * w, with w of one row."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        r = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        gx = r * (g * w - x * r * r * (g * w * x).mean(-1, keepdim=True))
        return gx, (g * x * r).flatten(0, -2).sum(0)


class NormTokens(Norm):
    @staticmethod
    def backward(ctx, g):
        gx, gw = Norm.backward(ctx, g)
        return gx, gw / (1 if g.dim() == 2 else g.shape[1])


class NormShared(Norm):
    @staticmethod
    def backward(ctx, g):
        gx, gw = Norm.backward(ctx, g)
        g.zero_()
        return gx, gw


ROWS = lambda: (real(4, 3), real(3, seed=1))  # noqa: E731
third(
    "norm_of_sequences",
    NormTokens.apply,
    Norm.apply,
    ROWS,
    "with a sequence dimension the weight's is averaged",
)
third(
    "norm_clears_grad",
    NormShared.apply,
    Norm.apply,
    ROWS,
    "the buffer of grad_output is cleared for reuse",
)


class Distance(Function):
    """Sum of |x - y| over rows, the sign by hand."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return (x - y).abs().sum(-1)

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        s = g[..., None] * (x - y).sign()
        return s, -s


class DistanceSame(Distance):
    @staticmethod
    def backward(ctx, g):
        s, _ = Distance.backward(ctx, g)
        return s, s


class DistanceDivide(Distance):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        s = g[..., None] * (x - y) / (x - y).abs()
        return s, -s


PAIR = lambda: (real(3, 4), real(3, 4, seed=1))  # noqa: E731
third("l1_sign", DistanceSame.apply, Distance.apply, PAIR, "both inputs get one sign")
third("l1_equal", DistanceDivide.apply, Distance.apply, PAIR, "0 / 0 where the two are equal")


class Clip(Function):
    """Value clipping with a learnable bound, as PACT has it."""

    @staticmethod
    def forward(ctx, x, a):
        ctx.save_for_backward(x, a)
        return torch.minimum(x.clamp(min=0), a)

    @staticmethod
    def backward(ctx, g):
        x, a = ctx.saved_tensors
        inside = ((x > 0) & (x < a)).to(g.dtype)
        return g * inside, (g * (x >= a).to(g.dtype)).sum()


class ClipPass(Clip):
    @staticmethod
    def backward(ctx, g):
        x, a = ctx.saved_tensors
        return g * (x > 0).to(g.dtype), (g * (x >= a).to(g.dtype)).sum()


BOUND = lambda: (real(3, 4), torch.tensor(0.6, dtype=torch.float64, requires_grad=True))  # noqa: E731
third("clip_passes", ClipPass.apply, Clip.apply, BOUND,
      "the clipped part gets a gradient too")  # fmt: skip


class Memo(Function):
    """exp, with the output found again by the address of the input."""

    kept: dict = {}  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y


class MemoSize(Memo):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        Memo.kept[x.numel()] = y.detach().clone()
        ctx.n = x.numel()
        return y

    @staticmethod
    def backward(ctx, g):
        return g * Memo.kept[ctx.n]


third("kept_by_size", MemoSize.apply, Memo.apply, X, "what forward saved is found by its size")
