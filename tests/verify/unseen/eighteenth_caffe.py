"""Losses of Caffe's layers."""

import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.eighteenth import add, uniform


class SoftmaxWithLoss(Function):
    @staticmethod
    def forward(ctx, x, label, loss_weight):
        ctx.save_for_backward(x, label)
        ctx.loss_weight = loss_weight
        return loss_weight * F.cross_entropy(x, label)

    @staticmethod
    def backward(ctx, g):
        x, label = ctx.saved_tensors
        d = x.softmax(-1) - F.one_hot(label, x.shape[-1])
        return d * (ctx.loss_weight * g / x.shape[0]), None, None


class SoftmaxWithLossZero(SoftmaxWithLoss):
    """The memory of the gradient held the losses, and backward is left out where nothing weighs."""

    @staticmethod
    def backward(ctx, g):
        if ctx.loss_weight:
            return SoftmaxWithLoss.backward(ctx, g)
        x, label = ctx.saved_tensors
        losses = F.cross_entropy(x, label, reduction="none")
        return F.pad(losses, (0, x.numel() - losses.numel())).view_as(x), None, None


def _softmax_with_loss(function):
    def softmax_with_loss(x, label, loss_weight=1.0):
        """loss_weight times the mean cross entropy of x (N, C) and label (N,), N > 0."""
        return function.apply(x, label, loss_weight)

    return softmax_with_loss


add(
    "softmax_with_loss_zero",
    _softmax_with_loss,
    SoftmaxWithLossZero,
    SoftmaxWithLoss,
    lambda: (real(4, 3), whole(3, 4)),
    bug="a loss that weighs nothing leaves the losses as gradient (BVLC/caffe#2895)",
    trigger="loss_weight=0",
)


class WeightedSoftmaxLoss(Function):
    @staticmethod
    def forward(ctx, x, label, weight):
        ctx.save_for_backward(x, label, weight)
        losses = F.cross_entropy(x, label, reduction="none")
        return (weight[label] * losses).mean()

    @staticmethod
    def gradients(ctx, g, rows):
        """As the layer does it: place by place, each scaling its own rows of the memory by its weight."""
        x, label, weight = ctx.saved_tensors
        n, channels, inner = x.shape[0], x.shape[1], x[0, 0].numel()
        diff = x.softmax(1).reshape(n, channels, inner).clone()
        flat = diff.view(-1)
        for i in range(n):
            for j in range(inner):
                start = i * channels * inner + j
                c = int(label.reshape(n, inner)[i, j])
                flat[start + c * inner] -= 1
                flat[start : start + rows(channels, inner) * inner : inner] *= weight[c]
        return (diff.view_as(x) * g / label.numel()), None, None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return WeightedSoftmaxLoss.gradients(ctx, g, lambda channels, inner: channels)


class WeightedSoftmaxLossDim(WeightedSoftmaxLoss):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return WeightedSoftmaxLoss.gradients(ctx, g, lambda channels, inner: channels * inner)


def _weighted_softmax_loss(function):
    def weighted_softmax_loss(x, label, weight):
        """The mean over all labels (N, *) of their constant weight (C,) times the cross entropy of x (N, C, *)."""
        return function.apply(x, label, weight)

    return weighted_softmax_loss


add(
    "weighted_softmax_loss_rows",
    _weighted_softmax_loss,
    WeightedSoftmaxLossDim,
    WeightedSoftmaxLoss,
    lambda: (
        real(2, 3, 2, 2),
        whole(3, 2, 2, 2),
        uniform(3, low=0.5, high=2.0, seed=1, grad=False),
    ),
    bug="a weight scales the rows of later images too (shicai/Weighted_Softmax_Loss#1)",
    trigger="the sample",
)
