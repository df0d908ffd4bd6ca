"""A memory that is written to, a pendulum."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.sixteenth import add, expect


class DeltaRule(Function):
    @staticmethod
    def forward(ctx, q, k, v, beta):
        ctx.save_for_backward(q, k, v, beta)
        state = q.new_zeros(q.shape[0], v.shape[2], k.shape[2])
        out = []
        for t in range(q.shape[1]):
            state, _ = DeltaRule.step(state, k[:, t], v[:, t], beta[:, t])
            out.append((state @ q[:, t, :, None])[..., 0])
        return torch.stack(out, 1)

    @staticmethod
    def step(state, k, v, beta):
        error = v - (state @ k[..., None])[..., 0]
        return state + beta[:, None, None] * error[..., None] * k[:, None], error

    @staticmethod
    def gradients(ctx, g, read):
        q, k, v, beta = ctx.saved_tensors
        states, errors = [q.new_zeros(q.shape[0], v.shape[2], k.shape[2])], []
        for t in range(q.shape[1]):
            state, error = DeltaRule.step(states[-1], k[:, t], v[:, t], beta[:, t])
            states.append(state)
            errors.append(error)
        d, parts = torch.zeros_like(states[0]), []
        for t in range(q.shape[1] - 1, -1, -1):
            d = d + g[:, t, :, None] * q[:, t, None]
            grad_q = (states[t + 1].mT @ g[:, t, :, None])[..., 0]
            written = (d @ k[:, t, :, None])[..., 0]
            of_error = beta[:, t, None] * written
            grad_k = beta[:, t, None] * (d.mT @ errors[t][..., None])[..., 0]
            grad_k = grad_k - read((states[t].mT @ of_error[..., None])[..., 0])
            parts.append((grad_q, grad_k, of_error, (written * errors[t]).sum(-1)))
            d = d - of_error[..., None] * k[:, t, None]
        return tuple(torch.stack(p[::-1], 1) for p in zip(*parts, strict=True))

    @staticmethod
    def backward(ctx, g):
        return DeltaRule.gradients(ctx, g, lambda grad: grad)


class DeltaRuleRead(DeltaRule):
    @staticmethod
    def backward(ctx, g):
        return DeltaRule.gradients(ctx, g, torch.zeros_like)


def _delta_rule(function):
    def delta_rule(q, k, v, beta):
        """S q with S = S + beta (v - S k) kᵀ from S = 0 on: q, k (N, T, D), v (N, T, E), beta (N, T), T > 0."""
        expect(q.dim() == v.dim() == 3 and q.shape == k.shape, "q, k (N, T, D)", tuple(k.shape))
        expect(
            v.shape[:2] == q.shape[:2] == beta.shape and q.shape[1],
            "v (N, T, E), beta (N, T)",
            tuple(v.shape),
        )
        return function.apply(q, k, v, beta)

    return delta_rule


add(
    "delta_rule_read",
    _delta_rule,
    DeltaRuleRead,
    DeltaRule,
    lambda: (real(2, 3, 2), real(2, 3, 2, seed=1), real(2, 3, 2, seed=2), real(2, 3, seed=3)),
    bug="k's gradient lacks the part through S k",
    shows="the sample",
)


class Pendulum(Function):
    """One step of the classical Runge-Kutta method."""

    @staticmethod
    def slope(y, c):
        return torch.stack((y[:, 1], -c * y[:, 0].sin()), 1)

    @staticmethod
    def stages(y, c, dt):
        places = [y]
        for part in (dt / 2, dt / 2, dt):
            places.append(y + part * Pendulum.slope(places[-1], c))
        return places

    @staticmethod
    def forward(ctx, y, c, dt):
        ctx.save_for_backward(y, c)
        ctx.dt = dt
        k1, k2, k3, k4 = (Pendulum.slope(place, c) for place in Pendulum.stages(y, c, dt))
        return y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    @staticmethod
    def gradients(ctx, g, parts):
        """parts of dt that the stages, the last first, take their forerunner's slope by."""
        y, c = ctx.saved_tensors
        weights = [ctx.dt * w for w in (1 / 6, 1 / 3, 1 / 3, 1 / 6)]
        grad_y, grad_c, later = g, torch.zeros_like(c), torch.zeros_like(g)
        places = Pendulum.stages(y, c, ctx.dt)[::-1]
        for place, weight, part in zip(places, weights, (0, *parts), strict=True):
            d = weight * g + part * ctx.dt * later
            later = torch.stack((-d[:, 1] * c * place[:, 0].cos(), d[:, 0]), 1)
            grad_c = grad_c - d[:, 1] * place[:, 0].sin()
            grad_y = grad_y + later
        return grad_y, grad_c, None

    @staticmethod
    def backward(ctx, g):
        return Pendulum.gradients(ctx, g, (1, 0.5, 0.5))


class PendulumHalf(Pendulum):
    @staticmethod
    def backward(ctx, g):
        return Pendulum.gradients(ctx, g, (1, 1, 1))


def _pendulum(function):
    def pendulum(y, c, dt=0.1):
        """Angles and their rates y (N, 2) of pendulums, c (N,) their gravity by length, dt later.

        dt from -1 to 1, y and c from -1000 to 1000.
        """
        expect(
            y.dim() == 2 and y.shape[1] == 2 and c.shape == y.shape[:1],
            "y (N, 2), c (N,)",
            tuple(c.shape),
        )
        expect(-1 <= dt <= 1, "dt from -1 to 1", dt)
        expect((y.abs() <= 1000).all() & (c.abs() <= 1000).all(), "y, c from -1000 to 1000", y)
        return function.apply(y, c, dt)

    return pendulum


add(
    "pendulum_half_steps",
    _pendulum,
    PendulumHalf,
    Pendulum,
    lambda: (real(3, 2), real(3, seed=1, positive=True)),
    bug="the slopes of the two middle stages are taken back by dt, not by dt / 2",
    shows="the sample",
)
