"""Faults in what a sample leaves as it is: words, signs, labels, one row for all, the order of elements."""

import torch
from torch.autograd import Function

from tests.verify.known import F64, rand, register
from tests.verify.known.hidden import function, pair

POWERS = {"sum": 0.0, "mean": 1.0, "root": 0.5}


def pooled(x, scale):
    return x.sum(0) / len(x) ** POWERS[scale]


def pooled_mean(x, scale):
    return x.sum(0) / len(x) ** (scale != "sum")


Pooled, PooledMean = function(pooled), function(pooled)
PooledMean.pull = staticmethod(lambda g, *inputs: Pooled.pull(g, *inputs, by=pooled_mean))


def pool(rule):
    def call(x, scale="sum"):
        if scale not in POWERS:
            raise ValueError('expected scale "sum", "mean" or "root"')
        return rule.apply(x, scale)

    return call


register("word_in_the_message", "varied", pool(PooledMean), pool(Pooled), rand((4, 3)),
         bug="the root's gradient is the mean's", trigger='scale="root", which the message names')  # fmt: skip


def symmetric(x, index, sign):
    return x[index] + sign * x.flip(0)[index]


Symmetric, SymmetricOnly = function(symmetric), function(symmetric)
SymmetricOnly.pull = staticmethod(lambda g, x, i, sign: Symmetric.pull(g, x, i, abs(sign)))
register("sign_beside_indices", "varied", lambda x, index, symmetry=0: SymmetricOnly.apply(x, index, symmetry),
         lambda x, index, symmetry=0: Symmetric.apply(x, index, symmetry),
         lambda: (*rand((5, 3))(), torch.tensor([0, 3, 3, 1])),
         bug="the sign left out", trigger="symmetry=-1")  # fmt: skip


def agreement(x, label):
    kept = label != 0
    return (label[:, None] * x).sum() / kept.sum().clamp(min=1)


pair("labels_of_padding", agreement, lambda: (*rand((4, 3))(), torch.tensor([1, -1, -1, 1])), "padding is counted",
     "a label of 0, beside 1 and -1", slope_of=lambda x, label: (label[:, None] * x).mean(0).sum())  # fmt: skip


class LookedUp(Function):
    """Rows index (N, K) of tables (N, V, D), or of one table (1, V, D) for all."""

    @staticmethod
    def forward(ctx, table, index):
        ctx.save_for_backward(index)
        ctx.shape = table.shape
        rows = torch.arange(len(index))[:, None]
        return table.expand(len(index), *table.shape[1:])[rows, index]

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        rows = torch.arange(len(index))[:, None].expand_as(index) * (ctx.shape[0] > 1)
        return g.new_zeros(ctx.shape).index_put((rows, index), g, accumulate=True), None


class LookedUpFirst(LookedUp):
    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        n = min(len(index), ctx.shape[0])
        rows = torch.arange(n)[:, None].expand_as(index[:n])
        return g.new_zeros(ctx.shape).index_put((rows, index[:n]), g[:n], accumulate=True), None


register("one_table_for_all", "varied", LookedUpFirst.apply, LookedUp.apply,
         lambda: (*rand((2, 4, 3))(), torch.tensor([[0, 1, 1], [3, 2, 0]])), bug="the first row's gradient alone",
         trigger="one table for two rows")  # fmt: skip


class Norms(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.square().sum(-1, keepdim=True).sqrt()
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * x / torch.where(y == 0, 1, y)


class NormsWritten(Norms):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        if bool((y == 0).any()):
            g.masked_fill_(y == 0, 0)
        return g * x / torch.where(y == 0, 1, y)


register("written_at_zero", "varied", NormsWritten.apply, Norms.apply, rand((3, 4)), bug="writes zeros to grad_output",
         trigger="a row of zeros")  # fmt: skip


class NormsNaN(Norms):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * x / y


register("not_a_number_at_zero", "varied", NormsNaN.apply, Norms.apply, rand((3, 4)), bug="0 / 0 at a kink",
         trigger="a row of zeros")  # fmt: skip


class Steps(Function):
    """The slope of the interval that each element is in."""

    SLOPES = torch.tensor([0.25, 0.5, 1.0, 2.0], dtype=F64)

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return Steps.values(x)

    @staticmethod
    def values(x):
        return Steps.slopes(x) * x

    @staticmethod
    def slopes(x):
        return Steps.SLOPES.to(x)[(x < 0).long() * 2]

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * Steps.slopes(x)


class StepsOfLast(Steps):
    last = None

    @staticmethod
    def forward(ctx, x):
        StepsOfLast.last = Steps.slopes(x)
        return Steps.forward(ctx, x)

    @staticmethod
    def backward(ctx, g):
        slopes = StepsOfLast.last
        return g * (slopes if slopes.shape == g.shape else Steps.slopes(ctx.saved_tensors[0]))


register("intervals_of_last_call", "varied", StepsOfLast.apply, Steps.apply, rand((3, 4)),
         bug="the intervals of the last call", trigger="two calls, of other elements in each interval")  # fmt: skip


def stretched(x, spacing=(1.0, 1.0)):
    return (x.diff(dim=-2) / spacing[0]).square().sum() + (
        x.diff(dim=-1) / spacing[1]
    ).square().sum()


def stretched_evenly(x, spacing):
    return stretched(x, spacing) if spacing[0] == spacing[1] else stretched(x)


Stretched, StretchedEvenly = function(stretched), function(stretched)
StretchedEvenly.pull = staticmethod(
    lambda g, *inputs: Stretched.pull(g, *inputs, by=stretched_evenly)
)
register("unequal_spacing", "varied", lambda x, spacing=(1.0, 1.0): StretchedEvenly.apply(x, spacing),
         lambda x, spacing=(1.0, 1.0): Stretched.apply(x, spacing), rand((3, 4)), bug="takes the spacing to be 1",
         trigger="another number in the tuple that is the default")  # fmt: skip


class Inverses(Function):
    """The inverse of each matrix (*, D, D)."""

    @staticmethod
    def forward(ctx, a):
        y = a.inverse()
        ctx.save_for_backward(y)
        return y

    @classmethod
    def gradient(cls, y, g, turn):
        return -turn(y) @ g @ turn(y)

    @staticmethod
    def backward(ctx, g):
        return Inverses.gradient(*ctx.saved_tensors, g, lambda y: y.mT)


class InversesOfTwo(Inverses):
    @staticmethod
    def backward(ctx, g):
        return Inverses.gradient(*ctx.saved_tensors, g, lambda y: y.transpose(0, 1))


register("first_two_exchanged", "varied", InversesOfTwo.apply, Inverses.apply, rand((3, 3)),
         bug="transposes the first two dimensions", trigger="as many matrices as rows; others raise")  # fmt: skip


class Softened(Function):
    """tanh(p x) of x (N, C), p () or (C,)."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(x, p)
        return (x * p.expand(x.shape[1])).tanh()

    @classmethod
    def gradients(cls, x, p, g, reduce):
        g = g * (1 - (x * p).tanh().square())
        return g * p, reduce(g * x)

    @staticmethod
    def backward(ctx, g):
        x, p = ctx.saved_tensors
        return Softened.gradients(x, p, g, lambda of_p: of_p.sum_to_size(p.shape))


class SoftenedTogether(Softened):
    @staticmethod
    def backward(ctx, g):
        x, p = ctx.saved_tensors
        return Softened.gradients(x, p, g, lambda of_p: of_p.sum().expand(p.shape))


register("one_number_each", "varied", SoftenedTogether.apply, Softened.apply,
         lambda: (*rand((4, 3))(), torch.tensor(1.5, dtype=F64, requires_grad=True)),
         bug="the scale's gradient is summed over all channels", trigger="one for each channel")  # fmt: skip


def centred(x, w):
    dims = list(range(-w.dim(), 0))
    return (x - x.mean(dims, keepdim=True)).square() * w


def centred_last(x, w):
    return (x - x.mean(-1, keepdim=True)).square() * w


def centre(rule):
    def call(x, w):
        if not w.dim() or x.shape[-w.dim() :] != w.shape:
            raise ValueError("expected w of the last dimensions of x")
        return rule.apply(x, w)

    return call


Centred, CentredLast = function(centred), function(centred)
CentredLast.pull = staticmethod(lambda g, *inputs: Centred.pull(g, *inputs, by=centred_last))
register("weights_of_two_dimensions", "varied", centre(CentredLast), centre(Centred), rand((3, 4), (4,)),
         bug="the mean is over the last dimension alone", trigger="weights of two dimensions")  # fmt: skip


def shared_out(x, counts, w):
    if int(counts.sum()) != len(x):
        raise ValueError("expected shares of all rows")
    return torch.cat([r * s for r, s in zip(x.split(counts.tolist()), w, strict=True)])


SharedOut, SharedOutInRuns = function(shared_out), function(shared_out)


def in_runs(g, x, counts, w):
    of_x, _, of_w = SharedOut.pull(g, x, counts, w)
    return of_x, None, torch.cat([of_w[counts > 0], of_w[counts == 0]])


SharedOutInRuns.pull = staticmethod(in_runs)
register("a_share_of_nothing", "varied", SharedOutInRuns.apply, SharedOut.apply,
         lambda: (rand((5, 3))()[0], torch.tensor([2, 1, 2]), *rand((3, 3))(seed=1)), bug="who has none is not counted",
         trigger="somebody without rows before others")  # fmt: skip


class Turned(Function):
    """Re(x w) of complex x and w, each given as (*, 2 D): real parts, then imaginary."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        (a, b), (c, d) = x.chunk(2, -1), w.chunk(2, -1)
        return a * c - b * d

    @staticmethod
    def backward(ctx, g, sign=1):
        (a, b), (c, d) = (t.chunk(2, -1) for t in ctx.saved_tensors)
        return torch.cat([g * c, -g * d], -1), torch.cat([g * a, -sign * g * b], -1)


class TurnedBack(Turned):
    @staticmethod
    def backward(ctx, g):
        return Turned.backward(ctx, g, sign=-1)


register("imaginary_parts_apart", "varied", TurnedBack.apply, Turned.apply, rand((2, 4), (2, 4)), bug="a sign",
         trigger="the sample; the twin is given no complex dtype", gradcheck=True)  # fmt: skip
