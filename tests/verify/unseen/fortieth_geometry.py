"""Rotations, splats, cells, trajectories, interpolation."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fortieth import add, alike, bounded, check, same, sized


# Quaternions (N, 4), real part first, of rotation vectors (N, 3)
def rotation_vector(wrong):
    def halves(v):
        """Return cos, sin over angle, and the slope of the latter over angle, of half the angle."""
        square = v.square().sum(1, keepdim=True)
        small = square < 0.1
        safe = torch.where(small, 1, square)
        angle = safe.sqrt()
        near = torch.where(small, square, 0)
        cos = sin = slope = 0
        for k in range(7):
            c = (-1) ** k / 4**k
            cos = cos + c / math.factorial(2 * k) * near**k
            sin = sin + c / 2 / math.factorial(2 * k + 1) * near**k
            if k:
                slope = slope + c * k / math.factorial(2 * k + 1) * near ** (k - 1)
        far = torch.sin(angle / 2) / angle
        cos = torch.where(small, cos, torch.cos(angle / 2))
        slope = torch.where(small, slope, (torch.cos(angle / 2) / 2 - far) / safe)
        return cos, torch.where(small, sin, far), slope

    class Quaternion(Function):
        @staticmethod
        def forward(ctx, v):
            ctx.save_for_backward(v)
            cos, sin, _ = halves(v)
            return torch.cat([cos, sin * v], 1)

        @staticmethod
        def backward(ctx, g):
            (v,) = ctx.saved_tensors
            _, sin, slope = halves(v)
            if wrong:
                slope = slope + 0 * v.square().sum(1, keepdim=True).rsqrt()
            along = (g[:, 1:] * v).sum(1, keepdim=True)
            return g[:, 1:] * sin + v * (along * slope - g[:, :1] * sin / 2)

    def quaternion(v):
        sized("v", v, None, 3)
        check(v.is_floating_point(), "v: expected floating point numbers")
        bounded("v", v, -100, 100)
        return Quaternion.apply(v)

    return quaternion


add(
    "rotation_vector",
    rotation_vector,
    lambda: (real(3, 3),),
    bug="the angle's root has an infinite slope where there is no rotation: NaN "
    "(kornia/kornia#3949)",
    trigger="a vector of zeros",
)


# The depth where the rays through pixels (N, 2) meet planes, whose rows u, v, w are (N, 3)
def plane_depth(wrong):
    def meet(u, v, w, pixel):
        across = pixel[:, :1] * w - u
        down = pixel[:, 1:] * w - v
        return across, down, torch.linalg.cross(across, down)

    class Depth(Function):
        @staticmethod
        def forward(ctx, u, v, w, pixel):
            ctx.save_for_backward(u, v, w, pixel)
            c = meet(u, v, w, pixel)[2]
            return (c[:, :2] / c[:, 2:] * w[:, :2]).sum(1) + w[:, 2]

        @staticmethod
        def backward(ctx, g):
            u, v, w, pixel = ctx.saved_tensors
            across, down, c = meet(u, v, w, pixel)
            place = c[:, :2] / c[:, 2:]
            g = g[:, None]
            grad_w = g * torch.cat([place, torch.ones_like(g)], 1)
            grad_place = g * w[:, :2] / c[:, 2:]
            if wrong:
                grad_place = torch.zeros_like(grad_place)
            grad_c = torch.cat([grad_place, -(grad_place * place).sum(1, keepdim=True)], 1)
            grad_across = torch.linalg.cross(down, grad_c)
            grad_down = torch.linalg.cross(grad_c, across)
            grad_w = grad_w + pixel[:, :1] * grad_across + pixel[:, 1:] * grad_down
            grad_pixel = torch.stack([(w * grad_across).sum(1), (w * grad_down).sum(1)], 1)
            return -grad_across, -grad_down, grad_w, grad_pixel

    def depth(u, v, w, pixel):
        sized("u", u, None, 3)
        same(u, v, w)
        sized("pixel", pixel, len(u), 2)
        alike(u, v, w, pixel)
        for name, t in (("u", u), ("v", v), ("w", w), ("pixel", pixel)):
            bounded(name, t, -100, 100)
        flat = meet(u.detach(), v.detach(), w.detach(), pixel.detach())[2][:, 2].abs()
        check(bool((flat >= 1e-2).all()), "expected planes that are not seen edge-on")
        return Depth.apply(u, v, w, pixel)

    return depth


add(
    "plane_depth",
    plane_depth,
    lambda: (
        real(2, 3),
        real(2, 3, seed=1),
        real(2, 3, seed=2),
        torch.tensor([[0.5, -0.3], [1.0, 0.2]]).double(),
    ),
    bug="the point where ray and plane meet is taken for a constant in the depth's gradient "
    "(nerfstudio-project/gsplat#932)",
)


# The energy of charges (N) in a cell: pairs at relative distances (N, N), and the background
def charged_cell(wrong):
    alpha = 0.8

    def pairs(charge, apart):
        other = 1 - torch.eye(len(charge), dtype=apart.dtype, device=apart.device)
        return torch.outer(charge, charge) * other / 2

    def background(charge, size):
        return math.pi * charge.sum() ** 2 / (2 * alpha**2 * size**3)

    class Energy(Function):
        @staticmethod
        def forward(ctx, charge, apart, size):
            ctx.save_for_backward(charge, apart, size)
            return (pairs(charge, apart) / apart).sum() / size - background(charge, size)

        @staticmethod
        def backward(ctx, g):
            charge, apart, size = ctx.saved_tensors
            rate = pairs(charge, apart) / apart
            other = 1 - torch.eye(len(charge), dtype=apart.dtype, device=apart.device)
            near = other / apart
            by_charge = (near + near.mT) @ charge / (2 * size)
            by_charge = by_charge - math.pi * charge.sum() / (alpha**2 * size**3)
            by_size = -rate.sum() / size**2
            if not wrong:
                by_size = by_size + 3 * background(charge, size) / size
            return g * by_charge, -g * rate / apart / size, g * by_size

    def energy(charge, apart, size):
        sized("charge", charge, None)
        sized("apart", apart, len(charge), len(charge))
        sized("size", size)
        alike(charge, apart, size)
        bounded("charge", charge, -100, 100)
        bounded("apart", apart, 1e-2, 100)
        bounded("size", size, 0.1, 100)
        return Energy.apply(charge, apart, size)

    return energy


add(
    "charged_cell",
    charged_cell,
    lambda: (
        torch.tensor([1.0, -0.5, -0.5]).double().requires_grad_(),
        real(3, 3, seed=1, positive=True),
        torch.tensor(2.0).double().requires_grad_(),
    ),
    bug="the background's energy depends on the cell, but gives it no gradient "
    "(NVIDIA/nvalchemi-toolkit-ops#61)",
    trigger="charges that do not sum up to 0",
)


# Euler's steps of y' = A y, with the start among the states that are returned
def first_state(wrong):
    def states(y, a, step, steps):
        every = [y]
        for _ in range(steps):
            every.append(every[-1] + step * a @ every[-1])
        return torch.stack(every)

    class Flow(Function):
        @staticmethod
        def forward(ctx, y, a, step, steps):
            ctx.save_for_backward(y, a)
            ctx.step, ctx.steps = step, steps
            return states(y, a, step, steps)

        @staticmethod
        def backward(ctx, g):
            y, a = ctx.saved_tensors
            step, steps = ctx.step, ctx.steps
            every = states(y, a, step, steps)
            back, grad_a = g[steps], torch.zeros_like(a)
            for t in reversed(range(steps)):
                grad_a = grad_a + step * torch.outer(back, every[t])
                back = back + step * a.mT @ back
                if t or not wrong:
                    back = back + g[t]
            return back, grad_a, None, None

    def flow(y, a, step=0.1, steps=3):
        sized("y", y, None)
        sized("a", a, len(y), len(y))
        alike(y, a)
        check(isinstance(steps, int) and 1 <= steps <= 100, "steps: expected 1 to 100")
        check(0 < step <= 1, "step: expected a number from above 0 to 1")
        bounded("y", y, -100, 100)
        bounded("a", a, -3, 3)
        return Flow.apply(y, a, step, steps)

    return flow


add(
    "first_state",
    first_state,
    lambda: (real(2), real(2, 2, seed=1)),
    bug="the adjoint's loop leaves out what comes in at the first time (pymc-devs/sunode#35)",
)


def cell_of(place, length):
    first = place.detach().floor().clamp(0, length - 2).long()
    return first, place - first


# Linear samples of x (B, L, C) at places (B, M)
def channels_last(wrong):
    def rows(x, at):
        return x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))

    class Sample(Function):
        @staticmethod
        def forward(ctx, x, place):
            ctx.save_for_backward(x, place)
            first, rest = cell_of(place, x.shape[1])
            return torch.lerp(rows(x, first), rows(x, first + 1), rest[..., None])

        @staticmethod
        def backward(ctx, g):
            x, place = ctx.saved_tensors
            first, rest = cell_of(place, x.shape[1])
            grad_place = (g * (rows(x, first + 1) - rows(x, first))).sum(-1)
            if wrong:
                g = g.reshape(len(g), g.shape[2], g.shape[1]).mT
            at = first[..., None].expand_as(g)
            grad_x = torch.zeros_like(x).scatter_add(1, at, g * (1 - rest[..., None]))
            return grad_x.scatter_add(1, at + 1, g * rest[..., None]), grad_place

    def sample(x, place):
        sized("x", x, None, None, None)
        check(x.shape[1] >= 2, "x: expected a length of 2 or more")
        sized("place", place, len(x), None)
        alike(x, place)
        bounded("x", x, -1e3, 1e3)
        bounded("place", place, 0, x.shape[1] - 1)
        return Sample.apply(x, place)

    return sample


add(
    "channels_last",
    channels_last,
    lambda: (
        real(1, 4, 2),
        torch.tensor([[0.3, 2.6, 1.1]]).double().requires_grad_(),
    ),
    bug="backward takes the channels to come first, where they come last (ooples/AiDotNet#689)",
    trigger="a grad_output that is not constant",
)


# Bilinear values of a table (X, Y) at x and y (N)
def bilinear_table(wrong):
    def corners(table, i, j):
        return table[i, j], table[i, j + 1], table[i + 1, j], table[i + 1, j + 1]

    class Bilinear(Function):
        @staticmethod
        def forward(ctx, table, x, y):
            ctx.save_for_backward(table, x, y)
            (i, s), (j, t) = cell_of(x, table.shape[0]), cell_of(y, table.shape[1])
            a, b, c, d = corners(table, i, j)
            return (1 - s) * ((1 - t) * a + t * b) + s * ((1 - t) * c + t * d)

        @staticmethod
        def backward(ctx, g):
            table, x, y = ctx.saved_tensors
            (i, s), (j, t) = cell_of(x, table.shape[0]), cell_of(y, table.shape[1])
            a, b, c, d = corners(table, i, j)
            by_x = (1 - t) * (c - a) + t * (d - b)
            low = (1 - s) * a + s * (b if wrong else c)
            by_y = (1 - s) * b + s * d - low
            grad = torch.zeros_like(table)
            for di, u in ((0, 1 - s), (1, s)):
                for dj, v in ((0, 1 - t), (1, t)):
                    grad = grad.index_put((i + di, j + dj), g * u * v, accumulate=True)
            return grad, g * by_x, g * by_y

    def interpolate(table, x, y):
        sized("table", table, None, None)
        check(min(table.shape) >= 2, "table: expected two rows and columns or more")
        sized("x", x, None)
        same(x, y)
        alike(table, x, y)
        bounded("table", table, -1e3, 1e3)
        bounded("x", x, 0, table.shape[0] - 1)
        bounded("y", y, 0, table.shape[1] - 1)
        return Bilinear.apply(table, x, y)

    return interpolate


add(
    "bilinear_table",
    bilinear_table,
    lambda: (
        real(3, 4),
        torch.tensor([0.4, 1.7]).double().requires_grad_(),
        torch.tensor([2.2, 0.6]).double().requires_grad_(),
    ),
    bug="the derivative by y reads the wrong corner of the cell (econ-ark/HARK#156)",
)
