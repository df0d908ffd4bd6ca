"""Recurrences and state-space models."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.seventeenth import add
from tests.verify.unseen.sixteenth import expect


class AllPole(Function):
    """y_t = x_t - Σ a_tk y_(t - k); the outputs before the first are zi, the latest first."""

    @staticmethod
    def forward(ctx, x, a, zi):
        past = [] if zi is None else list(zi.unbind(1)[::-1])
        order = a.shape[2]
        out = past or [torch.zeros_like(x[:, 0])] * order
        for now, taps in zip(x.unbind(1), a.unbind(1), strict=True):
            out.append(now - sum(c * y for c, y in zip(taps.unbind(1), out[::-1], strict=False)))
        y = torch.stack(out[order:], 1)
        ctx.save_for_backward(a, zi, y)
        return y

    @staticmethod
    def gradients(ctx, g, of_zi):
        a, zi, y = ctx.saved_tensors
        n, length, order = a.shape
        past = y.new_zeros(n, order) if zi is None else zi
        d = [torch.zeros_like(g[:, 0])] * order
        for t in range(length - 1, -1, -1):
            total = g[:, t]
            for k in range(1, min(order, length - 1 - t) + 1):
                total = total - a[:, t + k, k - 1] * d[-k]
            d.append(total)
        d = torch.stack(d[order:][::-1], 1)
        earlier = torch.cat((past.flip(1), y), 1).unfold(1, order, 1)[:, :length].flip(2)
        taps = -d[:, :, None] * a
        grad_zi = [taps.diagonal(j, 1, 2).sum(1) for j in range(order)]
        return d, -d[:, :, None] * earlier, of_zi(zi, torch.stack(grad_zi, 1))

    @staticmethod
    def backward(ctx, g):
        return AllPole.gradients(ctx, g, lambda zi, grad: None if zi is None else grad)


class AllPoleState(AllPole):
    @staticmethod
    def backward(ctx, g):
        return AllPole.gradients(ctx, g, lambda zi, grad: None)


def _all_pole(function):
    def all_pole(x, a, zi=None):
        """Recursive filter y_t = x_t - Σ_k a_tk y_(t - k) of x (N, T) with coefficients a (N, T, K); T, K > 0.

        zi (N, K): the outputs before the first step, the latest first; 0 if it is not given. Σ_k |a_tk| <= 2.
        """
        expect(
            a.dim() == 3 and x.shape == a.shape[:2] and a.shape[1] * a.shape[2],
            "x (N, T), a (N, T, K)",
            tuple(a.shape),
        )
        if zi is not None:
            expect(zi.shape == a.shape[::2], "zi (N, K)", tuple(zi.shape))
        expect((a.abs().sum(2) <= 2).all(), "Σ |a| <= 2", a)
        return function.apply(x, a, zi)

    return all_pole


add(
    "all_pole_state",
    _all_pole,
    AllPoleState,
    AllPole,
    lambda: (real(2, 5), (real(2, 5, 2, seed=1, grad=False) / 4).requires_grad_()),
    bug="the outputs before the first get no gradient",
    shows="zi that requires grad",
    missed="what is given for None has no gradient, which may be meant",
)


class HiddenMarkov(Function):
    @staticmethod
    def alphas(e, a, start):
        now, *rest = e.unbind(-2)
        out = [start + now]
        for now in rest:
            out.append((out[-1][..., None] + a).logsumexp(-2) + now)
        return torch.stack(out, -2)

    @staticmethod
    def forward(ctx, e, a, start):
        ctx.save_for_backward(e, a, start)
        return HiddenMarkov.alphas(e, a, start)[..., -1, :].logsumexp(-1)

    @staticmethod
    def gradients(ctx, g, time):
        e, a, start = ctx.saved_tensors
        alphas = HiddenMarkov.alphas(e, a, start)
        total = alphas[..., -1, :].logsumexp(-1)[..., None, None]
        out = [torch.zeros_like(e.select(time, 0))]
        for later in e.unbind(time)[:0:-1]:
            out.append((a + (later + out[-1])[..., None, :]).logsumexp(-1))
        betas = torch.stack(out[::-1], time)
        g = g[..., None, None]
        states = g * (alphas + betas - total).exp()
        later = (e + betas)[..., 1:, None, :]
        pairs = g[..., None] * (alphas[..., :-1, :, None] + a + later - total[..., None]).exp()
        return states, pairs.sum_to_size(a.shape), states[..., 0, :].sum_to_size(start.shape)

    @staticmethod
    def backward(ctx, g):
        return HiddenMarkov.gradients(ctx, g, -2)


class HiddenMarkovSecond(HiddenMarkov):
    @staticmethod
    def backward(ctx, g):
        return HiddenMarkov.gradients(ctx, g, 1)


def _hidden_markov(function):
    def hidden_markov(e, a, start):
        """log Σ over paths of e^(start + Σ a + Σ e) of scores e (*, T, S), T, S > 0, a (S, S), start (S,), finite."""
        expect(e.dim() > 1 and e.shape[-2] * e.shape[-1], "e (*, T, S), T, S > 0", tuple(e.shape))
        expect(a.shape == (e.shape[-1],) * 2 and start.shape == e.shape[-1:], "a", tuple(a.shape))
        expect(torch.stack([x.isfinite().all() for x in (e, a, start)]).all(), "finite scores", a)
        return function.apply(e, a, start)

    return hidden_markov


add(
    "hidden_markov_time",
    _hidden_markov,
    HiddenMarkovSecond,
    HiddenMarkov,
    lambda: (real(2, 4, 3), real(3, 3, seed=1), real(3, seed=2)),
    bug="backward goes along the second dimension, where time is in a batch of one dimension",
    shows="two batch dimensions, or none",
)


class LocalLevel(Function):
    """Kalman's filter of a level that moves by variance q, seen with variance r; it starts at 0, of variance 1."""

    @staticmethod
    def steps(y, q, r):
        m, p = torch.zeros_like(y[:, 0]), torch.ones_like(q)
        for now in y.unbind(1):
            before = p + q
            s, v = before + r, now - m
            yield before, s, v
            k = before / s
            m, p = m + k * v, (1 - k) * before

    @staticmethod
    def forward(ctx, y, q, r):
        ctx.save_for_backward(y, q, r)
        return -sum(
            ((2 * math.pi * s).log() + v.square() / s) / 2 for _, s, v in LocalLevel.steps(y, q, r)
        )

    @staticmethod
    def gradients(ctx, g, gain):
        y, q, r = ctx.saved_tensors
        dm, dp = torch.zeros_like(y[:, 0]), torch.zeros_like(q)
        grad_q, grad_r, parts = dp, dp, []
        for before, s, v in list(LocalLevel.steps(y, q, r))[::-1]:
            k = before / s
            dk = (dm * v).sum() - dp * before
            dv = dm * k - g * v / s
            ds = -(g * (1 / s - (v / s).square())).sum() / 2 + gain(-dk * k / s)
            dp = dp * (1 - k) + dk / s + ds
            grad_q, grad_r, dm = grad_q + dp, grad_r + ds, dm - dv
            parts.append(dv)
        return torch.stack(parts[::-1], 1), grad_q, grad_r

    @staticmethod
    def backward(ctx, g):
        return LocalLevel.gradients(ctx, g, lambda d: d)


class LocalLevelGain(LocalLevel):
    @staticmethod
    def backward(ctx, g):
        return LocalLevel.gradients(ctx, g, lambda d: 0)


def _local_level(function):
    def local_level(y, q, r):
        """Log-likelihoods (N,) of series y (N, T), T > 0: a level, at first 0 of variance 1, that moves by variance q.

        It is seen with variance r. q and r (), from 1e-3 to 100.
        """
        expect(y.dim() == 2 and y.shape[1], "y (N, T), T > 0", tuple(y.shape))
        expect(q.dim() == r.dim() == 0, "q, r ()", tuple(q.shape))
        fine = ((x >= 1e-3) & (x <= 100) for x in (q, r))
        expect(torch.stack(list(fine)).all(), "q, r from 1e-3 to 100", (q, r))
        return function.apply(y, q, r)

    return local_level


add(
    "local_level_gain",
    _local_level,
    LocalLevelGain,
    LocalLevel,
    lambda: (
        real(2, 4),
        torch.tensor(0.5, dtype=F64, requires_grad=True),
        torch.tensor(1.5, dtype=F64, requires_grad=True),
    ),
    bug="the gain's derivative by the innovation's variance is missing",
    shows="the sample",
)


class StateKernel(Function):
    @staticmethod
    def powers(a, length):
        steps = torch.arange(length, device=a.device)
        return steps, (a[..., None] * steps).exp()

    @staticmethod
    def forward(ctx, c, a, length):
        ctx.save_for_backward(c, a)
        ctx.length = length
        return 2 * (c[..., None] * StateKernel.powers(a, length)[1]).sum(1).real

    @staticmethod
    def gradients(ctx, g, twice):
        c, a = ctx.saved_tensors
        steps, v = StateKernel.powers(a, ctx.length)
        d = g[:, None] * v.conj()
        return 2 * d.sum(-1), twice * c.conj() * (d * steps).sum(-1), None

    @staticmethod
    def backward(ctx, g):
        return StateKernel.gradients(ctx, g, 2)


class StateKernelOnce(StateKernel):
    @staticmethod
    def backward(ctx, g):
        return StateKernel.gradients(ctx, g, 1)


def _state_kernel(function):
    def state_kernel(c, a, length=6):
        """2 Re Σ_n c_n e^(a_n l), l from 0 to length - 1, of complex c and a (H, N), to (H, length); Re a <= 0.

        It stands for the conjugate pairs of a diagonal state space; length from 1 to 1024.
        """
        expect(
            c.is_complex() and a.is_complex() and c.dim() == 2 and c.shape == a.shape,
            "complex c, a (H, N)",
            tuple(c.shape),
        )
        expect((a.real <= 0).all(), "Re a <= 0", a)
        expect(1 <= length <= 1024, "length from 1 to 1024", length)
        return function.apply(c, a, length)

    return state_kernel


def state_sample():
    c = torch.complex(real(2, 3, grad=False), real(2, 3, seed=1, grad=False))
    a = torch.complex(
        -real(2, 3, seed=2, grad=False, positive=True), real(2, 3, seed=3, grad=False)
    )
    return c.requires_grad_(), a.requires_grad_()


add(
    "state_kernel_pairs",
    _state_kernel,
    StateKernelOnce,
    StateKernel,
    state_sample,
    bug="the exponents' gradient lacks the factor 2 of the conjugate pairs",
    shows="the sample",
)
