"""Sparse products, segments, experts, quantized weights, counts."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentyninth import (
    add,
    bounded,
    check,
    indices,
    read_flat,
    same,
    sized,
)


# Experts choose their tokens: the sum of gate times what each expert makes of its own
def expert_choice(wrong):
    class Choice(Function):
        @staticmethod
        def forward(ctx, x, w, gate, chosen):
            ctx.save_for_backward(x, w, gate, chosen)
            y = torch.einsum("ecd,edh->ech", x[chosen], w) * gate[..., None]
            out = x.new_zeros(len(x), w.shape[2])
            return out.index_add(0, chosen.flatten(), y.flatten(0, 1))

        @staticmethod
        def backward(ctx, grad_y):
            x, w, gate, chosen = ctx.saved_tensors
            g = grad_y[chosen]
            scaled = g * gate[..., None]
            parts = torch.einsum("ech,edh->ecd", scaled, w).flatten(0, 1)
            grad_x = torch.zeros_like(x)
            if wrong:
                grad_x = grad_x.index_copy(0, chosen.flatten(), parts)
            else:
                grad_x = grad_x.index_add(0, chosen.flatten(), parts)
            grad_w = torch.einsum("ecd,ech->edh", x[chosen], scaled)
            grad_gate = (g * torch.einsum("ecd,edh->ech", x[chosen], w)).sum(-1)
            return grad_x, grad_w, grad_gate, None

    def mixture(x, w, gate, chosen):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1], None)
        sized("gate", gate, len(w), None)
        sized("chosen", chosen, *gate.shape)
        indices("chosen", chosen, len(x))
        return Choice.apply(x, w, gate, chosen.long())

    return mixture


add(
    "expert_choice_shared",
    expert_choice,
    lambda: (
        real(4, 3),
        real(2, 3, 2, seed=1),
        real(2, 2, seed=2),
        torch.tensor([[0, 2], [3, 1]]),
    ),
    bug="Of the experts that chose a token only the last one gives it a gradient",
    trigger="a token that two experts chose",
)


# Linear layer of 4-bit weights, two in a byte, with a scale for each row
def four_bits(wrong):
    def weight(packed, scale, signed):
        low, high = packed % 16, packed // 16
        q = torch.stack((low, high), -1).flatten(1)
        if signed:
            q = torch.where(q > 7, q - 16, q)
        return q.to(scale.dtype) * scale[:, None]

    class Linear(Function):
        @staticmethod
        def forward(ctx, x, packed, scale):
            ctx.save_for_backward(x, packed, scale)
            return x @ weight(packed, scale, True).mT

        @staticmethod
        def backward(ctx, grad_y):
            x, packed, scale = ctx.saved_tensors
            q = weight(packed, torch.ones_like(scale), True)
            grad_x = grad_y @ weight(packed, scale, not wrong)
            return grad_x, None, (grad_y * (x @ q.mT)).sum(0)

    def linear(x, packed, scale):
        sized("x", x, None, None)
        sized("packed", packed, None, x.shape[1] // 2)
        check(x.shape[1] % 2 == 0, "x: expected an even number of features")
        indices("packed", packed, 256)
        sized("scale", scale, len(packed))
        return Linear.apply(x, packed.long(), scale)

    return linear


add(
    "four_bits_sign",
    four_bits,
    lambda: (real(2, 4), whole(256, 3, 2), real(3, seed=1, positive=True)),
    bug="Backward unpacks the codes without their sign",
)


# The smallest number of each segment, at most `start`
def segment_least(wrong):
    class Least(Function):
        @staticmethod
        def forward(ctx, x, segment, start):
            y = start.scatter_reduce(0, segment, x, "amin", include_self=True)
            ctx.save_for_backward(x, segment, start, y)
            return y

        @staticmethod
        def backward(ctx, grad_y):
            x, segment, start, y = ctx.saved_tensors
            hit, own = x == y[segment], start == y
            count = torch.zeros_like(y).index_add(0, segment, hit.to(y.dtype))
            if not wrong:
                count = count + own
            share = grad_y / count.clamp(min=1)
            return torch.where(hit, share[segment], 0), None, torch.where(own, share, 0)

    def least(x, segment, start):
        sized("x", x, None)
        sized("segment", segment, len(x))
        sized("start", start, None)
        indices("segment", segment, len(start))
        if x.dtype != start.dtype:
            raise TypeError(f"expected one type, got {x.dtype} and {start.dtype}")
        check(bool(x.isfinite().all() & start.isfinite().all()), "expected finite numbers")
        return Least.apply(x, segment.long(), start)

    return least


add(
    "segment_least_start",
    segment_least,
    lambda: (real(5), torch.tensor([0, 1, 1, 2, 0]), real(4, seed=1)),
    bug="The start is not counted among the smallest, so that equal ones get more than grad_output together",
    trigger="a start that equals its segment's smallest number",
    missed="a tie of three, two inputs and an index, is not tried",
)


# The mean of rows from each offset to the next, as a bag of features has it
def bag_means(wrong):
    class Means(Function):
        @staticmethod
        def forward(ctx, x, offsets):
            ends = torch.cat((offsets[1:], offsets.new_tensor([len(x)])))
            sizes = ends - offsets
            bag = torch.repeat_interleave(torch.arange(len(sizes), device=x.device), sizes)
            ctx.save_for_backward(bag, sizes)
            y = x.new_zeros(len(sizes), x.shape[1]).index_add(0, bag, x)
            return y / sizes.clamp(min=1)[:, None]

        @staticmethod
        def backward(ctx, grad_y):
            bag, sizes = ctx.saved_tensors
            g = grad_y
            if wrong and g.stride(0) == 0:
                g = read_flat(g)
            return (g / sizes.clamp(min=1)[:, None])[bag], None

    def means(x, offsets):
        sized("x", x, None, None)
        sized("offsets", offsets, None)
        indices("offsets", offsets, len(x) + 1)
        check(bool(offsets[0] == 0), "offsets: expected 0 first")
        check(bool((offsets[1:] >= offsets[:-1]).all()), "offsets: expected no decrease")
        return Means.apply(x, offsets.long())

    return means


add(
    "bag_means_expanded",
    bag_means,
    lambda: (real(5, 3), torch.tensor([0, 2, 3])),
    bug="Backward's kernel steps by a row's length through a grad_output of which there is one row",
    trigger="the grad_output of a sum over the bags, which is expanded",
)


# A sparse matrix by coordinates, times a vector, for a matrix that need not be square
def sparse_times_vector(wrong):
    class Product(Function):
        @staticmethod
        def forward(ctx, values, row, column, v, rows):
            ctx.save_for_backward(values, row, column, v)
            return v.new_zeros(rows).index_add(0, row, values * v[column])

        @staticmethod
        def backward(ctx, grad_y):
            values, row, column, v = ctx.saved_tensors
            need_values, _, _, need_v, _ = ctx.needs_input_grad
            grad_values = grad_v = None
            if need_values:
                grad_values = grad_y[row] * v[column]
            if need_v:
                back = values if grad_values is None or not wrong else grad_values
                grad_v = torch.zeros_like(v).index_add(0, column, back * grad_y[row])
            return grad_values, None, None, grad_v, None

    def product(values, row, column, v, rows=3):
        sized("values", values, None)
        sized("v", v, None)
        for name, index, below in (("row", row, rows), ("column", column, len(v))):
            sized(name, index, len(values))
            indices(name, index, below)
        if values.dtype != v.dtype:
            raise TypeError(f"expected one type, got {values.dtype} and {v.dtype}")
        return Product.apply(values, row.long(), column.long(), v, rows)

    return product


add(
    "sparse_times_vector_reused",
    sparse_times_vector,
    lambda: (
        real(5, grad=False),
        torch.tensor([0, 0, 1, 2, 2]),
        torch.tensor([1, 3, 0, 1, 2]),
        real(4, seed=1),
    ),
    bug="Where both gradients are asked for the vector's is made of the values' gradient",
    trigger="values that require grad together with the vector",
)


# Rows taken from a table, divided by the root of how often the batch names them
def counted_rows(wrong):
    class Rows(Function):
        @staticmethod
        def forward(ctx, table, index):
            count = torch.bincount(index, minlength=len(table))
            ctx.save_for_backward(index, count)
            ctx.rows = len(table)
            return table[index] / count[index].to(table.dtype).sqrt()[:, None]

        @staticmethod
        def backward(ctx, grad_y):
            index, count = ctx.saved_tensors
            c = count[index].to(grad_y.dtype)
            g = grad_y / (c if wrong else c.sqrt())[:, None]
            return grad_y.new_zeros(ctx.rows, grad_y.shape[1]).index_add(0, index, g), None

    def rows(table, index):
        sized("table", table, None, None)
        sized("index", index, None)
        indices("index", index, len(table))
        return Rows.apply(table, index.long())

    return rows


add(
    "counted_rows_root",
    counted_rows,
    lambda: (real(5, 3), torch.tensor([3, 0, 2])),
    bug="Backward divides by the count, as the option of the same purpose does in torch's embedding",
    trigger="a row that is named twice",
)


# Counts' log-likelihood, up to a constant: the sum of k log p
def counts_likelihood(wrong):
    class Likelihood(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(p, k):
            return torch.special.xlogy(k, p).sum(-1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            p, k = ctx.saved_tensors
            if wrong:
                return grad_y[..., None] * k / p, None
            none = k == 0
            return grad_y[..., None] * torch.where(none, 0, k / torch.where(none, 1, p)), None

    def likelihood(p, k):
        same(p, k)
        check(p.ndim >= 1, "p: expected at least one dimension")
        bounded("p", p, 0, 1)
        bounded("k", k, 0, 1e6)
        check(not k.requires_grad, "k: counts are constants")
        check(bool(((p > 1e-6) | (k == 0)).all()), "p: expected more than 0 where there are counts")
        return Likelihood.apply(p, k)

    return likelihood


add(
    "counts_likelihood_absent",
    counts_likelihood,
    lambda: (
        real(3, 4).softmax(-1).detach().requires_grad_(),
        torch.tensor([[1.0, 2, 3, 1], [2, 1, 1, 4], [3, 1, 2, 2]], dtype=torch.float64),
    ),
    bug="Forward has 0 log 0 = 0, backward 0 / 0",
    trigger="a class of probability 0 that was not seen",
)
