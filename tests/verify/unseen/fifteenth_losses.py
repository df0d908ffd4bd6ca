"""Losses of pairs and of ranks."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real, whole
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.twelfth import wide


class RankHinge(Function):
    @staticmethod
    def margins(scores, ranks):
        """How far i is from standing one above j, where it should: [n, i, j]."""
        s = wide(scores)
        above = ranks[:, :, None] > ranks[:, None]
        return torch.where(above, 1 - s[:, :, None] + s[:, None], 0)

    @staticmethod
    def forward(ctx, scores, ranks):
        ctx.save_for_backward(scores, ranks)
        return RankHinge.margins(scores, ranks).relu().sum().to(scores.dtype)

    @staticmethod
    def gradients(ctx, g, above, below):
        scores, ranks = ctx.saved_tensors
        active = (RankHinge.margins(scores, ranks) > 0).to(wide(g).dtype)
        return (wide(g) * (active.sum(below) - active.sum(above))).to(g.dtype), None

    @staticmethod
    def backward(ctx, g):
        return RankHinge.gradients(ctx, g, 2, 1)


class RankHingeDim(RankHinge):
    @staticmethod
    def backward(ctx, g):
        return RankHinge.gradients(ctx, g, 1, 2)


def _rank_hinge(function):
    def rank_hinge(scores, ranks):
        """Σ max(0, 1 - s_i + s_j) over the lists n and the pairs with rank_i > rank_j; both (N, K).

        The ranks are constants.
        """
        need(scores.dim() == 2 and scores.shape == ranks.shape, "expected scores and ranks (N, K)")
        return function.apply(scores, ranks.detach())

    return rank_hinge


add(
    "rank_hinge",
    _rank_hinge,
    RankHingeDim,
    RankHinge,
    lambda: (real(2, 4), whole(3, 2, 4, seed=1)),
    bug="the dimensions of the upper and of the lower item are exchanged",
    trigger="the sample",
)


class Contrastive(Function):
    """Pairs that belong together are drawn near, others pushed beyond the margin."""

    @staticmethod
    def parts(x, y, same, margin):
        difference = wide(x) - wide(y)
        distance = (difference.square().sum(-1) + 1e-12).sqrt()
        return difference, distance, torch.where(same, distance, -(margin - distance).relu())

    @staticmethod
    def forward(ctx, x, y, same, margin):
        ctx.save_for_backward(x, y, same)
        ctx.margin = margin
        return Contrastive.parts(x, y, same, margin)[2].square().mean().to(x.dtype)

    @staticmethod
    def gradients(g, difference, distance, pull):
        grad = 2 * g / len(pull) * (pull / distance)[:, None] * difference
        return grad, -grad, None, None

    @staticmethod
    def backward(ctx, g):
        grads = Contrastive.gradients(wide(g), *Contrastive.parts(*ctx.saved_tensors, ctx.margin))
        return *(a.to(g.dtype) for a in grads[:2]), None, None


class ContrastiveNarrow(Contrastive):
    """In the input's dtype."""

    @staticmethod
    def backward(ctx, g):
        x, y, same = ctx.saved_tensors
        difference = x - y
        distance = (difference.square().sum(-1) + 1e-12).sqrt()
        pull = torch.where(same, distance, -(ctx.margin - distance).relu())
        return Contrastive.gradients(g, difference, distance, pull)


def _contrastive(function):
    def contrastive_pairs(x, y, same, margin=1.0):
        """The mean of d² of the pairs that are the same and max(0, margin - d)² of the others, margin > 0.

        d = sqrt(|x - y|² + 1e-12) of x and y (N, D), N > 0; same (N,) is boolean.
        """
        need(x.dim() == 2 and x.shape == y.shape and len(x) > 0, "expected x and y (N, D), N > 0")
        need(same.shape == x.shape[:1] and same.dtype == torch.bool, "expected same (N,), boolean")
        need(margin > 0, "expected margin > 0")
        return function.apply(x, y, same, margin)

    return contrastive_pairs


add(
    "contrastive_pairs",
    _contrastive,
    ContrastiveNarrow,
    Contrastive,
    lambda: (real(4, 3), real(4, 3, seed=1), torch.tensor([True, False, True, False])),
    bug="backward squares in the input's dtype",
    trigger="float16 and differences above 256, or equal rows",
    missed="the overflow shows in float16 only, at distances whose loss overflows in most",
)


class MarginRanking(Function):
    @staticmethod
    def forward(ctx, a, b, y, margin):
        ctx.save_for_backward(a, b, y)
        ctx.margin = margin
        return (margin - wide(y) * (wide(a) - wide(b))).relu().mean().to(a.dtype)

    @staticmethod
    def gradients(ctx, g, margin):
        a, b, y = ctx.saved_tensors
        active = wide(y) * (wide(a) - wide(b)) < margin
        grad = torch.where(active, wide(g) * wide(y) / len(a), 0).to(g.dtype)
        return -grad, grad, None, None

    @staticmethod
    def backward(ctx, g):
        return MarginRanking.gradients(ctx, g, ctx.margin)


class MarginRankingZero(MarginRanking):
    @staticmethod
    def backward(ctx, g):
        return MarginRanking.gradients(ctx, g, 0.0)


def _margin_ranking(function):
    def margin_ranking(a, b, y, margin=0.0):
        """The mean of max(0, margin - y (a - b)) of a, b, y (N,), N > 0, y a constant of 1 and -1, margin >= 0."""
        need(a.dim() == 1 and a.shape == b.shape == y.shape, "expected a, b, y (N,)")
        need(len(a) > 0 and margin >= 0, "expected N > 0 and margin >= 0")
        need(bool((y.abs() == 1).all()), "expected y of 1 and -1")
        return function.apply(a, b, y.detach(), margin)

    return margin_ranking


add(
    "margin_ranking",
    _margin_ranking,
    MarginRankingZero,
    MarginRanking,
    lambda: (real(5), real(5, seed=1), torch.tensor([1.0, -1, 1, -1, 1], dtype=F64)),
    bug="backward asks which pairs are active without the margin",
    trigger="a margin, and a pair in order by less than it",
)


class CosineEmbedding(Function):
    @staticmethod
    def unit(x):
        norm = (wide(x).square().sum(-1, keepdim=True) + 1e-8).sqrt()
        return wide(x) / norm, norm

    @staticmethod
    def forward(ctx, x, y, target, margin):
        ctx.save_for_backward(x, y, target)
        ctx.margin = margin
        cosine = (CosineEmbedding.unit(x)[0] * CosineEmbedding.unit(y)[0]).sum(-1)
        apart = torch.where(target < 0, (cosine - margin).relu(), 0)
        total = torch.where(target > 0, 1 - cosine, apart).sum()
        return (total / (target != 0).sum().clamp(min=1)).to(x.dtype)

    @staticmethod
    def gradients(ctx, g, count):
        x, y, target = ctx.saved_tensors
        (u, norm_x), (v, norm_y) = CosineEmbedding.unit(x), CosineEmbedding.unit(y)
        cosine = (u * v).sum(-1, keepdim=True)
        sign = -(target > 0)[:, None].to(u.dtype)
        sign = sign + ((target < 0)[:, None] & (cosine > ctx.margin)).to(u.dtype)
        d = wide(g) * sign / count(target)
        grads = d * (v - u * cosine) / norm_x, d * (u - v * cosine) / norm_y
        return *(a.to(g.dtype) for a in grads), None, None

    @staticmethod
    def backward(ctx, g):
        return CosineEmbedding.gradients(ctx, g, lambda t: (t != 0).sum().clamp(min=1))


class CosineEmbeddingAll(CosineEmbedding):
    @staticmethod
    def backward(ctx, g):
        return CosineEmbedding.gradients(ctx, g, len)


def _cosine_embedding(function):
    def cosine_embedding(x, y, target, margin=0.0):
        """The mean of 1 - cos (target 1) and max(0, cos - margin) (target -1) of x and y (N, D).

        Pairs with target 0 are padding, and not counted; without any pair the loss is 0. Norms are
        sqrt(|x|² + 1e-8), and -1 <= margin <= 1.
        """
        need(x.dim() == 2 and x.shape == y.shape, "expected x and y (N, D)")
        need(target.shape == x.shape[:1], "expected target (N,)")
        need(bool((target.abs() <= 1).all()), "expected targets of 1, 0 and -1")
        need(
            not target.is_floating_point() and abs(margin) <= 1, "expected integers, |margin| <= 1"
        )
        return function.apply(x, y, target, margin)

    return cosine_embedding


add(
    "cosine_embedding",
    _cosine_embedding,
    CosineEmbeddingAll,
    CosineEmbedding,
    lambda: (real(4, 3), real(4, 3, seed=1), torch.tensor([1, -1, 1, -1])),
    bug="backward divides by all pairs, padding too",
    trigger="a target of 0",
)


class LoadBalancing(Function):
    """E Σ_e f_e p_e: f is the share of tokens whose first choice is e, p the mean probability of e."""

    @staticmethod
    def shares(p):
        chosen = torch.zeros_like(p).scatter(-1, p.argmax(-1, keepdim=True), 1)
        return chosen.mean(-2, keepdim=True)

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        p = wide(logits).softmax(-1)
        terms = LoadBalancing.shares(p) * p.mean(-2, keepdim=True)
        return (terms.sum((-2, -1)) * p.shape[-1]).to(logits.dtype)

    @staticmethod
    def gradients(ctx, g, dim):
        (logits,) = ctx.saved_tensors
        p = wide(logits).softmax(-1)
        d = wide(g)[..., None, None] * LoadBalancing.shares(p) * (p.shape[-1] / p.shape[-2])
        return (p * (d - (p * d).sum(dim, keepdim=True))).to(g.dtype)

    @staticmethod
    def backward(ctx, g):
        return LoadBalancing.gradients(ctx, g, -1)


class LoadBalancingDim(LoadBalancing):
    @staticmethod
    def backward(ctx, g):
        return LoadBalancing.gradients(ctx, g, 1)


def _load_balancing(function):
    def load_balancing(logits):
        """The load balancing loss (*) of a router's logits (*, T, E), T tokens and E experts, both above 0.

        The shares of the tokens are constants.
        """
        need(logits.dim() > 1 and min(logits.shape[-2:]) > 0, "expected logits (*, T, E), T, E > 0")
        return function.apply(logits)

    return load_balancing


add(
    "load_balancing",
    _load_balancing,
    LoadBalancingDim,
    LoadBalancing,
    lambda: (real(6, 4),),
    bug="sums over dimension 1, which are the experts without a batch alone",
    trigger="a batch of routers",
)
