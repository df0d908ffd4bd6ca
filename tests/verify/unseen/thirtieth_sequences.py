"""Recurrences, scans and what sequences are made of."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtieth import add, bounded, check, sized


# The cell state of an LSTM from its packed gates i, f, g: σ(f + bias) c + σ(i) tanh g
def forget_bias(wrong):
    class Cell(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(gates, c, bias):
            i, f, g = gates.chunk(3, -1)
            return (f + bias).sigmoid() * c + i.sigmoid() * g.tanh()

        @staticmethod
        def setup_context(ctx, inputs, output):
            gates, c, ctx.bias = inputs
            ctx.save_for_backward(gates, c)

        @staticmethod
        def backward(ctx, grad_y):
            gates, c = ctx.saved_tensors
            i, f, g = gates.chunk(3, -1)
            i, g = i.sigmoid(), g.tanh()
            f = f.sigmoid() if wrong else (f + ctx.bias).sigmoid()
            grads = (g * i * (1 - i), c * f * (1 - f), i * (1 - g * g))
            return torch.cat([grad_y * d for d in grads], -1), grad_y * f, None

    def cell(gates, c, bias=0.0):
        check(c.ndim >= 1 and c.shape[-1] > 0, "c: expected one unit at least")
        check(gates.shape == (*c.shape[:-1], 3 * c.shape[-1]), "gates: expected three times c")
        check(-10 <= bias <= 10, "bias: expected a number from -10 to 10")
        return Cell.apply(gates, c, float(bias))

    return cell


add(
    "forget_bias_lost",
    forget_bias,
    lambda: (real(3, 12), real(3, 4, seed=1)),
    bug="Backward computes the forget gate again without its bias",
    trigger="a bias that is not 0, the default",
)


# The input's weight of a state-space model held over a step: b (exp(a dt) - 1) / a, which is b dt for a = 0
def hold_discretise(wrong):
    class Hold(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(a, b, dt):
            return b * dt * ratio(a * dt)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            a, b, dt = ctx.saved_tensors
            z = a * dt
            slope = (z * z.exp() - torch.expm1(z)) / (z * z) if wrong else ratio_slope(z)
            y = ratio(z)
            grad_a = grad_y * b * dt * dt * slope
            return grad_a, grad_y * dt * y, grad_y * b * z.exp()

    def ratio(z):
        near, there = parts(z)
        series = torch.zeros_like(z)
        for n in range(12, -1, -1):
            series = series * z + 1 / math.factorial(n + 1)
        return torch.where(near, series, torch.expm1(there) / there)

    def ratio_slope(z):
        near, there = parts(z)
        series = torch.zeros_like(z)
        for n in range(12, 0, -1):
            series = series * z + n / math.factorial(n + 1)
        return torch.where(
            near, series, (there * there.exp() - torch.expm1(there)) / (there * there)
        )

    def parts(z):
        near = z.abs() < 0.25
        return near, torch.where(near, 1, z)

    def hold(a, b, dt):
        check(a.shape == b.shape == dt.shape, "expected tensors of one shape")
        bounded("a", a, -20, 5)
        bounded("b", b, -1e3, 1e3)
        bounded("dt", dt, 1e-3, 2)
        return Hold.apply(a, b, dt)

    return hold


add(
    "hold_discretise_zero",
    hold_discretise,
    lambda: (
        real(3, 4),
        real(3, 4, seed=1),
        real(3, 4, seed=2, grad=False).sigmoid().requires_grad_(),
    ),
    bug="Forward knows the pole 0 apart, backward divides by its square",
    trigger="a pole of 0, an integrator",
)


# y_t = a_t y_(t - 1) + x_t in log₂ L passes, each over twice the distance
def doubling_scan(wrong):
    def scan(a, x, passes):
        step = 1
        for _ in range(passes):
            x = torch.cat([x[:, :step], x[:, step:] + a[:, step:] * x[:, :-step]], 1)
            a = torch.cat([a[:, :step], a[:, step:] * a[:, :-step]], 1)
            step *= 2
        return x

    class Scan(Function):
        @staticmethod
        def forward(ctx, a, x):
            y = scan(a, x, (x.shape[1] - 1).bit_length())
            ctx.save_for_backward(a, x)
            return y

        @staticmethod
        def backward(ctx, grad_y):
            a, x = ctx.saved_tensors
            n = x.shape[1]
            passes = n.bit_length() - 1 if wrong else (n - 1).bit_length()
            later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
            grad_x = scan(later.flip(1), grad_y.flip(1), passes).flip(1)
            y = scan(a, x, (n - 1).bit_length())
            before = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
            return grad_x * before, grad_x

    def recurrence(a, x):
        sized("a", a, None, None)
        sized("x", x, *a.shape)
        bounded("a", a, -1, 1)
        bounded("x", x, -1e4, 1e4)
        return Scan.apply(a, x)

    return recurrence


add(
    "doubling_scan_steps",
    doubling_scan,
    lambda: (real(2, 4, grad=False).sigmoid().requires_grad_(), real(2, 4, seed=1)),
    bug="Backward rounds log₂ L down, so the last pass is left out",
    trigger="a length that is no power of two",
)


# A tanh recurrence, of a bias only: h_t = tanh(x_t + w h_(t - 1) + b), the outputs in the input's type
def biased_recurrence(wrong):
    class Steps(Function):
        @staticmethod
        def forward(ctx, x, w, b):
            ctx.save_for_backward(x, w, b)
            return states(wide(x), wide(w), wide(b))[1].to(x.dtype)

        @staticmethod
        def backward(ctx, grad_y):
            x, w, b = ctx.saved_tensors
            before, h = states(wide(x), wide(w), wide(b))
            carry = torch.zeros_like(h[0])
            grad_w = torch.zeros_like(wide(w))
            grad_b = torch.zeros_like(b if wrong else wide(b))
            grads = []
            for t in reversed(range(len(x))):
                grad = (wide(grad_y[t]) + carry) * (1 - h[t] * h[t])
                grads.insert(0, grad)
                grad_w = grad_w + grad * before[t]
                grad_b = grad_b + grad.to(grad_b.dtype)
                carry = grad * wide(w)
            return torch.stack(grads).to(x.dtype), grad_w.to(w.dtype), grad_b.to(b.dtype)

    def states(x, w, b):
        h, every = torch.zeros_like(x[0]), [torch.zeros_like(x[0])]
        for row in x:
            h = torch.tanh(row + w * h + b)
            every.append(h)
        return torch.stack(every[:-1]), torch.stack(every[1:])

    def wide(t):
        return t.to(torch.promote_types(t.dtype, torch.float32))

    def recurrence(x, w, b):
        sized("x", x, None, None)
        sized("w", w, x.shape[1])
        sized("b", b, x.shape[1])
        check(x.dtype == w.dtype == b.dtype, "expected tensors of one dtype")
        bounded("w", w, -1, 1)
        bounded("x", x, -1e4, 1e4)
        bounded("b", b, -1e4, 1e4)
        return Steps.apply(x, w, b)

    return recurrence


add(
    "recurrent_bias_bf16",
    biased_recurrence,
    lambda: (
        real(5, 3),
        real(3, seed=1, grad=False).tanh().requires_grad_(),
        real(3, seed=2),
    ),
    own=True,
    bug="The bias's gradient is added up over the steps in the parameter's type",
    trigger="bfloat16 and many steps",
)


# The mean of a frame's frequencies, weighted by its powers; the total is at least 1e-3
def centroid(wrong):
    class Centroid(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(p):
            return (p * places(p)).sum(-1) / p.sum(-1).clamp(min=1e-3)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (p,) = ctx.saved_tensors
            total = p.sum(-1, keepdim=True)
            f, low = places(p), total.clamp(min=1e-3)
            y = (p * f).sum(-1, keepdim=True) / low
            inner = y if wrong else torch.where(total > 1e-3, y, 0)
            return grad_y[..., None] * (f - inner) / low

    def places(p):
        return torch.linspace(0, 1, p.shape[-1], dtype=p.dtype, device=p.device)

    def function(p):
        check(p.ndim >= 1 and p.shape[-1] > 0, "p: expected one frequency at least")
        bounded("p", p, 0, 1e4)
        return Centroid.apply(p)

    return function


add(
    "centroid_floor",
    centroid,
    lambda: (real(3, 5, positive=True),),
    bug="Backward divides as if the total were never held at its floor",
    trigger="a quiet frame, below the floor",
)
