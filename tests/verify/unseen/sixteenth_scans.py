"""Recurrences."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.sixteenth import add, expect


class DiagonalRNN(Function):
    @staticmethod
    def forward(ctx, x, a):
        h, out = torch.zeros_like(x[:, 0]), []
        for now in x.unbind(1):
            h = a * h + now
            out.append(h)
        y = torch.stack(out, 1)
        ctx.save_for_backward(a, y)
        return y

    @staticmethod
    def gradients(ctx, g, conj):
        a, y = ctx.saved_tensors
        d, parts = torch.zeros_like(g[:, 0]), []
        for now in g.unbind(1)[::-1]:
            d = conj(a) * d + now
            parts.append(d)
        grad = torch.stack(parts[::-1], 1)
        return grad, (grad[:, 1:] * conj(y[:, :-1])).sum((0, 1))

    @staticmethod
    def backward(ctx, g):
        return DiagonalRNN.gradients(ctx, g, torch.conj)


class DiagonalRNNPlain(DiagonalRNN):
    @staticmethod
    def backward(ctx, g):
        return DiagonalRNN.gradients(ctx, g, lambda z: z)


def _diagonal_rnn(function):
    def diagonal_rnn(x, a):
        """States h = a h + x from h = 0 on, x (N, T, D), T > 0, a (D,), both real or both complex; |a| <= 2."""
        expect(
            x.dim() == 3 and x.shape[1] and a.shape == x.shape[2:],
            "x (N, T, D), T > 0",
            tuple(x.shape),
        )
        expect(x.is_complex() == a.is_complex(), "both real or both complex", a.dtype)
        expect((a.abs() <= 2).all(), "|a| <= 2", a)
        return function.apply(x, a)

    return diagonal_rnn


def rnn_sample():
    a = torch.polar(torch.tensor([0.9, 0.5], dtype=F64), torch.tensor([0.3, 1.2], dtype=F64))
    x = torch.complex(real(2, 4, 2, grad=False), real(2, 4, 2, seed=1, grad=False))
    return x.requires_grad_(), a.requires_grad_()


add(
    "diagonal_rnn_conj",
    _diagonal_rnn,
    DiagonalRNNPlain,
    DiagonalRNN,
    rnn_sample,
    bug="neither a nor the states are conjugated",
    shows="the sample, which is complex",
)


class GRU(Function):
    @staticmethod
    def step(x, h, u):
        (xr, xz, xn), (ur, uz, un) = x.chunk(3, -1), (h @ u).chunk(3, -1)
        r, z = (xr + ur).sigmoid(), (xz + uz).sigmoid()
        n = (xn + r * un).tanh()
        return r, z, n, un

    @staticmethod
    def states(x, u, keep):
        out = [x.new_zeros(x.shape[0], u.shape[0])]
        for t in range(x.shape[1]):
            _, z, n, _ = GRU.step(x[:, t], out[-1], u)
            out.append(torch.where(keep[:, t], (1 - z) * n + z * out[-1], out[-1]))
        return out

    @staticmethod
    def forward(ctx, x, u, lengths):
        keep = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
        ctx.save_for_backward(x, u, keep)
        _, *out = GRU.states(x, u, keep)
        return torch.stack(out, 1) * keep, out[-1].clone()

    @staticmethod
    def gradients(ctx, g, last, mask):
        x, u, keep = ctx.saved_tensors
        states = GRU.states(x, u, keep)
        g, grad_u, parts = mask(g, keep), torch.zeros_like(u), []
        for t in range(x.shape[1] - 1, -1, -1):
            h = states[t]
            r, z, n, un = GRU.step(x[:, t], h, u)
            total = last + g[:, t]
            d = total * keep[:, t]
            dn = d * (1 - z) * (1 - n.square())
            dz, dr = d * (h - n) * z * (1 - z), dn * un * r * (1 - r)
            hidden = torch.cat((dr, dz, dn * r), -1)
            parts.append(torch.cat((dr, dz, dn), -1))
            grad_u = grad_u + h.mT @ hidden
            last = torch.where(keep[:, t], d * z + hidden @ u.mT, total)
        return torch.stack(parts[::-1], 1), grad_u, None

    @staticmethod
    def backward(ctx, g, last):
        return GRU.gradients(ctx, g, last, lambda g, keep: g * keep)


class GRUPadding(GRU):
    @staticmethod
    def backward(ctx, g, last):
        return GRU.gradients(ctx, g, last, lambda g, keep: g)


def _gru(function):
    def gru(x, u, lengths):
        """GRU of projected inputs x (N, T, 3 H), T > 0, with u (H, 3 H), from h = 0 on; no biases.

        The states (N, T, H), zeros after each sequence's length (N,), from 0 to T, and the last (N, H).
        """
        expect(x.dim() == 3 and x.shape[1], "x (N, T, 3 H), T > 0", tuple(x.shape))
        expect(
            u.dim() == 2 and u.shape[1] == 3 * u.shape[0] == x.shape[2],
            "u (H, 3 H)",
            tuple(u.shape),
        )
        expect(lengths.shape == x.shape[:1], "lengths (N,)", tuple(lengths.shape))
        expect(((lengths >= 0) & (lengths <= x.shape[1])).all(), "lengths from 0 to T", lengths)
        return function.apply(x, u, lengths)

    return gru


add(
    "gru_padding",
    _gru,
    GRUPadding,
    GRU,
    lambda: (real(2, 3, 6), real(2, 6, seed=1), torch.tensor([3, 2])),
    bug="gradients of the outputs that were set to 0 flow into the state",
    shows="the sample: a sequence shorter than the others",
)


class SRU(Function):
    @staticmethod
    def states(u, f):
        out = [torch.zeros_like(u[:, 0])]
        for now, keep in zip(u.unbind(1), f.unbind(1), strict=True):
            out.append(keep * out[-1] + (1 - keep) * now)
        return torch.stack(out, 1)

    @staticmethod
    def forward(ctx, x, u, forget, reset):
        ctx.save_for_backward(x, u, forget, reset)
        c, r = SRU.states(u, forget.sigmoid())[:, 1:], reset.sigmoid()
        return r * c.tanh() + (1 - r) * x

    @staticmethod
    def gradients(ctx, g, before):
        x, u, forget, reset = ctx.saved_tensors
        f, r = forget.sigmoid(), reset.sigmoid()
        c = SRU.states(u, f)
        t = c[:, 1:].tanh()
        d, parts = torch.zeros_like(g[:, 0]), []
        slopes = g * r * (1 - t.square())
        for now, keep in zip(slopes.unbind(1)[::-1], f.unbind(1)[::-1], strict=True):
            d = d + now
            parts.append(d)
            d = d * keep
        d = torch.stack(parts[::-1], 1)
        return (
            g * (1 - r),
            d * (1 - f),
            d * (before(c) - u) * f * (1 - f),
            g * (t - x) * r * (1 - r),
        )

    @staticmethod
    def backward(ctx, g):
        return SRU.gradients(ctx, g, lambda c: c[:, :-1])


class SRUShift(SRU):
    @staticmethod
    def backward(ctx, g):
        return SRU.gradients(ctx, g, lambda c: c[:, 1:])


def _sru(function):
    def sru(x, u, forget, reset):
        """r tanh(c) + (1 - r) x, c = f c + (1 - f) u from c = 0 on, all (N, T, D), T > 0.

        f = sigmoid(forget), r = sigmoid(reset).
        """
        expect(x.dim() == 3 and x.shape[1], "x (N, T, D), T > 0", tuple(x.shape))
        expect(x.shape == u.shape == forget.shape == reset.shape, "one shape", tuple(u.shape))
        return function.apply(x, u, forget, reset)

    return sru


add(
    "sru_shift",
    _sru,
    SRUShift,
    SRU,
    lambda: tuple(real(2, 3, 2, seed=seed) for seed in range(4)),
    bug="the forget gate's gradient takes the step's own state, not the one before",
    shows="the sample",
)
