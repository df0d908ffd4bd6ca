"""Eleventh set: signals, physics, probability, manifolds, second derivatives.

As mended since: `neg_binomial_nll` was NaN at mu = x = 0.
"""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen.eleventh import add, leaf, need_dim, rand, randn


# first-order IIR filter
class LFilter(Function):
    """a[0] y[t] = b[0] x[t] + b[1] x[t-1] - a[1] y[t-1] along the last dim."""

    @staticmethod
    def forward(ctx, x, a, b):
        b0, b1, a1 = b[0] / a[0], b[1] / a[0], a[1] / a[0]
        y = torch.empty_like(x)
        for t in range(x.shape[-1]):
            y[..., t] = b0 * x[..., t]
            if t:
                y[..., t] += b1 * x[..., t - 1] - a1 * y[..., t - 1]
        ctx.save_for_backward(x, a, b, y)
        return y

    @staticmethod
    def _bwd(ctx, g):
        x, a, b, y = ctx.saved_tensors
        b0, b1, a1 = b[0] / a[0], b[1] / a[0], a[1] / a[0]
        e, dx, nxt = torch.empty_like(g), torch.empty_like(g), torch.zeros_like(g[..., 0])
        for t in range(g.shape[-1] - 1, -1, -1):
            e[..., t] = g[..., t] - a1 * nxt
            dx[..., t] = b0 * e[..., t] + b1 * nxt
            nxt = e[..., t]
        xp, yp = (torch.nn.functional.pad(v[..., :-1], (1, 0)) for v in (x, y))
        da = -torch.stack([(e * y).sum(), (e * yp).sum()])
        return dx, da, torch.stack([(e * x).sum(), (e * xp).sum()])

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx, da, db = LFilter._bwd(ctx, g)
        a0 = ctx.saved_tensors[1][0]
        return dx, da / a0, db / a0


class LFilterBad(LFilter):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return LFilter._bwd(ctx, g)


add(
    "lfilter_a0_11",
    lambda x, a, b: LFilterBad.apply(x, a, b),
    lambda x, a, b: LFilter.apply(x, a, b),
    lambda: (randn(2, 6, seed=401), leaf([1.0, -0.6]), leaf([0.7, 0.3])),
    "Coefficients are normalised by a[0] in forward; their gradients are those of the "
    "normalised ones, not divided by a[0]; right for a[0]=1, wrong for unnormalised biquads "
    "such as a[0]=2.",
    "own",
)


# inverse real FFT
class IRFFT(Function):
    @staticmethod
    def forward(ctx, re, im, n):
        if re.shape[-1] != n // 2 + 1:
            raise ValueError("need n//2+1 bins")
        ctx.n = n
        return torch.fft.irfft(torch.complex(re, im), n)

    @staticmethod
    def backward(ctx, g):
        s = torch.fft.rfft(g, ctx.n) / ctx.n
        w = torch.full((s.shape[-1],), 2.0, dtype=g.dtype)
        w[0] = 1
        if ctx.n % 2 == 0:
            w[-1] = 1
        return s.real * w, s.imag * w, None


class IRFFTBad(IRFFT):
    @staticmethod
    def backward(ctx, g):
        s = torch.fft.rfft(g, ctx.n) / ctx.n
        w = torch.full((s.shape[-1],), 2.0, dtype=g.dtype)
        w[0] = w[-1] = 1
        return s.real * w, s.imag * w, None


add(
    "irfft_odd_11",
    lambda re, im, n: IRFFTBad.apply(re, im, n),
    lambda re, im, n: IRFFT.apply(re, im, n),
    lambda: (randn(2, 5, seed=402), randn(2, 5, seed=403), 8),
    "The last frequency is always weighted as the Nyquist bin; right for even n, half of the "
    "true gradient in that bin for odd n (n=7 with 4 bins).",
    "https://github.com/ooples/AiDotNet.Tensors/pull/911",
)


# complex linear layer in two real parts
class ComplexLinear(Function):
    @staticmethod
    def forward(ctx, xr, xi, wr, wi):
        need_dim(xr, 2)
        ctx.save_for_backward(xr, xi, wr, wi)
        return xr @ wr - xi @ wi, xr @ wi + xi @ wr

    @staticmethod
    def backward(ctx, gr, gi):
        xr, xi, wr, wi = ctx.saved_tensors
        return (
            gr @ wr.t() + gi @ wi.t(),
            gi @ wr.t() - gr @ wi.t(),
            xr.t() @ gr + xi.t() @ gi,
            xr.t() @ gi - xi.t() @ gr,
        )


class ComplexLinearBad(ComplexLinear):
    @staticmethod
    def backward(ctx, gr, gi):
        xr, xi, wr, wi = ctx.saved_tensors
        return (
            gr @ wr.t() + gi @ wi.t(),
            gi @ wr.t() - gr @ wi.t(),
            xr.t() @ gr - xi.t() @ gi,
            xr.t() @ gi + xi.t() @ gr,
        )


add(
    "complex_linear_11",
    lambda *a: ComplexLinearBad.apply(*a),
    lambda *a: ComplexLinear.apply(*a),
    lambda: (
        randn(3, 2, seed=404),
        randn(3, 2, seed=405),
        randn(2, 4, seed=406),
        randn(2, 4, seed=407),
    ),
    "The weight's gradient uses x^T instead of its conjugate transpose; shows at the sample, "
    "right only for real inputs.",
    "https://github.com/tensorflow/tensorflow/issues/4859",
)


# log of the normal cdf
_L2PI = 0.5 * math.log(2 * math.pi)


class LogNdtr(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.special.log_ndtr(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        low = x < -1  # sqrt(2/pi)/erfcx there, pdf/cdf elsewhere
        xl, xh = torch.where(low, x, -1.0), torch.where(low, 0.0, x)
        tail = math.sqrt(2 / math.pi) / torch.special.erfcx(-xl / math.sqrt(2))
        body = torch.exp(-xh * xh / 2 - _L2PI) / torch.special.ndtr(xh)
        return g * torch.where(low, tail, body)


class LogNdtrBad(LogNdtr):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        cdf = (0.5 * torch.erfc(-x / math.sqrt(2))).clamp_min(torch.finfo(x.dtype).tiny)
        return g * torch.exp(-x * x / 2 - _L2PI) / cdf


add(
    "log_ndtr_11",
    lambda x: LogNdtrBad.apply(x),
    lambda x: LogNdtr.apply(x),
    lambda: (randn(6, seed=408, scale=2.0),),
    "Backward is pdf/cdf with the cdf clamped; both underflow in the lower tail, where the "
    "gradient (about |x|) becomes 0: x=-40 in float64, x=-15 in float32.",
    "https://github.com/chainer/chainer/pull/6340",
)


# negative binomial
class NegBinNLL(Function):
    """counts x (N,G), mean mu (N,G), inverse dispersion theta (G,)."""

    @staticmethod
    def forward(ctx, mu, theta, x):
        need_dim(mu, 2)
        ctx.save_for_backward(mu, theta, x)
        s = theta + mu
        return -(
            torch.lgamma(x + theta)
            - torch.lgamma(theta)
            - torch.lgamma(x + 1)
            + theta * torch.log(theta / s)
            + torch.xlogy(x, mu / s)
        )

    @staticmethod
    def backward(ctx, g):
        mu, theta, x = ctx.saved_tensors
        s = theta + mu
        dm = (theta + x) / s - torch.where(x == 0, 0.0, x / mu)
        dt = -(
            torch.digamma(x + theta)
            - torch.digamma(theta)
            + torch.log(theta / s)
            + 1
            - (theta + x) / s
        )
        return g * dm, (g * dt).sum(0), None


class NegBinNLLBad(NegBinNLL):
    @staticmethod
    def backward(ctx, g):
        mu, theta, x = ctx.saved_tensors
        s = theta + mu
        dm = (theta + x) / s - torch.where(x == 0, 0.0, x / mu)
        dt = -(torch.digamma(x + theta) - torch.digamma(theta) + torch.log(theta / s))
        return g * dm, (g * dt).sum(0), None


add(
    "neg_binomial_nll_11",
    lambda *a: NegBinNLLBad.apply(*a),
    lambda *a: NegBinNLL.apply(*a),
    lambda: (
        rand(3, 2, seed=409, lo=0.5, hi=4.0),
        rand(2, seed=410, lo=0.5, hi=3.0),
        torch.tensor([[0.0, 3.0], [2.0, 1.0], [5.0, 0.0]], dtype=torch.float64),
    ),
    "The dispersion's gradient lacks 1-(x+theta)/(mu+theta), from theta inside the "
    "logarithms; zero only where count equals mean, shows at the sample.",
    "own",
)


# Poincare distance
class Poincare(Function):
    @staticmethod
    def _parts(u, v):
        a, b = 1 - (u * u).sum(-1, keepdim=True), 1 - (v * v).sum(-1, keepdim=True)
        d2 = (u - v).square().sum(-1, keepdim=True)
        return a, b, d2, 2 * d2 / (a * b)  # cosh(distance) - 1

    @staticmethod
    def forward(ctx, u, v):
        ctx.save_for_backward(u, v)
        c = Poincare._parts(u, v)[3]
        return torch.log1p(c + (c * (c + 2)).sqrt())[..., 0]

    @staticmethod
    def _factor(g, a, b, c):
        s = c * (c + 2)
        same = s <= 0  # coinciding points: 0 is a subgradient
        return torch.where(same, 0.0, g[..., None] / torch.where(same, 1.0, s).sqrt() * 4 / (a * b))

    @staticmethod
    def backward(ctx, g):
        u, v = ctx.saved_tensors
        a, b, d2, c = Poincare._parts(u, v)
        k = Poincare._factor(g, a, b, c)
        return k * (u - v + u * d2 / a), k * (v - u + v * d2 / b)


class PoincareBad(Poincare):
    @staticmethod
    def backward(ctx, g):
        u, v = ctx.saved_tensors
        a, b, d2, c = Poincare._parts(u, v)
        k = Poincare._factor(g, a, b, c)
        du = k * (u - v + u * d2 / a)
        return du, -du


add(
    "poincare_distance_11",
    lambda u, v: PoincareBad.apply(u, v),
    lambda u, v: Poincare.apply(u, v),
    lambda: (rand(3, 2, seed=411, lo=-0.5, hi=0.5), rand(3, 2, seed=412, lo=-0.5, hi=0.5)),
    "The second point's gradient is minus the first's, as if the distance depended on u-v "
    "alone (its conformal factor is forgotten); shows at the sample.",
    "own",
)


# log with a hand-written second derivative
class LogGrad(Function):
    @staticmethod
    def forward(ctx, g, x):
        ctx.save_for_backward(g, x)
        return g / x

    @staticmethod
    def backward(ctx, gg):
        g, x = ctx.saved_tensors
        return gg / x, -gg * g / (x * x)


class LogGradBad(LogGrad):
    @staticmethod
    def backward(ctx, gg):
        g, x = ctx.saved_tensors
        gx = g / x
        return gg / x, -gg * gx * gx


class Log(Function):
    GRAD = LogGrad

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.log()

    @staticmethod
    def backward(ctx, g):
        return LogGrad.apply(g, *ctx.saved_tensors)


class LogBad(Log):
    @staticmethod
    def backward(ctx, g):
        return LogGradBad.apply(g, *ctx.saved_tensors)


add(
    "log_second_11",
    lambda x: LogBad.apply(x),
    lambda x: Log.apply(x),
    lambda: (rand(5, seed=413, lo=0.3, hi=3.0),),
    "The second derivative is built from (g/x)^2 instead of g/x^2, quadratic in the incoming "
    "gradient; right for grad_output 1, wrong for a second derivative under any other "
    "(g=0.5).",
    "https://github.com/apache/mxnet/pull/15120",
)


# diffusion with variable coefficient
def _lap(u):
    p = torch.nn.functional.pad(u, (1, 1))
    return p[..., :-2] - 2 * u + p[..., 2:]


class VarDiffusion(Function):
    """c * u_xx on a grid with zero boundary values."""

    @staticmethod
    def forward(ctx, u, c):
        need_dim(u, 1)
        ctx.save_for_backward(u, c)
        return c * _lap(u)

    @staticmethod
    def backward(ctx, g):
        u, c = ctx.saved_tensors
        return _lap(c * g), g * _lap(u)


class VarDiffusionBad(VarDiffusion):
    @staticmethod
    def backward(ctx, g):
        u, c = ctx.saved_tensors
        return c * _lap(g), g * _lap(u)


add(
    "variable_diffusion_11",
    lambda u, c: VarDiffusionBad.apply(u, c),
    lambda u, c: VarDiffusion.apply(u, c),
    lambda: (randn(8, seed=414), leaf([0.5] * 8)),
    "The operator c*laplacian is taken to be self-adjoint (the stencil is, the product is "
    "not); right for a constant coefficient, wrong for one that varies over the grid.",
    "own",
)


# minimum-image distances
class MinImage(Function):
    """Distances of pairs (P,2) of positions (N,3) in an orthorhombic periodic box (3,)."""

    @staticmethod
    def _parts(pos, box, pairs):
        d = pos[pairs[:, 0]] - pos[pairs[:, 1]]
        n = torch.round(d.detach() / box.detach())
        d = d - n * box
        return d, n, d.norm(dim=-1)

    @staticmethod
    def forward(ctx, pos, box, pairs):
        ctx.save_for_backward(pos, box, pairs)
        return MinImage._parts(pos, box, pairs)[2]

    @staticmethod
    def _bwd(ctx, g):
        pos, box, pairs = ctx.saved_tensors
        d, n, r = MinImage._parts(pos, box, pairs)
        f = d / torch.where(r == 0, 1.0, r)[:, None] * g[:, None]
        dp = torch.zeros_like(pos).index_add(0, pairs[:, 0], f).index_add(0, pairs[:, 1], -f)
        return dp, n, f

    @staticmethod
    def backward(ctx, g):
        dp, n, f = MinImage._bwd(ctx, g)
        return dp, -(n * f).sum(0), None


class MinImageBad(MinImage):
    @staticmethod
    def backward(ctx, g):
        dp, _n, _f = MinImage._bwd(ctx, g)
        return dp, torch.zeros_like(ctx.saved_tensors[1]), None


add(
    "minimum_image_11",
    lambda p, b, i: MinImageBad.apply(p, b, i),
    lambda p, b, i: MinImage.apply(p, b, i),
    lambda: (
        rand(4, 3, seed=415, lo=0.0, hi=2.0),
        leaf([6.0, 7.0, 8.0]),
        torch.tensor([[0, 1], [0, 2], [1, 3], [2, 3]]),
    ),
    "The box lengths get a zero gradient (no virial); right while no pair is wrapped around "
    "the boundary, wrong for pairs nearer through it (positions 0.3 and 5.8 in a box of 6).",
    "own (cf. https://github.com/NVIDIA/nvalchemi-toolkit-ops/issues/136)",
)


# Euler steps on a given time grid
class EulerOde(Function):
    """y[k+1] = y[k] + (t[k+1]-t[k]) tanh(A y[k]); returns all states (T,D)."""

    @staticmethod
    def forward(ctx, y0, A, t):
        ys = [y0]
        for k in range(len(t) - 1):
            ys.append(ys[-1] + (t[k + 1] - t[k]) * torch.tanh(A @ ys[-1]))
        y = torch.stack(ys)
        ctx.save_for_backward(A, t, y)
        return y

    @staticmethod
    def _bwd(ctx, g, steps):
        A, t, y = ctx.saved_tensors
        lam, dA, dt = g[-1], torch.zeros_like(A), torch.zeros_like(t)
        for k in range(len(t) - 2, -1, -1):
            f = torch.tanh(A @ y[k])
            s = (lam * f).sum()
            dt[k + 1] += s
            dt[k] -= s
            m = steps[k] * lam * (1 - f * f)
            dA += torch.outer(m, y[k])
            lam = lam + A.t() @ m + g[k]
        return lam, dA, dt

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return EulerOde._bwd(ctx, g, ctx.saved_tensors[1].diff())


class EulerOdeBad(EulerOde):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        t = ctx.saved_tensors[1]
        return EulerOde._bwd(ctx, g, (t[1] - t[0]).expand(len(t) - 1))


add(
    "ode_time_grid_11",
    lambda y, A, t: EulerOdeBad.apply(y, A, t),
    lambda y, A, t: EulerOde.apply(y, A, t),
    lambda: (
        randn(2, seed=416),
        randn(2, 2, seed=417),
        torch.linspace(0, 1, 5, dtype=torch.float64).requires_grad_(),
    ),
    "Backward steps with the first interval's length throughout; right on a uniform grid, "
    "wrong on an uneven one such as [0, .1, .4, 1].",
    "own",
)
