"""Rays, circuits and tables."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.seventeenth import add
from tests.verify.unseen.sixteenth import expect


class RayWeights(Function):
    @staticmethod
    def before(rays):
        """Which samples (column) come before which (row) on one ray."""
        n = torch.arange(len(rays), device=rays.device)
        return (rays[:, None] == rays) & (n < n[:, None])

    @staticmethod
    def forward(ctx, tau, rays):
        ctx.save_for_backward(tau, rays)
        reached = (-(RayWeights.before(rays).to(tau.dtype) @ tau)).exp()
        return -reached * torch.expm1(-tau)

    @staticmethod
    def gradients(ctx, g, shadow):
        tau, rays = ctx.saved_tensors
        before = RayWeights.before(rays).to(tau.dtype)
        reached = (-(before @ tau)).exp()
        later = before.mT @ (g * -reached * torch.expm1(-tau))
        return g * reached * (-tau).exp() - shadow(later), None

    @staticmethod
    def backward(ctx, g):
        return RayWeights.gradients(ctx, g, lambda later: later)


class RayWeightsOwn(RayWeights):
    @staticmethod
    def backward(ctx, g):
        return RayWeights.gradients(ctx, g, torch.zeros_like)


def _ray_weights(function):
    def ray_weights(tau, rays):
        """Weights T (1 - e^-tau) of samples of density by length tau (S,) >= 0.

        T = e^-Σ tau of the samples before it on its ray; rays (S,): integers; a ray's samples are in its order.
        """
        expect(tau.dim() == 1 and tau.shape == rays.shape, "tau, rays (S,)", tuple(rays.shape))
        expect((tau >= 0).all(), "tau >= 0", tau)
        return function.apply(tau, rays)

    return ray_weights


add(
    "ray_weights_shadow",
    _ray_weights,
    RayWeightsOwn,
    RayWeights,
    lambda: (real(5, positive=True), torch.tensor([0, 0, 0, 1, 1])),
    bug="a sample's shadow on those after it is left out",
    shows="the sample",
)


class Distortion(Function):
    @staticmethod
    def forward(ctx, w, middle, length):
        ctx.save_for_backward(w, middle, length)
        d = (middle[..., :, None] - middle[..., None, :]).abs()
        return (
            (w[..., None] * w[..., None, :] * d).sum((-1, -2)) + (w * w * length).sum(-1) / 3
        ).mean()

    @staticmethod
    def gradients(ctx, g, of_pairs):
        w, middle, length = ctx.saved_tensors
        d = middle[..., :, None] - middle[..., None, :]
        g = g / len(w)
        of_middle = 2 * w * (d.sign() * w[..., None, :]).sum(-1)
        return (
            g * (2 * of_pairs(w, middle, d) + 2 / 3 * w * length),
            g * of_middle,
            g * w * w / 3,
        )

    @staticmethod
    def backward(ctx, g):
        return Distortion.gradients(
            ctx, g, lambda w, middle, d: (d.abs() * w[..., None, :]).sum(-1)
        )


class DistortionSums(Distortion):
    @staticmethod
    def backward(ctx, g):
        def by_sums(w, middle, d):
            """Σ_j w_j |m - m_j| by running sums of w and w m."""
            s, t = w.cumsum(-1), (w * middle).cumsum(-1)
            return middle * (2 * s - s[..., -1:]) - 2 * t + t[..., -1:]

        return Distortion.gradients(ctx, g, by_sums)


def _distortion(function):
    def distortion(w, middle, length):
        """Mean over rays of Σ_ij w_i w_j |m_i - m_j| + Σ w² length / 3, all (N, S), not empty.

        The intervals' middles m ascend.
        """
        expect(
            w.dim() == 2 and w.shape == middle.shape == length.shape and w.numel(),
            "(N, S), not empty",
            tuple(w.shape),
        )
        expect((middle.diff(dim=-1) > 0).all(), "middles that ascend", middle)
        return function.apply(w, middle, length)

    return distortion


add(
    "distortion_sums",
    _distortion,
    DistortionSums,
    Distortion,
    lambda: (
        real(2, 4, grad=False).softmax(-1).requires_grad_(),
        real(2, 4, seed=1, grad=False).abs().add(0.1).cumsum(-1).requires_grad_(),
        real(2, 4, seed=2, positive=True),
    ),
    bug="backward subtracts running sums of w m, which cancel",
    shows="middles far away, such as 1e5 in float32, 1e12 in float64",
    missed="the difference loses no more than the places do as they are rounded",
)


class Circuit(Function):
    """A qubit turned about x and y in turn; the gradient is from each gate's angle a quarter turn further and back."""

    @staticmethod
    def run(angles):
        x = y = torch.zeros_like(angles[:, 0])
        z = torch.ones_like(x)
        for k, angle in enumerate(angles.unbind(1)):
            c, s = angle.cos(), angle.sin()
            if k % 2:
                x, z = z * s + x * c, z * c - x * s
            else:
                y, z = y * c - z * s, y * s + z * c
        return z

    @staticmethod
    def forward(ctx, angles, gates):
        ctx.save_for_backward(angles, gates)
        return Circuit.run(angles[:, gates])

    @staticmethod
    def gradients(ctx, g, put):
        angles, gates = ctx.saved_tensors
        own = angles[:, gates]
        shifts = torch.eye(len(gates), dtype=own.dtype, device=own.device) * (math.pi / 2)
        parts = [(Circuit.run(own + s) - Circuit.run(own - s)) / 2 for s in shifts]
        return put(torch.zeros_like(angles), gates, g[:, None] * torch.stack(parts, 1)), None

    @staticmethod
    def backward(ctx, g):
        return Circuit.gradients(ctx, g, lambda zeros, gates, d: zeros.index_add(1, gates, d))


class CircuitAssigned(Circuit):
    @staticmethod
    def backward(ctx, g):
        return Circuit.gradients(ctx, g, lambda zeros, gates, d: zeros.index_copy(1, gates, d))


def _circuit(function):
    def circuit(angles, gates=None):
        """The expectation (N,) of Z after turns, from up on, about x and y in turn, by angles (N, P), P > 0.

        gates (G,), G > 0: which angle each turn takes; every one once, in order, if it is not given.
        """
        expect(angles.dim() == 2 and angles.shape[1], "angles (N, P), P > 0", tuple(angles.shape))
        gates = torch.arange(angles.shape[1], device=angles.device) if gates is None else gates
        expect(gates.dim() == 1 and len(gates), "gates (G,), G > 0", tuple(gates.shape))
        expect(((gates >= 0) & (gates < angles.shape[1])).all(), "gates below P", gates)
        return function.apply(angles, gates)

    return circuit


add(
    "circuit_repeated",
    _circuit,
    CircuitAssigned,
    Circuit,
    lambda: (real(2, 3),),
    bug="an angle's gradient is that of the last turn by it, not the sum",
    shows="an angle that several turns take",
)


class Table(Function):
    @staticmethod
    def place(r, step, size):
        return (r / step).floor().long().clamp(0, size - 2)

    @staticmethod
    def forward(ctx, r, table, step):
        ctx.save_for_backward(r, table)
        ctx.step = step
        i = Table.place(r, step, len(table))
        return table[i] + (r / step - i) * (table[i + 1] - table[i])

    @staticmethod
    def gradients(ctx, g, i):
        r, table = ctx.saved_tensors
        t = r / ctx.step - i
        grad = g.new_zeros(table.shape)
        for index, d in ((i, g * (1 - t)), (i + 1, g * t)):
            grad = grad.index_add(0, index.flatten(), d.flatten())
        return g * (table[i + 1] - table[i]) / ctx.step, grad, None

    @staticmethod
    def backward(ctx, g):
        r, table = ctx.saved_tensors
        return Table.gradients(ctx, g, Table.place(r, ctx.step, len(table)))


class TableFloat(Table):
    @staticmethod
    def backward(ctx, g):
        r, table = ctx.saved_tensors
        return Table.gradients(ctx, g, Table.place(r.float(), ctx.step, len(table)))


def _table(function):
    def table_energy(r, table, step=0.25):
        """Energies at distances r (*) from a table (K,), K > 1, of energies at 0, step, 2 step, …: linear between them.

        r is from 0 to the last, step from 0.01 to 10; at an entry, but the last, the slope is that beyond it.
        """
        expect(table.dim() == 1 and len(table) > 1, "table (K,), K > 1", tuple(table.shape))
        expect(0.01 <= step <= 10, "step from 0.01 to 10", step)
        expect(((r >= 0) & (r <= (len(table) - 1) * step)).all(), "r in the table", r)
        return function.apply(r, table, step)

    return table_energy


add(
    "table_energy_float",
    _table,
    TableFloat,
    Table,
    lambda: (torch.tensor([0.1, 0.7, 1.1], dtype=F64, requires_grad=True), real(6, seed=1)),
    bug="backward finds the interval in float32, forward in the input's dtype",
    shows="float64 distances less than 1e-8 below an entry",
    missed="within 1e-8 of an entry of the table, which no sample meets",
)
