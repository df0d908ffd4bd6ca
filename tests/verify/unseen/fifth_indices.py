"""The fifth set, part four: gathering, scattering, segments, experts."""

import torch

from tests.verify.unseen import real, whole
from tests.verify.unseen.fifth import Kept, wrong_pull


class Gathered(Kept):
    value = staticmethod(lambda x, i: x[i])

    @staticmethod
    def pull(g, x, i):
        return torch.zeros_like(x).index_add(0, i, g)


def rows():
    return real(5, 3), torch.tensor([3, 0, 3, 1])


@wrong_pull(Gathered, "assigned where an index repeats (pytorch#1631)", rows)
def gathered_assigned(g, x, i):
    return torch.zeros_like(x).index_copy(0, i, g)


@wrong_pull(Gathered, "gathered once more instead of added (AiDotNet.Tensors#894)", rows)
def gathered_again(g, x, i):
    wide = torch.arange(len(x)) % len(i)
    return g[i[wide] % len(i)]


@wrong_pull(Gathered, "divided by how often an index repeats", rows)
def gathered_mean(g, x, i):
    count = torch.bincount(i, minlength=len(x)).clamp(min=1)
    return torch.zeros_like(x).index_add(0, i, g) / count[:, None]


class Scattered(Kept):
    """base + src added at index, along the last dimension; index may be narrower than src."""

    value = staticmethod(lambda base, src, i: base.scatter_add(-1, i, src[..., : i.shape[-1]]))

    @staticmethod
    def pull(g, base, src, i):
        grad = torch.zeros_like(src)
        grad[..., : i.shape[-1]] = g.gather(-1, i)
        return g, grad


def narrow():
    return real(3, 4), real(3, 4, seed=1), whole(4, 3, 2, seed=2)


@wrong_pull(Scattered, "what no index reads gets the last one's gradient (pytorch#188843)", narrow)
def scattered_broadcast(g, base, src, i):
    one = g.gather(-1, i)
    last = one[..., -1:].expand(*src.shape[:-1], src.shape[-1] - i.shape[-1])
    return g, torch.cat([one, last], -1)


class SegmentMean(Kept):
    """Mean of the rows of each of three segments; an empty one is 0."""

    @staticmethod
    def counts(x, s):
        return torch.bincount(s, minlength=3).clamp(min=1).to(x.dtype)[:, None]

    @staticmethod
    def value(x, s):
        zero = x.new_zeros(3, x.shape[-1])
        return zero.index_add(0, s, x) / SegmentMean.counts(x, s)

    @staticmethod
    def pull(g, x, s):
        return (g / SegmentMean.counts(x, s))[s]


def segments():
    return real(5, 4), torch.tensor([0, 0, 2, 2, 2])


@wrong_pull(SegmentMean, "divided by the rows over the segments, as if all were alike", segments)
def segment_even(g, x, s):
    return (g / (len(s) / 3))[s]


class SegmentMax(Kept):
    """The largest of each of three segments, 0 where it is empty."""

    @staticmethod
    def value(x, s):
        top = torch.zeros(3, dtype=x.dtype)
        return top.scatter_reduce(0, s, x, "amax", include_self=False)

    @staticmethod
    def pull(g, x, s):
        same = (x == SegmentMax.value(x, s)[s]).to(x.dtype)
        return g[s] * same / torch.zeros_like(g).index_add(0, s, same)[s]


@wrong_pull(
    SegmentMax,
    "compared with the maximum of all",
    lambda: (real(6), torch.tensor([0, 0, 1, 1, 1, 2])),
)
def segment_max_of_all(g, x, s):
    return g[s] * (x == x.amax()).to(x.dtype)


class Bag(Kept):
    """Mean of the rows of w that each line of i names; 0 is padding and doesn't count."""

    @staticmethod
    def counts(w, i):
        return (i != 0).sum(-1).clamp(min=1).to(w.dtype)[:, None]

    @staticmethod
    def value(w, i):
        return (w[i] * (i != 0)[..., None]).sum(1) / Bag.counts(w, i)

    @staticmethod
    def pull(g, w, i):
        each = (g / Bag.counts(w, i))[:, None] * (i != 0)[..., None]
        return torch.zeros_like(w).index_add(0, i.flatten(), each.flatten(0, 1))


def bags():
    return real(6, 3), torch.tensor([[1, 4, 0], [2, 2, 5]])


@wrong_pull(Bag, "padding counted in backward's mean", bags)
def bag_padding(g, w, i):
    each = (g / i.shape[-1])[:, None] * (i != 0)[..., None]
    return torch.zeros_like(w).index_add(0, i.flatten(), each.flatten(0, 1))


@wrong_pull(Bag, "padding's row gets a gradient", bags)
def bag_row_0(g, w, i):
    each = (g / Bag.counts(w, i))[:, None].expand(*i.shape, g.shape[-1])
    return torch.zeros_like(w).index_add(0, i.flatten(), each.flatten(0, 1))


class Routed(Kept):
    """Of three experts' outputs e (T, 3, D) the two of most weight, their weights made to sum to 1."""

    @staticmethod
    def weights(scores):
        p, i = scores.softmax(-1).topk(2, -1)
        return p / p.sum(-1, keepdim=True), i

    @staticmethod
    def value(scores, e):
        w, i = Routed.weights(scores)
        chosen = e.gather(1, i[..., None].expand(-1, -1, e.shape[-1]))
        return (w[..., None] * chosen).sum(1)

    @staticmethod
    def parts(g, scores, e):
        w, i = Routed.weights(scores)
        wide = i[..., None].expand(-1, -1, e.shape[-1])
        grad_e = torch.zeros_like(e).scatter(1, wide, w[..., None] * g[:, None])
        return w, i, (e.gather(1, wide) * g[:, None]).sum(-1), grad_e

    @staticmethod
    def pull(g, scores, e):
        w, i, d, grad_e = Routed.parts(g, scores, e)
        d = w * (d - (d * w).sum(-1, keepdim=True))
        return torch.zeros_like(scores).scatter(-1, i, d), grad_e


def experts():
    return real(4, 3), real(4, 3, 2, seed=1)


@wrong_pull(Routed, "the sum of the chosen weights taken as a constant", experts)
def routed_constant(g, scores, e):
    _, i, d, grad_e = Routed.parts(g, scores, e)
    p = scores.softmax(-1)
    d = d / p.gather(-1, i).sum(-1, keepdim=True)
    wide = torch.zeros_like(scores).scatter(-1, i, d)
    return p * (wide - (wide * p).sum(-1, keepdim=True)), grad_e


@wrong_pull(Routed, "no gradient for the router", experts)
def routed_no_router(g, scores, e):
    return None, Routed.parts(g, scores, e)[3]


class Limited(Kept):
    """Rows times a gate; those beyond a capacity of four are dropped."""

    @staticmethod
    def room(x):
        return (torch.arange(len(x)) < 4).to(x.dtype)[:, None]

    value = staticmethod(lambda x, gate: x * gate * Limited.room(x))

    @staticmethod
    def pull(g, x, gate):
        d = g * Limited.room(x)
        return d * gate, (d * x).sum(-1, keepdim=True)


@wrong_pull(
    Limited, "dropped rows get a gradient; the sample drops none", lambda: (real(3, 4), real(3, 1))
)
def limited_dropped(g, x, gate):
    return g * gate, (g * x).sum(-1, keepdim=True)


class Shuffled(Kept):
    """(N, 2·C, L) to (N, C, 2·L): two channels become neighbours in length."""

    value = staticmethod(lambda x: x.unflatten(1, (-1, 2)).movedim(2, 3).flatten(2))
    pull = staticmethod(lambda g, x: g.unflatten(2, (-1, 2)).movedim(3, 2).flatten(1, 2))


@wrong_pull(Shuffled, "channels put back in the other order", lambda: (real(2, 4, 3),))
def shuffled_order(g, x):
    return g.unflatten(2, (-1, 2)).movedim(3, 1).flatten(1, 2)
