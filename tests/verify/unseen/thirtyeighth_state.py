"""State: what a Function keeps, shares and writes to."""

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirtyeighth import add, add_bare, alike, bounded, check, same, sized


# Layers h = tanh(w h + b) one after another, elementwise, with rows w and b (K, D)
def tanh_cascade(wrong):
    class Cascade(Function):
        @staticmethod
        def forward(ctx, x, w, b):
            states = [x]
            for row, shift in zip(w, b, strict=True):
                states.append((row * states[-1] + shift).tanh())
            ctx.save_for_backward(w)
            steps = zip(reversed(range(len(w))), reversed(states), states[-2::-1], strict=False)
            ctx.steps = steps if wrong else list(steps)
            return states[-1].clone()

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            (w,) = ctx.saved_tensors
            grad_w, grad_b = torch.zeros_like(w), torch.zeros_like(w)
            for k, after, before in ctx.steps:
                g = g * (1 - after.square())
                grad_w[k], grad_b[k] = (g * before).sum(0), g.sum(0)
                g = g * w[k]
            return g, grad_w, grad_b

    def cascade(x, w, b):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        same(w, b)
        alike(x, w, b)
        for name, t in {"x": x, "w": w, "b": b}.items():
            bounded(name, t, -1e3, 1e3)
        return Cascade.apply(x.clone(), w, b)

    return cascade


add(
    "tanh_cascade_walked",
    tanh_cascade,
    lambda: (real(3, 4), real(3, 4, seed=1), real(3, 4, seed=2)),
    bug="Forward leaves an iterator on ctx, of which the first backward leaves nothing",
    trigger="a second backward through the same graph",
)


# Correlations of rows with a bank of filters (K, D) of length one
def unit_bank(wrong):
    known = {}

    def lengths(w):
        if not wrong:
            return w.square().sum(-1, keepdim=True).sqrt()
        key = w.data_ptr(), w.shape, w.dtype
        if key not in known:
            known.clear()
            known[key] = w.detach().square().sum(-1, keepdim=True).sqrt(), w
        return known[key][0]

    class Bank(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ (w / lengths(w)).mT

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            r = lengths(w)
            u = w / r
            h = g.mT @ x
            return g @ u, (h - u * (h * u).sum(-1, keepdim=True)) / r

    def correlate(x, w):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        alike(x, w)
        bounded("x", x, -1e3, 1e3)
        bounded("w", w, -1e3, 1e3)
        bounded("w", w.abs().amax(-1), 1e-2, 1e3)
        return Bank.apply(x, w)

    return correlate


add(
    "unit_bank_address",
    unit_bank,
    lambda: (real(3, 4), real(2, 4, seed=1)),
    bug="The filters' lengths are cached by the address of the filters, which an optimiser changes in place",
    trigger="filters changed in place between two calls",
)


# Fair's loss c^2 (|d| / c - log(1 + |d| / c)), summed, whose gradient forward computes
def fair_loss(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, x, y, c):
            d = x - y
            a = d.abs() / c
            ctx.grad = d / (1 + a)
            return c * c * (a - torch.log1p(a)).sum()

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            grad = ctx.grad.mul_(g) if wrong else ctx.grad * g
            return grad, None, None

    def loss(x, y, c=1.4):
        check(x.numel() > 0, "x: expected numbers")
        same(x, y)
        alike(x, y)
        check(not y.requires_grad, "y: expected targets without gradient")
        check(1e-2 <= c <= 100, "c: expected a number from 0.01 to 100")
        bounded("x", x, -1e3, 1e3)
        bounded("y", y, -1e3, 1e3)
        return Loss.apply(x, y, c)

    return loss


add(
    "fair_loss_own_buffer",
    fair_loss,
    lambda: (real(3, 4), real(3, 4, seed=1, grad=False)),
    bug="Backward scales the buffer on ctx in place and returns the buffer itself",
    trigger="a second backward through the graph, or a gradient that its owner scales in place",
)


# Features (B, T) with a random stretch of time set to 0, drawn from a seed
def time_masked(wrong):
    def stretches(shape, longest, seed, device, swapped=False):
        generator = torch.Generator().manual_seed(seed)
        first = torch.rand(shape[0], generator=generator)
        second = torch.rand(shape[0], generator=generator)
        begin, width = (second, first) if swapped else (first, second)
        start = (begin * shape[1]).long().to(device)[:, None]
        stop = start + 1 + (width * longest).long().to(device)[:, None]
        t = torch.arange(shape[1], device=device)
        return (t < start) | (t >= stop)

    class Mask(Function):
        @staticmethod
        def forward(ctx, x, longest, seed):
            ctx.settings = x.shape, longest, seed, x.device
            return x * stretches(*ctx.settings)

        @staticmethod
        def backward(ctx, g):
            return g * stretches(*ctx.settings, swapped=wrong), None, None

    def mask(x, longest=3, seed=0):
        sized("x", x, None, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(isinstance(longest, int) and longest >= 1, "longest: expected a positive integer")
        bounded("x", x, -1e6, 1e6)
        return Mask.apply(x, longest, seed)

    return mask


add(
    "time_masked_order",
    time_masked,
    lambda: (real(4, 8),),
    bug="Backward draws the mask again from the seed, the width before the start where forward draws it after",
)


# Softmax within runs of given lengths, of numbers that lie one run after another
def jagged_softmax(wrong):
    class Softmax(Function):
        @staticmethod
        def forward(ctx, x, lengths):
            ends = lengths.cumsum_(0) if wrong else lengths.cumsum(0)
            run = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)
            parts = len(lengths)
            top = torch.full((parts,), -torch.inf, dtype=x.dtype, device=x.device)
            e = (x - top.scatter_reduce(0, run, x, "amax")[run]).exp()
            y = e / torch.zeros_like(top).index_add(0, run, e)[run]
            ctx.save_for_backward(y, run)
            ctx.parts = parts
            return y

        @staticmethod
        def backward(ctx, g):
            y, run = ctx.saved_tensors
            along = torch.zeros(ctx.parts, dtype=y.dtype, device=y.device)
            return y * (g - along.index_add(0, run, g * y)[run]), None

    def softmax(x, lengths):
        sized("x", x, None)
        sized("lengths", lengths, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(lengths.dtype == torch.int64, "lengths: expected int64")
        check(bool((lengths >= 0).all()), "lengths: expected none below 0")
        check(int(lengths.sum()) == len(x), "lengths: expected the number of elements as their sum")
        bounded("x", x, -1e3, 1e3)
        return Softmax.apply(x, lengths)

    return softmax


add(
    "jagged_softmax_lengths",
    jagged_softmax,
    lambda: (real(7), torch.tensor([2, 4, 1])),
    bug="Forward turns the caller's lengths into ends in place",
    trigger="a look at the lengths, or a second call with them",
)


class Sine(Function):
    @staticmethod
    def forward(ctx, x, scale, frequency, owner):
        ctx.save_for_backward(x, scale, frequency)
        ctx.owner = owner
        return scale * (x * frequency).sin()

    @staticmethod
    def backward(ctx, g):
        x, scale, frequency = ctx.saved_tensors
        factor = scale if ctx.owner is None else ctx.owner.scale.data
        z = x * frequency
        grad_scale = (g * z.sin()).flatten(0, -2).sum(0)
        return g * factor * frequency * z.cos(), grad_scale, None, None


class SineTable(nn.Module):
    """Sines of x (..., D) with a frequency, a buffer, and a learned scale per column."""

    def __init__(self, width, wrong):
        super().__init__()
        self.scale = nn.Parameter(real(width, seed=5, grad=False))
        self.register_buffer("frequency", torch.linspace(0.5, 2, width, dtype=torch.float64))
        self.wrong = wrong

    def forward(self, x):
        check(x.dtype == self.scale.dtype, "x: expected the parameters' dtype")
        check(
            x.ndim >= 2 and x.shape[-1] == len(self.scale), "x: expected rows of the table's width"
        )
        bounded("x", x, -1e3, 1e3)
        return Sine.apply(x, self.scale, self.frequency, self if self.wrong else None)


add_bare(
    "sine_table_parameter",
    lambda wrong: SineTable(4, wrong),
    lambda: (real(3, 4),),
    bug="Backward reads the scale off the module's .data, which autograd doesn't see",
    trigger="a second derivative by the scale",
)


# Sums of a_k sin(k x) over harmonics k = 1, 2, ..., whose sines forward keeps
def harmonic_series(wrong):
    scratch = {}

    def room(n, x):
        if not wrong:
            return torch.empty(n, *x.shape, dtype=x.dtype, device=x.device)
        key = n, x.shape, x.dtype, x.device
        if key not in scratch:
            scratch[key] = torch.empty(n, *x.shape, dtype=x.dtype, device=x.device)
        return scratch[key]

    class Series(Function):
        @staticmethod
        def forward(ctx, x, a):
            ctx.angles = room(len(a), x)
            for k in range(len(a)):
                torch.mul(x, k + 1, out=ctx.angles[k])
            ctx.save_for_backward(a)
            return torch.tensordot(a, ctx.angles.sin(), 1)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            (a,) = ctx.saved_tensors
            k = torch.arange(1, len(a) + 1, device=g.device).to(a.dtype)
            along = torch.tensordot(a * k, ctx.angles.cos(), 1)
            return g * along, (g * ctx.angles.sin()).flatten(1).sum(1)

    def series(x, a):
        check(x.numel() > 0, "x: expected numbers")
        sized("a", a, None)
        alike(x, a)
        bounded("x", x, -100, 100)
        bounded("a", a, -1e3, 1e3)
        return Series.apply(x, a)

    return series


add(
    "harmonic_series_scratch",
    harmonic_series,
    lambda: (real(3, 4), real(3, seed=1)),
    bug="Calls with one shape share the memory of the angles that backward needs",
    trigger="another call between forward and backward",
)


# x where it lies between two bounds, 0 elsewhere
def band_gate(wrong):
    class Gate(Function):
        @staticmethod
        def forward(ctx, x, low, high):
            inside = (x > low) & (x < high)
            ctx.save_for_backward(inside)
            return torch.where(inside, x, torch.zeros_like(x))

        @staticmethod
        def backward(ctx, g):
            (inside,) = ctx.saved_tensors
            if wrong and not torch.is_grad_enabled():
                g[~inside] = 0
                return g, None, None
            return torch.where(inside, g, torch.zeros_like(g)), None, None

    def gate(x, low=-0.7, high=0.9):
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(low < high, "low: expected less than high")
        bounded("x", x, -1e6, 1e6)
        return Gate.apply(x, low, high)

    return gate


add(
    "band_gate_written",
    band_gate,
    lambda: (real(4, 5),),
    bug="Backward sets elements of grad_output to 0 in place",
    trigger="a grad_output that another branch needs, too",
)
