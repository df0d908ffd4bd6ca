"""Losses: classes, pairs, sequences, routers."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.thirtysixth import (
    add,
    alike,
    bounded,
    check,
    indices,
    positive,
    same,
    sized,
)


def counted(labels, classes):
    """Refuse labels that are neither classes nor -100."""
    check(labels.dtype == torch.int64, "labels: expected int64")
    ok = (labels == -100) | ((labels >= 0) & (labels < classes))
    check(bool(ok.all()), "labels: expected classes or -100")


# Cross entropy plus eps (1 - p) of the labels' classes
def poly_one(wrong):
    class Poly(Function):
        @staticmethod
        def forward(ctx, x, labels, eps, reduction):
            ctx.save_for_backward(x, labels)
            ctx.eps, ctx.reduction = eps, reduction
            log_p = x.log_softmax(-1).gather(1, labels[:, None])[:, 0]
            loss = eps * (1 - log_p.exp()) - log_p
            if reduction == "none":
                return loss
            return loss.mean() if reduction == "mean" else loss.sum()

        @staticmethod
        def backward(ctx, g):
            x, labels = ctx.saved_tensors
            p = x.softmax(-1)
            own = F.one_hot(labels, x.shape[1]).to(x.dtype)
            factor = 1 + ctx.eps * (p * own).sum(-1, keepdim=True)
            if ctx.reduction == "mean" or (wrong and ctx.reduction == "sum"):
                g = g / len(x)
            return (g[:, None] if g.ndim else g) * factor * (p - own), None, None, None

    def loss(x, labels, eps=1.0, reduction="mean"):
        sized("x", x, None, None)
        sized("labels", labels, len(x))
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(labels.dtype == torch.int64, "labels: expected int64")
        indices("labels", labels, x.shape[1])
        check(reduction in ("mean", "sum", "none"), "reduction: expected mean, sum or none")
        bounded("x", x, -1e3, 1e3)
        return Poly.apply(x, labels, eps, reduction)

    return loss


add(
    "poly_one_sum",
    poly_one,
    lambda: (real(4, 3), whole(3, 4, seed=1)),
    bug="Backward divides by the number of rows for the sum, too",
    trigger="reduction='sum'",
)


# Circle loss of similarities of positive (B, P) and negative pairs (B, N), whose weights are part of the function
def circle(wrong):
    def terms(a, b, margin, sharp):
        wa, wb = (1 + margin - a).clamp(min=0), (b + margin).clamp(min=0)
        return wa, wb, -sharp * wa * (a - 1 + margin), sharp * wb * (b - margin)

    class Circle(Function):
        @staticmethod
        def forward(ctx, a, b, margin, sharp):
            ctx.save_for_backward(a, b)
            ctx.margin, ctx.sharp = margin, sharp
            _, _, s, t = terms(a, b, margin, sharp)
            return F.softplus(s.logsumexp(-1) + t.logsumexp(-1)).mean()

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            m = ctx.margin
            wa, wb, s, t = terms(a, b, m, ctx.sharp)
            g = g * (s.logsumexp(-1) + t.logsumexp(-1)).sigmoid()[:, None] * ctx.sharp / len(a)
            slope_a, slope_b = wa - (a - 1 + m), wb + (b - m)
            if not wrong:
                slope_a = torch.where(wa > 0, slope_a, torch.zeros_like(a))
                slope_b = torch.where(wb > 0, slope_b, torch.zeros_like(b))
            return -g * s.softmax(-1) * slope_a, g * t.softmax(-1) * slope_b, None, None

    def loss(a, b, margin=0.25, sharp=4.0):
        sized("a", a, None, None)
        sized("b", b, len(a), None)
        alike(a, b)
        check(0 <= margin < 1 and 0 < sharp <= 64, "margin, sharp: expected [0, 1) and (0, 64]")
        bounded("a", a, -1, 1)
        bounded("b", b, -1, 1)
        return Circle.apply(a, b, margin, sharp)

    return loss


add(
    "circle_weights_clamped",
    circle,
    lambda: (
        real(3, 2, grad=False).tanh().requires_grad_(),
        real(3, 4, seed=1, grad=False).sigmoid().requires_grad_(),
    ),
    bug="Backward lets a weight that is clamped to 0 move with its similarity",
    trigger="a negative pair that is less similar than -margin",
)


# Queries (C, D) find their class among means of shots (C, S, D): scaled cosines, cross entropy
def angular_prototypes(wrong):
    def parts(shots, query):
        mean = shots.mean(1)
        ra = torch.rsqrt((mean * mean).sum(-1, keepdim=True) + 1e-4)
        rb = torch.rsqrt((query * query).sum(-1, keepdim=True) + 1e-4)
        return mean * ra, query * rb, ra, rb

    class Loss(Function):
        @staticmethod
        def forward(ctx, shots, query, scale):
            ctx.save_for_backward(shots, query, scale)
            a, b, _, _ = parts(shots, query)
            return -(scale * b @ a.mT).log_softmax(-1).diagonal().mean()

        @staticmethod
        def backward(ctx, g):
            shots, query, scale = ctx.saved_tensors
            a, b, ra, rb = parts(shots, query)
            cos = b @ a.mT
            own = torch.eye(len(a), dtype=a.dtype, device=a.device)
            d = g * ((scale * cos).softmax(-1) - own) / len(a)
            grad_a, grad_b = scale * d.mT @ b, scale * d @ a
            grad_mean = ra * (grad_a - a * (a * grad_a).sum(-1, keepdim=True))
            grad_query = rb * (grad_b - b * (b * grad_b).sum(-1, keepdim=True))
            share = grad_mean if wrong else grad_mean / shots.shape[1]
            return share[:, None].expand_as(shots), grad_query, (d * cos).sum()

    def loss(shots, query, scale):
        sized("shots", shots, None, None, None)
        sized("query", query, shots.shape[0], shots.shape[2])
        sized("scale", scale)
        alike(shots, query, scale)
        positive("scale", scale)
        bounded("scale", scale, 0, 100)
        bounded("shots", shots, -100, 100)
        bounded("query", query, -100, 100)
        return Loss.apply(shots, query, scale)

    return loss


add(
    "angular_prototypes_shots",
    angular_prototypes,
    lambda: (
        real(4, 1, 3),
        real(4, 3, seed=1),
        torch.tensor(5.0, dtype=torch.float64, requires_grad=True),
    ),
    bug="The means' gradient goes to every shot undivided",
    trigger="more than one shot",
)


# Cross entropy with a weight for each class and smoothed labels, over the sum of the labels' weights
def weighted_smoothed(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, x, labels, weight, smoothing):
            ctx.save_for_backward(x, labels, weight)
            ctx.smoothing = smoothing
            log_p = x.log_softmax(-1)
            own = -(log_p.gather(1, labels[:, None])[:, 0] * weight[labels]).sum()
            rest = -(log_p * weight).sum() / x.shape[1]
            return ((1 - smoothing) * own + smoothing * rest) / weight[labels].sum()

        @staticmethod
        def backward(ctx, g):
            x, labels, weight = ctx.saved_tensors
            p, n = x.softmax(-1), x.shape[1]
            own = weight[labels][:, None] * (p - F.one_hot(labels, n).to(x.dtype))
            rest = p - 1 / n if wrong else (p * weight.sum() - weight) / n
            grad = (1 - ctx.smoothing) * own + ctx.smoothing * rest
            return g * grad / weight[labels].sum(), None, None, None

    def loss(x, labels, weight, smoothing=0.1):
        sized("x", x, None, None)
        sized("labels", labels, len(x))
        sized("weight", weight, x.shape[1])
        alike(x, weight)
        check(labels.dtype == torch.int64, "labels: expected int64")
        indices("labels", labels, x.shape[1])
        check(not weight.requires_grad, "weight: expected constants")
        check(0 <= smoothing <= 1, "smoothing: expected 0 to 1")
        bounded("weight", weight, 1e-3, 1e3)
        bounded("x", x, -1e3, 1e3)
        return Loss.apply(x, labels, weight, smoothing)

    return loss


add(
    "weighted_smoothed_rest",
    weighted_smoothed,
    lambda: (
        real(4, 3),
        whole(3, 4, seed=1),
        torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64),
    ),
    bug="The smoothing's share of the gradient leaves the classes' weights out",
)


# Binary focal loss of logits with a weight for positive ones; labels are shares from 0 to 1
def binary_focal(wrong):
    class Focal(Function):
        @staticmethod
        def forward(ctx, x, y, gamma, weight):
            ctx.save_for_backward(x, y)
            ctx.gamma, ctx.weight = gamma, weight
            a, b = F.logsigmoid(x), F.logsigmoid(-x)
            loss = weight * y * (gamma * b).exp() * a + (1 - y) * (gamma * a).exp() * b
            return -loss.mean()

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            gamma, p, q = ctx.gamma, x.sigmoid(), (-x).sigmoid()
            a, b = F.logsigmoid(x), F.logsigmoid(-x)
            hit = ctx.weight * (gamma * b).exp() * (gamma * p * a - q)
            miss = (gamma * a).exp() * (p - gamma * q * b)
            grad = torch.where(y > 0.5, hit, miss) if wrong else y * hit + (1 - y) * miss
            return g * grad / x.numel(), None, None, None

    def loss(x, y, gamma=2.0, weight=3.0):
        same(x, y)
        alike(x, y)
        check(x.numel() > 0, "x: expected numbers")
        check(not y.requires_grad, "y: expected constants")
        check(0 <= gamma <= 10 and 0 < weight <= 1e3, "gamma: 0 to 10, weight: expected 0 to 1000")
        bounded("x", x, -80, 80)
        bounded("y", y, 0, 1)
        return Focal.apply(x, y, gamma, weight)

    return loss


add(
    "binary_focal_shares",
    binary_focal,
    lambda: (real(3, 4), whole(2, 3, 4, seed=1).double()),
    bug="Backward takes labels for either 0 or 1",
    trigger="labels in between",
)


# Softmax over the target and some sampled rows, corrected by how likely a row is drawn; a drawn target counts once
def sampled_softmax(wrong):
    def logits(h, table, log_q, target, drawn, careful):
        ids = torch.cat([target[:, None], drawn.expand(len(h), -1)], 1)
        s = (h[:, None] * table[ids]).sum(-1) - log_q[ids]
        hit = ids == target[:, None]
        hit[:, 0] = False
        return ids, s.masked_fill(hit, -torch.inf) if careful else s

    class Loss(Function):
        @staticmethod
        def forward(ctx, h, table, log_q, target, drawn):
            ctx.save_for_backward(h, table, log_q, target, drawn)
            _, s = logits(h, table, log_q, target, drawn, True)
            return (s.logsumexp(-1) - s[:, 0]).mean()

        @staticmethod
        def backward(ctx, g):
            h, table, log_q, target, drawn = ctx.saved_tensors
            ids, s = logits(h, table, log_q, target, drawn, not wrong)
            first = torch.zeros_like(s)
            first[:, 0] = 1
            d = g * (s.softmax(-1) - first) / len(h)
            rows = (d[..., None] * h[:, None]).flatten(0, 1)
            flat = ids.flatten()
            grad_table = torch.zeros_like(table).index_add(0, flat, rows)
            grad_q = torch.zeros_like(log_q).index_add(0, flat, -d.flatten())
            return (d[..., None] * table[ids]).sum(1), grad_table, grad_q, None, None

    def loss(h, table, log_q, target, drawn):
        sized("h", h, None, None)
        sized("table", table, None, h.shape[1])
        sized("log_q", log_q, len(table))
        sized("target", target, len(h))
        sized("drawn", drawn, None)
        alike(h, table, log_q)
        for name, t in {"target": target, "drawn": drawn}.items():
            check(t.dtype == torch.int64, f"{name}: expected int64")
            indices(name, t, len(table))
        for name, t in {"h": h, "table": table, "log_q": log_q}.items():
            bounded(name, t, -100, 100)
        return Loss.apply(h, table, log_q, target, drawn)

    return loss


add(
    "sampled_softmax_hits",
    sampled_softmax,
    lambda: (
        real(3, 2),
        real(6, 2, seed=1),
        real(6, seed=2, grad=False),
        torch.tensor([0, 3, 1]),
        torch.tensor([2, 5, 4, 5]),
    ),
    bug="Backward's softmax counts a target that was drawn twice, forward's once",
    trigger="a target among the rows that were drawn",
)


# A router's penalty: the mean over tokens that count of the square of the logarithm of the sum
def router_square(wrong):
    class Penalty(Function):
        @staticmethod
        def forward(ctx, x, keep):
            ctx.save_for_backward(x, keep)
            z = x.logsumexp(-1) * keep
            return (z * z).sum() / keep.sum().clamp(min=1)

        @staticmethod
        def backward(ctx, g):
            x, keep = ctx.saved_tensors
            z = x.logsumexp(-1) * keep
            count = keep.numel() if wrong else keep.sum().clamp(min=1)
            return g * 2 * z[..., None] * x.softmax(-1) / count, None

    def penalty(x, keep):
        sized("x", x, None, None, None)
        sized("keep", keep, *x.shape[:2])
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(keep.dtype == torch.bool, "keep: expected booleans")
        bounded("x", x, -1e3, 1e3)
        return Penalty.apply(x, keep)

    return penalty


add(
    "router_square_padding",
    router_square,
    lambda: (
        real(2, 3, 4),
        torch.tensor([[True, True, True], [True, False, False]]),
    ),
    bug="Backward divides by all tokens, padding too",
)


# Cross entropy of tokens: a mean for each sequence over its labels, then a mean over sequences; -100 does not count
def sequence_means(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, x, labels):
            ctx.save_for_backward(x, labels)
            live = labels >= 0
            log_p = x.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
            return -((log_p * live).sum(1) / live.sum(1).clamp(min=1)).mean()

        @staticmethod
        def backward(ctx, g):
            x, labels = ctx.saved_tensors
            live = (labels >= 0)[..., None].to(x.dtype)
            own = F.one_hot(labels.clamp(min=0), x.shape[2]).to(x.dtype)
            each = live.sum(1, keepdim=True).clamp(min=1) * len(x)
            share = live / (live.sum().clamp(min=1) if wrong else each)
            return g * share * (x.softmax(-1) - own), None

    def loss(x, labels):
        sized("x", x, None, None, None)
        sized("labels", labels, *x.shape[:2])
        check(x.is_floating_point(), "x: expected floating point numbers")
        counted(labels, x.shape[2])
        bounded("x", x, -1e3, 1e3)
        return Loss.apply(x, labels)

    return loss


add(
    "sequence_means_lengths",
    sequence_means,
    lambda: (real(2, 4, 3), torch.tensor([[0, 2, 1, 1], [2, -100, 0, -100]])),
    bug="Backward weighs all tokens alike, which is right for sequences of one length",
)


# One less the mean probability of the label's n-grams; one with a label of -100 does not count
def gram_loss(wrong):
    def grams(x, labels, n):
        live = (labels >= 0).unfold(0, n, 1).all(-1)
        log_p = x.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        total = log_p.unfold(0, n, 1).sum(-1).exp()
        return torch.where(live, total, torch.zeros_like(total)), live.sum().clamp(min=1)

    class Loss(Function):
        @staticmethod
        def forward(ctx, x, labels, n):
            ctx.save_for_backward(x, labels)
            ctx.n = n
            score, count = grams(x, labels, n)
            return 1 - score.sum() / count

        @staticmethod
        def backward(ctx, g):
            x, labels = ctx.saved_tensors
            score, count = grams(x, labels, ctx.n)
            place = torch.arange(len(score), device=x.device)[:, None]
            place = place + torch.arange(ctx.n, device=x.device)
            each = score[:, None].expand(-1, ctx.n)
            shares = torch.zeros_like(x[:, 0]).index_put((place,), each, accumulate=not wrong)
            own = F.one_hot(labels.clamp(min=0), x.shape[1]).to(x.dtype)
            return g * (shares / count)[:, None] * (x.softmax(-1) - own), None, None

    def loss(x, labels, n=2):
        sized("x", x, None, None)
        sized("labels", labels, len(x))
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(isinstance(n, int) and 1 <= n <= len(x), "n: expected 1 to the number of labels")
        counted(labels, x.shape[1])
        bounded("x", x, -1e3, 1e3)
        return Loss.apply(x, labels, n)

    return loss


add(
    "gram_loss_overlap",
    gram_loss,
    lambda: (real(5, 3), torch.tensor([0, 2, 1, 1, -100])),
    bug="Backward puts the n-grams' scores at their labels where it should add them up",
)
