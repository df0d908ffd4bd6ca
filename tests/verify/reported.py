"""Wrong functions with right twins, part two: bugs that public projects reported, made small, and their relatives."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.pairs import MeanSquare, rand, rand_labels, raw, register

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
    "reduction_none",
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


# ------------------------------------------------------------------------------------------ relatives
class MaskedSoftmax(Function):
    """Softmax over the last dimension."""

    @staticmethod
    def forward(ctx, x):
        y = x.softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return y * (g - (g * y).sum(-1, keepdim=True))


class MaskedSoftmaxNaN(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.softmax(-1)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        y = x.softmax(-1)
        return y * g - (y * y.log() * 0 + y) * (g * y).sum(-1, keepdim=True)


class Scan(Function):
    """h[t] = a h[t-1] + x[t] over the first dimension."""

    @staticmethod
    def forward(ctx, x, a):
        h, out = torch.zeros_like(x[0]), []
        for row in x:
            h = a * h + row
            out.append(h)
        y = torch.stack(out)
        ctx.save_for_backward(y, a)
        return y

    @staticmethod
    def backward(ctx, g):
        y, a = ctx.saved_tensors
        carry, gx, ga = torch.zeros_like(g[0]), [], torch.zeros_like(a, dtype=torch.float64)
        for t in reversed(range(len(g))):
            carry = g[t] + carry
            gx.append(carry)
            ga = ga + (carry * (y[t - 1] if t else 0)).sum()
            carry = a * carry
        return torch.stack(gx[::-1]), ga.to(a.dtype)


class ScanStep(Scan):
    @staticmethod
    def backward(ctx, g):
        y, _a = ctx.saved_tensors
        gx, _ = Scan.backward(ctx, g)
        return gx, (gx * y).sum()  # this step's state instead of the one before


class Gather(Function):
    """Rows of a table; the gradient of a row used twice adds up."""

    @staticmethod
    def forward(ctx, table, index):
        ctx.save_for_backward(index)
        ctx.rows = table.shape[0]
        return table[index]

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return g.new_zeros(ctx.rows, g.shape[-1]).index_add(0, index, g), None


class GatherOverwrites(Gather):
    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return g.new_zeros(ctx.rows, g.shape[-1]).index_copy(0, index, g), None


def table(dtype=torch.float64, seed=0):
    return rand((5, 3))(dtype, seed)[0], torch.tensor([0, 2, 2, 4])


class Square(Function):
    """Mean of squares over the last dimension."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (
            x.float().square().mean(-1).to(x.dtype)
            if x.dtype == torch.float16
            else x.square().mean(-1)
        )

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g[..., None] * x / x.shape[-1]


class SquareOverflow(Square):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 4096 * x * 32 * g[..., None] / (65536 * x.shape[-1])


class Drop(Function):
    """Dropout from a seed."""

    @staticmethod
    def mask(x, seed):
        return (
            torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            > 0.5
        )

    @staticmethod
    def forward(ctx, x):
        ctx.seed = int(torch.randint(2**31, ()))
        return x * Drop.mask(x, ctx.seed).to(x.dtype) * 2

    @staticmethod
    def backward(ctx, g):
        return g * Drop.mask(g, ctx.seed).to(g.dtype) * 2


class DropUnscaled(Drop):
    @staticmethod
    def backward(ctx, g):
        return g * Drop.mask(g, ctx.seed).to(g.dtype)


class DropReseeds(Drop):
    @staticmethod
    def backward(ctx, g):
        torch.manual_seed(ctx.seed)  # everybody's generator
        return g * Drop.mask(g, ctx.seed).to(g.dtype) * 2


class DropNewMask(Drop):
    @staticmethod
    def backward(ctx, g):
        return g * (torch.rand_like(g) > 0.5) * 2


class Broadcast(Function):
    """x * w with w broadcast over rows."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).reshape(-1, w.shape[-1]).sum(0)


class BroadcastFirstRow(Broadcast):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).reshape(-1, w.shape[-1])[0]


class BroadcastFreezes(Broadcast):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).reshape(-1, w.shape[-1]).sum(0) * (
            1 if ctx.needs_input_grad[0] else 0
        )


class Numpy(Function):
    """sin through numpy."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.from_numpy(np.cos(x.detach().numpy()))


class NumpyAlias(Numpy):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = x.detach().numpy()
        return torch.from_numpy(np.sin(ctx.kept))

    @staticmethod
    def backward(ctx, g):
        return g * torch.from_numpy(np.cos(ctx.kept))


class Cached(Function):
    """exp, with a cache per shape that holds the wrong call's output."""

    cache: dict = {}  # noqa: RUF012  # the bug

    @staticmethod
    def forward(ctx, x):
        Cached.cache[x.shape] = y = x.exp()
        ctx.shape = x.shape
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return g * Cached.cache[ctx.shape]


class Exp(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class ExpScalesSaved(Exp):
    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return y.detach().mul_(g)


class MeanConstant(MeanSquare):
    """Divides by the sample's own size, written into the kernel."""

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        gx = g * 2 * (x - y) / 12
        return gx, -gx


class Gelu(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (torch.special.ndtr(x) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi))


class GeluTanh(Gelu):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(F.gelu(leaf, approximate="tanh"), leaf, g)[0]


class LogSumExp(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.logsumexp(-1)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g[..., None] * x.softmax(-1)


class LogSumExpOverflow(LogSumExp):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g[..., None] * x.exp() / x.exp().sum(-1, keepdim=True)


T = rand((3, 4))
for _name, _wrong, _right, _make, _bug in [
    ("masked_softmax_nan", MaskedSoftmaxNaN, MaskedSoftmax, T, "0 · log 0 at a masked element"),
    (
        "scan_time_step",
        ScanStep,
        Scan,
        rand((5, 3), ()),
        "this time step's state instead of the last",
    ),
    ("gather_overwrites", GatherOverwrites, Gather, table, "a row used twice gets one gradient"),
    ("fp16_overflow", SquareOverflow, Square, T, "an intermediate beyond float16's range"),
    ("dropout_unscaled", DropUnscaled, Drop, T, "backward without 1 / (1 - p)"),
    ("dropout_new_mask", DropNewMask, Drop, T, "backward draws another mask"),
    ("dropout_reseeds", DropReseeds, Drop, T, "backward reseeds the global generator"),
    (
        "broadcast_first_row",
        BroadcastFirstRow,
        Broadcast,
        rand((4, 3), (3,)),
        "gradient of the first row only",
    ),
    (
        "broadcast_freezes",
        BroadcastFreezes,
        Broadcast,
        rand((4, 3), (3,)),
        "no weight gradient where x is frozen",
    ),
    ("numpy_alias", NumpyAlias, Numpy, T, "a numpy view of the input is kept: no version check"),
    ("cache_per_shape", Cached, Exp, T, "the last output of that shape serves all"),
    ("saved_scaled", ExpScalesSaved, Exp, T, "the saved output is scaled in place"),
    (
        "constant_count",
        MeanConstant,
        MeanSquare,
        rand((3, 4), (3, 4)),
        "the count is the sample's, a constant",
    ),
    ("gelu_tanh", GeluTanh, Gelu, T, "backward of the tanh approximation"),
    (
        "logsumexp_overflow",
        LogSumExpOverflow,
        LogSumExp,
        T,
        "exp overflows in backward, not in forward",
    ),
]:
    register(_name, "relative", _wrong.apply, _right.apply, _make, bug=_bug, trigger="")
