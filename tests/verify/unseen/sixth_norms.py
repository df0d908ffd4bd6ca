"""The sixth set, part two: norms."""

import torch

from tests.verify.unseen import SIXTH, pair, real
from tests.verify.unseen.sixth import Rule, X, faulty


def standard(x, eps=1e-5):
    c = x - x.mean(-1, keepdim=True)
    r = (c.square().mean(-1, keepdim=True) + eps).rsqrt()
    return c * r, r


def through_standard(g, x):
    n, r = standard(x)
    return r * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))


class LayerNorm(Rule):
    value = staticmethod(lambda x, w, b: standard(x)[0] * w + b)

    @staticmethod
    def pull(g, x, w, b):
        return (
            through_standard(g * w, x),
            (g * standard(x)[0]).sum_to_size(w.shape),
            g.sum_to_size(b.shape),
        )


@faulty(LayerNorm, "the mean's term is left out", lambda: (real(3, 4), real(4), real(4, seed=1)))
def layer_norm(g, x, w, b):
    n, r = standard(x)
    d = g * w
    return r * (d - n * (d * n).mean(-1, keepdim=True)), (g * n).sum(0), g.sum(0)


class RMSNorm(Rule):
    value = staticmethod(lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w)

    @staticmethod
    def pull(g, x, w):
        r = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        n, d = x * r, g * w
        return r * (d - n * (d * n).mean(-1, keepdim=True)), (g * n).sum_to_size(w.shape)


@faulty(RMSNorm, "eps outside the root in the backward", lambda: (real(3, 4), real(4)))
def rms_norm(g, x, w):
    r = 1 / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6)
    n, d = x * r, g * w
    return r * (d - n * (d * n).mean(-1, keepdim=True)), (g * n).sum_to_size(w.shape)


class InstanceNorm(Rule):
    value = staticmethod(lambda x: standard(x)[0])
    pull = staticmethod(through_standard)


@faulty(InstanceNorm, "reads the saved input as if it were contiguous", lambda: (real(2, 3, 4),))
def instance_norm(g, x):
    return through_standard(g, x.as_strided(x.shape, torch.empty(x.shape).stride()))


class GroupNorm(Rule):
    @staticmethod
    def value(x, w, groups):
        return standard(x.unflatten(1, (groups, -1)).flatten(2))[0].reshape(x.shape) * w[:, None]

    @staticmethod
    def pull(g, x, w, groups):
        rows = x.unflatten(1, (groups, -1)).flatten(2)
        d = through_standard((g * w[:, None]).unflatten(1, (groups, -1)).flatten(2), rows)
        n = standard(rows)[0].reshape(x.shape)
        return d.reshape(x.shape), (g * n).sum_to_size(w.shape[0], 1).squeeze(1)


@faulty(
    GroupNorm, "weight's gradient of the first sample only", lambda: (real(1, 4, 3), real(4), 2)
)
def group_norm(g, x, w, groups):
    d, _ = GroupNorm.pull(g, x, w, groups)
    return d, (g * standard(x.unflatten(1, (groups, -1)).flatten(2))[0].reshape(x.shape))[0].sum(-1)


class WeightNorm(Rule):
    value = staticmethod(lambda v, m: m * v * (v.square().sum(-1, keepdim=True) + 1e-6).rsqrt())

    @staticmethod
    def pull(g, v, m):
        r = (v.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        along = (g * v * r).sum(-1, keepdim=True)
        return m * r * (g - v * r * along), along.sum_to_size(m.shape)


@faulty(
    WeightNorm, "projection on the whole matrix, not row by row", lambda: (real(1, 4), real(1, 1))
)
def weight_norm(g, v, m):
    r = (v.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    return m * r * (g - v * r * (g * v * r).sum()), (g * v * r).sum(-1, keepdim=True)


class Unit(Rule):
    """x / max(|x|, 0.01)."""

    @staticmethod
    def value(x):
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=0.01)

    @staticmethod
    def pull(g, x):
        s = x.square().sum(-1, keepdim=True)
        large = s > 1e-4
        r = torch.where(large, s, 1.0).rsqrt()
        return torch.where(large, r * (g - x * r * (g * x * r).sum(-1, keepdim=True)), g * 100)


@faulty(
    Unit,
    "projects also where the norm is clamped",
)
def unit(g, x):
    r = 1 / x.square().sum(-1, keepdim=True).clamp(min=1e-4).sqrt()
    return r * (g - x * r * (g * x * r).sum(-1, keepdim=True))


class RootMeanSquare(Rule):
    value = staticmethod(lambda x: (x.square().mean(-1) + 1e-3).sqrt())

    @staticmethod
    def pull(g, x):
        return (g * (x.square().mean(-1) + 1e-3).rsqrt())[..., None] * x / x.shape[-1]


class RootMeanSquareNarrow(RootMeanSquare):
    @staticmethod
    def backward(ctx, g):
        return RootMeanSquare.pull(g, *ctx.saved_tensors)


BUG = "squares overflow in half precision, in the backward only"
pair(
    "root_mean_square_6",
    RootMeanSquareNarrow.apply,
    RootMeanSquare.apply,
    X,
    BUG,
    into=SIXTH,
)
