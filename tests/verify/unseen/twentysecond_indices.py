"""Rows and entries that are chosen by indices."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentysecond import add, check, indices, sized


# Rows by indices
def take(wrong):
    class Take(Function):
        @staticmethod
        def forward(ctx, x, i):
            ctx.save_for_backward(i)
            ctx.shape = x.shape
            return x[i]

        @staticmethod
        def backward(ctx, grad_y):
            (i,) = ctx.saved_tensors
            grad_x = grad_y.new_zeros(ctx.shape)
            return grad_x.index_put((i,), grad_y, accumulate=not wrong), None

    def rows(x, i):
        check(x.ndim >= 1, "x: expected at least one dimension")
        check(i.ndim == 1, "i: expected one dimension")
        indices("i", i, len(x))
        return Take.apply(x, i.long())

    return rows


add(
    "take_repeated",
    take,
    lambda: (real(5, 2), torch.tensor([3, 0, 4])),
    bug="Backward puts each row's gradient in its place where it should be added",
    trigger="an index that comes twice",
)


# One entry of each row
def pick(wrong):
    class Pick(Function):
        @staticmethod
        def forward(ctx, x, i):
            ctx.save_for_backward(i)
            ctx.shape = x.shape
            return x.gather(1, i[:, None])[:, 0]

        @staticmethod
        def backward(ctx, grad_y):
            (i,) = ctx.saved_tensors
            device = None if wrong else grad_y.device
            grad_x = torch.zeros(ctx.shape, dtype=grad_y.dtype, device=device)
            return grad_x.scatter(1, i[:, None], grad_y[:, None]), None

    def entries(x, i):
        sized("x", x, None, None)
        sized("i", i, len(x))
        return Pick.apply(x, i)

    return entries


add(
    "pick_device",
    pick,
    lambda: (real(3, 4), whole(4, 3)),
    bug="Backward makes its zeros on the CPU",
    trigger="tensors of another device than the CPU",
    missed="on a CPU nothing is wrong",
)


# Rows in another order
def reorder(wrong):
    class Reorder(Function):
        @staticmethod
        def forward(ctx, x, order):
            ctx.save_for_backward(order)
            ctx.layout = x.shape, x.stride()
            return x[order]

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (order,) = ctx.saved_tensors
            shape, strides = ctx.layout
            if wrong:
                grad_x = torch.empty_strided(
                    shape, strides, dtype=grad_y.dtype, device=grad_y.device
                )
            else:
                grad_x = grad_y.new_empty(shape)
            for row, place in zip(grad_y, order.tolist(), strict=True):
                grad_x[place] = row
            return grad_x, None

    def rows(x, order):
        sized("x", x, None, None)
        sized("order", order, len(x))
        indices("order", order, len(x))
        check(len(order.unique()) == len(x), "order: expected each row once")
        return Reorder.apply(x, order.long())

    return rows


add(
    "reorder_memory",
    reorder,
    lambda: (real(4, 3), torch.tensor([2, 0, 3, 1])),
    bug="The gradient gets the strides of x, with which several rows may lie in one place",
    trigger="x that is expanded along its rows",
)
