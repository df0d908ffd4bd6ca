"""Losses."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.eighteenth import add


class CTCLoss(Function):
    @staticmethod
    def forward(ctx, log_probs, targets, blank):
        ctx.save_for_backward(log_probs, targets)
        ctx.blank = blank
        labels, skip = CTCLoss.path(targets, blank)
        alpha = CTCLoss.walk(CTCLoss.emitted(log_probs, labels), skip)
        return -alpha[-1, :, -2:].logsumexp(-1)

    @staticmethod
    def path(targets, blank):
        """The labels with blanks between them, and which may be reached from the last label but one."""
        labels = torch.full(
            (targets.shape[0], 2 * targets.shape[1] + 1), blank, device=targets.device
        )
        labels[:, 1::2] = targets
        skip = F.pad(labels[:, 2:] != labels[:, :-2], (2, 0)) & (labels != blank)
        return labels, skip

    @staticmethod
    def emitted(log_probs, labels):
        return log_probs.gather(-1, labels.expand(log_probs.shape[0], -1, -1))

    @staticmethod
    def walk(emitted, skip):
        """Logarithms of the probabilities to be in each state with what was emitted up to there."""
        state = torch.full_like(emitted[0], -torch.inf)
        state[:, :2] = emitted[0, :, :2]
        states = [state]
        for row in emitted[1:]:
            one = F.pad(state[:, :-1], (1, 0), value=-torch.inf)
            two = F.pad(state[:, :-2], (2, 0), value=-torch.inf).masked_fill(~skip, -torch.inf)
            state = torch.stack((state, one, two)).logsumexp(0) + row
            states.append(state)
        return torch.stack(states)

    @staticmethod
    def gradients(ctx, g, normal):
        log_probs, targets = ctx.saved_tensors
        labels, skip = CTCLoss.path(targets, ctx.blank)
        emitted = CTCLoss.emitted(log_probs, labels)
        alpha = CTCLoss.walk(emitted, skip)
        back = CTCLoss.path(targets.flip(1), ctx.blank)[1]
        beta = CTCLoss.walk(emitted.flip(0, 2), back).flip(0, 2)
        total = alpha[-1, :, -2:].logsumexp(-1).view(1, -1, 1)
        share = (alpha + beta - emitted - total).exp()
        index = labels.expand(log_probs.shape[0], -1, -1)
        grad = normal(log_probs) - torch.zeros_like(log_probs).scatter_add(-1, index, share)
        return grad * g.view(1, -1, 1), None, None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return CTCLoss.gradients(ctx, g, torch.zeros_like)


class CTCLossSoftmax(CTCLoss):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return CTCLoss.gradients(ctx, g, torch.exp)


def _ctc_loss(function):
    def ctc_loss(log_probs, targets, blank=0):
        """CTC losses (N,) of log_probs (T, N, C) and targets (N, S), 0 < 2 S < T, none of them blank."""
        return function.apply(log_probs, targets, blank)

    return ctc_loss


add(
    "ctc_loss_softmax",
    _ctc_loss,
    CTCLossSoftmax,
    CTCLoss,
    lambda: (real(5, 2, 4, grad=False).log_softmax(-1).requires_grad_(), whole(3, 2, 2) + 1),
    bug="the gradient is that of a log_softmax's input (pytorch/pytorch#67462)",
    trigger="the sample",
)


class FusedCrossEntropy(Function):
    @staticmethod
    def forward(ctx, x, weight, target, ignore_index, reduction):
        ctx.save_for_backward(x, weight, target)
        ctx.ignore_index, ctx.reduction = ignore_index, reduction
        return F.cross_entropy(
            x @ weight.mT, target, ignore_index=ignore_index, reduction=reduction
        )

    @staticmethod
    def gradients(ctx, g):
        """g is a number, or one of each row."""
        x, weight, target = ctx.saved_tensors
        kept = target != ctx.ignore_index
        d = (x @ weight.mT).softmax(-1)
        d = d - F.one_hot(target.where(kept, 0), weight.shape[0])
        d = d * kept.unsqueeze(-1) * g.reshape(-1, 1)
        if ctx.reduction == "mean":
            d = d / kept.sum()
        return d @ weight, d.mT @ x, None, None, None

    @staticmethod
    def backward(ctx, g):
        return FusedCrossEntropy.gradients(ctx, g)


class FusedCrossEntropyFirst(FusedCrossEntropy):
    @staticmethod
    def backward(ctx, g):
        return FusedCrossEntropy.gradients(ctx, g.reshape(-1)[0])


def _fused_cross_entropy(function):
    def fused_linear_cross_entropy(x, weight, target, ignore_index=-100, reduction="mean"):
        """Cross entropy of the logits x weightᵀ, x (N, D), weight (V, D), target (N,), N > 0.

        reduction is "mean", "sum" or "none"; a target may be ignore_index, but not all are.
        """
        return function.apply(x, weight, target, ignore_index, reduction)

    return fused_linear_cross_entropy


add(
    "fused_cross_entropy_none",
    _fused_cross_entropy,
    FusedCrossEntropyFirst,
    FusedCrossEntropy,
    lambda: (real(4, 3), real(5, 3, seed=1), torch.tensor([-100, 1, 4, 2])),
    kwargs=lambda: {"reduction": "none"},
    bug="all rows are scaled by the first one's cotangent (linkedin/Liger-Kernel#968)",
    trigger="the sample",
)


class IgnoringCrossEntropy(Function):
    @staticmethod
    def forward(ctx, logits, label, ignore_index):
        ctx.save_for_backward(logits, label)
        ctx.ignore_index = ignore_index
        return F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="none")

    @staticmethod
    def gradients(ctx, g, mask):
        logits, label = ctx.saved_tensors
        kept = (label != ctx.ignore_index).unsqueeze(-1)
        d = logits.softmax(-1) - kept * F.one_hot(label.where(kept[:, 0], 0), logits.shape[-1])
        return mask(d, kept) * g.unsqueeze(-1), None, None

    @staticmethod
    def backward(ctx, g):
        return IgnoringCrossEntropy.gradients(ctx, g, torch.mul)


class IgnoringCrossEntropyKept(IgnoringCrossEntropy):
    @staticmethod
    def backward(ctx, g):
        return IgnoringCrossEntropy.gradients(ctx, g, lambda d, kept: d)


def _ignoring_cross_entropy(function):
    def softmax_with_cross_entropy(logits, label, ignore_index=-100):
        """Cross entropies (N,) of logits (N, C) and label (N,), 0 where that is ignore_index; C > 0."""
        return function.apply(logits, label, ignore_index)

    return softmax_with_cross_entropy


add(
    "cross_entropy_ignored",
    _ignoring_cross_entropy,
    IgnoringCrossEntropyKept,
    IgnoringCrossEntropy,
    lambda: (real(4, 5), torch.tensor([1, 4, 0, 2])),
    kwargs=lambda: {"ignore_index": 1},
    bug="ignored rows get the softmax as gradient (PaddlePaddle/Paddle#28622)",
    trigger="the sample",
)


class TotalScores(Function):
    @staticmethod
    def forward(ctx, scores):
        ctx.save_for_backward(scores)
        return scores.logsumexp(-1).sum(-1)

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0].softmax(-1) * g.view(-1, 1, 1)


class TotalScoresUnit(TotalScores):
    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0].softmax(-1)


def _total_scores(function):
    def total_scores(scores):
        """The logarithm of the sum over all paths through T steps of K arcs, scores (N, T, K), K > 0."""
        return function.apply(scores)

    return total_scores


add(
    "total_scores_cotangent",
    _total_scores,
    TotalScoresUnit,
    TotalScores,
    lambda: (real(2, 3, 4),),
    bug="backward ignores the cotangent (k2-fsa/k2#341)",
    trigger="the sample",
)
