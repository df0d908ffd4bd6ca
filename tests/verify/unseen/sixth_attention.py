"""The sixth set, part four: attention."""

import math

import torch

from tests.verify.unseen import SIXTH, pair, real
from tests.verify.unseen.sixth import Rule, faulty, small, through_softmax

QKV = lambda *shape: [real(*shape, seed=i) for i in range(3)]  # noqa: E731


def attend_back(g, p, v):
    """The gradients of the scores and of v."""
    return through_softmax(g @ v.mT, p), p.mT @ g


class Causal(Rule):
    """The last query sees every key; a query that sees none gives 0."""

    @staticmethod
    def weights(q, k, shift):
        s = q @ k.mT / math.sqrt(q.shape[-1])
        seen = torch.ones(s.shape, dtype=torch.bool, device=s.device).tril(shift)
        return s.masked_fill(~seen, torch.finfo(s.dtype).min).softmax(-1) * seen

    @classmethod
    def value(cls, q, k, v):
        return cls.weights(q, k, len(k) - len(q)) @ v

    @classmethod
    def pull(cls, g, q, k, v, shift=None):
        p = cls.weights(q, k, len(k) - len(q) if shift is None else shift)
        ds, dv = attend_back(g, p, v)
        ds = ds / math.sqrt(q.shape[-1])
        return ds @ k, ds.mT @ q, dv


@faulty(
    Causal,
    "mask aligned at the first key, right for as many queries as keys",
    lambda: tuple(QKV(4, 3)),
)
def causal(g, q, k, v):
    return Causal.pull(g, q, k, v, shift=0)


class Sink(Rule):
    """A learned logit joins the softmax and takes no value."""

    @staticmethod
    def weights(q, k, sink):
        s = q @ k.mT
        return torch.cat([s, sink.expand(len(q), 1).to(s.dtype)], -1).softmax(-1)

    value = staticmethod(lambda q, k, v, sink: Sink.weights(q, k, sink)[:, :-1] @ v)

    @staticmethod
    def pull(g, q, k, v, sink):
        p = Sink.weights(q, k, sink)
        ds, dv = attend_back(g, p[:, :-1], v)
        lost = -p[:, -1:] * (p[:, :-1] * (g @ v.mT)).sum(-1, keepdim=True)
        return ds @ k, ds.mT @ q, dv, lost.sum_to_size(sink.shape)


@faulty(Sink, "the sink's own gradient forgets its probability", lambda: (*QKV(3, 4), real(1)))
def sink(g, q, k, v, sink):
    p = Sink.weights(q, k, sink)
    ds, dv = attend_back(g, p[:, :-1], v)
    return ds @ k, ds.mT @ q, dv, -(p[:, :-1] * (g @ v.mT)).sum().reshape(1)


class Capped(Rule):
    value = staticmethod(lambda q, k, v: (30 * (q @ k.mT / 30).tanh()).softmax(-1) @ v)

    @staticmethod
    def pull(g, q, k, v):
        t = (q @ k.mT / 30).tanh()
        ds, dv = attend_back(g, (30 * t).softmax(-1), v)
        ds = ds * (1 - t * t)
        return ds @ k, ds.mT @ q, dv


@faulty(
    Capped,
    "slope of the cap left out: seen for large scores",
    lambda: tuple(small(3, 4) for _ in range(3)),
)
def capped(g, q, k, v):
    ds, dv = attend_back(g, (30 * (q @ k.mT / 30).tanh()).softmax(-1), v)
    return ds @ k, ds.mT @ q, dv


class ALiBi(Rule):
    @staticmethod
    def far(q, k):
        return (torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])).abs().to(q)

    value = staticmethod(
        lambda q, k, v, slope: (q @ k.mT - slope[:, None, None] * ALiBi.far(q, k)).softmax(-1) @ v
    )

    @staticmethod
    def pull(g, q, k, v, slope):
        far = ALiBi.far(q, k)
        ds, dv = attend_back(g, (q @ k.mT - slope[:, None, None] * far).softmax(-1), v)
        return ds @ k, ds.mT @ q, dv, -(ds * far).sum_to_size(len(slope), 1, 1).flatten()


@faulty(
    ALiBi,
    "bias left out where the weights are computed again",
    lambda: (*QKV(2, 3, 4), real(2, positive=True)),
)
def alibi(g, q, k, v, slope):
    ds, dv = attend_back(g, (q @ k.mT).softmax(-1), v)
    return ds @ k, ds.mT @ q, dv, -(ds * ALiBi.far(q, k)).sum((1, 2))


class Rotary(Rule):
    @staticmethod
    def value(x, angle):
        a, b = x.unflatten(-1, (2, -1)).unbind(-2)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    @staticmethod
    def pull(g, x, angle, table=None):
        cos, sin = (angle.cos(), angle.sin()) if table is None else table
        (a, b), (ga, gb) = x.unflatten(-1, (2, -1)).unbind(-2), g.unflatten(-1, (2, -1)).unbind(-2)
        turned = ga * (-a * sin - b * cos) + gb * (a * cos - b * sin)
        return torch.cat([ga * cos + gb * sin, gb * cos - ga * sin], -1), turned.sum_to_size(
            angle.shape
        )


class RotaryCached(Rotary):
    table = None

    @classmethod
    def value(cls, x, angle):
        RotaryCached.table = angle.cos(), angle.sin()
        return Rotary.value(x, angle)

    @staticmethod
    def pull(g, x, angle):
        return Rotary.pull(g, x, angle, RotaryCached.table)


BUG = "table kept on the class: the last call's, and a constant for the second derivative"
pair(
    "rotary_cached_6",
    RotaryCached.apply,
    Rotary.apply,
    lambda: (real(3, 4), real(3, 2)),
    BUG,
    into=SIXTH,
)
