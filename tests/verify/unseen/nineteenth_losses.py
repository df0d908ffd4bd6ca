"""Losses."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.nineteenth import add, check, given, same, sized, uniform


class Negative(Function):
    @staticmethod
    def forward(ctx, predicted, vectors, target, indices):
        ctx.save_for_backward(predicted, vectors, indices)
        ctx.target = target
        cost = -F.logsigmoid(vectors[target] @ predicted)
        return cost - F.logsigmoid(-(vectors[indices] @ predicted)).sum()

    @staticmethod
    def gradients(ctx, g, of_sample):
        predicted, vectors, indices = ctx.saved_tensors
        first, others = vectors[ctx.target], vectors[indices]
        d = (first @ predicted).sigmoid() - 1
        s = (others @ predicted).sigmoid()
        grads = torch.zeros_like(vectors)
        grads = grads.index_add(0, indices, torch.outer(of_sample(s), predicted))
        place = torch.tensor([ctx.target], device=indices.device)
        grads = grads.index_add(0, place, (d * predicted).unsqueeze(0))
        return g * (d * first + s @ others), g * grads, None, None

    @staticmethod
    def backward(ctx, g):
        return Negative.gradients(ctx, g, lambda s: s)


class NegativeMinus(Negative):
    @staticmethod
    def backward(ctx, g):
        return Negative.gradients(ctx, g, lambda s: s - 1)


def _negative(function):
    def negative_sampling(predicted, vectors, target, indices):
        """-log σ(u[target] · v) - Σ log σ(-u[k] · v) over k in indices.

        v is predicted (D,), u vectors (V, D); target is a number and indices (K,) hold numbers from 0 to V - 1.
        """
        sized("predicted", predicted, None)
        sized("vectors", vectors, None, predicted.shape[0])
        sized("indices", indices, None)
        check(0 <= target < vectors.shape[0], "target: expected a row of vectors")
        check(bool(((indices >= 0) & (indices < vectors.shape[0])).all()), "indices: expected rows")
        return function.apply(predicted, vectors, target, indices)

    return negative_sampling


def _words():
    vectors = [
        [0.26726124, 0.53452248, 0.80178373],
        [0.45584231, 0.56980288, 0.68376346],
        [0.50257071, 0.57436653, 0.64616234],
        [0.52342392, 0.57576631, 0.62810871],
    ]
    return given(vectors[0]), given(vectors), 1, torch.tensor([0, 2])


add(
    "negative_sampling_minus",
    _negative,
    NegativeMinus,
    Negative,
    _words,
    bug="the negative samples' gradient is (σ - 1) v instead of σ v (github.com/Rockung/ml, negative sample notebook)",
)


class Ratings(Function):
    @staticmethod
    def forward(ctx, x, theta, y, r, lam):
        ctx.save_for_backward(x, theta, y, r)
        ctx.lam = lam
        cost = ((x @ theta.mT) * r - y).square().sum()
        return 0.5 * (cost + lam * (x.square().sum() + theta.square().sum()))

    @staticmethod
    def gradients(ctx, g, rated):
        x, theta, y, r = ctx.saved_tensors
        d = rated((x @ theta.mT) * r - y, r)
        return g * (d @ theta + ctx.lam * x), g * (d.mT @ x + ctx.lam * theta), None, None, None

    @staticmethod
    def backward(ctx, g):
        return Ratings.gradients(ctx, g, lambda d, r: d * r)


class RatingsAll(Ratings):
    @staticmethod
    def backward(ctx, g):
        return Ratings.gradients(ctx, g, lambda d, r: d)


def _ratings(function):
    def ratings(x, theta, y, r, lam=1.5):
        """½ Σ (r (x thetaᵀ) - y)² + ½ lam (Σ x² + Σ theta²), of x (M, D) and theta (U, D).

        The ratings y (M, U) are constant; r (M, U) is true where a film was rated.
        """
        sized("x", x, None, None)
        sized("theta", theta, None, x.shape[1])
        sized("y", y, x.shape[0], theta.shape[0])
        same(y, r)
        return function.apply(x, theta, y, r, lam)

    return ratings


def _films():
    r = uniform(5, 4, seed=2, grad=False) > 0.5
    return real(5, 3), real(4, 3, seed=1), real(5, 4, seed=3, grad=False) * r, r


add(
    "ratings_rated",
    _ratings,
    RatingsAll,
    Ratings,
    _films,
    bug="the error is not masked again by what was rated (soopsaram.com, ex8 recommender system)",
    trigger="y that is not 0 where r is false",
)


class Triplet(Function):
    @staticmethod
    def forward(ctx, a, p, n, margin):
        ctx.save_for_backward(a, p, n)
        ctx.margin = margin
        return Triplet.each(a, p, n, margin).relu().sum()

    @staticmethod
    def each(a, p, n, margin):
        return (a - p).square().sum(1) - (a - n).square().sum(1) + margin

    @staticmethod
    def gradients(ctx, g, sign):
        a, p, n = ctx.saved_tensors
        on = g * (Triplet.each(a, p, n, ctx.margin) > 0).to(a.dtype).unsqueeze(1)
        return 2 * on * (n - p), 2 * on * (p - a), sign * 2 * on * (a - n), None

    @staticmethod
    def backward(ctx, g):
        return Triplet.gradients(ctx, g, 1)


class TripletSign(Triplet):
    @staticmethod
    def backward(ctx, g):
        return Triplet.gradients(ctx, g, -1)


def _triplet(function):
    def triplet(a, p, n, margin=1.0):
        """Σ max(0, |a - p|² - |a - n|² + margin), of anchors a, positives p and negatives n (N, D)."""
        sized("a", a, None, None)
        same(a, p, n)
        return function.apply(a, p, n, margin)

    return triplet


add(
    "triplet_negative",
    _triplet,
    TripletSign,
    Triplet,
    lambda: (real(4, 3), real(4, 3, seed=1), real(4, 3, seed=2)),
    bug="the negative's gradient has the wrong sign (stackoverflow.com/q/33330779)",
)


class Tsne(Function):
    @staticmethod
    def similarities(d):
        off = 1 - torch.eye(d.shape[0], dtype=d.dtype, device=d.device)
        log_kernel = -d.square().log1p()
        log_q = log_kernel - log_kernel.masked_fill(off == 0, -torch.inf).flatten().logsumexp(0)
        return off, log_q

    @staticmethod
    def forward(ctx, d, p):
        ctx.save_for_backward(d, p)
        off, log_q = Tsne.similarities(d)
        return (torch.xlogy(p, p) - p * log_q).mul(off).sum()

    @staticmethod
    def gradients(ctx, g, distance):
        d, p = ctx.saved_tensors
        off, log_q = Tsne.similarities(d)
        p = off * p
        return 2 * g * (p - off * log_q.exp() * p.sum()) * distance(d) / (1 + d.square()), None

    @staticmethod
    def backward(ctx, g):
        return Tsne.gradients(ctx, g, lambda d: d)


class TsneBare(Tsne):
    @staticmethod
    def backward(ctx, g):
        return Tsne.gradients(ctx, g, torch.ones_like)


def _tsne(function):
    def tsne(d, p):
        """Σ p log(p / q) over i ≠ j, of distances d (N, N), N > 1, and constant probabilities p >= 0 (N, N).

        q is 1 / (1 + d²) over its sum; the diagonals of d and p do not count.
        """
        sized("d", d, None, None)
        sized("d", d, d.shape[0], d.shape[0])
        check(d.shape[0] > 1, "d: expected two points or more")
        same(d, p)
        check(bool((p >= 0).all()), "p: expected probabilities")
        return function.apply(d, p)

    return tsne


def _points():
    y = real(4, 2, grad=False)
    d = (y.unsqueeze(1) - y).norm(dim=2)
    p = uniform(4, 4, seed=1, grad=False)
    p = (p + p.mT) * (1 - torch.eye(4, dtype=p.dtype))
    return d.requires_grad_(), p / p.sum()


add(
    "tsne_distance",
    _tsne,
    TsneBare,
    Tsne,
    _points,
    bug="the gradient by d is without the factor d (Cross Validated, A mistake in the original t-SNE paper)",
)
