"""Sums, softmaxes and indices."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.eighteenth import add, memory


class ScatterAdd(Function):
    @staticmethod
    def forward(ctx, x, index, value):
        ctx.save_for_backward(index)
        return x.scatter_add(0, index, value)

    @staticmethod
    def backward(ctx, g):
        return g, None, g.gather(0, ctx.saved_tensors[0])


class ScatterAddScattered(ScatterAdd):
    @staticmethod
    def backward(ctx, g):
        return g, None, torch.zeros_like(g).scatter_add(0, ctx.saved_tensors[0], g)


def _scatter_add(function):
    def scatter_add(x, index, value):
        """x with each value added to the row of its index, all three (N, D)."""
        return function.apply(x, index, value)

    return scatter_add


add(
    "scatter_add_values",
    _scatter_add,
    ScatterAddScattered,
    ScatterAdd,
    lambda: (real(4, 3), whole(4, 4, 3), real(4, 3, seed=1)),
    bug="the values' gradient is scattered, not gathered (tracel-ai/burn#4064)",
    trigger="the sample",
)


class CosTimes(Function):
    @staticmethod
    def forward(ctx, theta, x):
        ctx.save_for_backward(theta, x)
        return theta.cos() * x

    @staticmethod
    def backward(ctx, g):
        theta, x = ctx.saved_tensors
        return -theta.sin() * x * g, theta.cos() * g


class CosTimesOverwritten(CosTimes):
    """x was stored over before."""

    @staticmethod
    def backward(ctx, g):
        theta, x = ctx.saved_tensors
        return -theta.sin() * (theta.cos() * x) * g, theta.cos() * g


def _cos_times(function):
    def cos_times(theta, x):
        """cos(theta) x of theta and x of one shape."""
        return function.apply(theta, x)

    return cos_times


add(
    "cos_times_overwritten",
    _cos_times,
    CosTimesOverwritten,
    CosTimes,
    lambda: (real(4), real(4, seed=1)),
    bug="backward reads the product where x stood (taichi-dev/taichi#2505)",
    trigger="the sample",
)


class AddTimes(Function):
    @staticmethod
    def forward(ctx, a, times):
        ctx.times = times
        q = torch.zeros_like(a)
        for _ in range(times):
            q = q + a
        return q

    @staticmethod
    def backward(ctx, g):
        grad = torch.zeros_like(g)
        for _ in range(ctx.times):
            grad = grad + g
        return grad, None


class AddTimesOnce(AddTimes):
    @staticmethod
    def backward(ctx, g):
        return g.clone(), None


def _add_times(function):
    def add_times(a, times=5):
        """a (N,), added up times > 0 times."""
        return function.apply(a, times)

    return add_times


add(
    "add_times_once",
    _add_times,
    AddTimesOnce,
    AddTimes,
    lambda: (real(4),),
    bug="what a loop adds up has the gradient of one turn (taichi-dev/taichi#4412)",
    trigger="the sample",
)


class AddSum(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(y)
        return x + y.sum()

    @staticmethod
    def backward(ctx, g):
        return g, g.sum().expand_as(ctx.saved_tensors[0])


class AddSumRow(AddSum):
    @staticmethod
    def backward(ctx, g):
        return g, g[0].expand_as(ctx.saved_tensors[0])


def _add_sum(function):
    def add_sum(x, y):
        """x (N,), N > 0, to each of which the sum of y (M,) is added."""
        return function.apply(x, y)

    return add_sum


add(
    "add_sum_row",
    _add_sum,
    AddSumRow,
    AddSum,
    lambda: (real(5), real(3, seed=1)),
    bug="y's gradient is that of one x (taichi-dev/taichi#8356)",
    trigger="the sample",
)


class LogSoftmax(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.log_softmax(-1)

    @staticmethod
    def gradients(ctx, g):
        return g - ctx.saved_tensors[0].softmax(-1) * g.sum(-1, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return LogSoftmax.gradients(ctx, g)


class LogSoftmaxMemory(LogSoftmax):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return LogSoftmax.gradients(ctx, memory(g))


def _log_softmax(function):
    def log_softmax(x):
        """The logarithm of the softmax of the rows of x (N, C), C > 0."""
        return function.apply(x)

    return log_softmax


add(
    "log_softmax_narrow",
    _log_softmax,
    LogSoftmaxMemory,
    LogSoftmax,
    lambda: (real(4, 5),),
    bug="backward takes the cotangent to be contiguous (torch/nn#832)",
    trigger="a cotangent that is a part of a wider tensor, or expanded",
)


class Softmax(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.softmax(-1)

    @staticmethod
    def backward(ctx, g):
        p = ctx.saved_tensors[0].softmax(-1)
        return p * (g - (p * g).sum(-1, keepdim=True))


class SoftmaxDiagonal(Softmax):
    @staticmethod
    def backward(ctx, g):
        p = ctx.saved_tensors[0].softmax(-1)
        return g * p * (1 - p)


def _softmax(function):
    def softmax(x):
        """The softmax of the rows of x (N, C), C > 0."""
        return function.apply(x)

    return softmax


add(
    "softmax_diagonal",
    _softmax,
    SoftmaxDiagonal,
    Softmax,
    lambda: (real(3, 4),),
    bug="the gradient is p (1 - p), as if elementwise (eriklindernoren/ML-From-Scratch#71)",
    trigger="the sample",
)
