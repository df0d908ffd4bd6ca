"""Operations on single elements."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.nineteenth import add, given, same, sized, uniform


class OneNeuron(Function):
    @staticmethod
    def forward(ctx, x, w, y):
        ctx.save_for_backward(x, w, y)
        return ((x * w).relu() - y).square().sum()

    @staticmethod
    def gradients(ctx, g, slope):
        x, w, y = ctx.saved_tensors
        z = x * w
        grad_y = 2 * g * (z.relu() - y)
        grad_z = grad_y * slope(z)
        return grad_z * w, grad_z * x, -grad_y

    @staticmethod
    def backward(ctx, g):
        return OneNeuron.gradients(ctx, g, lambda z: (z > 0).to(z.dtype))


class OneNeuronLeft(OneNeuron):
    @staticmethod
    def backward(ctx, g):
        return OneNeuron.gradients(ctx, g, torch.relu)


def _one_neuron(function):
    def one_neuron(x, w, y):
        """Squared errors of relu(x w) and y, summed; all of one shape."""
        same(x, w, y)
        return function.apply(x, w, y)

    return one_neuron


add(
    "one_neuron_relu",
    _one_neuron,
    OneNeuronLeft,
    OneNeuron,
    lambda: (uniform(4, grad=False), uniform(4, seed=1), uniform(4, seed=2, grad=False)),
    bug="relu's slope is left at x instead of 1 (example-a.com/answer/51812911)",
)


class Steps(Function):
    @staticmethod
    def forward(ctx, h0, w_h, w_y):
        ctx.save_for_backward(h0, w_h, w_y)
        return w_y * (w_h * (w_h * h0).tanh()).tanh()

    @staticmethod
    def gradients(ctx, g, slope):
        h0, w_h, w_y = ctx.saved_tensors
        h1_raw = w_h * h0
        h1 = h1_raw.tanh()
        h2_raw = w_h * h1
        dh2_raw = slope(h2_raw) * g * w_y
        dh1_raw = slope(h1_raw) * w_h * dh2_raw
        return w_h * dh1_raw, h1 * dh2_raw + h0 * dh1_raw, g * h2_raw.tanh()

    @staticmethod
    def backward(ctx, g):
        return Steps.gradients(ctx, g, lambda raw: 1 - raw.tanh().square())


class StepsRaw(Steps):
    @staticmethod
    def backward(ctx, g):
        return Steps.gradients(ctx, g, lambda raw: 1 - raw.square())


def _steps(function):
    def steps(h0, w_h, w_y):
        """w_y tanh(w_h tanh(w_h h0)); all of one shape."""
        same(h0, w_h, w_y)
        return function.apply(h0, w_h, w_y)

    return steps


add(
    "steps_tanh",
    _steps,
    StepsRaw,
    Steps,
    lambda: (given(0.5, grad=False), given(2.0), given(40.0)),
    bug="tanh's slope is taken as 1 - x² of what goes in (discuss.pytorch.org/t/187917)",
)


class Expression(Function):
    """(a b) (a + b) on a tape: f = d e of d = a b and e = a + b."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return (a * b) * (a + b)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        of_d, of_e = g * (a + b), g * a * b
        return b * of_d + of_e, a * of_d + of_e


class ExpressionOverwritten(Expression):
    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        of_e = g * a * b
        return of_e, of_e


def _expression(function):
    def expression(a, b):
        """(a b) (a + b), of a and b of one shape."""
        same(a, b)
        return function.apply(a, b)

    return expression


add(
    "expression_overwritten",
    _expression,
    ExpressionOverwritten,
    Expression,
    lambda: (given(-2.0), given(3.0)),
    bug="a second use overwrites the gradient of the first (dev.to/shrsv, Fixing a bug in micrograd backprop)",
)


class Square(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 4 * x.conj()


class SquareHolomorphic(Square):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 4 * x


def _square(function):
    def square(x):
        """2 x², of x of any shape, real or complex."""
        return function.apply(x)

    return square


def _numbers():
    real_part, imaginary = given([[1.0, 3.0], [5.0, 7.0]]), given([[2.0, 4.0], [6.0, 8.0]])
    return (torch.complex(real_part, imaginary).detach().requires_grad_(),)


add(
    "square_conjugate",
    _square,
    SquareHolomorphic,
    Square,
    _numbers,
    bug="4 x is expected where autograd wants its conjugate (discuss.pytorch.org/t/144687)",
)


class Greens(Function):
    @staticmethod
    def forward(ctx, m, n):
        ctx.save_for_backward(m, n)
        return (m * n).sum()

    @staticmethod
    def backward(ctx, g):
        m, n = ctx.saved_tensors
        return g * n, g * m


class GreensTwice(Greens):
    @staticmethod
    def backward(ctx, g):
        m, n = ctx.saved_tensors
        return g * 2 * m * n, g * m


def _greens(function):
    def greens(m, n):
        """m · n, of m and n (3,)."""
        sized("m", m, 3)
        sized("n", n, 3)
        return function.apply(m, n)

    return greens


add(
    "greens_twice",
    _greens,
    GreensTwice,
    Greens,
    lambda: (given([1.0, 2.0, 3.0]), given([3.0, 2.0, 0.0])),
    bug="the hand-written derivative of m · n is 2 m n (Julia forum, Custom gradients for Julia functions)",
)


class Sigmoid(Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.sigmoid()

    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return g * z.sigmoid() * (1 - z.sigmoid())


class SigmoidMinus(Sigmoid):
    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return -g * z.sigmoid() * (1 - z.sigmoid())


def _sigmoid(function):
    def sigmoid(z):
        """1 / (1 + exp(-z)), of z of any shape."""
        return function.apply(z)

    return sigmoid


add(
    "sigmoid_minus",
    _sigmoid,
    SigmoidMinus,
    Sigmoid,
    lambda: (real(5),),
    bug="g' is given as -g (1 - g) (math.stackexchange.com/q/1159033, Regularized logistic regression is convex)",
)
