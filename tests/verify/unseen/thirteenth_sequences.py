"""Cells and sequences that end early."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirteenth import add


class Horner(Function):
    """h = h x_t + a, step by step."""

    @staticmethod
    def states(x, a, steps):
        out = [a]
        for now in x[:steps]:
            out.append(out[-1] * now + a)
        return out

    @staticmethod
    def forward(ctx, x, a, n_steps):
        ctx.steps = x.shape[0] if n_steps is None else n_steps
        ctx.save_for_backward(x, a)
        return Horner.states(x, a, ctx.steps)[-1].clone()

    @staticmethod
    def gradients(ctx, g, backwards):
        x, a = ctx.saved_tensors
        states = Horner.states(x, a, ctx.steps)
        grad, grad_a = torch.zeros_like(x), torch.zeros_like(a)
        for i in range(ctx.steps):
            t = ctx.steps - 1 - i
            grad[t] = g * states[t]
            grad_a += g
            g = g * backwards[i]
        return grad, grad_a + g, None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Horner.gradients(ctx, g, ctx.saved_tensors[0][: ctx.steps].flip(0))


class HornerWhole(Horner):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Horner.gradients(ctx, g, ctx.saved_tensors[0].flip(0))


def _horner(function):
    def horner(x, a, n_steps=None):
        """h after n_steps (at most T, None for T) of h = h x_t + a, from h = a on, x (T, N), a (N,)."""
        return function.apply(x, a, n_steps)

    return horner


add(
    "horner_steps",
    _horner,
    HornerWhole,
    Horner,
    lambda: (real(3, 2), real(2, seed=1)),
    bug="the sequence is reversed without being cut to n_steps (Theano/Theano#166)",
    trigger="n_steps < T",
)


class GatedCell(Function):
    @staticmethod
    def gates(x, h):
        update, new = x.chunk(2, -1)
        return torch.cat(((update + h).sigmoid(), new.tanh()), -1)

    @staticmethod
    def forward(ctx, x, h):
        z, n = GatedCell.gates(x, h).chunk(2, -1)
        ctx.save_for_backward(x, h)
        return (1 - z) * n + z * h

    @staticmethod
    def gradients(ctx, g, gates):
        _, h = ctx.saved_tensors
        z, n = gates.chunk(2, -1)
        update = g * (h - n) * z * (1 - z)
        return torch.cat((update, g * (1 - z) * (1 - n * n)), -1), g * z + update

    @staticmethod
    def backward(ctx, g):
        return GatedCell.gradients(ctx, g, GatedCell.gates(*ctx.saved_tensors))


class GatedCellBuffer(GatedCell):
    """The gates' gradient is written over the gates, which forward kept."""

    @staticmethod
    def forward(ctx, x, h):
        ctx.gates = GatedCell.gates(x, h)
        return GatedCell.forward(ctx, x, h)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        grad, grad_h = GatedCell.gradients(ctx, g, ctx.gates)
        return ctx.gates.copy_(grad).clone(), grad_h


def _gated_cell(function):
    def gated_cell(x, h):
        """New state (1 - z) n + z h of x (N, 2 H), which holds the arguments of the gate z and of n, and h (N, H)."""
        return function.apply(x, h)

    return gated_cell


add(
    "gated_cell_buffer",
    _gated_cell,
    GatedCellBuffer,
    GatedCell,
    lambda: (real(2, 6), real(2, 3, seed=1)),
    bug="backward overwrites what forward kept (pytorch/pytorch#1532)",
    trigger="a second backward through one graph",
)
