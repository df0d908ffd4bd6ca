"""Signals, recurrences, geometry, rendering."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirtythird import add, bounded, check, sized


# One Haar step, means then differences; an odd signal's last number is taken twice
def haar(wrong):
    root = math.sqrt(0.5)

    class Haar(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.n = x.shape[-1]
            if ctx.n % 2:
                x = torch.cat((x, x[..., -1:]), -1)
            first, second = x[..., ::2], x[..., 1::2]
            return torch.cat((first + second, first - second), -1) * root

        @staticmethod
        def backward(ctx, grad_y):
            low, high = grad_y.chunk(2, -1)
            grad = torch.stack((low + high, low - high), -1).flatten(-2) * root
            if ctx.n % 2 == 0:
                return grad
            if wrong:
                return grad[..., :-1].contiguous()
            return torch.cat((grad[..., :-2], grad[..., -2:].sum(-1, keepdim=True)), -1)

    def function(x):
        check(x.ndim >= 1 and x.shape[-1] >= 1, "x: expected a signal")
        bounded("x", x, -1e4, 1e4)
        return Haar.apply(x)

    return function


add(
    "haar_odd_last",
    haar,
    lambda: (real(2, 8),),
    bug="The last number's second use, which fills up an odd signal, is cut off",
    trigger="an odd length",
)


# sin(2π Σ f), a tone of a frequency that changes
def glide(wrong):
    class Glide(Function):
        @staticmethod
        def forward(ctx, f):
            ctx.save_for_backward(f)
            return (2 * math.pi * (f.double().cumsum(-1) % 1)).sin().to(f.dtype)

        @staticmethod
        def backward(ctx, grad_y):
            (f,) = ctx.saved_tensors
            phase = 2 * math.pi * ((f.float() if wrong else f.double()).cumsum(-1) % 1)
            grad = 2 * math.pi * grad_y.double() * phase.cos()
            return grad.flip(-1).cumsum(-1).flip(-1).to(f.dtype)

    def function(f):
        check(f.ndim >= 1, "f: expected frequencies over time")
        bounded("f", f, -0.5, 0.5)
        return Glide.apply(f)

    return function


add(
    "glide_phase_float32",
    glide,
    lambda: ((torch.arange(10, dtype=torch.float64).view(2, 5) / 40 + 0.05).requires_grad_(),),
    bug="backward adds the phase up in float32, not in float64 as forward does",
    trigger="float64 to more than seven digits, or a long signal",
)


# h_t = tanh(x_t + u * h_(t-1)): every unit feeds itself alone
def independent_recurrence(wrong):
    class Recurrence(Function):
        @staticmethod
        def forward(ctx, x, u):
            h = torch.zeros_like(x[:, 0])
            states = []
            for t in range(x.shape[1]):
                h = (x[:, t] + u * h).tanh()
                states.append(h)
            states = torch.stack(states, 1)
            ctx.save_for_backward(u, states)
            return states

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            u, states = ctx.saved_tensors
            grad_x, grad_u = torch.empty_like(states), torch.zeros_like(u)
            grad_h = torch.zeros_like(states[:, 0])
            for t in reversed(range(states.shape[1])):
                g = (grad_h + grad_y[:, t]) * (1 - states[:, t] ** 2)
                grad_x[:, t] = g
                if wrong:
                    grad_u += (g * states[:, t]).sum(0)
                elif t:
                    grad_u += (g * states[:, t - 1]).sum(0)
                grad_h = g * u
            return grad_x, grad_u

    def function(x, u):
        sized("x", x, None, None, None)
        sized("u", u, x.shape[2])
        bounded("x", x, -1e3, 1e3)
        bounded("u", u, -2, 2)
        return Recurrence.apply(x, u)

    return function


add(
    "independent_recurrence_state",
    independent_recurrence,
    lambda: (real(2, 5, 3), real(3, seed=1).detach().clamp(-1, 1).requires_grad_()),
    bug="The recurrent weight's gradient uses the state after the step, not before it",
)


# Points of the plane moved by a homography
def homography(wrong):
    class Move(Function):
        @staticmethod
        def forward(ctx, points, h):
            ctx.save_for_backward(points, h)
            x, y, w = (F.pad(points, (0, 1), value=1.0) @ h.mT).unbind(-1)
            return torch.stack((x / w, y / w), -1)

        @staticmethod
        def backward(ctx, grad_y):
            points, h = ctx.saved_tensors
            full = F.pad(points, (0, 1), value=1.0)
            x, y, w = (full @ h.mT).unbind(-1)
            gu, gv = grad_y.unbind(-1)
            below = w if wrong else w * w
            grad = torch.stack((gu / w, gv / w, -(gu * x + gv * y) / below), -1)
            return (grad @ h)[..., :2].contiguous(), grad.flatten(0, -2).mT @ full.flatten(0, -2)

    def function(points, h):
        check(points.ndim >= 2 and points.shape[-1] == 2, "points: expected (..., n, 2)")
        sized("h", h, 3, 3)
        bounded("points", points, -1e3, 1e3)
        bounded("h", h, -1e3, 1e3)
        w = points @ h[2, :2] + h[2, 2]
        check(bool((w > 1e-3).all()), "points: expected points before the horizon")
        return Move.apply(points, h)

    return function


add(
    "homography_depth",
    homography,
    lambda: (
        real(4, 2),
        torch.tensor(
            [[1.1, 0.2, 0.3], [-0.1, 0.9, 0.4], [0.05, 0.02, 1.5]], dtype=torch.float64
        ).requires_grad_(),
    ),
    bug="The quotient's derivative is divided by the depth once, not twice",
)


# A rotation from two vectors by Gram and Schmidt
def two_vector_rotation(wrong):
    class Rotation(Function):
        @staticmethod
        def forward(ctx, v):
            ctx.save_for_backward(v)
            p, q = v.unbind(-2)
            first = p / p.norm(dim=-1, keepdim=True)
            rest = q - (first * q).sum(-1, keepdim=True) * first
            second = rest / rest.norm(dim=-1, keepdim=True)
            return torch.stack((first, second, torch.linalg.cross(first, second)), -2)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (v,) = ctx.saved_tensors
            p, q = v.unbind(-2)
            long = p.norm(dim=-1, keepdim=True)
            first = p / long
            along = (first * q).sum(-1, keepdim=True)
            rest = q - along * first
            far = rest.norm(dim=-1, keepdim=True)
            second = rest / far
            g1, g2, g3 = grad_y.unbind(-2)
            g1 = g1 + torch.linalg.cross(second, g3)
            g2 = g2 + torch.linalg.cross(g3, first)
            g_rest = (g2 - (g2 * second).sum(-1, keepdim=True) * second) / far
            inner = (g_rest * first).sum(-1, keepdim=True)
            g1 = g1 - along * g_rest
            if not wrong:
                g1 = g1 - inner * q
            g_p = (g1 - (g1 * first).sum(-1, keepdim=True) * first) / long
            return torch.stack((g_p, g_rest - inner * first), -2)

    def function(v):
        check(v.ndim >= 2 and v.shape[-2:] == (2, 3), "v: expected two vectors each")
        bounded("v", v, -1e3, 1e3)
        area = torch.linalg.cross(v[..., 0, :], v[..., 1, :]).norm(dim=-1)
        lengths = v.norm(dim=-1)
        check(bool((lengths > 1e-3).all()), "v: expected vectors other than 0")
        check(bool((area > 1e-2 * lengths.prod(-1)).all()), "v: expected vectors not parallel")
        return Rotation.apply(v)

    return function


add(
    "two_vector_rotation_inner",
    two_vector_rotation,
    lambda: (real(3, 2, 3),),
    bug="Of the projection's two factors that hold the first vector, one has no gradient",
)


# Blinn's highlight max(c, 0)^n
def highlight(wrong):
    class Highlight(Function):
        @staticmethod
        def forward(ctx, c, n):
            ctx.save_for_backward(c, n)
            return c.clamp(min=0) ** n

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            c, n = ctx.saved_tensors
            lit = c > 0
            base = c.clamp(min=0)
            logs = base.log() if wrong else torch.where(lit, base, 1).log()
            grad_c = torch.where(lit, grad_y * n * base ** (n - 1), 0)
            return grad_c, (grad_y * base**n * logs).sum()

    def function(c, n):
        sized("n", n)
        bounded("n", n, 1, 256)
        bounded("c", c, -1.001, 1.001)
        return Highlight.apply(c, n)

    return function


add(
    "highlight_dark_side",
    highlight,
    lambda: (
        real(3, 4, positive=True).detach().sigmoid().requires_grad_(),
        torch.tensor(8.0, dtype=torch.float64, requires_grad=True),
    ),
    bug="The shininess's gradient on the dark side is 0 * log 0",
    trigger="a surface turned away from the light",
)


# Points of a Bézier curve of any degree
def bezier(wrong):
    class Curve(Function):
        @staticmethod
        def forward(ctx, points, t):
            ctx.save_for_backward(points, t)
            return basis(t, len(points) - 1) @ points

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            points, t = ctx.saved_tensors
            n = len(points) - 1
            grad_points = basis(t, n).mT @ grad_y
            i = torch.arange(n + 1, device=t.device)
            ways = binomials(n, t)
            s, t = 1 - t[:, None], t[:, None]
            if wrong:
                rise = i * t ** (i - 1) * s ** (n - i) - (n - i) * t**i * s ** (n - i - 1)
            else:
                up, down = (i - 1).clamp(min=0), (n - i - 1).clamp(min=0)
                rise = i * t**up * s ** (n - i) - (n - i) * t**i * s**down
            return grad_points, (ways * rise * (grad_y @ points.mT)).sum(-1)

    def binomials(n, like):
        return torch.tensor([math.comb(n, i) for i in range(n + 1)], device=like.device).to(like)

    def basis(t, n):
        i = torch.arange(n + 1, device=t.device)
        return binomials(n, t) * t[:, None] ** i * (1 - t[:, None]) ** (n - i)

    def function(points, t):
        sized("points", points, None, None)
        sized("t", t, None)
        check(len(points) <= 12, "points: expected twelve at most")
        bounded("points", points, -1e3, 1e3)
        bounded("t", t, 0, 1)
        return Curve.apply(points, t)

    return function


add(
    "bezier_ends",
    bezier,
    lambda: (
        real(4, 2),
        torch.tensor([0.1, 0.35, 0.6, 0.8, 0.95], dtype=torch.float64, requires_grad=True),
    ),
    bug="The power rule takes 0 to the power -1 times 0 at the curve's ends",
    trigger="t = 0 or t = 1",
)


# Energy of masses in a harmonic chain with periodic ends, one value per chain
def ring_energy(wrong):
    class Energy(Function):
        @staticmethod
        def forward(ctx, x, k):
            ctx.save_for_backward(x, k)
            stretch = x.roll(-1, -1) - x
            return (k * stretch.square()).sum(-1) / 2

        @staticmethod
        def backward(ctx, grad_y):
            x, k = ctx.saved_tensors
            stretch = x.roll(-1, -1) - x
            force = k * stretch
            before = force.roll(1) if wrong else force.roll(1, -1)
            g = grad_y[..., None]
            return g * (before - force), (g * stretch.square() / 2).sum_to_size(k.shape)

    def function(x, k):
        check(x.ndim >= 1, "x: expected places")
        sized("k", k, x.shape[-1])
        bounded("x", x, -1e3, 1e3)
        bounded("k", k, -1e3, 1e3)
        return Energy.apply(x, k)

    return function


add(
    "ring_energy_rolled",
    ring_energy,
    lambda: (real(6), real(6, seed=1)),
    bug="roll without a dimension rolls the flattened chains: the last of one chain goes to the next",
    trigger="several chains at once",
)
