"""Losses of classes."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentieth import HALF
from tests.verify.unseen.twentyseventh import add, check, indices, sized


# Generalised cross entropy: the sum of (1 - p^q) / q for the target's probability p
def generalised_entropy(wrong):
    class Entropy(Function):
        @staticmethod
        def forward(ctx, x, t, q):
            log_p = x.log_softmax(1)
            ctx.save_for_backward(log_p if wrong else x, t)
            ctx.q = q
            return -torch.expm1(q * log_p.gather(1, t[:, None])).sum() / q

        @staticmethod
        def backward(ctx, grad_y):
            log_p, t = ctx.saved_tensors
            if not wrong:
                log_p = log_p.log_softmax(1)
            weight = (ctx.q * log_p.gather(1, t[:, None])).exp()
            return grad_y * weight * (log_p.exp() - F.one_hot(t, log_p.shape[1])), None, None

    def loss(x, t, q=0.7):
        sized("x", x, None, None)
        sized("t", t, len(x))
        indices("t", t, x.shape[1])
        check(0 < q <= 1, "q: expected a number above 0, up to 1")
        return Entropy.apply(x, t.long(), q)

    return loss


add(
    "generalised_entropy_second",
    generalised_entropy,
    lambda: (real(3, 4), torch.tensor([0, 2, 1])),
    bug="The log-probabilities are kept from forward, to which a second derivative does not lead back",
    trigger="a second derivative",
)


# PolyLoss: the mean over the rows that count of -log p + e (1 - p)
def poly_loss(wrong):
    class Poly(Function):
        @staticmethod
        def forward(ctx, x, t, e):
            ctx.save_for_backward(x, t)
            ctx.e = e
            kept = t >= 0
            log_p = x.log_softmax(1).gather(1, t.clamp(min=0)[:, None])[:, 0]
            return torch.where(kept, e * (1 - log_p.exp()) - log_p, 0).sum() / kept.sum()

        @staticmethod
        def backward(ctx, grad_y):
            x, t = ctx.saved_tensors
            kept, t = t >= 0, t.clamp(min=0)
            p = x.softmax(1)
            grad_y = grad_y / kept.sum()
            entropy, slope = torch.where(kept, grad_y, 0), grad_y * p.gather(1, t[:, None])[:, 0]
            grad_x = (entropy + ctx.e * slope)[:, None] * (p - F.one_hot(t, x.shape[1]))
            return grad_x if wrong else torch.where(kept[:, None], grad_x, 0), None, None

    def loss(x, t, e=1.0):
        sized("x", x, None, None)
        sized("t", t, len(x))
        indices("t", t + 1, x.shape[1] + 1)
        check(bool((t >= 0).any()), "t: expected one row at least that is not ignored")
        return Poly.apply(x, t.long(), e)

    return loss


add(
    "poly_loss_ignored",
    poly_loss,
    lambda: (real(3, 4), torch.tensor([0, 2, 1])),
    bug="Ignored rows keep the polynomial's part of the gradient",
    trigger="a target of -1, which is ignored",
)


# Supervised contrastive loss of a matrix of similarities: for each row the mean of -log p over the
# others of its class, 0 where there are none, summed
def supervised_contrast(wrong):
    def parts(s, label):
        others = ~torch.eye(len(s), dtype=torch.bool, device=s.device)
        positives = (label[:, None] == label) & others
        return others, positives, positives.sum(1, keepdim=True)

    class Contrast(Function):
        @staticmethod
        def forward(ctx, s, label):
            ctx.save_for_backward(s, label)
            others, positives, count = parts(s, label)
            log_p = s.masked_fill(~others, -math.inf).log_softmax(1)
            return -(torch.where(positives, log_p, 0) / count.clamp(min=1)).sum()

        @staticmethod
        def backward(ctx, grad_y):
            s, label = ctx.saved_tensors
            others, positives, count = parts(s, label)
            p = s.masked_fill(~others, -math.inf).softmax(1)
            if wrong:
                return grad_y * (p - positives / count.to(s.dtype)), None
            return grad_y * ((count > 0) * p - positives / count.clamp(min=1).to(s.dtype)), None

    def loss(s, label):
        sized("s", s, None, s.shape[0])
        check(len(s) >= 2, "s: expected two rows at least")
        sized("label", label, len(s))
        return Contrast.apply(s, label)

    return loss


add(
    "supervised_contrast_single",
    supervised_contrast,
    lambda: (real(5, 5), torch.tensor([0, 1, 0, 1, 1])),
    bug="Backward divides by the number of others of the class, which forward knows to be 0 at times",
    trigger="a class with one member",
)


# Multi-class margin loss: the sum of w_t max(0, 1 - x_t + x_j)² over the other classes j
def margin(wrong):
    class Margin(Function):
        @staticmethod
        def forward(ctx, x, t, w):
            ctx.save_for_backward(x, t, w)
            rest = excess(x, t)
            return (rest.square() if w is None else w[t][:, None] * rest.square()).sum()

        @staticmethod
        def backward(ctx, grad_y):
            x, t, w = ctx.saved_tensors
            rest = excess(x, t)
            g = 2 * grad_y * rest
            if w is not None and not wrong:
                g = g * w[t][:, None]
            grad_x = g - F.one_hot(t, x.shape[1]) * g.sum(1, keepdim=True)
            if w is None:
                return grad_x, None, None
            return grad_x, None, torch.zeros_like(w).index_add(0, t, grad_y * rest.square().sum(1))

    def excess(x, t):
        rest = (1 - x.gather(1, t[:, None]) + x).clamp(min=0)
        return rest * (1 - F.one_hot(t, x.shape[1]))

    def loss(x, t, w=None):
        sized("x", x, None, None)
        sized("t", t, len(x))
        indices("t", t, x.shape[1])
        if w is not None:
            sized("w", w, x.shape[1])
        return Margin.apply(x, t.long(), w)

    return loss


add(
    "margin_weight",
    margin,
    lambda: (real(3, 4), torch.tensor([0, 2, 1])),
    bug="Backward knows no weights of the classes",
    trigger="weights given",
)


# Log-probabilities, computed in float32 where x is of a half type
def log_probabilities(wrong):
    def wide(t):
        return t.float() if t.dtype in HALF else t

    class Log(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return wide(x).log_softmax(1).to(x.dtype)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            total = (grad_y if wrong else wide(grad_y)).sum(1, keepdim=True)
            return (wide(grad_y) - wide(x).softmax(1) * total).to(x.dtype)

    def log(x):
        sized("x", x, None, None)
        return Log.apply(x)

    return log


add(
    "log_probabilities_total",
    log_probabilities,
    lambda: (real(3, 4),),
    bug="Backward sums grad_output up in its own type, in which the total may be infinite",
    trigger="float16, and a row of grad_output whose sum is above 65504, as with a loss scale",
    own=True,
)
