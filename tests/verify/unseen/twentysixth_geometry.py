"""Geometry and physics."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.twentysixth import add, check, finite, indices, positive, same, sized


# Kinetic and potential energy of oscillators of frequency 1.5
def oscillator(wrong):
    class Energies(Function):
        @staticmethod
        def forward(ctx, x, p, mass):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x, p, mass)
            return p * p / (2 * mass), mass * (1.5 * x) ** 2 / 2

        @staticmethod
        def backward(ctx, grad_kinetic, grad_potential):
            x, p, mass = ctx.saved_tensors
            grad_x = grad_p = grad_mass = None
            if grad_kinetic is not None:
                v = p / mass
                grad_p, grad_mass = grad_kinetic * v, -grad_kinetic * v * v / 2
            if grad_potential is not None:
                grad_x = grad_potential * mass * 2.25 * x
                second = grad_potential * (1.5 * x) ** 2 / 2
                alone = wrong or grad_mass is None
                grad_mass = second if alone else grad_mass + second
            return grad_x, grad_p, grad_mass

    def energies(x, p, mass):
        same(x, p, mass)
        positive("mass", mass)
        return Energies.apply(x, p, mass)

    return energies


add(
    "oscillator_mass",
    oscillator,
    lambda: (real(4), real(4, seed=1), real(4, seed=2, positive=True)),
    bug="The mass's gradient from the second output replaces that from the first",
    trigger="both energies in one loss",
)


# Energies of angles between three atoms
def bent_bonds(wrong):
    def parts(x, triples):
        i, j, k = triples.unbind(-1)
        u, v = x[i] - x[j], x[k] - x[j]
        nu, nv = u.norm(dim=-1, keepdim=True), v.norm(dim=-1, keepdim=True)
        e, w = u / nu, v / nv
        cos = (e * w).sum(-1, keepdim=True)
        return nu, nv, e, w, cos, torch.linalg.cross(e, w).norm(dim=-1, keepdim=True)

    class Bent(Function):
        @staticmethod
        def forward(ctx, x, triples):
            ctx.save_for_backward(x, triples)
            *_, cos, sin = parts(x, triples)
            return (torch.atan2(sin, cos) - 1.9)[:, 0].square() / 2

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, triples = ctx.saved_tensors
            nu, nv, e, w, cos, sin = parts(x, triples)
            slope = grad_y[:, None] * (torch.atan2(sin, cos) - 1.9)
            slope = torch.where(sin > 0, slope / torch.where(sin > 0, sin, 1), 0)
            first, last = slope * (cos * e - w) / nu, slope * (cos * w - e) / nv
            i, j, k = triples.unbind(-1)
            grad_x = torch.zeros_like(x)
            for place, part in ((i, first), (k, last), (j, -first - last)):
                if wrong:
                    grad_x[place] += part
                else:
                    grad_x.index_add_(0, place, part)
            return grad_x, None

    def bent(x, triples):
        sized("x", x, None, 3)
        sized("triples", triples, None, 3)
        finite(x=x)
        indices("triples", triples, len(x))
        for end in (0, 2):
            gap = (x[triples[:, end]] - x[triples[:, 1]]).norm(dim=-1)
            check(bool((gap >= 1e-3).all()), "x: expected atoms apart")
        return Bent.apply(x, triples)

    return bent


add(
    "bent_bonds_shared",
    bent_bonds,
    lambda: (real(6, 3), torch.tensor([[0, 1, 2], [3, 4, 5]])),
    bug="Forces are added by an indexed +=, which keeps one of several at an atom",
    trigger="an atom at the same place in two angles",
)


# Barycentric coordinates of points (N, 2) in triangles (N, 3, 2)
def barycentric(wrong):
    def cross(u, v):
        return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]

    def turned(v):
        return torch.stack((v[..., 1], -v[..., 0]), -1)

    class Barycentric(Function):
        @staticmethod
        def forward(ctx, p, corners):
            a, b, c = corners.unbind(1)
            area = cross(b - a, c - a)
            parts = cross(b - p, c - p), cross(c - p, a - p), cross(a - p, b - p)
            y = torch.stack(parts, -1) / area[:, None]
            ctx.save_for_backward(p, corners, y)
            return y

        @staticmethod
        def backward(ctx, grad_y):
            p, corners, y = ctx.saved_tensors
            corner = corners.unbind(1)
            a, b, c = corner
            area = cross(b - a, c - a)
            if wrong:
                area = area.abs()
            grad_part = grad_y / area[:, None]
            grad_area = -(grad_part * y).sum(-1)
            grad_p, grad = 0, [0, 0, 0]
            for k in range(3):
                m, n = (k + 1) % 3, (k + 2) % 3
                g = grad_part[:, k, None]
                first, second = g * turned(corner[n] - p), -g * turned(corner[m] - p)
                grad_p = grad_p - first - second
                grad[m], grad[n] = grad[m] + first, grad[n] + second
            first, second = turned(c - a), -turned(b - a)
            grad[1] = grad[1] + grad_area[:, None] * first
            grad[2] = grad[2] + grad_area[:, None] * second
            grad[0] = grad[0] - grad_area[:, None] * (first + second)
            return grad_p, torch.stack(grad, 1)

    def coordinates(p, corners):
        sized("p", p, None, 2)
        sized("corners", corners, len(p), 3, 2)
        finite(p=p, corners=corners)
        a, b, c = corners.unbind(1)
        check(bool((cross(b - a, c - a) != 0).all()), "corners: expected triangles with an area")
        return Barycentric.apply(p, corners)

    return coordinates


def triangles():
    corners = torch.tensor([[[0, 0], [2, 0], [0, 1]], [[1, 1], [3, 2], [0, 4]]], dtype=F64)
    return real(2, 2), corners.requires_grad_()


add(
    "barycentric_clockwise",
    barycentric,
    triangles,
    bug="Backward divides by the area, forward by the area with its sign",
    trigger="corners in clockwise order",
)


# Real-space part of Ewald's sum: q_i q_j erfc(r / 2) / r over pairs
def ewald(wrong):
    def pairs(x, rows):
        d = x[rows, None] - x
        r = d.norm(dim=-1)
        own = torch.arange(len(x), device=x.device)[rows, None] == torch.arange(
            len(x), device=x.device
        )
        return d, torch.where(own, 1, r), own

    class Ewald(Function):
        @staticmethod
        def forward(ctx, x, q):
            ctx.save_for_backward(x, q)
            _, r, own = pairs(x, slice(None))
            return (q[:, None] * q * torch.where(own, 0, torch.erfc(r / 2) / r)).sum() / 2

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            x, q = ctx.saved_tensors
            grad_x, grad_q = torch.zeros_like(x), torch.zeros_like(q)
            block = min(32, len(x))
            blocks = len(x) // block if wrong else -(-len(x) // block)
            for b in range(blocks):
                rows = slice(b * block, (b + 1) * block)
                d, r, own = pairs(x, rows)
                energy = torch.where(own, 0, torch.erfc(r / 2) / r)
                gauss = torch.exp(-r * r / 4) / math.sqrt(math.pi)
                force = torch.where(own, 0, -(energy + gauss) / (r * r))
                grad_q[rows] = grad * energy @ q
                weight = grad * q[rows, None] * q * force
                grad_x[rows] = (weight[..., None] * d).sum(1)
            return grad_x, grad_q

    def energy(x, q):
        sized("x", x, None, 3)
        sized("q", q, len(x))
        _, r, _ = pairs(x.detach(), slice(None))
        check(bool((r >= 1e-3).all()), "x: expected particles apart")
        finite(x=x, q=q)
        return Ewald.apply(x, q)

    return energy


add(
    "ewald_blocks",
    ewald,
    lambda: (real(4, 3), real(4, seed=1)),
    bug="The last block of particles, if not full, gets no forces",
    trigger="more than 32 particles, 33 say",
)


# Laplacian of u less f on the unit square, u = 0 beyond its border
def poisson(wrong):
    def laplacian(u, down, across):
        u = F.pad(u, (1, 1, 1, 1))
        inner = u[1:-1, 1:-1]
        return (u[2:, 1:-1] + u[:-2, 1:-1] - 2 * inner) * down**2 + (
            u[1:-1, 2:] + u[1:-1, :-2] - 2 * inner
        ) * across**2

    class Residual(Function):
        @staticmethod
        def forward(ctx, u, f):
            h, w = u.shape
            return laplacian(u, h - 1, w - 1) - f

        @staticmethod
        def backward(ctx, grad_y):
            h, w = grad_y.shape
            return laplacian(grad_y, h - 1, h - 1 if wrong else w - 1), -grad_y

    def residual(u, f):
        sized("u", u, None, None)
        same(u, f)
        check(min(u.shape) >= 2, "u: expected 2 x 2 points or more")
        return Residual.apply(u, f)

    return residual


add(
    "poisson_square",
    poisson,
    lambda: (real(4, 4), real(4, 4, seed=1)),
    bug="Backward takes the spacing across to be that down",
    trigger="a grid that is not square",
)


# Great-circle distances of points (latitude, longitude) in radians
def haversine(wrong):
    class Distance(Function):
        @staticmethod
        def forward(ctx, p, q):
            ctx.save_for_backward(p, q)
            return 2 * Distance.half(p, q).clamp(max=1).sqrt().asin()

        @staticmethod
        def half(p, q):
            d = ((q - p) / 2).sin() ** 2
            return d[:, 0] + p[:, 0].cos() * q[:, 0].cos() * d[:, 1]

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            p, q = ctx.saved_tensors
            h = Distance.half(p, q).clamp(max=1)
            below = h * (1 - h)
            slope = below.rsqrt() if wrong else torch.where(below > 0, below, torch.inf).rsqrt()
            d = q - p
            turn, wide = d.sin() / 2, (d[:, 1] / 2).sin() ** 2
            sp, cp, sq, cq = p[:, 0].sin(), p[:, 0].cos(), q[:, 0].sin(), q[:, 0].cos()
            across = cp * cq * turn[:, 1]
            grad_p = torch.stack((-turn[:, 0] - sp * cq * wide, -across), -1)
            grad_q = torch.stack((turn[:, 0] - cp * sq * wide, across), -1)
            common = (grad_y * slope)[:, None]
            return common * grad_p, common * grad_q

    def distance(p, q):
        sized("p", p, None, 2)
        same(p, q)
        finite(p=p, q=q)
        return Distance.apply(p, q)

    return distance


add(
    "haversine_same",
    haversine,
    lambda: (real(4, 2), real(4, 2, seed=1)),
    bug="The root's slope is infinite at distance 0, and infinity times 0 is NaN",
    trigger="a point's distance from itself",
)
