"""Losses and divergences."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentieth import HALF
from tests.verify.unseen.twentysecond import add, check, indices, same, sized


# Poisson: the mean of exp(x) - t x
def poisson(wrong):
    class Poisson(Function):
        @staticmethod
        def forward(ctx, x, t):
            ctx.save_for_backward(x, t)
            return (x.exp() - t * x).mean()

        @staticmethod
        def backward(ctx, grad_y):
            x, t = ctx.saved_tensors
            share = torch.ones_like(grad_y) if wrong else grad_y
            share = share / x.numel()
            return share * (x.exp() - t), -share * x

    def loss(x, t):
        same(x, t)
        check(x.numel() > 0, "expected one number at least")
        return Poisson.apply(x, t)

    return loss


add(
    "poisson_last",
    poisson,
    lambda: (real(3, 4), real(3, 4, seed=1, positive=True)),
    bug="Backward takes the loss to be the last step and leaves out grad_output",
    trigger="a weighted sum of losses, a loss divided for accumulation or scaled for half precision",
)


# The divergence of N(m, exp(v)) from N(0, 1), summed over the last dimension
def gaussian_divergence(wrong):
    class Divergence(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(m, v):
            return (m * m + v.exp() - 1 - v).sum(-1) / 2

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            m, v = ctx.saved_tensors
            g = grad_y[..., None]
            return g * m, g * (v.exp() - 1) * (1 if wrong else 0.5)

    def divergence(m, v):
        same(m, v)
        check(m.ndim >= 1, "expected at least one dimension")
        return Divergence.apply(m, v)

    return divergence


add(
    "gaussian_divergence_half",
    gaussian_divergence,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="The 1/2 is lost before the logarithm of the variance",
)


# Cross entropy of labels, summed over the rows
def labels_entropy(wrong):
    class Entropy(Function):
        @staticmethod
        def forward(ctx, x, t):
            p = x.log_softmax(1)
            ctx.save_for_backward(p.exp(), t)
            return -p.gather(1, t[:, None]).sum()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            p, t = ctx.saved_tensors
            p = p.data if wrong else p.clone()
            p[torch.arange(len(t), device=t.device), t] -= 1
            return grad_y * p, None

    def loss(x, t):
        sized("x", x, None, None)
        sized("t", t, len(x))
        indices("t", t, x.shape[1])
        return Entropy.apply(x, t.long())

    return loss


add(
    "labels_writes",
    labels_entropy,
    lambda: (real(3, 4), whole(4, 3)),
    bug="Backward takes 1 off the saved probabilities in their place",
    trigger="a second backward through the same graph",
)


# The mean squared error of padded sequences
def padded_error(wrong):
    def valid(x, lengths):
        return torch.arange(x.shape[1], device=x.device) < lengths[:, None]

    class Error(Function):
        @staticmethod
        def forward(ctx, x, t, lengths):
            ctx.save_for_backward(x, t, lengths)
            return torch.where(valid(x, lengths), (x - t).square(), 0).sum() / lengths.sum()

        @staticmethod
        def backward(ctx, grad_y):
            x, t, lengths = ctx.saved_tensors
            grad_x = grad_y * 2 * (x - t) / lengths.sum()
            if not wrong:
                grad_x = torch.where(valid(x, lengths), grad_x, 0)
            return grad_x, -grad_x, None

    def loss(x, t, lengths):
        sized("x", x, None, None)
        same(x, t)
        sized("lengths", lengths, len(x))
        indices("lengths", lengths, x.shape[1] + 1)
        check(bool(lengths.sum() > 0), "lengths: expected one place at least")
        return Error.apply(x, t, lengths)

    return loss


add(
    "padded_error_places",
    padded_error,
    lambda: (real(2, 4), real(2, 4, seed=1), torch.tensor([4, 4])),
    bug="Backward gives the padded places a gradient too",
    trigger="sequences of several lengths",
)


# Huber's loss as a module that keeps a record
def recorded_huber(wrong):
    class Huber(nn.Module):
        def __init__(self):
            super().__init__()
            self.record = []

        def forward(self, x, t):
            y = F.huber_loss(x, t)
            if wrong:
                self.record.append(y)
            return y

    huber = Huber()

    def loss(x, t):
        same(x, t)
        return huber(x, t)

    return loss


add(
    "huber_record",
    recorded_huber,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="The module appends each loss with its graph to a list that is never emptied",
    trigger="memory that is watched over many steps",
)


# The logarithm of 1 - exp(-x), x > 0
def log_one_less(wrong):
    class Log(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            near = torch.log(-torch.expm1(-x))
            return torch.where(x < math.log(2), near, torch.log1p(-torch.exp(-x)))

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong:
                e = torch.exp(-x)
                return grad_y * e / (1 - e)
            return grad_y / torch.expm1(x)

    return lambda x: Log.apply(x)


add(
    "log_one_less_small",
    log_one_less,
    lambda: (real(3, 4, positive=True),),
    bug="Forward takes care of small numbers, backward subtracts from 1",
    trigger="small x, such as 1e-10",
)


# Cross entropy of soft targets, one number for each row
def soft_entropy(wrong):
    class Entropy(Function):
        @staticmethod
        def forward(ctx, x, q):
            ctx.save_for_backward(x, q)
            return -(q * x.log_softmax(-1)).sum(-1)

        @staticmethod
        def backward(ctx, grad_y):
            x, q = ctx.saved_tensors
            if wrong:
                grad_y = grad_y.nan_to_num()
            g = grad_y[..., None]
            p = x.log_softmax(-1)
            return g * (p.exp() * q.sum(-1, keepdim=True) - q), -g * p

    def loss(x, q):
        same(x, q)
        check(x.ndim >= 1 and x.shape[-1] >= 1, "expected one class at least")
        return Entropy.apply(x, q)

    return loss


add(
    "soft_entropy_scrub",
    soft_entropy,
    lambda: (real(3, 4), real(3, 4, seed=1, positive=True)),
    bug="Backward makes NaN and inf of grad_output finite, so that no loss scaler sees the overflow",
    trigger="a grad_output that is inf or NaN",
)


# The root of the mean square of all numbers
def root_mean_square(wrong):
    def wide(t):
        return t.float() if t.dtype in HALF else t

    class Root(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return wide(x).square().mean().sqrt().to(x.dtype)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if not wrong:
                x, grad_y = wide(x), wide(grad_y)
            y = x.square().mean().sqrt()
            return x * (grad_y / (torch.where(y == 0, 1, y) * x.numel()))

    def root(x):
        check(x.numel() > 0, "expected one number at least")
        return Root.apply(x)

    return root


add(
    "root_mean_square_half",
    root_mean_square,
    lambda: (real(3, 4),),
    bug="Forward squares in float32, backward in float16, where squares overflow",
    trigger="float16 and numbers above 256",
    own=True,
)
