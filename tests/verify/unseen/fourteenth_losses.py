"""Losses."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.fourteenth import add, require


class AbsoluteError(Function):
    @staticmethod
    def forward(ctx, x, target):
        ctx.save_for_backward(x, target)
        return (x - target).abs().mean()

    @staticmethod
    def backward(ctx, g):
        x, target = ctx.saved_tensors
        grad = g * (x - target).sign() / x.numel()
        return grad, -grad


class AbsoluteErrorSum(AbsoluteError):
    @staticmethod
    def backward(ctx, g):
        x, target = ctx.saved_tensors
        grad = g * (x - target).sign()
        return grad, -grad


def _absolute_error(function):
    def absolute_error(x, target):
        """The mean () of |x - target|, of one shape, not empty; the slope where they are equal is 0."""
        require(x.shape == target.shape and x.numel() > 0, "x as target, not empty")
        return function.apply(x, target)

    return absolute_error


add(
    "absolute_error_sum",
    _absolute_error,
    AbsoluteErrorSum,
    AbsoluteError,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="the gradient is not divided by the number of elements (MyCaffe/MyCaffe#25)",
    trigger="the sample",
)


class CrossEntropy(Function):
    @staticmethod
    def forward(ctx, logits, target):
        ctx.save_for_backward(logits, target)
        return F.cross_entropy(logits, target, reduction="none")

    @staticmethod
    def gradients(ctx, rows):
        logits, target = ctx.saved_tensors
        grad = logits.softmax(-1) - F.one_hot(target, logits.shape[-1]).to(logits.dtype)
        return rows.unsqueeze(-1) * grad, None

    @staticmethod
    def backward(ctx, g):
        return CrossEntropy.gradients(ctx, g)


class CrossEntropyStride(CrossEntropy):
    """The kernel steps through grad_output's memory by 1; what lies behind that memory is anything."""

    @staticmethod
    def backward(ctx, g):
        memory = g.new_empty(0).set_(g.untyped_storage())[g.storage_offset() :]
        rows = g.new_full(g.shape, float("inf"))
        found = memory[: g.numel()]
        rows[: found.numel()] = found
        return CrossEntropy.gradients(ctx, rows)


def _cross_entropy(function):
    def cross_entropy(logits, target):
        """Cross entropy (N,) of each row of the logits (N, C), C > 0, with the targets (N,), integers below C."""
        require(logits.dim() == 2 and logits.shape[1] > 0, "logits must be (N, C), C > 0")
        require(target.shape == logits.shape[:1], "target must be (N,)")
        return function.apply(logits, target)

    return cross_entropy


add(
    "cross_entropy_expanded",
    _cross_entropy,
    CrossEntropyStride,
    CrossEntropy,
    lambda: (real(4, 3), whole(3, 4)),
    bug="grad_output's rows are read one after the other, as if it were dense (ROCm/TransformerEngine#623)",
    trigger="an expanded grad_output, as loss.sum() sends back",
)


class Grpo(Function):
    """Advantage times probability ratio, less beta times Schulman's estimate of the divergence."""

    @staticmethod
    def parts(logp, old, ref, advantage, mask):
        ratio = (logp - old).exp()
        weight = mask / mask.sum(-1, keepdim=True).clamp(min=1) / mask.shape[0]
        return ratio * advantage.unsqueeze(-1), ref - logp, weight

    @staticmethod
    def forward(ctx, logp, old, ref, advantage, mask, beta):
        ctx.save_for_backward(logp, old, ref, advantage, mask)
        ctx.beta = beta
        gain, behind, weight = Grpo.parts(logp, old, ref, advantage, mask)
        return -((gain - beta * (behind.expm1() - behind)) * weight).sum()

    @staticmethod
    def gradients(ctx, g, weigh):
        gain, behind, weight = Grpo.parts(*ctx.saved_tensors)
        grad = -g * (gain + ctx.beta * behind.expm1()) * weigh(weight)
        return grad, None, None, None, None, None

    @staticmethod
    def backward(ctx, g):
        return Grpo.gradients(ctx, g, lambda weight: weight)


class GrpoLength(Grpo):
    @staticmethod
    def backward(ctx, g):
        mask = ctx.saved_tensors[4]
        return Grpo.gradients(ctx, g, lambda weight: mask / mask.numel())


def _grpo(function):
    def grpo(logp, old, ref, advantage, mask, beta=0.04):
        """GRPO's loss (): of a sequence the mean over its tokens, then the mean over sequences.

        logp, old and ref (N, T), N > 0, are the tokens' log probabilities, advantage (N,); mask (N, T) is 1 for a
        token and 0 for padding. Gradient for logp alone.
        """
        require(logp.dim() == 2 and logp.shape[0] > 0, "logp must be (N, T), N > 0")
        others = (old, ref, advantage, mask)
        require(
            not any(a.requires_grad for a in others), "only logp has a gradient; detach the others"
        )
        return function.apply(logp, old, ref, advantage, mask, beta)

    return grpo


def grpo_sample():
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.float64)
    others = [real(3, 4, seed=seed, grad=False) for seed in (1, 2)]
    return real(3, 4), *others, real(3, seed=3, grad=False), mask


add(
    "grpo_length",
    _grpo,
    GrpoLength,
    Grpo,
    grpo_sample,
    bug="backward divides by the padded length, forward by the tokens that count",
    trigger="padding, as in the sample",
)


class SigLip(Function):
    @staticmethod
    def signs(x):
        return 2 * torch.eye(x.shape[0], dtype=x.dtype, device=x.device) - 1

    @staticmethod
    def forward(ctx, x, y, log_scale, bias):
        ctx.save_for_backward(x, y, log_scale, bias)
        z = SigLip.signs(x) * (log_scale.exp() * (x @ y.mT) + bias)
        return -F.logsigmoid(z).sum() / x.shape[0]

    @staticmethod
    def gradients(ctx, g):
        """The gradients of all but the bias, and of the logits."""
        x, y, log_scale, bias = ctx.saved_tensors
        sign, scale, similar = SigLip.signs(x), log_scale.exp(), x @ y.mT
        d = -g * sign * (-sign * (scale * similar + bias)).sigmoid() / x.shape[0]
        return scale * d @ y, scale * d.mT @ x, scale * (d * similar).sum(), d

    @staticmethod
    def backward(ctx, g):
        *grads, d = SigLip.gradients(ctx, g)
        return *grads, d.sum()


class SigLipBias(SigLip):
    @staticmethod
    def backward(ctx, g):
        *grads, d = SigLip.gradients(ctx, g)
        return *grads, d.diagonal().sum()


def _sig_lip(function):
    def sig_lip(x, y, log_scale, bias):
        """SigLIP's loss () of the pairs x and y (N, D), N > 0, with a scale, its logarithm, and a bias, both ()."""
        require(
            x.shape == y.shape and x.dim() == 2 and x.shape[0] > 0, "x and y must be (N, D), N > 0"
        )
        require(log_scale.dim() == bias.dim() == 0, "log_scale and bias must be scalars")
        return function.apply(x, y, log_scale, bias)

    return sig_lip


add(
    "sig_lip_bias",
    _sig_lip,
    SigLipBias,
    SigLip,
    lambda: (real(3, 4), real(3, 4, seed=1), real((), seed=2), real((), seed=3)),
    bug="the bias's gradient is summed over the matching pairs alone",
    trigger="the sample",
)
