"""Losses."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentyfifth import add, check, indices, leaf, same, sized


# Cross entropy of soft targets over the rows: L = mean(lse(x) sum(q) - q · x)
def soft_target_entropy(wrong):
    class Entropy(Function):
        @staticmethod
        def forward(ctx, x, q):
            ctx.save_for_backward(x, q)
            return -(q * x.log_softmax(1)).sum() / len(x)

        @staticmethod
        def backward(ctx, grad_y):
            x, q = ctx.saved_tensors
            total = 1 if wrong else q.sum(1, keepdim=True)
            share = grad_y / len(x)
            return share * (total * x.softmax(1) - q), -share * x.log_softmax(1)

    def loss(x, q):
        sized("x", x, None, None)
        same(x, q)
        return Entropy.apply(x, q)

    return loss


add(
    "soft_target_entropy_total",
    soft_target_entropy,
    lambda: (real(3, 4), real(3, 4, seed=1, grad=False).softmax(1)),
    bug="Backward takes each row of targets to sum to 1",
    trigger="targets with another sum, such as masked or weighted ones",
)


# Centre loss: the mean squared distance of features from their class's centre
def centre_loss(wrong):
    class Centre(Function):
        @staticmethod
        def forward(ctx, x, t, centres):
            ctx.save_for_backward(x, t, centres)
            return (x - centres[t]).square().sum() / len(x)

        @staticmethod
        def backward(ctx, grad_y):
            x, t, centres = ctx.saved_tensors
            g = grad_y * 2 * (x - centres[t]) / len(x)
            zeros, pull = torch.zeros_like(centres), -g.to(centres.dtype)
            grad_centres = zeros.index_put((t,), pull) if wrong else zeros.index_add(0, t, pull)
            return g, None, grad_centres

    def loss(x, t, centres):
        sized("x", x, None, None)
        sized("t", t, len(x))
        sized("centres", centres, None, x.shape[1])
        indices("t", t, len(centres))
        return Centre.apply(x, t.long(), centres)

    return loss


add(
    "centre_loss_class",
    centre_loss,
    lambda: (real(3, 4), torch.tensor([4, 1, 2]), real(5, 4, seed=1)),
    bug="Of the features of one class only the last moves the centre",
    trigger="two features of one class",
)


# Binary cross entropy of logits with smoothed targets: s t + (1 - s) / 2
def smoothed_binary(wrong):
    class Binary(Function):
        @staticmethod
        def forward(ctx, x, t, keep):
            ctx.save_for_backward(x, t)
            ctx.keep = keep
            return (-F.logsigmoid(-x) - x * (keep * t + (1 - keep) / 2)).sum()

        @staticmethod
        def backward(ctx, grad_y):
            x, t = ctx.saved_tensors
            keep = ctx.keep
            grad_x = grad_y * (x.sigmoid() - keep * t - (1 - keep) / 2)
            return grad_x, -grad_y * x * (1 if wrong else keep), None

    def loss(x, t, keep=1.0):
        same(x, t)
        check(0 <= keep <= 1, "keep: expected a number from 0 to 1")
        return Binary.apply(x, t, keep)

    return loss


add(
    "smoothed_binary_teacher",
    smoothed_binary,
    lambda: (real(3, 4), leaf(real(3, 4, seed=1).sigmoid(), grad=False)),
    bug="The targets' gradient is that of targets that are not smoothed",
    trigger="smoothing and targets that another network makes",
    kwargs=lambda: {"keep": 0.8},
)


# Weighted squared error over the total weight: L = sum(w (x - t)^2) / sum(w)
def weighted_square(wrong):
    class Error(Function):
        @staticmethod
        def forward(ctx, x, t, w):
            ctx.save_for_backward(x, t, w)
            return (w * (x - t).square()).sum() / w.sum()

        @staticmethod
        def backward(ctx, grad_y):
            x, t, w = ctx.saved_tensors
            d = x - t
            share = grad_y / w.sum()
            loss = 0 if wrong else (w * d.square()).sum() / w.sum()
            return share * 2 * w * d, -share * 2 * w * d, share * (d.square() - loss)

    def loss(x, t, w):
        same(x, t, w)
        check(bool((w >= 0).all()) and bool((w > 0).any()), "w: expected weights of at least 0")
        return Error.apply(x, t, w)

    return loss


add(
    "weighted_square_total",
    weighted_square,
    lambda: (real(3, 4), real(3, 4, seed=1), real(3, 4, seed=2, positive=True, grad=False)),
    bug="The weights' total is taken for a constant",
    trigger="weights that require a gradient",
)


# Distillation: L = T^2 mean over rows of sum(p log(p / q)), p and q softmax of teacher / T and student / T
def tempered_distillation(wrong):
    class Distillation(Function):
        @staticmethod
        def forward(ctx, x, teacher, temperature):
            ctx.save_for_backward(x, teacher)
            ctx.t = temperature
            q, p = (z.div(temperature).log_softmax(1) for z in (x, teacher))
            return temperature**2 * (p.exp() * (p - q)).sum() / len(x)

        @staticmethod
        def backward(ctx, grad_y):
            x, teacher = ctx.saved_tensors
            q, p = (z.div(ctx.t).log_softmax(1) for z in (x, teacher))
            factor = ctx.t**2 if wrong else ctx.t
            gap = p - q
            own = p.exp() * (gap - (p.exp() * gap).sum(1, keepdim=True))
            share = grad_y * factor / len(x)
            return share * (q.exp() - p.exp()), share * own, None

    def loss(x, teacher, temperature=1.0):
        sized("x", x, None, None)
        same(x, teacher)
        check(temperature > 0, "temperature: expected a positive number")
        check(bool(x.isfinite().all() & teacher.isfinite().all()), "expected finite logits")
        return Distillation.apply(x, teacher, temperature)

    return loss


add(
    "tempered_distillation_square",
    tempered_distillation,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="Backward keeps the square of the temperature, of which the inner derivative takes one",
    trigger="another temperature than 1, the default",
    kwargs=lambda: {"temperature": 2.0},
)


# Squared multi-class hinge: L = mean over rows of sum over j != t of max(0, 1 - x_t + x_j)^2
def square_hinge(wrong):
    def margins(x, t):
        m = (1 - x.gather(1, t[:, None]) + x).clamp(min=0)
        return m * (1 - F.one_hot(t, x.shape[1]).to(x.dtype))

    class Hinge(Function):
        @staticmethod
        def forward(ctx, x, t):
            ctx.save_for_backward(x, t)
            return margins(x, t).square().sum() / len(x)

        @staticmethod
        def backward(ctx, grad_y):
            x, t = ctx.saved_tensors
            m = margins(x, t)
            own = F.one_hot(t, x.shape[1]) * m.sum(1, keepdim=True)
            return grad_y * (1 if wrong else 2) / len(x) * (m - own), None

    def loss(x, t):
        sized("x", x, None, None)
        sized("t", t, len(x))
        indices("t", t, x.shape[1])
        return Hinge.apply(x, t.long())

    return loss


add(
    "square_hinge_power",
    square_hinge,
    lambda: (real(3, 4), whole(4, 3)),
    bug="The backward of the hinge that is not squared was adapted without its 2",
)


# Pairs of one positive and one negative score: the mean squared hinge, an AUC's surrogate; 0 without pairs
def pair_surrogate(wrong):
    class Surrogate(Function):
        @staticmethod
        def forward(ctx, x, t):
            ctx.save_for_backward(x, t)
            d = (1 - x[t][:, None] + x[~t]).clamp(min=0)
            return d.square().sum() / max(d.numel(), 1)

        @staticmethod
        def backward(ctx, grad_y):
            x, t = ctx.saved_tensors
            d = (1 - x[t][:, None] + x[~t]).clamp(min=0)
            pairs = t.sum() * (~t).sum()
            g = grad_y * 2 / (pairs if wrong else pairs.clamp(min=1))
            grad_x = torch.zeros_like(x)
            grad_x = grad_x.index_put((t,), -d.sum(1)).index_put((~t,), d.sum(0))
            return g * grad_x, None

    def loss(x, t):
        sized("x", x, None)
        sized("t", t, len(x))
        if t.dtype != torch.bool:
            raise TypeError(f"t: expected truth values, got {t.dtype}")
        return Surrogate.apply(x, t)

    return loss


add(
    "pair_surrogate_one_class",
    pair_surrogate,
    lambda: (real(5), torch.tensor([True, False, False, True, False])),
    bug="Backward divides by the number of pairs, which forward knows to be 0 at times",
    trigger="a batch of one class",
)


# An ordinal loss: the squared distance of two cumulative distributions, one number for each row
def ordinal(wrong):
    class Ordinal(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(p, q):
            return (p - q).cumsum(-1).square().sum(-1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            p, q = ctx.saved_tensors
            g = grad_y[..., None] * 2 * (p - q).cumsum(-1)
            g = g.cumsum(-1) if wrong else g.flip(-1).cumsum(-1).flip(-1)
            return g, -g

    def loss(p, q):
        same(p, q)
        check(p.ndim >= 1, "expected at least one dimension")
        return Ordinal.apply(p, q)

    return loss


add(
    "ordinal_running_sum",
    ordinal,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="The running sum's gradient is a running sum from the same end",
)
