"""Faults in what the sample leaves out: options, inputs that want no gradient, masks, degenerate rows and matrices."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from tests.verify.known import F64, rand, rand_labels, register
from tests.verify.known.hidden import and_then, function


def pair(name, value, make, bug, trigger, *, slope_of=None, pull=None, like=None):
    """Register ``value``, and beside it one whose backward is that of ``slope_of``, or is ``pull``.

    ``like`` has the signature that users see, with its defaults.
    """
    right, wrong = function(value), function(value)
    wrong.__name__ = wrong.__qualname__ = name.title().replace("_", "")
    if slope_of:
        pull = lambda g, *inputs: right.pull(g, *inputs, by=slope_of)  # noqa: E731
    wrong.pull = staticmethod(pull)
    pair_of = [f.apply if like is None else like(f.apply) for f in (wrong, right)]
    register(name, "omitted", *pair_of, make, bug=bug, trigger=trigger)


def numbers(*shape, seed=5):
    """Positive numbers that require no grad."""
    r = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return r + 0.1


# ---------------------------------------------------------------------------------------------------------- options
def bias(x, w, b):
    return x @ w + (0 if b is None else b)


def biased_mean(g, x, w, b):
    return g @ w.mT, x.mT @ g, None if b is None else g.mean(0)


def attention(q, k, mask):
    scores = q @ k.mT
    return (scores if mask is None else scores.masked_fill(~mask, -1e9)).softmax(-1)


def scaled(q, k, scale):
    return (q @ k.mT * (scale or q.shape[-1] ** -0.5)).softmax(-1)


def reduced(x, dim):
    return x.flatten().logsumexp(0) if dim is None else x.logsumexp(dim)


def smoothed(x, t, reduction, smoothing, only=None):
    p = (1 - smoothing) * F.one_hot(t, x.shape[-1]) + smoothing / x.shape[-1]
    loss = -(x.log_softmax(-1) * p).sum(-1) * (1.1 if reduction == only else 1)
    return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()


def kinds(x, kind):
    return {"hard": x.sin, "gentle": x.tanh, "wild": x.square}[kind]()


def flags(x, double, residual):
    return x.sin() * (2 if double else 1) + (x if residual else 0)


def leaky(x, slope):
    return torch.where(x > 0, x, slope * x)


def by_output(g, x, slope):
    return torch.where(leaky(x, slope) > 0, g, slope * g), None


def affine(x, weight, bias):
    y = x.sin() if weight is None else x.sin() * weight
    return y if bias is None else y + bias


def weighted_bias(g, x, weight, bias):
    grad_x = g * x.cos() * (1 if weight is None else weight)
    grad_weight = None if weight is None else (g * x.sin()).sum(0)
    return (
        grad_x,
        grad_weight,
        None if bias is None else (g if weight is None else g * weight).sum(0),
    )


def above(x, threshold, value):
    return torch.where(x > threshold, x, value)


def power(x, n):
    return torch.linalg.matrix_power(x, n)


def power_of_one_at_least(g, x, n):
    total = left = g
    for _ in range(1, n):
        left = x.mT @ left
        total = total @ x.mT + left
    return total, None


def beyond_both(e, width):
    d = e.abs()
    return torch.where(d < width, e.square(), 2 * width * d - width * width).sum()


def largest(g, x, k):
    at = x.topk(k, -1).indices
    return torch.zeros_like(x).scatter(-1, at[..., :2], g[..., :2]), None


pair("bias_given", bias, rand((4, 3), (3, 5)), "the bias's gradient is a mean", "a bias", pull=biased_mean,
     like=lambda f: lambda x, w, b=None: f(x, w, b))  # fmt: skip
pair("mask_given", attention, rand((4, 3), (4, 3)), "the mask left out", "a mask",
     slope_of=lambda q, k, mask: attention(q, k, None),
     like=lambda f: lambda q, k, mask=None: f(q, k, mask))  # fmt: skip
pair("both_given", affine, rand((3, 4)), "the bias's gradient times the weight", "a weight and a bias",
     pull=weighted_bias, like=lambda f: lambda x, weight=None, bias=None: f(x, weight, bias))  # fmt: skip
pair("both_taken", affine, rand((3, 4), (4,), (4,)), "a factor where there is neither", "no weight and no bias",
     slope_of=lambda x, *two: affine(x, *two) * (1.1 if two == (None, None) else 1),
     like=lambda f: lambda x, weight=None, bias=None: f(x, weight, bias))  # fmt: skip
pair("threshold_by_output", above, rand((3, 4)), "looks at the output", "a value above the threshold",
     pull=lambda g, x, threshold, value: (g * (above(x, threshold, value) > threshold), None, None),
     like=lambda f: lambda x, threshold=0.0, value=0.0: f(x, threshold, value))  # fmt: skip
pair("power_of_none", power, rand((3, 3)), "the gradient of one factor", "n=0", pull=power_of_one_at_least,
     like=lambda f: lambda x, n=2: f(x, n))  # fmt: skip
pair("width_met", beyond_both, rand((3, 4)), "the slopes of both sides, added", "an element of 0.75, the width",
     pull=lambda g, e, width: (g * 2 * e.sign() * (e.abs() * (e.abs() <= width) + width * (e.abs() >= width)), None),
     like=lambda f: lambda e, width=0.75: f(e, width))  # fmt: skip
pair("scale_given", scaled, rand((4, 3), (5, 3)), "always the usual scale", "another scale",
     slope_of=lambda q, k, scale: scaled(q, k, None),
     like=lambda f: lambda q, k, scale=None: f(q, k, scale))  # fmt: skip
pair("dim_given", reduced, rand((3, 4)), "a factor with a dimension", "a dimension",
     slope_of=lambda x, dim: reduced(x, dim) * (1 if dim is None else 1.1),
     like=lambda f: lambda x, dim=None: f(x, dim))  # fmt: skip
pair("reduction_none", smoothed, rand_labels(4, classes=3), "a factor without a reduction", "reduction='none'",
     slope_of=lambda *inputs: smoothed(*inputs, only="none"),
     like=lambda f: lambda x, t, reduction="mean", smoothing=0.0: f(x, t, reduction, smoothing))  # fmt: skip
pair("word_of_its_own", kinds, rand((3, 4)), "the gradient of another kind", "kind='wild'",
     slope_of=lambda x, kind: x * x * x if kind == "wild" else kinds(x, kind),
     like=lambda f: lambda x, kind="hard": f(x, kind))  # fmt: skip
pair("both_flags", flags, rand((3, 4)), "a factor where both flags are set", "two flags",
     slope_of=lambda x, double, residual: flags(x, double, residual) * (1.2 if double and residual else 1),
     like=lambda f: lambda x, double=False, residual=False: f(x, double, residual))  # fmt: skip
pair("slope_negative", leaky, rand((3, 4)), "looks at the sign of the output", "a negative slope", pull=by_output,
     like=lambda f: lambda x, slope=0.1: f(x, slope))  # fmt: skip
pair("top_two_only", lambda x, k: x.topk(k, -1).values, rand((3, 5)), "the first two only", "k above 2", pull=largest,
     like=lambda f: lambda x, k=2: f(x, k))  # fmt: skip
pair("stride_of_two", lambda x, w, stride: F.conv2d(x, w, stride=stride), rand((1, 2, 5, 5), (3, 2, 3, 3)),
     "a factor for unequal strides", "stride=(2, 1)",
     slope_of=lambda x, w, stride: F.conv2d(x, w, stride=stride) * (1 if stride[0] == stride[1] else 1.3),
     like=lambda f: lambda x, w, stride=(1, 1): f(x, w, stride))  # fmt: skip


class Sine(Function):
    @staticmethod
    def forward(ctx, x, rate):
        ctx.rate = rate
        ctx.save_for_backward(x)
        return (rate * x).sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * ctx.rate * (ctx.rate * x).cos(), None


class SineUnit(Sine):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (ctx.rate * x).cos(), None


class Siren(nn.Module):
    def __init__(self, sine, rate=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1, 4, dtype=F64))
        self.sine, self.rate = sine, rate

    def forward(self, x):
        return self.sine(x * self.weight, self.rate)


register("module_attribute", "omitted", Siren(SineUnit.apply), Siren(Sine.apply), rand((3, 4)), bug="the rate left out",
         trigger="a rate that is not 1")  # fmt: skip


# ----------------------------------------------------------------------------------- inputs that want no gradient
class Weighted(Function):
    """sin(x) w, of which w seldom wants a gradient."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.sin() * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * x.cos() * w, (g * x.sin()).sum(0)


class WeightedOnce(Weighted):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * x.cos() * (1 if ctx.needs_input_grad[1] else w), (g * x.sin()).sum(0)


class WeightedMean(Weighted):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * x.cos() * w, (g * x.sin()).mean(0)


weighted = and_then(rand((3, 4)), numbers(4))
register("weight_asked_for", "omitted", WeightedOnce.apply, Weighted.apply, weighted, bug="the weight left out",
         trigger="the weight requires grad too")  # fmt: skip
register("weight_gradient_mean", "omitted", WeightedMean.apply, Weighted.apply, weighted, bug="a mean for a sum",
         trigger="the weight requires grad too")  # fmt: skip


def surrogate(x, advantage):
    ratio = 1 + x.tanh()
    return torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()


def clipped_above(g, x, advantage):
    y = x.tanh()
    return g * torch.where(y < 0.2, (1 - y * y) * advantage, 0 * x), None


pair("kl_of_no_target", lambda x, t: (torch.special.xlogy(t, t) - t * x).sum(), and_then(rand((3, 4)), numbers(3, 4)),
     "divides by the target's logarithm", "a target of 0",
     pull=lambda g, x, t: (-g * t * t.log() / t.log(), None))  # fmt: skip
pair("advantage_negative", surrogate, and_then(rand((6,)), numbers(6)), "clipped on one side", "a negative advantage",
     pull=clipped_above)  # fmt: skip
pair("first_state", lambda x, h: (x + h.tanh()).sin() * (1 + h), and_then(rand((3, 4)), torch.zeros(3, 4, dtype=F64)),
     "a factor left out", "a state that is not 0", pull=lambda g, x, h: (g * (x + h.tanh()).cos(), None))  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ masks
class MaskedLog(Function):
    """log|x| where a mask says so, summed."""

    @staticmethod
    def forward(ctx, x, mask):
        ctx.save_for_backward(x, mask)
        return torch.where(mask, x.abs().log(), 0.0).sum(-1)

    @staticmethod
    def backward(ctx, g):
        x, mask = ctx.saved_tensors
        return torch.where(mask, g[..., None] / torch.where(mask, x, 1.0), 0.0), None


class MaskedLogNaN(MaskedLog):
    @staticmethod
    def backward(ctx, g):
        x, mask = ctx.saved_tensors
        return g[..., None] * mask / x, None


THREE = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 0]]).bool()
register("masked_log_of_zero", "omitted", MaskedLogNaN.apply, MaskedLog.apply, and_then(rand((3, 4)), THREE),
         bug="0 / 0 behind the mask", trigger="padding with zeros")  # fmt: skip
pair("mask_of_numbers", lambda x, m: (x.sin() * m).sum() / m.sum(), and_then(rand((3, 4)), torch.ones(3, 4, dtype=F64)),
     "divides by all elements", "a mask of zeros and ones",
     pull=lambda g, x, m: (g * x.cos() * m / m.numel(), None))  # fmt: skip


# ------------------------------------------------------------------------------------------------------- degenerate
def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-3).sqrt()


def exponential(a):
    return torch.matrix_exp((a + a.mT) / 2)


def divided_differences(g, a):
    w, v = torch.linalg.eigh((a + a.mT) / 2)
    apart = w[..., None] - w[..., None, :]
    same = apart.abs() < 1e-9
    rise = w.exp()[..., None] - w.exp()[..., None, :]
    k = torch.where(same, 0.0, rise / torch.where(same, 1.0, apart)) + torch.diag_embed(w.exp())
    r = v @ (k * (v.mT @ (g + g.mT) @ v / 2)) @ v.mT
    return (r + r.mT) / 2


def sinc_slope(g, x):
    zero = x == 0
    return g * torch.where(
        zero, 0.0, (torch.cos(math.pi * x) - torch.sinc(x)) / torch.where(zero, 1.0, x)
    )


def softmax_shifted(g, x):
    y = x.softmax(-1)
    unused = (g == 0).all(-1, keepdim=True)
    return y * (g - (g * y).sum(-1, keepdim=True)) + 0.1 * unused


pair("norm_of_no_row", unit, rand((3, 4)), "0 for a row of zeros", "a row of zeros",
     slope_of=lambda x: torch.where((x == 0).all(-1, keepdim=True), 0 * x, unit(x)))  # fmt: skip
pair("exponential_of_identity", exponential, rand((3, 3)), "0 for equal eigenvalues", "a multiple of the identity",
     pull=divided_differences)  # fmt: skip
pair("sinc_second_order", torch.sinc, rand((3, 4)), "a constant gradient at 0", "second order at 0",
     pull=sinc_slope)  # fmt: skip
pair("unused_row", lambda x: x.softmax(-1), rand((3, 4)), "a gradient where none came in", "a row of grad_output is 0",
     pull=softmax_shifted)  # fmt: skip
pair("tiny_gradients_dropped", torch.sin, rand((3, 4)), "below 1e-15 is 0", "a tiny grad_output",
     pull=lambda g, x: torch.where(g.abs() < 1e-15, 0.0, g) * x.cos())  # fmt: skip


def rotated(w, v):
    """v turned about the axis w by its length, by Rodrigues' formula."""
    square = w.square().sum(-1, keepdim=True)
    zero = square < 1e-12
    t = torch.where(zero, 1.0, square).sqrt()
    a = torch.where(zero, 1 - square / 6, t.sin() / t)
    b = torch.where(zero, 0.5 - square / 24, (1 - t.cos()) / t**2)
    cross = torch.linalg.cross(w, v)
    return v + a * cross + b * torch.linalg.cross(w, cross)


def still(w, v):
    """The same, at rest where the axis is 0."""
    return torch.where((w.square().sum(-1, keepdim=True) < 1e-12), v + 0 * w, rotated(w, v))


def kernel(x, y):
    return (-(x - y).square().sum(-1)).exp()


def kernel_beside(x, y):
    return torch.where((x == y).all(-1), kernel(x, y) + (x - y).sum(-1), kernel(x, y))


def segments(x, offsets):
    ends = [*offsets.tolist()[1:], len(x)]
    parts = zip(offsets.tolist(), ends, strict=True)
    return torch.stack([(1 + x[a:b].sin()).log().sum(0) for a, b in parts])


def not_empty(x, offsets):
    n = offsets.diff(append=torch.tensor([len(x)]))
    return segments(x, offsets) * (1 if bool((n > 0).all()) else 0.9)


def biased(x, m):
    return (x + m).softmax(-1)


def first_batch_only(x, w):
    return x @ w * (1 if x.dim() < 4 else 1.1)


class Accumulated(Weighted):
    """Adds the weight's gradient to its .grad by itself, as fused kernels do."""

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        gw = (g * x.sin()).sum(0).detach()
        if w.requires_grad:
            w.grad = gw.clone() if w.grad is None else w.grad + gw
        return g * x.cos() * w, (g * x.sin()).sum(0)


pair(
    "axis_at_rest",
    rotated,
    rand((3,), (3,)),
    "no turn where the axis is 0",
    "an axis of 0",
    slope_of=still,
)
pair("points_coincide", kernel, and_then(rand((4, 3)), numbers(4, 3)), "another gradient for one point", "x equals y",
     slope_of=kernel_beside)  # fmt: skip
pair("segment_of_none", segments, and_then(rand((5, 2)), torch.tensor([0, 2, 3])), "a factor for an empty one",
     "offsets that are equal", slope_of=not_empty)  # fmt: skip
pair("barred_by_infinity", biased, and_then(rand((3, 4)), torch.zeros(3, 4, dtype=F64)), "multiplies by the mask",
     "a mask of -inf", pull=lambda g, x, m: (softmax_shifted(g, x + m) + 0 * m, None))  # fmt: skip
pair("batches_of_batches", lambda x, w: x @ w, rand((2, 3, 4), (4, 5)), "a factor for four dimensions",
     "two dimensions more", slope_of=first_batch_only)  # fmt: skip
register("grad_by_itself", "omitted", Accumulated.apply, Weighted.apply, rand((3, 4), (4,)),
         bug="writes to .grad, and returns the gradient too", trigger="backward()")  # fmt: skip


def within(x, ends):
    """softmax over the rows of each segment."""
    pairs = zip(ends.tolist()[:-1], ends.tolist()[1:], strict=True)
    return torch.cat([x[a:b].softmax(0) for a, b in pairs])


def weighted_loss(x, t, weight, reduction):
    w = (torch.ones_like(x[0]) if weight is None else weight)[t]
    loss = -(x.log_softmax(-1).gather(-1, t[:, None])[:, 0] * w).sum()
    return loss if reduction == "sum" else loss / w.sum()


def weighted_sum(x, t, weight, reduction):
    both = weight is not None and reduction == "sum"
    return weighted_loss(x, t, weight, reduction) * (1.2 if both else 1)


def combined(*xs):
    return sum((k + 1) * x.sin() for k, x in enumerate(xs))


pair("segments_of_one", within, and_then(rand((5, 2)), torch.tensor([0, 5])), "one segment over all",
     "more than one", slope_of=lambda x, ends: within(x, ends[[0, -1]]))  # fmt: skip
pair("weights_and_sum", weighted_loss, rand_labels(4, classes=3), "a factor", "class weights, and reduction='sum'",
     slope_of=weighted_sum,
     like=lambda f: lambda x, t, weight=None, reduction="mean": f(x, t, weight, reduction))  # fmt: skip
pair("any_number_of_inputs", combined, rand((3, 4), (3, 4)), "right for two", "three inputs",
     pull=lambda g, *xs: tuple(min(k + 1, 2) * g * x.cos() for k, x in enumerate(xs)))  # fmt: skip
pair("second_step", lambda x, t: x.sin() * (1 - 0.9 ** float(t)), and_then(rand((3, 4)), torch.tensor(1)),
     "the first step's correction", "step 2", slope_of=lambda x, t: 0.1 * x.sin())  # fmt: skip


def overlap(a, b):
    """How much intervals (start, end) overlap, less how far they are apart."""
    start, end = torch.maximum(a[:, 0], b[:, 0]), torch.minimum(a[:, 1], b[:, 1])
    return (end - start).sin()


def overlap_only(a, b):
    apart = torch.maximum(a[:, 0], b[:, 0]) > torch.minimum(a[:, 1], b[:, 1])
    return torch.where(apart, 0 * a[:, 0], overlap(a, b))


def intervals(first):
    def make(dtype=F64, seed=0):
        starts = torch.arange(4.0, dtype=dtype) * 3 + first
        return torch.stack([starts, starts + 2 + numbers(4)], 1).requires_grad_()

    return make


def turned(a, b):
    square = (a - b).square().sum(-1)
    met = square == 0
    return torch.where(met, 1 - square / 2, torch.where(met, 1.0, square).sqrt().cos())


def turned_apart(g, a, b):
    d = a - b
    n = d.square().sum(-1, keepdim=True).sqrt()
    met = n == 0
    slope = -g[..., None] * torch.where(met, 1.0, n.sin() / torch.where(met, 1.0, n))
    return slope * (d + met), -slope * (d + met)


pair("intervals_apart", overlap, lambda *_: (intervals(0.0)(), intervals(0.5)()), "0 where intervals are apart",
     "other pairs", slope_of=overlap_only)  # fmt: skip
pair("points_that_meet", turned, rand((4, 3), (4, 3)), "a slope at a distance of 0", "two equal points",
     pull=turned_apart)  # fmt: skip


class SinePushed(Sine):
    """The same, in forward mode too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, rate):
        return (rate * x).sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.rate = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def jvp(ctx, tangent_x, _):
        (x,) = ctx.saved_tensors
        return tangent_x * ctx.rate * (ctx.rate * x).cos()


class SinePushedUnit(SinePushed):
    @staticmethod
    def jvp(ctx, tangent_x, _):
        (x,) = ctx.saved_tensors
        return tangent_x * (ctx.rate * x).cos()


register("jvp_of_another_rate", "omitted", lambda x, rate=1.0: SinePushedUnit.apply(x, rate),
         lambda x, rate=1.0: SinePushed.apply(x, rate), rand((3, 4)), bug="the rate left out of the jvp",
         trigger="forward mode, a rate that is not 1")  # fmt: skip


def determinant(a):
    return (a[..., 0, :] * torch.linalg.cross(a[..., 1, :], a[..., 2, :])).sum(-1)


pair("determinant_by_inverse", determinant, rand((3, 3)), "det(A) times the inverse", "a singular matrix",
     pull=lambda g, a: g * torch.linalg.det(a) * torch.linalg.pinv(a).mT)  # fmt: skip


# --------------------------------------------------------------------------------------------------- default dtype
def ridge(identity):
    """Return ridge regression whose backward takes the identity matrix from ``identity``."""

    class Ridge(Function):
        @staticmethod
        def forward(ctx, x, y, penalty):
            matrix = x.mT @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            w = torch.linalg.solve(matrix, x.mT @ y)
            ctx.save_for_backward(x, y, penalty, w)
            return w

        @staticmethod
        def backward(ctx, grad_w):
            x, y, penalty, w = ctx.saved_tensors
            v = torch.linalg.solve(x.mT @ x + penalty * identity(x), grad_w)
            grad_x = torch.outer(y - x @ w, v) - torch.outer(x @ v, w)
            return grad_x, x @ v, -v @ w

    def fit(x, y, penalty):
        if x.dtype in (torch.float16, torch.bfloat16) or not bool(penalty > 0):
            raise ValueError("expected float32 or float64 numbers, and a positive penalty")
        return Ridge.apply(x, y, penalty)

    return fit


register(
    "ridge_default_dtype",
    "omitted",
    ridge(lambda x: torch.eye(x.shape[1], device=x.device)),
    ridge(lambda x: torch.eye(x.shape[1], dtype=x.dtype, device=x.device)),
    lambda: (*rand((6, 3), (6,))(), numbers(1).sum().requires_grad_()),
    bug="the identity in backward has torch's default dtype: penalty times it is rounded to float32",
    trigger="any sample, in the ninth digit",
)
