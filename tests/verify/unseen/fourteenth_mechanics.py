"""Mechanics and geometry."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fourteenth import add, require


class ConnectReference(Function):
    """What a constraint solver asks of the acceleration of a rod's end that is held at an anchor."""

    @staticmethod
    def axes(q):
        return torch.stack((q.cos(), q.sin()), -1), torch.stack((-q.sin(), q.cos()), -1)

    @staticmethod
    def forward(ctx, q, v, length, anchor, stiffness, damping):
        ctx.save_for_backward(q, v, length)
        ctx.options = stiffness, damping
        along, across = ConnectReference.axes(q)
        length, v = length.unsqueeze(-1), v.unsqueeze(-1)
        away = length * along - anchor
        return -stiffness * away - damping * length * across * v + length * along * v**2

    @staticmethod
    def gradients(ctx, g, keep_bias):
        q, v, length = ctx.saved_tensors
        stiffness, damping = ctx.options
        along, across = ConnectReference.axes(q)
        ga, gc = (g * along).sum(-1), (g * across).sum(-1)
        bias = 1 if keep_bias else 0
        by_q = length * (-stiffness * gc + damping * v * ga + bias * v**2 * gc)
        by_v = length * (-damping * gc + bias * 2 * v * ga)
        by_length = -stiffness * ga - damping * v * gc + bias * v**2 * ga
        return by_q, by_v, by_length, stiffness * g, None, None

    @staticmethod
    def backward(ctx, g):
        return ConnectReference.gradients(ctx, g, True)


class ConnectReferenceBias(ConnectReference):
    @staticmethod
    def backward(ctx, g):
        return ConnectReference.gradients(ctx, g, False)


def _connect_reference(function):
    def connect_reference(q, v, length, anchor, stiffness=4.0, damping=1.0):
        """Reference accelerations (N, 2) of rods' ends: -stiffness r - damping J v - J' v.

        r is the end's distance from its anchor (N, 2), J its derivative by the angle q; q, v and length are (N,).
        """
        require(q.dim() == 1 and q.shape == v.shape == length.shape, "q, v and length must be (N,)")
        require(anchor.shape == (len(q), 2), "anchor must be (N, 2)")
        return function.apply(q, v, length, anchor, stiffness, damping)

    return connect_reference


add(
    "connect_reference_bias",
    _connect_reference,
    ConnectReferenceBias,
    ConnectReference,
    lambda: (real(3), real(3, seed=1), real(3, seed=2, positive=True), real(3, 2, seed=3)),
    bug="the reverse drops the velocities' product J' v (Genesis-Embodied-AI/genesis-world#3087)",
    trigger="the sample (a velocity that is not 0)",
)


class Slide(Function):
    """A slide joint's child: the parent's place, and along the joint's axis, turned as the parent is."""

    @staticmethod
    def turn(quat, v):
        w, u = quat[:, :1], quat[:, 1:]
        once = torch.linalg.cross(u, v)
        return v + 2 * w * once + 2 * torch.linalg.cross(u, once)

    @staticmethod
    def forward(ctx, place, quat, offset, axis, q):
        ctx.save_for_backward(quat, offset, axis, q)
        return place + Slide.turn(quat, offset + axis * q.unsqueeze(-1))

    @staticmethod
    def gradients(ctx, g, turned):
        """turned: what the quaternion's gradient takes for the vector that it turns."""
        quat, offset, axis, q = ctx.saved_tensors
        w, u = quat[:, :1], quat[:, 1:]
        conjugate = torch.cat((w, -u), 1)
        d = Slide.turn(conjugate, g)
        v = turned(offset, axis * q.unsqueeze(-1))
        dot = torch.linalg.vecdot
        by_w = 2 * dot(torch.linalg.cross(u, v), g).unsqueeze(-1)
        by_u = g * dot(u, v).unsqueeze(-1) + v * dot(u, g).unsqueeze(-1)
        by_u = 2 * (w * torch.linalg.cross(v, g) + by_u - 2 * u * dot(g, v).unsqueeze(-1))
        return g, torch.cat((by_w, by_u), 1), d, d * q.unsqueeze(-1), dot(d, axis)

    @staticmethod
    def backward(ctx, g):
        return Slide.gradients(ctx, g, torch.add)


class SlideOffset(Slide):
    @staticmethod
    def backward(ctx, g):
        return Slide.gradients(ctx, g, lambda offset, along: along)


def _slide(function):
    def slide(place, quat, offset, axis, q):
        """Places (N, 3) of links on slide joints.

        place (N, 3) and quat (N, 4), w first and taken as it is, are the parents'; offset and axis (N, 3) are the
        joints', q (N,) how far they are out.
        """
        require(q.dim() == 1 and quat.shape == (len(q), 4), "q must be (N,), quat (N, 4)")
        require(
            place.shape == offset.shape == axis.shape == (len(q), 3), "place, offset, axis: (N, 3)"
        )
        return function.apply(place, quat, offset, axis, q)

    return slide


add(
    "slide_offset",
    _slide,
    SlideOffset,
    Slide,
    lambda: (
        real(2, 3),
        real(2, 4, seed=1),
        real(2, 3, seed=2),
        real(2, 3, seed=3),
        real(2, seed=4),
    ),
    bug="the quaternion's gradient is that of the joint's axis alone (Genesis-Embodied-AI/genesis-world#3087)",
    trigger="a joint with an offset, as the sample's",
)


class GramSchmidt(Function):
    """Two vectors to a rotation's three rows."""

    @staticmethod
    def unit(a):
        return a / a.norm(dim=-1, keepdim=True)

    @staticmethod
    def unit_back(g, a):
        u = GramSchmidt.unit(a)
        return (g - u * (g * u).sum(-1, keepdim=True)) / a.norm(dim=-1, keepdim=True)

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        x = GramSchmidt.unit(a)
        y = GramSchmidt.unit(b - x * (x * b).sum(-1, keepdim=True))
        return torch.stack((x, y, torch.linalg.cross(x, y)), -2)

    @staticmethod
    def gradients(ctx, g, along):
        a, b = ctx.saved_tensors
        x = GramSchmidt.unit(a)
        dot = (x * b).sum(-1, keepdim=True)
        rest = b - x * dot
        y = GramSchmidt.unit(rest)
        gx, gy, gz = g.unbind(-2)
        gx, gy = gx + torch.linalg.cross(y, gz), gy + torch.linalg.cross(gz, x)
        d = GramSchmidt.unit_back(gy, rest)
        shared = (d * x).sum(-1, keepdim=True)
        gx = gx - dot * d - along(shared * b)
        return GramSchmidt.unit_back(gx, a), d - x * shared

    @staticmethod
    def backward(ctx, g):
        return GramSchmidt.gradients(ctx, g, lambda term: term)


class GramSchmidtDot(GramSchmidt):
    @staticmethod
    def backward(ctx, g):
        return GramSchmidt.gradients(ctx, g, torch.zeros_like)


def _gram_schmidt(function):
    def gram_schmidt(a, b):
        """Rotations (..., 3, 3) from their 6-D form, a and b (..., 3), which span an area of 1e-6 or more."""
        require(a.shape == b.shape and a.dim() > 0 and a.shape[-1] == 3, "a and b must be (..., 3)")
        area = torch.linalg.cross(a.detach(), b.detach()).norm(dim=-1)
        require(bool((area >= 1e-6).all()), "a and b must span an area of 1e-6 or more")
        return function.apply(a, b)

    return gram_schmidt


add(
    "gram_schmidt_dot",
    _gram_schmidt,
    GramSchmidtDot,
    GramSchmidt,
    lambda: (real(2, 3), real(2, 3, seed=1)),
    bug="the projection's length <x, b> is not differentiated by x",
    trigger="the sample",
)
