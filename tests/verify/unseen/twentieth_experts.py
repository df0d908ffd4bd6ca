"""Mixtures of experts: routing, dispatch, products by group, the combination."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.nineteenth import uniform
from tests.verify.unseen.twentieth import add, check, indices, same, sized


# rows of group e times w_e
def grouped_product(wrong):
    class Product(Function):
        @staticmethod
        def forward(ctx, x, w, sizes):
            sized("x", x, None, None)
            sized("w", w, None, x.shape[1], None)
            sized("sizes", sizes, len(w))
            indices("sizes", sizes, len(x) + 1)
            check(int(sizes.sum()) == len(x), f"sizes: expected a sum of {len(x)}")
            ctx.sizes = sizes.tolist()
            ctx.save_for_backward(x, w)
            parts = x.split(ctx.sizes)
            return torch.cat([rows @ m for rows, m in zip(parts, w, strict=True)])

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            grads = grad_y.split(ctx.sizes)
            grad_x = torch.cat([g @ m.T for g, m in zip(grads, w, strict=True)])
            grad_w, start = [], 0
            for size in ctx.sizes:
                rows = slice(start, start + (max(size, 1) if wrong else size))
                grad_w.append(x[rows].T @ grad_y[rows])
                start += size
            return grad_x, torch.stack(grad_w), None

    return lambda x, w, sizes: Product.apply(x, w, sizes)


add(
    "grouped_product_empty",
    grouped_product,
    lambda: (real(6, 2), real(3, 2, 3, seed=1), torch.tensor([2, 3, 1])),
    bug="tokamax (issue 887): the tile of a group without rows is one row, so its weight gets the"
    " next group's gradient",
    trigger="a group without rows",
)


# y = sum_k p_k out_k
def combination(wrong):
    class Combination(Function):
        @staticmethod
        def forward(ctx, out, p):
            sized("out", out, None, None, None)
            sized("p", p, *out.shape[:2])
            weighted = out * p[..., None]
            ctx.save_for_backward(weighted if wrong else out, p)
            return weighted.sum(1)

        @staticmethod
        def backward(ctx, grad_y):
            kept, p = ctx.saved_tensors
            grad_p = (kept * grad_y[:, None]).sum(-1)
            if wrong:
                grad_p = grad_p / p
            return p[..., None] * grad_y[:, None], grad_p

    def call(out, p):
        return Combination.apply(out, p)

    return call


add(
    "combination_divided",
    combination,
    lambda: (real(3, 2, 4), uniform(3, 2, low=0.2, high=0.8, seed=1)),
    bug="Only the weighted outputs are kept; the weights' gradient is divided by the weights",
    trigger="a weight of zero, as a dropped token has",
)


# softmax over all experts, those of index, made to sum to 1
def chosen_weights(wrong):
    class Weights(Function):
        @staticmethod
        def forward(ctx, logits, index):
            sized("logits", logits, None, None)
            sized("index", index, len(logits), None)
            indices("index", index, logits.shape[1])
            ctx.save_for_backward(logits, index)
            return torch.softmax(logits.gather(1, index), 1)

        @staticmethod
        def backward(ctx, grad_y):
            logits, index = ctx.saved_tensors
            if wrong:
                p = torch.softmax(logits, 1)
                chosen = p.gather(1, index).sum(1, keepdim=True)
                g = torch.zeros_like(p).scatter_add(1, index, grad_y / chosen)
                return p * (g - (g * p).sum(1, keepdim=True)), None
            y = torch.softmax(logits.gather(1, index), 1)
            g = y * (grad_y - (grad_y * y).sum(1, keepdim=True))
            return torch.zeros_like(logits).scatter_add(1, index, g), None

    return lambda logits, index: Weights.apply(logits, index)


add(
    "chosen_weights_sum",
    chosen_weights,
    lambda: (real(3, 4), torch.tensor([[0, 2], [1, 3], [3, 0]])),
    bug="The chosen experts' weights are divided by their sum, which backward takes as constant",
)


def dispatch(wrong):
    class Dispatch(Function):
        @staticmethod
        def forward(ctx, x, index):
            sized("x", x, None, None)
            sized("index", index, None)
            indices("index", index, len(x))
            ctx.save_for_backward(index)
            ctx.rows = len(x)
            return x[index]

        @staticmethod
        def backward(ctx, grad_y):
            (index,) = ctx.saved_tensors
            zeros = grad_y.new_zeros(ctx.rows, grad_y.shape[1])
            if wrong:
                return zeros.index_put((index,), grad_y), None
            return zeros.index_add(0, index, grad_y), None

    return lambda x, index: Dispatch.apply(x, index)


add(
    "dispatch_twice",
    dispatch,
    lambda: (real(4, 3), torch.tensor([2, 0, 3, 1])),
    bug="Backward puts the rows back where they came from instead of adding them",
    trigger="a token that goes to two experts",
)


# min(gate, limit) sigmoid(a min(gate, limit)) (clip(up) + 1)
def clipped_swiglu(wrong):
    class Clipped(Function):
        @staticmethod
        def forward(ctx, gate, up, limit):
            same(gate, up)
            check(limit > 0, f"expected limit > 0, got {limit}")
            ctx.save_for_backward(gate, up)
            ctx.limit = limit
            z = gate.clamp(max=limit)
            return z * torch.sigmoid(1.702 * z) * (up.clamp(-limit, limit) + 1)

        @staticmethod
        def backward(ctx, grad_y):
            gate, up = ctx.saved_tensors
            z, u = gate.clamp(max=ctx.limit), up.clamp(-ctx.limit, ctx.limit) + 1
            s = torch.sigmoid(1.702 * z)
            grad_gate = grad_y * u * s * (1 + 1.702 * z * (1 - s))
            grad_up = grad_y * z * s
            if not wrong:
                grad_gate = torch.where(gate <= ctx.limit, grad_gate, 0.0)
                grad_up = torch.where(up.abs() <= ctx.limit, grad_up, 0.0)
            return grad_gate, grad_up, None

    return lambda gate, up, limit=7.0: Clipped.apply(gate, up, limit)


add(
    "clipped_swiglu",
    clipped_swiglu,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="Backward uses the clipped values but lets the gradient through the clips",
    trigger="values beyond the limit",
)
