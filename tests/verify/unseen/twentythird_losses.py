"""Losses: reductions, ignored and smoothed targets, masks, blocks of rows, saturated logits."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentythird import add, check, indices, sized


# Cross entropy of each row, their sum or their mean; its gradient is ready when forward ends
def fused_entropy(wrong):
    class Entropy(Function):
        @staticmethod
        def forward(ctx, x, t, reduction):
            losses = x.logsumexp(1) - x.gather(1, t[:, None])[:, 0]
            grad = x.softmax(1) - F.one_hot(t, x.shape[1])
            ctx.save_for_backward(grad / len(x) if reduction == "mean" else grad)
            return losses if reduction == "none" else getattr(losses, reduction)()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (grad,) = ctx.saved_tensors
            scale = grad_y.reshape(-1)[0] if wrong else grad_y[..., None]
            return grad * scale, None, None

    def loss(x, t, reduction="mean"):
        sized("x", x, None, None)
        sized("t", t, len(x))
        indices("t", t, x.shape[1])
        check(reduction in ("none", "sum", "mean"), "reduction: expected none, sum or mean")
        return Entropy.apply(x, t, reduction)

    return loss


add(
    "fused_entropy_none",
    fused_entropy,
    lambda: (real(4, 3), whole(3, 4)),
    kwargs=lambda: {"reduction": "none"},
    bug="Backward scales the stored gradient by the first row's grad_output alone",
    trigger="a grad_output that varies",
)


# Cross entropy as the mean over the targets that are kept, 0 where there is none
def kept_entropy(wrong):
    class Entropy(Function):
        @staticmethod
        def forward(ctx, x, t, ignore_index):
            kept = t != ignore_index
            place = t.where(kept, 0)
            ctx.save_for_backward(x, place, kept)
            losses = -x.log_softmax(1).gather(1, place[:, None])[:, 0]
            return losses.where(kept, 0).sum() / kept.sum().clamp_min(1)

        @staticmethod
        def backward(ctx, grad_y):
            x, place, kept = ctx.saved_tensors
            count = len(kept) if wrong else kept.sum().clamp_min(1)
            grad = x.softmax(1) - F.one_hot(place, x.shape[1])
            return (grad * grad_y / count).where(kept[:, None], 0), None, None

    def loss(x, t, ignore_index=-100):
        sized("x", x, None, None)
        sized("t", t, len(x))
        indices("t", t.where(t != ignore_index, 0), x.shape[1])
        return Entropy.apply(x, t, ignore_index)

    return loss


add(
    "kept_entropy_count",
    kept_entropy,
    lambda: (real(5, 3), whole(3, 5)),
    bug="Backward divides by all targets, forward by those kept",
    trigger="a target of ignore_index",
)


# Cross entropy with smoothed labels, summed over the targets that are kept
def smoothed_entropy(wrong):
    class Entropy(Function):
        @staticmethod
        def forward(ctx, x, t, ignore_index, smoothing):
            kept = t != ignore_index
            place = t.where(kept, 0)
            ctx.save_for_backward(x, place, kept)
            ctx.smoothing = smoothing
            logs = x.log_softmax(1)
            hit = logs.gather(1, place[:, None])[:, 0]
            losses = -(1 - smoothing) * hit - smoothing * logs.mean(1)
            return losses.where(kept, 0).sum()

        @staticmethod
        def backward(ctx, grad_y):
            x, place, kept = ctx.saved_tensors
            classes = x.shape[1]
            even = ctx.smoothing / classes
            hit = F.one_hot(place, classes).to(x.dtype)
            grad = x.softmax(1) - (1 - ctx.smoothing) * hit
            part = grad if wrong else grad - even
            part = part.where(kept[:, None], 0)
            return grad_y * (part - even if wrong else part), None, None, None

    def loss(x, t, ignore_index=-100, label_smoothing=0.1):
        sized("x", x, None, None)
        sized("t", t, len(x))
        indices("t", t.where(t != ignore_index, 0), x.shape[1])
        check(0 <= label_smoothing <= 1, "label_smoothing: expected 0 to 1")
        check(bool(x.isfinite().all()), "x: expected finite numbers")
        return Entropy.apply(x, t, ignore_index, label_smoothing)

    return loss


add(
    "smoothed_entropy_ignored",
    smoothed_entropy,
    lambda: (real(4, 3), whole(3, 4)),
    bug="Ignored rows keep the smoothing's part of the gradient",
    trigger="a target of ignore_index",
)


# Softmax over the places that the mask allows, 0 in rows where it allows none
def masked_softmax(wrong):
    class Softmax(Function):
        @staticmethod
        def forward(ctx, x, mask):
            ctx.save_for_backward(x, mask)
            return weights(x, mask)

        @staticmethod
        def backward(ctx, grad_y):
            x, mask = ctx.saved_tensors
            hidden = x.masked_fill(~mask, -torch.inf)
            p = hidden.softmax(-1) if wrong else weights(x, mask)
            return p * (grad_y - (grad_y * p).sum(-1, keepdim=True)), None

    def weights(x, mask):
        some = mask.any(-1, keepdim=True)
        return x.masked_fill(~mask & some, -torch.inf).softmax(-1).where(mask, 0)

    def softmax(x, mask):
        check(x.ndim >= 1 and mask.shape == x.shape, "expected a mask of x's shape")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected bool, got {mask.dtype}")
        return Softmax.apply(x, mask)

    return softmax


add(
    "masked_softmax_row",
    masked_softmax,
    lambda: (real(3, 4), torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 1]]).bool()),
    bug="Backward takes the softmax of nothing where forward gives 0",
    trigger="a row that is masked wholly",
)


# Linear layer and cross entropy in one, 32 rows at a time, so that all logits never exist
def blocked_entropy(wrong):
    block = 32

    class Entropy(Function):
        @staticmethod
        def forward(ctx, x, w, t):
            ctx.save_for_backward(x, w, t)
            parts = zip(x.split(block), t.split(block), strict=True)
            return torch.stack(
                [F.cross_entropy(r @ w.T, s, reduction="sum") for r, s in parts]
            ).sum()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, w, t = ctx.saved_tensors
            grad_x, grad_w = grad_y.new_zeros(x.shape), grad_y.new_zeros(w.shape)
            end = len(x) // block * block if wrong and len(x) > block else len(x)
            for i in range(0, end, block):
                rows = x[i : i + block]
                p = (rows @ w.T).softmax(1) - F.one_hot(t[i : i + block], len(w))
                grad_x[i : i + block] = grad_y * p @ w
                grad_w += grad_y * p.T @ rows
            return grad_x, grad_w, None

    def loss(x, w, t):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        sized("t", t, len(x))
        indices("t", t, len(w))
        check(bool(x.isfinite().all() & w.isfinite().all()), "expected finite numbers")
        return Entropy.apply(x, w, t)

    return loss


add(
    "blocked_entropy_partial",
    blocked_entropy,
    lambda: (real(5, 3), real(4, 3, seed=1), whole(4, 5)),
    bug="Backward leaves out the last block where it is not full",
    trigger="33 rows",
)


# Focal loss of a positive example: -(1 - p)^gamma log p with p = sigmoid(x)
def focal(wrong):
    class Focal(Function):
        @staticmethod
        def forward(ctx, x, gamma):
            ctx.save_for_backward(x)
            ctx.gamma = gamma
            return -(torch.sigmoid(-x) ** gamma) * F.logsigmoid(x)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            p, q = x.sigmoid(), torch.sigmoid(-x)
            entropy = p * p.log() if wrong else torch.xlogy(p, p)
            return grad_y * q**ctx.gamma * (ctx.gamma * entropy - q), None

    def loss(x, gamma=2.0):
        check(gamma >= 1, "gamma: expected a number >= 1")
        return Focal.apply(x, gamma)

    return loss


add(
    "focal_saturated",
    focal,
    lambda: (real(3, 4),),
    bug="Backward takes the logarithm of a probability that has become 0",
    trigger="logits below -745",
)
