"""The fourth set, part four: losses."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.fourth import XY, Kept, X, mistake


class Squares(Kept):
    """Mean of squares."""

    value = staticmethod(lambda x, t: ((x - t) ** 2).mean())

    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors
        grad = g * 2 * (x - t) / x.numel()
        return grad, -grad


@mistake(Squares, "mean over the rows only", XY)
def squares_rows(ctx, g):
    x, t = ctx.saved_tensors
    grad = g * 2 * (x - t) / len(x)
    return grad, -grad


@mistake(Squares, "grad_output ignored: a loss gets 1", XY)
def squares_ignores(ctx, g):
    x, t = ctx.saved_tensors
    grad = 2 * (x - t) / x.numel()
    return grad, -grad


@mistake(Squares, "no gradient for the target", XY)
def squares_target(ctx, g):
    x, t = ctx.saved_tensors
    return g * 2 * (x - t) / x.numel(), torch.zeros_like(t)


class Huber(Kept):
    value = staticmethod(
        lambda x: torch.where(x.abs() <= 0.5, x * x / 2, 0.5 * (x.abs() - 0.25)).sum()
    )

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].clamp(-0.5, 0.5)


@mistake(Huber, "delta forgotten where it is linear")
def huber_delta(ctx, g):
    (x,) = ctx.saved_tensors
    return g * torch.where(x.abs() <= 0.5, x, x.sign())


class CrossEntropy(Function):
    """Mean over the targets that are not -100."""

    @staticmethod
    def forward(ctx, x, t):
        ctx.save_for_backward(x, t)
        return F.cross_entropy(x, t, ignore_index=-100)

    @staticmethod
    def pull(ctx, g, keep, count):
        x, t = ctx.saved_tensors
        hot = F.one_hot(t.clamp(min=0), x.shape[-1]).to(x.dtype)
        return g * (x.softmax(-1) - hot) * keep / count, None

    @staticmethod
    def backward(ctx, g):
        keep = (ctx.saved_tensors[1] != -100)[:, None]
        return CrossEntropy.pull(ctx, g.to(ctx.saved_tensors[0].dtype), keep, keep.sum())


def labelled():
    return real(4, 3), torch.tensor([0, -100, 2, 1])


@mistake(CrossEntropy, "divided by all targets, ignored ones too", labelled)
def entropy_count(ctx, g):
    _, t = ctx.saved_tensors
    return CrossEntropy.pull(ctx, g, (t != -100)[:, None], len(t))


@mistake(CrossEntropy, "ignored targets get a gradient", labelled)
def entropy_ignored(ctx, g):
    _, t = ctx.saved_tensors
    return CrossEntropy.pull(ctx, g, 1, (t != -100).sum())


@mistake(
    CrossEntropy,
    "ignored targets get a gradient; the sample has none",
    lambda: (real(4, 3), whole(3, 4)),
)
def entropy_no_ignored(ctx, g):  # fmt: skip
    _, t = ctx.saved_tensors
    return CrossEntropy.pull(ctx, g, 1, (t != -100).sum())


class Smoothed(Function):
    """Cross entropy with label smoothing 0.2, a value a row."""

    @staticmethod
    def forward(ctx, x, t):
        ctx.save_for_backward(x, t)
        return F.cross_entropy(x, t, label_smoothing=0.2, reduction="none")

    @staticmethod
    def pull(ctx, g, each, uniform):
        x, t = ctx.saved_tensors
        hot = F.one_hot(t.clamp(min=0), x.shape[-1]).to(x.dtype)
        keep = (t != -100)[:, None]
        grad = x.softmax(-1) - each * hot - uniform / x.shape[-1]
        return torch.where(keep, g.to(x.dtype)[:, None] * grad, 0), None

    @staticmethod
    def backward(ctx, g):
        return Smoothed.pull(ctx, g, 0.8, 0.2)


@mistake(Smoothed, "the smoothing forgotten", lambda: (real(4, 3), whole(3, 4)))
def smoothing_lost(ctx, g):
    return Smoothed.pull(ctx, g, 1.0, 0.0)


@mistake(Smoothed, "the uniform part forgotten", lambda: (real(4, 3), whole(3, 4)))
def smoothing_uniform(ctx, g):
    return Smoothed.pull(ctx, g, 0.8, 0.0)


class LogSumExp(Kept):
    value = staticmethod(lambda x: x.logsumexp(-1))

    @staticmethod
    def backward(ctx, g):
        return g[..., None] * ctx.saved_tensors[0].softmax(-1)


@mistake(LogSumExp, "the maximum not subtracted")
def logsumexp_overflow(ctx, g):
    e = ctx.saved_tensors[0].exp()
    return g[..., None] * e / e.sum(-1, keepdim=True)


class Cosine(Kept):
    """Cosine of the angle between rows."""

    value = staticmethod(lambda x, y: (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)))

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        n, m = x.norm(dim=-1, keepdim=True), y.norm(dim=-1, keepdim=True)
        c = (x * y).sum(-1, keepdim=True) / (n * m)
        g = g[..., None]
        return g * (y / m - c * x / n) / n, g * (x / n - c * y / m) / m


@mistake(Cosine, "the projection forgotten", XY)
def cosine_projection(ctx, g):
    x, y = ctx.saved_tensors
    n, m = x.norm(dim=-1, keepdim=True), y.norm(dim=-1, keepdim=True)
    return g[..., None] * y / m / n, g[..., None] * x / n / m


class Divergence(Function):
    """Sum over classes of p (log p - x), mean over the rows; p is fixed."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(p)
        ctx.rows = x.numel() // x.shape[-1]
        return (p * (p.log() - x)).sum() / ctx.rows

    @staticmethod
    def backward(ctx, g):
        return -g * ctx.saved_tensors[0] / ctx.rows, None


@mistake(
    Divergence,
    "mean over all instead of batchmean",
    lambda: (real(3, 4), real(3, 4, seed=1).detach().softmax(-1)),
)
def divergence_mean(ctx, g):  # fmt: skip
    (p,) = ctx.saved_tensors
    return -g * p / p.numel(), None


class Hinge(Kept):
    value = staticmethod(lambda x: (1 - x).clamp(min=0))

    @staticmethod
    def backward(ctx, g):
        return -g * (ctx.saved_tensors[0] < 1)


@mistake(Hinge, "the sign", X)
def hinge_sign(ctx, g):
    return g * (ctx.saved_tensors[0] < 1)


@mistake(Hinge, "the mask compares with 0 instead of the margin", X)
def hinge_margin(ctx, g):
    return -g * (ctx.saved_tensors[0] < 0)
