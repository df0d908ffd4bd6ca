"""Gathers and scatters."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.sixteenth import add, expect


def below(index, size):
    expect(((index >= 0) & (index < size)).all(), f"an index below {size}", index)


class Embedding(Function):
    @staticmethod
    def forward(ctx, tokens, w, padding):
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.padding = w.shape[0], padding
        return w[tokens] * (tokens != padding)[..., None]

    @staticmethod
    def gradients(ctx, g, keep):
        (tokens,) = ctx.saved_tensors
        g = (g * keep(tokens)).flatten(0, -2)
        return None, g.new_zeros(ctx.rows, g.shape[-1]).index_add(0, tokens.flatten(), g), None

    @staticmethod
    def backward(ctx, g):
        return Embedding.gradients(ctx, g, lambda tokens: (tokens != ctx.padding)[..., None])


class EmbeddingPadding(Embedding):
    @staticmethod
    def backward(ctx, g):
        return Embedding.gradients(ctx, g, lambda tokens: 1)


def _padded_embedding(function):
    def padded_embedding(tokens, w, padding=0):
        """Rows of w (V, D) for integers tokens (N, *); zeros where the token is padding."""
        expect(tokens.dim() and w.dim() == 2, "tokens (N, *), w (V, D)", tuple(w.shape))
        below(tokens, w.shape[0])
        return function.apply(tokens, w, padding)

    return padded_embedding


add(
    "padded_embedding_mask",
    _padded_embedding,
    EmbeddingPadding,
    Embedding,
    lambda: (torch.tensor([[1, 3, 0], [2, 0, 0]]), real(5, 4)),
    bug="backward lacks forward's mask: padding's row gets a gradient",
    shows="the sample",
)


class TakeAlong(Function):
    @staticmethod
    def forward(ctx, x, index, dim):
        ctx.save_for_backward(index)
        ctx.shape, ctx.dim = x.shape, dim
        return x.gather(dim, index)

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return g.new_zeros(ctx.shape).scatter_add(ctx.dim, index, g), None, None


class TakeAlongAssigned(TakeAlong):
    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return g.new_zeros(ctx.shape).scatter(ctx.dim, index, g), None, None


def _take_along(function):
    def take_along(x, index, dim=-1):
        """x's elements at index along dim; index has x's shape but for dim. An index may occur twice."""
        expect(-x.dim() <= dim < x.dim() == index.dim(), "one of x's dimensions", dim)
        rest = [
            a == b
            for i, (a, b) in enumerate(zip(x.shape, index.shape, strict=True))
            if i != dim % x.dim()
        ]
        expect(all(rest), "x's shape but for dim", tuple(index.shape))
        below(index, x.shape[dim])
        return function.apply(x, index, dim)

    return take_along


add(
    "take_along_assigned",
    _take_along,
    TakeAlongAssigned,
    TakeAlong,
    lambda: (real(3, 5), whole(5, 3, 4)),
    bug="scatter, not scatter_add",
    shows="an index that occurs twice, as in the sample",
)


class PutRows(Function):
    @staticmethod
    def forward(ctx, x, index, values):
        ctx.save_for_backward(index)
        return x.index_copy(0, index, values)

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return g.index_fill(0, index, 0), None, g[index]


class PutRowsInPlace(PutRows):
    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        grad_values = g[index]
        g[index] = 0
        return g, None, grad_values


def _put_rows(function):
    def put_rows(x, index, values):
        """x (N, D) with values (K, D) in its rows index (K,), no row twice; x itself stays."""
        expect(
            x.dim() == 2 and values.shape == (*index.shape, x.shape[1]),
            "values (K, D)",
            tuple(values.shape),
        )
        below(index, x.shape[0])
        expect((index.sort().values.diff() > 0).all(), "no row twice", index)
        return function.apply(x, index, values)

    return put_rows


add(
    "put_rows_in_place",
    _put_rows,
    PutRowsInPlace,
    PutRows,
    lambda: (real(5, 3), torch.tensor([3, 1]), real(2, 3, seed=1)),
    bug="backward sets rows of grad_output to 0 in place",
    shows="any grad_output that is looked at again",
)


class MaskedScatter(Function):
    @staticmethod
    def forward(ctx, x, mask, source):
        ctx.save_for_backward(mask)
        ctx.shape = source.shape
        return x.masked_scatter(mask[:, None], source)

    @staticmethod
    def gradients(ctx, g, of_x):
        (mask,) = ctx.saved_tensors
        taken = g[mask]
        rest = g.new_zeros(ctx.shape[0] - taken.shape[0], ctx.shape[1])
        return of_x(g, mask), None, torch.cat((taken, rest))

    @staticmethod
    def backward(ctx, g):
        return MaskedScatter.gradients(ctx, g, lambda g, mask: g.masked_fill(mask[:, None], 0))


class MaskedScatterAll(MaskedScatter):
    @staticmethod
    def backward(ctx, g):
        return MaskedScatter.gradients(ctx, g, lambda g, mask: g)


def _masked_scatter(function):
    def masked_scatter(x, mask, source):
        """x (N, D) with the first rows of source (K, D) where the bool mask (N,) is true, K at least their number."""
        expect(
            x.dim() == source.dim() == 2 and x.shape[1] == source.shape[1],
            "(N, D), (K, D)",
            tuple(source.shape),
        )
        expect(
            mask.shape == x.shape[:1] and mask.dtype == torch.bool,
            "a bool mask (N,)",
            tuple(mask.shape),
        )
        expect(mask.sum() <= source.shape[0], "enough rows", tuple(source.shape))
        return function.apply(x, mask, source)

    return masked_scatter


add(
    "masked_scatter_all",
    _masked_scatter,
    MaskedScatterAll,
    MaskedScatter,
    lambda: (real(5, 3), torch.tensor([False, True, True, False, False]), real(2, 3, seed=1)),
    bug="x gets the whole gradient, that of the rows written over too",
    shows="the sample",
)


class MaxUnpool(Function):
    @staticmethod
    def forward(ctx, x, index, size):
        ctx.save_for_backward(index)
        y = x.new_zeros(*x.shape[:2], size[0] * size[1])
        return y.scatter(2, index.flatten(2), x.flatten(2)).unflatten(2, size)

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return g.flatten(2).gather(2, index.flatten(2)).view(index.shape), None, None


class MaxUnpoolView(MaxUnpool):
    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        n, c, h, w = g.shape
        return g.view(n, c, h * w).gather(2, index.flatten(2)).view(index.shape), None, None


def _max_unpool(function):
    def max_unpool(x, index, size=(4, 4)):
        """x (N, C, H, W) put at the places index (N, C, H, W) of zeros (N, C, *size), no place twice."""
        expect(x.dim() == 4 and x.shape == index.shape, "index of x's shape", tuple(index.shape))
        below(index, size[0] * size[1])
        places = index.flatten(2).sort(-1).values
        expect((places.diff() > 0).all(), "no place twice", index)
        return function.apply(x, index, size)

    return max_unpool


def unpool_sample():
    x = real(2, 3, 4, 4, seed=1, grad=False)
    return real(2, 3, 2, 2), torch.nn.functional.max_pool2d(x, 2, return_indices=True)[1]


add(
    "max_unpool_view",
    _max_unpool,
    MaxUnpoolView,
    MaxUnpool,
    unpool_sample,
    bug="view of a grad_output that is not contiguous",
    shows="a transposed or cropped grad_output",
)
