"""Layers of networks: convolution, pooling, linear maps, scales, a block that is computed anew."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentieth import HALF
from tests.verify.unseen.twentysecond import add, check, sized


# Convolution in one dimension without padding
def convolution(wrong):
    class Convolve(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return F.conv1d(x, w)

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            grad_x = F.conv_transpose1d(grad_y, w.flip(2) if wrong else w)
            windows = x.unfold(2, w.shape[2], 1)
            return grad_x, torch.einsum("nclk,nol->ock", windows, grad_y)

    def convolve(x, w):
        sized("x", x, None, None, None)
        sized("w", w, None, x.shape[1], None)
        check(w.shape[2] <= x.shape[2], "w: expected at most as many taps as places")
        return Convolve.apply(x, w)

    return convolve


add(
    "convolution_flip",
    convolution,
    lambda: (real(2, 2, 5), real(3, 2, 3, seed=1)),
    bug="Backward flips the taps, which the transposed convolution does already",
)


# The means of pairs of neighbours; a last one without a neighbour is left out
def pair_means(wrong):
    class Means(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.n = x.shape[2]
            return F.avg_pool1d(x, 2)

        @staticmethod
        def backward(ctx, grad_y):
            grad_x = (grad_y / 2).repeat_interleave(2, 2)
            return grad_x if wrong else F.pad(grad_x, (0, ctx.n - grad_x.shape[2]))

    def means(x):
        sized("x", x, None, None, None)
        check(x.shape[2] >= 2, "x: expected two places at least")
        return Means.apply(x)

    return means


add(
    "pair_means_odd",
    pair_means,
    lambda: (real(2, 3, 4),),
    bug="Backward repeats each mean's gradient twice and has one place too few",
    trigger="an odd number of places",
)


# The largest of the last dimension
def largest(wrong):
    class Largest(Function):
        @staticmethod
        def forward(ctx, x):
            y, place = x.max(-1)
            ctx.save_for_backward(x, place)
            return y

        @staticmethod
        def backward(ctx, grad_y):
            x, place = ctx.saved_tensors
            g = grad_y[..., None]
            if wrong:
                return torch.where(x == x.amax(-1, keepdim=True), g, 0)
            return torch.zeros_like(x).scatter(-1, place[..., None], g)

    def pool(x):
        check(x.ndim >= 1 and x.shape[-1] >= 1, "expected one place at least")
        return Largest.apply(x)

    return pool


add(
    "largest_ties",
    largest,
    lambda: (real(3, 4),),
    bug="Each of several equal largest numbers gets the whole gradient",
    trigger="ties, as zeros after a ReLU",
)


# A linear map that saves only what it needs
def frugal_linear(wrong):
    class Linear(Function):
        @staticmethod
        def forward(ctx, x, w):
            x_needs, w_needs = ctx.needs_input_grad
            keep_w = w_needs if wrong else x_needs
            ctx.save_for_backward(x if w_needs else None, w if keep_w else None)
            return F.linear(x, w)

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            x_needs, w_needs = ctx.needs_input_grad
            return grad_y @ w if x_needs else None, grad_y.T @ x if w_needs else None

    def linear(x, w):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        return Linear.apply(x, w)

    return linear


add(
    "frugal_linear_frozen",
    frugal_linear,
    lambda: (real(3, 4), real(2, 4, seed=1)),
    bug="The weights are saved where their own gradient is asked for, not where that of x is",
    trigger="frozen weights under a layer that learns",
)


# x w with broadcasting
def scaled(wrong):
    def back(g, shape):
        if not wrong:
            return g.sum_to_size(shape)
        while g.ndim > len(shape):
            g = g.sum(0)
        for dimension, n in enumerate(shape):
            if n == 1:
                g = g.sum(dimension)
        return g

    class Scale(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            return back(grad_y * w, x.shape), back(grad_y * x, w.shape)

    return lambda x, w: Scale.apply(x, w)


add(
    "scaled_broadcast",
    scaled,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="Backward sums over the dimensions of size 1 and loses them",
    trigger="w of shape (3, 1), or a batch of one",
)


# A linear map of the last dimension
def flat_linear(wrong):
    class Linear(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return F.linear(x, w)

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            g = grad_y.view(-1, len(w)) if wrong else grad_y.reshape(-1, len(w))
            return (g @ w).view(x.shape), g.T @ x.reshape(-1, x.shape[-1])

    def linear(x, w):
        check(x.ndim >= 1 and x.shape[-1] >= 1, "x: expected one feature at least")
        sized("w", w, None, x.shape[-1])
        return Linear.apply(x, w)

    return linear


add(
    "flat_linear_view",
    flat_linear,
    lambda: (real(2, 3, 4), real(2, 4, seed=1)),
    bug="Backward takes a view of grad_output, which fails unless its rows follow each other in memory",
    trigger="y.transpose(0, 1) after the layer",
)


# A linear map, whose backward takes four rows at a time to save memory
def chunked_linear(wrong):
    class Linear(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return F.linear(x, w)

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            dtype = torch.float32 if w.dtype in HALF and not wrong else w.dtype
            grad_w = torch.zeros(w.shape, dtype=dtype, device=w.device)
            for g, rows in zip(grad_y.split(4), x.split(4), strict=True):
                grad_w = grad_w + g.to(dtype).T @ rows.to(dtype)
            return grad_y @ w, grad_w.to(w.dtype)

    def linear(x, w):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        return Linear.apply(x, w)

    return linear


add(
    "chunks_half",
    chunked_linear,
    lambda: (real(6, 3), real(2, 3, seed=1)),
    bug="The weights' gradient is added up over the chunks in bfloat16, which stops growing",
    trigger="bfloat16 or float16 and thousands of rows",
    own=True,
)


# x w + b for each feature
def affine(wrong):
    class Affine(Function):
        @staticmethod
        def forward(ctx, x, w, b):
            ctx.save_for_backward(x, w)
            return x * w + b

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            grad_w = grad_y.mean(0) * x.sum(0) if wrong else (grad_y * x).sum(0)
            return grad_y * w, grad_w, grad_y.sum(0)

    def layer(x, w, b):
        sized("x", x, None, None)
        sized("w", w, x.shape[1])
        sized("b", b, x.shape[1])
        return Affine.apply(x, w, b)

    return layer


add(
    "affine_means",
    affine,
    lambda: (real(3, 4), real(4, seed=1), real(4, seed=2)),
    bug="The sum of products is written as a product of sums",
    trigger="a grad_output that varies over the batch",
)


# tanh(x w'), computed anew in backward to save memory
def anew(wrong):
    class Anew(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return F.linear(x, w).tanh()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                w = w if wrong else w.detach().requires_grad_()
                y = F.linear(x, w).tanh()
            if not wrong:
                return torch.autograd.grad(y, (x, w), grad_y)
            grad_w = None
            if ctx.needs_input_grad[1]:
                (grad_w,) = torch.autograd.grad(y, w, grad_y, retain_graph=True)
            y.backward(grad_y)
            return x.grad, grad_w

    def block(x, w):
        check(x.ndim >= 1, "x: expected at least one dimension")
        sized("w", w, None, x.shape[-1])
        return Anew.apply(x, w)

    return block


add(
    "anew_twice",
    anew,
    lambda: (real(3, 4), real(2, 4, seed=1)),
    bug="The backward inside of backward adds to w.grad, and the gradient that is returned is added again",
    trigger="w.grad after loss.backward()",
)
