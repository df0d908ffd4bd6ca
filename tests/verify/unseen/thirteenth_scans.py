"""Recurrences."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.thirteenth import add
from tests.verify.unseen.twelfth import wide


class Iterate(Function):
    @staticmethod
    def forward(ctx, x, w, steps):
        kept = [x]
        for _ in range(steps):
            kept.append((w * kept[-1]).tanh())
        ctx.save_for_backward(w, *kept)
        return kept[-1].clone()

    @staticmethod
    def gradients(ctx, g, value):
        w, *kept = ctx.saved_tensors
        grad_w = torch.zeros_like(w)
        for step in range(len(kept) - 1, 0, -1):
            g = g * (1 - kept[value(step)].square())
            grad_w = grad_w + g * kept[step - 1]
            g = g * w
        return g, grad_w, None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Iterate.gradients(ctx, g, lambda step: step)


class IterateLast(Iterate):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Iterate.gradients(ctx, g, lambda step: -1)


def _iterate(function):
    def iterate(x, w, steps=3):
        """x after some steps of x = tanh(w x), x and w of one shape."""
        return function.apply(x, w, steps)

    return iterate


add(
    "iterate_last",
    _iterate,
    IterateLast,
    Iterate,
    lambda: (real(2, 3), real(2, 3, seed=1)),
    bug="every step's slope is that of the last step's value (Genesis-Embodied-AI/quadrants#502)",
    trigger="two steps or more",
)


class Wkv(Function):
    """s = w s + k v, step by step; all s, and the last one for what comes next."""

    @staticmethod
    def states(k, v, w, state):
        out = [state]
        for key, value in zip(k.unbind(1), v.unbind(1), strict=True):
            out.append(w * out[-1] + key * value)
        return out

    @staticmethod
    def forward(ctx, k, v, w, state):
        ctx.save_for_backward(k, v, w, state)
        _, *out = Wkv.states(k, v, w, state)
        return torch.stack(out, 1), out[-1].clone()

    @staticmethod
    def gradients(ctx, g, carry, state):
        k, v, w, _ = ctx.saved_tensors
        states = Wkv.states(k, v, w, state)
        grad_w, parts = torch.zeros_like(carry), []
        for t in range(k.shape[1] - 1, -1, -1):
            carry = carry + g[:, t]
            parts.append(carry)
            grad_w = grad_w + carry * states[t]
            carry = carry * w
        kv = torch.stack(parts[::-1], 1)
        grads = kv * v, kv * k, grad_w.sum(0), carry
        return tuple(a.to(k.dtype) for a in grads)

    @staticmethod
    def backward(ctx, g, last):
        return Wkv.gradients(ctx, g, wide(last), ctx.saved_tensors[3])


class WkvState(Wkv):
    @staticmethod
    def backward(ctx, g, last):
        return Wkv.gradients(ctx, g, torch.zeros_like(wide(last)), ctx.saved_tensors[3])


class WkvNarrow(Wkv):
    @staticmethod
    def backward(ctx, g, last):
        return Wkv.gradients(ctx, g, last, ctx.saved_tensors[3])


class WkvBatch(Wkv):
    """The kernel's pointer to the state lacks the batch's offset."""

    @staticmethod
    def first(state):
        return state[:1].expand_as(state)

    @staticmethod
    def forward(ctx, k, v, w, state):
        out = Wkv.forward(ctx, k, v, w, WkvBatch.first(state))
        ctx.save_for_backward(k, v, w, state)
        return out

    @staticmethod
    def backward(ctx, g, last):
        return Wkv.gradients(ctx, g, wide(last), WkvBatch.first(ctx.saved_tensors[3]))


def _wkv(function):
    def wkv(k, v, w, state):
        """States s = w s + k v of k and v (N, T, D), T > 0, with the decay w (D,), from state (N, D) on.

        All of them (N, T, D), and the last (N, D).
        """
        return function.apply(k, v, w, state)

    return wkv


def wkv_sample():
    return real(2, 3, 2), real(2, 3, 2, seed=1), real(2, seed=2), real(2, 2, seed=3)


add(
    "wkv_last_state",
    _wkv,
    WkvState,
    Wkv,
    wkv_sample,
    bug="the returned state's gradient is taken in, and not used (huggingface/transformers#23774)",
    trigger="a loss of the second output",
)
add(
    "wkv_state_offset",
    _wkv,
    WkvBatch,
    Wkv,
    wkv_sample,
    bug="forward reads the first row's state for all rows, backward writes to each (BlinkDL/RWKV-LM#241)",
    trigger="a batch of two",
)
add(
    "wkv_narrow_state",
    _wkv,
    WkvNarrow,
    Wkv,
    wkv_sample,
    bug="the state's gradient is carried in bfloat16 (fla-org/flash-linear-attention#37)",
    trigger="bfloat16 and many steps",
)


class Scan(Function):
    @staticmethod
    def forward(ctx, f, x):
        h, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = f[:, t] * h + x[:, t]
            out.append(h)
        y = torch.stack(out, 1)
        ctx.save_for_backward(f, y)
        return y

    @staticmethod
    def both(ctx, grad):
        _, y = ctx.saved_tensors
        before = torch.cat((torch.zeros_like(y[:, :1]), y[:, :-1]), 1)
        return grad * before, grad

    @staticmethod
    def reverse(f, g):
        """The scan from the end on."""
        d, out = torch.zeros_like(g[:, 0]), []
        for t in range(g.shape[1] - 1, -1, -1):
            d = g[:, t] + d
            out.append(d)
            d = d * f[:, t]
        return torch.stack(out[::-1], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Scan.both(ctx, Scan.reverse(ctx.saved_tensors[0], g))


class ScanCarry(Scan):
    """In blocks; what a block hands to the one before is put in wrongly."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        f, _ = ctx.saved_tensors
        scale, carry, parts = torch.ones_like(g[:, :1]), torch.zeros_like(g[:, :1]), []
        for gates, grads in list(zip(f.split(8, 1), g.split(8, 1), strict=True))[::-1]:
            part = Scan.reverse(gates, grads) * scale + carry
            scale, carry = gates.prod(1, keepdim=True), part[:, :1] * gates[:, :1]
            parts.append(part)
        return Scan.both(ctx, torch.cat(parts[::-1], 1))


def _scan(function):
    def scan(f, x):
        """h_t = f_t h_(t-1) + x_t from h = 0 on, f and x (N, T), T > 0."""
        return function.apply(f, x)

    return scan


add(
    "scan_block_carry",
    _scan,
    ScanCarry,
    Scan,
    lambda: (real(2, 5), real(2, 5, seed=1)),
    bug="local times the carried factor plus the carry, not plus carry times factors (proger/accelerated-scan#15)",
    trigger="sequences longer than a block of 8",
)


class Zoneout(Function):
    @staticmethod
    def states(x, u, mask):
        out = [torch.zeros_like(x[0])]
        for now, keep in zip(x, mask, strict=True):
            out.append(keep * out[-1] + (1 - keep) * (now + u * out[-1]).tanh())
        return out

    @staticmethod
    def forward(ctx, x, u, mask):
        ctx.save_for_backward(x, u, mask)
        return torch.stack(Zoneout.states(x, u, mask)[1:])

    @staticmethod
    def gradients(ctx, g, masks):
        x, u, mask = ctx.saved_tensors
        states = Zoneout.states(x, u, mask)
        d, grad_u, parts = torch.zeros_like(x[0]), torch.zeros_like(wide(u)), []
        for t in range(x.shape[0] - 1, -1, -1):
            d = d + g[t]
            part = d * (1 - masks[t]) * (1 - (x[t] + u * states[t]).tanh().square())
            parts.append(part)
            grad_u = grad_u + wide(part * states[t]).sum(0)
            d = d * masks[t] + part * u
        return torch.stack(parts[::-1]), grad_u.to(u.dtype), None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Zoneout.gradients(ctx, g, ctx.saved_tensors[2])


class ZoneoutFirst(Zoneout):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        mask = ctx.saved_tensors[2]
        return Zoneout.gradients(ctx, g, mask[:1].expand_as(mask))


def _zoneout(function):
    def zoneout_rnn(x, u, mask):
        """States h = tanh(x + u h) of x (T, N, D), T > 0, u (D,), from h = 0 on.

        Where mask (T, N, D), a constant of zeros and ones, is 1, h stays.
        """
        return function.apply(x, u, mask.detach())

    return zoneout_rnn


add(
    "zoneout_mask",
    _zoneout,
    ZoneoutFirst,
    Zoneout,
    lambda: (real(3, 2, 2), real(2, seed=1), (real(3, 2, 2, seed=2, grad=False) > 0.5).to(F64)),
    bug="the first step's mask for all steps (lmnt-com/haste#43)",
    trigger="the sample",
)
