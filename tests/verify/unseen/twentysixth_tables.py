"""Tables, splines, clusters and graphs."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.twentysixth import add, check, finite, indices, read_flat, sized


# Catmull-Rom spline through points (K, D) at places from 0 to K - 1
def spline(wrong):
    def parts(points, t):
        place = t.clamp(0, len(points) - 1)
        i = place.detach().floor().clamp(max=len(points) - 2).long()
        near = (i[:, None] + torch.arange(-1, 3, device=t.device)).clamp(0, len(points) - 1)
        return place - i, near

    class Spline(Function):
        @staticmethod
        def forward(ctx, points, t):
            ctx.save_for_backward(points, t)
            s, near = parts(points, t)
            return (weights(s)[..., None] * points[near]).sum(1)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            points, t = ctx.saved_tensors
            s, near = parts(points, t)
            moved = weights(s)[..., None] * grad_y[:, None]
            grad_points = torch.zeros_like(points)
            grad_points.index_add_(0, near.flatten(), moved.flatten(0, 1))
            grad_t = (slopes(s)[..., None] * points[near] * grad_y[:, None]).sum((1, 2))
            if not wrong:
                grad_t = grad_t * ((t >= 0) & (t <= len(points) - 1))
            return grad_points, grad_t

    def weights(s):
        a, b = (2 * s * s - s**3 - s) / 2, (3 * s**3 - 5 * s * s + 2) / 2
        return torch.stack((a, b, (4 * s * s - 3 * s**3 + s) / 2, (s**3 - s * s) / 2), -1)

    def slopes(s):
        a, b = (4 * s - 3 * s * s - 1) / 2, (9 * s * s - 10 * s) / 2
        return torch.stack((a, b, (8 * s - 9 * s * s + 1) / 2, (3 * s * s - 2 * s) / 2), -1)

    def curve(points, t):
        sized("points", points, None, None)
        check(len(points) >= 2, "points: expected two or more")
        sized("t", t, None)
        finite(t=t)
        return Spline.apply(points, t)

    return curve


add(
    "spline_beyond",
    spline,
    lambda: (real(5, 2), torch.tensor([0.3, 1.6, 3.2], dtype=F64, requires_grad=True)),
    bug="Forward clamps the place to the curve's ends, backward goes on with the slope there",
    trigger="places beyond the ends",
)


# A table on [0, 1], read in between its places
def table(wrong):
    class Table(Function):
        @staticmethod
        def forward(ctx, x, values):
            ctx.save_for_backward(x, values)
            _, s, left, right = Table.read(x, values)
            return left + s * (right - left)

        @staticmethod
        def read(x, values):
            place = x * (len(values) - 1)
            i = place.detach().floor().clamp(max=len(values) - 2).long()
            if wrong:
                values = read_flat(values)
            return i, place - i, values[i], values[i + 1]

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, values = ctx.saved_tensors
            i, s, left, right = Table.read(x, values)
            grad_values = torch.zeros_like(values)
            grad_values.index_add_(0, i, grad_y * (1 - s))
            grad_values.index_add_(0, i + 1, grad_y * s)
            return grad_y * (right - left) * (len(values) - 1), grad_values

    def read(x, values):
        sized("x", x, None)
        sized("values", values, None)
        check(len(values) >= 2, "values: expected two or more")
        check(bool(((x >= 0) & (x <= 1)).all()), "x: expected numbers from 0 to 1")
        return Table.apply(x.contiguous(), values)

    return read


add(
    "table_column",
    table,
    lambda: (torch.tensor([0.1, 0.6, 0.9], dtype=F64, requires_grad=True), real(5)),
    bug="The kernel is given the places as contiguous, the table as it is, and reads it in order",
    trigger="a table that is a column of a matrix",
)


# Straight lines between knots
def knotted(wrong):
    def parts(x, knots, values):
        i = (torch.searchsorted(knots.detach(), x.detach(), right=True) - 1).clamp(
            0, len(knots) - 2
        )
        width = knots[i + 1] - knots[i]
        return i, width, (x - knots[i]) / width, values[i + 1] - values[i]

    def put(grad, places, parts):
        for place, part in zip(places, parts, strict=True):
            if wrong:
                grad[place] += part
            else:
                grad.index_add_(0, place, part)
        return grad

    class Lines(Function):
        @staticmethod
        def forward(ctx, x, knots, values):
            ctx.save_for_backward(x, knots, values)
            i, _, s, rise = parts(x, knots, values)
            return values[i] + s * rise

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, knots, values = ctx.saved_tensors
            i, width, s, rise = parts(x, knots, values)
            slope = grad_y * rise / width
            grad_values = (grad_y * (1 - s), grad_y * s)
            grad_knots = (-slope * (1 - s), -slope * s)
            places = i, i + 1
            return (
                slope,
                put(torch.zeros_like(knots), places, grad_knots),
                put(torch.zeros_like(values), places, grad_values),
            )

    def lines(x, knots, values):
        sized("x", x, None)
        sized("knots", knots, None)
        check(len(knots) >= 2, "knots: expected two or more")
        sized("values", values, len(knots))
        check(bool((knots.diff() > 0).all()), "knots: expected rising numbers")
        inside = (x >= knots[0]) & (x <= knots[-1])
        check(bool(inside.all()), "x: expected numbers between the knots")
        return Lines.apply(x.contiguous(), knots.contiguous(), values)

    return lines


add(
    "knotted_interval",
    knotted,
    lambda: (
        torch.tensor([0.4, 1.7, 4.2], dtype=F64, requires_grad=True),
        torch.tensor([0, 1.2, 2, 3.5, 5], dtype=F64, requires_grad=True),
        real(5),
    ),
    bug="Gradients are added at the knots by an indexed +=, which keeps one of several",
    trigger="two places in one interval",
)


# Soft assignment of points to centres by Student's t kernel
def assignment(wrong):
    def squares(z, centres):
        if wrong:
            norms = z.square().sum(-1)[:, None] + centres.square().sum(-1)
            return (norms - 2 * z @ centres.mT).clamp(min=0)
        return (z[:, None] - centres).square().sum(-1)

    class Assignment(Function):
        @staticmethod
        def forward(ctx, z, centres):
            ctx.save_for_backward(z, centres)
            return torch.softmax(-squares(z, centres).log1p(), -1)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            z, centres = ctx.saved_tensors
            d = squares(z, centres)
            q = torch.softmax(-d.log1p(), -1)
            grad_log = q * (grad_y - (grad_y * q).sum(-1, keepdim=True))
            pull = -2 * (grad_log / (1 + d))[..., None] * (z[:, None] - centres)
            return pull.sum(1), -pull.sum(0)

    def assign(z, centres):
        sized("z", z, None, None)
        sized("centres", centres, None, z.shape[1])
        check(bool((z.abs() < 1e15).all()), "z: expected numbers below 1e15")
        check(bool((centres.abs() < 1e15).all()), "centres: expected numbers below 1e15")
        return Assignment.apply(z, centres)

    return assign


add(
    "assignment_expanded",
    assignment,
    lambda: (real(4, 2), real(3, 2, seed=1)),
    bug="Distances are had by |z|² + |c|² - 2 z c, which rounds what is left of them",
    trigger="float32 and points far from the origin",
)


# Differences of nodes' features along edges
def differences(wrong):
    class Differences(Function):
        @staticmethod
        def forward(ctx, x, source, target):
            ctx.save_for_backward(source, target)
            ctx.nodes = len(x)
            return x[source] - x[target]

        @staticmethod
        def backward(ctx, grad_y):
            source, target = ctx.saved_tensors
            nodes = int(torch.maximum(source, target).max()) + 1 if wrong else ctx.nodes
            grad_x = grad_y.new_zeros(nodes, grad_y.shape[1])
            grad_x = grad_x.index_add(0, source, grad_y)
            return grad_x.index_add(0, target, -grad_y), None, None

    def along(x, source, target):
        sized("x", x, None, None)
        for name, t in (("source", source), ("target", target)):
            check(t.ndim == 1, f"{name}: expected one dimension")
            indices(name, t, len(x))
        check(len(source) == len(target), "expected as many sources as targets")
        return Differences.apply(x, source, target)

    return along


add(
    "differences_last_node",
    differences,
    lambda: (real(4, 2), torch.tensor([0, 1, 2, 1]), torch.tensor([1, 2, 3, 0])),
    bug="The number of nodes is taken from the largest index",
    trigger="a last node without edges, or no edges",
)


# (A + I) scaled by the square roots of its degrees on both sides
def scaled_adjacency(wrong):
    class Scaled(Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            looped = a + torch.eye(len(a), device=a.device, dtype=a.dtype)
            s = looped.sum(1).rsqrt()
            return s[:, None] * looped * s

        @staticmethod
        def backward(ctx, grad_y):
            (a,) = ctx.saved_tensors
            looped = a + torch.eye(len(a), device=a.device, dtype=a.dtype)
            degree = looped.sum(1)
            s = degree.rsqrt()
            weighted = grad_y * looped
            grad_s = weighted @ s + weighted.mT @ s
            grad_a = s[:, None] * grad_y * s - (grad_s * s / degree / 2)[:, None]
            return (grad_a + grad_a.mT) / 2 if wrong else grad_a

    def scaled(a):
        sized("a", a, None, len(a))
        check(bool((a >= 0).all()), "a: expected no negative weights")
        return Scaled.apply(a)

    return scaled


add(
    "scaled_adjacency_directed",
    scaled_adjacency,
    lambda: (real(3, 3, positive=True),),
    bug="The gradient is made symmetric, as the author's graphs are",
    trigger="any grad_output that is not symmetric",
)
