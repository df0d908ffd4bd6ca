"""Squared errors, overlaps, and means."""

import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.eighteenth import add, memory, uniform


class RatingError(Function):
    """The squared error of a rating, regularised."""

    @staticmethod
    def error(b_u, alpha, b_i, c_u, p, q, rating, dev):
        return rating - (b_u + alpha * dev + b_i * c_u + (p * q).sum(-1))

    @staticmethod
    def forward(ctx, b_u, alpha, b_i, c_u, p, q, rating, dev, reg):
        ctx.save_for_backward(b_u, alpha, b_i, c_u, p, q, rating, dev)
        ctx.reg = reg
        size = b_u**2 + alpha**2 + b_i**2 + (c_u - 1) ** 2 + (p * p + q * q).sum(-1)
        return RatingError.error(b_u, alpha, b_i, c_u, p, q, rating, dev) ** 2 + reg * size

    @staticmethod
    def backward(ctx, g):
        b_u, alpha, b_i, c_u, p, q, _, dev = ctx.saved_tensors
        e, reg = RatingError.error(*ctx.saved_tensors), ctx.reg
        e_, g_ = e.unsqueeze(-1), g.unsqueeze(-1)
        return (
            g * (-2 * e + 2 * reg * b_u),
            g * (-2 * e * dev + 2 * reg * alpha),
            g * (-2 * e * c_u + 2 * reg * b_i),
            g * (-2 * e * b_i + 2 * reg * (c_u - 1)),
            g_ * (-2 * e_ * q + 2 * reg * p),
            g_ * (-2 * e_ * p + 2 * reg * q),
            *[None] * 3,
        )


class RatingErrorBrackets(RatingError):
    @staticmethod
    def backward(ctx, g):
        b_u, alpha, b_i, c_u, p, q, _, dev = ctx.saved_tensors
        e, reg = RatingError.error(*ctx.saved_tensors), ctx.reg
        e_, g_ = e.unsqueeze(-1), g.unsqueeze(-1)
        return (
            g * (-2 * e + 2 * reg * b_u),
            g * (2 * e * (-dev + 2 * reg * alpha)),
            g * (2 * e * (-c_u + 2 * reg * b_i)),
            g * (2 * e * (-b_i + 2 * reg * (c_u - 1))),
            g_ * (2 * e_ * (q + 2 * reg * p)),
            g_ * (2 * e_ * (p + 2 * reg * q)),
            *[None] * 3,
        )


def _rating_error(function):
    def rating_error(b_u, alpha, b_i, c_u, p, q, rating, dev, reg=0.1):
        """Regularised squared errors (N,) of predictions b_u + alpha dev + b_i c_u + p · q of constant ratings (N,).

        b_u, alpha, b_i, c_u (N,), factors p and q (N, K), constant dev (N,).
        """
        return function.apply(b_u, alpha, b_i, c_u, p, q, rating, dev, reg)

    return rating_error


add(
    "rating_error_brackets",
    _rating_error,
    RatingErrorBrackets,
    RatingError,
    lambda: (
        *[real(3, seed=i) for i in range(4)],
        real(3, 2, seed=4),
        real(3, 2, seed=5),
        real(3, seed=6, grad=False),
        real(3, seed=7, grad=False),
    ),
    bug="the regularisation stands within the error's brackets (dandxy89/BellkorAlgorithm#3)",
    trigger="the sample",
)


class MSELoss(Function):
    @staticmethod
    def forward(ctx, x, target, reduction):
        ctx.save_for_backward(x, target)
        ctx.reduction = reduction
        return F.mse_loss(x, target, reduction=reduction)

    @staticmethod
    def gradients(ctx, g):
        x, target = ctx.saved_tensors
        grad = 2 * (x - target) * g
        if ctx.reduction == "mean":
            grad = grad / x.numel()
        return grad, -grad, None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return MSELoss.gradients(ctx, g)


class MSELossBuffer(MSELoss):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return MSELoss.gradients(ctx, memory(g.contiguous(), ctx.saved_tensors[0].shape))


def _mse_loss(function):
    def mse_loss(x, target, reduction="mean"):
        """Squared errors of x and target, of one shape and not empty; reduction is "mean", "sum" or "none"."""
        return function.apply(x, target, reduction)

    return mse_loss


add(
    "mse_loss_buffer",
    _mse_loss,
    MSELossBuffer,
    MSELoss,
    lambda: (real(4), real(4, seed=1, grad=False)),
    bug="each element reads its own cotangent, of which there is one (flagos-ai/FlagGems#5212)",
    trigger="the sample",
)


class FusedMSE(Function):
    @staticmethod
    def forward(ctx, predictions, targets):
        ctx.save_for_backward(predictions, targets)
        return (predictions - targets).square().mean()

    @staticmethod
    def launch(ctx, g, inv_n=1.0):
        predictions, targets = ctx.saved_tensors
        grad = g * 2 * (predictions - targets) * inv_n
        return grad, -grad

    @staticmethod
    def backward(ctx, g):
        return FusedMSE.launch(ctx, g, 1 / ctx.saved_tensors[0].numel())


class FusedMSEUnscaled(FusedMSE):
    @staticmethod
    def backward(ctx, g):
        return FusedMSE.launch(ctx, g)


def _fused_mse(function):
    def fused_mse(predictions, targets):
        """The mean squared error of predictions and targets, of one shape and not empty."""
        return function.apply(predictions, targets)

    return fused_mse


add(
    "fused_mse_inv_n",
    _fused_mse,
    FusedMSEUnscaled,
    FusedMSE,
    lambda: (real(4, 3), real(4, 3, seed=1)),
    bug="the scale 1 / n of the constructor is not used (ooples/AiDotNet.Tensors#938)",
    trigger="the sample",
)


class Mean(Function):
    @staticmethod
    def forward(ctx, x, dim):
        ctx.shape, ctx.dim = x.shape, dim
        return x.mean(dim)

    @staticmethod
    def backward(ctx, g):
        return g.unsqueeze(ctx.dim).expand(ctx.shape) / ctx.shape[ctx.dim], None


class MeanSum(Mean):
    @staticmethod
    def backward(ctx, g):
        return g.unsqueeze(ctx.dim).expand(ctx.shape), None


def _mean(function):
    def mean(x, dim):
        """The mean of x over one dimension, which is not empty."""
        return function.apply(x, dim)

    return mean


add(
    "mean_sum",
    _mean,
    MeanSum,
    Mean,
    lambda: (real(4, 3), 1),
    bug="backward does not divide by the size (kakaobrain/trident#66)",
    trigger="the sample",
)


class DiceLayer(Function):
    @staticmethod
    def forward(ctx, prob, gt):
        ctx.save_for_backward(prob, gt)
        return 2 * (prob * gt).sum(-1) / (prob.square().sum(-1) + gt.square().sum(-1))

    @staticmethod
    def backward(ctx, g):
        prob, gt = ctx.saved_tensors
        intersection = (prob * gt).sum(-1, keepdim=True)
        union = (prob.square() + gt.square()).sum(-1, keepdim=True)
        d = gt * union / union**2 - 2 * prob * intersection / union**2
        return 2 * d * g.unsqueeze(-1), None


class DiceLayerMinus(DiceLayer):
    @staticmethod
    def backward(ctx, g):
        return -DiceLayer.backward(ctx, g)[0], None


def _dice_layer(function):
    def dice(prob, gt):
        """Dice coefficients (N,) of the foreground's probabilities and its constant truth, both (N, V) and not 0."""
        return function.apply(prob, gt)

    return dice


def _masks():
    return uniform(2, 6), (uniform(2, 6, seed=1, grad=False) > 0.5).double()


add(
    "dice_sign",
    _dice_layer,
    DiceLayerMinus,
    DiceLayer,
    _masks,
    bug="the gradient is that of the coefficient with a minus (faustomilletari/VNet#32)",
    trigger="the sample",
)


class DiceCoeff(Function):
    @staticmethod
    def forward(ctx, x, target):
        ctx.save_for_backward(x, target)
        inter, union = DiceCoeff.parts(x, target)
        return 2 * inter / union

    @staticmethod
    def parts(x, target):
        """Both with half a step, so that nothing is divided by 0."""
        return (x * target).sum() + 0.00005, x.sum() + target.sum() + 0.0001

    @staticmethod
    def backward(ctx, g):
        x, target = ctx.saved_tensors
        inter, union = DiceCoeff.parts(x, target)
        return g * 2 * (target * union - inter) / (union * union), None


class DiceCoeffPlus(DiceCoeff):
    @staticmethod
    def backward(ctx, g):
        x, target = ctx.saved_tensors
        inter, union = DiceCoeff.parts(x, target)
        return g * 2 * (target * union + inter) / union * union, None


def _dice_coeff(function):
    def dice_coeff(x, target):
        """The Dice coefficient of probabilities x and a constant mask of one shape, (2 Σ x t + ε) / (Σ x + Σ t + ε)."""
        return function.apply(x, target)

    return dice_coeff


add(
    "dice_coeff_plus",
    _dice_coeff,
    DiceCoeffPlus,
    DiceCoeff,
    _masks,
    bug="the quotient rule has a plus, and the division is multiplied back (milesial/Pytorch-UNet#35)",
    trigger="the sample",
)
