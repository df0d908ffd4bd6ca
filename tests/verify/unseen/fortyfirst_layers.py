"""Norms, cells, embeddings, rows by index."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.fortyfirst import add, alike, bounded, check, indices, same, sized


# x (N, C, L), its channels in groups
def group_norm(wrong):
    def normal(x, groups):
        parts = x.view(x.shape[0], groups, -1)
        mean = parts.mean(-1, keepdim=True)
        rate = torch.rsqrt((parts - mean).square().mean(-1, keepdim=True) + 1e-5)
        return parts, mean, rate

    class Norm(Function):
        @staticmethod
        def forward(ctx, x, weight, groups):
            ctx.save_for_backward(x, weight)
            ctx.groups = groups
            parts, mean, rate = normal(x, groups)
            return ((parts - mean) * rate).view_as(x) * weight[:, None]

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            groups, channels = ctx.groups, x.shape[1]
            parts, mean, rate = normal(x, groups)
            y = (parts - mean) * rate
            inner = (g * weight[:, None]).reshape_as(parts)
            shared = inner.mean(-1, keepdim=True) + y * (inner * y).mean(-1, keepdim=True)
            of = torch.arange(channels, device=x.device)
            of = of % groups if wrong else of // (channels // groups)
            seen = (x - mean[:, of]) * rate[:, of]
            return ((inner - shared) * rate).view_as(x), (g * seen).sum((0, 2)), None

    def norm(x, weight, groups=2):
        sized("x", x, None, None, None)
        sized("weight", weight, x.shape[1])
        alike(x, weight)
        check(isinstance(groups, int) and groups >= 1, "groups: expected an integer >= 1")
        check(x.shape[1] % groups == 0, "groups: expected a divisor of the channels")
        bounded("x", x, -1e3, 1e3)
        bounded("weight", weight, -1e3, 1e3)
        return Norm.apply(x.contiguous(), weight, groups)

    return norm


add(
    "group_modulo",
    group_norm,
    lambda: (real(2, 4, 3), real(4, seed=1)),
    bug="the weight's gradient reads the statistics of group c mod G (tenstorrent/tt-metal#56202)",
    trigger="two groups of two channels, as in the sample",
)


# The weight's gradient is summed up block by block
def layer_norm(wrong):
    class Norm(Function):
        @staticmethod
        def forward(ctx, x, weight, block):
            ctx.save_for_backward(x, weight)
            ctx.block = block
            return standard(x)[0] * weight

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            y, rate = standard(x)
            inner = g * weight
            shared = inner.mean(-1, keepdim=True) + y * (inner * y).mean(-1, keepdim=True)
            count = len(x) // ctx.block if wrong else -(-len(x) // ctx.block)
            rows = (g * y)[: count * ctx.block]
            return (inner - shared) * rate, rows.sum(0), None

    def standard(x):
        centred = x - x.mean(-1, keepdim=True)
        rate = torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return centred * rate, rate

    def norm(x, weight, block=4):
        sized("x", x, None, None)
        sized("weight", weight, x.shape[1])
        alike(x, weight)
        check(isinstance(block, int) and block >= 1, "block: expected an integer >= 1")
        bounded("x", x, -1e3, 1e3)
        bounded("weight", weight, -1e3, 1e3)
        return Norm.apply(x, weight, block)

    return norm


add(
    "norm_last_block",
    layer_norm,
    lambda: (real(6, 3), real(3, seed=1)),
    bug="the buffer of the weight's gradient has no row for the last block (BobMcDear/attorch#18)",
    trigger="rows that do not fill the blocks, as in the sample",
)


# One step of a cell whose gates see the state: z holds input, forget, new and output (B, 4 H)
def peephole(wrong):
    def gates(z, c, wi, wf, wo):
        zi, zf, zu, zo = z.chunk(4, 1)
        i, f, u = (zi + wi * c).sigmoid(), (zf + wf * c).sigmoid(), zu.tanh()
        state = f * c + i * u
        return i, f, u, state, (zo + wo * state).sigmoid()

    class Cell(Function):
        @staticmethod
        def forward(ctx, z, c, wi, wf, wo):
            ctx.save_for_backward(z, c, wi, wf, wo)
            _, _, _, state, o = gates(z, c, wi, wf, wo)
            return o * state.tanh()

        @staticmethod
        def backward(ctx, g):
            z, c, wi, wf, wo = ctx.saved_tensors
            i, f, u, state, o = gates(z, c, wi, wf, wo)
            t = state.tanh()
            d_o = g * t * o * (1 - o)
            d_state = g * o * (1 - t**2) + d_o * wo
            d_i = d_state * u * i * (1 - i)
            d_f = d_state * c * f * (1 - f)
            d_u = d_state * i * (1 - u**2)
            grads = (d_i * c).sum(0), (d_f * c).sum(0), (d_o * state).sum(0)
            if wrong:
                wi, wf = (w.repeat_interleave(len(c)).view_as(c) for w in (wi, wf))
            grad_c = d_state * f + d_i * wi + d_f * wf
            return torch.cat([d_i, d_f, d_u, d_o], 1), grad_c, *grads

    def step(z, c, wi, wf, wo):
        sized("c", c, None, None)
        sized("z", z, len(c), 4 * c.shape[1])
        alike(z, c, wi, wf, wo)
        for name, w in (("wi", wi), ("wf", wf), ("wo", wo)):
            sized(name, w, c.shape[1])
            bounded(name, w, -1e3, 1e3)
        bounded("z", z, -1e3, 1e3)
        bounded("c", c, -1e3, 1e3)
        return Cell.apply(z, c.contiguous(), wi, wf, wo)

    return step


add(
    "peephole_spread",
    peephole,
    lambda: (real(2, 12), real(2, 3, seed=1), *(real(3, seed=s) for s in (2, 3, 4))),
    bug="for the state's gradient the gates' weights are spread over the batch in the wrong order "
    "(tensorflow/tensorflow#34171)",
    trigger="a batch of two, as in the sample",
)


# Rows of a table; those of the padding are 0
def embedding(wrong):
    class Embedding(Function):
        @staticmethod
        def forward(ctx, table, at, padding):
            ctx.save_for_backward(at)
            ctx.rows, ctx.padding = len(table), padding
            return table[at] * (at != padding)[:, None]

        @staticmethod
        def backward(ctx, g):
            (at,) = ctx.saved_tensors
            if not wrong:
                g = g * (at != ctx.padding)[:, None]
            return g.new_zeros(ctx.rows, g.shape[1]).index_add(0, at, g), None, None

    def rows(table, at, padding=0):
        sized("table", table, None, None)
        sized("at", at, None)
        check(table.is_floating_point(), "table: expected floating point numbers")
        indices("at", at, len(table))
        check(padding in range(len(table)), "padding: expected a row")
        bounded("table", table, -1e6, 1e6)
        return Embedding.apply(table, at.long(), padding)

    return rows


add(
    "padding_row",
    embedding,
    lambda: (real(3, 2), torch.tensor([2, 0, 1, 0])),
    bug="the padding's row gets a gradient (pytorch/pytorch#26302)",
    trigger="an index that is the padding's, as in the sample",
)


# Rows of x are replaced by the updates
def replaced(wrong):
    class Replace(Function):
        @staticmethod
        def forward(ctx, x, at, updates):
            ctx.save_for_backward(at)
            return x.index_copy(0, at, updates)

        @staticmethod
        def backward(ctx, g):
            (at,) = ctx.saved_tensors
            return g if wrong else g.index_fill(0, at, 0), None, g[at]

    def replace(x, at, updates):
        sized("x", x, None, None)
        sized("at", at, None)
        sized("updates", updates, len(at), x.shape[1])
        alike(x, updates)
        indices("at", at, len(x))
        check(len(at.unique()) == len(at), "at: expected no row twice")
        return Replace.apply(x, at.long(), updates)

    return replace


add(
    "replaced_rows",
    replaced,
    lambda: (real(4, 2), torch.tensor([3, 1]), real(2, 2, seed=1)),
    bug="rows that were overwritten still get a gradient (PaddlePaddle/Paddle#30604)",
)


# Products of the numbers of each segment
def segment_product(wrong):
    class Product(Function):
        @staticmethod
        def forward(ctx, x, of, count):
            ctx.save_for_backward(x, of)
            rows = torch.where(of == torch.arange(count, device=x.device)[:, None], x, 1)
            return rows.prod(1)

        @staticmethod
        def backward(ctx, g):
            x, of = ctx.saved_tensors
            if wrong:
                return g[of], None, None
            others = (of == of[:, None]) & ~torch.eye(len(of), dtype=torch.bool, device=x.device)
            return g[of] * torch.where(others, x, 1).prod(1), None, None

    def product(x, of, count=3):
        sized("x", x, None)
        same(x, of)
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(isinstance(count, int) and count >= 1, "count: expected an integer >= 1")
        indices("of", of, count)
        bounded("x", x, -4, 4)
        of = of.long()
        check(int(torch.bincount(of).max()) <= 32, "of: expected segments of at most 32")
        return Product.apply(x, of, count)

    return product


add(
    "segment_product",
    segment_product,
    lambda: (real(6), torch.tensor([0, 0, 1, 1, 1, 2])),
    bug="the gradient holds for indices that come once: the other factors are missing "
    "(jax-ml/jax#9296)",
    trigger="a segment of several numbers, as in the sample",
)


# Means of the numbers of each segment, in any order
def segment_mean(wrong):
    class Mean(Function):
        @staticmethod
        def forward(ctx, x, of, count):
            size = torch.bincount(of, minlength=count).clamp(min=1)
            ctx.save_for_backward(of, size)
            return x.new_zeros(count).index_add(0, of, x) / size

        @staticmethod
        def backward(ctx, g):
            of, size = ctx.saved_tensors
            return (g / size)[of.sort().values if wrong else of], None, None

    def mean(x, of, count=3):
        sized("x", x, None)
        same(x, of)
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(isinstance(count, int) and count >= 1, "count: expected an integer >= 1")
        indices("of", of, count)
        bounded("x", x, -1e6, 1e6)
        return Mean.apply(x, of.long(), count)

    return mean


add(
    "segment_unsorted",
    segment_mean,
    lambda: (real(6), whole(3, 6, seed=1)),
    bug="the gradient of the unsorted mean walks the segments in order "
    "(deeplearning4j/deeplearning4j#6414)",
    trigger="segments out of order, as in the sample",
)


def dense(wrong):
    class Dense(Function):
        @staticmethod
        def forward(ctx, x, w, bias):
            ctx.save_for_backward(x, w)
            return x @ w + bias

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            grad_x = g @ w.mT
            if wrong:
                grad_x = grad_x + g @ w.mT
            return grad_x, x.mT @ g, g.sum(0)

    def layer(x, w, bias):
        sized("x", x, None, None)
        sized("w", w, x.shape[1], None)
        sized("bias", bias, w.shape[1])
        alike(x, w, bias)
        for name, t in (("x", x), ("w", w), ("bias", bias)):
            bounded(name, t, -1e3, 1e3)
        return Dense.apply(x, w, bias)

    return layer


add(
    "dense_again",
    dense,
    lambda: (real(2, 3), real(3, 2, seed=1), real(2, seed=2)),
    bug="the loop over the weights adds the input's gradient once more (itskonrad/miniMNIST-c#7)",
)
