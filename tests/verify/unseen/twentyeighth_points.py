"""Rotated and moved points, near and far ones."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyeighth import (
    add,
    check,
    finite,
    one_dtype,
    same,
    sized,
)


# The angle between two rotations by their quaternions, of which q and -q are one
def quaternion_angle(wrong):
    class Angle(Function):
        @staticmethod
        def forward(ctx, p, q):
            ctx.save_for_backward(p, q)
            q = torch.where((p * q).sum(-1, keepdim=True) < 0, -q, q)
            norm = torch.linalg.vector_norm
            return 4 * torch.atan2(norm(p - q, dim=-1), norm(p + q, dim=-1))

        @staticmethod
        def backward(ctx, grad_a):
            p, q = ctx.saved_tensors
            side = torch.where((p * q).sum(-1, keepdim=True) < 0, -1, 1).to(p.dtype)
            if wrong:
                side = torch.ones_like(side)
            less, more = p - side * q, p + side * q
            n, m = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (less, more))
            size = torch.hypot(n, m)
            by_n = 4 * grad_a[..., None] * (m / size) / size * less / torch.where(n > 0, n, 1)
            by_m = 4 * grad_a[..., None] * (n / size) / size * more / torch.where(m > 0, m, 1)
            return by_n - by_m, -side * (by_n + by_m)

    def angle(p, q):
        sized("p", p, None, 4)
        same(p, q)
        one_dtype(p, q)
        finite(p=p)
        finite(q=q)
        lengths = torch.linalg.vector_norm(torch.stack([p, q]), dim=-1)
        check(bool((lengths > 0).all()), "expected quaternions other than 0")
        return Angle.apply(p, q)

    return angle


def near_turns():
    p = real(3, 4, grad=False)
    q = p + 0.4 * real(3, 4, seed=1, grad=False)
    unit = torch.nn.functional.normalize
    return unit(p, dim=-1).requires_grad_(), unit(q, dim=-1).requires_grad_()


add(
    "quaternion_angle_cover",
    quaternion_angle,
    near_turns,
    bug="Backward takes the way from p to q where -q is nearer",
    trigger="quaternions of opposite signs",
)


# Distances to the nearest of some points, with their numbers if asked for
def nearest(wrong):
    def find(q, p):
        with torch.no_grad():
            place = torch.linalg.vector_norm(q[:, None] - p, dim=-1).argmin(1)
        return torch.linalg.vector_norm(q - p[place], dim=-1), place

    def distance(q, p, index=False):
        sized("q", q, None, None)
        sized("p", p, None, q.shape[1])
        one_dtype(q, p)
        if index and wrong:
            with torch.no_grad():
                return find(q, p)
        return find(q, p) if index else find(q, p)[0]

    return distance


add(
    "nearest_index",
    nearest,
    lambda: (real(4, 3), real(5, 3, seed=1)),
    bug="The way that returns the numbers too stands under no_grad, for their sake",
    trigger="index=True",
    missed="a flag may mean that there is no gradient",
)


# Points turned by a matrix
def turned_points(wrong):
    class Turned(Function):
        @staticmethod
        def forward(ctx, x, r):
            ctx.save_for_backward(x, r)
            return x @ r.mT

        @staticmethod
        def backward(ctx, grad_y):
            x, r = ctx.saved_tensors
            grad_r = grad_y.mT @ x
            return grad_y.copy_(grad_y @ r) if wrong else grad_y @ r, grad_r

    def turn(x, r):
        sized("x", x, None, 3)
        sized("r", r, 3, 3)
        one_dtype(x, r)
        return Turned.apply(x, r)

    return turn


add(
    "turned_points_memory",
    turned_points,
    lambda: (real(5, 3), real(3, 3, seed=1)),
    bug="Backward turns grad_output back in its own memory",
    trigger="a grad_output that is used again",
)


# Hausdorff's distance of two sets of points
def hausdorff(wrong):
    def pair(a, b):
        d = torch.linalg.vector_norm(a[:, None] - b, dim=-1)
        near, back = d.min(1), d.min(0)
        i, j = near.values.argmax(), back.values.argmax()
        first = near.values[i] >= back.values[j]
        if wrong:
            first = torch.ones_like(first)
        far = torch.maximum(near.values.max(), back.values.max())
        return far, torch.where(first, i, back.indices[j]), torch.where(first, near.indices[i], j)

    class Hausdorff(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return pair(a, b)[0]

        @staticmethod
        def backward(ctx, grad_d):
            a, b = ctx.saved_tensors
            _, i, j = pair(a.detach(), b.detach())
            way = a[i] - b[j]
            d = torch.linalg.vector_norm(way)
            pull = grad_d * way / torch.where(d > 0, d, 1)
            grad_a = torch.zeros_like(a).index_add(0, i.view(1), pull[None])
            return grad_a, torch.zeros_like(b).index_add(0, j.view(1), -pull[None])

    def distance(a, b):
        sized("a", a, None, None)
        sized("b", b, None, a.shape[1])
        one_dtype(a, b)
        return Hausdorff.apply(a, b)

    return distance


add(
    "hausdorff_direction",
    hausdorff,
    lambda: ((4 * real(5, 3, grad=False)).requires_grad_(), real(4, 3, seed=1)),
    bug="Backward knows only the first set's farthest point",
    trigger="a second set that reaches farther than the first",
)


# The motion exp(u, w): its 3 x 4 matrix of rotation and translation
def motion(wrong):
    def move(u, w):
        x, y, z = w.unbind()
        none = torch.zeros_like(x)
        turn = torch.stack([none, -z, y, z, none, -x, -y, x, none]).view(3, 3)
        upper = torch.cat([turn, torch.eye(3, dtype=w.dtype, device=w.device)], 1)
        whole = torch.linalg.matrix_exp(torch.cat([upper, torch.zeros_like(upper)]))
        mean = whole[:3, 3:].detach() if wrong else whole[:3, 3:]
        return torch.cat([whole[:3, :3], (mean @ u)[:, None]], 1)

    def exp(u, w):
        sized("u", u, 3)
        sized("w", w, 3)
        one_dtype(u, w)
        return move(u, w)

    return exp


add(
    "motion_translation",
    motion,
    lambda: (real(3), real(3, seed=1)),
    bug="The matrix between u and the translation is taken for constant",
)
