"""Losses with masks, weights and options."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import pair, real, whole


class MaskedMean(Function):
    """Mean of squares over what the mask keeps."""

    @staticmethod
    def forward(ctx, x, keep):
        ctx.save_for_backward(x, keep)
        return (x.square() * keep).sum() / keep.sum().clamp(min=1)

    @staticmethod
    def backward(ctx, g):
        x, keep = ctx.saved_tensors
        return 2 * g * x * keep / keep.sum().clamp(min=1), None


class MaskedMeanAll(MaskedMean):
    @staticmethod
    def backward(ctx, g):
        x, keep = ctx.saved_tensors
        return 2 * g * x * keep / keep.numel(), None


pair(
    "masked_mean_all_true",
    MaskedMeanAll.apply,
    MaskedMean.apply,
    lambda: (real(3, 4), torch.ones(3, 4, dtype=torch.bool)),
    "divides by all elements; the sample's mask keeps everything",
)


class Pinball(Function):
    """Quantile loss at 0.3, reduction "none"."""

    @staticmethod
    def forward(ctx, y, t):
        ctx.save_for_backward(y, t)
        e = t - y
        return torch.maximum(0.3 * e, -0.7 * e)

    @staticmethod
    def backward(ctx, g):
        y, t = ctx.saved_tensors
        e = t - y
        return g * (0.7 * (e <= 0).to(e) - 0.3 * (e > 0).to(e)), None


class PinballKink(Pinball):
    @staticmethod
    def backward(ctx, g):
        y, t = ctx.saved_tensors
        e = t - y
        return g * (0.7 * (e < 0).to(e) - 0.3 * (e > 0).to(e) + 1.0 * (e == 0).to(e)), None


pair(
    "pinball_kink",
    PinballKink.apply,
    Pinball.apply,
    lambda: (real(6), real(6, seed=1, grad=False).zero_()),
    "outside of the subgradient where prediction and target are equal",
)


class InfoNCE(Function):
    """Cross-entropy of a b^T / tau against the diagonal."""

    @staticmethod
    def forward(ctx, a, b, tau):
        p = (a @ b.T / tau).softmax(-1)
        ctx.save_for_backward(a, b)
        ctx.tau = tau
        return -p.diagonal().log().mean()

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        p = (a @ b.T / ctx.tau).softmax(-1)
        d = g * (p - torch.eye(len(a)).to(p)) / (len(a) * ctx.tau)
        return d @ b, d.T @ a, None


class InfoNCESymmetric(InfoNCE):
    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        p = (a @ b.T / ctx.tau).softmax(-1)
        d = g * (p - torch.eye(len(a)).to(p)) / (len(a) * ctx.tau)
        return d @ b, d @ a, None


pair(
    "infonce_transpose",
    InfoNCESymmetric.apply,
    InfoNCE.apply,
    lambda: (real(4, 3), real(4, 3, seed=1), 0.5),
    "the gradient of the keys is not transposed",
)


class WeightedNLL(Function):
    """Weighted negative log-likelihood; the class weights are differentiable too."""

    @staticmethod
    def forward(ctx, x, t, w):
        ctx.save_for_backward(x, t, w)
        return -(w[t] * x.log_softmax(-1).gather(-1, t[:, None])[:, 0]).sum()

    @staticmethod
    def backward(ctx, g):
        x, t, w = ctx.saved_tensors
        logp = x.log_softmax(-1)
        gx = g * w[t][:, None] * (logp.exp() - F.one_hot(t, x.shape[-1]))
        wide = torch.promote_types(w.dtype, torch.float32)
        rows = (-g * logp.gather(-1, t[:, None])[:, 0]).to(wide)
        return gx, None, torch.zeros_like(w, dtype=wide).index_add(0, t, rows).to(w.dtype)


class WeightedNLLAssign(WeightedNLL):
    @staticmethod
    def backward(ctx, g):
        gx, _, _ = WeightedNLL.backward(ctx, g)
        x, t, w = ctx.saved_tensors
        gw = torch.zeros_like(w).index_put(
            (t,), -g * x.log_softmax(-1).gather(-1, t[:, None])[:, 0]
        )
        return gx, None, gw


pair(
    "class_weight_assigned",
    WeightedNLLAssign.apply,
    WeightedNLL.apply,
    lambda: (real(5, 3), torch.tensor([0, 2, 1, 1, 0]), real(3, seed=1, positive=True)),
    "the weight's gradient keeps one row a class",
)


class ZLoss(Function):
    """Cross-entropy plus 0.1 times the squared log-partition, mean over targets that are not ignored."""

    @staticmethod
    def forward(ctx, x, t):
        ctx.save_for_backward(x, t)
        keep = t >= 0
        z = x.logsumexp(-1)
        nll = z - x.gather(-1, t.clamp(min=0)[:, None])[:, 0]
        return ((nll + 0.1 * z**2) * keep).sum() / keep.sum()

    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors
        keep = (t >= 0)[:, None]
        z = x.logsumexp(-1, keepdim=True)
        local = x.softmax(-1) * (1 + 0.2 * z) - F.one_hot(t.clamp(min=0), x.shape[-1])
        return g * local * keep / keep.sum(), None


class ZLossIgnored(ZLoss):
    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors
        keep = (t >= 0)[:, None]
        z = x.logsumexp(-1, keepdim=True)
        p = x.softmax(-1)
        return g * (
            (p - F.one_hot(t.clamp(min=0), x.shape[-1])) * keep + 0.2 * z * p
        ) / keep.sum(), None


pair(
    "zloss_ignored_rows",
    ZLossIgnored.apply,
    ZLoss.apply,
    lambda: (real(5, 3), whole(3, 5)),
    "ignored rows get the gradient of the z-loss",
)


class SquaredHinge(torch.nn.Module):
    """A Module with an option that only its keyword turns on."""

    class Right(Function):
        @staticmethod
        def forward(ctx, x, t, margin):
            ctx.save_for_backward(x, t)
            ctx.margin = margin
            return (margin - t * x).clamp(min=0).square().sum()

        @staticmethod
        def backward(ctx, g):
            x, t = ctx.saved_tensors
            return -2 * g * t * (ctx.margin - t * x).clamp(min=0), None, None

    class Wrong(Right):
        @staticmethod
        def backward(ctx, g):
            x, t = ctx.saved_tensors
            return -2 * g * t * (1 - t * x).clamp(min=0), None, None

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t, *, margin=1.0):
        return self.function.apply(x, t, margin)


pair(
    "hinge_keyword",
    SquaredHinge(SquaredHinge.Wrong),
    SquaredHinge(SquaredHinge.Right),
    lambda: (real(6), real(6, seed=1, grad=False).sign()),
    "backward knows margin 1 only",
    kwargs=lambda: {"margin": 0.7},
)
