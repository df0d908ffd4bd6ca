"""Coverage: ignored targets, masks, counts, frozen inputs, blocks, empty and complex tensors, a Module."""

import torch
from torch import nn
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtyeighth import add, add_bare, alike, bounded, check, same, sized


# Hinge loss of distances: d of pairs that belong together (1), max(0, margin - d) of others (-1), none of unknown (0)
def pair_hinge(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, d, kind, margin):
            ctx.save_for_backward(d, kind)
            ctx.margin = margin
            apart = (margin - d).clamp(min=0) * (kind == -1)
            return (d * (kind == 1) + apart).sum() / (kind != 0).sum().clamp(min=1)

        @staticmethod
        def backward(ctx, g):
            d, kind = ctx.saved_tensors
            near = (kind == -1) & (d < ctx.margin)
            slope = (kind == 1).to(d.dtype) - near.to(d.dtype)
            count = kind.numel() if wrong else (kind != 0).sum().clamp(min=1)
            return g * slope / count, None, None

    def loss(d, kind, margin=1.0):
        check(d.numel() > 0, "d: expected numbers")
        same(d, kind)
        check(d.is_floating_point(), "d: expected floating point numbers")
        check(kind.dtype == torch.int64, "kind: expected int64")
        check(bool((kind.abs() <= 1).all()), "kind: expected -1, 0 or 1")
        bounded("d", d, 0, 1e4)
        return Loss.apply(d, kind, margin)

    return loss


add(
    "pair_hinge_unknown",
    pair_hinge,
    lambda: (real(6, positive=True), torch.tensor([1, -1, 0, 1, -1, 0])),
    bug="Backward divides by all pairs, forward by those that count",
)


# Mean over time of x (B, T, D) where a token's type (B, T) isn't 0, which is padding
def typed_mean(wrong):
    class Mean(Function):
        @staticmethod
        def forward(ctx, x, kind):
            ctx.save_for_backward(kind)
            keep = (kind != 0).to(x.dtype)[..., None]
            return (x * keep).sum(1) / keep.sum(1).clamp(min=1)

        @staticmethod
        def backward(ctx, g):
            (kind,) = ctx.saved_tensors
            count = (kind != 0).sum(1)[:, None, None].clamp(min=1).to(g.dtype)
            keep = kind if wrong else kind != 0
            return g[:, None] * keep.to(g.dtype)[..., None] / count, None

    def mean(x, kind):
        sized("x", x, None, None, None)
        sized("kind", kind, *x.shape[:2])
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(kind.dtype in (torch.bool, torch.int64), "kind: expected booleans or int64")
        bounded("x", x, -1e6, 1e6)
        return Mean.apply(x, kind)

    return mean


add(
    "typed_mean_kinds",
    typed_mean,
    lambda: (real(2, 4, 3), torch.tensor([[1, 2, 1, 0], [3, 1, 0, 0]])),
    bug="Backward multiplies by the types where forward asks whether they are 0",
)


# Coefficient of variation of rows: sample deviation over mean
def variation_coefficient(wrong):
    class Coefficient(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.std(-1) / x.mean(-1)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            n = x.shape[-1]
            mean = x.mean(-1, keepdim=True)
            d = x - mean
            deviation = (d.square().sum(-1, keepdim=True) / (n - 1)).sqrt()
            slope = d / ((n if wrong else n - 1) * deviation)
            return g[..., None] * (slope / mean - deviation / (n * mean.square()))

    def coefficient(x):
        check(
            x.ndim >= 1 and x.numel() > 0 and x.shape[-1] >= 2, "x: expected rows of two at least"
        )
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, 1e-2, 1e3)
        bounded("the spread of x", x.std(-1) / x.mean(-1), 1e-2, 1e3)
        return Coefficient.apply(x)

    return coefficient


add(
    "variation_coefficient_count",
    variation_coefficient,
    lambda: (real(4, 5, positive=True),),
    bug="The deviation's gradient divides by n, the deviation itself by n - 1",
)


# Branches under tanh, summed with a weight each
def weighted_branches(wrong):
    class Sum(Function):
        @staticmethod
        def forward(ctx, weights, *xs):
            ctx.needed = [k for k in range(len(xs)) if ctx.needs_input_grad[k + 1]]
            ctx.save_for_backward(weights, *xs)
            return sum(w * x.tanh() for w, x in zip(weights, xs, strict=True))

        @staticmethod
        def backward(ctx, g):
            weights, *xs = ctx.saved_tensors
            grads = [None] * len(xs)
            for i, k in enumerate(ctx.needed):
                grads[k] = g * weights[i if wrong else k] * (1 - xs[k].tanh().square())
            return torch.stack([(g * x.tanh()).sum() for x in xs]), *grads

    def branches(weights, first, second, third):
        sized("weights", weights, 3)
        same(first, second, third)
        alike(weights, first, second, third)
        for name, t in {"weights": weights, "x": torch.stack([first, second, third])}.items():
            bounded(name, t, -1e3, 1e3)
        return Sum.apply(weights, first, second, third)

    return branches


add(
    "weighted_branches_frozen",
    weighted_branches,
    lambda: (
        real(3, seed=3),
        real(2, 4, grad=False),
        real(2, 4, seed=1),
        real(2, 4, seed=2),
    ),
    bug="Branches that need a gradient are counted from 0 when their weights are looked up",
    trigger="a frozen branch before one that needs a gradient, as in the sample",
)


# modReLU of complex numbers: relu(|z| + b) z / |z| with a bias per column
def mod_relu(wrong):
    class Relu(Function):
        @staticmethod
        def forward(ctx, z, b):
            ctx.save_for_backward(z, b)
            r = z.abs()
            return (r + b).clamp(min=0) * z / r

        @staticmethod
        def backward(ctx, g):
            z, b = ctx.saved_tensors
            r = z.abs()
            u, s = z / r, (r + b).clamp(min=0)
            on = (r + b > 0).to(r.dtype)
            along = ((g if wrong else g.conj()) * u).real
            return u * (along * (on - s / r)) + g * (s / r), (on * along).sum(0)

    def relu(z, b):
        sized("z", z, None, None)
        sized("b", b, z.shape[1])
        check(z.is_complex(), "z: expected complex numbers")
        check(b.dtype == z.real.dtype, "b: expected real numbers of z's precision")
        check(z.dtype != torch.complex32, "z: expected single precision at least")
        bounded("|z|", z.detach().abs(), 1e-2, 1e3)
        bounded("b", b, -1e3, 1e3)
        return Relu.apply(z, b)

    return relu


add_bare(
    "mod_relu_conjugate",
    mod_relu,
    lambda: (
        torch.complex(real(3, 4, grad=False), real(3, 4, seed=1, grad=False)).requires_grad_(),
        real(4, seed=2),
    ),
    bug="Backward takes the real part of g u, without the conjugate of either",
    trigger="a grad_output that is not real",
)


# Scores tanh(x . w) of rows (N, K); the weights' gradient adds up blocks of four rows
def row_scores(wrong):
    block = 4

    class Scores(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return (x @ w).tanh()

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            h = g * (1 - (x @ w).tanh().square())
            blocks = max(len(x) // block, 1) if wrong else -(-len(x) // block)
            places = [slice(i * block, (i + 1) * block) for i in range(blocks)]
            return h[:, None] * w, torch.stack([h[p] @ x[p] for p in places]).sum(0)

    def scores(x, w):
        sized("x", x, None, None)
        sized("w", w, x.shape[1])
        alike(x, w)
        bounded("x", x, -1e3, 1e3)
        bounded("w", w, -1e3, 1e3)
        return Scores.apply(x, w)

    return scores


add(
    "row_scores_tail",
    row_scores,
    lambda: (real(6, 3), real(3, seed=1)),
    bug="Backward rounds the number of blocks down: the rows of a last partial block are lost",
    trigger="more than four rows, not a multiple of four, as in the sample",
)


# Linex loss, which punishes errors of one sign more: mean of exp(a d) - a d - 1
def linex(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, x, y, a):
            ctx.save_for_backward(x, y)
            ctx.a = a
            z = a * (x - y)
            return (torch.expm1(z) - z).sum() / max(x.numel(), 1)

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            scale = ctx.a / (x.numel() if wrong else max(x.numel(), 1))
            grad = g * scale * torch.expm1(ctx.a * (x - y))
            return grad, -grad, None

    def loss(x, y, a=0.7):
        same(x, y)
        alike(x, y)
        check(0.01 <= abs(a) <= 10, "a: expected a size from 0.01 to 10")
        bounded("a (x - y)", a * (x - y), -50, 50)
        return Loss.apply(x, y, a)

    return loss


add(
    "linex_empty",
    linex,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="Backward divides by the number of elements in Python: ZeroDivisionError, where forward says 0",
    trigger="empty tensors",
)


def nearest(x, table):
    return table[(x[:, None] - table).square().sum(-1).argmin(-1)]


class Commitment(Function):
    @staticmethod
    def forward(ctx, x, table, weight, wrong):
        ctx.save_for_backward(x, table, weight)
        ctx.wrong = wrong
        return weight * (x - nearest(x, table)).square().mean()

    @staticmethod
    def backward(ctx, g):
        x, table, weight = ctx.saved_tensors
        d = x - nearest(x, table)
        n = len(x) if ctx.wrong else x.numel()
        return g * weight * 2 * d / n, None, g * d.square().mean(), None


class CommitmentLoss(nn.Module):
    """Mean square of x (N, D) less its nearest entry of a table, a buffer, times a learned weight."""

    def __init__(self, wrong):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.25, dtype=torch.float64))
        self.register_buffer("table", real(4, 3, seed=7, grad=False))
        self.wrong = wrong

    def forward(self, x):
        sized("x", x, None, 3)
        alike(x, self.table, self.weight)
        bounded("x", x, -1e3, 1e3)
        return Commitment.apply(x, self.table, self.weight, self.wrong)


add_bare(
    "commitment_loss_rows",
    CommitmentLoss,
    lambda: (real(5, 3),),
    bug="Backward divides by the rows, forward's mean by the elements",
)
