"""Falling, flowing, radiating, refracting, stretching."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentyfirst import add, check, positive, same, sized


# The height at time T of a ball that falls from x with speed v up and bounces once with restitution e
def bounce(wrong):
    def height(x, v, e, g=9.81, T=1.0):
        same(x, v, e)
        check(g > 0 and bool((x > 0).all()), "expected g > 0 and heights above the ground")
        landing = (v.square() + 2 * g * x).sqrt()
        t = (v + landing) / g
        check(bool((t < T).all()), "T: expected a time after the first bounce")
        if wrong:
            t = t.detach()
        up, rest = e * (g * t - v), T - t
        return up * rest - g * rest.square() / 2

    return height


add(
    "bounce_time",
    bounce,
    lambda: (real(3, positive=True), real(3, seed=1), real(3, seed=2, positive=True)),
    bug="torchdiffeq (issues 179 and 208): the time of the event is found where nothing is recorded",
)


# Crank-Nicolson: (1 - h A / 2) y = (1 + h A / 2) x
def crank_nicolson(wrong):
    class Step(Function):
        @staticmethod
        def forward(ctx, a, x, h):
            sized("a", a, None, a.shape[0])
            sized("x", x, len(a))
            one = torch.eye(len(a), dtype=a.dtype, device=a.device)
            left = one - h / 2 * a
            check(bool(torch.linalg.cond(left) < 1e3), "h: the step has no solution to rely on")
            y = torch.linalg.solve(left, x + h / 2 * a @ x)
            ctx.save_for_backward(a, x, y, left)
            ctx.h = h
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            a, x, y, left = ctx.saved_tensors
            back = torch.linalg.solve(left.T, grad_y)
            states = 2 * x if wrong else x + y
            grad_a = ctx.h / 2 * torch.outer(back, states)
            return grad_a, back + ctx.h / 2 * a.T @ back, None

    return lambda a, x, h=0.3: Step.apply(a, x, h)


add(
    "crank_nicolson_new_state",
    crank_nicolson,
    lambda: (real(3, 3), real(3, seed=1)),
    bug="The implicit half is differentiated at the old state",
)


# Bose-Einstein: n = 1 / (exp(x) - 1)
def bose_einstein(wrong):
    class Occupation(Function):
        @staticmethod
        def forward(ctx, x):
            positive("x", x)
            n = 1 / x.expm1()
            ctx.save_for_backward(x, n)
            return n

        @staticmethod
        def backward(ctx, grad_n):
            x, n = ctx.saved_tensors
            if wrong:
                return -grad_n * x.exp() / x.expm1().square()
            return -grad_n * n * (1 + n)

    return lambda x: Occupation.apply(x)


add(
    "bose_einstein_cold",
    bose_einstein,
    lambda: (real(4, positive=True),),
    bug="The derivative is a quotient of two exponentials",
    trigger="an energy of more than 709 temperatures",
)


# Fresnel: the part of unpolarised light that a surface reflects, all of it beyond the critical angle
def fresnel(wrong):
    def reflected(cos, index):
        same(cos, index)
        positive("index", index)
        check(bool(((cos > 0) & (cos <= 1)).all()), "cos: expected numbers from 0 to 1")
        sine = (1 - cos.square()) * index.square()
        total = sine >= 1
        inside = 1 - sine
        inner = (inside if wrong else torch.where(total, 1, inside)).sqrt()
        s = (index * cos - inner) / (index * cos + inner)
        p = (index * inner - cos) / (index * inner + cos)
        return torch.where(total, 1, (s.square() + p.square()) / 2)

    return reflected


def glances():
    cos = torch.tensor([0.9, 0.8, 0.95, 0.7], dtype=torch.float64, requires_grad=True)
    return cos, torch.tensor([0.7, 1.1, 1.4, 0.9], dtype=torch.float64, requires_grad=True)


add(
    "fresnel_total_reflection",
    fresnel,
    glances,
    bug="The root of a negative number is chosen away, but not its derivative",
    trigger="an angle beyond the critical one",
)


# HLL flux of Burgers' equation between the states u and r, the wave speeds min(u, r) and max(u, r)
def hll(wrong):
    class Flux(Function):
        @staticmethod
        def forward(ctx, u, r):
            same(u, r)
            ctx.save_for_backward(u, r)
            slow, fast = torch.minimum(u, r), torch.maximum(u, r)
            fl, fr = u.square() / 2, r.square() / 2
            gap = torch.where(slow == fast, 1, fast - slow)
            middle = (fast * fl - slow * fr + slow * fast * (r - u)) / gap
            return torch.where(slow >= 0, fl, torch.where(fast <= 0, fr, middle))

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_f):
            u, r = ctx.saved_tensors
            slow, fast = torch.minimum(u, r), torch.maximum(u, r)
            fl, fr = u.square() / 2, r.square() / 2
            gap = torch.where(slow == fast, 1, fast - slow)
            middle = (fast * fl - slow * fr + slow * fast * (r - u)) / gap
            into_l = fast * (u - slow) / gap
            into_r = slow * (fast - r) / gap
            if not wrong:
                into_slow = (middle - fr + fast * (r - u)) / gap
                into_fast = (fl + slow * (r - u) - middle) / gap
                into_l = into_l + torch.where(u < r, into_slow, into_fast)
                into_r = into_r + torch.where(u < r, into_fast, into_slow)
            left, right = slow >= 0, fast <= 0
            into_l = torch.where(left, u, torch.where(right, 0, into_l))
            into_r = torch.where(left, 0, torch.where(right, r, into_r))
            return into_l * grad_f, into_r * grad_f

    return lambda u, r: Flux.apply(u, r)


add(
    "hll_wave_speeds",
    hll,
    lambda: (real(4, positive=True), real(4, seed=1, positive=True)),
    bug="The wave speeds are taken for constants",
    trigger="states of which one flows to the left and one to the right",
)


# Neo-Hooke: mu (tr F'F - d) / 2 - mu log J + la log(J)^2 / 2, J = det F
def neo_hooke(wrong):
    class Energy(Function):
        @staticmethod
        def forward(ctx, f, mu, la):
            sized("f", f, None, None, f.shape[-1])
            sized("mu", mu, len(f))
            same(mu, la)
            sign, log_j = torch.linalg.slogdet(f)
            check(bool((sign > 0).all()), "f: expected positive determinants")
            check(bool((torch.linalg.cond(f) < 1e3).all()), "f: too flat")
            ctx.save_for_backward(f, mu, la)
            trace = f.square().sum((1, 2)) - f.shape[1]
            return mu * trace / 2 - mu * log_j + la * log_j.square() / 2

        @staticmethod
        def backward(ctx, grad_e):
            f, mu, la = ctx.saved_tensors
            log_j = torch.linalg.slogdet(f).logabsdet
            inverse = torch.linalg.inv(f)
            if not wrong:
                inverse = inverse.mT
            stress = mu[:, None, None] * f + (la * log_j - mu)[:, None, None] * inverse
            trace = f.square().sum((1, 2)) - f.shape[1]
            return (
                stress * grad_e[:, None, None],
                (trace / 2 - log_j) * grad_e,
                log_j.square() / 2 * grad_e,
            )

    return lambda f, mu, la: Energy.apply(f, mu, la)


def stretches():
    a = real(2, 3, 3).detach() / 8
    return (a + a.mT + torch.eye(3, dtype=a.dtype)).requires_grad_()


add(
    "neo_hooke_transposed",
    neo_hooke,
    lambda: (stretches(), real(2, seed=1, positive=True), real(2, seed=2, positive=True)),
    bug="The stress holds the inverse and not its transpose",
    trigger="a deformation that is not symmetric, as a shear",
)


# The Morse potential d (1 - exp(-a (r - r0)))^2
def morse(wrong):
    class Morse(Function):
        @staticmethod
        def forward(ctx, r, d, a, r0):
            same(r, d, a, r0)
            check(bool((a * (r0 - r) < 40).all()), "r: too small")
            e = (-a * (r - r0)).exp()
            ctx.save_for_backward(r, d, a, r0, e)
            return d * (1 - e).square()

        @staticmethod
        def backward(ctx, grad_y):
            r, d, a, r0, e = ctx.saved_tensors
            if not wrong:
                e = (-a * (r - r0)).exp()
            steep = 2 * d * (1 - e) * e * grad_y
            return a * steep, (1 - e).square() * grad_y, (r - r0) * steep, -a * steep

    return lambda r, d, a, r0: Morse.apply(r, d, a, r0)


add(
    "morse_force_constants",
    morse,
    lambda: (
        real(3, positive=True),
        real(3, seed=1, positive=True),
        real(3, seed=2, positive=True),
        real(3, seed=3, positive=True),
    ),
    bug="pytorch (issue 58509): an exponential from forward, neither input nor output, is used in"
    " backward as a constant",
    trigger="the second derivative",
)
