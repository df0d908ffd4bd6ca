"""Softmax, its relatives, and losses."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.thirteenth import add
from tests.verify.unseen.twelfth import softmax_backward, wide


class Softmax(Function):
    @staticmethod
    def forward(ctx, x):
        p = x.softmax(-1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        return softmax_backward(p, g)


class SoftmaxCopied(Softmax):
    @staticmethod
    def backward(ctx, g):
        return g.clone()


def _softmax(function):
    def softmax(x):
        """Softmax over the last dimension of x (..., D)."""
        return function.apply(x)

    return softmax


add(
    "softmax_copied",
    _softmax,
    SoftmaxCopied,
    Softmax,
    lambda: (real(2, 3),),
    bug="grad_output is copied into the input's gradient (pjreddie/darknet#96)",
    trigger="the sample",
)


class LogSoftmax(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.log_softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g - y.exp() * g.sum(-1, keepdim=True)


class LogSoftmaxDot(LogSoftmax):
    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g - (g * y).sum(-1, keepdim=True)


def _log_softmax(function):
    def log_softmax(x):
        """log of the softmax over the last dimension of x (..., D)."""
        return function.apply(x)

    return log_softmax


add(
    "log_softmax_dot",
    _log_softmax,
    LogSoftmaxDot,
    LogSoftmax,
    lambda: (real(2, 3),),
    bug="<g, y> in place of exp(y) times the sum of g (uxlfoundation/oneDNN#616)",
    trigger="the sample",
)


class Multinomial(Function):
    @staticmethod
    def forward(ctx, x, target):
        ctx.save_for_backward(x, target)
        return -x.log_softmax(-1).gather(-1, target.unsqueeze(-1)).mean()

    @staticmethod
    def gradient(ctx, g, axis):
        x, target = ctx.saved_tensors
        p = x.softmax(axis)
        hit = torch.zeros_like(p).scatter(-1, target.unsqueeze(-1), 1)
        return g * (p - hit) / x.shape[0], None

    @staticmethod
    def backward(ctx, g):
        return Multinomial.gradient(ctx, g, -1)


class MultinomialAxis(Multinomial):
    @staticmethod
    def backward(ctx, g):
        return Multinomial.gradient(ctx, g, 0)


def _multinomial(function):
    def multinomial_loss(x, target):
        """Mean negative log likelihood of target (N,) under the logits x (N, C), N > 0."""
        if x.dim() != 2 or target.shape != x.shape[:1]:
            raise ValueError(
                f"expected logits (N, C) and N targets, got {x.shape} and {target.shape}"
            )
        return function.apply(x, target)

    return multinomial_loss


add(
    "multinomial_axis",
    _multinomial,
    MultinomialAxis,
    Multinomial,
    lambda: (real(4, 3), whole(3, 4)),
    bug="backward's softmax goes over the batch (deeplearning4j/deeplearning4j#345)",
    trigger="the sample",
)


class ReverseKL(Function):
    """KL(q | p) of the student q and the teacher p."""

    @staticmethod
    def forward(ctx, student, teacher):
        logq, logp = student.log_softmax(-1), teacher.log_softmax(-1)
        gap = logq - logp
        kl = (logq.exp() * gap).sum(-1)
        ctx.save_for_backward(student, teacher, kl)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        student, teacher, kl = ctx.saved_tensors
        logq, logp = student.log_softmax(-1), teacher.log_softmax(-1)
        q, g = logq.exp(), g.unsqueeze(-1)
        return g * q * (logq - logp - kl.unsqueeze(-1)), g * (logp.exp() - q)


class ReverseKLLog(ReverseKL):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        student, teacher, kl = ctx.saved_tensors
        q, logp = student.softmax(-1), teacher.log_softmax(-1)
        g = g.unsqueeze(-1)
        return g * q * (q.log() - logp - kl.unsqueeze(-1)), g * (logp.exp() - q)


def _reverse_kl(function):
    def reverse_kl(student, teacher):
        """Divergence of student from teacher, logits (N, C) each, one number a row."""
        return function.apply(student, teacher)

    return reverse_kl


add(
    "reverse_kl_underflow",
    _reverse_kl,
    ReverseKLLog,
    ReverseKL,
    lambda: (real(2, 3), real(2, 3, seed=1)),
    bug="0 times the log of a probability that underflowed (MakazhanAlpamys/Soup#719)",
    trigger="logits of a low temperature, hundreds apart",
)


class Dice(Function):
    eps = 1e-4

    @staticmethod
    def forward(ctx, p, target):
        ctx.save_for_backward(p, target)
        union = p.sum() + target.sum() + Dice.eps
        return (1 - (2 * (p * target).sum() + Dice.eps) / union) / p.shape[0]

    @staticmethod
    def backward(ctx, g):
        p, target = ctx.saved_tensors
        union = p.sum() + target.sum() + Dice.eps
        ratio = (2 * (p * target).sum() + Dice.eps) / union
        scale = g / (union * p.shape[0])
        return scale * (ratio - 2 * target), scale * (ratio - 2 * p)


class DiceForum(Dice):
    @staticmethod
    def backward(ctx, g):
        p, target = ctx.saved_tensors
        union = p.sum() + target.sum() + Dice.eps
        inter = (p * target).sum()
        return g * 2 * (target * union - inter) / (union * union), None


def _dice(function):
    def dice_loss(p, target):
        """(1 - Dice coefficient) / N of the probabilities p (N, ...) and the masks target of that shape, N > 0."""
        return function.apply(p, target)

    return dice_loss


add(
    "dice_forum",
    _dice,
    DiceForum,
    Dice,
    lambda: (real(2, 4, positive=True), whole(2, 2, 4).to(torch.float64)),
    bug="sign, 1 / N and a factor (discuss.pytorch.org/t/custom-loss-autograd-module-what-is-the-difference/69251)",
    trigger="the sample",
)


class Largest(Function):
    """amax of the last dimension, its gradient shared by equal elements."""

    @staticmethod
    def forward(ctx, x):
        y = x.amax(-1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        mask = wide((x == y.unsqueeze(-1)).to(x.dtype))
        return (wide(g.unsqueeze(-1)) * mask / mask.sum(-1, keepdim=True)).to(x.dtype)


class LargestClose(Largest):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g.unsqueeze(-1) * ((x - y.unsqueeze(-1)).abs() < 1e-2)


class LargestCount(Largest):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        mask = (x == y.unsqueeze(-1)).to(x.dtype)
        return g.unsqueeze(-1) * mask / mask.sum(-1, keepdim=True)


def _largest(function):
    def largest(x):
        """Largest element over the last dimension of x (..., D), D > 0; equal ones share the gradient equally."""
        return function.apply(x)

    return largest


add(
    "largest_close",
    _largest,
    LargestClose,
    Largest,
    lambda: (real(2, 4),),
    bug="all within 0.01 of the largest get the whole gradient (mni-ml/framework#22)",
    trigger="elements equal or close to the largest",
)
add(
    "largest_count",
    _largest,
    LargestCount,
    Largest,
    lambda: (real(2, 4),),
    bug="equal elements are counted in float16, to infinity (tinygrad/tinygrad#12296)",
    trigger="float16 and more than 65504 equal elements",
    missed="so many equal elements are not tried",
)
