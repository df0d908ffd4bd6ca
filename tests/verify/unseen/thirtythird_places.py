"""Indices, sparse and ragged data, orders of memory."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.thirtythird import add, bounded, check, indices, read_flat, sized


# Look-up of a board's cells by (row, column)
def cells(wrong):
    class Cells(Function):
        @staticmethod
        def forward(ctx, board, at):
            ctx.save_for_backward(at)
            ctx.shape = board.shape
            return board[at[:, 0], at[:, 1]]

        @staticmethod
        def backward(ctx, grad_y):
            (at,) = ctx.saved_tensors
            high, wide, *rest = ctx.shape
            flat = at[:, 0] * (high if wrong else wide) + at[:, 1]
            grad = grad_y.new_zeros(high * wide, *rest)
            return grad.index_add(0, flat, grad_y).view(ctx.shape), None

    def function(board, at):
        sized("board", board, None, None, None)
        sized("at", at, None, 2)
        indices("at", at[:, 0], board.shape[0])
        indices("at", at[:, 1], board.shape[1])
        bounded("board", board, -1e4, 1e4)
        return Cells.apply(board, at)

    return function


add(
    "cells_row_stride",
    cells,
    lambda: (real(4, 4, 2), whole(4, 5, 2, seed=1)),
    bug="The flat address multiplies the row by the height",
    trigger="a board that is not square",
)


# Rows one after another -> padded sequences
def padded(wrong):
    class Padded(Function):
        @staticmethod
        def forward(ctx, rows, lengths):
            ctx.save_for_backward(lengths)
            on = torch.arange(int(lengths.max()), device=rows.device) < lengths[:, None]
            y = rows.new_zeros(*on.shape, rows.shape[1])
            y[on] = rows
            return y

        @staticmethod
        def backward(ctx, grad_y):
            (lengths,) = ctx.saved_tensors
            on = torch.arange(grad_y.shape[1], device=grad_y.device) < lengths[:, None]
            return (read_flat(grad_y) if wrong else grad_y)[on], None

    def function(rows, lengths):
        sized("rows", rows, None, None)
        sized("lengths", lengths, None)
        indices("lengths", lengths, len(rows) + 1)
        check(int(lengths.sum()) == len(rows), "lengths: expected a sum of len(rows)")
        bounded("rows", rows, -1e4, 1e4)
        return Padded.apply(rows, lengths)

    return function


add(
    "padded_rows_layout",
    padded,
    lambda: (real(6, 3), torch.tensor([2, 3, 1])),
    bug="backward reads grad_output as if it were contiguous",
    trigger="grad_output that is transposed, as from a layer with time first, or expanded",
)


# Rows of a sparse matrix, as many numbers each, columns of -1 where a row has fewer
def padded_sparse(wrong):
    class Product(Function):
        @staticmethod
        def forward(ctx, values, columns, x):
            ctx.save_for_backward(values, columns, x)
            on = columns >= 0
            return (torch.where(on, values, 0)[..., None] * x[columns.clamp(min=0)]).sum(1)

        @staticmethod
        def backward(ctx, grad_y):
            values, columns, x = ctx.saved_tensors
            on = columns >= 0
            at = columns.clamp(min=0)
            grad_values = (x[at] @ grad_y[..., None])[..., 0]
            if not wrong:
                grad_values = torch.where(on, grad_values, 0)
            each = torch.where(on, values, 0)[..., None] * grad_y[:, None]
            grad_x = torch.zeros_like(x).index_add(0, at.flatten(), each.flatten(0, 1))
            return grad_values, None, grad_x

    def function(values, columns, x):
        sized("values", values, None, None)
        sized("columns", columns, *values.shape)
        sized("x", x, None, None)
        indices("columns", columns + 1, len(x) + 1)
        bounded("values", values, -1e4, 1e4)
        bounded("x", x, -1e4, 1e4)
        return Product.apply(values, columns, x)

    return function


add(
    "padded_sparse_filling",
    padded_sparse,
    lambda: (
        real(3, 3),
        torch.tensor([[0, 2, -1], [1, -1, -1], [0, 1, 3]]),
        real(4, 2, seed=1),
    ),
    bug="The values that only fill up a row get a gradient",
)


# Blocks of 2 x 2 pixels to channels, a channel's four next to each other
def space_to_depth(wrong):
    class Move(Function):
        @staticmethod
        def forward(ctx, x):
            n, c, high, wide = x.shape
            y = x.reshape(n, c, high // 2, 2, wide // 2, 2).permute(0, 1, 3, 5, 2, 4)
            return y.reshape(n, 4 * c, high // 2, wide // 2)

        @staticmethod
        def backward(ctx, grad_y):
            n, c, high, wide = grad_y.shape
            if wrong:
                g = grad_y.reshape(n, 2, 2, c // 4, high, wide).permute(0, 3, 4, 1, 5, 2)
            else:
                g = grad_y.reshape(n, c // 4, 2, 2, high, wide).permute(0, 1, 4, 2, 5, 3)
            return g.reshape(n, c // 4, 2 * high, 2 * wide)

    def function(x):
        sized("x", x, None, None, None, None)
        check(x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0, "x: expected even sides")
        bounded("x", x, -1e4, 1e4)
        return Move.apply(x)

    return function


add(
    "space_to_depth_channels",
    space_to_depth,
    lambda: (real(2, 1, 4, 4),),
    bug="backward expects the block's place before the channel, as another framework has it",
    trigger="more channels than one",
)
