"""Log densities and what statistics takes the gradient of."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real, whole
from tests.verify.unseen.fourteenth import add, require


class NegBinomial(Function):
    @staticmethod
    def rising(n, alpha):
        """The sums of log(α + i), and of 1 / (α + i), for the i below n."""
        i = torch.arange(int(n.max()) if n.numel() else 0, dtype=alpha.dtype, device=n.device)
        terms, below = alpha.unsqueeze(-1) + i, i < n.unsqueeze(-1)
        return (terms.log() * below).sum(-1), (below / terms).sum(-1)

    @staticmethod
    def forward(ctx, n, alpha, beta):
        ctx.save_for_backward(n, alpha, beta)
        rising = NegBinomial.rising(n, alpha)[0] - torch.lgamma(n + 1.0).to(alpha.dtype)
        return rising - alpha * (1 / beta).log1p() - n * beta.log1p()

    @staticmethod
    def gradients(ctx):
        n, alpha, beta = ctx.saved_tensors
        slope = NegBinomial.rising(n, alpha)[1] - (1 / beta).log1p()
        return slope, alpha / (beta * (1 + beta)) - n / (1 + beta)

    @staticmethod
    def backward(ctx, g):
        grad_alpha, grad_beta = NegBinomial.gradients(ctx)
        return None, g * grad_alpha, g * grad_beta


class NegBinomialPoisson(NegBinomial):
    @staticmethod
    def backward(ctx, g):
        n, alpha, beta = ctx.saved_tensors
        grad_alpha, grad_beta = NegBinomial.gradients(ctx)
        far = alpha > 1e10
        grad_alpha = torch.where(far, n / alpha - 1 / beta, grad_alpha)
        grad_beta = torch.where(far, alpha / beta**2 - n / beta, grad_beta)
        return None, g * grad_alpha, g * grad_beta


def _neg_binomial(function):
    def neg_binomial(n, alpha, beta):
        """Log mass of the counts n (N,), integers of 0 to 1000, with alpha and beta (N,) in [0.01, 1e15].

        (n + α - 1 over n) (β / (1 + β))^α (1 / (1 + β))^n
        """
        require(bool(((n >= 0) & (n <= 1000)).all()), "n must be in [0, 1000]")
        for a in (alpha, beta):
            require(
                a.shape == n.shape and bool(((a >= 0.01) & (a <= 1e15)).all()),
                "alpha, beta in [0.01, 1e15], as n",
            )
        return function.apply(n, alpha, beta)

    return neg_binomial


add(
    "neg_binomial_limit",
    _neg_binomial,
    NegBinomialPoisson,
    NegBinomial,
    lambda: (whole(6, 4), real(4, positive=True), real(4, seed=1, positive=True)),
    bug="beyond alpha = 1e10 the derivatives are those of the Poisson limit (stan-dev/math#1578)",
    trigger="an alpha above 1e10",
)


class LogSumExp(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return torch.logaddexp(x, y)

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * (x - y).sigmoid(), g * (y - x).sigmoid()


class LogSumExpOutput(LogSumExp):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        out = torch.logaddexp(x, y)
        return g * (x - out).exp(), g * (y - out).exp()


def _log_sum_exp(function):
    def log_sum_exp(x, y):
        """log(eˣ + eʸ) of finite x and y of one shape."""
        require(
            x.shape == y.shape and bool((x.isfinite() & y.isfinite()).all()),
            "x, y must be finite, of one shape",
        )
        return function.apply(x, y)

    return log_sum_exp


add(
    "log_sum_exp_large",
    _log_sum_exp,
    LogSumExpOutput,
    LogSumExp,
    lambda: (real(5), real(5, seed=1)),
    bug="exp(x - out), where out has swallowed what log 2 adds (stan-dev/math#1679)",
    trigger="close large arguments (1e10, in float32 1e6)",
    missed="float64 at 1e10 knows no difference of 1: a tie and a kink look alike",
)


class Wiener(Function):
    """The density's series in q = 1 - w, one for short times and one for long ones."""

    @staticmethod
    def parts(t, q):
        """The log density, its derivative by q and by t; and where the series for long times holds."""
        t, q = t.unsqueeze(-1), q.unsqueeze(-1)
        k = torch.arange(1, 13, dtype=t.dtype, device=t.device)
        decay, angle = (-(k**2) * math.pi**2 * t / 2).exp(), k * math.pi * q
        long = (k * angle.sin() * decay).sum(-1)
        long_q = (k**2 * math.pi * angle.cos() * decay).sum(-1) / long
        long_t = -(k**3 * math.pi**2 / 2 * angle.sin() * decay).sum(-1) / long
        u = q + 2 * torch.arange(-5, 6, dtype=t.dtype, device=t.device)
        bell = (-(u**2) / (2 * t)).exp()
        short = (u * bell).sum(-1)
        short_q = ((1 - u**2 / t) * bell).sum(-1) / short
        t = t.squeeze(-1)
        short_t = (u**3 * bell).sum(-1) / short / (2 * t**2) - 1.5 / t
        after = t >= 0.5
        value = torch.where(
            after, (math.pi * long).log(), short.log() - 1.5 * t.log() - math.log(2 * math.pi) / 2
        )
        return (
            value,
            torch.where(after, long_q, short_q),
            torch.where(after, long_t, short_t),
            after,
        )

    @staticmethod
    def forward(ctx, t, w):
        ctx.save_for_backward(t, w)
        return Wiener.parts(t, 1 - w)[0]

    @staticmethod
    def backward(ctx, g):
        t, w = ctx.saved_tensors
        _, by_q, by_t, _ = Wiener.parts(t, 1 - w)
        return g * by_t, -g * by_q


class WienerBranch(Wiener):
    @staticmethod
    def backward(ctx, g):
        t, w = ctx.saved_tensors
        _, by_q, by_t, after = Wiener.parts(t, 1 - w)
        return g * by_t, g * torch.where(after, by_q, -by_q)


def _wiener(function):
    def wiener(t, w):
        """Log density of the time t in [0.1, 5] at which a Wiener process leaves [0, 1] above.

        It starts at w in [0.1, 0.9], of t's shape.
        """
        require(t.shape == w.shape, "w must be of t's shape")
        require(
            bool(((t >= 0.1) & (t <= 5) & (w >= 0.1) & (w <= 0.9)).all()),
            "t in [0.1, 5], w in [0.1, 0.9]",
        )
        return function.apply(t, w)

    return wiener


add(
    "wiener_start",
    _wiener,
    WienerBranch,
    Wiener,
    lambda: (
        torch.tensor([0.2, 0.35, 0.6, 1.1], dtype=F64, requires_grad=True),
        torch.tensor([0.3, 0.5, 0.45, 0.7], dtype=F64, requires_grad=True),
    ),
    bug="the branch for long times leaves out the sign of d(1 - w) / dw (stan-dev/math#3322)",
    trigger="the sample's long times",
)


class NegBinomialCdf(Function):
    @staticmethod
    def parts(n, alpha, beta):
        """The log of the sum over counts up to n; each count's share of it (N, K), and its slope by α."""
        k = torch.arange(int(n.max()) + 1, dtype=alpha.dtype, device=n.device)
        alpha, beta = alpha.unsqueeze(-1), beta.unsqueeze(-1)
        odds = (1 / beta).log1p()
        steps, slopes = (alpha + k).log() - (k + 1).log(), 1 / (alpha + k)
        mass = steps.cumsum(-1) - steps - alpha * odds - k * beta.log1p()
        mass = mass.masked_fill(k > n.unsqueeze(-1), -math.inf)
        total = mass.logsumexp(-1)
        return total, (mass - total.unsqueeze(-1)).exp(), slopes.cumsum(-1) - slopes - odds

    @staticmethod
    def forward(ctx, n, alpha, beta):
        ctx.save_for_backward(n, alpha, beta)
        return NegBinomialCdf.parts(n, alpha, beta)[0].sum()

    @staticmethod
    def gradients(ctx, g, share_alpha):
        n, alpha, beta = ctx.saved_tensors
        _, share, slope = NegBinomialCdf.parts(n, alpha, beta)
        k = torch.arange(share.shape[-1], dtype=alpha.dtype, device=n.device)
        a, b = alpha.unsqueeze(-1), beta.unsqueeze(-1)
        by_alpha = (share_alpha(share) * slope).sum(-1)
        by_beta = (share * (a / (b * (1 + b)) - k / (1 + b))).sum(-1)
        return None, g * by_alpha.sum_to_size(alpha.shape), g * by_beta.sum_to_size(beta.shape)

    @staticmethod
    def backward(ctx, g):
        return NegBinomialCdf.gradients(ctx, g, lambda share: share)


class NegBinomialCdfFirst(NegBinomialCdf):
    @staticmethod
    def backward(ctx, g):
        one = ctx.saved_tensors[1].numel() == 1
        return NegBinomialCdf.gradients(
            ctx, g, lambda share: share[:1].expand_as(share) if one else share
        )


def _neg_binomial_cdf(function):
    def neg_binomial_cdf(n, alpha, beta):
        """Sum of the log probabilities of counts of at most n (N,), N > 0, integers of 0 to 1000.

        alpha and beta, in [0.01, 1e4], are (N,) or (1,).
        """
        require(
            n.numel() > 0 and bool(((n >= 0) & (n <= 1000)).all()),
            "n must be in [0, 1000], and not empty",
        )
        for a in (alpha, beta):
            good = a.shape in (n.shape, (1,)) and bool(((a >= 0.01) & (a <= 1e4)).all())
            require(good, "alpha and beta must be of n's shape or (1,), in [0.01, 1e4]")
        return function.apply(n, alpha, beta)

    return neg_binomial_cdf


add(
    "neg_binomial_cdf_first",
    _neg_binomial_cdf,
    NegBinomialCdfFirst,
    NegBinomialCdf,
    lambda: (whole(6, 4), real(1, positive=True), real(1, seed=1, positive=True)),
    bug="with one alpha for all only the first count is looked at (stan-dev/math#1662)",
    trigger="one alpha for counts that differ, as the sample's",
)
