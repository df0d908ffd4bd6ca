"""Indices, reductions, and what is scattered."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirtyfifth import (
    add,
    alike,
    bounded,
    check,
    indices,
    others,
    positive,
    sized,
)


# Rows of a matrix (dim 0) or its columns (dim 1)
def take(wrong):
    rooms = {}

    def room(g, shape, dim):
        if not wrong:
            return g.new_zeros(shape)
        key = (shape, dim, g.dtype, g.device)
        if key not in rooms or dim == 0:
            rooms[key] = g.new_zeros(shape)
        return rooms[key]

    class Take(Function):
        @staticmethod
        def forward(ctx, x, index, dim):
            ctx.save_for_backward(index)
            ctx.shape, ctx.dim = x.shape, dim
            return x.index_select(dim, index)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            (index,) = ctx.saved_tensors
            grad = room(g, ctx.shape, ctx.dim).index_add_(ctx.dim, index, g)
            return grad.clone(), None, None

    def select(x, index, dim=1):
        alike(x)
        sized("x", x, None, None)
        check(dim in (0, 1), "dim: expected 0 or 1")
        sized("index", index, None)
        indices("index", index, x.shape[dim])
        return Take.apply(x, index.long(), dim)

    return select


add(
    "take_accumulates",
    take,
    lambda: (real(3, 5), torch.tensor([1, 4, 1])),
    bug="the gradient's memory is set to 0 for dim 0 only (apache/mxnet#19817)",
    trigger="a second backward along dim 1",
)


def row_prod(wrong):
    class Prod(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.prod(-1)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            if wrong:
                return (g * x.prod(-1))[..., None] / x
            return g[..., None] * others(x)

    def prod(x):
        alike(x)
        check(x.ndim >= 1 and 1 <= x.shape[-1] <= 16, "x: expected rows of 1 to 16 numbers")
        bounded("x", x, -100, 100)
        return Prod.apply(x)

    return prod


add(
    "row_prod_zero",
    row_prod,
    lambda: (real(3, 4),),
    bug="the product is divided by the number itself: 0 / 0 (tensorflow/tensorflow#2641)",
    trigger="an x of 0",
)


def row_cumprod(wrong):
    def back_through(x, g):
        rest, rows = torch.zeros_like(g[..., 0]), []
        for i in reversed(range(x.shape[-1])):
            rest = g[..., i] + rest
            rows.append(rest)
            rest = rest * x[..., i]
        return torch.stack(rows[::-1], -1)

    class Cumprod(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.cumprod(-1)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            if wrong:
                grad = (g * x.cumprod(-1)).flip(-1).cumsum(-1).flip(-1) / x
                return torch.where(x == 0, torch.zeros_like(x), grad)
            before = torch.cat([torch.ones_like(x[..., :1]), x[..., :-1]], -1).cumprod(-1)
            return before * back_through(x, g)

    def cumprod(x):
        alike(x)
        check(x.ndim >= 1 and 1 <= x.shape[-1] <= 16, "x: expected rows of 1 to 16 numbers")
        bounded("x", x, -100, 100)
        return Cumprod.apply(x)

    return cumprod


add(
    "row_cumprod_zero",
    row_cumprod,
    lambda: (real(3, 4),),
    bug="0 / 0 is replaced by 0: a zero gets no gradient (tensorflow/tensorflow#119430)",
    trigger="an x of 0",
)


def member(base, src, index):
    """Return which numbers go to which place, and the factors of each place, its own one first."""
    places = torch.arange(len(base), device=base.device)[:, None] == index
    factors = torch.where(places, src, torch.ones_like(src))
    return places, torch.cat([base[:, None], factors], 1)


# Each number of base is multiplied by the numbers that are sent to its place
def scatter_prod(wrong):
    class Scatter(Function):
        @staticmethod
        def forward(ctx, base, src, index):
            ctx.save_for_backward(base, src, index)
            return member(base, src, index)[1].prod(1)

        @staticmethod
        def backward(ctx, g):
            base, src, index = ctx.saved_tensors
            places, factors = member(base, src, index)
            grad = g[:, None] * others(factors)
            grad_src = torch.where(places, grad[:, 1:], torch.zeros_like(src)).sum(0)
            if wrong:
                grad_src = (g * factors.prod(1))[index] / src
                grad_src = grad_src.masked_fill(src == 0, 0)
            return grad[:, 0], grad_src, None

    def scatter(base, src, index):
        alike(base, src)
        sized("base", base, None)
        sized("src", src, None)
        sized("index", index, len(src))
        check(len(src) <= 15, "src: expected 15 numbers at most")
        indices("index", index, len(base))
        bounded("base", base, -100, 100)
        bounded("src", src, -100, 100)
        return Scatter.apply(base, src, index.long())

    return scatter


add(
    "scatter_prod_zero",
    scatter_prod,
    lambda: (real(3), real(6, seed=1), torch.tensor([0, 2, 0, 1, 2, 2])),
    bug="the product over the number, and 0 where the number is 0 (pytorch/pytorch#76523)",
    trigger="a src of 0",
)


# The same, of as many numbers only as there are indices; those behind are not read
def scatter_first(wrong):
    class Scatter(Function):
        @staticmethod
        def forward(ctx, base, src, index):
            ctx.save_for_backward(base, src, index)
            return member(base, src[: len(index)], index)[1].prod(1)

        @staticmethod
        def backward(ctx, g):
            base, src, index = ctx.saved_tensors
            read = src[: len(index)]
            places, factors = member(base, read, index)
            grad = g[:, None] * others(factors)
            small = torch.where(places, grad[:, 1:], torch.zeros_like(read)).sum(0)
            if wrong and len(small) == 1:
                return grad[:, 0], small * torch.ones_like(src), None
            return grad[:, 0], torch.cat([small, torch.zeros_like(src[len(index) :])]), None

    def scatter(base, src, index):
        alike(base, src)
        sized("base", base, None)
        sized("src", src, None)
        sized("index", index, None)
        check(len(index) <= min(len(src), 15), "index: expected at most as many as src, or 15")
        indices("index", index, len(base))
        bounded("base", base, -100, 100)
        bounded("src", src, -100, 100)
        return Scatter.apply(base, src, index.long())

    return scatter


add(
    "scatter_first_broadcasts",
    scatter_first,
    lambda: (real(3), real(5, seed=1), torch.tensor([2, 0, 2])),
    bug="a gradient of the index's size is broadcast over the whole src (pytorch/pytorch#188843)",
    trigger="one index for a longer src",
)


# Rows of a table; those of padding are zeros
def padded_embedding(wrong):
    class Embed(Function):
        @staticmethod
        def forward(ctx, table, index, padding):
            ctx.save_for_backward(index)
            ctx.shape, ctx.padding = table.shape, padding
            return table[index] * (index != padding)[..., None]

        @staticmethod
        def backward(ctx, g):
            (index,) = ctx.saved_tensors
            if not wrong:
                g = g * (index != ctx.padding)[..., None]
            flat = g.reshape(-1, ctx.shape[1])
            return g.new_zeros(ctx.shape).index_add(0, index.reshape(-1), flat), None, None

    def embed(table, index, padding=0):
        alike(table)
        sized("table", table, None, None)
        bounded("table", table, -1e3, 1e3)
        indices("index", index, len(table))
        check(0 <= padding < len(table), "padding: expected one of the table's rows")
        return Embed.apply(table, index.long(), padding)

    return embed


add(
    "padded_embedding_counts",
    padded_embedding,
    lambda: (real(5, 3), torch.tensor([[1, 3, 0], [4, 0, 0]])),
    bug="backward ignores the padding: its row gets a gradient (pytorch/pytorch#3506)",
    trigger="padding among the indices",
)


def lookup(wrong):
    class Lookup(Function):
        @staticmethod
        def forward(ctx, table, index):
            ctx.save_for_backward(index)
            ctx.shape = table.shape
            return table[index]

        @staticmethod
        def backward(ctx, g):
            (index,) = ctx.saved_tensors
            grad, flat = g.new_zeros(ctx.shape), g.reshape(-1, ctx.shape[1])
            if wrong:
                return grad.index_copy(0, index.reshape(-1), flat), None
            return grad.index_add(0, index.reshape(-1), flat), None

    def embed(table, index):
        alike(table)
        sized("table", table, None, None)
        indices("index", index, len(table))
        return Lookup.apply(table, index.long())

    return embed


add(
    "lookup_repeated",
    lookup,
    lambda: (real(6, 3), torch.tensor([[1, 3], [4, 0]])),
    bug="a row's gradients are stored, not added (tenstorrent/tt-metal#6232)",
    trigger="a repeated index",
)


# The largest along a dimension, and where it is
def largest(wrong):
    class Largest(Function):
        @staticmethod
        def forward(ctx, x, dim):
            value, place = x.max(dim)
            ctx.save_for_backward(place)
            ctx.mark_non_differentiable(place)
            ctx.shape, ctx.dim = x.shape, dim
            return value, place

        @staticmethod
        def backward(ctx, g, _):
            (place,) = ctx.saved_tensors
            dim = ctx.dim
            if wrong:
                behind = ctx.shape[dim + 1 :].numel()
                g = g.reshape(behind, -1).mT.reshape(g.shape)
            grad = g.new_zeros(ctx.shape)
            return grad.scatter(dim, place.unsqueeze(dim), g.unsqueeze(dim)), None

    def top(x, dim=1):
        alike(x)
        check(x.ndim >= 1 and -x.ndim <= dim < x.ndim, "dim: expected a dimension of x")
        check(x.numel() > 0, "x: expected numbers")
        return Largest.apply(x, dim % x.ndim)

    return top


add(
    "largest_middle",
    largest,
    lambda: (real(2, 4, 3),),
    bug="backward counts grad_output's numbers with the outer places fastest "
    "(PaddlePaddle/Paddle#79614)",
    trigger="a dimension in the middle and a grad_output that is not constant",
)


def row_mean(wrong):
    class Mean(Function):
        @staticmethod
        def forward(ctx, x, dim):
            ctx.shape, ctx.dim = x.shape, dim
            return x.mean(dim)

        @staticmethod
        def backward(ctx, g):
            n = g.numel() if wrong else ctx.shape[ctx.dim]
            return (g / n).unsqueeze(ctx.dim).expand(ctx.shape), None

    def mean(x, dim=1):
        alike(x)
        sized("x", x, None, None)
        check(dim in (0, 1), "dim: expected 0 or 1")
        return Mean.apply(x, dim)

    return mean


add(
    "row_mean_output",
    row_mean,
    lambda: (real(3, 5),),
    bug="the gradient is divided by the output's size (pocketpy/cTensor#24)",
)


# The k-th smallest of each row
def kth(wrong):
    class Put(Function):
        @staticmethod
        def forward(ctx, g, place, n, k):
            ctx.save_for_backward(place)
            ctx.k = k
            return g.new_zeros(*g.shape, n).scatter(-1, place[..., None], g[..., None])

        @staticmethod
        def backward(ctx, v):
            (place,) = ctx.saved_tensors
            if wrong:
                return v[..., ctx.k], None, None, None
            return v.gather(-1, place[..., None])[..., 0], None, None, None

    class Kth(Function):
        @staticmethod
        def forward(ctx, x, k):
            value, place = x.sort(dim=-1, stable=True)
            ctx.save_for_backward(place[..., k])
            ctx.n, ctx.k = x.shape[-1], k
            return value[..., k]

        @staticmethod
        def backward(ctx, g):
            return Put.apply(g, ctx.saved_tensors[0], ctx.n, ctx.k), None

    def select(x, k=1):
        alike(x)
        check(x.ndim >= 1, "x: expected rows")
        check(0 <= k < x.shape[-1], "k: expected a place of a row")
        return Kth.apply(x, k)

    return select


add(
    "kth_double",
    kth,
    lambda: (real(3, 5),),
    bug="double backward selects the place in the sorted row (pytorch/pytorch#1712)",
    trigger="a second derivative",
)


# The product of each row of positive numbers
def positive_prod(wrong):
    class Prod(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.product = None
            return x.prod(-1)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            product = ctx.product
            if product is None:
                product = x.prod(-1)
            if wrong:
                ctx.product = product.detach()
            return (g * product)[..., None] / x

    def prod(x):
        alike(x)
        positive("x", x)
        check(x.ndim >= 1 and 1 <= x.shape[-1] <= 16, "x: expected rows of 1 to 16 numbers")
        bounded("x", x, 0.01, 100)
        return Prod.apply(x)

    return prod


add(
    "positive_prod_again",
    positive_prod,
    lambda: (real(2, 4, positive=True),),
    bug="from the second time on backward takes its own product as constant "
    "(pytorch/pytorch#18619)",
    trigger="the second derivative of a second backward through one graph",
)


# Vectors (2 x, 3 x, 4 x), component by component
def components(wrong):
    class Components(Function):
        @staticmethod
        def forward(ctx, x):
            y = x.new_empty(*x.shape, 3)
            for i in range(3):
                y[..., i] = (i + 2) * x
            return y

        @staticmethod
        def backward(ctx, g):
            if wrong:
                return torch.zeros_like(g[..., 0])
            return 2 * g[..., 0] + 3 * g[..., 1] + 4 * g[..., 2]

    def stretch(x):
        alike(x)
        return Components.apply(x)

    return stretch


add(
    "components_lost",
    components,
    lambda: (real(5),),
    bug="what is written to a vector's components passes no gradient (NVIDIA/warp#248)",
)
