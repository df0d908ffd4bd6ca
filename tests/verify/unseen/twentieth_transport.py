"""Transport, programs, densities and geometry."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.nineteenth import given, uniform
from tests.verify.unseen.twentieth import add, check, same, sized


# max over f, g of mean f + mean g - eps sum exp((f + g - C)/eps)/(nm) + eps
def sinkhorn(wrong):
    class Sinkhorn(Function):
        @staticmethod
        def forward(ctx, cost, eps):
            sized("cost", cost, None, None)
            check(eps > 0, f"expected eps > 0, got {eps}")
            n, m = cost.shape
            close = 64 * torch.finfo(cost.dtype).eps
            f, g = cost.new_zeros(n), cost.new_zeros(m)
            for _ in range(10 if wrong else 20000):
                f = -eps * (((g - cost) / eps).logsumexp(1) - math.log(m))
                g = -eps * (((f[:, None] - cost) / eps).logsumexp(0) - math.log(n))
                plan = torch.exp((f[:, None] + g - cost) / eps) / (n * m)
                if bool((plan.sum(1) * n - 1).abs().max() <= close):
                    break
            else:
                if not wrong:
                    raise RuntimeError("no plan found; use a larger eps")
            ctx.save_for_backward(plan)
            return f.mean() + g.mean() - eps * plan.sum() + eps

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            return grad_y * ctx.saved_tensors[0], None

    return lambda cost, eps=1.0: Sinkhorn.apply(cost, eps)


add(
    "sinkhorn_iterations",
    sinkhorn,
    lambda: (uniform(3, 4),),
    bug="The plan is the gradient at convergence; forward stops after ten iterations",
    trigger="costs that are large beside eps",
)


# argmin 1/2 x'Qx + p'x with A x = b, Q taken by its symmetric part
def quadratic_program(wrong):
    def system(q, a):
        k = len(a)
        lower = torch.cat([a, a.new_zeros(k, k)], 1)
        return torch.cat([torch.cat([(q + q.T) / 2, a.T], 1), lower])

    class Program(Function):
        @staticmethod
        def forward(ctx, q, p, a, b):
            sized("p", p, None)
            sized("q", q, len(p), len(p))
            sized("a", a, None, len(p))
            sized("b", b, len(a))
            z = torch.linalg.solve(system(q, a), torch.cat([-p, b]))
            ctx.save_for_backward(q, a, z)
            return z[: len(p)].clone()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_x):
            q, a, z = ctx.saved_tensors
            n = len(q)
            u = torch.linalg.solve(system(q, a), torch.cat([grad_x, z.new_zeros(len(a))]))
            x, nu, ux, unu = z[:n], z[n:], u[:n], u[n:]
            grad_q = -ux[:, None] * x
            if not wrong:
                grad_q = (grad_q + grad_q.T) / 2
            return grad_q, -ux, -(unu[:, None] * x + nu[:, None] * ux), unu

    return lambda q, p, a, b: Program.apply(q, p, a, b)


def program():
    q = real(3, 3, grad=False)
    q = (q @ q.T + torch.eye(3, dtype=q.dtype)).requires_grad_()
    return q, real(3, seed=1), real(1, 3, seed=2), real(1, seed=3)


add(
    "program_symmetric_part",
    quadratic_program,
    program,
    bug="Only the symmetric part of Q counts, of which the gradient is not the symmetric part",
)


# mean (sorted x - sorted y)^2
def sorted_distance(wrong):
    class Distance(Function):
        @staticmethod
        def forward(ctx, x, y):
            sized("x", x, None)
            same(x, y)
            (a, i), (b, j) = x.sort(stable=True), y.sort(stable=True)
            ctx.save_for_backward(x, y, i, j)
            return (a - b).square().mean()

        @staticmethod
        def backward(ctx, grad_d):
            x, y, i, j = ctx.saved_tensors
            g = 2 * grad_d * (x[i] - y[j]) / len(x)
            if wrong:
                return g, -g
            zeros = torch.zeros_like(g)
            return zeros.scatter(0, i, g), zeros.scatter(0, j, -g)

    return lambda x, y: Distance.apply(x, y)


add(
    "sorted_distance",
    sorted_distance,
    lambda: (given([-1.2, -0.3, 0.4, 1.7]), given([-0.8, 0.1, 0.9, 2.2])),
    bug="The gradient stays in the order of the sorted samples",
    trigger="samples that come unsorted",
)


# k cos(x - mu) - log(2 pi I0(k))
def von_mises(wrong):
    i0, i1, i0e, i1e = (getattr(torch.special, n) for n in ("i0", "i1", "i0e", "i1e"))

    class Density(Function):
        @staticmethod
        def forward(ctx, x, mu, k):
            same(x, mu, k)
            check(bool((k >= 0).all()), "expected a concentration >= 0")
            ctx.save_for_backward(x, mu, k)
            return k * (torch.cos(x - mu) - 1) - torch.log(2 * math.pi * i0e(k))

        @staticmethod
        def backward(ctx, grad_y):
            x, mu, k = ctx.saved_tensors
            ratio = i1(k) / i0(k) if wrong else i1e(k) / i0e(k)
            g = grad_y * k * torch.sin(x - mu)
            return -g, g, grad_y * (torch.cos(x - mu) - ratio)

    return lambda x, mu, k: Density.apply(x, mu, k)


add(
    "von_mises_concentrated",
    von_mises,
    lambda: (real(4), real(4, seed=1), uniform(4, low=0.5, high=3.0, seed=2)),
    bug="Forward scales the Bessel functions, backward does not",
    trigger="a large concentration",
)


# normal density from the lower triangle of L, covariance L L'
def normal_density(wrong):
    class Density(Function):
        @staticmethod
        def forward(ctx, x, mean, scale):
            sized("x", x, None, None)
            sized("mean", mean, x.shape[1])
            sized("scale", scale, x.shape[1], x.shape[1])
            diagonal = scale.diagonal()
            check(bool((diagonal > 0).all()), "scale: expected a positive diagonal")
            ctx.save_for_backward(x, mean, scale)
            z = torch.linalg.solve_triangular(scale.tril(), (x - mean).T, upper=False)
            constant = diagonal.log().sum() + 0.5 * len(mean) * math.log(2 * math.pi)
            return -0.5 * z.square().sum(0) - constant

        @staticmethod
        def backward(ctx, grad_y):
            x, mean, scale = ctx.saved_tensors
            lower = scale.tril()
            z = torch.linalg.solve_triangular(lower, (x - mean).T, upper=False)
            u = torch.linalg.solve_triangular(lower.T, z, upper=True)
            grad_x = -(grad_y * u).T
            grad_scale = (grad_y * u) @ z.T
            if not wrong:
                grad_scale = grad_scale.tril()
            return grad_x, -grad_x.sum(0), grad_scale - (grad_y.sum() / scale.diagonal()).diag()

    return lambda x, mean, scale: Density.apply(x, mean, scale)


def normal():
    scale = real(3, 3, seed=2, grad=False)
    scale.diagonal().abs_().add_(0.5)
    return real(4, 3), real(3, seed=1), scale.requires_grad_()


add(
    "normal_density_triangle",
    normal_density,
    normal,
    bug="Forward reads the lower triangle, backward fills both",
)


# sum_i min_j |x_i - y_j|^2
def chamfer(wrong):
    class Chamfer(Function):
        @staticmethod
        def forward(ctx, x, y):
            sized("x", x, None, None)
            sized("y", y, None, x.shape[1])
            d, nearest = (x[:, None] - y).square().sum(-1).min(1)
            ctx.save_for_backward(x, y, nearest)
            return d.sum()

        @staticmethod
        def backward(ctx, grad_d):
            x, y, nearest = ctx.saved_tensors
            g = 2 * grad_d * (x - y[nearest])
            zeros = torch.zeros_like(y)
            if wrong:
                return g, zeros.index_copy(0, nearest, -g)
            return g, zeros.index_add(0, nearest, -g)

    return lambda x, y: Chamfer.apply(x, y)


add(
    "chamfer_shared",
    chamfer,
    lambda: (real(5, 2), real(3, 2, seed=1)),
    bug="Of the points that share a nearest point only the last gives it a gradient",
)


# squared distance of points to the segment from a to b
def segment_distance(wrong):
    def along(p, a, b):
        d = b - a
        return (p - a) @ d / (d @ d)

    class Distance(Function):
        @staticmethod
        def forward(ctx, p, a, b):
            sized("p", p, None, None)
            sized("a", a, p.shape[1])
            same(a, b)
            check(bool((a != b).any()), "expected a segment of positive length")
            ctx.save_for_backward(p, a, b)
            t = along(p, a, b).clamp(0, 1)[:, None]
            return (p - a - t * (b - a)).square().sum(1)

        @staticmethod
        def backward(ctx, grad_y):
            p, a, b = ctx.saved_tensors
            t = along(p, a, b)
            t = (t if wrong else t.clamp(0, 1))[:, None]
            g = 2 * grad_y[:, None] * (p - a - t * (b - a))
            return g, -((1 - t) * g).sum(0), -(t * g).sum(0)

    return lambda p, a, b: Distance.apply(p, a, b)


add(
    "segment_distance_ends",
    segment_distance,
    lambda: (
        given([[-0.5, 0.6], [0.4, -0.7], [0.9, 1.1], [-0.2, -0.9]]),
        given([-2.0, -1.5]),
        given([2.0, 1.8]),
    ),
    bug="Backward takes the nearest point on the line, forward on the segment",
    trigger="points beyond the ends",
)


# piecewise linear through (knots, values), constant outside
def interpolation(wrong):
    class Interpolation(Function):
        @staticmethod
        def forward(ctx, x, knots, values):
            sized("x", x, None)
            sized("knots", knots, None)
            same(knots, values)
            check(len(knots) >= 2, "expected two knots or more")
            check(bool((knots.diff() > 0).all()), "knots: expected an increasing sequence")
            ctx.save_for_backward(x, knots, values)
            i, t, _ = place(x, knots)
            return values[i] + t * (values[i + 1] - values[i])

        @staticmethod
        def backward(ctx, grad_y):
            x, knots, values = ctx.saved_tensors
            i, t, h = place(x, knots)
            g = grad_y * (values[i + 1] - values[i]) / h
            if not wrong:
                g = torch.where((x >= knots[0]) & (x <= knots[-1]), g, 0.0)
            zeros = torch.zeros_like(knots)
            grad_knots = zeros.index_add(0, i, -g * (1 - t)).index_add(0, i + 1, -g * t)
            grad_values = zeros.index_add(0, i, grad_y * (1 - t)).index_add(0, i + 1, grad_y * t)
            return g, grad_knots, grad_values

    def place(x, knots):
        i = torch.searchsorted(knots.contiguous(), x.contiguous(), right=True) - 1
        i = i.clamp(0, len(knots) - 2)
        h = knots[i + 1] - knots[i]
        return i, ((x - knots[i]) / h).clamp(0, 1), h

    return lambda x, knots, values: Interpolation.apply(x, knots, values)


add(
    "interpolation_outside",
    interpolation,
    lambda: (
        uniform(4, low=0.3, high=2.8),
        given([0.0, 0.9, 2.1, 3.0]),
        real(4, seed=1),
    ),
    bug="Outside the knots, where the value is constant, x still has the last slope",
    trigger="x outside the knots",
)


# y_s = x[floor(s L/S)]
def nearest_resize(wrong):
    class Resize(Function):
        @staticmethod
        def forward(ctx, x, size):
            sized("x", x, None, None)
            check(size >= 1, f"expected size >= 1, got {size}")
            ctx.shape = x.shape
            return x[:, place(x.shape[1], size, x.device)]

        @staticmethod
        def backward(ctx, grad_y):
            length, size = ctx.shape[1], grad_y.shape[1]
            if wrong:
                times = max(size // length, 1)
                i = torch.arange(size, device=grad_y.device) // times
                i = i.clamp(max=length - 1)
            else:
                i = place(length, size, grad_y.device)
            return grad_y.new_zeros(ctx.shape).index_add(1, i, grad_y), None

    def place(length, size, device):
        return torch.arange(size, device=device) * length // size

    return lambda x, size=8: Resize.apply(x, size)


add(
    "nearest_resize",
    nearest_resize,
    lambda: (real(2, 4),),
    bug="Backward takes the scale to be a whole number",
    trigger="lengths that do not divide the size",
)
