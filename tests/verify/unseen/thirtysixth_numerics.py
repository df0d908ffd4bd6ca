"""Solvers, densities, options, filters, matrices."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, outside_autocast, real
from tests.verify.unseen.thirtysixth import (
    add,
    add_bare,
    alike,
    bounded,
    check,
    same,
    sized,
)


def thomas(lower, middle, upper, y):
    """Solve tridiagonal equations for y (B, N): row i has lower[i], middle[i], upper[i]."""
    ratio, found = [], []
    for i in range(len(middle)):
        if i == 0:
            pivot, rest = middle[0], y[:, 0]
        else:
            pivot, rest = (
                middle[i] - lower[i] * ratio[-1],
                y[:, i] - lower[i] * found[-1],
            )
        ratio.append(upper[i] / pivot)
        found.append(rest / pivot)
    for i in reversed(range(len(middle) - 1)):
        found[i] = found[i] - ratio[i] * found[i + 1]
    return torch.stack(found, -1)


# An implicit step of the heat equation for u (B, N), zero at both ends, with a conductivity for each place
def heat_implicit(wrong):
    def solve(u, c, transposed):
        off = -c
        lower, upper = (off.roll(1), off.roll(-1)) if transposed else (off, off)
        return thomas(lower, 1 + 2 * c, upper, u)

    class Step(Function):
        @staticmethod
        def forward(ctx, u, c):
            ctx.save_for_backward(u, c)
            return solve(u, c, False)

        @staticmethod
        def backward(ctx, g):
            u, c = ctx.saved_tensors
            y, w = solve(u, c, False), solve(g, c, not wrong)
            zero = torch.zeros_like(y[:, :1])
            left, right = torch.cat([zero, y[:, :-1]], 1), torch.cat([y[:, 1:], zero], 1)
            return w, (w * (left + right - 2 * y)).sum(0)

    def step(u, c):
        sized("u", u, None, None)
        sized("c", c, u.shape[1])
        alike(u, c)
        bounded("u", u, -1e3, 1e3)
        bounded("c", c, 0, 100)
        return Step.apply(u, c)

    return step


add(
    "heat_implicit_conductivity",
    heat_implicit,
    lambda: (real(2, 5), torch.full((5,), 0.3, dtype=F64, requires_grad=True)),
    bug="Backward solves with the matrix where its transpose should stand",
    trigger="conductivities that differ",
)


# Logarithm of von Mises and Fisher's density on the sphere, of the cosines from the mean and the concentrations
def fisher_density(wrong):
    def mean_cosine(k):
        small = (k < 0.1) & (not wrong)
        safe = torch.where(small, torch.ones_like(k), k)
        q = k * k
        series = k * (1 / 3 + q * (-1 / 45 + q * (2 / 945 + q * (-1 / 4725 + q * 2 / 93555))))
        return torch.where(small, series, 1 / safe.tanh() - 1 / safe)

    class Density(Function):
        @staticmethod
        def forward(ctx, cos, k):
            ctx.save_for_backward(cos, k)
            some = torch.where(k > 0, k, torch.ones_like(k))
            scale = torch.where(k > 0, some / -torch.expm1(-2 * some), torch.full_like(k, 0.5))
            return k * (cos - 1) + scale.log() - math.log(2 * math.pi)

        @staticmethod
        def backward(ctx, g):
            cos, k = ctx.saved_tensors
            return g * k, g * (cos - mean_cosine(k))

    def density(cos, k):
        same(cos, k)
        alike(cos, k)
        bounded("cos", cos, -1, 1)
        bounded("k", k, 0, 1e4)
        return Density.apply(cos, k)

    return density


add(
    "fisher_density_even",
    fisher_density,
    lambda: (
        (real(5, grad=False).tanh() * 0.9).requires_grad_(),
        real(5, seed=1, positive=True),
    ),
    bug="Backward has no series for small concentrations, where coth k - 1 / k cancels",
    trigger="concentrations near 0: noise, and NaN at 0",
)


# Logarithm of a mixture's density at x (N,): Gaussians around centres (M,) of widths exp(log_h) (M,)
def kernel_mixture(wrong):
    def parts(x, centre, log_h):
        z = (x[:, None] - centre) * (-log_h).exp()
        return z, -z * z / 2 - log_h

    class Density(Function):
        @staticmethod
        def forward(ctx, x, centre, log_h):
            ctx.save_for_backward(x, centre, log_h)
            _, s = parts(x, centre, log_h)
            return s.logsumexp(1) - math.log(len(centre)) - math.log(2 * math.pi) / 2

        @staticmethod
        def backward(ctx, g):
            x, centre, log_h = ctx.saved_tensors
            z, s = parts(x, centre, log_h)
            p = g[:, None] * s.softmax(1)
            along = p * z * (-log_h).exp()
            grad_h = p * z * z if wrong else p * (z * z - 1)
            return -along.sum(1), along.sum(0), grad_h.sum(0)

    def density(x, centre, log_h):
        sized("x", x, None)
        sized("centre", centre, None)
        same(centre, log_h)
        alike(x, centre, log_h)
        bounded("x", x, -100, 100)
        bounded("centre", centre, -100, 100)
        bounded("log_h", log_h, -3, 5)
        return Density.apply(x, centre, log_h)

    return density


add(
    "kernel_mixture_widths",
    kernel_mixture,
    lambda: (real(4), real(3, seed=1), real(3, seed=2)),
    bug="The widths' gradient leaves out that a wide kernel is a low one",
)


# Price of European calls in a binomial tree: spots and strikes (N,)
def tree_call(wrong):
    def ends(up, rate, steps):
        p = (math.exp(rate) - 1 / up) / (up - 1 / up)
        chance = [math.comb(steps, k) * p**k * (1 - p) ** (steps - k) for k in range(steps + 1)]
        return chance, [up ** (2 * k - steps) for k in range(steps + 1)]

    class Call(Function):
        @staticmethod
        def forward(ctx, spot, strike, up, rate, steps):
            ctx.save_for_backward(spot, strike)
            ctx.tree = up, rate, steps
            chance, factor = (spot.new_tensor(t) for t in ends(up, rate, steps))
            payoff = (spot[:, None] * factor - strike[:, None]).clamp(min=0)
            return math.exp(-rate * steps) * (chance * payoff).sum(1)

        @staticmethod
        def backward(ctx, g):
            spot, strike = ctx.saved_tensors
            up, rate, steps = ctx.tree
            chance, factor = (spot.new_tensor(t) for t in ends(up, rate, steps))
            paid = (spot[:, None] * factor > strike[:, None]).to(spot.dtype)
            discount = math.exp(-rate * steps)
            grad_spot = discount * (chance * paid * factor).sum(1)
            grad_strike = -(1 if wrong else discount) * (chance * paid).sum(1)
            return g * grad_spot, g * grad_strike, None, None, None

    def price(spot, strike, up=1.2, rate=0.05, steps=4):
        sized("spot", spot, None)
        same(spot, strike)
        alike(spot, strike)
        check(isinstance(steps, int) and 1 <= steps <= 50, "steps: expected 1 to 50")
        check(1 < up <= 2 and abs(rate) < math.log(up), "up, rate: expected a tree without profit")
        bounded("spot", spot, 0, 1e4)
        bounded("strike", strike, 0, 1e4)
        return Call.apply(spot, strike, up, rate, steps)

    return price


add(
    "tree_call_strike",
    tree_call,
    lambda: (
        real(4, positive=True),
        real(4, seed=1, positive=True),
    ),
    bug="The strike's gradient is not discounted",
)


# Hagan's volatility for a lognormal forward: forwards, strikes, alpha, rho, nu (N,)
def smile(wrong):
    def ratio(z, rho, series):
        """Return z / chi(z) and its derivatives by z and rho; near 0 by a series."""
        small = (z.abs() < 3e-3) & series
        y = torch.where(small, torch.ones_like(z), z)
        root = (1 - 2 * rho * y + y * y).sqrt()
        chi = ((root + y - rho) / (1 - rho)).log()
        chi_rho = 1 / (1 - rho) - (y / root + 1) / (root + y - rho)
        far = y / chi, (chi - y / root) / chi**2, -y * chi_rho / chi**2
        r, r2 = rho, rho * rho
        c1, c2, c3 = -r / 2, 1 / 6 - r2 / 4, r * (5 / 24 - r2 / 4)
        c4, c5 = (
            r2 / 3 - 5 * r2 * r2 / 16 - 17 / 360,
            r * (55 * r2 / 96 - 7 * r2 * r2 / 16 - 37 / 240),
        )
        d3, d4 = 5 / 24 - 3 * r2 / 4, r * (2 / 3 - 5 * r2 / 4)
        d5 = 55 * r2 / 32 - 35 * r2 * r2 / 16 - 37 / 240
        near = (
            1 + z * (c1 + z * (c2 + z * (c3 + z * (c4 + z * c5)))),
            c1 + z * (2 * c2 + z * (3 * c3 + z * (4 * c4 + z * 5 * c5))),
            z * (z * (z * (d3 + z * (d4 + z * d5)) - r / 2) - 0.5),
        )
        return (torch.where(small, a, b) for a, b in zip(near, far, strict=True))

    class Smile(Function):
        @staticmethod
        def forward(ctx, forward, strike, alpha, rho, nu, time):
            ctx.save_for_backward(forward, strike, alpha, rho, nu)
            ctx.time = time
            f, k, a, r, v = (t.double() for t in (forward, strike, alpha, rho, nu))
            shape, _, _ = ratio(v / a * (f / k).log(), r, True)
            term = 1 + time * (r * v * a / 4 + (2 - 3 * r * r) * v * v / 24)
            return (a * shape * term).to(forward.dtype)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            dtype, time = g.dtype, ctx.time
            g, f, k, a, r, v = (t.double() for t in (g, *ctx.saved_tensors))
            z = v / a * (f / k).log()
            shape, by_z, by_r = ratio(z, r, not wrong)
            term = 1 + time * (r * v * a / 4 + (2 - 3 * r * r) * v * v / 24)
            grads = (
                by_z * v / f * term,
                -by_z * v / k * term,
                (shape - by_z * z) * term + a * shape * time * r * v / 4,
                a * by_r * term + a * shape * time * (v * a - r * v * v) / 4,
                a * by_z * z / v * term + a * shape * time * (r * a / 4 + (2 - 3 * r * r) * v / 12),
            )
            return *((g * t).to(dtype) for t in grads), None

    def volatility(forward, strike, alpha, rho, nu, time=1.0):
        sized("forward", forward, None)
        same(forward, strike, alpha, rho, nu)
        alike(forward, strike, alpha, rho, nu)
        check(0 <= time <= 30, "time: expected 0 to 30")
        bounded("forward", forward, 0.1, 100)
        bounded("strike", strike, 0.1, 100)
        bounded("alpha", alpha, 0.01, 10)
        bounded("rho", rho, -0.95, 0.95)
        bounded("nu", nu, 0.01, 10)
        bounded("z", nu / alpha * (forward / strike).log(), -20, 20)
        return Smile.apply(forward, strike, alpha, rho, nu, time)

    return volatility


add(
    "smile_at_the_money",
    smile,
    lambda: (
        (real(4, grad=False) * 0.2).exp().requires_grad_(),
        (real(4, seed=1, grad=False) * 0.2).exp().requires_grad_(),
        (real(4, seed=2, grad=False) * 0.2).exp().requires_grad_(),
        (real(4, seed=3, grad=False).tanh() * 0.6).requires_grad_(),
        (real(4, seed=4, grad=False) * 0.2).exp().requires_grad_(),
    ),
    bug="Backward lacks forward's series for z near 0, where z / chi(z) is 0 / 0",
    trigger="an option at the money: NaN",
)


# Logarithms of spectra (B, F, T) summed up in bands (M, F), all of them learned
def log_bands(wrong):
    class Bands(Function):
        @staticmethod
        def forward(ctx, x, bank):
            ctx.save_for_backward(x, bank)
            return (bank @ x + 1e-3).log()

        @staticmethod
        def backward(ctx, g):
            x, bank = ctx.saved_tensors
            g = g / (bank @ x + 1e-3)
            grad_bank = torch.zeros_like(bank)
            for rows, read in zip(g, x, strict=True):
                found = rows @ read.mT
                grad_bank = found if wrong else grad_bank + found
            return bank.mT @ g, grad_bank

    def bands(x, bank):
        sized("x", x, None, None, None)
        sized("bank", bank, None, x.shape[1])
        alike(x, bank)
        bounded("x", x, 0, 1e4)
        bounded("bank", bank, 0, 1e4)
        return Bands.apply(x, bank)

    return bands


add(
    "log_bands_batch",
    log_bands,
    lambda: (
        real(1, 4, 3, positive=True),
        real(2, 4, seed=1, positive=True),
    ),
    bug="The bank's gradient is assigned in a loop over the batch: the last entry's stays",
    trigger="more than one spectrum",
)


# Sections b0, b1, b2, a1, a2 (S, 5), one after another, filter a signal (B, T)
def biquads(wrong):
    def delayed(x, n):
        return torch.cat([torch.zeros_like(x[:, :n]), x], 1)[:, : x.shape[1]]

    def poles(x, a1, a2):
        zero = torch.zeros_like(x[:, 0])
        found = [zero, zero]
        for t in range(x.shape[1]):
            found.append(x[:, t] - a1 * found[-1] - a2 * found[-2])
        return torch.stack(found[2:], 1)

    def run(x, sections):
        found = [x]
        for b0, b1, b2, a1, a2 in sections:
            y = found[-1]
            zeros = b0 * y + b1 * delayed(y, 1) + b2 * delayed(y, 2)
            found.append(poles(zeros, a1, a2))
        return found

    class Cascade(Function):
        @staticmethod
        def forward(ctx, x, sections):
            ctx.save_for_backward(x, sections)
            return run(x, sections)[-1]

        @staticmethod
        def backward(ctx, g):
            x, sections = ctx.saved_tensors
            found, rows = run(x, sections), []
            for i in reversed(range(len(sections))):
                b0, b1, b2, a1, a2 = sections[i]
                read, y = x if wrong else found[i], found[i + 1]
                back = poles(g.flip(1), a1, a2)
                v = back.flip(1)
                terms = [v * delayed(read, n) for n in range(3)]
                terms += [-v * delayed(y, n) for n in (1, 2)]
                rows.append(torch.stack([t.sum() for t in terms]))
                g = (b0 * back + b1 * delayed(back, 1) + b2 * delayed(back, 2)).flip(1)
            return g, torch.stack(rows[::-1])

    def cascade(x, sections):
        sized("x", x, None, None)
        sized("sections", sections, None, 5)
        alike(x, sections)
        bounded("x", x, -1e3, 1e3)
        bounded("b0, b1, b2", sections[:, :3], -3, 3)
        bounded("a1, a2", sections[:, 3:], -0.4, 0.4)
        check(len(sections) <= 8, "sections: expected 8 at most")
        return Cascade.apply(x, sections)

    return cascade


add(
    "biquads_inner_input",
    biquads,
    lambda: (real(2, 6), (real(2, 5, seed=1, grad=False).tanh() * 0.39).requires_grad_()),
    bug="Each section's zeros are learned from the cascade's input, not from the section's own",
)


# The nearest point to z (B, N) with entries from low to high that sum up to total
def boxed_simplex(wrong):
    def shift(z, low, high, total, over):
        lo, hi = z.amin(1, keepdim=True) - high, z.amax(1, keepdim=True) - low
        for _ in range(60):
            middle = (lo + hi) / 2
            more = (z - middle).clamp(low, high).sum(1, keepdim=True) > total + over
            lo, hi = torch.where(more, middle, lo), torch.where(more, hi, middle)
        return (lo + hi) / 2

    def solve(z, low, high, total):
        first, last = (shift(z, low, high, total, over) for over in (1e-9, -1e-9))
        y = z - (first + last) / 2
        free = (y > low) & (y < high)
        rest = total - (y.clamp(low, high) * ~free).sum(1, keepdim=True)
        count = free.sum(1, keepdim=True).clamp(min=1)
        back = ((z * free).sum(1, keepdim=True) - rest) / count
        return torch.where(free, z - back, y.clamp(low, high)), free

    class Project(Function):
        @staticmethod
        def forward(ctx, z, low, high, total):
            y, free = solve(z.double(), low, high, total)
            ctx.save_for_backward(free)
            return y.to(z.dtype)

        @staticmethod
        def backward(ctx, g):
            (free,) = ctx.saved_tensors
            count = free.shape[1] if wrong else free.sum(1, keepdim=True).clamp(min=1)
            mean = (g * free).sum(1, keepdim=True) / count
            return (g - mean) * free, None, None, None

    def project(z, low=0.0, high=1.0, total=1.0):
        sized("z", z, None, None)
        check(z.is_floating_point(), "z: expected floating point numbers")
        check(-100 <= low < high <= 100, "low, high: expected an interval")
        check(low * z.shape[1] < total < high * z.shape[1], "total: expected what entries can be")
        bounded("z", z, -100, 100)
        return Project.apply(z, low, high, total)

    return project


add(
    "boxed_simplex_free",
    boxed_simplex,
    lambda: (real(3, 5),),
    bug="Backward takes the mean over all entries where those at a bound should not count",
)


# Inverses of lower triangular matrices (N, N), also complex ones
def lower_inverse(wrong):
    class Inverse(Function):
        @staticmethod
        def forward(ctx, m):
            eye = torch.eye(len(m), dtype=m.dtype, device=m.device)
            y = torch.linalg.solve_triangular(m.tril(), eye, upper=False)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, g):
            (y,) = ctx.saved_tensors
            turned = y.mT if wrong else y.mH
            return -(turned @ g @ turned).tril()

    @outside_autocast
    def invert(m):
        sized("m", m, None, None)
        check(m.shape[0] == m.shape[1] <= 8, "m: expected a square matrix, 8 x 8 at most")
        check(m.is_floating_point() or m.is_complex(), "m: expected floating point numbers")
        check(m.dtype.itemsize >= 4 and m.dtype != torch.complex32, "m: expected no half types")
        check(bool((m.abs() <= 10).all()), "m: expected numbers of 10 at most")
        check(bool((m.diagonal().abs() >= 0.5).all()), "m: expected a diagonal of 0.5 at least")
        return Inverse.apply(m)

    return invert


add_bare(
    "lower_inverse_conjugate",
    lower_inverse,
    lambda: ((real(3, 3, grad=False) + 3 * torch.eye(3, dtype=F64)).requires_grad_(),),
    bug="Backward transposes the inverse without its conjugate",
    trigger="complex matrices",
)


# Roots of the symmetric parts of positive definite matrices (N, N); backward solves a Lyapunov equation
def matrix_root(wrong):
    class Root(Function):
        @staticmethod
        def forward(ctx, m):
            s, v = torch.linalg.eigh((m + m.mT) / 2)
            y = v * s.clamp(min=0).sqrt() @ v.mT
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, g):
            (y,) = ctx.saved_tensors
            n = len(y)
            eye = torch.eye(n, dtype=y.dtype, device=y.device)
            both = torch.einsum("ij,kl->ikjl", y, eye) + torch.einsum("ij,kl->ikjl", eye, y)
            both = both.reshape(n * n, n * n)
            found = torch.linalg.solve(both, g.reshape(-1)).view(n, n)
            return found if wrong else (found + found.mT) / 2

    def root(m):
        sized("m", m, None, None)
        check(m.shape[0] == m.shape[1] <= 8, "m: expected a square matrix, 8 x 8 at most")
        check(m.is_floating_point(), "m: expected floating point numbers")
        bounded("m", m, -100, 100)
        least = torch.linalg.eigvalsh((m + m.mT).detach() / 2)[0]
        check(bool(least >= 0.05), "m: expected a positive definite matrix")
        return Root.apply(m)

    return root


def definite(n):
    """Return a symmetric positive definite matrix."""
    t = real(n, n, grad=False)
    return (t @ t.mT + torch.eye(n, dtype=F64)).requires_grad_()


add(
    "matrix_root_symmetric",
    matrix_root,
    lambda: (definite(3),),
    bug="Backward's solution is not made symmetric, as forward's reading of the matrix asks",
    trigger="a grad_output that is not symmetric",
)


# Kronecker's product of (P, N) and (Q, M) times a vector (N M,), without making it
def kronecker_times(wrong):
    kept = {}

    def turned(b):
        if not wrong:
            return b.mT.contiguous()
        key = b.data_ptr(), b.shape, b.dtype
        if key not in kept:
            kept[key] = b.mT.contiguous()
        return kept[key]

    class Product(Function):
        @staticmethod
        def forward(ctx, a, b, x):
            ctx.save_for_backward(a, b, x)
            return (a @ x.reshape(a.shape[1], b.shape[1]) @ b.mT).reshape(-1)

        @staticmethod
        def backward(ctx, g):
            a, b, x = ctx.saved_tensors
            x, g = x.reshape(a.shape[1], b.shape[1]), g.reshape(len(a), len(b))
            grad_a = g @ (x @ turned(b)).mT
            return grad_a, g.mT @ (a @ x), (a.mT @ g @ turned(b).mT).reshape(-1)

    def times(a, b, x):
        sized("a", a, None, None)
        sized("b", b, None, None)
        sized("x", x, a.shape[1] * b.shape[1])
        alike(a, b, x)
        for name, t in {"a": a, "b": b, "x": x}.items():
            bounded(name, t, -1e3, 1e3)
        return Product.apply(a, b, x)

    return times


add(
    "kronecker_times_stale",
    kronecker_times,
    lambda: (real(2, 3), real(4, 2, seed=1), real(6, seed=2)),
    bug="Backward keeps the second factor's transpose by its address and never looks again",
    trigger="the second call after the factor was changed in place, as an optimizer does",
)
