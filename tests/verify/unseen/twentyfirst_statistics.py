"""Densities, likelihoods and maps between distributions."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentyfirst import add, check, indices, positive, same, sized


# log p = lgamma(A) - lgamma(n + A) + sum lgamma(x + a) - lgamma(a), A = sum a, n = sum x
def dirichlet_multinomial(wrong):
    class LogMass(Function):
        @staticmethod
        def forward(ctx, a, x):
            sized("a", a, None, None)
            same(a, x)
            positive("a", a)
            indices("x", x, 1 << 20)
            ctx.save_for_backward(a, x)
            total = a.sum(1)
            each = ((x + a).lgamma() - a.lgamma()).sum(1)
            return each + total.lgamma() - (x.sum(1) + total).lgamma()

        @staticmethod
        def backward(ctx, grad_p):
            a, x = ctx.saved_tensors
            slope = (x + a).digamma() - a.digamma()
            if not wrong:
                total = a.sum(1, keepdim=True)
                slope = slope + total.digamma() - (x.sum(1, keepdim=True) + total).digamma()
            return slope * grad_p[:, None], None

    return lambda a, x: LogMass.apply(a, x)


add(
    "dirichlet_multinomial_total",
    dirichlet_multinomial,
    lambda: (real(2, 3, positive=True), whole(5, 2, 3)),
    bug="The total of the concentrations is differentiated as a constant",
)


# log density of a normal variable known to lie between a and b
def truncated_normal(wrong):
    def log_mass(a, b):
        """Return log(Phi(b) - Phi(a)) in the tail where it keeps its digits."""
        right = a > 0
        low, high = torch.where(right, -b, a), torch.where(right, -a, b)
        top, rest = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
        return top + torch.log(-torch.expm1(rest - top))

    def log_density(z):
        return -z.square() / 2 - math.log(2 * math.pi) / 2

    class LogMass(Function):
        @staticmethod
        def forward(ctx, a, b):
            m = log_mass(a, b)
            ctx.save_for_backward(a, b, m)
            return m

        @staticmethod
        def backward(ctx, grad_m):
            a, b, m = ctx.saved_tensors
            if wrong:
                mass = torch.special.ndtr(b) - torch.special.ndtr(a)
                return -log_density(a).exp() / mass * grad_m, log_density(b).exp() / mass * grad_m
            return -(log_density(a) - m).exp() * grad_m, (log_density(b) - m).exp() * grad_m

    def density(x, mean, scale, low=0.0, high=1.0):
        same(x, mean, scale)
        positive("scale", scale)
        check(-math.inf < low < high < math.inf, "expected low < high, both finite")
        check(bool(((x >= low) & (x <= high)).all()), "x: expected values between the bounds")
        check(bool((scale <= 10 * (high - low)).all()), "scale: too wide for the bounds")
        a, b = (low - mean) / scale, (high - mean) / scale
        check(bool(((a < 12) & (b > -12)).all()), "mean: more than 12 deviations outside")
        return log_density((x - mean) / scale) - scale.log() - LogMass.apply(a, b)

    return density


def truncated_inputs():
    x = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    return x, real(3), real(3, seed=1, positive=True).detach().add(0.5).requires_grad_()


add(
    "truncated_normal_tail",
    truncated_normal,
    truncated_inputs,
    bug="Backward divides by a difference of two distribution functions, both 1 in the tail",
    trigger="bounds more than 9 deviations above the mean",
)


# Kumaraswamy: log a + log b + (a - 1) log x + (b - 1) log(1 - x^a)
def kumaraswamy(wrong):
    class LogDensity(Function):
        @staticmethod
        def forward(ctx, x, a, b):
            same(x, a, b)
            positive("a", a)
            positive("b", b)
            check(bool(((x > 0) & (x < 1)).all()), "x: expected values between 0 and 1")
            ctx.save_for_backward(x, a, b)
            rest = torch.log(-torch.expm1(a * x.log()))
            return a.log() + b.log() + (a - 1) * x.log() + (b - 1) * rest

        @staticmethod
        def backward(ctx, grad_p):
            x, a, b = ctx.saved_tensors
            lx = x.log()
            odds = 1 / torch.expm1(-a * lx)
            grad_x = ((a - 1) - (b - 1) * a * odds) / x
            grad_a = 1 / a + lx
            if not wrong:
                grad_a = grad_a - (b - 1) * odds * lx
            grad_b = 1 / b + torch.log(-torch.expm1(a * lx))
            return grad_x * grad_p, grad_a * grad_p, grad_b * grad_p

    return lambda x, a, b: LogDensity.apply(x, a, b)


def fractions(*shape, seed=0):
    return real(*shape, seed=seed).detach().sigmoid().requires_grad_()


add(
    "kumaraswamy_shape",
    kumaraswamy,
    lambda: (
        fractions(4),
        real(4, seed=1, positive=True),
        torch.ones(4, dtype=torch.float64, requires_grad=True),
    ),
    bug="The first shape's gradient leaves out the power inside the last logarithm",
    trigger="a second shape other than 1",
)


# Clayton's copula: log(1 + t) - (1 + t)(log u + log v) - (2 + 1/t) log s, s = u^-t + v^-t - 1
def clayton(wrong):
    class LogDensity(Function):
        @staticmethod
        def forward(ctx, u, v, t):
            ctx.save_for_backward(u, v, t)
            s = torch.exp(-t * u.log()) + torch.expm1(-t * v.log())
            return torch.log1p(t) - (1 + t) * (u.log() + v.log()) - (2 + 1 / t) * s.log()

        @staticmethod
        def backward(ctx, grad_p):
            u, v, t = ctx.saved_tensors
            lu, lv = u.log(), v.log()
            pu, pv = torch.exp(-t * lu), torch.exp(-t * lv)
            s = pu + torch.expm1(-t * lv)
            order = 2 + 1 / t
            grad_u = (order * t * pu / s - 1 - t) / u
            grad_v = (order * t * pv / s - 1 - t) / v
            grad_t = 1 / (1 + t) - lu - lv + order * (pu * lu + pv * lv) / s
            if not wrong:
                grad_t = grad_t + s.log() / t**2
            return grad_u * grad_p, grad_v * grad_p, grad_t * grad_p

    def log_density(u, v, t):
        same(u, v, t)
        for name, a in (("u", u), ("v", v)):
            check(bool(((a > 0) & (a < 1)).all()), f"{name}: expected values between 0 and 1")
        check(bool(((t > 0.05) & (t < 20)).all()), "t: expected values between 0.05 and 20")
        check(bool((-t * torch.minimum(u, v).log() < 80).all()), "u, v: too close to 0")
        return LogDensity.apply(u, v, t)

    return log_density


add(
    "clayton_dependence",
    clayton,
    lambda: (fractions(3), fractions(3, seed=1), real(3, seed=2, positive=True)),
    bug="The exponent 1/t is differentiated as a constant",
)


# Affine coupling: y = x exp(s) + shift and log |dy/dx| = sum s, s = clamp(raw, -bound, bound)
def coupling(wrong):
    class Coupling(Function):
        @staticmethod
        def forward(ctx, x, raw, shift, bound):
            s = raw.clamp(-bound, bound)
            ctx.save_for_backward(x, raw)
            ctx.bound = bound
            return x * s.exp() + shift, s.sum(1)

        @staticmethod
        def backward(ctx, grad_y, grad_d):
            x, raw = ctx.saved_tensors
            scale = raw.clamp(-ctx.bound, ctx.bound).exp()
            grad_s = grad_y * x * scale
            free = raw.abs() <= ctx.bound
            into_d = grad_d[:, None] * (1 if wrong else free)
            return grad_y * scale, grad_s * free + into_d, grad_y, None

    def couple(x, raw, shift, bound=3.0):
        sized("x", x, None, None)
        same(x, raw, shift)
        check(0 < bound < 50, "expected a bound from 0 to 50")
        return Coupling.apply(x, raw, shift, bound)

    return couple


add(
    "coupling_clamp",
    coupling,
    lambda: (real(3, 2), real(3, 2, seed=1), real(3, 2, seed=2)),
    bug="The clamp stops the gradient of the value, not that of the log-determinant",
    trigger="a log-scale beyond the bound",
)


# NeRF: places where the piecewise linear distribution function of the weights reaches u
def inverse_transform(wrong):
    def places(w, edges, u):
        sized("w", w, None, None)
        sized("edges", edges, len(w), w.shape[1] + 1)
        sized("u", u, len(w), None)
        positive("w", w)
        check(bool(((u > 0) & (u < 1)).all()), "u: expected values between 0 and 1")
        p = w / w.sum(1, keepdim=True)
        start = F.pad(p.cumsum(1), (1, 0))[:, :-1]
        bin_of = (u[:, :, None] >= start[:, None]).sum(2) - 1
        if wrong:
            start = start.detach()
        inside = (u - start.gather(1, bin_of)) / p.gather(1, bin_of)
        left, right = edges.gather(1, bin_of), edges.gather(1, bin_of + 1)
        return left + inside * (right - left)

    return places


add(
    "inverse_transform_start",
    inverse_transform,
    lambda: (
        real(2, 4, positive=True),
        real(2, 5, seed=1).detach().cumsum(1).requires_grad_(),
        fractions(2, 3, seed=2).detach().requires_grad_(),
    ),
    bug="Where a bin starts is taken from a distribution function that is only searched",
)


# PixelCNN++: the mass of a bin under a logistic distribution, the bins at -1 and 1 open outwards
def discretised_logistic(wrong):
    def bounds(x, mean, log_scale, bins):
        half = 1 / (bins - 1)
        rate = torch.exp(-log_scale)
        return (x - half - mean) * rate, (x + half - mean) * rate

    class LogMass(Function):
        @staticmethod
        def forward(ctx, x, mean, log_scale, bins):
            low, high = bounds(x, mean, log_scale, bins)
            ctx.save_for_backward(x, mean, log_scale)
            ctx.bins = bins
            y = F.logsigmoid(high) + F.logsigmoid(-low) + torch.log(-torch.expm1(low - high))
            y = torch.where(x == -1, F.logsigmoid(high), y)
            return torch.where(x == 1, F.logsigmoid(-low), y)

        @staticmethod
        def backward(ctx, grad_y):
            x, mean, log_scale = ctx.saved_tensors
            low, high = bounds(x, mean, log_scale, ctx.bins)
            shared = 1 / torch.expm1(high - low)
            top, bottom = x == 1, x == -1
            into_high = (-high).sigmoid() + torch.where(bottom, 0, shared)
            into_low = -low.sigmoid() - torch.where(top, 0, shared)
            into_low = torch.where(bottom, 0, into_low)
            into_high = torch.where(top, (-high).sigmoid() if wrong else 0, into_high)
            into = into_high * grad_y, into_low * grad_y
            grad_mean = -(into[0] + into[1]) * torch.exp(-log_scale)
            return None, grad_mean, -(into[0] * high + into[1] * low), None

    def log_mass(x, mean, log_scale, bins=9):
        same(x, mean, log_scale)
        check(bins >= 2, "expected two bins or more")
        check(bool((x.abs() <= 1).all()), "x: expected values from -1 to 1")
        check(bool((log_scale.abs() < 7).all()), "log_scale: expected values from -7 to 7")
        check(not x.requires_grad, "x: expected data, which needs no gradient")
        return LogMass.apply(x, mean, log_scale, bins)

    return log_mass


add(
    "discretised_logistic_top",
    discretised_logistic,
    lambda: (
        torch.tensor([-1.0, -0.5, 0.25, 0.75], dtype=torch.float64),
        real(4),
        real(4, seed=1),
    ),
    bug="At the upper edge the bin's upper bound still gets a gradient",
    trigger="a value of 1",
)


# Cox's partial likelihood with Efron's ties: sum s_i - sum_l log(R - l / d D) over each time's d events
def efron(wrong):
    class LogLikelihood(Function):
        @staticmethod
        def forward(ctx, s, time, event):
            ctx.save_for_backward(s, time, event)
            top = s.max()
            w = (s - top).exp()
            total = s[event].sum()
            for t in time[event].unique():
                tied = event & (time == t)
                d = int(tied.sum())
                fall = torch.arange(d, dtype=s.dtype, device=s.device) / d
                parts = w[time >= t].sum() - fall * w[tied].sum()
                total = total - parts.log().sum() - d * top
            return total

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_p):
            s, time, event = ctx.saved_tensors
            w = (s - s.max()).exp()
            grad_s = event.to(s.dtype)
            for t in time[event].unique():
                tied, risk = event & (time == t), time >= t
                d = int(tied.sum())
                fall = torch.arange(d, dtype=s.dtype, device=s.device) / d
                r = 1 / (w[risk].sum() - fall * w[tied].sum())
                grad_s = grad_s - r.sum() * w * risk
                if not wrong:
                    grad_s = grad_s + (fall * r).sum() * w * tied
            return grad_s * grad_p, None, None

    def log_likelihood(s, time, event):
        sized("s", s, None)
        same(s, time, event)
        if event.dtype != torch.bool:
            raise TypeError("event: expected booleans")
        check(
            bool(s.isfinite().all()) and bool(s.max() - s.min() < 80),
            "s: too far apart",
        )
        check(not time.requires_grad, "time: expected data, which needs no gradient")
        return LogLikelihood.apply(s, time, event)

    return log_likelihood


add(
    "efron_ties",
    efron,
    lambda: (
        real(5),
        torch.tensor([3, 1, 4, 2, 5]),
        torch.tensor([True, True, False, True, True]),
    ),
    bug="Tied events are differentiated by Breslow's rule",
    trigger="two events at one time",
)


# Weibull: events count log k/c + (k - 1) log(t/c), all of them -(t/c)^k
def weibull(wrong):
    class LogLikelihood(Function):
        @staticmethod
        def forward(ctx, t, k, c, event):
            ctx.save_for_backward(t, k, c, event)
            z = (t / c).log()
            hazard = k.log() - c.log() + (k - 1) * z
            return torch.where(event, hazard, 0) - (k * z).exp()

        @staticmethod
        def backward(ctx, grad_p):
            t, k, c, event = ctx.saved_tensors
            z = (t / c).log()
            power = (k * z).exp()
            seen = event.to(t.dtype)
            grad_t = (seen * (k - 1) - k * power) / t
            grad_k = (1 if wrong else seen) / k + seen * z - power * z
            grad_c = (k * power - seen * k) / c
            return grad_t * grad_p, grad_k * grad_p, grad_c * grad_p, None

    def log_likelihood(t, k, c, event):
        same(t, k, c, event)
        for name, a in (("t", t), ("k", k), ("c", c)):
            positive(name, a)
        if event.dtype != torch.bool:
            raise TypeError("event: expected booleans")
        check(bool((k * (t / c).log() < 80).all()), "t: too late for the scale")
        return LogLikelihood.apply(t, k, c, event)

    return log_likelihood


add(
    "weibull_censored",
    weibull,
    lambda: (
        real(4, positive=True),
        real(4, seed=1, positive=True),
        (real(4, seed=2, positive=True).detach() + 1).requires_grad_(),
        torch.ones(4, dtype=torch.bool),
    ),
    bug="The shape's 1/k is counted for the censored as well",
    trigger="a censored observation",
)


# Mutual information of a joint histogram h, normalised inside
def mutual_information(wrong):
    class Information(Function):
        @staticmethod
        def forward(ctx, h):
            sized("h", h, None, None)
            positive("h", h)
            total = h.sum()
            log_ratio = (h * total / (h.sum(1, keepdim=True) * h.sum(0))).log()
            y = (h * log_ratio).sum() / total
            ctx.save_for_backward(h, y)
            return y

        @staticmethod
        def backward(ctx, grad_y):
            h, y = ctx.saved_tensors
            total = h.sum()
            log_ratio = (h * total / (h.sum(1, keepdim=True) * h.sum(0))).log()
            return grad_y * (log_ratio if wrong else log_ratio - y) / total

    return lambda h: Information.apply(h)


add(
    "mutual_information_total",
    mutual_information,
    lambda: (real(3, 4, positive=True),),
    bug="The histogram's total is differentiated as a constant",
)
