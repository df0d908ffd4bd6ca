"""Losses: metric learning, segmentations, depth, robust regression, masked images, style, ranks."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.thirtysecond import add, bounded, check, finite, indices, same, sized


# Batch-hard triplet loss, the mean over anchors that have a positive and a negative
def batch_hard(wrong):
    def mine(x, labels):
        d = (x[:, None] - x).square().sum(-1)
        alike = labels[:, None] == labels
        own = torch.eye(len(x), dtype=torch.bool, device=x.device)
        far = d.masked_fill(~alike | own, -1).argmax(1)
        near = d.masked_fill(alike, math.inf).argmin(1)
        usable = (alike & ~own).any(1) & (~alike).any(1)
        rows = torch.arange(len(x), device=x.device)
        return 1 + d[rows, far] - d[rows, near], far, near, usable

    class Hard(Function):
        @staticmethod
        def forward(ctx, x, labels):
            ctx.save_for_backward(x, labels)
            violation, _, _, usable = mine(x, labels)
            return torch.where(usable, violation.relu(), 0).sum() / usable.sum().clamp(min=1)

        @staticmethod
        def backward(ctx, grad_loss):
            x, labels = ctx.saved_tensors
            violation, far, near, usable = mine(x, labels)
            count = len(x) if wrong else usable.sum().clamp(min=1)
            share = (usable & (violation > 0)).to(x.dtype)[:, None] * 2 * grad_loss / count
            to_far, to_near = share * (x - x[far]), share * (x - x[near])
            grad_x = to_far - to_near
            return grad_x.index_add(0, far, -to_far).index_add(0, near, to_near), None

    def loss(x, labels):
        sized("x", x, None, None)
        check(bool(x.isfinite().all()) and bool((x.abs() < 1e15).all()), "x: expected below 1e15")
        sized("labels", labels, x.shape[0])
        indices("labels", labels, 1 << 30)
        return Hard.apply(x, labels)

    return loss


add(
    "batch_hard_unpaired",
    batch_hard,
    lambda: (real(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])),
    bug="Backward divides by all anchors, not by those that have a positive",
    trigger="a label that occurs once",
)


# N-pair loss of each row: the cross-entropy of anchor . positives
def n_pair_rows(wrong):
    class Rows(Function):
        @staticmethod
        def forward(ctx, anchors, positives):
            ctx.save_for_backward(anchors, positives)
            s = anchors @ positives.mT
            return s.logsumexp(1) - s.diagonal()

        @staticmethod
        def backward(ctx, grad_loss):
            anchors, positives = ctx.saved_tensors
            p = (anchors @ positives.mT).softmax(1)
            grad_s = p - torch.eye(len(p), dtype=p.dtype, device=p.device)
            grad_s = grad_s * (grad_loss.mean() if wrong else grad_loss[:, None])
            return grad_s @ positives, grad_s.mT @ anchors

    def loss(anchors, positives):
        sized("anchors", anchors, None, None)
        same(anchors, positives)
        return Rows.apply(anchors, positives)

    return loss


add(
    "n_pair_upstream_mean",
    n_pair_rows,
    lambda: (real(4, 3), real(4, 3, seed=1)),
    bug="Each row's gradient is multiplied by the mean of grad_output",
    trigger="rows that weigh differently",
)


# Semi-Markov log-partition: score[t, s] is that of a segment of s + 1 places that ends at t
def segmentations(wrong):
    def prefixes(score):
        a = [torch.zeros_like(score[:, 0, 0])]
        for t in range(score.shape[1]):
            longest = min(score.shape[2], t + 1)
            terms = torch.stack([a[t - s] + score[:, t, s] for s in range(longest)], -1)
            a.append(terms.logsumexp(-1))
        return a

    class Partition(Function):
        @staticmethod
        def forward(ctx, score):
            ctx.save_for_backward(score)
            return prefixes(score)[-1]

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_z):
            (score,) = ctx.saved_tensors
            a = prefixes(score)
            grad_a = [torch.zeros_like(grad_z) for _ in a]
            grad_a[-1] = grad_z
            grad_score = grad_z.new_zeros(score.shape)
            for t in reversed(range(score.shape[1])):
                for s in range(min(score.shape[2], t + 1)):
                    share = (a[t - s] + score[:, t, s] - a[t + 1]).exp()
                    if not wrong:
                        share = torch.where(a[t + 1] == -math.inf, 0, share)
                    grad_score[:, t, s] = grad_a[t + 1] * share
                    grad_a[t - s] = grad_a[t - s] + grad_score[:, t, s]
            return grad_score

    def log_partition(score):
        sized("score", score, None, None, None)
        check(bool((score < math.inf).all()), "score: expected numbers or -inf")
        return Partition.apply(score)

    return log_partition


add(
    "semi_markov_forbidden",
    segmentations,
    lambda: (real(2, 4, 3),),
    bug="exp(-inf - -inf) where no segment may end at a place",
    trigger="a forbidden first segment: score[0, 0] = -inf",
    missed="NaN is what most backwards give beside what is -inf",
)


# Tukey's biweight of residuals
def biweight(wrong):
    class Biweight(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(r, c):
            w = (r / c).square().clamp(max=1)
            return c * c / 6 * w * (3 - 3 * w + w * w)  # 1 - (1 - w)^3

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])
            ctx.c = inputs[1]

        @staticmethod
        def backward(ctx, grad_y):
            (r,) = ctx.saved_tensors
            u = (r / ctx.c).square()
            if wrong:
                return grad_y * r * (1 - u).square(), None
            far = u >= 1
            near = torch.where(far, 0, r)
            return torch.where(far, 0, grad_y * near * (1 - (near / ctx.c).square()).square()), None

    def loss(prediction, target, c=4.685):
        same(prediction, target)
        return Biweight.apply(prediction - target, c)

    return loss


add(
    "biweight_outliers",
    biweight,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="Backward goes on beyond c, where the loss is constant",
    trigger="a residual larger than 4.685",
)


# A masked autoencoder's loss: the mean over masked patches of the error to standardised pixels
def masked_patches(wrong):
    def standard(target):
        c = target - target.mean(-1, keepdim=True)
        return c * torch.rsqrt(c.square().mean(-1, keepdim=True) + 1e-6)

    class Loss(Function):
        @staticmethod
        def forward(ctx, prediction, target, mask):
            ctx.save_for_backward(prediction, target, mask)
            if wrong:
                target.copy_(standard(target))
            errors = (prediction - standard(target)).square().mean(-1)
            return (errors * mask).sum() / mask.sum()

        @staticmethod
        def backward(ctx, grad_loss):
            prediction, target, mask = ctx.saved_tensors
            share = 2 * grad_loss * mask[..., None] / (mask.sum() * prediction.shape[-1])
            return share * (prediction - standard(target)), None, None

    def loss(prediction, target, mask):
        sized("prediction", prediction, None, None, None)
        same(prediction, target)
        sized("mask", mask, *prediction.shape[:2])
        check(not (target.requires_grad or mask.requires_grad), "expected a constant target, mask")
        check(bool(((mask == 0) | (mask == 1)).all()), "mask: expected 0 and 1")
        check(bool(mask.any()), "mask: expected a masked patch")
        bounded("target", target, -1e4, 1e4)
        return Loss.apply(prediction, target, mask.to(prediction.dtype))

    return loss


add(
    "masked_patches_target",
    masked_patches,
    lambda: (
        real(2, 4, 3),
        real(2, 4, 3, seed=1, grad=False),
        torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]]),
    ),
    bug="Standardises the caller's target in place",
    trigger="the target compared before and after",
)


# CosFace: cross-entropy of 8 (cosine - 0.35 at the label)
def cosface(wrong):
    def unit(t):
        return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-8)

    def unit_back(t, grad):
        y = unit(t)
        r = torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-8)
        return r * (grad - y * (y * grad).sum(-1, keepdim=True))

    def logits(x, w, labels):
        hot = F.one_hot(labels, len(w)).to(x.dtype)
        return 8 * (unit(x) @ unit(w).mT - 0.35 * hot), hot

    class CosFace(Function):
        @staticmethod
        def forward(ctx, x, w, labels):
            z, hot = logits(x, w, labels)
            p = z.softmax(-1)
            ctx.save_for_backward(x, w, labels, p if wrong else None)
            return (z.logsumexp(-1) - (z * hot).sum(-1)).mean()

        @staticmethod
        def backward(ctx, grad_loss):
            x, w, labels, p = ctx.saved_tensors
            z, hot = logits(x, w, labels)
            p = z.softmax(-1) if p is None else p
            grad_z = 8 * grad_loss * (p - hot) / len(x)
            return unit_back(x, grad_z @ unit(w)), unit_back(w, grad_z.mT @ unit(x)), None

    def loss(x, w, labels):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        sized("labels", labels, x.shape[0])
        indices("labels", labels, len(w))
        bounded("x", x, -1e4, 1e4)
        bounded("w", w, -1e4, 1e4)
        return CosFace.apply(x, w, labels)

    return loss


add(
    "cosface_saved_softmax",
    cosface,
    lambda: (real(4, 3), real(5, 3, seed=1), whole(5, 4)),
    bug="Saves forward's softmax, a constant for a second derivative",
    trigger="second derivatives",
)


# A layer's Gram matrix in a style loss: features . features / (channels * places)
def style_gram(wrong):
    class Gram(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            wide = x if wrong else x.to(torch.promote_types(x.dtype, torch.float32))
            return (wide @ wide.mT / (x.shape[1] * x.shape[2])).to(x.dtype)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            g = grad_y.to(wide.dtype)
            return ((g + g.mT) @ wide / (x.shape[1] * x.shape[2])).to(x.dtype)

    def gram(x):
        sized("x", x, None, None, None)
        return Gram.apply(x)

    return gram


add(
    "style_gram_overflow",
    style_gram,
    lambda: (real(2, 3, 8),),
    bug="Sums products in float16 before it divides by their number",
    trigger="float16 and features of some hundreds",
    own=True,
    missed="forward itself overflows in float16",
)


# A soft rank correlation: mean of tanh((x_i - x_j) (y_i - y_j)) over pairs
def soft_kendall(wrong):
    def correlation(x, y):
        sized("x", x, None)
        same(x, y)
        check(len(x) >= 2, "x: expected two numbers at least")
        finite(x=x, y=y)
        upper = torch.triu_indices(len(x), len(x), 1, device=x.device)
        i, j = upper[0], upper[1]
        value = torch.tanh((x[i] - x[j]) * (y[i] - y[j])).mean()
        if wrong:
            return torch.tensor(value.item(), dtype=x.dtype, device=x.device, requires_grad=True)
        return value

    return correlation


add(
    "soft_kendall_item",
    soft_kendall,
    lambda: (real(5), real(5, seed=1)),
    bug="Returns a new leaf made of .item(): requires_grad silences the error, nothing is differentiated",
)


# The soft maximum of action values, tau * logsumexp(q / tau) over the last dimension
def soft_value(wrong):
    class Value(Function):
        @staticmethod
        def forward(ctx, q, tau):
            ctx.save_for_backward(q)
            ctx.tau = tau
            return tau * (q / tau).logsumexp(-1)

        @staticmethod
        def backward(ctx, grad_v):
            (q,) = ctx.saved_tensors
            p = (q / ctx.tau).softmax(1 if wrong else -1)
            return grad_v[..., None] * p, None

    def value(q, tau=0.5):
        check(q.ndim >= 2 and q.shape[-1] > 0, "q: expected a batch of actions' values")
        check(tau > 0, "tau: expected a positive temperature")
        check(bool((q < math.inf).all()), "q: expected numbers or -inf")
        check(bool((q > -math.inf).any(-1).all()), "q: expected an action that is allowed")
        return Value.apply(q, tau)

    return value


add(
    "soft_value_dimension",
    soft_value,
    lambda: (real(3, 4),),
    bug="Backward's softmax is over dimension 1, forward's over the last",
    trigger="a batch of two dimensions",
)
