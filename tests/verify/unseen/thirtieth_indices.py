"""Places, pieces and codes: gathering, padding, pooling, ragged rows, graphs and quantised numbers."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtieth import add, bounded, check, indices, read_flat, sized


# Max pooling over windows of 2 by 2, whose places are numbers in the flattened image
def pooled_places(wrong):
    class Pool(Function):
        @staticmethod
        def forward(ctx, x):
            y, place = F.max_pool2d(x, 2, return_indices=True)
            ctx.save_for_backward(place)
            ctx.shape = x.shape
            return y

        @staticmethod
        def backward(ctx, grad_y):
            (place,) = ctx.saved_tensors
            n, c, h, w = ctx.shape
            pitch = h if wrong else w
            row, column = place // pitch, place % pitch
            grad_x = grad_y.new_zeros(n, c, h * w)
            flat = (row * w + column).clamp(max=h * w - 1).flatten(2)
            return grad_x.scatter_add(2, flat, grad_y.flatten(2)).view(n, c, h, w)

    def pool(x):
        sized("x", x, None, None, None, None)
        check(min(x.shape[2:]) >= 2, "x: expected images of 2 by 2 at least")
        bounded("x", x, -1e30, 1e30)
        return Pool.apply(x)

    return pool


add(
    "max_indices_pitch",
    pooled_places,
    lambda: (real(2, 3, 4, 4),),
    bug="Backward takes the places apart by the image's height",
    trigger="images that are not square",
)


# Signals prolonged by their mirror image, the edge repeated: b a | a b c | c b
def symmetric_pad(wrong):
    class Pad(Function):
        @staticmethod
        def forward(ctx, x, n):
            ctx.n = n
            return torch.cat([x[..., :n].flip(-1), x, x[..., x.shape[-1] - n :].flip(-1)], -1)

        @staticmethod
        def backward(ctx, grad_y):
            n = ctx.n
            size = grad_y.shape[-1] - 2 * n
            left, middle, right = grad_y.split([n, size, n], -1)
            edge = 1 if wrong and size > n else 0
            left = F.pad(left.flip(-1), (edge, size - n - edge))
            right = F.pad(right.flip(-1), (size - n - edge, edge))
            return middle + left + right, None

    def pad(x, n=2):
        check(isinstance(n, int) and n >= 0, "n: expected an integer, 0 or more")
        check(x.ndim >= 1 and x.shape[-1] >= max(n, 1), "x: expected n numbers at least")
        return Pad.apply(x, n)

    return pad


add(
    "symmetric_pad_edge",
    symmetric_pad,
    lambda: (real(3, 5),),
    bug="Backward folds the margins as if the edge were not repeated",
)


# Rows of a table by their places, which count from the end where they are negative
def signed_lookup(wrong):
    class Rows(Function):
        @staticmethod
        def forward(ctx, table, place):
            ctx.save_for_backward(place)
            ctx.n = len(table)
            return table[place]

        @staticmethod
        def backward(ctx, grad_y):
            (place,) = ctx.saved_tensors
            place = place.clamp(min=0) if wrong else place % ctx.n
            zeros = grad_y.new_zeros(ctx.n, grad_y.shape[-1])
            return zeros.index_add(0, place, grad_y), None

    def rows(table, place):
        sized("table", table, None, None)
        check(place.ndim == 1, "place: expected a row of places")
        indices("place", place + len(table), 2 * len(table))
        return Rows.apply(table, place.long())

    return rows


add(
    "row_lookup_negative",
    signed_lookup,
    lambda: (real(5, 3), torch.tensor([1, 4, 1, 0])),
    bug="Backward sends the negative places to the first row",
    trigger="a negative place",
)


# Sums over runs of rows, of given lengths
def ragged_sums(wrong):
    class Sums(Function):
        @staticmethod
        def forward(ctx, x, length):
            ctx.save_for_backward(length)
            row = torch.arange(len(length), device=x.device).repeat_interleave(length)
            return x.new_zeros(len(length), x.shape[1]).index_add(0, row, x)

        @staticmethod
        def backward(ctx, grad_y):
            (length,) = ctx.saved_tensors
            if not wrong:
                return grad_y.repeat_interleave(length, 0), None
            start = length.cumsum(0)[:-1]
            mark = torch.zeros_like(length).new_zeros(int(length.sum()) + 1)
            mark[start] = 1
            return grad_y[mark.cumsum(0)[:-1]], None

    def sums(x, length):
        sized("x", x, None, None)
        sized("length", length, None)
        indices("length", length, len(x) + 1)
        check(int(length.sum()) == len(x), "length: expected lengths that sum to x's rows")
        return Sums.apply(x, length.long())

    return sums


add(
    "ragged_marks_empty",
    ragged_sums,
    lambda: (real(6, 3), torch.tensor([2, 1, 3])),
    bug="Backward marks each run's start with 1 and sums; two starts at one place count once",
    trigger="an empty run",
)


# The differences over a graph's edges: x at their end less x at their start
def edge_differences(wrong):
    class Differences(Function):
        @staticmethod
        def forward(ctx, x, start, end):
            ctx.save_for_backward(start, end)
            ctx.n = len(x)
            return x[end] - x[start]

        @staticmethod
        def backward(ctx, grad_y):
            start, end = ctx.saved_tensors
            grad_x = grad_y.new_zeros(ctx.n, grad_y.shape[1]).index_add(0, end, grad_y)
            if wrong:
                grad_x[start] -= grad_y
            else:
                grad_x = grad_x.index_add(0, start, -grad_y)
            return grad_x, None, None

    def differences(x, start, end):
        sized("x", x, None, None)
        check(start.ndim == 1 and start.shape == end.shape, "expected an edge's start and end")
        for name, t in (("start", start), ("end", end)):
            indices(name, t, len(x))
        return Differences.apply(x, start.long(), end.long())

    return differences


add(
    "edge_differences_repeated",
    edge_differences,
    lambda: (real(4, 3), torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3])),
    bug="The starts are subtracted by an indexed assignment, which keeps one of several",
    trigger="a node with two edges that leave it",
)


# Numbers of int8 codes times a scale for each row: (code - zero) scale
def dequantised(wrong):
    class Numbers(Function):
        @staticmethod
        def forward(ctx, scale, code, zero):
            ctx.save_for_backward(code, zero)
            return (code.to(scale.dtype) - zero.to(scale.dtype)[:, None]) * scale[:, None]

        @staticmethod
        def backward(ctx, grad_y):
            code, zero = ctx.saved_tensors
            if wrong:
                level = (code - zero[:, None]).to(grad_y.dtype)
            else:
                level = code.to(grad_y.dtype) - zero.to(grad_y.dtype)[:, None]
            return (grad_y * level).sum(1), None, None

    def numbers(scale, code, zero):
        sized("code", code, None, None)
        sized("scale", scale, len(code))
        sized("zero", zero, len(code))
        if code.dtype != torch.int8 or zero.dtype != torch.int8:
            raise TypeError("code, zero: expected int8")
        return Numbers.apply(scale, code, zero)

    return numbers


add(
    "codes_wrap",
    dequantised,
    lambda: (
        real(3, positive=True),
        torch.tensor([[3, -20, 90, 7], [-60, 40, 5, 1], [0, 12, -33, 80]], dtype=torch.int8),
        torch.tensor([4, -3, 0], dtype=torch.int8),
    ),
    bug="Backward subtracts in int8, which wraps around",
    trigger="a code and a zero point that differ by more than 127",
)


# Rows weighted by one number each, as a kernel would read them
def weighted_lines(wrong):
    class Weighted(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return w[:, None] * x

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            number = read_flat(w) if wrong else w
            return number[:, None] * grad_y, (grad_y * x).sum(1)

    def weighted(x, w):
        sized("x", x, None, None)
        sized("w", w, len(x))
        return Weighted.apply(x, w)

    return weighted


add(
    "weights_pitch",
    weighted_lines,
    lambda: (real(3, 4), real(3, seed=1)),
    bug="Backward reads the weights one after the other in memory",
    trigger="weights that are a column of a matrix",
)
