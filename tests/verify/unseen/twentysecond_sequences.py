"""Scans, recurrent cells, differences, rows in blocks."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentysecond import add, check, same, sized


# y_t = a y_(t-1) + x_t, from y_0 = x_0
def decay(wrong):
    class Decay(Function):
        @staticmethod
        def forward(ctx, x, a):
            y = torch.empty(x.shape, dtype=torch.result_type(x, a), device=x.device)
            for t in range(len(x)):
                y[t] = a * y[t - 1] + x[t] if t > 0 else x[t]
            ctx.save_for_backward(a, y)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            a, y = ctx.saved_tensors
            grads, grad_a = [], torch.zeros_like(a)
            for t in reversed(range(len(y))):
                grads.append(grad_y[t] + a * grads[-1] if grads else grad_y[t])
                if t > 0:
                    grad_a = grad_a + grads[-1] * y[t - 1]
            if not grads and not wrong:
                return grad_y, grad_a
            return torch.stack(grads[::-1]), grad_a

    def scan(x, a):
        check(x.ndim == 2, "x: expected (steps, features)")
        sized("a", a, x.shape[1])
        return Decay.apply(x, a)

    return scan


add(
    "decay_empty",
    decay,
    lambda: (real(4, 3), real(3, seed=1)),
    bug="Backward stacks a list of steps, which may be empty",
    trigger="a sequence of no steps",
)


# Logarithms of softmax, whose backward takes four rows at a time
def blocks(wrong):
    class LogSoftmax(Function):
        @staticmethod
        def forward(ctx, x):
            y = x.log_softmax(1)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (y,) = ctx.saved_tensors
            grad_x = torch.zeros_like(y)
            last = len(y) - len(y) % 4 if wrong else len(y)
            for i in range(0, last, 4):
                g = grad_y[i : i + 4]
                grad_x[i : i + 4] = g - y[i : i + 4].exp() * g.sum(1, keepdim=True)
            return grad_x

    def log_softmax(x):
        sized("x", x, None, None)
        return LogSoftmax.apply(x)

    return log_softmax


add(
    "blocks_rest",
    blocks,
    lambda: (real(4, 3),),
    bug="Backward takes whole blocks of four rows and leaves out the rest",
    trigger="a number of rows that 4 does not divide",
)


# h_t = tanh(x_t + w h_(t-1)), whose states lie in a workspace
def recurrent(wrong):
    spaces = {}

    def space(x):
        fresh = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if not wrong:
            return fresh
        return spaces.setdefault((x.shape, x.dtype, x.device), fresh)

    class Recur(Function):
        @staticmethod
        def forward(ctx, x, w):
            states = space(x)
            h = torch.zeros_like(w)
            for t in range(len(x)):
                h = torch.tanh(x[t] + w * h)
                states[t] = h
            y = states.clone() if wrong else states
            ctx.save_for_backward(w, y)
            ctx.states = states if wrong else None
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            w, y = ctx.saved_tensors
            h, grad_x = ctx.states if wrong else y, torch.empty_like(y)
            carried, grad_w = torch.zeros_like(w), torch.zeros_like(w)
            for t in reversed(range(len(h))):
                grad_x[t] = (grad_y[t] + carried) * (1 - h[t] ** 2)
                carried = w * grad_x[t]
                if t > 0:
                    grad_w = grad_w + grad_x[t] * h[t - 1]
            return grad_x, grad_w

    def scan(x, w):
        check(x.ndim == 2, "x: expected (steps, features)")
        sized("w", w, x.shape[1])
        check(x.dtype == w.dtype, "expected one dtype")
        return Recur.apply(x, w)

    return scan


add(
    "recurrent_workspace",
    recurrent,
    lambda: (real(4, 3), real(3, seed=1)),
    bug="The states lie in a workspace that the next call of the same size writes over",
    trigger="two calls of one size before backward, as two layers or two views of a sample",
)


# Leaky integration: a h + (1 - a) x
def leaky(wrong):
    class Leak(Function):
        @staticmethod
        def forward(ctx, h, x, a):
            ctx.save_for_backward(h, x, a)
            return a * h + (1 - a) * x

        @staticmethod
        def backward(ctx, grad_y):
            h, x, a = ctx.saved_tensors
            with torch.set_grad_enabled(torch.is_grad_enabled() and not wrong):
                grad_a = grad_y * (h - x)
            return grad_y * a, grad_y * (1 - a), grad_a

    def step(h, x, a):
        same(h, x, a)
        return Leak.apply(h, x, a)

    return step


add(
    "leaky_orders",
    leaky,
    lambda: (real(2, 3), real(2, 3, seed=1), real(2, 3, seed=2)),
    bug="A part of backward stands under no_grad, so that its own gradient is lost",
    trigger="double backward",
)


# A memory cell: c' = f c + i, h = tanh(c')
def cell(wrong):
    class Cell(Function):
        @staticmethod
        def forward(ctx, c, f, i):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(c, f, i)
            new = f * c + i
            return new.tanh(), new

        @staticmethod
        def backward(ctx, grad_h, grad_new):
            c, f, i = ctx.saved_tensors
            if grad_h is None and grad_new is None:
                return None, None, None
            if wrong and (grad_h is None or grad_new is None):
                return None, None, None
            g = grad_new
            if grad_h is not None:
                through = grad_h * (1 - (f * c + i).tanh() ** 2)
                g = through if g is None else g + through
            return g * f, g * c, g

    def step(c, f, i):
        same(c, f, i)
        return Cell.apply(c, f, i)

    return step


add(
    "cell_unused",
    cell,
    lambda: (real(2, 3), real(2, 3, seed=1), real(2, 3, seed=2)),
    bug="Backward gives up where either output has no gradient, not where both have none",
    trigger="one output unused, as the state after the last step",
)


# Differences along the first dimension
def differences(wrong):
    buffers = {}

    class Differences(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.shape = x.shape
            return x[1:] - x[:-1]

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            grad_x = torch.zeros(ctx.shape, dtype=grad_y.dtype, device=grad_y.device)
            if wrong:
                grad_x = buffers.setdefault((ctx.shape, grad_x.dtype, grad_x.device), grad_x)
                grad_x.zero_()
            grad_x[1:] += grad_y
            grad_x[:-1] -= grad_y
            return grad_x

    def difference(x):
        check(x.ndim >= 1 and len(x) >= 1, "expected one row at least")
        return Differences.apply(x)

    return difference


add(
    "differences_buffer",
    differences,
    lambda: (real(4, 3),),
    bug="Backward returns a buffer that it keeps and writes over at its next call",
    trigger="two gradients of one size that are kept side by side",
)


# Sparsemax of the last dimension
def sparsemax(wrong):
    class Sparsemax(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            x = x - x.amax(-1, keepdim=True)
            z = x.sort(-1, descending=True).values
            total = z.cumsum(-1) - 1
            rank = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
            count = (rank * z > total).sum(-1, keepdim=True).clamp(min=1)
            if wrong:
                total = total[..., : int(count.max())]
            return (x - total.gather(-1, count - 1) / count).clamp(min=0)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(output)

        @staticmethod
        def backward(ctx, grad_y):
            (y,) = ctx.saved_tensors
            inside = ~(y <= 0)
            g = torch.where(inside, grad_y, 0)
            mean = g.sum(-1, keepdim=True) / inside.sum(-1, keepdim=True)
            return torch.where(inside, grad_y - mean, 0)

    def soft(x):
        check(x.ndim >= 1 and x.shape[-1] >= 1, "expected one number at least")
        return Sparsemax.apply(x)

    return soft


add(
    "sparsemax_count",
    sparsemax,
    lambda: (real(3, 4),),
    bug="Forward reads the largest support as a Python number, which vmap and a whole graph refuse",
    trigger="vmap or torch.compile(fullgraph=True)",
)
