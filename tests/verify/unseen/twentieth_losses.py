"""Cross-entropies fused with what stands before them."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentieth import add, indices, sized


def softmax_minus_target(logits, target):
    p = torch.softmax(logits, 1)
    p[torch.arange(len(p), device=p.device), target] -= 1
    return p


# loss_n = lse(x_n w') - (x_n w')_target
def linear_cross_entropy(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, x, w, target):
            sized("x", x, None, None)
            sized("w", w, None, x.shape[1])
            sized("target", target, len(x))
            indices("target", target, len(w))
            logits = x @ w.T
            d = softmax_minus_target(logits, target)
            if wrong:
                ctx.save_for_backward(d @ w, d.T @ x)
            else:
                ctx.save_for_backward(x, w, d)
            return torch.nn.functional.cross_entropy(logits, target, reduction="none")

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_loss):
            if wrong:
                grad_x, grad_w = ctx.saved_tensors
                g = grad_loss.flatten()[0]
                return g * grad_x, g * grad_w, None
            x, w, d = ctx.saved_tensors
            d = d * grad_loss[:, None]
            return d @ w, d.T @ x, None

    return lambda x, w, target: Loss.apply(x, w, target)


add(
    "linear_cross_entropy_none",
    linear_cross_entropy,
    lambda: (real(3, 2), real(4, 2, seed=1), torch.tensor([1, 3, 0])),
    bug="Liger-Kernel (issue 968): the gradient made in forward is scaled by one number, also where"
    " every row has a loss of its own",
    trigger="losses that are not weighted alike",
)


# the vocabulary lies in two parts
def split_cross_entropy(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, first, second, target):
            sized("first", first, None, None)
            sized("second", second, len(first), None)
            sized("target", target, len(first))
            indices("target", target, first.shape[1] + second.shape[1])
            lse = torch.logaddexp(first.logsumexp(1), second.logsumexp(1))
            ctx.save_for_backward(first, second, target)
            picked = torch.cat([first, second], 1).gather(1, target[:, None])[:, 0]
            return (lse - picked).mean()

        @staticmethod
        def backward(ctx, grad_loss):
            first, second, target = ctx.saved_tensors
            lse = torch.logaddexp(first.logsumexp(1), second.logsumexp(1))[:, None]
            grads, start = [], 0
            for part in (first, second):
                size = part.shape[1]
                here = (target >= start) & (target < start + size)
                local = target if wrong else target - start
                hot = torch.nn.functional.one_hot(local.clamp(0, size - 1), size)
                d = torch.exp(part - lse) - hot * here[:, None]
                grads.append(grad_loss * d / len(target))
                start += size
            return (*grads, None)

    return lambda first, second, target: Loss.apply(first, second, target)


add(
    "split_vocabulary_entropy",
    split_cross_entropy,
    lambda: (real(3, 4), real(3, 3, seed=1), torch.tensor([1, 3, 0])),
    bug="Backward looks up the target in the second part of the vocabulary under its number in"
    " the whole",
    trigger="targets in the second part",
)


def overwriting_cross_entropy(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, logits, target):
            sized("logits", logits, None, None)
            sized("target", target, len(logits))
            indices("target", target, logits.shape[1])
            loss = torch.nn.functional.cross_entropy(logits, target)
            d = softmax_minus_target(logits, target) / len(target)
            if wrong:
                logits.data.copy_(d)
                d = logits.data
            ctx.save_for_backward(d)
            return loss

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_loss):
            (d,) = ctx.saved_tensors
            return grad_loss * d, None

    return lambda logits, target: Loss.apply(logits, target)


add(
    "entropy_over_logits",
    overwriting_cross_entropy,
    lambda: (real(3, 4), torch.tensor([1, 3, 0])),
    bug="Liger-Kernel (issue 272): forward stores the gradient where the logits stand",
    trigger="whoever else kept the logits",
)
