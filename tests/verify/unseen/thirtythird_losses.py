"""Losses and statistics."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirtythird import add, bounded, check, indices, same, sized


# Squared earth mover's distance of ratings: the mean square of the difference of cumulative sums
def rating_distance(wrong):
    class Distance(Function):
        @staticmethod
        def forward(ctx, p, q):
            ctx.save_for_backward(p, q)
            return (p - q).cumsum(-1).square().mean()

        @staticmethod
        def backward(ctx, grad):
            p, q = ctx.saved_tensors
            errors = 2 * grad / p.numel() * (p - q).cumsum(-1)
            summed = errors.cumsum(-1) if wrong else errors.flip(-1).cumsum(-1).flip(-1)
            return summed, -summed

    def function(p, q):
        same(p, q)
        check(p.ndim >= 1 and p.numel() > 0, "p: expected numbers")
        bounded("p", p, -1e4, 1e4)
        bounded("q", q, -1e4, 1e4)
        return Distance.apply(p, q)

    return function


add(
    "rating_distance_direction",
    rating_distance,
    lambda: (
        real(3, 5).softmax(-1).detach().requires_grad_(),
        real(3, 5, seed=1, grad=False).softmax(-1),
    ),
    bug="A cumulative sum's gradient is summed in the same direction",
)


# Sigmoid loss of image and text pairs: -1/n Σ log sigmoid(± (exp(s) x_i . y_j + b))
def pair_sigmoid(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, x, y, log_scale, bias):
            ctx.save_for_backward(x, y, log_scale, bias)
            z = log_scale.exp() * (x @ y.mT) + bias
            signs = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
            return -F.logsigmoid(signs * z).sum() / len(x)

        @staticmethod
        def backward(ctx, grad):
            x, y, log_scale, bias = ctx.saved_tensors
            dots, scale = x @ y.mT, log_scale.exp()
            signs = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
            g = -grad / len(x) * signs * torch.sigmoid(-signs * (scale * dots + bias))
            grad_scale = (g * dots).sum() * (1 if wrong else scale)
            return scale * (g @ y), scale * (g.mT @ x), grad_scale, g.sum()

    def function(x, y, log_scale, bias):
        sized("x", x, None, None)
        sized("y", y, *x.shape)
        sized("log_scale", log_scale)
        sized("bias", bias)
        bounded("log_scale", log_scale, -5, 5)
        for name, t in {"x": x, "y": y, "bias": bias}.items():
            bounded(name, t, -1e3, 1e3)
        return Loss.apply(x, y, log_scale, bias)

    return function


add(
    "pair_sigmoid_log_scale",
    pair_sigmoid,
    lambda: (
        real(4, 3),
        real(4, 3, seed=1),
        torch.tensor(math.log(10), dtype=torch.float64, requires_grad=True),
        torch.tensor(-10.0, dtype=torch.float64, requires_grad=True),
    ),
    bug="The gradient is that of the scale, not of its logarithm",
)


# Triplet loss with each anchor's farthest positive and nearest negative
def hardest_triplets(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, x, labels, margin):
            ctx.save_for_backward(x, labels)
            ctx.margin = margin
            square = (x[:, None] - x).square().sum(-1)
            alike = labels[:, None] == labels
            farthest = square.masked_fill(~alike, -1).amax(1)
            nearest = square.masked_fill(alike, math.inf).amin(1)
            return (farthest - nearest + margin).clamp(min=0).mean()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            x, labels = ctx.saved_tensors
            differences = x[:, None] - x
            square = differences.square().sum(-1)
            alike = labels[:, None] == labels
            positive = square.masked_fill(~alike, -1)
            negative = square.masked_fill(alike, math.inf)
            farthest, at_far = positive.max(1, keepdim=True)
            nearest, at_near = negative.min(1, keepdim=True)
            if wrong:
                chosen = (positive == farthest).to(x.dtype) - (negative == nearest).to(x.dtype)
            else:
                chosen = torch.zeros_like(square).scatter(1, at_far, 1).scatter(1, at_near, -1)
            active = farthest - nearest + ctx.margin > 0
            each = 2 * grad / len(x) * (chosen * active)[..., None] * differences
            return each.sum(1) - each.sum(0), None, None

    def function(x, labels, margin=0.5):
        sized("x", x, None, None)
        sized("labels", labels, len(x))
        indices("labels", labels, 1000)
        check(len(labels.unique()) > 1, "labels: expected two classes at least")
        bounded("x", x, -1e4, 1e4)
        return Loss.apply(x, labels, margin)

    return function


add(
    "hardest_triplets_ties",
    hardest_triplets,
    lambda: (real(6, 3), torch.tensor([0, 1, 0, 2, 1, 2])),
    bug="Every negative at the least distance gets the whole gradient, not one of them",
    trigger="two equal rows, such as an image twice in the batch",
    missed="two rows are made equal, and not where they are both the nearest of another",
)


# Expected place (x, y) under a heat map's softmax
def heat_map_place(wrong):
    class Place(Function):
        @staticmethod
        def forward(ctx, heat):
            ctx.save_for_backward(heat)
            high, wide = heat.shape[-2:]
            p = heat.flatten(-2).softmax(-1)
            at = torch.arange(high * wide, device=heat.device)
            grid = torch.stack((at % wide, at // wide), -1).to(heat.dtype)
            return p @ grid

        @staticmethod
        def backward(ctx, grad_y):
            (heat,) = ctx.saved_tensors
            high, wide = heat.shape[-2:]
            p = heat.flatten(-2).softmax(-1)
            at = torch.arange(high * wide, device=heat.device)
            width = high if wrong else wide
            grid = torch.stack((at % width, at // width), -1).to(heat.dtype)
            along = grad_y @ grid.mT
            return (p * (along - (p * along).sum(-1, keepdim=True))).view(heat.shape)

    def function(heat):
        sized("heat", heat, None, None, None)
        bounded("heat", heat, -1e4, 1e4)
        return Place.apply(heat)

    return function


add(
    "heat_map_place_width",
    heat_map_place,
    lambda: (real(2, 4, 4),),
    bug="backward divides the places by the height",
    trigger="a map that is not square",
)


# -log of the beta-binomial probability of k of n
def beta_binomial(wrong):
    class Nll(Function):
        @staticmethod
        def forward(ctx, a, b, k, n):
            ctx.save_for_backward(a, b, k, n)
            ways = (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()
            above = (k + a).lgamma() + (n - k + b).lgamma() - (n + a + b).lgamma()
            return -(ways + above - a.lgamma() - b.lgamma() + (a + b).lgamma())

        @staticmethod
        def backward(ctx, grad_y):
            a, b, k, n = ctx.saved_tensors
            both = (a + b).digamma() - (n + a + b).digamma()
            by_a = (k + a).digamma() - a.digamma() + both
            by_b = ((k if wrong else n - k) + b).digamma() - b.digamma() + both
            return -grad_y * by_a, -grad_y * by_b, None, None

    def function(a, b, k, n):
        same(a, b, k, n)
        indices("k", k, 10**6)
        indices("n", n, 10**6)
        check(bool((k <= n).all()), "k: expected n at most")
        bounded("a", a, 1e-2, 1e4)
        bounded("b", b, 1e-2, 1e4)
        return Nll.apply(a, b, k.to(a.dtype), n.to(a.dtype))

    return function


add(
    "beta_binomial_failures",
    beta_binomial,
    lambda: (
        real(4, positive=True),
        real(4, seed=1, positive=True),
        torch.tensor([0, 2, 3, 7]),
        torch.tensor([5, 5, 8, 9]),
    ),
    bug="The second parameter's gradient counts the successes again",
)


# Continuous ranked probability score of an ensemble
def ensemble_score(wrong):
    class Score(Function):
        @staticmethod
        def forward(ctx, members, seen):
            ctx.save_for_backward(members, seen)
            n = members.shape[-1]
            spread = (members[..., None] - members[..., None, :]).abs().sum((-1, -2))
            return (members - seen[..., None]).abs().mean(-1) - spread / (2 * n**2)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            members, seen = ctx.saved_tensors
            n = members.shape[-1]
            ordered = members.sort(-1)[0].contiguous()
            below = torch.searchsorted(ordered, members.contiguous())
            up_to = torch.searchsorted(ordered, members.contiguous(), right=True)
            beyond = 2 * below - (n - 1) if wrong else below + up_to - n
            signs = (members - seen[..., None]).sign()
            spread = beyond.to(members.dtype) / n**2
            g = grad_y[..., None]
            return g * (signs / n - spread), -grad_y * signs.mean(-1)

    def function(members, seen):
        check(members.ndim >= 1 and members.shape[-1] >= 1, "members: expected one at least")
        sized("seen", seen, *members.shape[:-1])
        bounded("members", members, -1e4, 1e4)
        bounded("seen", seen, -1e4, 1e4)
        return Score.apply(members, seen)

    return function


add(
    "ensemble_score_equal",
    ensemble_score,
    lambda: (real(3, 5), real(3, seed=1)),
    bug="Equal members all get the rank of the first of them",
    trigger="equal members, such as several forecasts of no rain",
)


# Squared hinge over all pairs of a positive's and a negative's score, sixteen positives at a time
def ranking_pairs(wrong):
    some = 16

    class Loss(Function):
        @staticmethod
        def forward(ctx, good, bad):
            ctx.save_for_backward(good, bad)
            total = good.new_zeros(())
            for chunk in good.split(some):
                total = total + (1 - chunk[:, None] + bad).clamp(min=0).square().sum()
            return total / (len(good) * len(bad))

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            good, bad = ctx.saved_tensors
            grad_good, grad_bad = torch.zeros_like(good), torch.zeros_like(bad)
            chunks = max(len(good) // some, 1) if wrong else -(-len(good) // some)
            for i in range(chunks):
                rows = slice(i * some, (i + 1) * some)
                gap = 2 * (1 - good[rows, None] + bad).clamp(min=0)
                grad_good[rows] = -gap.sum(1)
                grad_bad += gap.sum(0)
            factor = grad / (len(good) * len(bad))
            return grad_good * factor, grad_bad * factor

    def function(good, bad):
        sized("good", good, None)
        sized("bad", bad, None)
        bounded("good", good, -1e4, 1e4)
        bounded("bad", bad, -1e4, 1e4)
        return Loss.apply(good, bad)

    return function


add(
    "ranking_pairs_rest",
    ranking_pairs,
    lambda: (real(5), real(4, seed=1)),
    bug="The last positives that do not fill a chunk of sixteen get no gradient",
    trigger="more than sixteen positives, no multiple of it",
)


# Angle between spectra, held away from 0 and π
def spectral_angle(wrong):
    edge = 1 - 1e-6

    class Angle(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
            return cosine.clamp(-edge, edge).acos()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, y = ctx.saved_tensors
            norm_x, norm_y = x.norm(dim=-1, keepdim=True), y.norm(dim=-1, keepdim=True)
            x, y = x / norm_x, y / norm_y
            cosine = (x * y).sum(-1, keepdim=True)
            g = -grad_y[..., None] / (1 - cosine**2).sqrt()
            if not wrong:
                g = torch.where(cosine.abs() < edge, g, 0)
            return g * (y - cosine * x) / norm_x, g * (x - cosine * y) / norm_y

    def function(x, y):
        same(x, y)
        check(x.ndim >= 1 and x.shape[-1] >= 1, "x: expected bands last")
        bounded("x", x, -1e4, 1e4)
        bounded("y", y, -1e4, 1e4)
        for t in (x, y):
            check(bool((t.norm(dim=-1) > 1e-4).all()), "expected spectra other than 0")
        return Angle.apply(x, y)

    return function


add(
    "spectral_angle_parallel",
    spectral_angle,
    lambda: (real(4, 3), real(4, 3, seed=1)),
    bug="backward does not know the clamp: the arc cosine's slope at 1 is infinite",
    trigger="a spectrum equal to its target",
)


# Tukey's biweight with c = 4.685, flat outside
def biweight(wrong):
    c = 4.685

    class Biweight(Function):
        @staticmethod
        def forward(ctx, r):
            ctx.save_for_backward(r)
            inside = (1 - (r / c) ** 2).clamp(min=0)
            return c**2 / 6 * (1 - inside**3)

        @staticmethod
        def backward(ctx, grad_y):
            (r,) = ctx.saved_tensors
            inside = 1 - (r / c) ** 2
            if not wrong:
                inside = inside.clamp(min=0)
            return grad_y * r * inside**2

    def function(r):
        bounded("r", r, -1e4, 1e4)
        return Biweight.apply(r)

    return function


add(
    "biweight_outlier",
    biweight,
    lambda: (real(3, 4),),
    bug="The square makes the weight positive again beyond c",
    trigger="a residual beyond 4.685",
)
