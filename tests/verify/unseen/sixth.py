"""The sixth set, written by somebody who had not read the checks. Part one: activations."""

import functools
import math

import torch
from torch.autograd import Function
from torch.nn import functional as F

from tests.verify.unseen import SIXTH, pair, real

X = lambda: (real(3, 4),)  # noqa: E731


def small(*shape, scale=0.3):
    return (scale * real(*shape, grad=False)).requires_grad_()


def widen(tensors):
    """The tensors in the dtype to compute in, float32 at least, and the dtype of the result."""
    dtype = functools.reduce(
        torch.promote_types, [t.dtype for t in tensors if t.is_floating_point()]
    )
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    return [t.to(wide) if t.is_floating_point() else t for t in tensors], dtype


class Rule(Function):
    """Saves its inputs, tensors first, and computes again: ``value(*inputs)`` and ``pull(g, *inputs)``."""

    @classmethod
    def forward(cls, ctx, *inputs):
        tensors = [t for t in inputs if torch.is_tensor(t)]
        ctx.save_for_backward(*tensors)
        ctx.others = inputs[len(tensors) :]
        wide, dtype = widen(tensors)
        return cls.value(*wide, *ctx.others).to(dtype)

    @classmethod
    def backward(cls, ctx, g):
        wide, _ = widen(ctx.saved_tensors)
        grads = cls.pull(g.to(wide[0].dtype), *wide, *ctx.others)
        grads = grads if isinstance(grads, tuple) else (grads,)
        return *grads, *[None] * (len(wide) + len(ctx.others) - len(grads))


def faulty(right, bug, make=X, **more):
    """Make of another ``pull`` a wrong twin of the Rule ``right``, and add both to the set."""

    def add(pull):
        wrong = type(pull.__name__, (right,), {"pull": staticmethod(pull)})
        pair(f"{pull.__name__}_6", wrong.apply, right.apply, make, bug, into=SIXTH, **more)
        return pull

    return add


# ---------------------------------------------------------------------------------------------------- activations
class Mish(Rule):
    value = staticmethod(lambda x: x * F.softplus(x).tanh())

    @staticmethod
    def pull(g, x):
        t = F.softplus(x).tanh()
        return g * (t + x * x.sigmoid() * (1 - t * t))


@faulty(Mish, "(1 + e^x)^2 overflows for a large x, in the backward only")
def mish(g, x):
    square = (1 + x.exp()).square()
    t = (square - 1) / (square + 1)
    return g * (t + x * x.sigmoid() * (1 - t * t))


class GELU(Rule):
    value = staticmethod(lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))

    @staticmethod
    def pull(g, x):
        density = (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)
        return g * (0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density)


@faulty(GELU, "exact forward, derivative of the tanh approximation")
def gelu(g, x):
    c = math.sqrt(2 / math.pi)
    t = (c * (x + 0.044715 * x**3)).tanh()
    return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x))


class ScaledTanh(Rule):
    value = staticmethod(lambda x, a, b: a * (b * x).tanh())

    @staticmethod
    def pull(g, x, a, b):
        t = (b * x).tanh()
        inner = g * a * (1 - t * t)
        return inner * b, (g * t).sum_to_size(a.shape), (inner * x).sum_to_size(b.shape)


@faulty(
    ScaledTanh,
    "a channel's gradient is the batch's mean, not its sum",
    lambda: (real(3, 4), real(4), real(4)),
)
def scaled_tanh(g, x, a, b):
    t = (b * x).tanh()
    inner = g * a * (1 - t * t)
    return inner * b, (g * t).mean(0), (inner * x).mean(0)


class Hardtanh(Rule):
    value = staticmethod(lambda x, low, high: x.clamp(low, high))
    pull = staticmethod(lambda g, x, low, high: g * ((x >= low) & (x <= high)))


@faulty(
    Hardtanh, "|x| <= high, though the bounds are not symmetric", lambda: (small(3, 4), -2.0, 1.0)
)
def hardtanh(g, x, low, high):
    return g * (x.abs() <= high)


class Softplus(Rule):
    value = staticmethod(lambda x, beta: torch.logaddexp(beta * x, torch.zeros_like(x)) / beta)
    pull = staticmethod(lambda g, x, beta: g * (beta * x).sigmoid())


@faulty(Softplus, "the linear branch is chosen by x, not by beta x", lambda: (real(3, 4), 0.1))
def softplus_beta(g, x, beta):
    return g * torch.where(x > 20, 1.0, (beta * x).sigmoid())


def through_softmax(g, p):
    return p * (g - (g * p).sum(-1, keepdim=True))


class TemperedSoftmax(Rule):
    value = staticmethod(lambda x, s: (x * s).softmax(-1))

    @staticmethod
    def pull(g, x, s):
        d = through_softmax(g, (x * s).softmax(-1))
        return d * s, (d * x).sum_to_size(s.shape)


@faulty(
    TemperedSoftmax,
    "the probabilities are detached: second derivative lost",
    lambda: (real(3, 4), real(1)),
)
def tempered_softmax(g, x, s):
    d = through_softmax(g, (x * s).softmax(-1).detach())
    return d * s, (d * x).sum_to_size(s.shape)


class Exp(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y


class ExpOnCtx(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.y = x.exp()
        return ctx.y

    @staticmethod
    def backward(ctx, g):
        return g * ctx.y


pair(
    "exp_on_ctx_6",
    ExpOnCtx.apply,
    Exp.apply,
    X,
    "output kept on ctx: writing to it goes unnoticed",
    into=SIXTH,
)


class GLU(Rule):
    value = staticmethod(lambda a, b: a * b.sigmoid())
    pull = staticmethod(lambda g, a, b: (g * b.sigmoid(), g * a * b.sigmoid() * (-b).sigmoid()))


@faulty(
    GLU, "gate computed in float32 for float64 inputs", lambda: (real(3, 4), real(3, 4, seed=1))
)
def glu(g, a, b):
    s = b.float().sigmoid()
    return g * s, g * a * (s * (1 - s))


class SquaredReLU(Rule):
    value = staticmethod(lambda x: x.relu().square())
    pull = staticmethod(lambda g, x: 2 * g * x.relu())


class SquaredReLUInPlace(SquaredReLU):
    value = staticmethod(lambda x: x.clamp_(min=0).square())


pair(
    "squared_relu_6",
    SquaredReLUInPlace.apply,
    SquaredReLU.apply,
    X,
    "forward clamps its caller's tensor",
    into=SIXTH,
)
