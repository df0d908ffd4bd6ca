"""Graphs, places, rotations, forces."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.thirtysixth import add, alike, bounded, check, indices, same, sized


# The least of the numbers (E,) of each of `count` groups, the first of equal ones; 0 where a group has none
def group_least(wrong):
    class Least(Function):
        @staticmethod
        def forward(ctx, x, ids, count):
            rows = torch.arange(count, device=x.device)[:, None] == ids
            y, place = torch.where(rows, x, torch.full_like(x, torch.inf)).min(1)
            alive = rows.any(1)
            ctx.save_for_backward(torch.where(alive, place, torch.full_like(place, -1)))
            ctx.size = len(x)
            return torch.where(alive, y, torch.zeros_like(y))

        @staticmethod
        def backward(ctx, g):
            (place,) = ctx.saved_tensors
            if not wrong:
                g = torch.where(place >= 0, g, torch.zeros_like(g))
            place = place.remainder(ctx.size)
            return (
                torch.zeros(ctx.size, dtype=g.dtype, device=g.device).index_add(0, place, g),
                None,
                None,
            )

    def least(x, ids, count=4):
        sized("x", x, None)
        same(x, ids)
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(ids.dtype == torch.int64, "ids: expected int64")
        check(isinstance(count, int) and count >= 1, "count: expected a positive integer")
        indices("ids", ids, count)
        bounded("x", x, -1e6, 1e6)
        return Least.apply(x, ids, count)

    return least


add(
    "group_least_nothing",
    group_least,
    lambda: (real(8), torch.tensor([3, 0, 1, 0, 2, 2, 1, 3])),
    bug="A group without numbers has the place -1, at which backward adds its gradient: the last number's",
    trigger="a group without numbers",
)


# Edge convolution: nodes (N, D) take the largest of w [x_i, x_j - x_i] over their neighbours (N, K)
def edge_convolution(wrong):
    def edges(x, near):
        centre = x[:, None].expand(-1, near.shape[1], -1)
        return torch.cat([centre, x[near] - centre], -1)

    class Convolve(Function):
        @staticmethod
        def forward(ctx, x, w, near):
            y, place = (edges(x, near) @ w.mT).max(1)
            ctx.save_for_backward(x, w, near, place)
            return y

        @staticmethod
        def backward(ctx, g):
            x, w, near, place = ctx.saved_tensors
            grad = torch.zeros(*near.shape, len(w), dtype=x.dtype, device=x.device)
            grad = grad.scatter(1, place[:, None], g[:, None])
            grad_w = torch.einsum("nko,nkd->od", grad, edges(x, near))
            centre, apart = (grad @ w).chunk(2, -1)
            grad_x = (centre if wrong else centre - apart).sum(1)
            return grad_x.index_add(0, near.flatten(), apart.flatten(0, 1)), grad_w, None

    def convolve(x, w, near):
        sized("x", x, None, None)
        sized("w", w, None, 2 * x.shape[1])
        sized("near", near, len(x), None)
        alike(x, w)
        check(near.dtype == torch.int64, "near: expected int64")
        indices("near", near, len(x))
        bounded("x", x, -1e3, 1e3)
        bounded("w", w, -1e3, 1e3)
        return Convolve.apply(x, w, near)

    return convolve


add(
    "edge_convolution_centre",
    edge_convolution,
    lambda: (
        real(4, 2),
        real(3, 4, seed=1),
        torch.tensor([[1, 2], [2, 3], [0, 3], [0, 1]]),
    ),
    bug="A node's own gradient lacks its part in the differences from its neighbours",
)


# Chebyshev polynomials of a symmetric matrix (N, N) of a graph, applied to x (N, D), with weights (K,)
def chebyshev_filter(wrong):
    def polynomials(m, x, count, first):
        found = [x, m @ x]
        for i in range(2, count):
            found.append(2 * m @ found[-1] - found[0 if first else i - 2])
        return found[:count]

    class Filter(Function):
        @staticmethod
        def forward(ctx, x, theta, m):
            ctx.save_for_backward(x, theta, m)
            found = polynomials(m, x, len(theta), False)
            return sum(t * p for t, p in zip(theta, found, strict=True))

        @staticmethod
        def backward(ctx, g):
            x, theta, m = ctx.saved_tensors
            back = polynomials(m, g, len(theta), wrong)
            grad_x = sum(t * p for t, p in zip(theta, back, strict=True))
            return grad_x, torch.stack([(x * p).sum() for p in back]), None

    def apply(x, theta, m):
        sized("x", x, None, None)
        sized("theta", theta, None)
        sized("m", m, len(x), len(x))
        alike(x, theta, m)
        check(not m.requires_grad, "m: expected a constant matrix")
        check(len(theta) <= 16, "theta: expected 16 weights at most")
        bounded("m", m, -1 / len(x), 1 / len(x))
        check(torch.equal(m, m.mT), "m: expected a symmetric matrix")
        bounded("x", x, -1e3, 1e3)
        bounded("theta", theta, -1e3, 1e3)
        return Filter.apply(x, theta, m)

    return apply


def ring(n):
    """Return the matrix of a ring of n nodes, scaled."""
    eye = torch.eye(n, dtype=F64)
    return (eye.roll(1, 0) + eye.roll(-1, 0)) / (2 * n)


add(
    "chebyshev_filter_fourth",
    chebyshev_filter,
    lambda: (real(5, 2), real(3, seed=1), ring(5)),
    bug="Backward's recurrence subtracts the first polynomial, forward's the one before the last",
    trigger="four weights or more",
)


# How far rays (N, 3), (N, 3) run to the sphere around centre (3,) with radius (): 10 where they miss
def traced_depth(wrong):
    class Depth(Function):
        @staticmethod
        def forward(ctx, origin, ray, centre, radius):
            off = origin - centre
            a, b = (ray * ray).sum(-1), (ray * off).sum(-1)
            d = b * b - a * ((off * off).sum(-1) - radius * radius)
            t = (-b - d.clamp(min=0).sqrt()) / a
            hit = (d > 0) & (t > 0)
            ctx.save_for_backward(origin, ray, centre, radius, t, hit)
            return torch.where(hit, t, torch.full_like(t, 10))

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            origin, ray, centre, radius, t, hit = ctx.saved_tensors
            normal = origin + t[:, None] * ray - centre
            slope = (normal * ray).sum(-1)
            if not wrong:
                g, slope = g * hit, torch.where(hit, slope, torch.ones_like(slope))
            along = -g / slope
            grad = along[:, None] * normal
            return grad, t[:, None] * grad, -grad.sum(0), -(along * radius).sum()

    def trace(origin, ray, centre, radius):
        sized("origin", origin, None, 3)
        same(origin, ray)
        sized("centre", centre, 3)
        sized("radius", radius)
        alike(origin, ray, centre, radius)
        for name, t in {"origin": origin, "ray": ray, "centre": centre}.items():
            bounded(name, t, -100, 100)
        bounded("radius", radius, 0.1, 100)
        check(bool(((ray * ray).sum(-1) > 1e-3).all()), "ray: expected a length")
        return Depth.apply(origin, ray, centre, radius)

    return trace


add(
    "traced_depth_miss",
    traced_depth,
    lambda: (
        (real(4, 3, grad=False) * 0.2 - torch.tensor([0, 0, 4.0])).requires_grad_(),
        (real(4, 3, seed=1, grad=False) * 0.1 + torch.tensor([0, 0, 1.0])).requires_grad_(),
        (real(3, seed=2, grad=False) * 0.1).requires_grad_(),
        torch.tensor(2.0, dtype=F64, requires_grad=True),
    ),
    bug="Backward differentiates the equation of the hit for rays that miss, too",
    trigger="a ray that misses the sphere",
)


# Rotations (..., 3, 3) from two vectors (..., 3) each: normalised, made orthogonal, crossed
def two_vectors(wrong):
    def unit(v):
        r = torch.rsqrt((v * v).sum(-1, keepdim=True))
        return v * r, r

    def turned(y, r, g):
        return r * (g - y * (y * g).sum(-1, keepdim=True))

    def cross(a, b):
        dim = list(a.shape).index(3) if wrong else -1
        return torch.linalg.cross(a, b, dim=dim)

    class Rotation(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            x, _ = unit(a)
            y, _ = unit(b - (x * b).sum(-1, keepdim=True) * x)
            return torch.stack([x, y, torch.linalg.cross(x, y)], -2)

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            gx, gy, gz = g.unbind(-2)
            x, rx = unit(a)
            along = (x * b).sum(-1, keepdim=True)
            y, ry = unit(b - along * x)
            gx, gy = gx + cross(y, gz), gy + cross(gz, x)
            gv = turned(y, ry, gy)
            inner = (gv * x).sum(-1, keepdim=True)
            gx = gx - along * gv - inner * b
            return turned(x, rx, gx), gv - inner * x

    def rotate(a, b):
        check(a.ndim >= 1 and a.shape[-1] == 3, "a: expected three numbers in the last dimension")
        same(a, b)
        alike(a, b)
        bounded("a", a, -100, 100)
        bounded("b", b, -100, 100)
        normal = torch.linalg.cross(a.detach(), b.detach())
        check(bool((normal.abs().amax(-1) > 1e-3).all()), "a, b: expected two directions")
        return Rotation.apply(a, b)

    return rotate


add(
    "two_vectors_batch",
    two_vectors,
    lambda: (real(4, 3), real(4, 3, seed=1)),
    bug="Backward's cross product runs along the first dimension of size 3, as torch.cross did by default",
    trigger="a batch of three",
)


# Stillinger and Weber's energy of three bodies, of places (N, 3): angles at each atom, pairs within the reach
def angle_energy(wrong):
    def parts(x, reach, careful):
        d = x[None] - x[:, None]  # from i to j
        apart = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
        square = (d * d).sum(-1)
        r = torch.where(apart, square, torch.ones_like(square)).sqrt()
        near = apart & (r < reach)
        gap = torch.where(near, r - reach, torch.full_like(r, -1)) if careful else r - reach
        fade = torch.where(near if careful else apart, (1 / gap).exp(), torch.zeros_like(r))
        return d / r[..., None], r, gap, fade

    def angles(e):
        return torch.einsum("ijc,ikc->ijk", e, e) + 1 / 3

    class Energy(Function):
        @staticmethod
        def forward(ctx, x, reach):
            ctx.save_for_backward(x)
            ctx.reach = reach
            e, _, _, fade = parts(x, reach, True)
            pairs = fade[:, :, None] * fade[:, None] * angles(e) ** 2
            return (pairs.sum() - pairs.diagonal(dim1=1, dim2=2).sum()) / 2

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            e, r, gap, fade = parts(x, ctx.reach, not wrong)
            cos = angles(e)
            other = 1 - torch.eye(len(x), dtype=x.dtype, device=x.device)
            by_fade = (fade[:, None] * cos**2 * other).sum(-1)
            by_cos = 2 * fade[:, :, None] * fade[:, None] * cos * other
            by_e = by_cos @ e
            by_e = (by_e - e * (e * by_e).sum(-1, keepdim=True)) / r[..., None]
            grad_d = by_e - (by_fade * fade / gap**2)[..., None] * e
            return g * (grad_d.sum(0) - grad_d.sum(1)), None

    def energy(x, reach=4.0):
        sized("x", x, None, 3)
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(0.1 <= reach <= 100, "reach: expected 0.1 to 100")
        bounded("x", x, -100, 100)
        y = x.detach()
        square = (y[None] - y[:, None]).square().sum(-1) + torch.eye(len(y), device=y.device)
        check(bool((square > 1e-4).all()), "x: expected atoms apart")
        return Energy.apply(x, reach)

    return energy


add(
    "angle_energy_reach",
    angle_energy,
    lambda: ((real(4, 3, grad=False) * 0.5).requires_grad_(),),
    bug="Backward lets pairs beyond the reach count, which forward leaves out",
    trigger="atoms farther apart than the reach",
)


# The real part of Ewald's sum: half of q_i q_j erfc(alpha r) / r over pairs
def screened_charges(wrong):
    def parts(x, alpha):
        d = x[:, None] - x[None]
        square = (d * d).sum(-1)
        eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
        r = (square + eye).sqrt()
        return d, square, r, torch.special.erfc(alpha * r) / r * (1 - eye), 1 - eye

    class Energy(Function):
        @staticmethod
        def forward(ctx, x, q, alpha):
            ctx.save_for_backward(x, q, alpha)
            return (q[:, None] * q * parts(x, alpha)[3]).sum() / 2

        @staticmethod
        def backward(ctx, g):
            x, q, alpha = ctx.saved_tensors
            d, square, r, v, other = parts(x, alpha)
            bell = 1.1283791670955126 * torch.exp(-alpha * alpha * square)
            force = (v + alpha * bell * other) / (r * r) * q[:, None] * q
            grad_x = -(force[..., None] * d).sum(1)
            pairs = q[:, None] * q * bell
            grad_alpha = -(pairs if wrong else pairs * other).sum() / 2
            return g * grad_x, g * (v * q).sum(1), g * grad_alpha

    def energy(x, q, alpha):
        sized("x", x, None, 3)
        sized("q", q, len(x))
        sized("alpha", alpha)
        alike(x, q, alpha)
        bounded("x", x, -100, 100)
        bounded("q", q, -100, 100)
        bounded("alpha", alpha, 0.01, 10)
        y = x.detach()
        square = (y[None] - y[:, None]).square().sum(-1) + torch.eye(len(y), device=y.device)
        check(bool((square > 1e-4).all()), "x: expected charges apart")
        return Energy.apply(x, q, alpha)

    return energy


add(
    "screened_charges_alone",
    screened_charges,
    lambda: (
        real(4, 3),
        real(4, seed=1),
        torch.tensor(0.6, dtype=F64, requires_grad=True),
    ),
    bug="The screening's gradient counts each charge with itself",
)


# Distance of points (N, D) of Poincare's ball
def ball_distance(wrong):
    def parts(u, v):
        a, b = 1 - (u * u).sum(-1), 1 - (v * v).sum(-1)
        return a, b, 2 * ((u - v) ** 2).sum(-1) / (a * b)

    class Distance(Function):
        @staticmethod
        def forward(ctx, u, v):
            ctx.save_for_backward(u, v)
            _, _, z = parts(u, v)
            return torch.log1p(z + (z * (z + 2)).sqrt())

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            u, v = ctx.saved_tensors
            a, b, z = parts(u, v)
            root = (z * (z + 2)).sqrt()
            g = torch.where(root > 0, g / torch.where(root > 0, root, torch.ones_like(g)), 0 * g)
            apart = 4 * (u - v) / (a * b)[:, None]
            grad_u = apart + 2 * (z / a)[:, None] * u
            grad_v = 2 * (z / (a if wrong else b))[:, None] * v - apart
            return g[:, None] * grad_u, g[:, None] * grad_v

    def distance(u, v):
        sized("u", u, None, None)
        same(u, v)
        alike(u, v)
        for t in (u, v):
            check(bool(((t * t).sum(-1) < 0.98).all()), "u, v: expected points inside of the ball")
        return Distance.apply(u, v)

    return distance


add(
    "ball_distance_second",
    ball_distance,
    lambda: (
        (real(4, 3, grad=False).tanh() * 0.5).requires_grad_(),
        (real(4, 3, seed=1, grad=False).tanh() * 0.5).requires_grad_(),
    ),
    bug="The second point's gradient was copied from the first's, whose margin it still divides by",
)
