"""What a backward owes the engine: gradients by their flags, their number, dtype and shape, and nothing written."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentythird import add, check, sized


# Feature-wise modulation: x scale + shift, one scale and one shift a column
def modulate(wrong):
    class Modulate(Function):
        @staticmethod
        def forward(ctx, x, scale, shift):
            ctx.save_for_backward(x, scale)
            return x * scale + shift

        @staticmethod
        def backward(ctx, grad_y):
            x, scale = ctx.saved_tensors
            grads = [None, None, None]
            if ctx.needs_input_grad[0]:
                grads[0] = grad_y * scale
            if ctx.needs_input_grad[1]:
                grads[1] = (grad_y * x).sum(0)
            if ctx.needs_input_grad[2]:
                grads[2] = grad_y.sum(0)
            return tuple(g for g in grads if g is not None) if wrong else tuple(grads)

    def film(x, scale, shift):
        sized("x", x, None, None)
        sized("scale", scale, x.shape[1])
        sized("shift", shift, x.shape[1])
        return Modulate.apply(x, scale, shift)

    return film


add(
    "modulate_count",
    modulate,
    lambda: (real(3, 4), real(4, seed=1), real(4, seed=2)),
    bug="Backward leaves out what nobody asked for, so that fewer gradients than inputs come back",
    trigger="one input frozen",
)


# Bilinear score of each row: x' M z
def bilinear(wrong):
    class Score(Function):
        @staticmethod
        def forward(ctx, x, m, z):
            flags = ctx.needs_input_grad
            tensors = (x, m, z)
            if wrong:
                tensors = [t if flag else None for t, flag in zip(tensors, flags, strict=True)]
            ctx.save_for_backward(*tensors)
            return ((x @ m) * z).sum(1)

        @staticmethod
        def backward(ctx, grad_y):
            x, m, z = ctx.saved_tensors
            g = grad_y[:, None]
            grad_x = g * (z @ m.T) if ctx.needs_input_grad[0] else None
            grad_m = x.T @ (g * z) if ctx.needs_input_grad[1] else None
            grad_z = g * (x @ m) if ctx.needs_input_grad[2] else None
            return grad_x, grad_m, grad_z

    def score(x, m, z):
        sized("x", x, None, None)
        sized("m", m, x.shape[1], None)
        sized("z", z, len(x), m.shape[1])
        return Score.apply(x, m, z)

    return score


add(
    "bilinear_saved",
    bilinear,
    lambda: (real(3, 2), real(2, 4, seed=1), real(3, 4, seed=2)),
    bug="An input is kept only where its own gradient is asked for, but the others' need it",
    trigger="one input frozen",
)


# Standardised rows times a weight plus a bias
def standardise(wrong):
    class Standardise(Function):
        @staticmethod
        def forward(ctx, x, w, b, eps):
            ctx.save_for_backward(x, w)
            ctx.eps = eps
            return normal(x, eps)[0] * w + b

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            s, r = normal(x, ctx.eps)
            for_w, for_b = (2, 1) if wrong else (1, 2)
            grad_w = (grad_y * s).sum(0) if ctx.needs_input_grad[for_w] else None
            grad_b = grad_y.sum(0) if ctx.needs_input_grad[for_b] else None
            g = grad_y * w
            mixed = (g * s).mean(1, keepdim=True)
            return r * (g - g.mean(1, keepdim=True) - s * mixed), grad_w, grad_b, None

    def normal(x, eps):
        centred = x - x.mean(1, keepdim=True)
        r = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
        return centred * r, r

    def norm(x, w, b, eps=1e-5):
        sized("x", x, None, None)
        sized("w", w, x.shape[1])
        sized("b", b, x.shape[1])
        check(eps > 0, "eps: expected a number > 0")
        return Standardise.apply(x, w, b, eps)

    return norm


add(
    "standardise_flags",
    standardise,
    lambda: (real(3, 4), real(4, seed=1), real(4, seed=2)),
    bug="The flags of weight and bias are read the wrong way round",
    trigger="weight or bias frozen, the other not",
)


# Every second column
def decimate(wrong):
    class Decimate(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.shape = x.shape
            return x[:, ::2].clone()

        @staticmethod
        def backward(ctx, grad_y):
            grad_x = torch.zeros(ctx.shape) if wrong else grad_y.new_zeros(ctx.shape)
            grad_x[:, ::2] = grad_y
            return grad_x

    def every_second(x):
        sized("x", x, None, None)
        return Decimate.apply(x)

    return every_second


add(
    "decimate_dtype",
    decimate,
    lambda: (real(3, 5),),
    bug="The gradient is made in torch's default dtype, float32",
    trigger="what backward returns being looked at, or a grad_output of more digits",
)


# A gain for each channel (C, L)
def gain(wrong):
    class Gain(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            grad_w = grad_y * x
            return grad_y * w, grad_w if wrong else grad_w.sum(1, keepdim=True)

    def amplify(x, w):
        sized("x", x, None, None)
        sized("w", w, len(x), 1)
        return Gain.apply(x, w)

    return amplify


add(
    "gain_shape",
    gain,
    lambda: (real(3, 4), real(3, 1, seed=1)),
    bug="The gain's gradient comes back in the shape of x, for the engine to sum",
    trigger="what backward returns being looked at",
)


# The exponential of x held between -20 and 20
def held_exp(wrong):
    class HeldExp(Function):
        @staticmethod
        def forward(ctx, x):
            inside = (x >= -20) & (x <= 20)
            y = (x.clamp_(-20, 20) if wrong else x.clamp(-20, 20)).exp()
            ctx.save_for_backward(y, inside)
            return y

        @staticmethod
        def backward(ctx, grad_y):
            y, inside = ctx.saved_tensors
            return (grad_y * y).where(inside, 0)

    return HeldExp.apply


add(
    "held_exp_writes",
    held_exp,
    lambda: (real(3, 4),),
    bug="Forward clamps the caller's tensor in place",
    trigger="|x| > 20 and x compared before and after",
)


# Hard shrinkage: x where |x| > 0.5, else 0
def shrink(wrong):
    class Shrink(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.masked_fill(x.abs() <= 0.5, 0)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            small = ~(x.abs() > 0.5)
            if wrong:
                return grad_y.contiguous().masked_fill_(small, 0)
            return grad_y.masked_fill(small, 0)

    return Shrink.apply


add(
    "shrink_writes",
    shrink,
    lambda: (real(3, 4),),
    bug="Backward zeroes grad_output itself wherever that is contiguous",
    trigger="grad_output shared with another branch",
)


# The spread of each column: the sum of its squared distances from its mean
def spread(wrong):
    class Spread(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x - x.mean(0)).square().sum(0)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            centred = x.sub_(x.mean(0)) if wrong else x - x.mean(0)
            each = 2 * grad_y * centred
            return each - each.mean(0)

    def scatter(x):
        sized("x", x, None, None)
        return Spread.apply(x)

    return scatter


add(
    "spread_writes",
    spread,
    lambda: (real(4, 3),),
    bug="Backward centres the saved x in place, which is the caller's",
    trigger="x compared before and after backward, or a second backward",
)
