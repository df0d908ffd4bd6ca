"""Quaternions and rotations."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.nineteenth import add, same, sized


def times(p, q):
    """The product of quaternions (..., 4), the real part first."""
    a, u = p[..., :1], p[..., 1:]
    b, v = q[..., :1], q[..., 1:]
    scalar = a * b - (u * v).sum(-1, keepdim=True)
    return torch.cat((scalar, a * v + b * u + torch.linalg.cross(u, v)), -1)


def conjugate(q):
    return torch.cat((q[..., :1], -q[..., 1:]), -1)


def turned(q, p):
    """R(q) p, quadratic in q."""
    a, v = q[..., :1], q[..., 1:]
    along = (v * p).sum(-1, keepdim=True)
    scale = a.square() - v.square().sum(-1, keepdim=True)
    return scale * p + 2 * along * v + 2 * a * torch.linalg.cross(v, p)


def slopes(q, p, g):
    """The gradient of g · R(q) p by q."""
    a, v = q[..., :1], q[..., 1:]
    of_a = 2 * (g * (a * p + torch.linalg.cross(v, p))).sum(-1, keepdim=True)
    of_v = (g * v).sum(-1, keepdim=True) * p + (v * p).sum(-1, keepdim=True) * g
    of_v = of_v - v * (p * g).sum(-1, keepdim=True) + a * torch.linalg.cross(p, g)
    return torch.cat((of_a, 2 * of_v), -1)


class Turned(Function):
    @staticmethod
    def forward(ctx, q, p):
        ctx.save_for_backward(q, p)
        return turned(conjugate(q), p)

    @staticmethod
    def gradients(ctx, g, at):
        q, p = ctx.saved_tensors
        return conjugate(slopes(at(q), p, g)), turned(q, g)

    @staticmethod
    def backward(ctx, g):
        return Turned.gradients(ctx, g, conjugate)


class TurnedAtQ(Turned):
    @staticmethod
    def backward(ctx, g):
        return Turned.gradients(ctx, g, lambda q: q)


def _turned(function):
    def turn_back(q, p):
        """R(q̄) p, of quaternions q (N, 4), not of length 1 as a rule, and points p (N, 3)."""
        sized("q", q, None, 4)
        sized("p", p, q.shape[0], 3)
        return function.apply(q, p)

    return turn_back


add(
    "turn_back_conjugate",
    _turned,
    TurnedAtQ,
    Turned,
    lambda: (real(3, 4), real(3, 3, seed=1)),
    bug="R's Jacobian is taken at q, not at its conjugate (Stack Exchange, Jacobian involving quaternions)",
)


class Sandwich(Function):
    @staticmethod
    def forward(ctx, q, q1, q2):
        ctx.save_for_backward(q, q1, q2)
        return times(times(q1, q), q2)

    @staticmethod
    def gradients(ctx, g, left, right):
        q, q1, q2 = ctx.saved_tensors
        of_q = times(times(conjugate(left(q1, q2)), g), conjugate(right(q1, q2)))
        return of_q, times(g, conjugate(times(q, q2))), times(conjugate(times(q1, q)), g)

    @staticmethod
    def backward(ctx, g):
        return Sandwich.gradients(ctx, g, lambda q1, q2: q1, lambda q1, q2: q2)


class SandwichSwapped(Sandwich):
    """[q1]_R [q2]_L for [q1]_L [q2]_R."""

    @staticmethod
    def backward(ctx, g):
        return Sandwich.gradients(ctx, g, lambda q1, q2: q2, lambda q1, q2: q1)


def _sandwich(function):
    def sandwich(q, q1, q2):
        """q1 q q2, of quaternions (N, 4)."""
        sized("q", q, None, 4)
        same(q, q1, q2)
        return function.apply(q, q1, q2)

    return sandwich


add(
    "sandwich_sides",
    _sandwich,
    SandwichSwapped,
    Sandwich,
    lambda: (real(3, 4), real(3, 4, seed=1), real(3, 4, seed=2)),
    bug="left and right multiplication are swapped in the Jacobian (newbe.dev, Derivative of quaternions)",
)


def skew(v):
    """The matrix of v × for v (..., 3)."""
    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    rows = (zero, -z, y, z, zero, -x, -y, x, zero)
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def right_jacobian(theta):
    """∫ exp(-s [θ]×) ds from 0 to 1, a block of a larger exponential."""
    k = skew(theta)
    eye = torch.eye(3, dtype=k.dtype, device=k.device).expand_as(k)
    top = torch.cat((-k, eye), -1)
    return torch.linalg.matrix_exp(torch.cat((top, torch.zeros_like(top)), -2))[..., :3, 3:]


class Rotate(Function):
    @staticmethod
    def forward(ctx, theta, p):
        ctx.save_for_backward(theta, p)
        return (torch.linalg.matrix_exp(skew(theta)) * p.unsqueeze(-2)).sum(-1)

    @staticmethod
    def gradients(ctx, g, jacobian):
        theta, p = ctx.saved_tensors
        rotation = torch.linalg.matrix_exp(skew(theta))
        back = (rotation * g.unsqueeze(-1)).sum(-2)
        moment = torch.linalg.cross(p, back).unsqueeze(-1)
        return (jacobian(theta, rotation) * moment).sum(-2), back

    @staticmethod
    def backward(ctx, g):
        return Rotate.gradients(ctx, g, lambda theta, rotation: right_jacobian(theta))


class RotateConjugated(Rotate):
    @staticmethod
    def backward(ctx, g):
        return Rotate.gradients(ctx, g, lambda theta, rotation: rotation.mT)


def _rotate(function):
    def rotate(theta, p):
        """exp([theta]×) p, of theta and p (N, 3)."""
        sized("theta", theta, None, 3)
        same(theta, p)
        return function.apply(theta, p)

    return rotate


add(
    "rotate_conjugated",
    _rotate,
    RotateConjugated,
    Rotate,
    lambda: (real(3, 3), real(3, 3, seed=1)),
    bug="the derivative at 0 is conjugated, -R [p]× R⁻¹ (math.techqa.club 951916, Derivative of exponential map)",
)


class Exponential(Function):
    @staticmethod
    def forward(ctx, omega):
        ctx.save_for_backward(omega)
        return torch.linalg.matrix_exp(skew(omega))

    @staticmethod
    def gradients(ctx, g, through):
        (omega,) = ctx.saved_tensors
        m = g @ torch.linalg.matrix_exp(skew(omega)).mT
        odd = m - m.mT
        moment = torch.stack((odd[..., 2, 1], odd[..., 0, 2], odd[..., 1, 0]), -1)
        return through(omega, moment)

    @staticmethod
    def backward(ctx, g):
        return Exponential.gradients(
            ctx, g, lambda omega, m: (right_jacobian(omega) @ m.unsqueeze(-1)).squeeze(-1)
        )


class ExponentialSplit(Exponential):
    @staticmethod
    def backward(ctx, g):
        return Exponential.gradients(ctx, g, lambda omega, m: m)


def _exponential(function):
    def rotation(omega):
        """exp([omega]×) (N, 3, 3), of omega (N, 3)."""
        sized("omega", omega, None, 3)
        return function.apply(omega)

    return rotation


add(
    "rotation_split",
    _exponential,
    ExponentialSplit,
    Exponential,
    lambda: (real(2, 3),),
    bug="exp(ω + ξ) is split into exp(ξ) exp(ω) (imathworks.com, Confusion about derivative of matrix in SO(3))",
)
