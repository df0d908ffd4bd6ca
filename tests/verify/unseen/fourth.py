"""The fourth set: ordinary mistakes in hand-written backwards. Part one: elementwise, broadcasting, keeping."""

import torch
from torch.autograd import Function

from tests.verify.unseen import FOURTH, pair, real

X = lambda: (real(3, 4),)  # noqa: E731
XY = lambda: (real(3, 4), real(3, 4, seed=1))  # noqa: E731


def mistake(right, bug, make=X, **more):
    """Make of a backward a wrong Function with the forward of ``right``, and add both to the set."""

    def add(backward):
        wrong = type(backward.__name__, (right,), {"backward": staticmethod(backward)})
        pair(f"{backward.__name__}_4", wrong.apply, right.apply, make, bug, into=FOURTH, **more)
        return wrong

    return add


class Kept(Function):
    """A Function of tensors that saves its inputs; subclasses say ``value``."""

    @classmethod
    def forward(cls, ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return cls.value(*inputs)


class SiLU(Kept):
    value = staticmethod(lambda x: x * x.sigmoid())

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * s * (1 + x * (1 - s))


@mistake(SiLU, "a factor of the product rule lost")
def silu_term(ctx, g):
    (x,) = ctx.saved_tensors
    s = x.sigmoid()
    return g * (s + x * s)


class Softsign(Kept):
    value = staticmethod(lambda x: x / (1 + x.abs()))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g / (1 + x.abs()) ** 2


@mistake(Softsign, "the square forgotten")
def softsign_square(ctx, g):
    (x,) = ctx.saved_tensors
    return g / (1 + x.abs())


class Leaky(Kept):
    value = staticmethod(lambda x: torch.where(x > 0, x, 0.01 * x))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, g, 0.01 * g)


@mistake(Leaky, "relu's mask instead of the slope")
def leaky_is_relu(ctx, g):
    (x,) = ctx.saved_tensors
    return g * (x > 0)


class Clip(Kept):
    value = staticmethod(lambda x: x.clamp(-1, 2))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * ((x >= -1) & (x <= 2))


@mistake(
    Clip,
    "the upper bound forgotten; no element of the sample is above it",
    lambda: (real(3, 4) / 4,),
)
def clip_upper(ctx, g):  # fmt: skip
    (x,) = ctx.saved_tensors
    return g * (x >= -1)


class Atan2(Kept):
    value = staticmethod(torch.atan2)

    @staticmethod
    def backward(ctx, g):
        y, x = ctx.saved_tensors
        r = x * x + y * y
        return g * x / r, -g * y / r


@mistake(Atan2, "sign of the second", XY)
def atan2_sign(ctx, g):
    y, x = ctx.saved_tensors
    r = x * x + y * y
    return g * x / r, g * y / r


class Power(Kept):
    value = staticmethod(torch.pow)

    @staticmethod
    def backward(ctx, g):
        x, p = ctx.saved_tensors
        return g * p * x ** (p - 1), g * x**p * x.log()


def positive():
    return real(3, 4, positive=True).detach().requires_grad_(), real(3, 4, seed=1)


@mistake(Power, "the power itself is missing in the exponent's gradient", positive)
def power_exponent(ctx, g):
    x, p = ctx.saved_tensors
    return g * p * x ** (p - 1), g * x.log()


class Lerp(Kept):
    value = staticmethod(lambda a, b, t: a + t * (b - a))

    @staticmethod
    def backward(ctx, g):
        a, b, t = ctx.saved_tensors
        return g * (1 - t), g * t, (g * (b - a)).sum_to_size(t.shape)


@mistake(Lerp, "the ends exchanged", lambda: (*XY(), real(4, seed=2)))
def lerp_ends(ctx, g):
    a, b, t = ctx.saved_tensors
    return g * t, g * (1 - t), (g * (b - a)).sum_to_size(t.shape)


class Scaled(Kept):
    """x times a gain a column."""

    value = staticmethod(lambda x, w: x * w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum_to_size(w.shape)


XW = lambda: (real(3, 4), real(4, seed=1))  # noqa: E731


@mistake(Scaled, "mean over the broadcast rows instead of their sum", XW)
def gain_mean(ctx, g):
    x, w = ctx.saved_tensors
    return g * w, (g * x).flatten(0, -2).mean(0)


@mistake(Scaled, "the sum over the rows in the inputs' precision", XW)
def gain_accumulated(ctx, g):
    x, w = ctx.saved_tensors
    total = torch.zeros_like(w)
    for row in (g * x).flatten(0, -2):
        total = total + row
    return g * w, total


@mistake(Scaled, "only one leading dimension is summed", XW)
def gain_one_dimension(ctx, g):
    x, w = ctx.saved_tensors
    return g * w, (g * x).sum(0).reshape(-1, *w.shape)[0]


@mistake(Scaled, "the flags of needs_input_grad exchanged", XW)
def gain_flags(ctx, g):
    x, w = ctx.saved_tensors
    need_w, need_x = ctx.needs_input_grad
    return g * w if need_x else None, (g * x).sum_to_size(w.shape) if need_w else None


@mistake(Scaled, "computed in float32 whatever the inputs are", XW)
def gain_float32(ctx, g):
    x, w = (t.float() for t in ctx.saved_tensors)
    return (g.float() * w).to(g.dtype), (g.float() * x).sum_to_size(w.shape).to(g.dtype)


class Sine(Kept):
    value = staticmethod(torch.sin)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


@mistake(Sine, "the product is written into grad_output")
def sine_in_place(ctx, g):
    return g.mul_(ctx.saved_tensors[0].cos())


@mistake(Sine, "the factor is detached")
def sine_detached(ctx, g):
    return g * ctx.saved_tensors[0].detach().cos()


@mistake(Sine, "a view of grad_output that only dense memory has")
def sine_view(ctx, g):
    return (g.view(-1) * ctx.saved_tensors[0].reshape(-1).cos()).view(g.shape)


class SineKept(Sine):
    """The input kept as an attribute."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.x.cos()


pair("sine_attribute_4", SineKept.apply, Sine.apply, X, "kept on ctx, not saved", into=FOURTH)


class SineShared(Sine):
    last = None

    @staticmethod
    def forward(ctx, x):
        SineShared.last = x.detach().clone()
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * SineShared.last.cos()


pair("sine_shared_4", SineShared.apply, Sine.apply, X, "kept on the class", into=FOURTH)
