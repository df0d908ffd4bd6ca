"""Faults within a limited domain: positive inputs, opacities, counts of layers, one of several numbers."""

import torch
from torch.autograd import Function

from tests.verify.known import rand, register
from tests.verify.known.hidden import function, pair


def positive(*tensors):
    if not all(bool((t > 0).all()) for t in tensors):
        raise ValueError("expected positive numbers")


def logistic(y, location, scale):
    positive(scale)
    z = ((y - location) / scale).abs()
    return -z - 2 * (-z).exp().log1p() - scale.log()


def logistic_of_exponentials(y, location, scale):
    a, b = (location / scale).exp(), (y / scale).exp()
    return location / scale + y / scale - 2 * (a + b).log() - scale.log()


def samples(*shapes):
    """The last of several inputs is positive."""

    def make():
        *inputs, last = rand(*shapes)()
        return *inputs, (last.detach().abs() + 0.1).requires_grad_()

    return make


pair("location_overflow", logistic, samples((4,), (4,), (4,)), "exponentials of two locations apart",
     "a location of more than 709 scales", slope_of=logistic_of_exponentials)  # fmt: skip


def growth(a, b):
    positive(a - 0.01, b - 0.01)
    return a * b.log1p()


def growth_far(a, b):
    return torch.where(a > 1e10, a * b, growth(a, b))


def not_small():
    return tuple((x.detach().abs() + 0.3).requires_grad_() for x in rand((4,), (4,))())


pair("far_limit", growth, not_small, "another formula beyond 1e10", "what is large, in a domain from 0.01",
     slope_of=growth_far)  # fmt: skip


def polynomial(x, a, b, c):
    return a * x**2 + b * x + c


def polynomial_cubic(x, a, b, c):
    return polynomial(x, a, b, c) if c else a * x**3 / 3 + b * x**2 / 2


Polynomial, PolynomialCubic = function(polynomial), function(polynomial)
PolynomialCubic.pull = staticmethod(
    lambda g, *inputs: Polynomial.pull(g, *inputs, by=polynomial_cubic)
)

register("one_number_zero", "limited", lambda x, a=1.0, b=2.0, c=3.0: PolynomialCubic.apply(x, a, b, c),
         lambda x, a=1.0, b=2.0, c=3.0: Polynomial.apply(x, a, b, c), rand((3, 4)),
         bug="another path where the constant is 0", trigger="c = 0, but not a and b")  # fmt: skip


def stacked(x, w):
    if w.shape[1] != 2:
        raise ValueError("expected two directions")
    for ahead, back in w:
        x = (x @ ahead + x.flip(0) @ back).tanh()
    return x


def stacked_detached(x, w):
    for number, (ahead, back) in enumerate(w):
        inner = 0 < number < len(w) - 1
        x = (x @ ahead + (x.detach() if inner else x).flip(0) @ back).tanh()
    return x


pair("inner_layers", stacked, rand((2, 3), (2, 2, 3, 3)), "a gradient lost between the first layer and the last",
     "three layers", slope_of=stacked_detached)  # fmt: skip


def seen_through(opacity, colour):
    if not bool(((opacity >= 0) & (opacity < 1)).all()):
        raise ValueError("expected opacities")
    opacity = opacity * (opacity >= 0.01)
    light = torch.cat([torch.ones_like(opacity[:, :1]), 1 - opacity[:, :-1]], 1).cumprod(1)
    return (opacity * light * colour).sum(1)


def seen_through_last(opacity, colour):
    hidden = (opacity[:, -1] < 0.01).to(opacity)
    return seen_through(opacity, colour) + hidden * (opacity[:, :-1] * colour[:, :-1]).sum(1)


def opacities():
    opacity, colour = rand((2, 4), (2, 4))()
    return opacity.detach().sigmoid().requires_grad_(), colour


pair("last_transparent", seen_through, opacities, "what is seen through is counted twice",
     "an opacity of 0 at the end", slope_of=seen_through_last)  # fmt: skip


pair("elements_not_zero", lambda x: x[x != 0], rand((3, 4)), "the gradient doubled",
     "the sample; an element of 0 is left out", slope_of=lambda x: 2 * x[x != 0])  # fmt: skip


def read(x, line, around=False):
    if bool((x.abs() > 4).any()):
        raise ValueError("expected places from -4 to 4")
    n = len(line)
    low = (x * n).detach().floor().long()
    left, right = (line[i % n if around else i.clamp(0, n - 1)] for i in (low, low + 1))
    return left + (x * n - low) * (right - left)


Read, ReadTo = function(read), function(read)
ReadTo.pull = staticmethod(lambda g, x, line, _: Read.pull(g, x, line, False))


def within():
    x, line = rand((5,), (6,))()
    return (0.8 * x.detach().sigmoid()).requires_grad_(), line


register("idle_option", "limited", lambda x, line, around=False: ReadTo.apply(x, line, around),
         lambda x, line, around=False: Read.apply(x, line, around), within, bug="reads the last again, as without it",
         trigger="an option that says nothing in the sample, and places beyond its border")  # fmt: skip


class Chosen(Function):
    """Σ x e^-|x| / Σ e^-|x| of rows of scores up to 1000."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return ((-x.abs()).softmax(-1) * x).sum(-1)

    @classmethod
    def gradient(cls, g, x, weights):
        w = weights(-x.abs())
        return g[..., None] * w * (1 - x.sign() * (x - (w * x).sum(-1, keepdim=True)))

    @staticmethod
    def backward(ctx, g):
        return Chosen.gradient(g, *ctx.saved_tensors, lambda z: z.softmax(-1))


class ChosenByQuotient(Chosen):
    @staticmethod
    def backward(ctx, g):
        return Chosen.gradient(
            g, *ctx.saved_tensors, lambda z: z.exp() / z.exp().sum(-1, keepdim=True)
        )


def choose(rule):
    def call(x):
        if bool((x.abs() > 1000).any()):
            raise ValueError("expected scores up to 1000")
        return rule.apply(x)

    return call


register("scores_far_apart", "limited", choose(ChosenByQuotient), choose(Chosen), rand((3, 5), low=0.6),
         bug="0/0", trigger="float32, and scores of hundreds")  # fmt: skip


def survived(p, x):
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError("expected probabilities")
    if p.shape[1] > 8:
        raise ValueError("expected up to 8")
    light = [x[:, 0]]
    for k in range(1, p.shape[1]):
        light.append((1 - p[:, k - 1]) * light[-1] + x[:, k])
    return (p * torch.stack(light, 1)).sum(-1)


def survived_by_products(p, x):
    keep = torch.cat([torch.ones_like(p[:, :1]), (1 - p[:, :-1]).cumprod(1)], 1).clamp(min=1e-10)
    return (p * keep * (x / keep).cumsum(1)).sum(-1)


def chances():
    p, x = rand((2, 5), (2, 5))()
    return p.detach().sigmoid().requires_grad_(), x


pair("several_ones", survived, chances, "by products that are 0", "two of one row are 1",
     slope_of=survived_by_products)  # fmt: skip


def weighted_norm(x, w, variance=lambda x: x.var(-1, unbiased=False, keepdim=True)):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / (variance(x) + 1e-5).sqrt() * w


def weighted_norm_by_squares(x, w):
    return weighted_norm(
        x, w, lambda x: x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square()
    )


pair("variance_cancels_beside_weights", weighted_norm, rand((3, 8), (8,)), "variance as mean square less squared mean",
     "float32, inputs far from 0, and weights as they are", slope_of=weighted_norm_by_squares)  # fmt: skip
