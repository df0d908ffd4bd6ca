"""The sixth set, part five: layers, indices, pooling, convolution, ordering."""

import torch
from torch.nn import functional as F

from tests.verify.unseen import SIXTH, pair, real
from tests.verify.unseen.sixth import Rule, faulty, small


class SwiGLU(Rule):
    value = staticmethod(lambda x, w, u: F.silu(x @ w.mT) * (x @ u.mT))

    @staticmethod
    def pull(g, x, w, u):
        a, b = x @ w.mT, x @ u.mT
        s = a.sigmoid()
        da, db = g * b * s * (1 + a * (-a).sigmoid()), g * a * s
        return da @ w + db @ u, da.mT @ x, db.mT @ x


class SwiGLUNeeds(SwiGLU):
    @staticmethod
    def backward(ctx, g):
        x, w, u = ctx.saved_tensors
        dx, dw, du = SwiGLU.pull(g, x, w, u)
        need_x, need_w, _ = ctx.needs_input_grad
        return dx if need_x else None, dw if need_w else None, du if need_w else None


FEED = lambda: (real(2, 3), real(4, 3), real(4, 3, seed=1))  # noqa: E731
pair(
    "swiglu_6",
    SwiGLUNeeds.apply,
    SwiGLU.apply,
    FEED,
    "asks whether the wrong weight needs a gradient",
    into=SIXTH,
)


class LoRA(Rule):
    value = staticmethod(lambda x, w, a, b: x @ w.mT + 0.5 * (x @ a.mT) @ b.mT)

    @staticmethod
    def pull(g, x, w, a, b):
        low = 0.5 * g @ b
        return g @ w + low @ a, g.mT @ x, low.mT @ x, 0.5 * g.mT @ (x @ a.mT)


class LoRAFrozen(LoRA):
    @classmethod
    def backward(cls, ctx, g):
        grads = LoRA.pull(g, *ctx.saved_tensors)
        return grads if ctx.needs_input_grad[1] else (grads[0], None, None, None)


ADAPTER = lambda: (real(2, 3), real(4, 3), real(2, 3, seed=1), real(4, 2))  # noqa: E731
pair(
    "lora_6",
    LoRAFrozen.apply,
    LoRA.apply,
    ADAPTER,
    "no adapter gradients when the base is frozen",
    into=SIXTH,
)


class Clamp(Rule):
    """Between learned bounds."""

    value = staticmethod(lambda x, low, high: torch.minimum(torch.maximum(x, low), high))

    @staticmethod
    def pull(g, x, low, high):
        inner = g * (torch.maximum(x, low) <= high)
        return (
            (inner * (x >= low)).sum_to_size(x.shape),
            (inner * (x < low)).sum_to_size(low.shape),
            (g - inner).sum_to_size(high.shape),
        )


def bounded():
    low, high = torch.tensor([[-2.0], [2.0]], dtype=torch.float64)
    return small(3, 4), low.requires_grad_(), high.requires_grad_()


@faulty(Clamp, "no gradient for the bounds: seen where they bind", bounded)
def clamp(g, x, low, high):
    return g * ((x >= low) & (x <= high)), None, None


class Embedding(Rule):
    value = staticmethod(lambda w, index: w[index])

    @staticmethod
    def pull(g, w, index):
        return torch.zeros_like(w).index_add(
            0, index.flatten() % len(w), g.reshape(-1, w.shape[-1])
        )


@faulty(
    Embedding,
    "writes instead of adding: repeated rows",
    lambda: (real(5, 3), torch.tensor([0, 3, 4])),
)
def embedding(g, w, index):
    return torch.zeros_like(w).index_put((index,), g)


class ScatterMean(Rule):
    """Rows of x averaged by group, of 3."""

    @staticmethod
    def count(x, group):
        return torch.zeros(3, dtype=x.dtype, device=x.device).index_add(
            0, group, torch.ones_like(x[:, 0])
        )

    @classmethod
    def value(cls, x, group):
        total = torch.zeros(3, x.shape[1], dtype=x.dtype, device=x.device).index_add(0, group, x)
        return total / cls.count(x, group).clamp(min=1)[:, None]

    @classmethod
    def pull(cls, g, x, group):
        return (g / cls.count(x, group).clamp(min=1)[:, None])[group]


@faulty(
    ScatterMean,
    "divides by the wrong group's count",
    lambda: (real(5, 2), torch.tensor([0, 2, 2, 0, 2])),
)
def scatter_mean(g, x, group):
    return g[group] / ScatterMean.count(x, group).flip(0).clamp(min=1)[group][:, None]


class GlobalMax(Rule):
    value = staticmethod(lambda x: x.amax(-1))

    @staticmethod
    def pull(g, x):
        first = x.argmax(-1, keepdim=True)
        return torch.zeros_like(x).scatter(-1, first, g[..., None])


@faulty(GlobalMax, "every one of equal maxima gets the whole gradient")
def global_max(g, x):
    return g[..., None] * (x == x.amax(-1, keepdim=True))


class AveragePool(Rule):
    """Windows of 3, padded by 1; the padding is not counted."""

    value = staticmethod(lambda x: F.avg_pool1d(x, 3, 1, 1, count_include_pad=False))
    pull = staticmethod(
        lambda g, x: F.avg_pool1d(g / F.avg_pool1d(torch.ones_like(x), 3, 1, 1), 3, 1, 1)
    )


@faulty(AveragePool, "the edges divide by 3", lambda: (real(2, 2, 5),))
def average_pool(g, x):
    return F.avg_pool1d(g, 3, 1, 1)


class Nearest(Rule):
    """To length 6."""

    source = staticmethod(lambda x: torch.arange(6, device=x.device) * x.shape[-1] // 6)
    value = staticmethod(lambda x: x[..., Nearest.source(x)])
    pull = staticmethod(lambda g, x: torch.zeros_like(x).index_add(-1, Nearest.source(x), g))


@faulty(Nearest, "sums blocks: right for whole factors only", lambda: (real(2, 3),))
def nearest(g, x):
    length = x.shape[-1]
    return g[..., : 6 // length * length].unflatten(-1, (length, 6 // length)).sum(-1)


class PixelShuffle(Rule):
    value = staticmethod(lambda x: F.pixel_shuffle(x, 2).clone())
    pull = staticmethod(lambda g, x: F.pixel_unshuffle(g, 2))


@faulty(
    PixelShuffle,
    "order of the channels, right for one of them",
    lambda: (real(1, 4, 2, 3),),
)
def pixel_shuffle(g, x):
    n, c, h, w = x.shape
    blocks = g.reshape(n, c // 4, h, 2, w, 2)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(x.shape)


class Conv(Rule):
    """One dimension, stride 2, no padding."""

    @staticmethod
    def value(x, w):
        return torch.einsum("nctk,ock->not", x.unfold(-1, w.shape[-1], 2), w)

    @staticmethod
    def pull(g, x, w):
        k = w.shape[-1]
        patches = x.unfold(-1, k, 2)
        places = 2 * torch.arange(g.shape[-1], device=x.device)[:, None] + torch.arange(
            k, device=x.device
        )
        spread = torch.einsum("not,ock->nctk", g, w).to(x.dtype)
        dx = torch.zeros_like(x).index_add(-1, places.flatten(), spread.flatten(-2))
        return dx, torch.einsum("not,nctk->ock", g, patches)


@faulty(
    Conv,
    "positions that no window reaches are put in front",
    lambda: (real(2, 2, 7), real(3, 2, 3)),
)
def conv(g, x, w):
    spread = F.conv_transpose1d(g, w, stride=2)
    return F.pad(spread, (x.shape[-1] - spread.shape[-1], 0)), Conv.pull(g, x, w)[1]


class Median(Rule):
    """The mean of the two middle values."""

    @staticmethod
    def middle(x):
        n = x.shape[-1]
        order = x.argsort(dim=-1, stable=True)
        return order[..., (n - 1) // 2, None], order[..., n // 2, None]

    @classmethod
    def value(cls, x):
        low, high = cls.middle(x)
        return (0.5 * x.gather(-1, low) + 0.5 * x.gather(-1, high))[..., 0]

    @classmethod
    def pull(cls, g, x):
        low, high = cls.middle(x)
        half = 0.5 * g[..., None]
        return torch.zeros_like(x).scatter_add(-1, low, half).scatter_add(-1, high, half)


@faulty(Median, "all to the lower middle: right for odd lengths", lambda: (real(3, 5),))
def median(g, x):
    return torch.zeros_like(x).scatter(-1, Median.middle(x)[0], g[..., None])


class Sort(Rule):
    value = staticmethod(lambda x: x.sort(-1).values)
    pull = staticmethod(lambda g, x: torch.zeros_like(x).scatter(-1, x.sort(-1).indices, g))


@faulty(Sort, "gathers by the order instead of scattering")
def sort(g, x):
    return g.gather(-1, x.sort(-1).indices)
