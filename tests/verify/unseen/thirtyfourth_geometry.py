"""Geometry: registration, rotations, meshes, point sets, normals, periodic boxes."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.thirtyfourth import add, alike, bounded, check, indices, same, sized


# Point-to-plane residuals of a registration: n · (R p + t - q)
def plane_residuals(wrong):
    class Residuals(Function):
        @staticmethod
        def forward(ctx, p, q, n, rotation, shift):
            ctx.save_for_backward(p, q, n, rotation, shift)
            return ((p @ rotation.mT + shift - q) * n).sum(-1)

        @staticmethod
        def backward(ctx, grad_r):
            p, q, n, rotation, shift = ctx.saved_tensors
            along = grad_r[:, None] * n
            grad_rotation = grad_shift = None
            if ctx.needs_input_grad[3]:
                grad_rotation = along.mT @ p
            if ctx.needs_input_grad[3 if wrong else 4]:
                grad_shift = along.sum(0)
            grad_n = grad_r[:, None] * (p @ rotation.mT + shift - q)
            return along @ rotation, -along, grad_n, grad_rotation, grad_shift

    def residuals(p, q, n, rotation, shift):
        sized("p", p, None, 3)
        same(p, q, n)
        sized("rotation", rotation, 3, 3)
        sized("shift", shift, 3)
        alike(p, q, n, rotation, shift)
        for name, t in {"p": p, "q": q, "n": n, "rotation": rotation, "shift": shift}.items():
            bounded(name, t, -1e3, 1e3)
        return Residuals.apply(p, q, n, rotation, shift)

    return residuals


add(
    "plane_residuals_needs",
    plane_residuals,
    lambda: (
        real(5, 3),
        real(5, 3, seed=1),
        F.normalize(real(5, 3, seed=2, grad=False), dim=-1).requires_grad_(),
        torch.linalg.qr(real(3, 3, seed=3, grad=False))[0].requires_grad_(),
        real(3, seed=4),
    ),
    bug="The shift's gradient is computed where the rotation needs one",
    trigger="a shift that requires grad, with a rotation that does not",
)


# Axis times angle of rotation matrices, of angles from about 0.15 to 3
def rotation_log(wrong):
    class Log(Function):
        @staticmethod
        def forward(ctx, r):
            ctx.save_for_backward(r)
            c = (r.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
            return scale(c)[..., None] * vee(r)

        @staticmethod
        def backward(ctx, grad_w):
            (r,) = ctx.saved_tensors
            c = (r.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
            g = scale(c)[..., None] * grad_w
            x, y, z = g.unbind(-1)
            zero = torch.zeros_like(x)
            grad_r = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
            if not wrong:
                angle, square = c.acos(), 1 - c * c
                slope = (angle * c / square.sqrt() - 1) / square / 2
                along = (grad_w * vee(r)).sum(-1) * slope / 2
                grad_r = grad_r + along[..., None, None] * torch.eye(
                    3, dtype=r.dtype, device=r.device
                )
            return grad_r

    def scale(c):
        return c.acos() / (1 - c * c).sqrt() / 2

    def vee(r):
        return torch.stack(
            [
                r[..., 2, 1] - r[..., 1, 2],
                r[..., 0, 2] - r[..., 2, 0],
                r[..., 1, 0] - r[..., 0, 1],
            ],
            -1,
        )

    def log(r):
        sized("r", r, None, 3, 3)
        bounded("r", r, -1.1, 1.1)
        trace = r.detach().diagonal(dim1=-2, dim2=-1).sum(-1)
        bounded("trace", trace, -0.98, 2.98)
        return Log.apply(r)

    return log


add(
    "rotation_log_angle",
    rotation_log,
    lambda: (
        torch.linalg.matrix_exp(
            torch.tensor(
                [
                    [[0, -0.3, 0.7], [0.3, 0, -0.5], [-0.7, 0.5, 0]],
                    [[0, 1.1, 0.2], [-1.1, 0, 0.9], [-0.2, -0.9, 0]],
                ],
                dtype=torch.float64,
            )
        ).requires_grad_(),
    ),
    bug="Backward leaves out that the factor depends on the trace",
)


# One step of Laplacian smoothing; edges lead from a vertex (first) to a neighbour that it averages (second)
def smoothing(wrong):
    class Smooth(Function):
        @staticmethod
        def forward(ctx, v, edges, strength):
            ctx.save_for_backward(edges)
            ctx.strength = strength
            degree = torch.bincount(edges[:, 0], minlength=len(v)).to(v.dtype)[:, None]
            total = torch.zeros_like(v).index_add(0, edges[:, 0], v[edges[:, 1]])
            return torch.where(degree > 0, v + strength * (total / degree.clamp(min=1) - v), v)

        @staticmethod
        def backward(ctx, grad_y):
            (edges,) = ctx.saved_tensors
            degree = torch.bincount(edges[:, 0], minlength=len(grad_y)).to(grad_y.dtype)[:, None]
            share = grad_y * ctx.strength
            if wrong:
                back = torch.zeros_like(grad_y).index_add(0, edges[:, 1], share[edges[:, 0]])
                back = back / degree.clamp(min=1)
            else:
                share = share / degree.clamp(min=1)
                back = torch.zeros_like(grad_y).index_add(0, edges[:, 1], share[edges[:, 0]])
            kept = torch.where(degree > 0, (1 - ctx.strength) * grad_y, grad_y)
            return kept + back, None, None

    def smooth(v, edges, strength=0.5):
        sized("v", v, None, 3)
        sized("edges", edges, None, 2)
        indices("edges", edges, len(v))
        check(0 <= strength <= 1, "strength: expected a number from 0 to 1")
        bounded("v", v, -1e4, 1e4)
        return Smooth.apply(v, edges, strength)

    return smooth


add(
    "smoothing_degree",
    smoothing,
    lambda: (
        real(5, 3),
        torch.tensor(
            [[0, 1], [1, 0], [0, 2], [2, 0], [0, 3], [3, 0], [1, 2], [2, 1], [3, 4], [4, 3]]
        ),
    ),
    bug="Backward divides by the degree of the vertex that receives, not of the one that averaged",
)


# Points rotated by quaternions (w, x, y, z), which are brought to length 1 first
def quaternion_rotate(wrong):
    def turn(u, v):
        w, axis = u[:, :1], u[:, 1:]
        t = 2 * torch.linalg.cross(axis, v)
        return v + w * t + torch.linalg.cross(axis, t)

    class Rotate(Function):
        @staticmethod
        def forward(ctx, q, v):
            ctx.save_for_backward(q, v)
            return turn(q / q.norm(dim=-1, keepdim=True), v)

        @staticmethod
        def backward(ctx, g):
            q, v = ctx.saved_tensors
            length = q.norm(dim=-1, keepdim=True)
            u = q / length
            w, axis = u[:, :1], u[:, 1:]
            inverse = torch.cat([w, -axis], -1)
            grad_w = 2 * (g * torch.linalg.cross(axis, v)).sum(-1, keepdim=True)
            grad_axis = 2 * w * torch.linalg.cross(v, g)
            # axis x (axis x v) = axis (axis · v) - v (axis · axis)
            grad_axis = grad_axis + 2 * (
                g * (axis * v).sum(-1, keepdim=True)
                + v * (axis * g).sum(-1, keepdim=True)
                - 2 * axis * (v * g).sum(-1, keepdim=True)
            )
            grad_u = torch.cat([grad_w, grad_axis], -1)
            along = 0 if wrong else u * (u * grad_u).sum(-1, keepdim=True)
            # v is turned by u's matrix only where u has length 1, which the division above ensures
            return (grad_u - along) / length, turn(inverse, g)

    def rotate(q, v):
        sized("q", q, None, 4)
        sized("v", v, len(q), 3)
        alike(q, v)
        bounded("q", q, -1e3, 1e3)
        bounded("v", v, -1e3, 1e3)
        check(bool((q.detach().norm(dim=-1) > 1e-2).all()), "q: expected quaternions other than 0")
        return Rotate.apply(q, v)

    return rotate


add(
    "quaternion_length",
    quaternion_rotate,
    lambda: (
        F.normalize(real(4, 4, grad=False), dim=-1).requires_grad_(),
        real(4, 3, seed=1),
    ),
    bug="Backward leaves out the division by the quaternion's length",
)


# Squared Chamfer distance of two sets of points
def chamfer(wrong):
    class Chamfer(Function):
        @staticmethod
        def forward(ctx, a, b):
            d = (a[:, None] - b[None]).square().sum(-1)
            (to_b, nearest_b), (to_a, nearest_a) = d.min(1), d.min(0)
            ctx.save_for_backward(a, b, nearest_b, nearest_a)
            return to_b.mean() + to_a.mean()

        @staticmethod
        def backward(ctx, g):
            a, b, nearest_b, nearest_a = ctx.saved_tensors
            from_a = 2 * g * (a - b[nearest_b]) / len(a)
            from_b = 2 * g * (b - a[nearest_a]) / len(b)
            if wrong:
                grad_a = from_a.index_put((nearest_a,), from_a[nearest_a] - from_b)
                grad_b = from_b.index_put((nearest_b,), from_b[nearest_b] - from_a)
            else:
                grad_a = from_a.index_put((nearest_a,), -from_b, accumulate=True)
                grad_b = from_b.index_put((nearest_b,), -from_a, accumulate=True)
            return grad_a, grad_b

    def distance(a, b):
        sized("a", a, None, 3)
        sized("b", b, None, 3)
        alike(a, b)
        bounded("a", a, -100, 100)
        bounded("b", b, -100, 100)
        return Chamfer.apply(a, b)

    return distance


add(
    "chamfer_shared",
    chamfer,
    lambda: (real(6, 3), real(4, 3, seed=1)),
    bug="Of the points that share a nearest neighbour only the last one counts in its gradient",
)


# Normals of a depth map, from central differences whose border is repeated
def normals(wrong):
    def difference(z, dim):
        n = z.shape[dim]
        i = torch.arange(n, device=z.device)
        return (
            z.index_select(dim, (i + 1).clamp(max=n - 1))
            - z.index_select(dim, (i - 1).clamp(min=0))
        ) / 2

    def back(g, dim):
        n = g.shape[dim]
        i = torch.arange(n, device=g.device)
        after, before = i + 1, i - 1
        zero = torch.zeros_like(g)
        if wrong:
            inner, outer = i[after < n], i[before >= 0]
            zero = zero.index_add(dim, inner + 1, g.index_select(dim, inner))
            return zero.index_add(dim, outer - 1, -g.index_select(dim, outer)) / 2
        return (
            zero.index_add(dim, after.clamp(max=n - 1), g).index_add(dim, before.clamp(min=0), -g)
        ) / 2

    class Normals(Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            n = torch.stack([-difference(z, 1), -difference(z, 0), torch.ones_like(z)], -1)
            return n / n.norm(dim=-1, keepdim=True)

        @staticmethod
        def backward(ctx, grad_y):
            (z,) = ctx.saved_tensors
            n = torch.stack([-difference(z, 1), -difference(z, 0), torch.ones_like(z)], -1)
            length = n.norm(dim=-1, keepdim=True)
            n = n / length
            grad_n = (grad_y - n * (n * grad_y).sum(-1, keepdim=True)) / length
            return -back(grad_n[..., 0], 1) - back(grad_n[..., 1], 0)

    def of_depth(z):
        sized("z", z, None, None)
        bounded("z", z, -1e3, 1e3)
        return Normals.apply(z)

    return of_depth


add(
    "depth_normals_border",
    normals,
    lambda: (real(5, 6),),
    bug="Backward passes nothing back to the border for the places that its repetition filled",
)


# Translation of the exponential of a twist: V(w) u
def twist_shift(wrong):
    def series(s, first, slope):
        terms = [(-1) ** k / math.factorial(2 * k + first) for k in range(15)]
        if slope:
            terms = [k * t for k, t in enumerate(terms)][1:]
        total = torch.zeros_like(s)
        for t in reversed(terms):
            total = total * s + t
        return total

    def coefficients(w, slopes, small):
        s = w.square().sum(-1, keepdim=True)
        large = (s > 4) | (not small)
        t = torch.where(large, s, torch.full_like(s, 9)).sqrt()
        if slopes:
            b = (t * t.sin() - 2 * (1 - t.cos())) / (2 * t**4)
            c = (3 * t.sin() - 2 * t - t * t.cos()) / (2 * t**5)
        else:
            b, c = (1 - t.cos()) / t**2, (t - t.sin()) / t**3
        if not small:
            return b, c
        near = torch.where(large, torch.zeros_like(s), s)
        return (
            torch.where(large, b, series(near, 2, slopes)),
            torch.where(large, c, series(near, 3, slopes)),
        )

    class Shift(Function):
        @staticmethod
        def forward(ctx, w, u):
            ctx.save_for_backward(w, u)
            b, c = coefficients(w, slopes=False, small=True)
            turned = torch.linalg.cross(w, u)
            return u + b * turned + c * torch.linalg.cross(w, turned)

        @staticmethod
        def backward(ctx, g):
            w, u = ctx.saved_tensors
            b, c = coefficients(w, slopes=False, small=True)
            slope_b, slope_c = coefficients(w, slopes=True, small=not wrong)
            turned, back = torch.linalg.cross(w, u), torch.linalg.cross(w, g)
            grad_u = g - b * back + c * torch.linalg.cross(w, back)
            grad_w = b * torch.linalg.cross(u, g) + c * (
                u * (g * w).sum(-1, keepdim=True)
                + g * (u * w).sum(-1, keepdim=True)
                - 2 * w * (u * g).sum(-1, keepdim=True)
            )
            along = slope_b * turned + slope_c * torch.linalg.cross(w, turned)
            return grad_w + 2 * w * (along * g).sum(-1, keepdim=True), grad_u

    def shift(w, u):
        sized("w", w, None, 3)
        same(w, u)
        alike(w, u)
        bounded("w", w, -3, 3)
        bounded("u", u, -1e3, 1e3)
        return Shift.apply(w, u)

    return shift


add(
    "twist_zero",
    twist_shift,
    lambda: (real(4, 3), real(4, 3, seed=1)),
    bug="The slopes of the coefficients are without the series for small angles: 0 / 0",
    trigger="a twist without rotation",
)


# Distances of pairs of particles to their nearest images in a periodic box
def image_distance(wrong):
    class Distance(Function):
        @staticmethod
        def forward(ctx, x, box, pairs):
            ctx.save_for_backward(x, box, pairs)
            d = x[pairs[:, 0]] - x[pairs[:, 1]]
            return (d - box * (d / box).round()).norm(dim=-1)

        @staticmethod
        def backward(ctx, g):
            x, box, pairs = ctx.saved_tensors
            d = x[pairs[:, 0]] - x[pairs[:, 1]]
            turns = (d / box).round()
            d = d - box * turns
            square = d.square().sum(-1, keepdim=True)
            zero = square == 0
            r = torch.where(zero, torch.ones_like(square), square).sqrt()
            force = torch.where(zero, torch.zeros_like(d), g[:, None] * d / r)
            grad_x = torch.zeros_like(x).index_add(0, pairs[:, 0], force)
            grad_x = grad_x.index_add(0, pairs[:, 1], -force)
            grad_box = torch.zeros_like(box) if wrong else -(force * turns).sum(0)
            return grad_x, grad_box, None

    def distance(x, box, pairs):
        sized("x", x, None, 3)
        sized("box", box, 3)
        sized("pairs", pairs, None, 2)
        indices("pairs", pairs, len(x))
        alike(x, box)
        bounded("x", x, -100, 100)
        bounded("box", box, 0.1, 100)
        return Distance.apply(x, box, pairs)

    return distance


add(
    "image_distance_box",
    image_distance,
    lambda: (
        (4 * real(5, 3, grad=False)).requires_grad_(),
        torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64, requires_grad=True),
        whole(5, 8, 2, seed=2),
    ),
    bug="The box gets a gradient of 0, as if the number of turns were",
)
