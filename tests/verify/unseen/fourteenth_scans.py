"""Scans and iterations."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.fourteenth import add, require


class DecayScan(Function):
    """y_i is the sum of x_j times the decays between j and i; in blocks of rows and columns."""

    rows, columns = 2, 4

    @staticmethod
    def matrix(log_decay):
        total = log_decay.cumsum(0)
        gap = (total.unsqueeze(1) - total).tril()
        return gap.exp().tril()

    @staticmethod
    def forward(ctx, x, log_decay):
        ctx.save_for_backward(x, log_decay)
        return DecayScan.matrix(log_decay) @ x

    @staticmethod
    def gradients(ctx, g, spill):
        """A row's share of a decay's gradient: what lies before the decay's place, up to the row."""
        x, log_decay = ctx.saved_tensors
        m = DecayScan.matrix(log_decay)
        part = (g @ x.mT * m).tril()
        part = (part.cumsum(1) - part).tril()
        return m.mT @ g, spill(part).sum(0)

    @staticmethod
    def backward(ctx, g):
        return DecayScan.gradients(ctx, g, lambda part: part)


class DecayScanSpill(DecayScan):
    """Where columns' blocks go beyond the rows' block, the zeros behind them are written too far on."""

    @staticmethod
    def spill(part):
        part, size = part.clone(), len(part)
        for start in range(0, size, DecayScan.rows):
            end = start + DecayScan.rows
            beyond = -end % DecayScan.columns
            if end < size and beyond:
                part[start + 1 : end, :beyond] = 0  # the start of the block's next row
        return part

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return DecayScan.gradients(ctx, g, DecayScanSpill.spill)


def _decay_scan(function):
    def decay_scan(x, log_decay):
        """States y = exp(log_decay) y + x of x (T, D) along T, from 0 on; log_decay (T,) is in [-1e4, 0]."""
        require(x.dim() == 2 and log_decay.shape == x.shape[:1], "x must be (T, D), log_decay (T,)")
        require(
            bool(((log_decay <= 0) & (log_decay >= -1e4)).all()), "log_decay must be in [-1e4, 0]"
        )
        return function.apply(x, log_decay)

    return decay_scan


add(
    "decay_scan_spill",
    _decay_scan,
    DecayScanSpill,
    DecayScan,
    lambda: (
        real(6, 2),
        torch.linspace(-1, -0.1, 6, dtype=torch.float64, requires_grad=True),
    ),
    bug="zeros behind a block of columns overwrite the next row of decays (state-spaces/mamba#537)",
    trigger="the sample (a length of 3 or more)",
)


class Descent(Function):
    """Coordinate descent towards k chosen among N, softly."""

    @staticmethod
    def steps(s, k, iterations, eps):
        """The values of b before each step, the last b, and the last a."""
        b, kept = -s, []
        a = s.new_zeros(s.shape[:-1]).unsqueeze(-1)
        for _ in range(iterations):
            kept.append(b)
            a = eps * (math.log(k) - ((s + b) / eps).logsumexp(-1, keepdim=True))
            b = -(s + a).relu()
        return kept, b, a

    @staticmethod
    def forward(ctx, s, k, iterations, eps):
        ctx.save_for_backward(s)
        ctx.options = k, iterations, eps
        _, b, a = Descent.steps(s, k, iterations, eps)
        return ((s + a + b) / eps).exp()

    @staticmethod
    def gradients(ctx, g, last):
        (s,) = ctx.saved_tensors
        k, iterations, eps = ctx.options
        kept, b, a = Descent.steps(s, k, iterations, eps)
        grad = db = g * ((s + a + b) / eps).exp() / eps
        da = last(db.sum(-1, keepdim=True))
        for before in reversed(kept):
            a = eps * (math.log(k) - ((s + before) / eps).logsumexp(-1, keepdim=True))
            d = db * (s + a > 0)
            da = da - d.sum(-1, keepdim=True)
            db = -da * ((s + before) / eps).softmax(-1)
            grad = grad - d + db
            da = torch.zeros_like(da)
        return grad - db, None, None, None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Descent.gradients(ctx, g, lambda da: da)


class DescentLast(Descent):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Descent.gradients(ctx, g, torch.zeros_like)


def _descent(function):
    def descent(s, k=2.0, iterations=10, eps=1.0):
        """Scores (..., N), N > 0, near 1 for about k of s (..., N); k > 0, iterations > 0, eps in [0.01, 100]."""
        require(s.dim() > 0 and s.shape[-1] > 0, "s must be (..., N), N > 0")
        require(
            k > 0 and iterations > 0 and 0.01 <= eps <= 100, "k, iterations > 0, eps in [0.01, 100]"
        )
        return function.apply(s, k, iterations, eps)

    return descent


add(
    "descent_last_sum",
    _descent,
    DescentLast,
    Descent,
    lambda: (real(8),),
    bug="the last a has no gradient from the scores themselves (lucidrains/CoLT5-attention#8)",
    trigger="the sample",
)


class DeltaRule(Function):
    """S = S + β (v - S k) kᵀ, and the readings S q."""

    @staticmethod
    def states(k, v, beta):
        s = [k.new_zeros(v.shape[1], k.shape[1])]
        for key, value, b in zip(k, v, beta, strict=True):
            s.append(s[-1] + b * torch.outer(value - s[-1] @ key, key))
        return s

    @staticmethod
    def forward(ctx, q, k, v, beta):
        ctx.save_for_backward(q, k, v, beta)
        s = DeltaRule.states(k, v, beta)
        return torch.stack([s[t + 1] @ q[t] for t in range(len(q))])

    @staticmethod
    def gradients(ctx, g, at):
        """at: in a step t, which state the step's error v - S k is taken with for beta."""
        q, k, v, beta = ctx.saved_tensors
        s = DeltaRule.states(k, v, beta)
        carry, grads = torch.zeros_like(s[0]), []
        for t in range(len(q) - 1, -1, -1):
            carry = carry + torch.outer(g[t], q[t])
            error, along = v[t] - s[t] @ k[t], carry @ k[t]
            by_beta = (v[t] - s[at(t)] @ k[t]) @ along
            by_k = beta[t] * (carry.mT @ error - s[t].mT @ along)
            grads.append((s[t + 1].mT @ g[t], by_k, beta[t] * along, by_beta))
            carry = carry - beta[t] * torch.outer(along, k[t])
        return tuple(torch.stack(a[::-1]) for a in zip(*grads, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return DeltaRule.gradients(ctx, g, lambda t: t)


class DeltaRuleAfter(DeltaRule):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return DeltaRule.gradients(ctx, g, lambda t: t + 1)


def _delta_rule(function):
    def delta_rule(q, k, v, beta):
        """Readings (T, E) of a memory written by the delta rule: q and k (T, D), v (T, E), beta (T,), T > 0."""
        require(
            q.dim() == v.dim() == 2 and q.shape == k.shape and len(q) > 0, "q, k: (T, D), T > 0"
        )
        require(len(v) == len(q) and beta.shape == q.shape[:1], "v must be (T, E), beta (T,)")
        return function.apply(q, k, v, beta)

    return delta_rule


add(
    "delta_rule_after",
    _delta_rule,
    DeltaRuleAfter,
    DeltaRule,
    lambda: (
        real(4, 3),
        real(4, 3, seed=1),
        real(4, 2, seed=2),
        real(4, seed=3).sigmoid().detach().requires_grad_(),
    ),
    bug="beta's gradient takes the error after the step, not before it",
    trigger="the sample",
)
