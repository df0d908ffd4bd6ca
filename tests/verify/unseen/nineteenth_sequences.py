"""Recurrent units."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.nineteenth import add, check, sized


class Lstm(Function):
    @staticmethod
    def steps(x, w, u, b):
        size = u.shape[0]
        h = c = x.new_zeros(x.shape[1], size)
        steps = []
        for t in range(x.shape[0]):
            z = x[t] @ w + h @ u + b
            i, f, o = z[:, : 3 * size].sigmoid().split(size, 1)
            a = z[:, 3 * size :].tanh()
            new = f * c + i * a
            steps.append((i, f, o, a, h, c, new))
            c, h = new, o * new.tanh()
        return steps

    @staticmethod
    def forward(ctx, x, w, u, b):
        ctx.save_for_backward(x, w, u, b)
        return torch.stack([o * c.tanh() for _, _, o, _, _, _, c in Lstm.steps(x, w, u, b)])

    @staticmethod
    def gradients(ctx, g, sent=lambda dz, i: (dz, dz), share=lambda grad, steps: grad):
        """`sent` says what goes back to the step's input and to the state before it."""
        x, w, u, b = ctx.saved_tensors
        steps = Lstm.steps(x, w, u, b)
        dh, dc = torch.zeros_like(g[0]), torch.zeros_like(g[0])
        dx, of_steps = [], []
        for t in reversed(range(len(steps))):
            i, f, o, a, h, before, c = steps[t]
            dh = dh + g[t]
            dc = dc + dh * o * (1 - c.tanh().square())
            gates = dc * a * i * (1 - i), dc * before * f * (1 - f), dh * c.tanh() * o * (1 - o)
            dz = torch.cat((*gates, dc * i * (1 - a.square())), 1)
            of_steps.append((x[t].mT @ dz, h.mT @ dz, dz.sum(0)))
            to_input, to_state = sent(dz, i)
            dx.insert(0, to_input @ w.mT)
            dh, dc = to_state @ u.mT, dc * f
        of_weights = (torch.stack(grads).sum(0) for grads in zip(*of_steps, strict=True))
        return torch.stack(dx), *(share(grad, len(steps)) for grad in of_weights)

    @staticmethod
    def backward(ctx, g):
        return Lstm.gradients(ctx, g)


class LstmCut(Lstm):
    @staticmethod
    def backward(ctx, g):
        return Lstm.gradients(ctx, g, sent=lambda dz, i: (dz, torch.zeros_like(dz)))


class LstmMean(Lstm):
    @staticmethod
    def backward(ctx, g):
        return Lstm.gradients(ctx, g, share=lambda grad, steps: grad / steps)


class LstmGate(Lstm):
    @staticmethod
    def backward(ctx, g):
        def sent(dz, i):
            swapped = torch.cat((i, dz[:, i.shape[1] :]), 1)
            return swapped, swapped

        return Lstm.gradients(ctx, g, sent=sent)


def _lstm(function):
    def lstm(x, w, u, b):
        """Outputs (T, N, H) of an LSTM that starts at 0, of x (T, N, D), T > 0.

        w (D, 4 H), u (H, 4 H) and b (4 H,) hold the input, forget and output gates and the cell.
        """
        sized("x", x, None, None, None)
        check(x.shape[0] > 0, "x: expected steps, got none")
        sized("u", u, None, None)
        sized("u", u, None, 4 * u.shape[0])
        sized("w", w, x.shape[2], u.shape[1])
        sized("b", b, u.shape[1])
        return function.apply(x, w, u, b)

    return lstm


def _sequence():
    return real(4, 2, 3), real(3, 8, seed=1), real(2, 8, seed=2), real(8, seed=3)


add(
    "lstm_recurrence",
    _lstm,
    LstmCut,
    Lstm,
    _sequence,
    bug="the outputs fed back count as constants (github.com/wangtong106/scribbles, LSTM full gradients)",
)
add(
    "lstm_steps",
    _lstm,
    LstmMean,
    Lstm,
    _sequence,
    bug="the weights' gradients are averaged over the steps (datascience.stackexchange.com/q/30850)",
)
add(
    "lstm_gate",
    _lstm,
    LstmGate,
    Lstm,
    _sequence,
    bug="the update gate sends back its value, not its gradient (pullrequest.ru 10156904, LSTM backpropagation)",
)


class Unit(Function):
    @staticmethod
    def forward(ctx, x, h, w, u):
        ctx.save_for_backward(x, h, w, u)
        out = (h @ w + x @ u).sigmoid()
        return out, out.clone()

    @staticmethod
    def gradients(ctx, top, future, weights):
        x, h, w, u = ctx.saved_tensors
        out = (h @ w + x @ u).sigmoid()
        d = (top + future) * out * (1 - out)
        of_w, of_u = weights(d, top, future)
        return d @ u.mT, d @ w.mT, h.mT @ of_w, x.mT @ of_u

    @staticmethod
    def backward(ctx, top, future):
        return Unit.gradients(ctx, top, future, lambda d, top, future: (d, d))


class UnitSplit(Unit):
    @staticmethod
    def backward(ctx, top, future):
        return Unit.gradients(ctx, top, future, lambda d, top, future: (future, top))


def _unit(function):
    def unit(x, h, w, u):
        """σ(h w + x u) for the layer above and for the next step, of x (N, D), h (N, H), w (H, H), u (D, H)."""
        sized("x", x, None, None)
        sized("h", h, x.shape[0], None)
        sized("w", w, h.shape[1], h.shape[1])
        sized("u", u, x.shape[1], h.shape[1])
        return function.apply(x, h, w, u)

    return unit


add(
    "unit_errors",
    _unit,
    UnitSplit,
    Unit,
    lambda: (real(2, 3), real(2, 4, seed=1), real(4, 4, seed=2), real(3, 4, seed=3)),
    bug="W's gradient knows only the future error, U's only the one above (R package rnn, vignette RNN units)",
)


class Gru(Function):
    """`reset` says whether the candidate sees the state through the reset gate."""

    reset = True

    @classmethod
    def parts(cls, x, h, w, u):
        size = h.shape[1]
        zr = (x @ w[:, : 2 * size] + h @ u[:, : 2 * size]).sigmoid()
        z, r = zr.split(size, 1)
        seen = r * h if cls.reset else h
        return z, r, (x @ w[:, 2 * size :] + seen @ u[:, 2 * size :]).tanh()

    @classmethod
    def step(cls, ctx, x, h, w, u):
        ctx.save_for_backward(x, h, w, u)
        z, _, g = cls.parts(x, h, w, u)
        return (1 - z) * h + z * g

    @staticmethod
    def forward(ctx, x, h, w, u):
        return Gru.step(ctx, x, h, w, u)

    @classmethod
    def gradients(cls, ctx, d, of_z, reset):
        x, h, w, u = ctx.saved_tensors
        size = h.shape[1]
        z, r, g = cls.parts(x, h, w, u)
        candidate = d * z * (1 - g.square())
        update = of_z(d, h, z, g) * z * (1 - z)
        through = candidate @ u[:, 2 * size :].mT
        gate = through * h * r * (1 - r) if reset else torch.zeros_like(h)
        both = torch.cat((update, gate), 1)
        dh = d * (1 - z) + both @ u[:, : 2 * size].mT + (r * through if reset else through)
        every = torch.cat((both, candidate), 1)
        seen = r * h if reset else h
        return every @ w.mT, dh, x.mT @ every, torch.cat((h.mT @ both, seen.mT @ candidate), 1)

    @staticmethod
    def backward(ctx, d):
        return Gru.gradients(ctx, d, lambda d, h, z, g: d * (g - h), True)


class GruSum(Gru):
    @staticmethod
    def backward(ctx, d):
        return Gru.gradients(ctx, d, lambda d, h, z, g: d * g + d * z, True)


class Plain(Gru):
    reset = False

    @staticmethod
    def forward(ctx, x, h, w, u):
        return Plain.step(ctx, x, h, w, u)

    @staticmethod
    def backward(ctx, d):
        return Plain.gradients(ctx, d, lambda d, h, z, g: d * (g - h), False)


class PlainReset(Plain):
    @staticmethod
    def backward(ctx, d):
        return Plain.gradients(ctx, d, lambda d, h, z, g: d * (g - h), True)


def _check_gru(x, h, w, u):
    sized("x", x, None, None)
    sized("h", h, x.shape[0], None)
    sized("w", w, x.shape[1], 3 * h.shape[1])
    sized("u", u, h.shape[1], 3 * h.shape[1])


def _gru(function):
    def gru(x, h, w, u):
        """The next state (N, H) of a GRU, of x (N, D) and h (N, H).

        w (D, 3 H) and u (H, 3 H) hold the update gate, the reset gate and the candidate.
        """
        _check_gru(x, h, w, u)
        return function.apply(x, h, w, u)

    return gru


def _plain(function):
    def plain_gru(x, h, w, u):
        """The next state (N, H) of a GRU whose reset gate resets nothing, of x (N, D) and h (N, H).

        w (D, 3 H) and u (H, 3 H) hold the update gate, the reset gate and the candidate.
        """
        _check_gru(x, h, w, u)
        return function.apply(x, h, w, u)

    return plain_gru


def _state():
    return real(2, 3), real(2, 2, seed=1), real(3, 6, seed=2), real(2, 6, seed=3)


add(
    "gru_update",
    _gru,
    GruSum,
    Gru,
    _state,
    bug="the update gate gets δ (g + z) instead of δ (g - h) (R package rnn, vignette GRU units)",
)
add(
    "gru_reset",
    _plain,
    PlainReset,
    Plain,
    _state,
    bug="forward leaves the reset gate out, backward does not (github.com/SEUNKOREA/TIL, GRU)",
)
