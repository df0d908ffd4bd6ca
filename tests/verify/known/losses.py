"""Losses: counts, buffers, saved intermediates."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.known import F64, rand, rand_labels, register


class MeanSquare(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, y):
        return (x - y).square().mean()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        gx = g * 2 * (x - y).conj() / max(x.numel(), 1)
        return gx, -gx

    @classmethod
    def fn(cls, x, y):
        return cls.apply(x, y)


class SumNotMean(MeanSquare):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        gx = g * 2 * (x - y)
        return gx, -gx


class GradInForward(Function):
    """Computes the gradient in forward, scales the buffer in place in backward."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.gx = 2 * (x - y) / max(x.numel(), 1)
        return (x - y).square().mean()

    @staticmethod
    def backward(ctx, g):
        gx = ctx.gx.mul_(g)
        return gx, -gx


class LowSum(Function):
    """Column sums; the bad version keeps the running sum in the input's own dtype."""

    @staticmethod
    def forward(x, w):
        return x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        acc = torch.zeros_like(w)
        for row in g * x:
            acc = acc + row
        return g * w, acc

    @classmethod
    def fn(cls, x, w):
        return cls.apply(x, w)


class GoodSum(LowSum):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        return g * w.conj(), (g.to(wide) * x.conj().to(wide)).sum(0).to(w.dtype)


register(
    "sum_not_mean",
    "formula",
    SumNotMean.fn,
    MeanSquare.fn,
    rand((3, 4), (3, 4)),
    reference=F.mse_loss,
    gradcheck=True,
    bug="gradient of the mean misses 1/N",
    trigger="any input",
)
register(
    "grad_buffer_in_place",
    "state",
    GradInForward.apply,
    MeanSquare.fn,
    rand((3, 4), (3, 4)),
    reference=F.mse_loss,
    gradcheck=False,
    bug="second backward through the same graph is scaled twice",
    trigger="retain_graph=True and grad_output != 1",
)
register(
    "low_precision_sum",
    "precision",
    LowSum.fn,
    GoodSum.fn,
    rand((6, 3), (3,)),
    gradcheck=False,
    bug="running sum in bfloat16 loses small addends",
    trigger="bfloat16 and many rows",
)


IGNORE = -100


class CrossEntropy(Function):
    """Saves only inputs (x, t, weight) and recomputes, so that double backward stays right."""

    @staticmethod
    def parts(x, t, weight):
        keep = t != IGNORE
        idx = torch.where(keep, t, 0)
        w = keep.to(x.dtype) if weight is None else weight[idx] * keep
        return x.log_softmax(-1), idx, w, w.sum()

    @staticmethod
    def forward(ctx, x, t, weight=None):
        p, idx, w, total = CrossEntropy.parts(x, t, weight)
        ctx.save_for_backward(x, t, weight)
        return -(p.gather(-1, idx[..., None])[..., 0] * w).sum() / total

    @staticmethod
    def backward(ctx, g):
        p, idx, w, total = CrossEntropy.parts(*ctx.saved_tensors)
        return g * (p.exp() - F.one_hot(idx, p.shape[-1])) * (w / total)[..., None], None, None

    @classmethod
    def fn(cls, x, t, weight=None):
        return cls.apply(x, t, weight)


class CrossEntropyIgnored(CrossEntropy):
    @staticmethod
    def backward(ctx, g):
        p, idx, _w, total = CrossEntropy.parts(*ctx.saved_tensors)
        return g * (p.exp() - F.one_hot(idx, p.shape[-1])) / total, None, None


class CrossEntropyRows(CrossEntropy):
    @staticmethod
    def backward(ctx, g):
        p, idx, w, total = CrossEntropy.parts(*ctx.saved_tensors)
        total = total * p.shape[0] / idx.numel()
        return g * (p.exp() - F.one_hot(idx, p.shape[-1])) * (w / total)[..., None], None, None


class CrossEntropyIntermediate(CrossEntropy):
    @staticmethod
    def forward(ctx, x, t, weight=None):
        p, idx, w, total = CrossEntropy.parts(x, t, weight)
        ctx.save_for_backward(p, idx, w, total)
        return -(p.gather(-1, idx[..., None])[..., 0] * w).sum() / total

    @staticmethod
    def backward(ctx, g):
        p, idx, w, total = ctx.saved_tensors
        return g * (p.exp() - F.one_hot(idx, p.shape[-1])) * (w / total)[..., None], None, None


class CrossEntropyWeight(CrossEntropy):
    """Divides by N where torch divides by the sum of the weights, in forward and backward alike."""

    @staticmethod
    def forward(ctx, x, t, weight=None):
        p, idx, w, _total = CrossEntropy.parts(x, t, weight)
        ctx.save_for_backward(x, t, weight)
        return -(p.gather(-1, idx[..., None])[..., 0] * w).sum() / t.numel()

    @staticmethod
    def backward(ctx, g):
        p, idx, w, _total = CrossEntropy.parts(*ctx.saved_tensors)
        return g * (p.exp() - F.one_hot(idx, p.shape[-1])) * w[..., None] / idx.numel(), None, None


def labels_weight(dtype=F64, seed=0):
    x, t = rand_labels(4, classes=3)(dtype, seed)
    return x, t, torch.tensor([1.0, 2.0, 3.0], dtype=dtype)


def ce_reference(x, t, weight=None):
    return F.cross_entropy(x.flatten(0, -2), t.flatten(), weight)


register(
    "saved_intermediate",
    "transform",
    CrossEntropyIntermediate.fn,
    CrossEntropy.fn,
    rand_labels(4, classes=3),
    reference=ce_reference,
    gradcheck=False,
    bug="saves log_softmax computed in forward: double backward is silently wrong",
    trigger="double backward",
)
register(
    "ignored_rows",
    "coverage",
    CrossEntropyIgnored.fn,
    CrossEntropy.fn,
    rand_labels(4, classes=3),
    reference=ce_reference,
    gradcheck=False,
    bug="ignored targets still get a gradient",
    trigger="a target equal to ignore_index",
)
register(
    "rows_not_tokens",
    "coverage",
    CrossEntropyRows.fn,
    CrossEntropy.fn,
    rand_labels(4, classes=3),
    reference=ce_reference,
    gradcheck=False,
    bug="divides by shape[0] instead of the number of targets",
    trigger="3-d input",
)
register(
    "weighted_mean",
    "coverage",
    CrossEntropyWeight.fn,
    CrossEntropy.fn,
    labels_weight,
    needs_reference=True,
    reference=ce_reference,
    gradcheck=False,
    bug="forward and backward agree but differ from torch's definition",
    trigger="compared with a reference",
)
