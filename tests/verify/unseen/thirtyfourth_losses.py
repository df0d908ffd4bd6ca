"""Losses: risk, transducers, segmentation, total variation, metric learning, detection, contrast."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import F64, real, whole
from tests.verify.unseen.thirtyfourth import add, alike, bounded, check, indices, same, sized


# Conditional value at risk of a portfolio: mean loss of the worst part of the scenarios (S, A)
def shortfall(wrong):
    class Shortfall(Function):
        @staticmethod
        def forward(ctx, returns, holding, part):
            loss = -(returns @ holding)
            k = math.ceil(part * len(loss))
            worst, places = loss.topk(k)
            ctx.save_for_backward(returns, holding, places)
            return worst.mean()

        @staticmethod
        def backward(ctx, g):
            returns, holding, places = ctx.saved_tensors
            loss = -(returns @ holding)
            if wrong:
                share = (loss >= loss[places].min()).to(loss.dtype) / len(places)
            else:
                share = torch.zeros_like(loss).index_fill(0, places, 1 / len(places))
            return -g * share[:, None] * holding, -g * (returns.mT @ share), None

    def risk(returns, holding, part=0.3):
        sized("returns", returns, None, None)
        sized("holding", holding, returns.shape[1])
        alike(returns, holding)
        check(0 < part <= 1, "part: expected a number above 0 and up to 1")
        bounded("returns", returns, -1e3, 1e3)
        bounded("holding", holding, -1e3, 1e3)
        return Shortfall.apply(returns, holding, part)

    return risk


add(
    "shortfall_ties",
    shortfall,
    lambda: (real(10, 3), real(3, seed=1)),
    bug="Backward takes every scenario at or above the quantile, each with the share of one of k",
    trigger="scenarios with equal losses at the quantile (nothing held, repeated scenarios)",
)


# Transducer loss of one utterance: log probabilities (T, U + 1, V), U labels; V's first is the blank
def transducer(wrong):
    def forwards(blank, label):
        rows = []
        for t in range(blank.shape[0]):
            row = []
            for u in range(blank.shape[1]):
                ways = []
                if t:
                    ways.append(rows[-1][u] + blank[t - 1, u])
                if u:
                    ways.append(row[-1] + label[t, u - 1])
                row.append(
                    torch.stack(ways).logsumexp(0) if ways else torch.zeros_like(blank[0, 0])
                )
            rows.append(torch.stack(row))
        return torch.stack(rows)

    def backwards(blank, label):
        times, states = blank.shape
        rows = {}
        for t in reversed(range(times)):
            for u in reversed(range(states)):
                ways = []
                if t + 1 < times:
                    ways.append(rows[t + 1, u] + blank[t, u])
                if u + 1 < states:
                    ways.append(rows[t, u + 1] + label[t, u])
                rows[t, u] = torch.stack(ways).logsumexp(0) if ways else blank[t, u]
        return torch.stack([torch.stack([rows[t, u] for u in range(states)]) for t in range(times)])

    class Loss(Function):
        @staticmethod
        def forward(ctx, p, labels):
            ctx.save_for_backward(p, labels)
            blank, label = p[..., 0], p[:, :-1].gather(-1, labels.expand(len(p), -1)[..., None])
            return -(forwards(blank, label[..., 0])[-1, -1] + blank[-1, -1])

        @staticmethod
        def backward(ctx, g):
            p, labels = ctx.saved_tensors
            place = labels.expand(len(p), -1)[..., None]
            blank, label = p[..., 0], p[:, :-1].gather(-1, place)[..., 0]
            alpha, beta = forwards(blank, label), backwards(blank, label)
            total = beta[0, 0]
            grad = torch.zeros_like(p)
            grad[:-1, :, 0] = (alpha[:-1] + blank[:-1] + beta[1:] - total).exp()
            if not wrong:
                grad[-1, -1, 0] = (alpha[-1, -1] + blank[-1, -1] - total).exp()
            emit = (alpha[:, :-1] + label + beta[:, 1:] - total).exp()
            grad[:, :-1].scatter_(-1, place, emit[..., None])
            return -g * grad, None

    def loss(p, labels):
        check(
            p.ndim == 3 and min(p.shape) >= 1 and p.shape[2] >= 2, "p: expected (T, U + 1, V >= 2)"
        )
        check(p.shape[0] * p.shape[1] <= 2000, "p: expected 2000 states at most")
        sized("labels", labels, p.shape[1] - 1)
        indices("labels", labels, p.shape[2])
        check(bool((labels > 0).all()), "labels: expected no blank")
        bounded("p", p, -50, 50)
        return Loss.apply(p, labels)

    def sized(name, t, n):
        check(t.shape == (n,), f"{name}: expected {n} numbers, got {tuple(t.shape)}")

    return loss


add(
    "transducer_last_blank",
    transducer,
    lambda: (
        real(4, 3, 5, grad=False).log_softmax(-1).requires_grad_(),
        whole(4, 2, seed=1) + 1,
    ),
    bug="The blank that ends the utterance gets no gradient",
)


# Dice loss of probabilities (B, C, ...) against targets in 0 to 1, smoothed by 1
def dice(wrong):
    class Dice(Function):
        @staticmethod
        def forward(ctx, p, target):
            ctx.save_for_backward(p, target)
            p, target = p.flatten(2), target.flatten(2)
            top = 2 * (p * target).sum(-1) + 1
            return 1 - (top / (p.sum(-1) + target.sum(-1) + 1)).mean()

        @staticmethod
        def backward(ctx, g):
            p, target = ctx.saved_tensors
            a, b = p.flatten(2), target.flatten(2)
            top = 2 * (a * b).sum(-1, keepdim=True)
            if not wrong:
                top = top + 1
            low = (a + b).sum(-1, keepdim=True) + 1
            scale = -g / (p.shape[0] * p.shape[1])
            grad_p = scale * (2 * b * low - top) / low**2
            grad_target = scale * (2 * a * low - top) / low**2
            return grad_p.view(p.shape), grad_target.view(p.shape)

    def loss(p, target):
        check(p.ndim >= 3 and p.numel() > 0, "p: expected (B, C, ...)")
        same(p, target)
        alike(p, target)
        bounded("p", p, 0, 1)
        bounded("target", target, 0, 1)
        return Dice.apply(p, target)

    return loss


add(
    "dice_smooth",
    dice,
    lambda: (
        real(2, 2, 3, 3, grad=False).sigmoid().requires_grad_(),
        whole(2, 2, 2, 3, 3, seed=1).to(F64),
    ),
    bug="The quotient rule is applied to a numerator without the smoothing",
)


# CTC loss of one utterance: log probabilities (T, V), labels (S); V's first is the blank
def ctc(wrong):
    low = -1e30

    def skips(path, careful=True):
        ahead = torch.zeros(len(path), dtype=torch.bool, device=path.device)
        ahead[2:] = path[2:] != 0
        if careful:
            ahead[2:] &= path[2:] != path[:-2]
        return ahead

    def shift(a, n):
        gone = torch.full_like(a[: abs(n)], low)
        if n > 0:
            return torch.cat([gone, a])[: len(a)]
        return torch.cat([a, gone])[-len(a) :]

    def forwards(e, skip):
        a = torch.full_like(e[0], low)
        a[:2] = e[0, :2]
        rows = [a]
        for t in range(1, len(e)):
            a = rows[-1]
            jump = torch.where(skip, shift(a, 2), low)
            rows.append(torch.stack([a, shift(a, 1), jump]).logsumexp(0) + e[t])
        return torch.stack(rows)

    def backwards(e, skip):
        b = torch.full_like(e[0], low)
        b[-2:] = 0
        rows = [b]
        for t in reversed(range(1, len(e))):
            b = rows[-1] + e[t]
            jump = shift(torch.where(skip, b, low), -2)
            rows.append(torch.stack([b, shift(b, -1), jump]).logsumexp(0))
        return torch.stack(rows[::-1])

    def states(labels):
        path = torch.zeros(2 * len(labels) + 1, dtype=torch.long, device=labels.device)
        path[1::2] = labels
        return path

    class Loss(Function):
        @staticmethod
        def forward(ctx, p, labels):
            ctx.save_for_backward(p, labels)
            path = states(labels)
            a = forwards(p[:, path], skips(path))[-1]
            return -a[-2:].logsumexp(0)

        @staticmethod
        def backward(ctx, g):
            p, labels = ctx.saved_tensors
            path = states(labels)
            e = p[:, path]
            a = forwards(e, skips(path))
            b = backwards(e, skips(path, careful=not wrong))
            there = (a + b - a[-1, -2:].logsumexp(0)).exp()
            return -g * torch.zeros_like(p).index_add(1, path, there), None

    def loss(p, labels):
        sized("p", p, None, None)
        sized("labels", labels, None)
        indices("labels", labels, p.shape[1])
        check(bool((labels > 0).all()), "labels: expected no blank")
        needed = len(labels) + int((labels[1:] == labels[:-1]).sum())
        check(len(p) >= needed, f"p: expected {needed} frames at least")
        bounded("p", p, -50, 50)
        return Loss.apply(p, labels)

    return loss


add(
    "ctc_repeat",
    ctc,
    lambda: (
        real(6, 4, grad=False).log_softmax(-1).requires_grad_(),
        torch.tensor([1, 3, 2]),
    ),
    bug="Backward's recursion skips the blank between equal labels, which forward's does not",
    trigger="labels that repeat at once",
)


# Total variation of images (B, H, W) with a weight for each direction
def total_variation(wrong):
    class Variation(Function):
        @staticmethod
        def forward(ctx, x, down, across):
            ctx.save_for_backward(x)
            ctx.weights = down, across
            return down * x.diff(dim=1).abs().sum() + across * x.diff(dim=2).abs().sum()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            down, across = ctx.weights[::-1] if wrong else ctx.weights
            rows, columns = down * x.diff(dim=1).sign(), across * x.diff(dim=2).sign()
            grad = F.pad(rows, (0, 0, 1, 0)) - F.pad(rows, (0, 0, 0, 1))
            grad = grad + F.pad(columns, (1, 0)) - F.pad(columns, (0, 1))
            return g * grad, None, None

    def variation(x, down=1.0, across=0.5):
        sized("x", x, None, None, None)
        bounded("x", x, -1e3, 1e3)
        check(down >= 0 and across >= 0, "weights: expected numbers >= 0")
        return Variation.apply(x, down, across)

    return variation


add(
    "variation_weights",
    total_variation,
    lambda: (real(2, 4, 5),),
    bug="Backward swaps the weights of the two directions",
)


# Triplet margin loss with the swap of the anchor: the nearer of the two distances to the negative counts
def triplet(wrong):
    def distance(a, b):
        d = a - b
        s = d.square().sum(-1, keepdim=True)
        zero = s == 0
        r = torch.where(zero, torch.ones_like(s), s).sqrt()
        return torch.where(zero, torch.zeros_like(s), r)[:, 0], torch.where(zero, 0 * d, d / r)

    class Triplet(Function):
        @staticmethod
        def forward(ctx, a, p, n, margin, swap):
            ctx.save_for_backward(a, p, n)
            ctx.options = margin, swap
            far = distance(a, n)[0]
            if swap:
                far = torch.minimum(far, distance(p, n)[0])
            return (distance(a, p)[0] - far + margin).relu().mean()

        @staticmethod
        def backward(ctx, g):
            a, p, n = ctx.saved_tensors
            margin, swap = ctx.options
            (near, to_p), (far, to_n), (other, p_to_n) = (
                distance(a, p),
                distance(a, n),
                distance(p, n),
            )
            swapped = (other < far) & swap
            far = torch.where(swapped, other, far)
            if wrong:
                swapped = torch.zeros_like(swapped)
            live = (near - far + margin > 0).to(a.dtype)[:, None] * g / len(a)
            to_p, swapped = to_p * live, swapped[:, None]
            from_a = torch.where(swapped, torch.zeros_like(a), to_n * live)
            from_p = torch.where(swapped, p_to_n * live, torch.zeros_like(a))
            return to_p - from_a, -to_p - from_p, from_a + from_p, None, None

    def loss(a, p, n, margin=1.0, swap=False):
        sized("a", a, None, None)
        same(a, p, n)
        alike(a, p, n)
        for name, t in {"a": a, "p": p, "n": n}.items():
            bounded(name, t, -1e3, 1e3)
        return Triplet.apply(a, p, n, margin, swap)

    return loss


add(
    "triplet_swap",
    triplet,
    lambda: (real(5, 3), real(5, 3, seed=1), real(5, 3, seed=2)),
    kwargs=lambda: {"swap": True},
    bug="Backward knows of the swap only for the margin: the gradient goes to the anchor's distance",
    trigger="swap, with a positive that is nearer to the negative",
)


# Focal loss of logits with targets in 0 to 1, alpha 1/4, gamma 2, mean
def focal(wrong):
    class Focal(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            p, q = x.sigmoid(), (-x).sigmoid()
            hit, miss = q**2 * F.softplus(-x), p**2 * F.softplus(x)
            return (y * hit / 4 + (1 - y) * miss * 0.75).mean()

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            seen = x.detach() if wrong else x
            p, q = seen.sigmoid(), (-seen).sigmoid()
            hit = -(q**2) * (2 * p * F.softplus(-x) + q)
            miss = p**2 * (2 * q * F.softplus(x) + p)
            grad_y = q**2 * F.softplus(-x) / 4 - p**2 * F.softplus(x) * 0.75
            grad_x = y * hit / 4 + (1 - y) * miss * 0.75
            return g * grad_x / x.numel(), g * grad_y / x.numel()

    def loss(x, y):
        check(x.numel() > 0, "x: expected numbers")
        same(x, y)
        alike(x, y)
        bounded("x", x, -1e3, 1e3)
        bounded("y", y, 0, 1)
        return Focal.apply(x, y)

    return loss


add(
    "focal_detached",
    focal,
    lambda: (real(4, 3), whole(2, 4, 3, seed=1).to(F64)),
    bug="Backward takes the probabilities of the detached logits",
    trigger="double backward",
)


# Symmetric contrastive loss of two sets of embeddings (N, D), with the logarithm of the scale
def contrast(wrong):
    class Contrast(Function):
        @staticmethod
        def forward(ctx, a, b, scale):
            ctx.save_for_backward(a, b, scale)
            s = scale.exp() * (a @ b.mT)
            rows, columns = s.log_softmax(1), s.log_softmax(0)
            return -(rows.diagonal().mean() + columns.diagonal().mean()) / 2

        @staticmethod
        def backward(ctx, g):
            a, b, scale = ctx.saved_tensors
            product = a @ b.mT
            s = scale.exp() * product
            rows = s.softmax(1)
            columns = rows.mT if wrong else s.softmax(0)
            eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
            grad_s = g * (rows + columns - 2 * eye) / (2 * len(a)) * scale.exp()
            return grad_s @ b, grad_s.mT @ a, (grad_s * product).sum()

    def loss(a, b, scale):
        sized("a", a, None, None)
        same(a, b)
        alike(a, b, scale)
        check(scale.ndim == 0, "scale: expected one number")
        bounded("a", a, -10, 10)
        bounded("b", b, -10, 10)
        bounded("scale", scale, -5, 4.7)
        return Contrast.apply(a, b, scale)

    return loss


add(
    "contrast_columns",
    contrast,
    lambda: (
        F.normalize(real(4, 5, grad=False), dim=-1).requires_grad_(),
        F.normalize(real(4, 5, seed=1, grad=False), dim=-1).requires_grad_(),
        torch.tensor(1.5, dtype=F64, requires_grad=True),
    ),
    bug="Backward takes the transposed softmax over the rows for the softmax over the columns",
)
