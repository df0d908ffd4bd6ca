"""Layers."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.fourteenth import add, require


class BatchNorm(Function):
    @staticmethod
    def forward(ctx, x, gain, bias):
        ctx.save_for_backward(x, gain)
        return BatchNorm.normal(x)[0] * gain + bias

    @staticmethod
    def normal(x):
        x = x - x.mean(0)
        rstd = (x.square().mean(0) + 1e-5).rsqrt()
        return x * rstd, rstd

    @staticmethod
    def gradients(ctx, g, scaled):
        x, gain = ctx.saved_tensors
        y, rstd = BatchNorm.normal(x)
        d = scaled(g, gain)
        grad = rstd * (d - d.mean(0) - y * (d * y).mean(0))
        return grad, (g * y).sum(0), g.sum(0)

    @staticmethod
    def backward(ctx, g):
        return BatchNorm.gradients(ctx, g, torch.mul)


class BatchNormGain(BatchNorm):
    @staticmethod
    def backward(ctx, g):
        return BatchNorm.gradients(ctx, g, lambda g, gain: g)


def _batch_norm(function):
    def batch_norm(x, gain, bias):
        """Batch norm of x (N, C), N > 0, with a gain and a bias (C,)."""
        require(x.dim() == 2 and x.shape[0] > 0, "x must be (N, C), N > 0")
        require(gain.shape == bias.shape == x.shape[1:], "gain and bias must be (C,)")
        return function.apply(x, gain, bias)

    return batch_norm


add(
    "batch_norm_gain",
    _batch_norm,
    BatchNormGain,
    BatchNorm,
    lambda: (real(5, 3), real(3, seed=1), real(3, seed=2)),
    bug="dx is made of dy * ivar, which was computed before dy took the gain (denizyuret/Knet.jl#288)",
    trigger="a gain that is not 1",
)


class Softmax(Function):
    @staticmethod
    def forward(ctx, x, label, weight):
        ctx.save_for_backward(x, label, weight)
        return x.softmax(-1)

    @staticmethod
    def backward(ctx, g):
        y = ctx.saved_tensors[0].softmax(-1)
        return y * (g - (g * y).sum(-1, keepdim=True)), None, None


class SoftmaxLoss(Softmax):
    @staticmethod
    def backward(ctx, g):
        x, label, weight = ctx.saved_tensors
        target = torch.nn.functional.one_hot(label, x.shape[-1]).to(x.dtype)
        return weight * (x.softmax(-1) - target), None, None


def _softmax(function):
    def weight_softmax(x, label, weight):
        """Softmax of x (N, C), C > 0.

        The labels (N,), integers below C, and the classes' weights (C,) are for a loss to come: no gradient.
        """
        require(x.dim() == 2 and x.shape[1] > 0, "x must be (N, C), C > 0")
        require(not weight.requires_grad, "weight has no gradient; detach it")
        return function.apply(x, label, weight)

    return weight_softmax


add(
    "softmax_is_loss",
    _softmax,
    SoftmaxLoss,
    Softmax,
    lambda: (real(3, 4), torch.tensor([0, 3, 1]), torch.ones(4, dtype=torch.float64)),
    bug="backward is a cross-entropy's, p - y, whatever comes from above (apache/mxnet#8109)",
    trigger="the sample",
)


class LogSoftmax(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.log_softmax(-1)

    @staticmethod
    def backward(ctx, g):
        p = ctx.saved_tensors[0].softmax(-1)
        return g - p * g.sum(-1, keepdim=True)


class LogSoftmaxPlus(LogSoftmax):
    @staticmethod
    def backward(ctx, g):
        return g + ctx.saved_tensors[0].softmax(-1)


def _log_softmax(function):
    def log_softmax(x):
        """Log softmax of the rows of x (..., D), D > 0."""
        require(x.dim() > 0 and x.shape[-1] > 0, "x must be (..., D), D > 0")
        return function.apply(x)

    return log_softmax


add(
    "log_softmax_plus",
    _log_softmax,
    LogSoftmaxPlus,
    LogSoftmax,
    lambda: (real(3, 4),),
    bug="exp(out) + gy, as if gy were a cross-entropy's -1 at the target (mlpack/mlpack#2360)",
    trigger="the sample (any grad_output whose rows do not add up to -1)",
)


class Mlp(Function):
    @staticmethod
    def forward(ctx, x, w1, w2):
        ctx.save_for_backward(x, w1, w2)
        return (x @ w1).tanh() @ w2

    @staticmethod
    def gradients(ctx, g, outer):
        x, w1, w2 = ctx.saved_tensors
        h = x @ w1
        a = h.tanh()
        d = g @ w2.mT * (1 - a**2)
        return d @ w1.mT, x.mT @ d, outer(h, a).mT @ g

    @staticmethod
    def backward(ctx, g):
        return Mlp.gradients(ctx, g, lambda h, a: a)


class MlpBefore(Mlp):
    @staticmethod
    def backward(ctx, g):
        return Mlp.gradients(ctx, g, lambda h, a: h)


class MlpMemory(Mlp):
    """Backward works in the memory in which forward left the layer's output."""

    @staticmethod
    def forward(ctx, x, w1, w2):
        ctx.save_for_backward(x, w1, w2)
        ctx.a = (x @ w1).tanh()
        return ctx.a @ w2

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w1, w2 = ctx.saved_tensors
        grad_w2 = ctx.a.mT @ g
        d = ctx.a.square_().neg_().add_(1).mul_(g @ w2.mT)
        return d @ w1.mT, x.mT @ d, grad_w2


def _mlp(function):
    def mlp(x, w1, w2):
        """tanh(x w1) w2 of x (N, D), w1 (D, H) and w2 (H, E)."""
        require(x.dim() == w1.dim() == w2.dim() == 2, "all must be matrices")
        return function.apply(x, w1, w2)

    return mlp


def mlp_sample():
    return real(4, 3), real(3, 5, seed=1), real(5, 2, seed=2)


add(
    "mlp_before_activation",
    _mlp,
    MlpBefore,
    Mlp,
    mlp_sample,
    bug="a layer's weight is given what came into the activation, H, not A (maziarraissi/backprop#1)",
    trigger="the sample",
)

add(
    "mlp_called_twice",
    _mlp,
    MlpMemory,
    Mlp,
    mlp_sample,
    bug="the pullback overwrites what it kept: right once, wrong twice (PumasAI/SimpleChains.jl#144)",
    trigger="a second backward through one graph",
)


class UnitLinear(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ (w / w.norm(dim=1, keepdim=True)).mT

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        norm = w.norm(dim=1, keepdim=True)
        unit = w / norm
        d = g.mT @ x
        return g @ unit, (d - unit * (d * unit).sum(1, keepdim=True)) / norm


class UnitLinearPlain(UnitLinear):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ (w / w.norm(dim=1, keepdim=True)), g.mT @ x


def _unit_linear(function):
    def unit_linear(x, w):
        """Inner products (N, E) of x (N, D) with the rows of w (E, D), not under 1e-6 long, scaled to length 1."""
        require(x.dim() == w.dim() == 2, "x and w must be matrices")
        require(
            bool((w.detach().norm(dim=1) >= 1e-6).all()), "no row of w may be shorter than 1e-6"
        )
        return function.apply(x, w)

    return unit_linear


add(
    "margin_inner_product",
    _unit_linear,
    UnitLinearPlain,
    UnitLinear,
    lambda: (real(4, 3), real(2, 3, seed=1)),
    bug="the weight's gradient is a plain linear layer's, g x (wy1iu/sphereface#2)",
    trigger="the sample",
)
