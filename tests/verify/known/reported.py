"""Bugs that public projects reported, made small: normalization, cross-entropy, label smoothing."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.known import rand, rand_labels, raw, register

IGNORE = -100


class RMSNorm(Function):
    """y = x w / rms(x), the row's correction term written out."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w

    @staticmethod
    def parts(ctx, g):
        x, w = ctx.saved_tensors
        r = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return x, w, r, g * w

    @staticmethod
    def backward(ctx, g):
        x, _, r, gw = RMSNorm.parts(ctx, g)
        gx = r * gw - r**3 * x * (gw * x).mean(-1, keepdim=True)
        return gx, (g * x * r).reshape(-1, x.shape[-1]).sum(0)


class RMSNormBroadcast(RMSNorm):
    @staticmethod
    def backward(ctx, g):
        x, _, r, gw = RMSNorm.parts(ctx, g)
        correction = (gw * x).mean(-1)
        correction = correction[None] if x.shape[0] == x.shape[-1] else correction[:, None]
        return r * gw - r**3 * x * correction, (g * x * r).sum(0)


class RMSNormLastBlock(RMSNorm):
    @staticmethod
    def backward(ctx, g):
        gx, _ = RMSNorm.backward(ctx, g)
        x, _, r, _ = RMSNorm.parts(ctx, g)
        rows = (g * x * r).reshape(-1, x.shape[-1])
        block = 16
        if len(rows) > block:
            rows = rows[: len(rows) // block * block]
        return gx, rows.sum(0)


class RMSNormNoWeight(RMSNorm):
    @staticmethod
    def backward(ctx, g):
        return RMSNorm.backward(ctx, g)[0], None


class RMSNormLayout(RMSNorm):
    @staticmethod
    def backward(ctx, g):
        return RMSNorm.backward(ctx, raw(g, g.numel()).view(g.shape))


ROWS = rand((4, 3), (3,))
for _name, _wrong, _make, _bug, _source in [
    (
        "rms_norm_broadcast",
        RMSNormBroadcast,
        rand((3, 3), (3,)),
        "row term applied along columns",
        "attorch#17",
    ),
    (
        "rms_norm_last_block",
        RMSNormLastBlock,
        ROWS,
        "weight gradient drops the last partial block",
        "attorch#18",
    ),
    ("rms_norm_no_weight", RMSNormNoWeight, ROWS, "None for the weight", "unsloth#4533"),
    ("rms_norm_layout", RMSNormLayout, ROWS, "dy not made contiguous", "FlagGems#1084"),
]:
    register(
        _name, "reported", _wrong.apply, RMSNorm.apply, _make, bug=_bug, trigger="", source=_source
    )


class RowLoss(Function):
    """Cross-entropy per row, reduction="none"."""

    @staticmethod
    def forward(ctx, x, t):
        ctx.save_for_backward(x, t)
        return -x.log_softmax(-1).gather(-1, t[:, None])[:, 0]

    @staticmethod
    def local(ctx):
        x, t = ctx.saved_tensors
        return x.softmax(-1) - F.one_hot(t, x.shape[-1])

    @staticmethod
    def backward(ctx, g):
        return g[:, None] * RowLoss.local(ctx), None


class RowLossScalar(RowLoss):
    @staticmethod
    def backward(ctx, g):
        return g.reshape(-1)[0] * RowLoss.local(ctx), None


class RowLossStride(RowLoss):
    @staticmethod
    def backward(ctx, g):
        return raw(g, g.numel())[:, None] * RowLoss.local(ctx), None


class InPlaceLogits(Function):
    """Writes the gradient over the caller's logits, as fused kernels do to save memory."""

    @staticmethod
    def forward(ctx, x, t):
        loss = -x.log_softmax(-1).gather(-1, t[:, None])[:, 0]
        grad = x.softmax(-1) - F.one_hot(t, x.shape[-1])
        x.detach().copy_(grad)
        ctx.grad = x.detach()
        return loss

    @staticmethod
    def backward(ctx, g):
        return g[:, None] * ctx.grad, None


LABELS = rand_labels(4, classes=3)
register(
    "reduction_none_one_row",
    "reported",
    RowLossScalar.apply,
    RowLoss.apply,
    LABELS,
    source="Liger-Kernel#968",
    bug="one grad_output for all rows",
    trigger="rows weighted differently",
)
register(
    "stride0_row_kernel",
    "reported",
    RowLossStride.apply,
    RowLoss.apply,
    LABELS,
    source="ROCm/TransformerEngine#623",
    bug="reads an expanded grad_output row by row",
    trigger="loss.sum().backward()",
)
register(
    "logits_overwritten",
    "reported",
    InPlaceLogits.apply,
    RowLoss.apply,
    LABELS,
    source="Liger-Kernel#272",
    bug="the caller's logits become their gradient",
    trigger="logits used elsewhere",
)


class Smoothed(Function):
    """Cross-entropy with label smoothing 0.1, mean over targets that are not ignored."""

    @staticmethod
    def forward(ctx, x, t):
        ctx.save_for_backward(x, t)
        keep = t != IGNORE
        p = x.log_softmax(-1)
        nll = -p.gather(-1, torch.where(keep, t, 0)[:, None])[:, 0]
        return ((0.9 * nll - 0.1 * p.mean(-1)) * keep).sum() / keep.sum()

    @staticmethod
    def local(ctx):
        x, t = ctx.saved_tensors
        keep = t != IGNORE
        hot = F.one_hot(torch.where(keep, t, 0), x.shape[-1]).to(x.dtype)
        return x, keep, x.softmax(-1) - 0.9 * hot, hot

    @staticmethod
    def backward(ctx, g):
        x, keep, local, _ = Smoothed.local(ctx)
        return g * (local - 0.1 / x.shape[-1]) * keep[:, None] / keep.sum(), None


class SmoothedForgotten(Smoothed):
    @staticmethod
    def backward(ctx, g):
        _, keep, local, hot = Smoothed.local(ctx)
        return g * (local - 0.1 * hot) * keep[:, None] / keep.sum(), None


class SmoothedIgnored(Smoothed):
    @staticmethod
    def backward(ctx, g):
        x, keep, local, _ = Smoothed.local(ctx)
        uniform = (x.softmax(-1) * 0.1 - 0.1 / x.shape[-1]) * ~keep[:, None]
        return g * ((local - 0.1 / x.shape[-1]) * keep[:, None] + uniform) / keep.sum(), None


class SmoothedCount(Smoothed):
    @staticmethod
    def backward(ctx, g):
        x, keep, local, _ = Smoothed.local(ctx)
        return g * (local - 0.1 / x.shape[-1]) * keep[:, None] / keep.numel(), None


for _name, _wrong, _bug, _source in [
    (
        "smoothing_forgotten",
        SmoothedForgotten,
        "backward without the uniform part",
        "Liger-Kernel#198",
    ),
    (
        "smoothing_of_ignored",
        SmoothedIgnored,
        "the uniform part counts ignored targets",
        "pytorch#73205",
    ),
    ("ignored_scaling", SmoothedCount, "divides by all targets, not by those kept", "Paddle#28622"),
]:
    register(
        _name,
        "reported",
        _wrong.apply,
        Smoothed.apply,
        LABELS,
        bug=_bug,
        trigger="",
        source=_source,
    )
