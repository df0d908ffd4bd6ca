"""Softmax and its cross-entropy, differentiated step by step."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.nineteenth import add, check, given, same, sized, uniform


class Softmax(Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.softmax(-1)

    @staticmethod
    def through(s, g):
        """(diag(s) - s sᵀ) g."""
        return s * (g - (s * g).sum(-1, keepdim=True))

    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return Softmax.through(z.softmax(-1), g)


class SoftmaxOfGradient(Softmax):
    @staticmethod
    def backward(ctx, g):
        return Softmax.through(g.softmax(-1), g)


def _softmax(function):
    def softmax(z):
        """Softmax of z (C,), C > 0."""
        sized("z", z, None)
        check(z.shape[0] > 0, "z: expected classes, got none")
        return function.apply(z)

    return softmax


add(
    "softmax_argument",
    _softmax,
    SoftmaxOfGradient,
    Softmax,
    lambda: (real(5),),
    bug="softmax_backward takes the softmax of dA, not of Z (Understanding backpropagation with softmax, offlinew.com "
    "3383959922)",
)


class Staged(Function):
    @staticmethod
    def forward(ctx, x, w, y, reg):
        ctx.save_for_backward(x, w, y)
        ctx.reg = reg
        picked = (x @ w).log_softmax(1).gather(1, y.unsqueeze(1))
        return -picked.sum() / x.shape[0] + reg * w.square().sum()

    @staticmethod
    def gradients(ctx, g, through):
        x, w, y = ctx.saved_tensors
        p = (x @ w).softmax(1)
        one_hot = torch.zeros_like(p).scatter(1, y.unsqueeze(1), 1.0)
        d_prod = (through(p, one_hot) - one_hot) * g / x.shape[0]
        return d_prod @ w.mT, x.mT @ d_prod + 2 * g * ctx.reg * w, None, None

    @staticmethod
    def backward(ctx, g):
        return Staged.gradients(ctx, g, lambda p, one_hot: p)


class StagedApart(Staged):
    """-exp / denom² times the gradient -y / p of p, not summed, goes back through exp."""

    @staticmethod
    def backward(ctx, g):
        return Staged.gradients(ctx, g, lambda p, one_hot: p * one_hot)


def _staged(function):
    def softmax_loss(x, w, y, reg=0.1):
        """Mean cross-entropy of x w plus reg Σ w², of x (N, D), N > 0, w (D, C) and classes y (N,)."""
        sized("x", x, None, None)
        check(x.shape[0] > 0, "x: expected samples, got none")
        sized("w", w, x.shape[1], None)
        sized("y", y, x.shape[0])
        check(bool(((y >= 0) & (y < w.shape[1])).all()), "y: expected classes of w")
        return function.apply(x, w, y, reg)

    return softmax_loss


add(
    "softmax_loss_staged",
    _staged,
    StagedApart,
    Staged,
    lambda: (real(4, 3, grad=False), real(3, 5, seed=1), whole(5, 4, seed=2)),
    bug="the denominator's gradient is not summed over the classes (reddit r/cs231n, Softmax derivative staged "
    "computation)",
)


class Entropy(Function):
    @staticmethod
    def forward(ctx, z, t):
        ctx.save_for_backward(z, t)
        return -(t * z.log_softmax(-1)).sum()

    @staticmethod
    def gradients(ctx, g, of_z):
        z, t = ctx.saved_tensors
        return g * of_z(z, t), -g * z.log_softmax(-1)

    @staticmethod
    def backward(ctx, g):
        return Entropy.gradients(ctx, g, lambda z, t: z.softmax(-1) * t.sum(-1, keepdim=True) - t)


class EntropyOfInput(Entropy):
    @staticmethod
    def backward(ctx, g):
        return Entropy.gradients(ctx, g, lambda z, t: Softmax.through(z, -t / z.softmax(-1)))


def _entropy(function):
    def entropy(z, t):
        """-Σ t log softmax(z), of z and t (N, C), C > 0."""
        sized("z", z, None, None)
        check(z.shape[1] > 0, "z: expected classes, got none")
        same(z, t)
        return function.apply(z, t)

    return entropy


add(
    "entropy_jacobian",
    _entropy,
    EntropyOfInput,
    Entropy,
    lambda: (given([[1.75, 1.75]]), given([[0.0, 1.0]], grad=False)),
    bug="the softmax's Jacobian is filled with its input, not its output (datascience.stackexchange.com/q/64746)",
)


class Output(Function):
    """The last layer: cross-entropy of softmax(w o + b) and t."""

    @staticmethod
    def forward(ctx, o, w, b, t):
        ctx.save_for_backward(o, w, b, t)
        return -(t * (w @ o + b).log_softmax(0)).sum()

    @staticmethod
    def gradients(ctx, g, of_z):
        o, w, b, t = ctx.saved_tensors
        z = w @ o + b
        dz = g * of_z(z.softmax(0), t)
        return w.mT @ dz, torch.outer(dz, o), dz, -g * z.log_softmax(0)

    @staticmethod
    def backward(ctx, g):
        return Output.gradients(ctx, g, lambda p, t: p * t.sum() - t)


class OutputDiagonal(Output):
    @staticmethod
    def backward(ctx, g):
        return Output.gradients(ctx, g, lambda p, t: t * p - t)


def _output(function):
    def output_layer(o, w, b, t):
        """-Σ t log softmax(w o + b), of o (D,), w (C, D), C > 0, b and t (C,)."""
        sized("o", o, None)
        sized("w", w, None, o.shape[0])
        check(w.shape[0] > 0, "w: expected classes, got none")
        sized("b", b, w.shape[0])
        sized("t", t, w.shape[0])
        return function.apply(o, w, b, t)

    return output_layer


add(
    "output_layer_diagonal",
    _output,
    OutputDiagonal,
    Output,
    lambda: (real(4), real(3, 4, seed=1), real(3, seed=2), given([0.0, 1.0, 0.0], grad=False)),
    bug="of the softmax's Jacobian only the diagonal is used (stats.stackexchange.com/q/235528)",
)


class Multinomial(Function):
    @staticmethod
    def forward(ctx, theta, x, y, mean):
        ctx.save_for_backward(theta, x, y)
        ctx.mean = mean
        picked = (x @ theta.mT).log_softmax(1).gather(1, y.unsqueeze(1))
        return -picked.sum() / (x.shape[0] if mean else 1)

    @staticmethod
    def gradients(ctx, g, of_theta):
        theta, x, y = ctx.saved_tensors
        if ctx.mean:
            g = g / x.shape[0]
        p = (x @ theta.mT).softmax(1)
        one_hot = torch.zeros_like(p).scatter(1, y.unsqueeze(1), 1.0)
        d = one_hot - p
        return -g * (of_theta(d, p, one_hot).mT @ x), -g * (d @ theta), None, None

    @staticmethod
    def backward(ctx, g):
        return Multinomial.gradients(ctx, g, lambda d, p, one_hot: d)


class MultinomialNothing(Multinomial):
    """1(y = j) (x - x Σ exp / Σ exp)."""

    @staticmethod
    def backward(ctx, g):
        return Multinomial.gradients(
            ctx,
            g,
            lambda d, p, one_hot: one_hot * (1 - p.sum(1, keepdim=True) / p.sum(1, keepdim=True)),
        )


class MultinomialAlone(Multinomial):
    @staticmethod
    def backward(ctx, g):
        return Multinomial.gradients(ctx, g, lambda d, p, one_hot: 1 - p)


def _check_multinomial(theta, x, y):
    sized("x", x, None, None)
    sized("theta", theta, None, x.shape[1])
    check(theta.shape[0] > 0, "theta: expected classes, got none")
    sized("y", y, x.shape[0])
    check(bool(((y >= 0) & (y < theta.shape[0])).all()), "y: expected classes of theta")


def _multinomial_mean(function):
    def multinomial(theta, x, y):
        """Mean of -log softmax(theta x)[y], of theta (C, D), C > 0, x (N, D), N > 0, and classes y (N,)."""
        _check_multinomial(theta, x, y)
        check(x.shape[0] > 0, "x: expected samples, got none")
        return function.apply(theta, x, y, True)

    return multinomial


def _multinomial_sum(function):
    def softmax_regression(theta, x, y):
        """Sum of -log softmax(theta x)[y], of theta (C, D), C > 0, x (N, D) and classes y (N,)."""
        _check_multinomial(theta, x, y)
        return function.apply(theta, x, y, False)

    return softmax_regression


def _classes():
    return real(3, 2), uniform(5, 2, seed=1, grad=False), whole(3, 5, seed=2)


add(
    "multinomial_sums",
    _multinomial_mean,
    MultinomialNothing,
    Multinomial,
    _classes,
    bug="log Σ exp is differentiated over all classes at once, and x - x is left (stats.stackexchange.com/q/193473)",
)
add(
    "softmax_regression_indicator",
    _multinomial_sum,
    MultinomialAlone,
    Multinomial,
    _classes,
    bug="the indicator y = k is lost and every sample counts for k (math.techqa.club 1428344, softmax regression)",
)
