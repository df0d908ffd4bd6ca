"""What a Function owes to the engine: whose gradient, whose memory, in which order."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentieth import add, check, sized


def linear(wrong):
    class Linear(Function):
        @staticmethod
        def forward(ctx, x, w, b):
            sized("x", x, None, None)
            sized("w", w, None, x.shape[1])
            sized("b", b, len(w))
            ctx.save_for_backward(x, w)
            return x @ w.T + b

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            grad_x = grad_w = grad_b = None
            if ctx.needs_input_grad[0]:
                grad_x = grad_y @ w
            if ctx.needs_input_grad[0 if wrong else 1]:
                grad_w = grad_y.T @ x
            if ctx.needs_input_grad[2]:
                grad_b = grad_y.sum(0)
            return grad_x, grad_w, grad_b

    return lambda x, w, b: Linear.apply(x, w, b)


add(
    "linear_copied_flag",
    linear,
    lambda: (real(3, 2), real(4, 2, seed=1), real(4, seed=2)),
    bug="The weight's gradient is made where the input's is needed, the line being copied",
    trigger="an input that needs no gradient, as in a first layer",
)


def buffered_product(wrong):
    buffers = {}

    class Product(Function):
        @staticmethod
        def forward(ctx, x, w):
            sized("x", x, None, None)
            sized("w", w, None, x.shape[1])
            ctx.save_for_backward(x, w)
            return x @ w.T

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            grad_w = grad_y.T @ x
            if wrong:
                key = (w.shape, w.dtype)
                if key not in buffers:
                    buffers[key] = torch.empty_like(grad_w)
                grad_w = buffers[key].copy_(grad_w)
            return grad_y @ w, grad_w

    return lambda x, w: Product.apply(x, w)


add(
    "product_kept_buffer",
    buffered_product,
    lambda: (real(3, 2), real(4, 2, seed=1)),
    bug="The weight's gradient is always handed out in the same memory, as with the tied weights of"
    " TransformerEngine (issue 3437)",
    trigger="a weight used twice",
)


# y = x mask/(1 - p), the mask drawn from the seed
def seeded_dropout(wrong):
    class Dropout(Function):
        @staticmethod
        def forward(ctx, x, p, seed):
            check(0 <= p < 1, f"expected 0 <= p < 1, got {p}")
            kept = draw(torch.empty_like(x, memory_format=torch.contiguous_format), p, seed)
            if not wrong:
                ctx.save_for_backward(kept)
            ctx.p, ctx.seed = p, seed
            return x * kept / (1 - p)

        @staticmethod
        def backward(ctx, grad_y):
            if wrong:
                kept = draw(torch.empty_like(grad_y), ctx.p, ctx.seed)
            else:
                (kept,) = ctx.saved_tensors
            return grad_y * kept / (1 - ctx.p), None, None

    def draw(mask, p, seed):
        g = torch.Generator(mask.device).manual_seed(seed)
        return mask.bernoulli_(1 - p, generator=g)

    return lambda x, p=0.5, seed=1: Dropout.apply(x, p, seed)


add(
    "dropout_drawn_again",
    seeded_dropout,
    lambda: (real(3, 4),),
    bug="mamba (pull request 1023): backward draws the mask again, here in the memory order of"
    " grad_output",
    trigger="a transposed grad_output",
)
