"""Derivatives of derivatives."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirteenth import add


class MultiplyGradient(Function):
    """The gradients of x y, with their own derivative."""

    @staticmethod
    def forward(ctx, x, y, g):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, g)
        return g * y, g * x

    @staticmethod
    def backward(ctx, u, v):
        x, y, g = ctx.saved_tensors
        u = torch.zeros_like(x) if u is None else u
        v = torch.zeros_like(y) if v is None else v
        return g * v, g * u, u * y + v * x


class MultiplyGradientBoth(MultiplyGradient):
    @staticmethod
    def backward(ctx, u, v):
        x, y, g = ctx.saved_tensors
        if u is not None and v is not None:
            return g * v, g * u, u * y + v * x
        return None, None, u * y if v is None else v * x


class Product(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, g):
        return MultiplyGradient.apply(*ctx.saved_tensors, g)


class ProductBoth(Product):
    @staticmethod
    def backward(ctx, g):
        return MultiplyGradientBoth.apply(*ctx.saved_tensors, g)


def _product(function):
    def product(x, y):
        """x y of x and y of one shape, any number of times differentiable."""
        return function.apply(x, y)

    return product


add(
    "product_second",
    _product,
    ProductBoth,
    Product,
    lambda: (real(3), real(3, seed=1)),
    bug="nothing for x and y, where only one second cotangent comes in (PaddlePaddle/Paddle#52870)",
    trigger="a second derivative along x alone",
)


class SigmoidGradient(Function):
    @staticmethod
    def forward(ctx, y, g):
        ctx.save_for_backward(y, g)
        return g * y * (1 - y)

    @staticmethod
    def backward(ctx, u):
        y, g = ctx.saved_tensors
        return u * g * (1 - 2 * y), u * y * (1 - y)


class SigmoidGradientConstant(SigmoidGradient):
    @staticmethod
    def backward(ctx, u):
        y, _ = ctx.saved_tensors
        return None, u * y * (1 - y)


class Logistic(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.sigmoid()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return SigmoidGradient.apply(*ctx.saved_tensors, g)


class LogisticFirst(Logistic):
    @staticmethod
    def backward(ctx, g):
        return SigmoidGradientConstant.apply(*ctx.saved_tensors, g)


def _logistic(function):
    def logistic(x):
        """Sigmoid of x (any shape), any number of times differentiable."""
        return function.apply(x)

    return logistic


add(
    "logistic_second",
    _logistic,
    LogisticFirst,
    Logistic,
    lambda: (real(4),),
    bug="the gradient's own gradient leaves the output out (tensorflow/tensorflow#3767)",
    trigger="a second derivative",
)


class CrossEntropy(Function):
    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits, labels)
        return -(labels * logits.log_softmax(-1)).sum(-1)

    @staticmethod
    def backward(ctx, g):
        logits, labels = ctx.saved_tensors
        logp = logits.log_softmax(-1)
        g = g.unsqueeze(-1)
        return g * (logp.exp() * labels.sum(-1, keepdim=True) - labels), -g * logp


class CrossEntropyKept(CrossEntropy):
    """The kernel computes the gradient along with the loss, and keeps it."""

    @staticmethod
    def forward(ctx, logits, labels):
        logp = logits.log_softmax(-1)
        kept = logp.exp() * labels.sum(-1, keepdim=True) - labels
        ctx.save_for_backward(logits, kept)
        return -(labels * logp).sum(-1)

    @staticmethod
    def backward(ctx, g):
        logits, kept = ctx.saved_tensors
        g = g.unsqueeze(-1)
        return g * kept, -g * logits.log_softmax(-1)


def _cross_entropy(function):
    def soft_cross_entropy(logits, labels):
        """Cross entropy of logits (N, C) with label distributions (N, C), one loss a row, twice differentiable."""
        return function.apply(logits, labels)

    return soft_cross_entropy


add(
    "cross_entropy_second",
    _cross_entropy,
    CrossEntropyKept,
    CrossEntropy,
    lambda: (real(2, 3), real(2, 3, seed=1, grad=False).softmax(-1)),
    bug="the second derivative is 0: the gradient is a constant kept by forward (tensorflow/tensorflow#7403)",
    trigger="a second derivative",
)


class LeaveOneOut(Function):
    """The product of all the other elements of the last dimension."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return LeaveOneOut.products(x.unsqueeze(-2), 1)

    @staticmethod
    def products(x, dims):
        """Products of the last dimension without the elements whose number an earlier dimension is."""
        d = x.shape[-1]
        out = torch.eye(d, dtype=torch.bool, device=x.device)
        if dims == 2:
            out = out[:, None] | out
        return x.masked_fill(out, 1).prod(-1)

    @staticmethod
    def backward(ctx, u):
        (x,) = ctx.saved_tensors
        pairs = LeaveOneOut.products(x[..., None, None, :], 2)  # without i and j
        apart = ~torch.eye(x.shape[-1], dtype=torch.bool, device=x.device)
        return (u.unsqueeze(-1) * pairs * apart).sum(-2)


class LeaveOneOutDivided(LeaveOneOut):
    @staticmethod
    def backward(ctx, u):
        (x,) = ctx.saved_tensors
        pairs = LeaveOneOut.products(x.unsqueeze(-2), 1).unsqueeze(-1) / x.unsqueeze(-2)
        apart = ~torch.eye(x.shape[-1], dtype=torch.bool, device=x.device)
        return (u.unsqueeze(-1) * pairs * apart).sum(-2)


class Prod(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.prod(-1)

    @staticmethod
    def backward(ctx, g):
        return g.unsqueeze(-1) * LeaveOneOut.apply(*ctx.saved_tensors)


class ProdDivided(Prod):
    @staticmethod
    def backward(ctx, g):
        return g.unsqueeze(-1) * LeaveOneOutDivided.apply(*ctx.saved_tensors)


def _prod(function):
    def prod(x):
        """Product over the last dimension of x (..., D), twice differentiable."""
        return function.apply(x)

    return prod


add(
    "prod_second",
    _prod,
    ProdDivided,
    Prod,
    lambda: (real(2, 3),),
    bug="the second derivative divides by the elements: NaN at 0 (tensorflow/tensorflow#21130)",
    trigger="a second derivative at an element of 0",
    missed="a NaN of the second order is a note: torch's own functions have it too",
)


class Gated(Function):
    @staticmethod
    def forward(ctx, x, gate):
        ctx.save_for_backward(x, gate)
        return x * gate.unsqueeze(-1)

    @staticmethod
    def backward(ctx, g):
        x, gate = ctx.saved_tensors
        return g * gate.unsqueeze(-1), (g * x).sum(-1)


class GatedIdentity(Gated):
    """The gate's gradient is <grad_x, x> / gate, so that the product need not be kept."""

    @staticmethod
    def backward(ctx, g):
        x, gate = ctx.saved_tensors
        grad = g * gate.detach().unsqueeze(-1)
        return grad, (grad * x).sum(-1) / gate


def _gated(function):
    def gated(x, gate):
        """Rows x (N, D), each weighted by its gate (N,), any number of times differentiable."""
        return function.apply(x, gate)

    return gated


add(
    "gate_identity",
    _gated,
    GatedIdentity,
    Gated,
    lambda: (real(3, 2), real(3, seed=1, positive=True)),
    bug="a spurious slope of 1 / gate, and the gate's term lost (unslothai/unsloth-zoo#858)",
    trigger="a second derivative, or a gate of 0",
)
