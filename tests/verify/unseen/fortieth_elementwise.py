"""Running maxima, special functions, activations, bounds; rules for transforms; ranks within one process."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fortieth import add, alike, bounded, check, same, sized


# The running maximum along the rows of x (B, L)
def running_maximum(wrong):
    class Running(Function):
        @staticmethod
        def forward(ctx, x):
            values, places = x.cummax(1)
            ctx.save_for_backward(places)
            return values

        @staticmethod
        def backward(ctx, g):
            (places,) = ctx.saved_tensors
            if wrong:
                own = torch.arange(g.shape[1], device=g.device) == places
                return g * own
            return torch.zeros_like(g).scatter_add(1, places, g)

    def running(x):
        sized("x", x, None, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -1e6, 1e6)
        return Running.apply(x)

    return running


add(
    "running_maximum",
    running_maximum,
    lambda: (
        torch.tensor([[0.5, 0.1, 0.7, -1.0], [0.3, 0.2, 0.1, 0.4]]).double().requires_grad_(),
    ),
    bug="a maximum that holds for several places gets the gradient of its own place alone "
    "(pytorch/pytorch#26637)",
)


# The regularised lower incomplete gamma function of shape and x
def gamma_share(wrong):
    terms = 24 if wrong else 400

    class Share(Function):
        @staticmethod
        def forward(ctx, shape, x):
            ctx.save_for_backward(shape, x)
            return torch.special.gammainc(shape, x)

        @staticmethod
        def backward(ctx, g):
            shape, x = ctx.saved_tensors
            n = shape[:, None] + torch.arange(terms, dtype=x.dtype, device=x.device)
            log = x.log()[:, None]
            term = torch.exp(n * log - x[:, None] - torch.lgamma(n + 1))
            by_shape = (term * (log - torch.digamma(n + 1))).sum(1)
            by_x = torch.exp((shape - 1) * x.log() - x - torch.lgamma(shape))
            return g * by_shape, g * by_x

    def share(shape, x):
        sized("shape", shape, None)
        same(shape, x)
        alike(shape, x)
        bounded("shape", shape, 0.1, 50)
        bounded("x", x, 1e-2, 50)
        return Share.apply(shape, x)

    return share


add(
    "gamma_share",
    gamma_share,
    lambda: (
        torch.tensor([0.5, 2.0, 3.5]).double().requires_grad_(),
        torch.tensor([0.3, 1.0, 4.0]).double().requires_grad_(),
    ),
    bug="the series for the shape's derivative stops before its terms have become small "
    "(stan-dev/math#3408)",
    trigger="an x above 12 or so; below the difference is rounding",
)


def sharp_softplus(wrong):
    sharp = 10

    def above_zero(z):
        return torch.logaddexp(z, torch.zeros_like(z))

    class Softplus(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return above_zero(sharp * x) / sharp

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            scaled = above_zero(sharp * x)
            return g * (torch.sigmoid(scaled) if wrong else -torch.expm1(-scaled))

    def softplus(x):
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -90, 90)
        return Softplus.apply(x)

    return softplus


add(
    "sharp_softplus",
    sharp_softplus,
    lambda: (real(4),),
    bug="the slope takes the output for the input (NVlabs/tiny-cuda-nn#130)",
)


# x within bounds; where these cross the lower one holds
def crossed_bounds(wrong):
    class Bounds(Function):
        @staticmethod
        def forward(ctx, x, lower, upper):
            ctx.save_for_backward(x, lower, upper)
            inner = torch.where(x > upper, upper, x)
            return torch.where(inner < lower, lower, inner)

        @staticmethod
        def backward(ctx, g):
            x, lower, upper = ctx.saved_tensors
            above = x > upper
            below = torch.where(above, upper, x) < lower
            grad_upper = g * above if wrong else g * (above & ~below)
            return g * (~above & ~below), g * below, grad_upper

    def clamp(x, lower, upper):
        same(x, lower, upper)
        alike(x, lower, upper)
        for name, t in (("x", x), ("lower", lower), ("upper", upper)):
            bounded(name, t, -1e6, 1e6)
        return Bounds.apply(x, lower, upper)

    return clamp


add(
    "crossed_bounds",
    crossed_bounds,
    lambda: (
        real(4),
        torch.tensor([-1.0, -0.5, -0.2, 0.1]).double().requires_grad_(),
        torch.tensor([1.0, 0.5, 0.2, 0.3]).double().requires_grad_(),
    ),
    bug="the upper bound gets a gradient though it lies below the lower one, which holds "
    "(tensor4all/tenferro-rs#1212)",
    trigger="bounds that cross, with an x above the upper one",
)


# The length of x (D); 0 is its own slope's centre
def mapped_length(wrong):
    def plain(x):
        return x.square().sum(-1).sqrt()

    class Length(Function):
        @staticmethod
        def forward(x):
            return plain(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            square = x.square().sum(-1, keepdim=True)
            return g[..., None] * x / torch.where(square > 0, square, 1).sqrt()

        @staticmethod
        def vmap(info, in_dims, x):
            x = x.movedim(in_dims[0], 0)
            return plain(x) if wrong else Length.apply(x), 0

    def length(x):
        sized("x", x, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        return Length.apply(x)

    return length


add(
    "mapped_length",
    mapped_length,
    lambda: (real(3),),
    bug="the function's rule is lost where it is mapped: NaN for the length 0 (jax-ml/jax#4047)",
    trigger="the gradient of torch.vmap of the function, and a row of zeros",
    missed="a row of zeros under vmap alone",
)


def product_tangent(wrong):
    class Product(Function):
        @staticmethod
        def forward(a, b):
            return a @ b

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            return g @ b.mT, a.mT @ g

        @staticmethod
        def jvp(ctx, da, db):
            a, b = ctx.saved_tensors
            y = torch.zeros_like(a @ b)
            if wrong:
                return y
            if da is not None:
                y = y + da @ b
            return y if db is None else y + a @ db

    def product(a, b):
        sized("a", a, None, None)
        sized("b", b, a.shape[1], None)
        alike(a, b)
        return Product.apply(a, b)

    return product


add(
    "product_tangent",
    product_tangent,
    lambda: (real(2, 3), real(3, 2, seed=1)),
    bug="the result is handed on before its tangent is stored: the tangent is 0 "
    "(raven-ml/raven#153)",
    trigger="forward mode",
)


def dropout_again(wrong):
    def draw(x, counter):
        """Return the generator's numbers from 0 to 1 behind the counter."""
        t = torch.arange(x.numel(), dtype=torch.float64, device=x.device) + counter + 1
        return torch.frac(torch.sin(12.9898 * t) * 43758.5453).abs().view(x.shape)

    class Dropout(Function):
        @staticmethod
        def forward(ctx, x, rate, counter):
            ctx.rate = rate
            ctx.counter = counter + x.numel() if wrong else counter
            return x * (draw(x, counter) >= rate) / (1 - rate)

        @staticmethod
        def backward(ctx, g):
            return g * (draw(g, ctx.counter) >= ctx.rate) / (1 - ctx.rate), None, None

    def dropout(x, rate=0.5, counter=0):
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(0 <= rate < 1, "rate: expected a number from 0 to below 1")
        check(isinstance(counter, int) and counter >= 0, "counter: expected an integer >= 0")
        bounded("x", x, -1e6, 1e6)
        return Dropout.apply(x, rate, counter)

    return dropout


add(
    "dropout_again",
    dropout_again,
    lambda: (real(3, 4),),
    bug="what is computed again in backward draws the random numbers behind forward's "
    "(allenai/OLMo-core#828)",
)


# What each rank holds (R, N) is averaged, and each rank has the average
def ranks_average(wrong):
    class Average(Function):
        @staticmethod
        def forward(ctx, x):
            return x.mean(0, keepdim=True).expand_as(x).clone()

        @staticmethod
        def backward(ctx, g):
            total = g.sum(0, keepdim=True).expand_as(g)
            return total.clone() if wrong else total / len(g)

    def average(x):
        sized("x", x, None, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -1e6, 1e6)
        return Average.apply(x)

    return average


add(
    "ranks_average",
    ranks_average,
    lambda: (real(3, 2),),
    bug="the ranks' gradients are summed up where they should be averaged (horovod/horovod#2654)",
)
