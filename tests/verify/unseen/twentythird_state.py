"""State: what is left between calls, what a second backward finds, saved tensors, leaks, chance."""

import random

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentythird import add, check, indices, sized


# Attention pooling: rows v weighted by the softmax of their scores x
def pool(wrong):
    class Pool(Function):
        @staticmethod
        def forward(ctx, x, v):
            p = x.softmax(0)
            if wrong:
                ctx.p = p
                ctx.save_for_backward(v)
            else:
                ctx.save_for_backward(v, p)
            return p @ v

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            if wrong:
                (v,) = ctx.saved_tensors
                p, ctx.p = ctx.p, None
            else:
                v, p = ctx.saved_tensors
            grad_p = v @ grad_y
            return p * (grad_p - p @ grad_p), p[:, None] * grad_y

    def pooled(x, v):
        sized("x", x, None)
        sized("v", v, len(x), None)
        return Pool.apply(x, v)

    return pooled


add(
    "pool_freed",
    pool,
    lambda: (real(4), real(4, 3, seed=1)),
    bug="Backward gives the weights' memory back after its first run",
    trigger="retain_graph and a second backward",
)


# Linear layer whose weight gradient is added up in a buffer
def buffered_linear(wrong):
    class Linear(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            ctx.buffer = torch.zeros_like(w)
            return x @ w.T

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            if wrong:
                ctx.buffer += grad_y.T @ x
                return grad_y @ w, ctx.buffer
            return grad_y @ w, ctx.buffer + grad_y.T @ x

    def linear(x, w):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        return Linear.apply(x, w)

    return linear


add(
    "buffered_linear_twice",
    buffered_linear,
    lambda: (real(3, 4), real(2, 4, seed=1)),
    bug="The buffer for the weight's gradient is not zeroed between two backwards",
    trigger="retain_graph and a second backward",
)


# Row softmax with its result kept in a workspace, one for each size
def workspace_softmax(wrong):
    work = {}

    class Softmax(Function):
        @staticmethod
        def forward(ctx, x):
            y = x.softmax(1)
            ctx.key = (x.shape, x.dtype, x.device)
            if wrong:
                work.setdefault(ctx.key, torch.empty_like(y)).copy_(y)
            else:
                ctx.save_for_backward(y)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            y = work[ctx.key] if wrong else ctx.saved_tensors[0]
            return y * (grad_y - (grad_y * y).sum(1, keepdim=True))

    def softmax(x):
        sized("x", x, None, None)
        return Softmax.apply(x)

    return softmax


add(
    "workspace_softmax_shared",
    workspace_softmax,
    lambda: (real(3, 4),),
    bug="Calls of one size share the workspace from which backward reads",
    trigger="two calls in one graph",
)


# x times the mean of its magnitudes
def self_scaled(wrong):
    class Scale(Function):
        size = None

        @staticmethod
        def forward(ctx, x):
            Scale.size = x.abs().mean() if wrong else None
            ctx.save_for_backward(x)
            return x * x.abs().mean()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            size = Scale.size if wrong else x.abs().mean()
            return grad_y * size + (grad_y * x).sum() * x.sign() / x.numel()

    def scale(x):
        check(x.numel() > 0, "expected a tensor that is not empty")
        return Scale.apply(x)

    return scale


add(
    "self_scaled_class",
    self_scaled,
    lambda: (real(3, 4),),
    bug="The scale is kept on the class, where the next call overwrites it",
    trigger="a call on other numbers between forward and backward",
)


# Wavelet: x exp(-x^2 / 2)
def wavelet(wrong):
    stack = []

    class Wavelet(Function):
        @staticmethod
        def forward(ctx, x):
            if wrong:
                stack.append(x.detach().clone())
            else:
                ctx.save_for_backward(x)
            return x * (-x.square() / 2).exp()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x = stack.pop() if wrong else ctx.saved_tensors[0]
            bell = (-x.square() / 2).exp()
            return grad_y * (bell - x * (x * bell))

    return Wavelet.apply


add(
    "wavelet_stack",
    wavelet,
    lambda: (real(3, 4),),
    bug="All calls' inputs lie on one stack, which backward pops",
    trigger="a forward without a backward, or two backwards",
)


# Arc tangent
def arctan(wrong):
    class Arctan(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.data if wrong else x)
            return x.atan()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return grad_y / (1 + x.square())

    return Arctan.apply


add(
    "arctan_data",
    arctan,
    lambda: (real(3, 4),),
    bug="x.data is saved, which hides later writes to x",
    trigger="x changed in place between forward and backward",
)


# Sigmoid
def gate(wrong):
    class Gate(Function):
        @staticmethod
        def forward(ctx, x):
            y = x.sigmoid()
            if wrong:
                ctx.y = y.detach().numpy() if y.device.type == "cpu" else y.data
            else:
                ctx.save_for_backward(y)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            y = torch.as_tensor(ctx.y) if wrong else ctx.saved_tensors[0]
            return grad_y * y * (1 - y)

    return Gate.apply


add(
    "gate_array",
    gate,
    lambda: (real(3, 4),),
    bug="The output is kept as an array over its memory, which hides later writes to it",
    trigger="the output changed in place before backward",
)


# Exponential linear unit whose gradient passes through a hook that gives it the output's shape
def hooked(wrong):
    def elu(x):
        y = torch.nn.functional.elu(x)
        if y.requires_grad:
            y.register_hook(lambda g: shaped(g, y.shape)) if wrong else y.register_hook(
                like(y.shape)
            )
        return y

    def shaped(g, shape):
        return g if g is None else g.reshape(shape)

    def like(shape):
        return lambda g: shaped(g, shape)

    return elu


add(
    "hooked_cycle",
    hooked,
    lambda: (real(3, 4),),
    bug="The output's hook holds the output, so that neither is ever freed",
    trigger="memory watched",
)


# Rows looked up in a table
def lookup(wrong):
    class Lookup(Function):
        @staticmethod
        def forward(ctx, x, i):
            ctx.save_for_backward(i)
            ctx.rows = len(x)
            return x[i]

        @staticmethod
        def backward(ctx, grad_y):
            (i,) = ctx.saved_tensors
            if wrong:
                order = list(range(len(i)))
                random.shuffle(order)
                i, grad_y = i[order], grad_y[order]
            zeros = grad_y.new_zeros(ctx.rows, grad_y.shape[1])
            return zeros.index_add(0, i, grad_y), None

    def rows(x, i):
        sized("x", x, None, None)
        sized("i", i, None)
        indices("i", i, len(x))
        return Lookup.apply(x, i)

    return rows


add(
    "lookup_order",
    lookup,
    lambda: (real(3, 2), whole(3, 40)),
    bug="Backward adds up in an order of chance, as atomic additions do",
    trigger="one graph's gradients compared bit by bit",
)


# Dropout whose mask is drawn from a seed, and once more from it in backward
def seeded_dropout(wrong):
    class Dropout(Function):
        @staticmethod
        def forward(ctx, x, p, seed):
            ctx.p, ctx.seed = p, seed
            return x * mask(x, p, torch.Generator().manual_seed(seed))

        @staticmethod
        def backward(ctx, grad_y):
            generator = torch.default_generator if wrong else torch.Generator()
            generator.manual_seed(ctx.seed)
            return grad_y * mask(grad_y, ctx.p, generator), None, None

    def mask(x, p, generator):
        drawn = torch.rand(x.shape, generator=generator, dtype=torch.float64)
        return (drawn >= p).to(x) / (1 - p)

    def dropout(x, p=0.5, seed=0):
        check(0 <= p < 1, "p: expected a number from 0 to below 1")
        return Dropout.apply(x, p, seed)

    return dropout


add(
    "seeded_dropout_state",
    seeded_dropout,
    lambda: (real(3, 4),),
    bug="Backward seeds the caller's random numbers as it draws the mask again",
    trigger="random numbers drawn before and after backward",
)
