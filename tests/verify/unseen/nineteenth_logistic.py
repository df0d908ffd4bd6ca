"""Logistic losses."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.nineteenth import add, check, given, same, sized, uniform


class Logit(Function):
    @staticmethod
    def forward(ctx, x, y, a, b):
        ctx.save_for_backward(x, y, a, b)
        z = a * x + b
        return (F.softplus(z) - y * z).sum()

    @staticmethod
    def gradients(ctx, g, sign):
        x, y, a, b = ctx.saved_tensors
        z = a * x + b
        d = g * (z.sigmoid() - y)
        return d * a, -g * z, sign * (d * x).sum(), sign * d.sum()

    @staticmethod
    def backward(ctx, g):
        return Logit.gradients(ctx, g, 1)


class LogitReverted(Logit):
    @staticmethod
    def backward(ctx, g):
        return Logit.gradients(ctx, g, -1)


def _logit(function):
    def logit(x, y, a, b):
        """Σ -(y log z + (1 - y) log(1 - z)), z = σ(a x + b), of x and y (N,), y from 0 to 1, and numbers a, b."""
        sized("x", x, None)
        same(x, y)
        check(bool(((y >= 0) & (y <= 1)).all()), "y: expected labels from 0 to 1")
        sized("a", a)
        sized("b", b)
        return function.apply(x, y, a, b)

    return logit


add(
    "logit_sign",
    _logit,
    LogitReverted,
    Logit,
    lambda: (
        real(4, grad=False),
        given([1.0, 0.0, 1.0, 1.0], grad=False),
        given(1.0),
        given(1.0),
    ),
    bug="the gradient's sign is reverted (Stack Exchange, Gradient descent implementation of logistic regression)",
)


class LogReg(Function):
    @staticmethod
    def forward(ctx, preds, labels):
        ctx.save_for_backward(preds, labels)
        return (F.softplus(preds) - labels * preds).sum()

    @staticmethod
    def backward(ctx, g):
        preds, labels = ctx.saved_tensors
        return g * (preds.sigmoid() - labels), -g * preds


class LogRegProbability(LogReg):
    @staticmethod
    def backward(ctx, g):
        preds, labels = ctx.saved_tensors
        p = preds.sigmoid()
        return -g * (labels - p) / (p * (1 - p)), -g * preds


def _log_reg(function):
    def log_reg(preds, labels):
        """Σ -(y log p + (1 - y) log(1 - p)), p = σ(preds), of preds and labels y from 0 to 1 of one shape."""
        same(preds, labels)
        check(bool(((labels >= 0) & (labels <= 1)).all()), "labels: expected numbers from 0 to 1")
        return function.apply(preds, labels)

    return log_reg


add(
    "log_reg_margin",
    _log_reg,
    LogRegProbability,
    LogReg,
    lambda: (real(5), whole(2, 5, seed=1).double()),
    bug="the gradient is taken by the probability, not by the margin (stats.stackexchange.com/q/333695)",
)


class Bce(Function):
    @staticmethod
    def forward(ctx, y_hat, y):
        ctx.save_for_backward(y_hat, y)
        return -(y * y_hat.log() + (1 - y) * (1 - y_hat).log()).sum() / y.shape[0]

    @staticmethod
    def gradients(ctx, g, sign):
        y_hat, y = ctx.saved_tensors
        g = -g / y.shape[0]
        return g * (y / y_hat - sign * (1 - y) / (1 - y_hat)), g * (y_hat.log() - (1 - y_hat).log())

    @staticmethod
    def backward(ctx, g):
        return Bce.gradients(ctx, g, 1)


class BceSum(Bce):
    @staticmethod
    def backward(ctx, g):
        return Bce.gradients(ctx, g, -1)


def _bce(function):
    def bce(y_hat, y):
        """-1/M Σ y log ŷ + (1 - y) log(1 - ŷ), of ŷ and y (M,), M > 0; 0 < ŷ < 1."""
        sized("y_hat", y_hat, None)
        check(y_hat.shape[0] > 0, "y_hat: expected examples, got none")
        same(y_hat, y)
        check(bool(((y_hat > 0) & (y_hat < 1)).all()), "y_hat: expected numbers between 0 and 1")
        return function.apply(y_hat, y)

    return bce


add(
    "bce_sign",
    _bce,
    BceSum,
    Bce,
    lambda: (uniform(5, low=0.1, high=0.9), whole(2, 5, seed=1).double()),
    bug="log(1 - ŷ) is differentiated without the inner minus (math.techqa.club 2503428, Why are my signs not right?)",
)


class Signed(Function):
    @staticmethod
    def forward(ctx, x, t, w, w0):
        ctx.save_for_backward(x, t, w, w0)
        return -F.logsigmoid(t * (x @ w + w0)).sum()

    @staticmethod
    def gradients(ctx, g, sign):
        x, t, w, w0 = ctx.saved_tensors
        z = x @ w + w0
        d = -g * (-t * z).sigmoid()
        return torch.outer(d * t, w), d * z, sign * (x.mT @ (d * t)), sign * (d * t).sum()

    @staticmethod
    def backward(ctx, g):
        return Signed.gradients(ctx, g, 1)


class SignedPlus(Signed):
    @staticmethod
    def backward(ctx, g):
        return Signed.gradients(ctx, g, -1)


def _signed(function):
    def signed_logistic(x, t, w, w0):
        """-Σ log σ(t (x · w + w0)), of x (N, D), labels t (N,), 1 or -1 as a rule, w (D,) and a number w0."""
        sized("x", x, None, None)
        sized("t", t, x.shape[0])
        sized("w", w, x.shape[1])
        sized("w0", w0)
        return function.apply(x, t, w, w0)

    return signed_logistic


add(
    "signed_logistic_minus",
    _signed,
    SignedPlus,
    Signed,
    lambda: (
        real(4, 3, grad=False),
        given([1.0, -1.0, 1.0, -1.0], grad=False),
        real(3, seed=1),
        given(0.5),
    ),
    bug="the minus before the sum is lost (math.techqa.club 4496428, cost function of logistic regression)",
)
