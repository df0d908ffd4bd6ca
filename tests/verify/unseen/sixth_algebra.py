"""The sixth set, part six: scans, matrices, and how a backward is called."""

import math

import torch
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from tests.verify.unseen import SIXTH, pair, real
from tests.verify.unseen.sixth import Rule, X, faulty, small


class CumProd(Rule):
    value = staticmethod(lambda x: x.cumprod(-1))

    @staticmethod
    def pull(g, x):
        before = [torch.ones_like(x[..., 0])]
        for t in range(x.shape[-1] - 1):
            before.append(before[-1] * x[..., t])
        after, grads = g[..., -1], []
        for t in reversed(range(x.shape[-1])):
            grads.append(after * before[t])
            after = g[..., t - 1] + after * x[..., t]
        return torch.stack(grads[::-1], -1)


@faulty(CumProd, "divides by x: nan at 0")
def cumprod(g, x):
    return (g * x.cumprod(-1)).flip(-1).cumsum(-1).flip(-1) / x


class LogCumSumExp(Rule):
    """log of the sum of e^x so far."""

    @staticmethod
    def table(x):
        length = x.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        return x[..., None, :].masked_fill(future, -math.inf)

    @classmethod
    def value(cls, x):
        return cls.table(x).logsumexp(-1)

    @classmethod
    def pull(cls, g, x):
        return (g[..., None] * cls.table(x).softmax(-1)).sum(-2)


@faulty(LogCumSumExp, "e^x and e^-y apart: overflow for large x")
def log_cum_sum_exp(g, x):
    return x.exp() * (g * (-LogCumSumExp.value(x)).exp()).flip(-1).cumsum(-1).flip(-1)


class EMA(Rule):
    """h_t = a h_(t-1) + (1 - a) x_t along the last dimension, a = sigmoid(decay)."""

    @staticmethod
    def states(x, decay):
        a, h = decay.sigmoid(), [torch.zeros_like(x[..., 0])]
        for t in range(x.shape[-1]):
            h.append(a * h[-1] + (1 - a) * x[..., t])
        return h

    @classmethod
    def value(cls, x, decay):
        return torch.stack(cls.states(x, decay)[1:], -1)

    @classmethod
    def pull(cls, g, x, decay, carried=True):
        h, a = cls.states(x, decay), decay.sigmoid()
        dx, da, carry = [], torch.zeros_like(h[0]), torch.zeros_like(h[0])
        for t in reversed(range(x.shape[-1])):
            carry = g[..., t] + a * carry
            da = da + (carry if carried else g[..., t]) * (h[t] - x[..., t])
            dx.append((1 - a) * carry)
        return torch.stack(dx[::-1], -1), (da * a * (-decay).sigmoid()).sum_to_size(decay.shape)


@faulty(EMA, "the decay's gradient is not carried back", lambda: (real(3, 4), real(1)))
def ema(g, x, decay):
    return EMA.pull(g, x, decay, carried=False)


class Gated(Rule):
    """One step of a gated cell: (1 - z) h + z tanh(n)."""

    value = staticmethod(lambda h, z, n: h + z.sigmoid() * (n.tanh() - h))

    @staticmethod
    def pull(g, h, z, n):
        s, t = z.sigmoid(), n.tanh()
        return g * (-z).sigmoid(), g * (t - h) * s * (-z).sigmoid(), g * s * (1 - t * t)


@faulty(
    Gated,
    "the candidate for the gate's gradient is taken before tanh",
    lambda: (real(4), real(4, seed=1), small(4)),
)
def gated(g, h, z, n):
    dh, _, dn = Gated.pull(g, h, z, n)
    return dh, g * (n - h) * z.sigmoid() * (-z).sigmoid(), dn


# ------------------------------------------------------------------------------------------------------- matrices
class Inverse(Rule):
    value = staticmethod(torch.linalg.inv)

    @staticmethod
    def pull(g, a):
        y = torch.linalg.inv(a).mT
        return -y @ g @ y


def symmetric():
    a = real(3, 3, grad=False)
    return ((a @ a.mT + torch.eye(3, dtype=a.dtype)).requires_grad_(),)


@faulty(Inverse, "transposes left out: right at a symmetric matrix", symmetric)
def inverse(g, a):
    y = torch.linalg.inv(a)
    return -y @ g @ y


class Solve(Rule):
    """(a a^T + 1) x = b, which always has a solution."""

    @staticmethod
    def matrix(a):
        return (a @ a.mT + torch.eye(len(a), dtype=a.dtype, device=a.device)).to(a.dtype)

    value = staticmethod(lambda a, b: torch.linalg.solve(Solve.matrix(a), b))

    @staticmethod
    def pull(g, a, b):
        m = Solve.matrix(a)
        x, y = torch.linalg.solve(m, b), torch.linalg.solve(m, g)
        outer = y @ x.mT
        return -(outer + outer.mT) @ a, y


@faulty(
    Solve,
    "the product a a^T differentiated in its first factor only",
    lambda: (real(3, 3), real(3, 2)),
)
def solve(g, a, b):
    m = Solve.matrix(a)
    y = torch.linalg.solve(m, g)
    return -(y @ torch.linalg.solve(m, b).mT) @ a, y


class LogDet(Rule):
    """log det(a a^T + 1)."""

    value = staticmethod(lambda a: torch.linalg.slogdet(Solve.matrix(a))[1])
    pull = staticmethod(lambda g, a: 2 * g * torch.linalg.solve(Solve.matrix(a), a))


@faulty(LogDet, "a^T for a: right for a symmetric one", symmetric)
def log_det(g, a):
    return 2 * g * torch.linalg.solve(Solve.matrix(a.mT), a.mT)


class Bilinear(Rule):
    value = staticmethod(lambda x, w, y: torch.einsum("bi,ijk,bk->bj", x, w, y))

    @staticmethod
    def pull(g, x, w, y):
        return (
            torch.einsum("bj,ijk,bk->bi", g, w, y),
            torch.einsum("bi,bj,bk->ijk", x, g, y),
            torch.einsum("bi,ijk,bj->bk", x, w, g),
        )


@faulty(
    Bilinear,
    "indices of the weight swapped",
    lambda: (real(2, 3), real(3, 4, 3), real(2, 3, seed=1)),
)
def bilinear(g, x, w, y):
    dx, dw, dy = Bilinear.pull(g, x, w, y)
    return dx, dw.transpose(0, 2), dy


# ---------------------------------------------------------------------------------------- how a backward is called
class Sine(Rule):
    value = staticmethod(torch.sin)
    pull = staticmethod(lambda g, x: g * x.cos())


class SineInPlace(Sine):
    pull = staticmethod(lambda g, x: g.mul_(x.cos()))


pair(
    "sine_6",
    SineInPlace.apply,
    Sine.apply,
    X,
    "multiplies the incoming gradient in place",
    into=SIXTH,
)


def block(x, w):
    return (x * w).tanh() * x.sigmoid()


class Checkpoint(Function):
    """``block``, computed again in the backward."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return block(x, w)

    @staticmethod
    def backward(ctx, g):
        again = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            y = block(*again)
        return torch.autograd.grad(y, again, g.to(y.dtype))


pair(
    "checkpoint_6",
    Checkpoint.apply,
    lambda x, w: checkpoint(block, x, w, use_reentrant=False),
    lambda: (real(3, 4), real(4)),
    "no graph of the recomputation: second derivative lost",
    into=SIXTH,
)
