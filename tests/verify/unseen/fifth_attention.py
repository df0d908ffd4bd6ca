"""The fifth set, part two: attention, convolutions, pooling."""

import torch
import torch.nn.functional as F

from tests.verify.unseen import real
from tests.verify.unseen.fifth import Kept, wrong_pull

CAP, WINDOW = 2.0, 8


class Capped(Kept):
    """Attention with scores kept below a cap: softmax(c tanh(q kᵀ / c)) v."""

    @staticmethod
    def probabilities(q, k):
        t = ((q @ k.mT) / CAP).tanh()
        return (CAP * t).softmax(-1), t

    @staticmethod
    def value(q, k, v):
        return Capped.probabilities(q, k)[0] @ v

    @staticmethod
    def scores(g, q, k, v):
        p, t = Capped.probabilities(q, k)
        d = g @ v.mT
        return p, p * (d - (d * p).sum(-1, keepdim=True)), t

    @staticmethod
    def pull(g, q, k, v):
        p, s, t = Capped.scores(g, q, k, v)
        s = s * (1 - t * t)
        return s @ k, s.mT @ q, p.mT @ g


def qkv():
    return real(2, 3, 4), real(2, 3, 4, seed=1), real(2, 3, 4, seed=2)


@wrong_pull(Capped, "the cap's derivative forgotten", qkv)
def capped_slope(g, q, k, v):
    p, s, _ = Capped.scores(g, q, k, v)
    return s @ k, s.mT @ q, p.mT @ g


@wrong_pull(Capped, "the sum of dP·P taken as that of g·v", qkv)
def capped_delta(g, q, k, v):
    p, t = Capped.probabilities(q, k)
    s = p * (g @ v.mT - (g * v).sum(-1, keepdim=True)) * (1 - t * t)
    return s @ k, s.mT @ q, p.mT @ g


class Windowed(Kept):
    """Causal attention to the last eight places."""

    @staticmethod
    def mask(n, window):
        i = torch.arange(n)
        far = i[:, None] - i
        return (far >= 0) & (far < window)

    @staticmethod
    def probabilities(q, k, window=WINDOW):
        scores = q @ k.mT
        return scores.masked_fill(~Windowed.mask(q.shape[-2], window), -torch.inf).softmax(-1)

    @staticmethod
    def value(q, k, v):
        return Windowed.probabilities(q, k) @ v

    @staticmethod
    def pull(g, q, k, v, window=WINDOW):
        p = Windowed.probabilities(q, k, window)
        d = g @ v.mT
        s = p * (d - (d * p).sum(-1, keepdim=True))
        return s @ k, s.mT @ q, p.mT @ g


@wrong_pull(Windowed, "no window in backward; the sample is shorter (MSLK#263)", qkv)
def window_forgotten(g, q, k, v):
    return Windowed.pull(g, q, k, v, window=1 << 30)


class Shared(Kept):
    """q (H, L, D) attends to k and v (H/2, L, D): two heads share each."""

    @staticmethod
    def value(q, k, v):
        k, v = (t.repeat_interleave(2, 0) for t in (k, v))
        return (q @ k.mT).softmax(-1) @ v

    @staticmethod
    def wide(g, q, k, v):
        k, v = (t.repeat_interleave(2, 0) for t in (k, v))
        p = (q @ k.mT).softmax(-1)
        d = g @ v.mT
        s = p * (d - (d * p).sum(-1, keepdim=True))
        return s @ k, s.mT @ q, p.mT @ g

    @staticmethod
    def pull(g, q, k, v):
        grad, *shared = Shared.wide(g, q, k, v)
        return grad, *(t.unflatten(0, (-1, 2)).sum(1) for t in shared)


def shared():
    return real(4, 3, 2), real(2, 3, 2, seed=1), real(2, 3, 2, seed=2)


@wrong_pull(Shared, "heads grouped as by repeat", shared)
def shared_repeat(g, q, k, v):
    grad, *parts = Shared.wide(g, q, k, v)
    return grad, *(t.unflatten(0, (2, -1)).sum(0) for t in parts)


@wrong_pull(Shared, "only the last head of a group stored", shared)
def shared_last(g, q, k, v):
    grad, *parts = Shared.wide(g, q, k, v)
    return grad, *(t.unflatten(0, (-1, 2))[:, 1] for t in parts)


class Dilated(Kept):
    """Depthwise: y[l] = w0 x[l-2] + w1 x[l] + w2 x[l+2], along the last dimension; one w a channel."""

    @staticmethod
    def shifted(x, by):
        n = x.shape[-1]
        return F.pad(x, (2, 2))[..., 2 + by : 2 + by + n]

    @staticmethod
    def value(x, w):
        return sum(w[:, k, None] * Dilated.shifted(x, 2 * k - 2) for k in range(3))

    @staticmethod
    def pull(g, x, w):
        grad = sum(w[:, k, None] * Dilated.shifted(g, 2 - 2 * k) for k in range(3))
        each = [(g * Dilated.shifted(x, 2 * k - 2)).sum(-1) for k in range(3)]
        each = [t.reshape(-1, t.shape[-1]).sum(0) for t in each]
        return grad, torch.stack(each, -1)


def signal():
    return real(2, 3, 7), real(3, 3, seed=1)


@wrong_pull(Dilated, "contributions overwritten where two places meet (cherimoya#25)", signal)
def dilated_overwritten(g, x, w):
    _, grad_w = Dilated.pull(g, x, w)
    right, middle = w[:, 0, None] * Dilated.shifted(g, 2), w[:, 1, None] * g
    return torch.where(right != 0, right, middle), grad_w


@wrong_pull(
    Dilated, "x loaded once for all places of the kernel (flash-linear-attention#388)", signal
)
def dilated_unshifted(g, x, w):
    grad, _ = Dilated.pull(g, x, w)
    one = (g * x).sum(-1).reshape(-1, x.shape[-2]).sum(0)
    return grad, one[:, None].expand(w.shape)


class Overlapping(Kept):
    """Maxima of windows of three, two apart."""

    @staticmethod
    def value(x):
        return x.unfold(-1, 3, 2).amax(-1)

    @staticmethod
    def places(x):
        windows = x.unfold(-1, 3, 2)
        return windows.argmax(-1) + 2 * torch.arange(windows.shape[-2])

    @staticmethod
    def pull(g, x):
        return torch.zeros_like(x).scatter_add(-1, Overlapping.places(x), g)


@wrong_pull(Overlapping, "assigned where windows overlap, not added", lambda: (real(3, 9),))
def pool_assigned(g, x):
    return torch.zeros_like(x).scatter(-1, Overlapping.places(x), g)


class Partial(Kept):
    """Means of pairs; a last element that is left is its own mean."""

    @staticmethod
    def counts(x):
        n = x.shape[-1]
        return 2 - (torch.arange(-(-n // 2)) == n // 2).to(x.dtype)

    @staticmethod
    def value(x):
        n = x.shape[-1]
        return F.pad(x, (0, n % 2)).unflatten(-1, (-1, 2)).sum(-1) / Partial.counts(x)

    @staticmethod
    def pull(g, x):
        return (g / Partial.counts(x)).repeat_interleave(2, -1)[..., : x.shape[-1]]


@wrong_pull(Partial, "always divided by two; the sample is even")
def pool_last_window(g, x):
    return (g / 2).repeat_interleave(2, -1)[..., : x.shape[-1]]


class Nearest(Kept):
    value = staticmethod(lambda x: x.repeat_interleave(2, -1))
    pull = staticmethod(lambda g, x: g.unflatten(-1, (-1, 2)).sum(-1))


@wrong_pull(Nearest, "averaged as in downsampling, not summed")
def nearest_mean(g, x):
    return g.unflatten(-1, (-1, 2)).mean(-1)


class Stretched(Kept):
    """Linear interpolation to twice the length."""

    @staticmethod
    def matrix(x, corners=True):
        n = x.shape[-1]
        at = torch.arange(2 * n, dtype=x.dtype)
        at = at * (n - 1) / (2 * n - 1) if corners else (at / 2 - 0.25).clamp(0, n - 1)
        return (1 - (at[:, None] - torch.arange(n, dtype=x.dtype)).abs()).clamp(min=0)

    @staticmethod
    def value(x):
        return x @ Stretched.matrix(x).mT

    @staticmethod
    def pull(g, x):
        return g @ Stretched.matrix(x)


@wrong_pull(Stretched, "align_corners not handed on to backward")
def stretched_corners(g, x):
    return g @ Stretched.matrix(x, corners=False)
