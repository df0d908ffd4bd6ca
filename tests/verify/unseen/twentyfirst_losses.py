"""Losses and scores: of labels, of rankings, of ensembles, of representations."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentyfirst import add, check, indices, positive, same, sized


# log p = log sigmoid(s x), s = 2 y - 1, by its tails beyond 20
def bernoulli_logit(wrong):
    class LogMass(Function):
        @staticmethod
        def forward(ctx, x, y):
            same(x, y)
            indices("y", y, 2)
            ctx.save_for_backward(x, y)
            return F.logsigmoid((2 * y - 1) * x)

        @staticmethod
        def backward(ctx, grad_p):
            x, y = ctx.saved_tensors
            s = 2 * y - 1
            slope = s * (-s * x).sigmoid()
            if wrong:
                slope = torch.where(s * x > 20, -(-s * x).clamp_max(0).exp(), slope)
            return grad_p * slope, None

    return lambda x, y: LogMass.apply(x, y)


add(
    "bernoulli_logit_tail",
    bernoulli_logit,
    lambda: (real(4), whole(2, 4)),
    bug="stan math (pull request 3397): beyond 20 the label's sign is forgotten",
    trigger="a label 1 with a logit above 20",
    missed="off by 4e-9 at most, less than differences show",
)


# p(y) = sigmoid(c_y - x) - sigmoid(c_{y-1} - x), with no cut below the first class or above the last
def ordered_logit(wrong):
    def bounds(x, cuts, y):
        end = torch.full_like(cuts[:1], float("inf"))
        c = torch.cat([-end, cuts, end])
        return c[y] - x, c[y + 1] - x

    class LogMass(Function):
        @staticmethod
        def forward(ctx, x, cuts, y):
            low, high = bounds(x, cuts, y)
            ctx.save_for_backward(x, cuts, y)
            gap = torch.log(-torch.expm1(low - high))
            return F.logsigmoid(high) + F.logsigmoid(-low) + gap

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_p):
            x, cuts, y = ctx.saved_tensors
            low, high = bounds(x, cuts, y)
            shared = 1 / torch.expm1(high - low)
            into_high = ((-high).sigmoid() + shared) * grad_p
            into_low = -(low.sigmoid() + shared) * grad_p
            grad_x = -into_high - into_low
            inner = (y > 0) & (y < len(cuts)) if wrong else y > 0
            grad_c = into_high.new_zeros(len(cuts) + 2).index_add(0, y + 1, into_high)
            grad_c = grad_c.index_add(0, y, torch.where(inner, into_low, 0))
            return grad_x, grad_c[1:-1], None

    def log_mass(x, cuts, y):
        sized("x", x, None)
        sized("cuts", cuts, None)
        check(len(cuts) > 1 and bool((cuts.diff() > 0).all()), "expected two or more rising cuts")
        same(x, y)
        indices("y", y, len(cuts) + 1)
        return LogMass.apply(x, cuts, y)

    return log_mass


add(
    "ordered_logit_last",
    ordered_logit,
    lambda: (
        real(5),
        torch.tensor([-1.0, 0.2, 1.3], dtype=torch.float64, requires_grad=True),
        torch.tensor([0, 1, 2, 1, 0]),
    ),
    bug="stan math (issue 1248) had the ordered logistic's derivative wrong; here the lower cut gets"
    " nothing from the last class",
    trigger="a label of the last class",
    missed="a label above all of the sample's is not tried: it may be out of range, which can end the process",
)


# ORPO: log odds of exp(logp), from the log-probabilities of two answers
def odds_ratio(wrong):
    class LogOdds(Function):
        @staticmethod
        def forward(ctx, logp):
            check(bool((logp < 0).all()), "expected negative log-probabilities")
            ctx.save_for_backward(logp)
            return logp - torch.log(-torch.expm1(logp))

        @staticmethod
        def backward(ctx, grad_y):
            (logp,) = ctx.saved_tensors
            return grad_y / (1 - logp.exp() if wrong else -torch.expm1(logp))

    def loss(chosen, rejected):
        same(chosen, rejected)
        return -F.logsigmoid(LogOdds.apply(chosen) - LogOdds.apply(rejected))

    return loss


add(
    "odds_ratio_confident",
    odds_ratio,
    lambda: (
        (-real(4, positive=True)).detach().requires_grad_(),
        (-real(4, seed=1, positive=True)).detach().requires_grad_(),
    ),
    bug="1 - exp(logp) is subtracted where the forward takes expm1",
    trigger="an answer that is almost sure",
    missed="in float64 only for numbers far smaller than a thousandth of the sample's",
)


# CRPS of an ensemble: mean |x_i - y| - sum |x_i - x_j| / (2 m (m - 1) if fair else 2 m m)
def ensemble_score(wrong):
    class Score(Function):
        @staticmethod
        def forward(ctx, x, y, fair):
            ctx.save_for_backward(x, y)
            m = x.shape[1]
            ctx.pairs = m * (m - 1) if fair else m * m
            spread = (x[:, :, None] - x[:, None]).abs().sum((1, 2))
            return (x - y[:, None]).abs().mean(1) - spread / (2 * ctx.pairs)

        @staticmethod
        def backward(ctx, grad_s):
            x, y = ctx.saved_tensors
            m = x.shape[1]
            side = (x - y[:, None]).sign() / m
            among = (x[:, :, None] - x[:, None]).sign().sum(2) / (m * m if wrong else ctx.pairs)
            return (side - among) * grad_s[:, None], -side.sum(1) * grad_s, None

    def score(x, y, fair=False):
        sized("x", x, None, None)
        sized("y", y, len(x))
        check(x.shape[1] > 1 or not fair, "a fair score needs two members")
        return Score.apply(x, y, fair)

    return score


add(
    "ensemble_score_fair",
    ensemble_score,
    lambda: (real(3, 4), real(3, seed=1)),
    bug="Backward divides by the pairs of the score that is not fair",
    trigger="fair=True",
)


# Linear CKA: |x'y|^2 / (|x'x| |y'y|) for centred x and y
def kernel_alignment(wrong):
    def centred(x):
        return x - x.mean(0)

    class Overlap(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return (centred(x).T @ centred(y)).square().sum()

        @staticmethod
        def backward(ctx, grad_s):
            x, y = ctx.saved_tensors
            a, b = (x, y) if wrong else (centred(x), centred(y))
            return 2 * grad_s * b @ (b.T @ a), 2 * grad_s * a @ (a.T @ b)

    def alignment(x, y):
        sized("x", x, None, None)
        sized("y", y, len(x), None)
        cross, xx, yy = Overlap.apply(x, y), Overlap.apply(x, x), Overlap.apply(y, y)
        for a, aa in ((x, xx), (y, yy)):
            check(bool(aa > 1e-6 * a.square().sum() ** 2), "expected features that vary")
        return cross / (xx.sqrt() * yy.sqrt())

    return alignment


def centred_features():
    x, y = real(4, 2).detach(), real(4, 3, seed=1).detach()
    return (x - x.mean(0)).requires_grad_(), (y - y.mean(0)).requires_grad_()


add(
    "kernel_alignment_centre",
    kernel_alignment,
    centred_features,
    bug="Backward takes the features without their means' subtraction",
    trigger="features whose means are not 0",
)


# exp(entropy) of the singular values' shares of their sum
def effective_rank(wrong):
    def rank(x):
        check(x.ndim >= 2 and min(x.shape) >= 1, "expected matrices")
        s = torch.linalg.svdvals(x)
        check(bool((s[..., -1:] > 1e-6 * s[..., :1]).all()), "expected matrices of full rank")
        total = s.sum(-1, keepdim=True)
        p = s / (total.detach() if wrong else total)
        return torch.special.entr(p).sum(-1).exp()

    return rank


add(
    "effective_rank_total",
    effective_rank,
    lambda: (real(4, 3),),
    bug="The singular values' sum is detached",
)


# ApproxNDCG: ranks r_i = 1 + sum_{j != i} sigmoid((s_j - s_i) / t), gains over log2(1 + r)
def approximate_ndcg(wrong):
    class Ranks(Function):
        @staticmethod
        def forward(ctx, s, t):
            ctx.save_for_backward(s)
            ctx.t = t
            return 0.5 + ((s[:, None] - s[:, :, None]) / t).sigmoid().sum(2)

        @staticmethod
        def backward(ctx, grad_r):
            (s,) = ctx.saved_tensors
            p = ((s[:, None] - s[:, :, None]) / ctx.t).sigmoid()
            slope = p * (1 - p) * grad_r[:, :, None] / ctx.t
            grad_s = -slope.sum(2)
            return grad_s if wrong else grad_s + slope.sum(1), None

    def ndcg(s, gain, t=0.5):
        sized("s", s, None, None)
        same(s, gain)
        positive("gain", gain)
        check(t > 0, "expected t > 0")
        check(not gain.requires_grad, "gain: expected data, which needs no gradient")
        ideal = gain.sort(1, descending=True).values
        place = torch.arange(2, s.shape[1] + 2, dtype=s.dtype, device=s.device)
        found = (gain / (1 + Ranks.apply(s, t)).log2()).sum(1)
        return found / (ideal / place.log2()).sum(1)

    return ndcg


add(
    "approximate_ndcg_others",
    approximate_ndcg,
    lambda: (real(2, 4), real(2, 4, seed=1, grad=False, positive=True)),
    bug="A score's gradient comes from its own rank alone, not from those of the others",
)


# SoftSort: y = softmax(-|sorted(s)_i - s_j| / t) s
def soft_sort(wrong):
    def sort(s, t=0.5):
        sized("s", s, None, None)
        check(t > 0, "expected t > 0")
        order = s.argsort(1, descending=True)
        anchors = (s.data if wrong else s).gather(1, order)
        p = (-(anchors[:, :, None] - s[:, None]).abs() / t).softmax(2)
        return (p @ s[:, :, None]).squeeze(2)

    return sort


add(
    "soft_sort_anchors",
    soft_sort,
    lambda: (real(2, 4),),
    bug="The sorted scores, to which all are compared, are taken from .data",
)


# Plackett-Luce: sum_i s_i - log sum_{j >= i} exp(s_j) over the first length scores
def ranking_likelihood(wrong):
    class LogLikelihood(Function):
        @staticmethod
        def forward(ctx, s, lengths):
            inside = torch.arange(s.shape[1], device=s.device) < lengths[:, None]
            shut = s.masked_fill(~inside, float("-inf"))
            tails = shut.flip(1).logcumsumexp(1).flip(1)
            ctx.save_for_backward(s, inside, tails)
            return (s - tails).masked_fill(~inside, 0).sum(1)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_p):
            s, inside, tails = ctx.saved_tensors
            later = torch.ones(s.shape[1:] * 2, dtype=torch.bool, device=s.device).tril()
            seen = later & inside[:, None]
            if not wrong:
                seen = seen & inside[:, :, None]
            gap = torch.where(seen, s[:, :, None] - tails[:, None], float("-inf"))
            return (inside.to(s.dtype) - gap.exp().sum(2)) * grad_p[:, None], None

    def log_likelihood(s, lengths):
        sized("s", s, None, None)
        sized("lengths", lengths, len(s))
        indices("lengths", lengths, s.shape[1] + 1)
        return LogLikelihood.apply(s, lengths)

    return log_likelihood


add(
    "ranking_likelihood_lengths",
    ranking_likelihood,
    lambda: (real(2, 4), torch.tensor([4, 4])),
    bug="Scores past a list's length get the gradient of the shares that they would have",
    trigger="a list shorter than the longest",
)


# The beta divergence of x from y, for y: y^(beta - 2) (y - x) is its derivative
def beta_divergence(wrong):
    class Divergence(Function):
        @staticmethod
        def forward(ctx, y, x, beta):
            ctx.save_for_backward(y, x)
            ctx.beta = beta
            if beta == 1:
                return torch.xlogy(x, x / y) - x + y
            if beta == 0:
                return x / y - (x / y).log() - 1
            return x**beta / (beta * (beta - 1)) + y**beta / beta - x * y ** (beta - 1) / (beta - 1)

        @staticmethod
        def backward(ctx, grad_d):
            y, x = ctx.saved_tensors
            if ctx.beta == 1:
                return grad_d * (-x / y if wrong else 1 - x / y), None, None
            return grad_d * y ** (ctx.beta - 2) * (y - x), None, None

    def divergence(y, x, beta=2):
        same(y, x)
        positive("y", y)
        positive("x", x)
        check(0 <= beta <= 2, "expected a beta from 0 to 2")
        check(not x.requires_grad, "x: expected data, which needs no gradient")
        return Divergence.apply(y, x, beta)

    return divergence


add(
    "beta_divergence_one",
    beta_divergence,
    lambda: (real(3, 2, positive=True), real(3, 2, seed=1, grad=False, positive=True)),
    bug="The branch of the Kullback-Leibler divergence forgets that the model's sum counts",
    trigger="beta=1",
)


# (log v + (x - mean)^2 / v) / 2 with v = max(var, eps)
def gaussian_loss(wrong):
    def loss(x, mean, var, eps=1e-3):
        same(x, mean, var)
        check(eps > 0 and bool((var >= 0).all()), "expected eps > 0 and var >= 0")
        if wrong:
            v = var.clone()
            with torch.no_grad():
                v.clamp_(min=eps)
        else:
            v = var.clamp_min(eps)
        return (v.log() + (x - mean).square() / v) / 2

    return loss


add(
    "gaussian_loss_floor",
    gaussian_loss,
    lambda: (real(4), real(4, seed=1), real(4, seed=2, positive=True)),
    bug="The variance is clamped where nothing is recorded, as torch's own gaussian_nll_loss does",
    trigger="a variance below eps",
)


# Nested logit: V = log sum_nests exp(l I), I = log sum_inside exp(u / l)
def nested_logit(wrong):
    class Value(Function):
        @staticmethod
        def forward(ctx, u, scale):
            ctx.save_for_backward(u, scale)
            return (scale * (u / scale[:, None]).logsumexp(2)).logsumexp(1)

        @staticmethod
        def backward(ctx, grad_v):
            u, scale = ctx.saved_tensors
            inside = (u / scale[:, None]).softmax(2)
            inclusive = (u / scale[:, None]).logsumexp(2)
            nest = (scale * inclusive).softmax(1) * grad_v[:, None]
            grad_u = nest[:, :, None] * inside
            if wrong:
                grad_u = grad_u / scale[:, None]
            mean = (inside * u).sum(2) / scale
            return grad_u, (nest * (inclusive - mean)).sum(0)

    def value(u, scale):
        sized("u", u, None, None, None)
        sized("scale", scale, u.shape[1])
        positive("scale", scale)
        return Value.apply(u, scale)

    return value


add(
    "nested_logit_scale",
    nested_logit,
    lambda: (real(2, 2, 3), torch.ones(2, dtype=torch.float64, requires_grad=True)),
    bug="The utilities are divided by their nest's scale, but the scale in front is forgotten",
    trigger="a scale other than 1",
)
