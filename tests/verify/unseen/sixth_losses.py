"""The sixth set, part three: losses."""

import torch

from tests.verify.unseen import real, whole
from tests.verify.unseen.sixth import Rule, faulty, small

LABELLED = lambda: (real(5, 3), torch.tensor([0, 2, -1, 1, 0]))  # noqa: E731


def one_hot(target, x):
    """Of labels that may be -1: a row of zeros."""
    return (target[:, None] == torch.arange(x.shape[-1], device=x.device)).to(x.dtype)


class CrossEntropy(Rule):
    """The weighted mean over the rows that have a label."""

    @staticmethod
    def value(x, target, weights):
        weighted = one_hot(target, x) * x.new_tensor(weights)
        return -(weighted * x.log_softmax(-1)).sum() / weighted.sum().clamp(min=1e-6)

    @staticmethod
    def pull(g, x, target, weights):
        weighted = one_hot(target, x) * x.new_tensor(weights)
        return (
            g
            / weighted.sum().clamp(min=1e-6)
            * (weighted.sum(-1, keepdim=True) * x.softmax(-1) - weighted)
        )


@faulty(
    CrossEntropy,
    "divides by the number of rows with a label",
    lambda: (*LABELLED(), (0.5, 1.0, 3.0)),
)
def cross_entropy_weighted(g, x, target, weights):
    weighted = one_hot(target, x) * x.new_tensor(weights)
    return g / (target >= 0).sum() * (weighted.sum(-1, keepdim=True) * x.softmax(-1) - weighted)


class Smoothed(Rule):
    """Cross-entropy with labels smoothed by 0.1, summed; rows without a label count nothing."""

    @staticmethod
    def value(x, target):
        hot = one_hot(target, x)
        smooth = 0.9 * hot + 0.1 / x.shape[-1] * hot.sum(-1, keepdim=True)
        return -(smooth * x.log_softmax(-1)).sum()

    @staticmethod
    def pull(g, x, target):
        hot = one_hot(target, x)
        there = hot.sum(-1, keepdim=True)
        return g * (there * x.softmax(-1) - 0.9 * hot - 0.1 / x.shape[-1] * there)


@faulty(Smoothed, "the smoothing part also pulls on ignored rows", LABELLED)
def label_smoothing(g, x, target):
    hot = one_hot(target, x)
    return g * (hot.sum(-1, keepdim=True) * x.softmax(-1) - 0.9 * hot - 0.1 / x.shape[-1])


class Focal(Rule):
    """(1 - p)^2 log(1/p) of logits, labels 0 and 1."""

    @staticmethod
    def value(x, target):
        z = (2 * target - 1) * x
        return (-z).sigmoid().square() * torch.logaddexp(-z, torch.zeros_like(z))

    @staticmethod
    def pull(g, x, target):
        sign = 2 * target - 1
        z = sign * x
        q = (-z).sigmoid()
        return g * sign * q * q * (-2 * z.sigmoid() * torch.logaddexp(-z, torch.zeros_like(z)) - q)


@faulty(Focal, "log of a probability that is 0 for a large logit", lambda: (real(6), whole(2, 6)))
def focal(g, x, target):
    sign = 2 * target - 1
    p = (sign * x).sigmoid()
    return g * sign * (1 - p) ** 2 * (2 * p * p.log() - (1 - p))


class Contrastive(Rule):
    @staticmethod
    def value(q, k):
        s = q @ k.mT
        return s.logsumexp(-1).sum() - s.diagonal().sum()

    @staticmethod
    def pull(g, q, k):
        s = q @ k.mT
        d = g * (s.softmax(-1) - torch.eye(*s.shape, dtype=s.dtype, device=s.device))
        return d @ k, d.mT @ q


@faulty(Contrastive, "scores not transposed for the keys", lambda: (real(4, 3), real(4, 3, seed=1)))
def contrastive(g, q, k):
    d = g * ((q @ k.mT).softmax(-1) - torch.eye(len(q), dtype=q.dtype))
    return d @ k, d @ q


class Pinball(Rule):
    value = staticmethod(lambda x, y: torch.maximum(0.9 * (y - x), -0.1 * (y - x)).mean())

    @staticmethod
    def pull(g, x, y):
        d = y - x
        slope = g / d.numel() * (0.9 * (d > 0).to(d.dtype) - 0.1 * (d < 0).to(d.dtype))
        return (-slope).sum_to_size(x.shape), slope.sum_to_size(y.shape)


@faulty(
    Pinball, "divides by the length, right for vectors only", lambda: (real(6), real(6, seed=1))
)
def pinball(g, x, y):
    slope = g / len(x) * (0.9 * (y > x).to(x.dtype) - 0.1 * (y < x).to(x.dtype))
    return -slope, slope


class Huber(Rule):
    value = staticmethod(lambda x: torch.where(x.abs() <= 1.5, 0.5 * x * x, 1.5 * (x.abs() - 0.75)))
    pull = staticmethod(lambda g, x: g * x.clamp(-1.5, 1.5))


@faulty(Huber, "slope 1 instead of 1.5 outside", lambda: (small(3, 4, scale=0.5),))
def huber(g, x):
    return g * torch.where(x.abs() <= 1.5, x, x.sign())


class GaussianKL(Rule):
    value = staticmethod(lambda m, v: 0.5 * (m * m + v.exp() - v - 1).sum())
    pull = staticmethod(lambda g, m, v: (g * m, 0.5 * g * v.expm1()))


@faulty(
    GaussianKL,
    "g as a Python number: nothing flows to it",
    lambda: (real(3, 4), real(3, 4, seed=1)),
)
def gaussian_kl(g, m, v):
    return float(g) * m, 0.5 * float(g) * v.expm1()


class Hinge(Rule):
    """Sum of max(0, 1 + x_j - x_label) over the other classes, rows with a label."""

    @staticmethod
    def violated(x, target):
        hot = one_hot(target, x)
        margin = 1 + x - (hot * x).sum(-1, keepdim=True)
        return margin.relu() * (1 - hot) * hot.sum(-1, keepdim=True), hot

    @classmethod
    def value(cls, x, target):
        return cls.violated(x, target)[0].sum()

    @classmethod
    def pull(cls, g, x, target):
        margin, hot = cls.violated(x, target)
        over = (margin > 0).to(x.dtype)
        return g * (over - hot * over.sum(-1, keepdim=True))


@faulty(Hinge, "the label's own margin counts as violated", LABELLED)
def hinge(g, x, target):
    margin, hot = Hinge.violated(x, target)
    over = (margin > 0).to(x.dtype)
    return g * (over - hot * (over.sum(-1, keepdim=True) + 1))


class Dice(Rule):
    @staticmethod
    def value(x, target):
        p = x.sigmoid()
        return (1 - (2 * (p * target).sum(-1) + 1) / ((p + target).sum(-1) + 1)).sum()

    @staticmethod
    def pull(g, x, target, dim=-1):
        p = x.sigmoid()
        above = 2 * (p * target).sum(dim, keepdim=True) + 1
        below = (p + target).sum(dim, keepdim=True) + 1
        return g * (above - 2 * target * below) / below.square() * p * (-x).sigmoid()


@faulty(Dice, "sums over the batch too, right for one sample", lambda: (real(1, 6), whole(2, 1, 6)))
def dice(g, x, target):
    return Dice.pull(g, x, target, (0, 1))


class Charbonnier(Rule):
    value = staticmethod(lambda x: (x * x + 1e-6).sqrt())
    pull = staticmethod(lambda g, x: g * x * (x * x + 1e-6).rsqrt())


@faulty(Charbonnier, "slope of |x|: wrong near 0, nan at 0")
def charbonnier(g, x):
    return g * x / x.abs()


class Sparsemax(Rule):
    @staticmethod
    def value(x):
        z = x - x.amax(-1, keepdim=True)
        ordered = z.sort(-1, descending=True).values
        counts = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
        sums = ordered.cumsum(-1)
        size = (1 + counts * ordered > sums).sum(-1, keepdim=True)
        return (z - (sums.gather(-1, size - 1) - 1) / size).relu()

    @classmethod
    def pull(cls, g, x):
        support = (cls.value(x) > 0).to(x.dtype)
        return support * (g - (g * support).sum(-1, keepdim=True) / support.sum(-1, keepdim=True))


@faulty(Sparsemax, "mean over all classes, not over the support")
def sparsemax(g, x):
    support = (Sparsemax.value(x) > 0).to(x.dtype)
    return support * (g - (g * support).mean(-1, keepdim=True))
