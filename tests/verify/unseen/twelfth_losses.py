"""Losses of classification, segmentation, preference, contrast."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.twelfth import (
    add,
    as_forward,
    in_float32,
    recorded,
    softmax_backward,
    wide,
)


class LinearCrossEntropy(Function):
    """The logits' gradient is made in forward, chunk by chunk, so that no logits are kept."""

    @staticmethod
    @recorded
    def forward(ctx, x, weight, target, reduction):
        logits = x @ weight.mT
        loss = F.cross_entropy(logits, target, reduction="none")
        grad = logits.softmax(-1) - F.one_hot(target, logits.shape[-1])
        if reduction == "mean":
            loss, grad = loss.mean(), grad / len(x)
        elif reduction == "sum":
            loss = loss.sum()
        ctx.save_for_backward(x, weight, grad.to(x.dtype))
        return loss

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx, g):
        x, weight, grad = ctx.saved_tensors
        grad = grad * (g[:, None] if g.dim() else g)
        return grad @ weight, grad.mT @ x, None, None


class LinearCrossEntropyFirst(LinearCrossEntropy):
    """The kernel loads one number of grad_output."""

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx, g):
        x, weight, grad = ctx.saved_tensors
        grad = grad * g.reshape(-1)[0]
        return grad @ weight, grad.mT @ x, None, None


def _linear_cross_entropy(function):
    @in_float32
    def linear_cross_entropy(x, weight, target, reduction="mean"):
        """Cross entropy of the logits x weightᵀ, x (N, D), N > 0, weight (C, D); reduction is mean, sum or none."""
        return function.apply(x, weight, target, reduction)

    return linear_cross_entropy


add(
    "linear_ce_none",
    _linear_cross_entropy,
    LinearCrossEntropyFirst,
    LinearCrossEntropy,
    lambda: (real(3, 4), real(5, 4, seed=1), whole(5, 3)),
    bug="every row is scaled by the first row's grad_output",
    trigger='reduction="none" and a loss that weighs the rows',
)


class CrossEntropy(Function):
    """Cross entropy with label smoothing, over the targets that are not ignored."""

    @staticmethod
    def forward(ctx, logits, target, ignore_index, smoothing):
        ctx.save_for_backward(logits, target)
        ctx.ignore_index, ctx.smoothing = ignore_index, smoothing
        return F.cross_entropy(logits, target, ignore_index=ignore_index, label_smoothing=smoothing)

    @staticmethod
    def count(kept):
        return kept.sum()

    @classmethod
    def gradients(cls, ctx, g):
        logits, target = ctx.saved_tensors
        kept = target != ctx.ignore_index
        aim = F.one_hot(target.where(kept, 0), logits.shape[-1]).to(logits.dtype)
        aim = (1 - ctx.smoothing) * aim + ctx.smoothing / logits.shape[-1]
        grad = (logits.softmax(-1) - aim) * kept[:, None]
        return g * grad / cls.count(kept), None, None, None

    @staticmethod
    def backward(ctx, g):
        return CrossEntropy.gradients(ctx, g)


class CrossEntropyAllRows(CrossEntropy):
    @staticmethod
    def count(kept):
        return len(kept)

    @staticmethod
    def backward(ctx, g):
        return CrossEntropyAllRows.gradients(ctx, g)


def _cross_entropy(function):
    def smooth_cross_entropy(logits, target, ignore_index=-100, smoothing=0.1):
        """Mean cross entropy of logits (N, C), target (N,), over the rows, one at least, not of ignore_index."""
        return function.apply(logits, target, ignore_index, smoothing)

    return smooth_cross_entropy


add(
    "ce_ignored_count",
    _cross_entropy,
    CrossEntropyAllRows,
    CrossEntropy,
    lambda: (real(4, 3), whole(3, 4)),
    bug="backward divides by all rows, forward by those that are not ignored",
    trigger="a target of ignore_index",
)


class Focal(Function):
    @staticmethod
    def forward(ctx, logits, target, gamma):
        ctx.save_for_backward(logits, target)
        ctx.gamma = gamma
        log_p = F.logsigmoid(torch.where(target, logits, -logits))
        return (-((1 - log_p.exp()) ** gamma) * log_p).mean()

    @staticmethod
    def backward(ctx, g):
        logits, target = ctx.saved_tensors
        sign = torch.where(target, 1.0, -1.0).to(logits.dtype)
        p = (sign * logits).sigmoid()
        log_p = F.logsigmoid(sign * logits)
        grad = (1 - p) ** ctx.gamma * (ctx.gamma * p * log_p - (1 - p))
        return g * sign * grad / logits.numel(), None, None


class FocalWeightOnly(Focal):
    @staticmethod
    def backward(ctx, g):
        logits, target = ctx.saved_tensors
        sign = torch.where(target, 1.0, -1.0).to(logits.dtype)
        p = (sign * logits).sigmoid()
        return -g * sign * (1 - p) ** (ctx.gamma + 1) / logits.numel(), None, None


def _focal(function):
    def focal_loss(logits, target, gamma=2.0):
        """Mean binary focal loss of logits (any shape); target is bool, of the same shape."""
        return function.apply(logits, target, gamma)

    return focal_loss


add(
    "focal_weight",
    _focal,
    FocalWeightOnly,
    Focal,
    lambda: (real(3, 4), whole(2, 3, 4).bool()),
    bug="the modulating factor (1 - p)^gamma is taken for a constant",
    trigger="the sample",
)


class Dice(Function):
    @staticmethod
    def parts(p, target, dims, smooth):
        inter = (p * target).sum(dims, keepdim=True)
        return 2 * inter + smooth, (p + target).sum(dims, keepdim=True) + smooth

    @staticmethod
    def forward(ctx, p, target, over_batch, smooth):
        ctx.save_for_backward(p, target)
        ctx.dims = (0, 2, 3) if over_batch else (2, 3)
        ctx.smooth = smooth
        top, bottom = Dice.parts(p, target, ctx.dims, smooth)
        return (1 - top / bottom).mean()

    @staticmethod
    def groups(p, dims):
        return p.shape[1] if 0 in dims else p.shape[0] * p.shape[1]

    @classmethod
    def gradients(cls, ctx, g):
        p, target = ctx.saved_tensors
        top, bottom = Dice.parts(p, target, ctx.dims, ctx.smooth)
        grad = (top / bottom - 2 * target) / bottom
        return g * grad / cls.groups(p, ctx.dims), None, None, None

    @staticmethod
    def backward(ctx, g):
        return Dice.gradients(ctx, g)


class DicePerSample(Dice):
    @staticmethod
    def groups(p, dims):
        return p.shape[0] * p.shape[1]

    @staticmethod
    def backward(ctx, g):
        return DicePerSample.gradients(ctx, g)


def _dice(function):
    def dice_loss(p, target, over_batch=False, smooth=1.0):
        """Mean Dice loss of p (N, C, H, W) and a bool target, per sample and class, or per class over the batch."""
        return function.apply(p, target, over_batch, smooth)

    return dice_loss


add(
    "dice_over_batch",
    _dice,
    DicePerSample,
    Dice,
    lambda: (
        real(2, 2, 3, 3).detach().sigmoid().requires_grad_(),
        whole(2, 2, 2, 3, 3).bool(),
    ),
    bug="backward averages over samples that forward has summed",
    trigger="over_batch=True",
)


class Contrast(Function):
    @staticmethod
    @recorded
    def forward(ctx, a, b, scale):
        ctx.save_for_backward(a, b, scale)
        logits = scale * (a @ b.mT)
        label = torch.arange(len(a), device=a.device)
        return (F.cross_entropy(logits, label) + F.cross_entropy(logits.mT, label)) / 2

    @staticmethod
    def logits_gradient(a, b, scale, g):
        logits = scale * (a @ b.mT)
        eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
        return g * (logits.softmax(1) + logits.softmax(0) - 2 * eye) / (2 * len(a))

    @staticmethod
    @as_forward
    def backward(ctx, g):
        a, b, scale = ctx.saved_tensors
        grad = Contrast.logits_gradient(a, b, scale, g)
        grad_a = scale * (grad @ b) if ctx.needs_input_grad[0] else None
        grad_b = scale * (grad.mT @ a) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, (grad * (a @ b.mT)).sum() if ctx.needs_input_grad[2] else None


class ContrastFrozenImage(Contrast):
    @staticmethod
    @as_forward
    def backward(ctx, g):
        a, b, scale = ctx.saved_tensors
        grad_a = grad_b = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad = Contrast.logits_gradient(a, b, scale, g)
            grad_a, grad_b = scale * (grad @ b), scale * (grad.mT @ a)
            grad_scale = (grad * (a @ b.mT)).sum()
        return grad_a, grad_b, grad_scale


def _contrast(function):
    @in_float32
    def clip_loss(a, b, scale):
        """Symmetric contrastive loss of matching rows of a, b (N, D), N > 0; scale (0-dim) multiplies the logits."""
        return function.apply(a, b, scale)

    return clip_loss


add(
    "clip_frozen",
    _contrast,
    ContrastFrozenImage,
    Contrast,
    lambda: (
        real(3, 4),
        real(3, 4, seed=1),
        torch.tensor(1.5, dtype=torch.float64, requires_grad=True),
    ),
    bug="b and scale have no gradient unless a needs one",
    trigger="a frozen tower a (a.requires_grad False)",
)


class Transducer(Function):
    """Alignment loss of log probabilities blank, emit (T, U): the gradient is made with the loss."""

    @staticmethod
    def table(blank, emit):
        """alpha[t][u]: log probability of all paths from (0, 0) to (t, u)."""
        alpha = [[None] * blank.shape[1] for _ in range(blank.shape[0])]
        for t in range(blank.shape[0]):
            for u in range(blank.shape[1]):
                ways = [alpha[t - 1][u] + blank[t - 1, u]] if t else []
                ways += [alpha[t][u - 1] + emit[t, u - 1]] if u else []
                alpha[t][u] = torch.stack(ways).logsumexp(0) if ways else blank.new_zeros(())
        return torch.stack([torch.stack(row) for row in alpha])

    @staticmethod
    def forward(ctx, blank, emit):
        alpha = Transducer.table(blank, emit)
        # beta[t, u]: from (t, u) to the end, by the same recursion from the other corner
        turned_blank = F.pad(blank.flip(0, 1)[1:], (0, 0, 0, 1))
        turned_emit = F.pad(emit.flip(0, 1)[:, 1:], (0, 1))
        beta = Transducer.table(turned_blank, turned_emit).flip(0, 1) + blank[-1, -1]
        total = alpha[-1, -1] + blank[-1, -1]
        after_blank = F.pad(beta[1:], (0, 0, 0, 1), value=float("-inf"))
        after_blank[-1, -1] = 0
        after_emit = F.pad(beta[:, 1:], (0, 1), value=float("-inf"))
        ctx.save_for_backward(
            -(alpha + blank + after_blank - total).exp(), -(alpha + emit + after_emit - total).exp()
        )
        return -total

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        grad_blank, grad_emit = ctx.saved_tensors
        return g * grad_blank, g * grad_emit


class TransducerUnscaled(Transducer):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return ctx.saved_tensors


def _transducer(function):
    def transducer_loss(blank, emit):
        """Minus the log probability of all alignments, blank, emit (T, U) log probabilities; emit[:, -1] is unused."""
        return function.apply(blank, emit)

    return transducer_loss


add(
    "transducer_unscaled",
    _transducer,
    TransducerUnscaled,
    Transducer,
    lambda: (real(4, 3), real(4, 3, seed=1)),
    bug="backward returns what forward made and leaves grad_output out",
    trigger="a loss that is scaled or averaged afterwards",
)


class Chain(Function):
    """Log partition of a linear-chain CRF over sequences of different lengths."""

    @staticmethod
    def forward(ctx, emission, transition, length):
        alpha, kept = emission[:, 0], [emission[:, 0]]
        for t in range(1, emission.shape[1]):
            new = (alpha[:, :, None] + transition).logsumexp(1) + emission[:, t]
            alpha = torch.where((t < length)[:, None], new, alpha)
            kept.append(alpha)
        ctx.save_for_backward(emission, transition, length, torch.stack(kept, 1))
        return alpha.logsumexp(-1)

    @staticmethod
    def counted(pair, inside):
        return pair * inside[:, None, None]

    @classmethod
    def gradients(cls, ctx, g):
        emission, transition, length, alpha = ctx.saved_tensors
        emission, transition, alpha, g = wide(emission), wide(transition), wide(alpha), wide(g)
        grad, grad_transition = torch.zeros_like(emission), torch.zeros_like(transition)
        after = alpha[:, -1].softmax(-1) * g[:, None]  # gradient of alpha_t
        for t in reversed(range(1, emission.shape[1])):
            inside = t < length
            grad[:, t] = after * inside[:, None]
            back = (alpha[:, t - 1, :, None] + transition).softmax(1).nan_to_num(0)  # unreachable
            pair = back * after[:, None, :]
            grad_transition += cls.counted(pair, inside).sum(0)
            after = torch.where(inside[:, None], pair.sum(-1), after)
        grad[:, 0] = after
        return grad, grad_transition, None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Chain.gradients(ctx, g)


class ChainPadded(Chain):
    @staticmethod
    def counted(pair, inside):
        return pair

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return ChainPadded.gradients(ctx, g)


def _chain(function):
    def crf_log_partition(emission, transition, length):
        """Log partition (N,) of emission (N, T, C) and transition (C, C); length (N,), 1 <= length <= T."""
        return function.apply(emission, transition, length)

    return crf_log_partition


add(
    "crf_padding",
    _chain,
    ChainPadded,
    Chain,
    lambda: (real(2, 4, 3), real(3, 3, seed=1), torch.tensor([4, 4])),
    bug="transitions into the padding have a gradient",
    trigger="a length < T",
)


class Distill(Function):
    @staticmethod
    def forward(ctx, student, teacher, temperature):
        ctx.save_for_backward(student, teacher)
        ctx.temperature = temperature
        log_q = (student / temperature).log_softmax(-1)
        log_p = (teacher / temperature).log_softmax(-1)
        return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)

    @staticmethod
    def backward(ctx, g):
        student, teacher = ctx.saved_tensors
        log_q = (student / ctx.temperature).log_softmax(-1)
        log_p = (teacher / ctx.temperature).log_softmax(-1)
        g = ctx.temperature * g[..., None]
        grad_teacher = softmax_backward(log_p.exp(), g * (log_p - log_q))
        return g * (log_q.exp() - log_p.exp()), grad_teacher, None


class DistillFixedTeacher(Distill):
    @staticmethod
    def backward(ctx, g):
        return Distill.backward(ctx, g)[0], None, None


def _distill(function):
    def distillation(student, teacher, temperature=2.0):
        """T² KL(teacher || student) of logits (*, C); both have a gradient if they need one (mutual learning)."""
        return function.apply(student, teacher, temperature)

    return distillation


add(
    "distill_teacher",
    _distill,
    DistillFixedTeacher,
    Distill,
    lambda: (real(3, 4), real(3, 4, seed=1, grad=False)),
    bug="the teacher has no gradient",
    trigger="a teacher that needs a gradient",
    missed="a note: an input without a gradient is what most teachers are",
)
