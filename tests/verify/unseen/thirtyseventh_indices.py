"""Indices: sparse products, scatters, slices, groups."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.thirtyseventh import (
    add,
    alike,
    bounded,
    check,
    indices,
    memory,
    sized,
    tame,
)


# Sums of weighted neighbours: y[row] += weight x[column]
def weighted_neighbours(wrong):
    class Gather(Function):
        @staticmethod
        def forward(ctx, weight, x, row, column):
            order = row.argsort(stable=True)
            ctx.save_for_backward(weight, x, row, column, order)
            part = weight[order, None] * x[column[order]]
            return torch.zeros_like(x).index_add(0, row[order], part)

        @staticmethod
        def backward(ctx, g):
            weight, x, row, column, order = ctx.saved_tensors
            grad = (g[row[order]] * x[column[order]]).sum(1)
            if not wrong:
                grad = torch.zeros_like(grad).index_copy(0, order, grad)
            grad_x = torch.zeros_like(x).index_add(0, column, weight[:, None] * g[row])
            return grad, grad_x, None, None

    def gather(weight, x, row, column):
        sized("x", x, None, None)
        sized("weight", weight, None)
        for name, t in {"row": row, "column": column}.items():
            sized(name, t, len(weight))
            check(t.dtype == torch.int64, f"{name}: expected int64")
            indices(name, t, len(x))
        tame(weight=weight, x=x)
        return Gather.apply(weight, x, row, column)

    return gather


add(
    "weighted_neighbours_order",
    weighted_neighbours,
    lambda: (
        real(6, seed=1),
        real(4, 3),
        torch.tensor([3, 0, 2, 1, 0, 3]),
        torch.tensor([0, 1, 3, 2, 2, 1]),
    ),
    bug="the edges' gradient stays in the order of the rows (pyg-team/pytorch_geometric#7428)",
    trigger="edges that are not sorted by their rows",
)


# Products of the numbers with one index
def scatter_product(wrong):
    def product(x, index, groups):
        one = x.new_ones(groups, *x.shape[1:])
        where = index.view(-1, *[1] * (x.ndim - 1)).expand_as(x)
        return one.scatter_reduce(0, where, x, "prod")

    class Product(Function):
        @staticmethod
        def forward(ctx, x, index, groups):
            ctx.save_for_backward(x, index)
            ctx.groups = groups
            return product(x, index, groups)

        @staticmethod
        def backward(ctx, g):
            x, index = ctx.saved_tensors
            if wrong:
                y = product(x, index, ctx.groups)
                return (g * y)[index] / x, None, None
            rows = []
            for i in range(len(x)):
                others = [j for j in range(len(x)) if j != i and index[j] == index[i]]
                rows.append(g[index[i]] * x[others].prod(0))
            return torch.stack(rows), None, None

    def scatter(x, index, groups=3):
        check(x.ndim >= 1 and 1 <= len(x) <= 32 and x.numel() > 0, "x: expected 1 to 32 rows")
        check(isinstance(groups, int) and groups >= 1, "groups: expected a positive integer")
        sized("index", index, len(x))
        check(index.dtype == torch.int64, "index: expected int64")
        indices("index", index, groups)
        alike(x)
        bounded("x", x, -10, 10)
        return Product.apply(x, index, groups)

    return scatter


add(
    "scatter_product_zero",
    scatter_product,
    lambda: (real(6, 2), torch.tensor([1, 2, 0, 2, 0, 1])),
    bug="the product is divided by the number: NaN (rusty1s/pytorch_scatter#189)",
    trigger="a number that is 0",
)


# A matrix with another diagonal
def with_diagonal(wrong):
    class Write(Function):
        @staticmethod
        def forward(ctx, x, diagonal):
            return x.diagonal_scatter(diagonal)

        @staticmethod
        def backward(ctx, g):
            d = g.diagonal()
            grad = torch.zeros_like(g) if wrong else g.diagonal_scatter(torch.zeros_like(d))
            return grad, d.clone()

    def write(x, diagonal):
        sized("x", x, None, None)
        sized("diagonal", diagonal, min(x.shape))
        alike(x, diagonal)
        return Write.apply(x, diagonal)

    return write


add(
    "with_diagonal_rest",
    with_diagonal,
    lambda: (real(3, 4), real(3, seed=1)),
    bug="what stays of the matrix gets no gradient (pytorch/pytorch#183602)",
)


# A tensor with other rows from start to end
def with_rows(wrong):
    class WriteRows(Function):
        @staticmethod
        def forward(ctx, x, rows, start):
            ctx.start, ctx.end = start, start + len(rows)
            return x.slice_scatter(rows, 0, ctx.start, ctx.end)

        @staticmethod
        def backward(ctx, g):
            rows = g[ctx.start : ctx.end].clone()
            kept = torch.ones_like(g)
            kept[ctx.start : ctx.end] = 0
            if wrong and ctx.start == 0:
                kept[ctx.end :] = 0
            return g * kept, rows, None

    def write(x, rows, start=0):
        check(x.ndim >= 1 and x.numel() > 0, "x: expected one dimension at least")
        check(rows.ndim == x.ndim and rows.shape[1:] == x.shape[1:], "rows: expected rows of x")
        check(isinstance(start, int) and start >= 0, "start: expected an integer >= 0")
        check(1 <= len(rows) <= len(x) - start, "rows: expected to fit into x")
        tame(x=x, rows=rows)
        return WriteRows.apply(x, rows, start)

    return write


add(
    "with_rows_rest",
    with_rows,
    lambda: (real(5, 2), real(2, 2, seed=1)),
    bug="behind rows that are written from the start nothing gets a gradient (pytorch/pytorch#180771)",
)


# The product of two matrices of given places, as its values at the places that can differ from 0
def sparse_product(wrong):
    def dense(value, place, shape):
        return value.new_zeros(shape).index_put(tuple(place), value, accumulate=True)

    class Product(Function):
        @staticmethod
        def forward(ctx, a, b, at, bt, sizes):
            n, k, m = sizes
            full = dense(a, at, (n, k)) @ dense(b, bt, (k, m))
            some = dense(torch.ones_like(a), at, (n, k)) @ dense(torch.ones_like(b), bt, (k, m))
            ctx.save_for_backward(a, b, at, bt, some > 0)
            ctx.sizes = sizes
            return full[some > 0]

        @staticmethod
        def backward(ctx, g):
            a, b, at, bt, some = ctx.saved_tensors
            n, k, m = ctx.sizes
            full = g.new_zeros(n, m).masked_scatter(some, memory(g) if wrong else g)
            grad_a = full @ dense(b, bt, (k, m)).mT
            grad_b = dense(a, at, (n, k)).mT @ full
            return grad_a[tuple(at)], grad_b[tuple(bt)], None, None, None

    def product(a, b, at, bt, sizes=(3, 4, 3)):
        check(len(sizes) == 3 and all(s >= 1 for s in sizes), "sizes: expected three")
        for t, p, shape in ((a, at, sizes[:2]), (b, bt, sizes[1:])):
            sized("a, b", t, None)
            sized("at, bt", p, 2, len(t))
            check(p.dtype == torch.int64, "at, bt: expected int64")
            indices("rows", p[0], shape[0])
            indices("columns", p[1], shape[1])
        tame(a=a, b=b)
        return Product.apply(a, b, at, bt, tuple(sizes))

    return product


add(
    "sparse_product_expanded",
    sparse_product,
    lambda: (
        real(4),
        real(4, seed=1),
        torch.tensor([[0, 1, 2, 2], [0, 1, 3, 0]]),
        torch.tensor([[0, 1, 3, 3], [0, 1, 2, 0]]),
    ),
    bug="backward reads the cotangent as if it were contiguous (pytorch/pytorch#102493)",
    trigger="a cotangent of one number for all places, as sum() sends it",
)


# Attention over the edges of a graph: softmax by target of the scores, times the sources' values
def edge_attention(wrong):
    class Multiply(Function):
        @staticmethod
        def forward(ctx, p, h, source, target):
            ctx.save_for_backward(p, h, source, target)
            return torch.zeros_like(h).index_add(0, target, p[:, None] * h[source])

        @staticmethod
        def backward(ctx, g):
            p, h, source, target = ctx.saved_tensors
            grad_h = torch.zeros_like(h).index_add(0, source, p[:, None] * g[target])
            grad_p = None if wrong else (g[target] * h[source]).sum(1)
            return grad_p, grad_h, None, None

    def attend(score, h, source, target):
        sized("h", h, None, None)
        sized("score", score, None)
        for name, t in {"source": source, "target": target}.items():
            sized(name, t, len(score))
            check(t.dtype == torch.int64, f"{name}: expected int64")
            indices(name, t, len(h))
        alike(score, h)
        bounded("score", score, -20, 20)
        bounded("h", h, -1e3, 1e3)
        e = score.exp()
        total = e.new_zeros(len(h)).index_add(0, target, e)
        return Multiply.apply(e / total[target], h, source, target)

    return attend


add(
    "edge_attention_scores",
    edge_attention,
    lambda: (
        real(6, seed=1),
        real(4, 3),
        torch.tensor([0, 1, 2, 3, 0, 2]),
        torch.tensor([1, 1, 0, 2, 2, 1]),
    ),
    bug="the edges' values get no gradient from the sparse product (diegoantognini/pyGAT#13)",
)


# Chosen rows of a table, followed by other rows
def rows_and_more(wrong):
    class Join(Function):
        @staticmethod
        def forward(ctx, x, more, index):
            ctx.save_for_backward(index)
            ctx.rows = len(x)
            return torch.cat([x[index], more])

        @staticmethod
        def backward(ctx, g):
            (index,) = ctx.saved_tensors
            zero = g.new_zeros(ctx.rows, *g.shape[1:])
            grad = zero if wrong else zero.index_add(0, index, g[: len(index)])
            return grad, g[len(index) :].clone(), None

    def join(x, more, index):
        check(x.ndim >= 1 and x.numel() > 0, "x: expected one dimension at least")
        check(more.ndim == x.ndim and more.shape[1:] == x.shape[1:], "more: expected rows of x")
        sized("index", index, None)
        check(index.dtype == torch.int64, "index: expected int64")
        indices("index", index, len(x))
        tame(x=x, more=more)
        return Join.apply(x, more, index)

    return join


add(
    "rows_and_more_chosen",
    rows_and_more,
    lambda: (real(4), real(2, seed=1), torch.tensor([0, 1, 1])),
    bug="elements that were taken out one by one lose their gradient (JuliaDiff/ReverseDiff.jl#145)",
)


# sin(u) + u v, u having been overwritten by 0 in some places
def overwritten(wrong):
    class Clear(Function):
        @staticmethod
        def forward(ctx, u, where):
            ctx.save_for_backward(where)
            return u.masked_fill(where, 0)

        @staticmethod
        def backward(ctx, g):
            (where,) = ctx.saved_tensors
            return torch.where(where, -g if wrong else torch.zeros_like(g), g), None

    def clear(u, v, where):
        check(u.ndim >= 1 and u.shape == v.shape == where.shape, "expected tensors of one shape")
        check(where.dtype == torch.bool, "where: expected booleans")
        tame(u=u, v=v)
        u = Clear.apply(u, where)
        return u.sin() + u * v

    return clear


add(
    "overwritten_minus",
    overwritten,
    lambda: (real(3, 4), real(3, 4, seed=1), whole(2, 3, 4) == 1),
    bug="a parameter that is overwritten by 0 keeps a gradient of -1 (vgvassilev/clad#650)",
)


# Rows times the matrix of their group; rows are sorted by group
def grouped_product(wrong):
    class Product(Function):
        @staticmethod
        def forward(ctx, x, w, count):
            ctx.save_for_backward(x, w, count)
            parts = x.split(count.tolist())
            return torch.cat([p @ m for p, m in zip(parts, w, strict=True)])

        @staticmethod
        def backward(ctx, g):
            x, w, count = ctx.saved_tensors
            sizes = count.tolist()
            gs, xs = g.split(sizes), x.split(sizes)
            grad_x = torch.cat([p @ m.mT for p, m in zip(gs, w, strict=True)])
            grad_w = torch.stack([p.mT @ q for p, q in zip(xs, gs, strict=True)])
            if wrong:
                grad_w = grad_w.masked_fill((count == 0)[:, None, None], float("inf"))
            return grad_x, grad_w, None

    def product(x, w, count):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1], None)
        sized("count", count, len(w))
        check(count.dtype == torch.int64, "count: expected int64")
        check(bool((count >= 0).all()) and int(count.sum()) == len(x), "count: expected x's rows")
        tame(x=x, w=w)
        return Product.apply(x, w, count)

    return product


add(
    "grouped_product_empty",
    grouped_product,
    lambda: (real(5, 3), real(3, 3, 2, seed=1), torch.tensor([2, 1, 2])),
    bug="the gradient of a group without rows is not set to 0 (nvidia-cosmos/cosmos-rl#262)",
    trigger="a group without rows: infinity",
)


# The largest of x times a weight over the weights that count
def largest_product(wrong):
    class Largest(Function):
        @staticmethod
        def forward(ctx, x, c, keep):
            each = (x[:, None] * c).masked_fill(~keep, -float("inf"))
            best = each.argmax(1)
            if wrong:
                best = torch.full_like(best, int(keep.nonzero()[-1]))
            ctx.save_for_backward(x, c, best)
            return each.amax(1)

        @staticmethod
        def backward(ctx, g):
            x, c, best = ctx.saved_tensors
            return g * c[best], torch.zeros_like(c).index_add(0, best, g * x), None

    def largest(x, c, keep):
        sized("x", x, None)
        sized("c", c, None)
        sized("keep", keep, len(c))
        tame(x=x, c=c)
        check(keep.dtype == torch.bool and bool(keep.any()), "keep: expected one True at least")
        return Largest.apply(x, c, keep)

    return largest


add(
    "largest_product_last",
    largest_product,
    lambda: (real(5), real(4, seed=1), torch.tensor([True, False, True, True])),
    bug="after `continue` the loop's reverse takes the last turn for the winner (NVIDIA/warp#1552)",
)
