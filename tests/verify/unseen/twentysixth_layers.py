"""Layers: norms, products, and Modules."""

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.twentysixth import add, add_bare, check, finite, read_flat, sized


# Rows of mean 0 and variance 1
def standard_rows(wrong):
    class Standard(Function):
        @staticmethod
        def forward(ctx, x):
            centred = x - x.mean(-1, keepdim=True)
            scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
            y = centred * scale
            ctx.save_for_backward(y, scale)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            y, scale = ctx.saved_tensors
            dim = 1 if wrong else -1
            along = (grad_y * y).mean(dim, keepdim=True)
            return scale * (grad_y - grad_y.mean(dim, keepdim=True) - y * along)

    def rows(x):
        check(x.ndim >= 2 and x.shape[-1] >= 1, "x: expected (*, N, D) with D >= 1")
        return Standard.apply(x)

    return rows


add(
    "standard_rows_dim",
    standard_rows,
    lambda: (real(3, 4),),
    bug="Backward takes its means along dimension 1, forward along the last",
    trigger="three dimensions",
)


# x wᵀ of sequences
def sequence_linear(wrong):
    class Linear(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w.mT

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            grad_w = torch.einsum("nlo,nld->od", grad_y, x)
            if wrong and w.is_leaf and w.grad is not None:
                w.grad.add_(grad_w)
                return grad_y @ w, None
            return grad_y @ w, grad_w

    def linear(x, w):
        sized("x", x, None, None, None)
        sized("w", w, None, x.shape[-1])
        return Linear.apply(x, w)

    return linear


add(
    "sequence_linear_fused",
    sequence_linear,
    lambda: (real(2, 3, 4), real(3, 4, seed=1)),
    bug="Where the weight has a grad already, backward adds to it itself and returns none",
    trigger="autograd.grad while the weight's grad is set",
)


# Convolution of each channel with its own three taps
def channel_taps(wrong):
    class Taps(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            n = x.shape[-1] - 2
            return sum(w[:, k, None] * x[..., k : k + n] for k in range(3))

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            n = grad_y.shape[-1]
            if wrong:
                if grad_y.stride(-1) != 1:
                    grad_y = grad_y.contiguous()
                grad_y = read_flat(grad_y)
            grad_x = sum(nn.functional.pad(w[:, k, None] * grad_y, (k, 2 - k)) for k in range(3))
            grad_w = [(grad_y * x[..., k : k + n]).sum((0, 2)) for k in range(3)]
            return grad_x, torch.stack(grad_w, -1)

    def taps(x, w):
        sized("x", x, None, None, None)
        check(x.shape[-1] >= 3, "x: expected a length of 3 or more")
        sized("w", w, x.shape[1], 3)
        return Taps.apply(x, w)

    return taps


add(
    "channel_taps_pitch",
    channel_taps,
    lambda: (real(2, 3, 6), real(3, 3, seed=1)),
    bug="Backward's kernel asks only whether the last stride of grad_output is 1",
    trigger="a grad_output that is a slice of channels",
)


# Linear layer with its weight decay as a second output
def decayed_linear(wrong):
    class Linear(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x, w)
            return x @ w.mT, 0.05 * w.square().sum()

        @staticmethod
        def backward(ctx, grad_y, grad_penalty):
            x, w = ctx.saved_tensors
            if grad_y is None and (wrong or grad_penalty is None):
                return None, None
            grad_x, grad_w = None, 0
            if grad_y is not None:
                grad_x, grad_w = grad_y @ w, grad_y.mT @ x
            if grad_penalty is not None:
                grad_w = grad_w + 0.1 * grad_penalty * w
            return grad_x, grad_w

    def linear(x, w):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        return Linear.apply(x, w)

    return linear


add(
    "decayed_linear_penalty",
    decayed_linear,
    lambda: (real(4, 3), real(2, 3, seed=1)),
    bug="Backward returns nothing where the first output has no gradient",
    trigger="the penalty alone in the loss",
)


# Linear layer whose weight is a train of two cores
def tensor_train(wrong):
    class Train(Function):
        @staticmethod
        def forward(ctx, x, a, b):
            ctx.save_for_backward(x, a, b)
            return torch.einsum("nij,irp,rjq->npq", x, a, b)

        @staticmethod
        def backward(ctx, grad_y):
            x, a, b = ctx.saved_tensors
            half = torch.einsum("nij,irp->nrjp", x, a)
            grad_b = torch.einsum("nrjp,npq->rjq", half, grad_y)
            if wrong:
                whole = torch.zeros(b.shape, device=b.device)
                grad_b = whole + grad_b.to(whole.dtype)
            grad_half = torch.einsum("npq,rjq->nrjp", grad_y, b)
            grad_x = torch.einsum("nrjp,irp->nij", grad_half, a)
            return grad_x, torch.einsum("nij,nrjp->irp", x, grad_half), grad_b

    def train(x, a, b):
        sized("x", x, None, None, None)
        sized("a", a, x.shape[1], None, None)
        sized("b", b, a.shape[1], x.shape[2], None)
        return Train.apply(x, a, b)

    return train


add(
    "tensor_train_buffer",
    tensor_train,
    lambda: (real(3, 2, 3), real(2, 2, 2, seed=1), real(2, 3, 2, seed=2)),
    bug="The second core's gradient is gathered in a buffer of the default dtype",
    trigger="float64: the raw dtype, or a tolerance below 1e-8",
)


# Two layers, computed again in backward
def recomputed_layers(wrong):
    def layers(x, w, v):
        return torch.tanh(x @ w.mT) @ v.mT

    class Layers(Function):
        @staticmethod
        def forward(ctx, x, w, v):
            ctx.save_for_backward(x, w, v)
            return layers(x, w, v)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, w, v = ctx.saved_tensors
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                if not wrong:
                    w, v = (t.detach().requires_grad_() for t in (w, v))
                y = layers(x, w, v)
            if wrong:
                torch.autograd.backward(y, grad_y)
                return x.grad, w.grad, v.grad
            return torch.autograd.grad(y, (x, w, v), grad_y)

    def recomputed(x, w, v):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        sized("v", v, None, len(w))
        finite(x=x, w=w)
        return Layers.apply(x, w, v)

    return recomputed


add(
    "recomputed_layers_leaves",
    recomputed_layers,
    lambda: (real(4, 3), real(5, 3, seed=1), real(2, 5, seed=2)),
    bug="The recomputation runs backward into the caller's weights and returns their grad",
    trigger="a second backward, or a look at the weights' grad",
)


# Division by the root mean square, in evaluation by its running average
class RunningScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 4, dtype=F64))
        self.register_buffer("average", torch.ones((), dtype=F64))

    def forward(self, x):
        check(x.ndim >= 1 and x.shape[-1] == 4, "x: expected (*, 4)")
        if not self.training:
            return x * self.gain / self.average
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (wide.square().mean() + 1e-6).sqrt()
        if x.numel():
            self.follow(scale)
        return (wide * self.gain / scale).to(torch.promote_types(x.dtype, self.gain.dtype))

    def follow(self, scale):
        with torch.no_grad():
            self.average.lerp_(scale.to(self.average.dtype), 0.1)


class AttachedScale(RunningScale):
    def follow(self, scale):
        self.average = (0.9 * self.average + 0.1 * scale).to(self.average.dtype)


add_bare(
    "running_scale_attached",
    lambda wrong: AttachedScale() if wrong else RunningScale(),
    lambda: (real(3, 4),),
    bug="The running average is not detached: it holds the graphs of all calls in training",
    trigger="evaluation after training, a copy of the Module, or memory watched",
)


# Mean of the rows, weighted by a gate
def gated_pool(wrong):
    maps = []

    class Pool(Function):
        @staticmethod
        def forward(ctx, x, a):
            ctx.save_for_backward(x, a)
            weight = torch.softmax(a, 0)
            if wrong:
                maps.append(weight)
            return weight @ x

        @staticmethod
        def backward(ctx, grad_y):
            x, a = ctx.saved_tensors
            weight = torch.softmax(a, 0)
            grad_weight = x @ grad_y
            grad_a = weight * (grad_weight - (weight * grad_weight).sum())
            return weight[:, None] * grad_y, grad_a

    def pool(x, a):
        sized("x", x, None, None)
        sized("a", a, len(x))
        return Pool.apply(x, a)

    return pool


add(
    "gated_pool_maps",
    gated_pool,
    lambda: (real(5, 3), real(5, seed=1)),
    bug="Every call's weights are kept in a list for a plot and never let go",
    trigger="memory watched",
)
