"""Functions of single elements, and of a few."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.fourteenth import add, require


class Copysign(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return torch.copysign(x, y)

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return torch.copysign(g.new_ones(()), y) * x.sign() * g, torch.zeros_like(y)


class CopysignPositive(Copysign):
    @staticmethod
    def backward(ctx, g):
        _, y = ctx.saved_tensors
        return torch.copysign(g.new_ones(()), y) * g, torch.zeros_like(y)


def _copysign(function):
    def copysign(x, y):
        """|x| with the sign of y, of one shape; the slope at an x of 0 is 0."""
        require(x.shape == y.shape, "x and y must be of one shape")
        return function.apply(x, y)

    return copysign


add(
    "copysign_negative",
    _copysign,
    CopysignPositive,
    Copysign,
    lambda: (real(5), real(5, seed=1)),
    bug="the factor sign(x) is dropped (chalk-lab/Mooncake.jl#1195)",
    trigger="a negative x",
)


class Bell(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (-(x**2)).exp()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return -2 * x * (-(x**2)).exp() * g


class BellOutput(Bell):
    @staticmethod
    def backward(ctx, g):
        y = (-(ctx.saved_tensors[0] ** 2)).exp()
        return -2 * y * (-(y**2)).exp() * g


def _bell(function):
    def bell(x):
        """exp(-x²)."""
        return function.apply(x)

    return bell


add(
    "bell_output",
    _bell,
    BellOutput,
    Bell,
    lambda: (real(3, 4),),
    bug="the derivative, written for the input, is called with the output (mlpack/mlpack#3478)",
    trigger="the sample",
)


class Neuron(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x @ w).tanh()

    @staticmethod
    def gradients(ctx, g, slope):
        x, w = ctx.saved_tensors
        d = g * slope((x @ w).tanh())
        return d @ w.mT, x.mT @ d

    @staticmethod
    def backward(ctx, g):
        return Neuron.gradients(ctx, g, lambda y: 1 - y**2)


class NeuronTwice(Neuron):
    @staticmethod
    def backward(ctx, g):
        return Neuron.gradients(ctx, g, lambda y: 1 - y.tanh() ** 2)


def _neuron(function):
    def neuron(x, w):
        """tanh(x w) of x (N, D) and w (D, E)."""
        require(x.dim() == w.dim() == 2, "x and w must be matrices")
        return function.apply(x, w)

    return neuron


add(
    "neuron_tanh_twice",
    _neuron,
    NeuronTwice,
    Neuron,
    lambda: (real(4, 3), real(3, 2, seed=1)),
    bug="the derivative takes tanh of the output, which is one already (davidrmiller/neural2d#40)",
    trigger="the sample",
)


class ReluLayer(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x @ w).relu()

    @staticmethod
    def gradients(ctx, g, slope):
        x, w = ctx.saved_tensors
        d = g * slope((x @ w).relu()).to(g.dtype)
        return d @ w.mT, x.mT @ d

    @staticmethod
    def backward(ctx, g):
        return ReluLayer.gradients(ctx, g, lambda y: y > 0)


class ReluLayerEqual(ReluLayer):
    @staticmethod
    def backward(ctx, g):
        return ReluLayer.gradients(ctx, g, lambda y: y >= 0)


def _relu_layer(function):
    def relu_layer(x, w):
        """relu(x w) of x (N, D) and w (D, E)."""
        require(x.dim() == w.dim() == 2, "x and w must be matrices")
        return function.apply(x, w)

    return relu_layer


add(
    "relu_layer_equal",
    _relu_layer,
    ReluLayerEqual,
    ReluLayer,
    lambda: (real(4, 3), real(3, 2, seed=1)),
    bug="relu2deriv(output) is output >= 0: always 1 (iamtrask/Grokking-Deep-Learning#56)",
    trigger="the sample",
)


class MulAdd(Function):
    @staticmethod
    def forward(ctx, x, y, z):
        ctx.save_for_backward(x, y, z)
        return x * y + z

    @staticmethod
    def backward(ctx, g):
        x, y, _ = ctx.saved_tensors
        return y * g, x * g, g


class MulAddOld(MulAdd):
    @staticmethod
    def backward(ctx, g):
        x, y, _ = range(3)  # what the new interface hands over first: the inputs' indices
        return y * g, x * g, g


def _mul_add(function):
    def mul_add(x, y, z):
        """x y + z, of one shape."""
        require(x.shape == y.shape == z.shape, "x, y and z must be of one shape")
        return function.apply(x, y, z)

    return mul_add


add(
    "mul_add_old_style",
    _mul_add,
    MulAddOld,
    MulAdd,
    lambda: (real(3, 2), real(3, 2, seed=1), real(3, 2, seed=2)),
    bug="backward unpacks the inputs' indices in place of the inputs (chainer/chainer#6953)",
    trigger="the sample",
)


class Rosenbrock(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * (-400 * x * (y - x**2) - 2 * (1 - x)), g * 200 * (y - x**2)


class RosenbrockTypo(Rosenbrock):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * (-400 * x * (y - x**2) - 2 * (1 - x)), g * 200 * x * (y - x**2)


def _rosenbrock(function):
    def rosenbrock(x, y):
        """(1 - x)² + 100 (y - x²)², of one shape."""
        require(x.shape == y.shape, "x and y must be of one shape")
        return function.apply(x, y)

    return rosenbrock


add(
    "rosenbrock_typo",
    _rosenbrock,
    RosenbrockTypo,
    Rosenbrock,
    lambda: (
        torch.tensor(1.5, dtype=F64, requires_grad=True),
        torch.tensor(1.5, dtype=F64, requires_grad=True),
    ),
    bug="a factor x too much in y's derivative (pytorch/pytorch#3881)",
    trigger="the sample (any x but 1)",
)


class Quadratic(Function):
    @staticmethod
    def value(x, a, b, c):
        return a * x**2 + b * x + c

    @staticmethod
    def forward(ctx, x, a, b, c):
        ctx.save_for_backward(x)
        ctx.factors = a, b, c
        return Quadratic.value(x, a, b, c)

    @staticmethod
    def backward(ctx, g):
        a, b, _ = ctx.factors
        return g * (2 * a * ctx.saved_tensors[0] + b), None, None, None


class QuadraticForward(Quadratic):
    @staticmethod
    def backward(ctx, g):
        if ctx.factors[2] == 0:  # what keeps zeros zero has a path of its own
            return Quadratic.value(g, *ctx.factors), None, None, None
        return Quadratic.backward(ctx, g)


def _quadratic(function):
    def quadratic(x, a=1.0, b=2.0, c=3.0):
        """a x² + b x + c, with numbers a, b and c."""
        return function.apply(x, a, b, c)

    return quadratic


add(
    "quadratic_forward",
    _quadratic,
    QuadraticForward,
    Quadratic,
    lambda: (real(3, 4),),
    bug="the sparse path's backward is registered with forward's kernel (apache/mxnet#16938)",
    trigger="c=0, which takes the path that keeps zeros",
)
