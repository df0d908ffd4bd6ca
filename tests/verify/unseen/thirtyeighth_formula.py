"""Formulas: a term, a sign or a factor that backward lacks."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.thirtyeighth import add, alike, bounded, check, indices, same, sized


# A deep-and-cross layer: y = x0 (x . w) + b + x
def cross_layer(wrong):
    class Cross(Function):
        @staticmethod
        def forward(ctx, x0, x, w, b):
            ctx.save_for_backward(x0, x, w)
            return x0 * (x @ w)[:, None] + b + x

        @staticmethod
        def backward(ctx, g):
            x0, x, w = ctx.saved_tensors
            s = (g * x0).sum(-1)
            grad_x = s[:, None] * w
            if not wrong:
                grad_x = grad_x + g
            return g * (x @ w)[:, None], grad_x, s @ x, g.sum(0)

    def cross(x0, x, w, b):
        sized("x0", x0, None, None)
        same(x0, x)
        sized("w", w, x.shape[1])
        sized("b", b, x.shape[1])
        alike(x0, x, w, b)
        for name, t in {"x0": x0, "x": x, "w": w, "b": b}.items():
            bounded(name, t, -1e3, 1e3)
        return Cross.apply(x0, x, w, b)

    return cross


add(
    "cross_layer_residual",
    cross_layer,
    lambda: (real(4, 5), real(4, 5, seed=1), real(5, seed=2), real(5, seed=3)),
    bug="Backward forgets that x is also added: the residual's path is missing",
)


# Factorization machine's pairs: half the sum over the factors of (x V)^2 - x^2 V^2
def factorization_machine(wrong):
    class Pairs(Function):
        @staticmethod
        def forward(ctx, x, v):
            ctx.save_for_backward(x, v)
            return ((x @ v).square() - x.square() @ v.square()).sum(-1) / 2

        @staticmethod
        def backward(ctx, g):
            x, v = ctx.saved_tensors
            s = x @ v
            grad_x = g[:, None] * (s @ v.mT - x * v.square().sum(-1))
            grad_v = x.mT @ (g[:, None] * s)
            if not wrong:
                grad_v = grad_v - v * (g @ x.square())[:, None]
            return grad_x, grad_v

    def pairs(x, v):
        sized("x", x, None, None)
        sized("v", v, x.shape[1], None)
        alike(x, v)
        bounded("x", x, -1e3, 1e3)
        bounded("v", v, -1e3, 1e3)
        return Pairs.apply(x, v)

    return pairs


add(
    "factorization_machine_square",
    factorization_machine,
    lambda: (real(4, 5), real(5, 3, seed=1)),
    bug="The factors' gradient lacks the term of the features' own squares",
)


# A frozen weight with an update of low rank: x W' + scale (x A') B'
def adapted_linear(wrong):
    class Adapted(Function):
        @staticmethod
        def forward(ctx, x, weight, a, b, scale):
            ctx.save_for_backward(x, weight, a, b)
            ctx.scale = scale
            return x @ weight.mT + scale * (x @ a.mT) @ b.mT

        @staticmethod
        def backward(ctx, g):
            x, weight, a, b = ctx.saved_tensors
            inner = g @ b
            grad_x = g @ weight + ctx.scale * inner @ a
            grad_a = inner.mT @ x
            if not wrong:
                grad_a = ctx.scale * grad_a
            return grad_x, None, grad_a, ctx.scale * g.mT @ (x @ a.mT), None

    def linear(x, weight, a, b, scale=2.0):
        sized("x", x, None, None)
        sized("weight", weight, None, x.shape[1])
        sized("a", a, None, x.shape[1])
        sized("b", b, weight.shape[0], a.shape[0])
        alike(x, weight, a, b)
        check(not weight.requires_grad, "weight: expected a frozen one")
        check(0 < scale <= 100, "scale: expected a number from 0 to 100")
        for name, t in {"x": x, "weight": weight, "a": a, "b": b}.items():
            bounded(name, t, -1e3, 1e3)
        return Adapted.apply(x, weight, a, b, scale)

    return linear


add(
    "adapted_linear_scale",
    adapted_linear,
    lambda: (
        real(4, 5),
        real(3, 5, seed=1, grad=False),
        real(2, 5, seed=2),
        real(3, 2, seed=3),
    ),
    bug="The gradient of the adapter's first factor lacks its scale",
)


# Rate of an enzyme with a competitive inhibitor: v s / (km (1 + i / ki) + s)
def inhibited_rate(wrong):
    class Rate(Function):
        @staticmethod
        def forward(ctx, s, i, top, km, ki):
            ctx.save_for_backward(s, i, top, km, ki)
            return top * s / (km * (1 + i / ki) + s)

        @staticmethod
        def backward(ctx, g):
            s, i, top, km, ki = ctx.saved_tensors
            apparent = km * (1 + i / ki)
            below = apparent + s
            down = -g * top * s / below.square()
            grad_ki = (down * km * i).sum() / ki.square()
            return (
                g * top * apparent / below.square(),
                down * km / ki,
                (g * s / below).sum(),
                (down * (1 + i / ki)).sum(),
                grad_ki if wrong else -grad_ki,
            )

    def rate(s, i, top, km, ki):
        sized("s", s, None)
        same(s, i)
        alike(s, i, top, km, ki)
        for name, t in {"top": top, "km": km, "ki": ki}.items():
            sized(name, t)
            bounded(name, t, 1e-2, 1e3)
        bounded("s", s, 0, 1e3)
        bounded("i", i, 0, 1e3)
        return Rate.apply(s, i, top, km, ki)

    return rate


add(
    "inhibited_rate_constant",
    inhibited_rate,
    lambda: (
        real(5, positive=True),
        real(5, seed=1, positive=True),
        *(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, 0.7, 1.3)),
    ),
    bug="The gradient of the inhibition constant has the wrong sign",
)


# Minkowski's product of rows: x1 y1 + x2 y2 + ... - x0 y0
def minkowski_product(wrong):
    def turned(t):
        return torch.cat([-t[..., :1], t[..., 1:]], -1)

    class Product(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return (turned(x) * y).sum(-1)

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            return g[..., None] * turned(y), g[..., None] * (x if wrong else turned(x))

    def product(x, y):
        check(x.ndim >= 1 and x.shape[-1] >= 2 and x.numel() > 0, "x: expected time and space")
        same(x, y)
        alike(x, y)
        bounded("x", x, -1e3, 1e3)
        bounded("y", y, -1e3, 1e3)
        return Product.apply(x, y)

    return product


add(
    "minkowski_product_time",
    minkowski_product,
    lambda: (real(4, 3), real(4, 3, seed=1)),
    bug="The second factor's gradient lacks the minus of time",
)


# Volume a . (b x c) of rows
def box_product(wrong):
    class Product(Function):
        @staticmethod
        def forward(ctx, a, b, c):
            ctx.save_for_backward(a, b, c)
            return (a * torch.linalg.cross(b, c)).sum(-1)

        @staticmethod
        def backward(ctx, g):
            a, b, c = ctx.saved_tensors
            middle = torch.linalg.cross(a, c) if wrong else torch.linalg.cross(c, a)
            g = g[..., None]
            return g * torch.linalg.cross(b, c), g * middle, g * torch.linalg.cross(a, b)

    def product(a, b, c):
        check(a.ndim >= 1 and a.shape[-1] == 3, "a: expected three numbers per row")
        same(a, b, c)
        alike(a, b, c)
        for name, t in {"a": a, "b": b, "c": c}.items():
            bounded(name, t, -1e3, 1e3)
        return Product.apply(a, b, c)

    return product


add(
    "box_product_middle",
    box_product,
    lambda: (real(4, 3), real(4, 3, seed=1), real(4, 3, seed=2)),
    bug="The middle vector's gradient is a x c in place of c x a",
)


# Centred log-ratios of compositions: log(x) less its mean in a row
def centred_log_ratio(wrong):
    class Ratio(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            y = x.log()
            return y - y.mean(-1, keepdim=True)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            if wrong:
                h = g / x
                return h - h.mean(-1, keepdim=True)
            return (g - g.mean(-1, keepdim=True)) / x

    def ratio(x):
        check(x.ndim >= 1 and x.numel() > 0, "x: expected numbers")
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, 1e-3, 1e6)
        return Ratio.apply(x)

    return ratio


add(
    "centred_log_ratio_order",
    centred_log_ratio,
    lambda: (real(4, 5, positive=True),),
    bug="Backward divides by x first and subtracts the mean then",
)


# Two branches mixed with one weight per row: m a + (1 - m) b
def branch_mix(wrong):
    class Mix(Function):
        @staticmethod
        def forward(ctx, a, b, m):
            ctx.save_for_backward(a, b, m)
            return torch.lerp(b, a, m)

        @staticmethod
        def backward(ctx, g):
            a, b, m = ctx.saved_tensors
            along = g * (a - b)
            grad_m = along.mean(-1, keepdim=True) if wrong else along.sum(-1, keepdim=True)
            return g * m, g * (1 - m), grad_m

    def mix(a, b, m):
        sized("a", a, None, None)
        same(a, b)
        sized("m", m, len(a), 1)
        alike(a, b, m)
        bounded("a", a, -1e3, 1e3)
        bounded("b", b, -1e3, 1e3)
        bounded("m", m, -10, 10)
        return Mix.apply(a, b, m)

    return mix


add(
    "branch_mix_weight",
    branch_mix,
    lambda: (real(4, 5), real(4, 5, seed=1), real(4, 1, seed=2, positive=True)),
    bug="The weight of a row is broadcast, its gradient averaged over the row where it should be summed",
)


# Symmetric mean absolute percentage error: mean of |x - y| / (|x| + |y|)
def symmetric_percentage(wrong):
    class Error(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return ((x - y).abs() / (x.abs() + y.abs())).mean()

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            d, s = x - y, x.abs() + y.abs()
            n = g.numel() if wrong else x.numel()
            first = d.sign() / s
            second = d.abs() / s.square()
            return g / n * (first - second * x.sign()), g / n * (-first - second * y.sign())

    def error(x, y):
        check(x.numel() > 0, "x: expected numbers")
        same(x, y)
        alike(x, y)
        bounded("x", x.abs(), 1e-3, 1e3)
        bounded("y", y.abs(), 1e-3, 1e3)
        return Error.apply(x, y)

    return error


add(
    "symmetric_percentage_count",
    symmetric_percentage,
    lambda: (real(4, 3, positive=True), real(4, 3, seed=1, positive=True)),
    bug="Backward divides by the number of elements of grad_output, which is one, not of x",
)


# Hoyer's measure of how sparse numbers are along a dimension: l1 / l2
def hoyer_measure(wrong):
    class Measure(Function):
        @staticmethod
        def forward(ctx, x, dim):
            ctx.save_for_backward(x)
            ctx.dim = dim
            return x.abs().sum(dim) / x.square().sum(dim).sqrt()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            long = x.square().sum(ctx.dim, keepdim=True).sqrt()
            total = x.abs().sum(-1 if wrong else ctx.dim, keepdim=True)
            return g.unsqueeze(ctx.dim) * (x.sign() / long - total * x / long**3), None

    def measure(x, dim=-1):
        check(x.ndim >= 1 and x.numel() > 0, "x: expected numbers")
        check(isinstance(dim, int) and -x.ndim <= dim < x.ndim, "dim: expected one of x's")
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -1e3, 1e3)
        bounded("x", x.abs().amax(dim), 1e-2, 1e3)
        return Measure.apply(x, dim)

    return measure


add(
    "hoyer_measure_dim",
    hoyer_measure,
    lambda: (real(4, 4),),
    kwargs=lambda: {"dim": 0},
    bug="Backward sums along the last dimension, whichever was asked for",
    trigger="the sample, whose keyword dim is 0",
)


# Energy of springs between nodes (N, D), each with a stiffness and no length at rest
def spring_network(wrong):
    class Energy(Function):
        @staticmethod
        def forward(ctx, x, i, j, stiffness):
            ctx.save_for_backward(x, i, j, stiffness)
            return (stiffness * (x[i] - x[j]).square().sum(-1)).sum() / 2

        @staticmethod
        def backward(ctx, g):
            x, i, j, stiffness = ctx.saved_tensors
            d = x[i] - x[j]
            force = g * stiffness[:, None] * d
            grad = torch.zeros_like(x)
            if wrong:
                grad[i] += force
                grad[j] -= force
            else:
                grad = grad.index_add(0, i, force).index_add(0, j, -force)
            return grad, None, None, g * d.square().sum(-1) / 2

    def energy(x, i, j, stiffness):
        sized("x", x, None, None)
        sized("i", i, None)
        same(i, j, stiffness)
        alike(x, stiffness)
        indices("i", i, len(x))
        indices("j", j, len(x))
        check(i.dtype == j.dtype == torch.int64, "i, j: expected int64")
        bounded("x", x, -1e3, 1e3)
        bounded("stiffness", stiffness, 0, 1e3)
        return Energy.apply(x, i, j, stiffness)

    return energy


add(
    "spring_network_shared",
    spring_network,
    lambda: (
        real(4, 2),
        torch.tensor([0, 0, 1, 2]),
        torch.tensor([1, 2, 2, 3]),
        real(4, seed=1, positive=True),
    ),
    bug="grad[i] += force keeps one of the springs that hang on a node",
)


# Cumulative logits of ordered classes, whose thresholds are a start and steps of exp(s)
def ordered_thresholds(wrong):
    def thresholds(start, s):
        return torch.cat([start[None], start + s.exp().cumsum(0)])

    class Loss(Function):
        @staticmethod
        def forward(ctx, score, start, s, k):
            ctx.save_for_backward(score, start, s, k)
            above = (k[:, None] > torch.arange(len(s) + 1, device=k.device)).to(score.dtype)
            z = score[:, None] - thresholds(start, s)
            return F.binary_cross_entropy_with_logits(z, above, reduction="none").sum(-1).mean()

        @staticmethod
        def backward(ctx, g):
            score, start, s, k = ctx.saved_tensors
            above = (k[:, None] > torch.arange(len(s) + 1, device=k.device)).to(score.dtype)
            slope = (score[:, None] - thresholds(start, s)).sigmoid() - above
            slope = slope * (g / len(score))
            down = -slope.sum(0)
            rest = down[1:] if wrong else down[1:].flip(0).cumsum(0).flip(0)
            return slope.sum(-1), down.sum(), rest * s.exp(), None

    def loss(score, start, s, k):
        sized("score", score, None)
        sized("start", start)
        sized("s", s, None)
        sized("k", k, len(score))
        alike(score, start, s)
        indices("k", k, len(s) + 2)
        for name, t in {"score": score, "start": start}.items():
            bounded(name, t, -50, 50)
        bounded("s", s, -5, 3)
        return Loss.apply(score, start, s, k)

    return loss


add(
    "ordered_thresholds_steps",
    ordered_thresholds,
    lambda: (
        real(6),
        torch.tensor(-1.0, dtype=torch.float64, requires_grad=True),
        real(3, seed=1),
        whole(5, 6, seed=2),
    ),
    bug="A step raises all later thresholds, its gradient counts the next one alone",
)
