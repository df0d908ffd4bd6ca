"""Messages on graphs and products with sparse matrices."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.nineteenth import uniform
from tests.verify.unseen.twentieth import add, check, indices, sized


def totals(values, index, count):
    return values.new_zeros(count).index_add(0, index, values)


# softmax of the edges that end at one node
def edge_softmax(wrong):
    class Softmax(Function):
        @staticmethod
        def forward(ctx, score, target):
            sized("score", score, None)
            sized("target", target, len(score))
            indices("target", target, len(score))
            ctx.count = len(score)
            top = score.new_full((ctx.count,), -torch.inf)
            top = top.scatter_reduce(0, target, score, "amax", include_self=True)
            e = torch.exp(score - top[target])
            y = e / totals(e, target, ctx.count)[target]
            if wrong:
                ctx.y = y.detach()
                ctx.save_for_backward(target)
            else:
                ctx.save_for_backward(target, y)
            return y

        @staticmethod
        def backward(ctx, grad_y):
            target, y = (*ctx.saved_tensors, ctx.y) if wrong else ctx.saved_tensors
            mean = totals(y * grad_y, target, ctx.count)
            return y * (grad_y - mean[target]), None

    return lambda score, target: Softmax.apply(score, target)


add(
    "edge_softmax_second",
    edge_softmax,
    lambda: (real(5), torch.tensor([0, 1, 0, 2, 1])),
    bug="dgl (pull request 1172): the output is kept detached, so the second derivative takes it as"
    " constant",
    trigger="the second derivative",
)


# A b or A' b, A given by rows, columns and values
def sparse_product(wrong):
    class Product(Function):
        @staticmethod
        def forward(ctx, values, rows, columns, b, transpose):
            sized("values", values, None)
            sized("rows", rows, len(values))
            sized("columns", columns, len(values))
            sized("b", b, None, None)
            indices("rows", rows, len(b))
            indices("columns", columns, len(b))
            ctx.transpose = transpose
            ctx.save_for_backward(values, rows, columns, b)
            into, out = (columns, rows) if transpose else (rows, columns)
            return torch.zeros_like(b).index_add(0, into, values[:, None] * b[out])

        @staticmethod
        def backward(ctx, grad_y):
            values, rows, columns, b = ctx.saved_tensors
            into, out = (columns, rows) if ctx.transpose else (rows, columns)
            grad_b = torch.zeros_like(b).index_add(0, out, values[:, None] * grad_y[into])
            if wrong:
                into, out = rows, columns
            return (grad_y[into] * b[out]).sum(1), None, None, grad_b, None

    def call(values, rows, columns, b, transpose=False):
        return Product.apply(values, rows, columns, b, transpose)

    return call


add(
    "sparse_product_transposed",
    sparse_product,
    lambda: (
        real(4),
        torch.tensor([0, 0, 1, 2]),
        torch.tensor([1, 2, 0, 2]),
        real(3, 2, seed=1),
    ),
    bug="jax (issue 40625): the values' gradient pairs rows and columns as without the transpose",
    trigger="transpose=True",
    kwargs=lambda: {"transpose": False},
)


# y = D^-1/2 (A + I) D^-1/2 x, D from the weights
def normalised_messages(wrong):
    class Messages(Function):
        @staticmethod
        def forward(ctx, w, x, source, target):
            sized("w", w, None)
            sized("x", x, None, None)
            sized("source", source, len(w))
            sized("target", target, len(w))
            indices("source", source, len(x))
            indices("target", target, len(x))
            check(bool((w >= 0).all()), "expected weights >= 0")
            ctx.save_for_backward(w, x, source, target)
            r = (1 + totals(w, target, len(x))).rsqrt()
            sent = (w * r[source] * r[target])[:, None] * x[source]
            return (r.square()[:, None] * x).index_add(0, target, sent)

        @staticmethod
        def backward(ctx, grad_y):
            w, x, source, target = ctx.saved_tensors
            r = (1 + totals(w, target, len(x))).rsqrt()
            c = w * r[source] * r[target]
            back = c[:, None] * grad_y[target]
            grad_x = (r.square()[:, None] * grad_y).index_add(0, source, back)
            met = (grad_y[target] * x[source]).sum(1)
            grad_w = met * r[source] * r[target]
            if not wrong:
                grad_r = 2 * r * (grad_y * x).sum(1)
                grad_r = grad_r + totals(met * w * r[target], source, len(x))
                grad_r = grad_r + totals(met * w * r[source], target, len(x))
                grad_w = grad_w - (0.5 * r**3 * grad_r)[target]
            return grad_w, grad_x, None, None

    return lambda w, x, source, target: Messages.apply(w, x, source, target)


add(
    "message_degrees",
    normalised_messages,
    lambda: (
        uniform(5, low=0.2, high=1.5),
        real(3, 2, seed=1),
        torch.tensor([0, 1, 2, 0, 1]),
        torch.tensor([1, 2, 0, 2, 0]),
    ),
    bug="The weights' gradient takes the degrees as constant, which are sums of the weights",
)
