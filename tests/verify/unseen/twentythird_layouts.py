"""Layouts of grad_output and inputs, and sizes at which blocks, threads and small integers end."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentythird import add, check, sized


def read(t, strides):
    """What a kernel reads at t's address with these strides; zeros past the memory's end."""
    place = torch.full(t.shape, t.storage_offset(), device=t.device)
    for dim, (n, stride) in enumerate(zip(t.shape, strides, strict=True)):
        steps = torch.arange(n, device=t.device) * stride
        place = place + steps.view([-1 if d == dim else 1 for d in range(t.ndim)])
    size = t.untyped_storage().nbytes() // t.element_size()
    memory = t.as_strided((size,), (1,), 0)
    return torch.where(place < size, memory[place.clamp(max=size - 1)], 0)


# Token shift: y_t = a x_t + b x_(t-1)
def token_shift(wrong):
    class Shift(Function):
        @staticmethod
        def forward(ctx, x, a, b):
            ctx.save_for_backward(x, a, b)
            return a * x + b * before(x)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, a, b = ctx.saved_tensors
            g = read(grad_y, (x.shape[1], 1)) if wrong else grad_y
            later = torch.cat([g[1:], torch.zeros_like(g[:1])])
            return a * g + b * later, (g * x).sum(0), (g * before(x)).sum(0)

    def before(x):
        return torch.cat([torch.zeros_like(x[:1]), x[:-1]])

    def shift(x, a, b):
        sized("x", x, None, None)
        sized("a", a, x.shape[1])
        sized("b", b, x.shape[1])
        check(bool(x.isfinite().all()), "x: expected finite numbers")
        return Shift.apply(x, a, b)

    return shift


add(
    "token_shift_pitch",
    token_shift,
    lambda: (real(4, 3), real(3, seed=1), real(3, seed=2)),
    bug="Backward reads grad_output as rows one after the other",
    trigger="y.sum(), or a grad_output cut from a wider one",
)


# x times the sigmoid of its row's sum
def row_gate(wrong):
    class Gate(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x.sum(1, keepdim=True).sigmoid()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            x = read(x, (x.stride(0), 1)) if wrong else x
            s = x.sum(1, keepdim=True).sigmoid()
            return grad_y * s + (grad_y * x).sum(1, keepdim=True) * (1 - s) * s

    def gate(x):
        sized("x", x, None, None)
        return Gate.apply(x)

    return gate


add(
    "row_gate_columns",
    row_gate,
    lambda: (real(3, 4),),
    bug="Backward knows the stride of x's rows but takes that of its columns to be 1",
    trigger="a transposed x, or every second column of one",
)


# Leaky ReLU with slope 0.1, of which one bit an element is kept
def leaky_bits(wrong):
    class Leaky(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.by_columns = x.mT.is_contiguous() and not x.is_contiguous()
            ctx.shape = x.shape
            memory = x.mT if ctx.by_columns else x
            ctx.save_for_backward((memory > 0).reshape(-1))
            return torch.where(x > 0, x, 0.1 * x)

        @staticmethod
        def backward(ctx, grad_y):
            (bits,) = ctx.saved_tensors
            turned = ctx.by_columns and not wrong
            bits = bits.view(ctx.shape[::-1]).mT if turned else bits.view(ctx.shape)
            return torch.where(bits, grad_y, 0.1 * grad_y)

    def leaky(x):
        sized("x", x, None, None)
        return Leaky.apply(x)

    return leaky


add(
    "leaky_bits_order",
    leaky_bits,
    lambda: (real(3, 4),),
    bug="The bits lie in the order of x's memory, but backward reads them row by row",
    trigger="a transposed x",
)


# Linear layer on the last of any dimensions
def dense(wrong):
    class Dense(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w.T

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            n = math.prod(grad_y.shape[:-1])
            flat = grad_y.view if wrong else grad_y.reshape
            rows = flat(n, grad_y.shape[-1])
            return grad_y @ w, rows.T @ x.reshape(n, x.shape[-1])

    def layer(x, w):
        check(x.ndim >= 2, "x: expected 2 dimensions or more")
        sized("w", w, None, x.shape[-1])
        return Dense.apply(x, w)

    return layer


add(
    "dense_view",
    dense,
    lambda: (real(2, 3, 4), real(2, 4, seed=1)),
    bug="Backward flattens grad_output by view",
    trigger="a transposed grad_output",
)


# Each row turned around
def turned(wrong):
    class Turn(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.strides = x.stride()
            return x.flip(1)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            strides = ctx.strides if wrong else (grad_y.shape[1], 1)
            grad_x = grad_y.new_empty_strided(grad_y.shape, strides)
            for i in range(grad_y.shape[1]):
                grad_x[:, -1 - i] = grad_y[:, i]
            return grad_x

    def turn(x):
        sized("x", x, None, None)
        return Turn.apply(x)

    return turn


add(
    "turned_strides",
    turned,
    lambda: (real(3, 4),),
    bug="The gradient is made with the strides of x, so that its rows may be one memory",
    trigger="an expanded x",
)


# The largest of each row; its place is kept in 8 bits
def row_max(wrong):
    class Largest(Function):
        @staticmethod
        def forward(ctx, x):
            y, i = x.max(1)
            ctx.save_for_backward(i.to(torch.uint8) if wrong else i)
            ctx.columns = x.shape[1]
            return y

        @staticmethod
        def backward(ctx, grad_y):
            (i,) = ctx.saved_tensors
            zeros = grad_y.new_zeros(len(grad_y), ctx.columns)
            return zeros.scatter(1, i.long()[:, None], grad_y[:, None])

    def largest(x):
        sized("x", x, None, None)
        return Largest.apply(x)

    return largest


add(
    "row_max_bits",
    row_max,
    lambda: (real(3, 5),),
    bug="Places are kept as uint8, which ends at 255",
    trigger="rows of 257 or more",
)


# Running sums, 128 elements at a time
def running_sum(wrong):
    block = 128

    class Running(Function):
        @staticmethod
        def forward(ctx, x):
            return x.cumsum(0)

        @staticmethod
        def backward(ctx, grad_y):
            parts, carry = [], 0
            for part in reversed(grad_y.split(block)):
                if wrong:
                    carry = 0
                parts.append(part.flip(0).cumsum(0).flip(0) + carry)
                carry = carry + part.sum(0)
            return torch.cat(parts[::-1])

    def running(x):
        sized("x", x, None, None)
        check(bool(x.isfinite().all()), "x: expected finite numbers")
        return Running.apply(x)

    return running


add(
    "running_sum_carry",
    running_sum,
    lambda: (real(5, 2),),
    bug="Backward carries nothing from a block to the one before",
    trigger="129 rows or more",
)


# Causal convolution of a chunk: the last rows before it are its state, and so the next state comes out
def chunk_convolution(wrong):
    class Convolve(Function):
        @staticmethod
        def forward(ctx, x, state, w):
            ctx.save_for_backward(x, state, w)
            rows = torch.cat([state, x])
            return windows(rows, len(w), w), rows[len(x) :].clone()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y, grad_state):
            x, state, w = ctx.saved_tensors
            rows = torch.cat([state, x])
            grad_rows = grad_y.new_zeros(rows.shape)
            for k in range(len(w)):
                grad_rows[k : k + len(x)] += grad_y * w[k]
            grad_w = [(grad_y * rows[k : k + len(x)]).sum(0) for k in range(len(w))]
            start = max(len(state), len(x)) if wrong else len(x)
            grad_rows[start:] += grad_state[: len(rows) - start]
            return grad_rows[len(state) :], grad_rows[: len(state)], torch.stack(grad_w)

    def windows(rows, size, w):
        n = len(rows) - size + 1
        return sum(w[k] * rows[k : k + n] for k in range(size))

    def convolve(x, state, w):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        check(len(w) >= 2, "w: expected 2 taps or more")
        sized("state", state, len(w) - 1, x.shape[1])
        return Convolve.apply(x, state, w)

    return convolve


add(
    "chunk_convolution_short",
    chunk_convolution,
    lambda: (real(4, 2), real(2, 2, seed=1), real(3, 2, seed=2)),
    bug="Where a chunk is shorter than the state, backward puts the next state's gradient elsewhere",
    trigger="chunks of 1 row",
)
