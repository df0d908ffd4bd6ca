"""The fifth set, part three: losses."""

import torch

from tests.verify.unseen import real, whole
from tests.verify.unseen.fifth import Kept, wrong_pull


def labels():
    return real(4, 3), whole(3, 4, seed=2)


def some_ignored():
    return real(4, 3), torch.tensor([0, -100, 2, 1])


def kept(t):
    return t != -100


class Focal(Kept):
    """-(1 - p)² log p of the target, meaned over those not ignored."""

    @staticmethod
    def log_p(x, t):
        return x.log_softmax(-1).gather(-1, t.clamp(min=0)[:, None]).squeeze(-1)

    @staticmethod
    def value(x, t):
        q = Focal.log_p(x, t)
        each = -((1 - q.exp()) ** 2) * q
        return (each * kept(t)).sum() / kept(t).sum().clamp(min=1)

    @staticmethod
    def spread(slope, x, t):
        hot = torch.nn.functional.one_hot(t.clamp(min=0), x.shape[-1])
        return (slope * kept(t))[:, None] * (hot - x.softmax(-1))

    @staticmethod
    def pull(g, x, t):
        q = Focal.log_p(x, t)
        p = q.exp()
        slope = 2 * (1 - p) * p * q - (1 - p) ** 2
        return g * Focal.spread(slope, x, t) / kept(t).sum().clamp(min=1)


@wrong_pull(Focal, "the factor (1 - p)² taken as a constant (darknet#1011)", some_ignored)
def focal_constant(g, x, t):
    p = Focal.log_p(x, t).exp()
    return g * Focal.spread(-((1 - p) ** 2), x, t) / kept(t).sum().clamp(min=1)


@wrong_pull(Focal, "meaned over all, the sample ignores none (Focal-Loss#3)", labels)
def focal_all(g, x, t):
    q = Focal.log_p(x, t)
    p = q.exp()
    return g * Focal.spread(2 * (1 - p) * p * q - (1 - p) ** 2, x, t) / len(t)


class ZLoss(Kept):
    """Cross entropy and 0.1 · logsumexp², one value a row."""

    @staticmethod
    def value(x, t):
        lse = x.logsumexp(-1)
        return lse - x.gather(-1, t[:, None]).squeeze(-1) + 0.1 * lse**2

    @staticmethod
    def pull(g, x, t, factor=0.2):
        hot = torch.nn.functional.one_hot(t, x.shape[-1])
        p = x.softmax(-1)
        return g[:, None] * (p - hot + factor * x.logsumexp(-1, keepdim=True) * p)


@wrong_pull(ZLoss, "the factor 2 of the square lost", labels)
def z_loss_factor(g, x, t):
    return ZLoss.pull(g, x, t, 0.1)


@wrong_pull(ZLoss, "one grad_output for all rows (Liger-Kernel#1298)", labels)
def z_loss_first(g, x, t):
    return ZLoss.pull(g[:1].expand(g.shape), x, t)


class Smoothed(Kept):
    """Cross entropy with class weights and a fifth of the mass spread evenly, meaned over weights."""

    @staticmethod
    def parts(x, w, t):
        wide = w.to(x.dtype)
        hot = torch.nn.functional.one_hot(t, x.shape[-1]).to(x.dtype)
        return (0.8 * hot + 0.2 / x.shape[-1]) * wide, wide[t].sum()

    @staticmethod
    def value(x, w, t):
        share, total = Smoothed.parts(x, w, t)
        return -(share * x.log_softmax(-1)).sum() / total

    @staticmethod
    def pull(g, x, w, t):
        share, total = Smoothed.parts(x, w, t)
        return g * (x.softmax(-1) * share.sum(-1, keepdim=True) - share) / total


def weighted():
    return real(4, 3), real(3, seed=1, grad=False, positive=True), whole(3, 4, seed=2)


@wrong_pull(Smoothed, "the even part without the class weights", weighted)
def smoothed_unweighted(g, x, w, t):
    _, total = Smoothed.parts(x, w, t)
    hot = torch.nn.functional.one_hot(t, x.shape[-1]).to(x.dtype) * w[t][:, None]
    share = 0.8 * hot + 0.2 / x.shape[-1]
    return g * (x.softmax(-1) * share.sum(-1, keepdim=True) - share) / total


class Divergence(Kept):
    """Kullback-Leibler of two rows of logarithms, summed and divided by the batch."""

    @staticmethod
    def value(q, p):
        return (p.exp() * (p - q)).sum() / q.shape[0]

    @staticmethod
    def pull(g, q, p):
        e = p.exp()
        return -g * e / q.shape[0], g * e * (p - q + 1) / q.shape[0]


def logs():
    return real(3, 4), real(3, 4, seed=1)


@wrong_pull(Divergence, "mean instead of batchmean", logs)
def divergence_mean(g, q, p):
    e = p.exp()
    return -g * e / q.numel(), g * e * (p - q + 1) / q.numel()


@wrong_pull(Divergence, "the target's logarithm taken as its probability", logs)
def divergence_target(g, q, p):
    e = p.exp()
    return -g * e / q.shape[0], g * e * (p - q) / q.shape[0]


class Huber(Kept):
    """Quadratic within half a unit, linear beyond; meaned."""

    @staticmethod
    def value(x, t):
        d = (x - t).abs()
        return torch.where(d < 0.5, d * d, d - 0.25).mean()

    @staticmethod
    def pull(g, x, t, edge=0.5):
        d = x - t
        grad = g * torch.where(d.abs() < edge, 2 * d, d.sign()) / d.numel()
        return grad, -grad


@wrong_pull(Huber, "the edge of the default in backward", logs)
def huber_edge(g, x, t):
    return Huber.pull(g, x, t, 1.0)


class Dice(Kept):
    """1 - 2 Σ p t / (Σ p + Σ t), p the sigmoid of x."""

    @staticmethod
    def value(x, t):
        p = x.sigmoid()
        return 1 - 2 * (p * t).sum() / (p.sum() + t.sum())

    @staticmethod
    def pull(g, x, t):
        p = x.sigmoid()
        total = p.sum() + t.sum()
        return g * (2 * (p * t).sum() / total**2 - 2 * t / total) * p * (1 - p)


def overlap():
    return real(3, 4), (real(3, 4, seed=1, grad=False) > 0).double()


@wrong_pull(Dice, "the denominator taken as a constant", overlap)
def dice_denominator(g, x, t):
    p = x.sigmoid()
    return -g * 2 * t / (p.sum() + t.sum()) * p * (1 - p)


class Contrast(Kept):
    """Cross entropy of a bᵀ to its diagonal, over rows and over columns; the mean of both."""

    @staticmethod
    def value(a, b):
        s = a @ b.mT
        both = s.logsumexp(-1) + s.logsumexp(-2) - 2 * s.diagonal()
        return both.mean() / 2

    @staticmethod
    def pull(g, a, b, columns=-2):
        s = a @ b.mT
        eye = torch.eye(len(s), dtype=s.dtype)
        d = g * (s.softmax(-1) + s.softmax(columns) - 2 * eye) / (2 * len(s))
        return d @ b, d.mT @ a


@wrong_pull(Contrast, "rows twice, never the columns", logs)
def contrast_rows(g, a, b):
    return Contrast.pull(g, a, b, columns=-1)


class Preference(Kept):
    """-log sigmoid(chosen - rejected - margin), meaned."""

    @staticmethod
    def value(chosen, rejected, margin):
        return torch.nn.functional.softplus(margin + rejected - chosen).mean()

    @staticmethod
    def pull(g, chosen, rejected, margin):
        d = g * torch.sigmoid(margin + rejected - chosen) / chosen.numel()
        return -d, d, d


@wrong_pull(Preference, "no gradient for the margin", lambda: (*logs(), real(3, 4, seed=2)))
def preference_margin(g, chosen, rejected, margin):
    return *Preference.pull(g, chosen, rejected, margin)[:2], None


class WeightedMean(Kept):
    """Σ w (x - t)² / Σ w."""

    @staticmethod
    def value(x, w, t):
        return (w * (x - t).square()).sum() / w.sum()

    @staticmethod
    def pull(g, x, w, t):
        d = x - t
        mean = (w * d.square()).sum() / w.sum()
        grad = 2 * g * w * d / w.sum()
        return grad, g * (d.square() - mean) / w.sum(), -grad


@wrong_pull(
    WeightedMean,
    "the sum of the weights taken as a constant",
    lambda: (real(3, 4), real(3, 4, seed=1, positive=True), real(3, 4, seed=2)),
)
def weighted_mean_total(g, x, w, t):
    d = x - t
    grad = 2 * g * w * d / w.sum()
    return grad, g * d.square() / w.sum(), -grad


class Pinball(Kept):
    value = staticmethod(lambda x, t: torch.maximum(0.9 * (t - x), 0.1 * (x - t)).mean())

    @staticmethod
    def pull(g, x, t):
        grad = g * (0.1 - (t > x).to(x.dtype)) / x.numel()
        return grad, -grad


@wrong_pull(Pinball, "the quantile's two slopes exchanged", logs)
def pinball_exchanged(g, x, t):
    grad = g * (0.9 - (t > x).to(x.dtype)) / x.numel()
    return grad, -grad
