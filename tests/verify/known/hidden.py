"""Faults that the sample hides: equal sizes, special arguments, magnitudes, other integers, state."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.known import F64, rand, register


def function(value):
    """A Function whose backward is that of ``value``, through a graph of its own."""

    class Rule(Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.others = [torch.Tensor if torch.is_tensor(x) else x for x in inputs]
            ctx.save_for_backward(*[x for x in inputs if torch.is_tensor(x)])
            return value(*inputs)

        @staticmethod
        def backward(ctx, g):
            saved = iter(ctx.saved_tensors)
            return Rule.pull(g, *[next(saved) if x is torch.Tensor else x for x in ctx.others])

        @staticmethod
        def pull(g, *inputs, by=value):
            at = [i for i, x in enumerate(inputs) if torch.is_tensor(x) and x.is_floating_point()]
            copies = list(inputs)
            with torch.enable_grad():
                for i in at:  # a tensor that is given twice has a gradient in each place
                    x = inputs[i]
                    copies[i] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
                live = [copies[i] for i in at]
                grads = torch.autograd.grad(
                    by(*copies), live, g, create_graph=True, allow_unused=True
                )
            found = dict(zip(at, grads, strict=True))
            return tuple(found.get(i) for i in range(len(inputs)))

    return Rule


def pair(name, value, make, bug, trigger, *, slope_of=None, pull=None):
    """Register ``value``, and beside it one whose backward is that of ``slope_of``, or is ``pull``."""
    right, wrong = function(value), function(value)
    wrong.__name__ = wrong.__qualname__ = name.title().replace("_", "")
    if slope_of:
        pull = lambda g, *inputs: right.pull(g, *inputs, by=slope_of)  # noqa: E731
    wrong.pull = staticmethod(pull)
    register(name, "hidden", wrong.apply, right.apply, make, bug=bug, trigger=trigger)


def and_then(make, *more):
    """A sample maker with further arguments."""
    return lambda *args: (*make(*args), *more)


# ------------------------------------------------------------------------------------------------------------ sizes
def attention(q, k, v, aligned=False):
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
    seen = i + (0 if aligned else k.shape[-2] - q.shape[-2]) >= j
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(~seen, -1e9).softmax(-1) @ v


def grouped(q, k, v, tiled=False):
    if q.shape[0] % k.shape[0]:
        raise ValueError("heads")
    n = q.shape[0] // k.shape[0]
    k, v = (t.repeat(n, 1, 1) if tiled else t.repeat_interleave(n, 0) for t in (k, v))
    return (q @ k.mT).softmax(-1) @ v


def shuffled(x, backwards=False):
    n, c, length = x.shape
    if c % 2:
        raise ValueError("channels")
    y = x.view(n, c // 2, 2, length) if backwards else x.view(n, 2, c // 2, length)
    return y.transpose(1, 2).reshape(n, c, length)


def grid(x, swapped=False):
    h, w = reversed(x.shape[1:]) if swapped else x.shape[1:]
    n, m = x.shape[1:]
    return x * (torch.arange(n)[:, None] / h + torch.arange(m) / w).to(x)


def recurrent(x, w):
    h = torch.zeros_like(x[0])
    for t in x:
        h = (h @ w + t).tanh()
    return h


def last_step(g, x, w):
    before = recurrent(x[:-1], w) if len(x) > 1 else torch.zeros_like(x[0])
    d = g * (1 - recurrent(x, w) ** 2)
    return torch.cat([torch.zeros_like(x[:-1]), d[None]]), before.mT @ d


pair("causal_equal_lengths", attention, rand((2, 4, 3), (2, 4, 3), (2, 4, 3)), "causal mask aligned at the first key",
     "fewer queries than keys", slope_of=lambda q, k, v: attention(q, k, v, aligned=True))  # fmt: skip
pair("heads_tiled", grouped, rand((2, 3, 4), (2, 3, 4), (2, 3, 4)), "key heads tiled, not repeated, in backward",
     "more heads of queries than of keys", slope_of=lambda q, k, v: grouped(q, k, v, tiled=True))  # fmt: skip
pair("channels_shuffled_back", shuffled, rand((2, 4, 3)), "channels shuffled, not unshuffled", "more than 4 channels",
     slope_of=lambda x: shuffled(x, backwards=True))  # fmt: skip
pair("height_width_swapped", grid, rand((2, 4, 4)), "height and width swapped", "an image that is no square",
     slope_of=lambda x: grid(x, swapped=True))  # fmt: skip
pair("first_sample_only", lambda x, w: x @ w, rand((1, 3, 4), (4, 5)), "the weight's gradient is the first sample's",
     "a batch of more than one", pull=lambda g, x, w: (g @ w.mT, x[0].mT @ g[0]))  # fmt: skip
pair("last_step_only", recurrent, rand((1, 2, 3), (3, 3)), "the gradient stops at the last step", "more than one step",
     pull=last_step)  # fmt: skip


# -------------------------------------------------------------------------------------------------------- arguments
def squares(x, y, reduction):
    loss = (x - y) ** 2
    return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()


pair("alpha_forgotten", F.elu, and_then(rand((3, 4)), 1.0), "alpha left out", "alpha is not 1",
     slope_of=lambda x, alpha: F.elu(x))  # fmt: skip
pair("dimension_fixed", torch.softmax, and_then(rand((3, 4)), -1), "always the last dimension", "another dimension",
     slope_of=lambda x, dim: x.softmax(-1))  # fmt: skip
pair("reduction_fixed", squares, and_then(rand((3, 4), (3, 4)), "mean"), "always the mean", "reduction='sum'",
     pull=lambda g, x, y, _: (2 * (x - y) * g / x.numel(), -2 * (x - y) * g / x.numel(), None))  # fmt: skip
pair("flag_ignored", lambda a, b, t: (a.mT if t else a) @ b, and_then(rand((3, 3), (3, 3)), False), "flag ignored",
     "the flag is set", slope_of=lambda a, b, t: a @ b)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- magnitudes
def unit(x, least=1e-12):
    return x / x.norm(dim=-1, keepdim=True).clamp(min=least)


def one_by_one(g, x):
    return (g[..., None] * x.prod(-1, keepdim=True) / x).nan_to_num(0, 0, 0)


def normed(x):
    m = x.mean(-1, keepdim=True)
    return (x - m) / ((x - m).square().mean(-1, keepdim=True) + 1e-6).sqrt()


def cancelled(g, x):
    m = x.mean(-1, keepdim=True)
    r = ((x.square().mean(-1, keepdim=True) - m * m).clamp(min=0) + 1e-6).rsqrt()
    h = (x - m) * r
    return r * (g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True))


pair("small_norm_clamped", unit, rand((3, 4)), "norms clamped at 1e-4, in backward only", "one row is tiny",
     slope_of=lambda x: unit(x, 1e-4))  # fmt: skip
pair("huber_far", lambda x, y: F.huber_loss(x, y, delta=100.0), rand((3, 4), (3, 4)), "the linear part left out",
     "an error above 100", slope_of=lambda x, y: (x - y).square().mean() / 2)  # fmt: skip
pair("product_of_a_zero", lambda x: x.prod(-1), rand((3, 4)), "divides by x; 0 where x is 0", "one element is 0",
     pull=one_by_one)  # fmt: skip
pair("variance_cancels", normed, rand((3, 8)), "variance as mean square less squared mean", "float32, far from 0",
     pull=cancelled)  # fmt: skip
pair("zero_grad_divided", torch.sin, rand((3, 4)), "divides by grad_output", "a grad_output of 0",
     pull=lambda g, x: g * g * x.cos() / g)  # fmt: skip


def first_of_two(a, b):
    return torch.where(a == b, a + math.log(2), torch.logaddexp(a, b))


def at_a_byte(g, x):
    at = x.argmax(-1, keepdim=True).to(torch.uint8).long()
    return torch.zeros_like(x).scatter(-1, at, g[..., None])


pair("index_in_a_byte", lambda x: x.amax(-1), rand((3, 4)), "the place of the maximum is kept in a byte",
     "more than 256 columns", pull=at_a_byte)  # fmt: skip
pair("equal_elements_apart", torch.logaddexp, rand((3, 4), (3, 4)), "all to the first of two equal elements",
     "two equal elements", slope_of=first_of_two)  # fmt: skip
pair("scalar_weight_only", lambda x, s: x * s, rand((3, 4), (1, 1)), "right for one weight", "a weight a column",
     slope_of=lambda x, s: x * s * (1 if s.numel() == 1 else 1.5))  # fmt: skip
pair("weight_of_one", lambda x, w: x.sin() * w, and_then(rand((3, 4)), torch.ones(4, dtype=F64, requires_grad=True)),
     "the weight left out of the input's gradient", "weights that are not 1",
     pull=lambda g, x, w: (g * x.cos(), (g * x.sin()).sum(0)))  # fmt: skip

# ------------------------------------------------------------------------------------------- constants and integers
pair("constant_squared", lambda x, w: (w * x.sin()).sum(), and_then(rand((4,)), torch.ones(4, dtype=F64)),
     "the square of a weight", "weights that are not 1", slope_of=lambda x, w: (w * w * x.sin()).sum())  # fmt: skip
pair("rows_overwritten", lambda w, i: w[i], and_then(rand((7, 3)), torch.tensor([[0, 3], [5, 2]])),
     "overwrites where it should add", "an index twice",
     pull=lambda g, w, i: (torch.zeros_like(w).index_put((i,), g), None))  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ state
class Sine(Function):
    """sin, differentiable once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class SineDetached(Sine):
    @staticmethod
    def backward(ctx, g):
        return g.detach() * ctx.saved_tensors[0].detach().cos()


class Untracked(Sine):
    """sin; another where no gradient is recorded."""

    @staticmethod
    def call(x):
        return Sine.apply(x) if torch.is_grad_enabled() else x.sin() + 0.01 * x


class Product(Function):
    """a b^T."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b.mT

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        g = g.to(a.dtype)
        return g @ b, g.mT @ a


class ProductOnce(Product):
    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        g = g.to(a.dtype)
        once = a.data_ptr() == b.data_ptr()
        return g @ b, torch.zeros_like(b) if once else g.mT @ a


register("graph_lost", "hidden", SineDetached.apply, Sine.apply, rand((3, 4)), bug="backward detaches everything",
         trigger="second order, beside another term")  # fmt: skip
register("no_grad_other", "hidden", Untracked.call, Sine.apply, rand((3, 4)), bug="another function under no_grad",
         trigger="torch.no_grad")  # fmt: skip
register("given_twice", "hidden", ProductOnce.apply, Product.apply, rand((4, 3), (4, 3)), bug="one gradient is dropped",
         trigger="both inputs are one tensor")  # fmt: skip


pair("fourth_size", lambda x, w: torch.einsum("abc,dc->abd", x, w), rand((2, 3, 5), (4, 5)), "rows beyond 32 left out",
     "more than 32 rows of a fourth size",
     slope_of=lambda x, w: torch.einsum("abc,dc->abd", x, w * (torch.arange(len(w)) < 32)[:, None]))  # fmt: skip


def pooled(x, scores):
    return (scores.softmax(1)[..., None] * x).sum(1)


def pooled_squeezed(g, x, scores):
    a = scores.softmax(1)
    along = (x @ g[..., None]).squeeze()
    return a[..., None] * g[:, None], a * (along - (a * along).sum(-1, keepdim=True))


pair("one_place", pooled, rand((3, 4, 5), (3, 4)), "squeezed without saying where", "sequences of one place",
     pull=pooled_squeezed)  # fmt: skip
