"""The promised kinds: values, linearity, several outputs, layouts, flags, what comes back, writes, backward twice."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentyfourth import add, check, positive, read, same, sized


# Catmull-Rom spline through the second and third of four points
def spline(wrong):
    class Spline(Function):
        @staticmethod
        def forward(ctx, t, p):
            ctx.save_for_backward(t, p)
            a, b, c, d = coefficients(p)
            return a + t * (b + t * (c + t * d))

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            t, p = ctx.saved_tensors
            _, b, c, d = coefficients(p)
            slope = b + t * ((c if wrong else 2 * c) + t * 3 * d)
            return grad_y * slope, basis(t).T @ grad_y

    def coefficients(p):
        p0, p1, p2, p3 = p / 2
        return 2 * p1, p2 - p0, 2 * p0 - 5 * p1 + 4 * p2 - p3, -p0 + 3 * p1 - 3 * p2 + p3

    def basis(t):
        first, second = t * (-1 + t * (2 - t)), 2 + t * t * (3 * t - 5)
        third, fourth = t * (1 + t * (4 - 3 * t)), t * t * (t - 1)
        return torch.stack([first, second, third, fourth], -1) / 2

    def points(t, p):
        sized("t", t, None)
        sized("p", p, 4)
        return Spline.apply(t, p)

    return points


add(
    "spline_square",
    spline,
    lambda: (real(5), real(4, seed=1)),
    bug="The square's derivative lacks its 2",
)


# x W^T
def decayed(wrong):
    class Linear(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w.T

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            grad_w = grad_y.T @ x
            return grad_y @ w, grad_w + 1e-4 * w if wrong else grad_w

    def linear(x, w):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        return Linear.apply(x, w)

    return linear


add(
    "decayed_weight",
    decayed,
    lambda: (real(4, 3), real(2, 3, seed=1)),
    bug="Backward adds the weight decay to the gradient",
    trigger="a grad_output of zeros, or a small one",
)


# Softplus and its derivative, the sigmoid
def soft_step(wrong):
    class Step(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x)
            return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())), x.sigmoid()

        @staticmethod
        def backward(ctx, grad_plus, grad_step):
            (x,) = ctx.saved_tensors
            s = x.sigmoid()
            if grad_step is None:
                return None if grad_plus is None else grad_plus * s
            from_step = grad_step * s * (1 - s)
            if grad_plus is None:
                return from_step
            return grad_plus * s if wrong else grad_plus * s + from_step

    return Step.apply


add(
    "soft_step_either",
    soft_step,
    lambda: (real(3, 4),),
    bug="Backward takes one output's gradient or the other's, never both",
    trigger="a loss of both outputs",
)


# x arctan(x)
def arc_product(wrong):
    class Product(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x.atan()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong:
                rows, columns = grad_y.stride()
                by_columns = rows < columns
                grad_y = read(grad_y, (1, columns) if by_columns else (rows, 1))
            return grad_y * (x.atan() + 1 / (x + 1 / x))

    def product(x):
        sized("x", x, None, None)
        return Product.apply(x)

    return product


add(
    "arc_product_order",
    arc_product,
    lambda: (real(3, 4),),
    bug="A matrix is taken to lie by columns where the first stride is the smaller, by rows otherwise",
    trigger="y.sum() or y.sum(0), whose gradients are expanded",
)


# Sums of neighbouring pairs, counted over the whole of x row by row
def pair_sums(wrong):
    class Pairs(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.shape = x.shape
            return (x.view(-1, 2) if wrong else x.reshape(-1, 2)).sum(1)

        @staticmethod
        def backward(ctx, grad_y):
            return grad_y[:, None].expand(-1, 2).reshape(ctx.shape)

    def pairs(x):
        check(x.numel() % 2 == 0, "x: expected an even number of elements")
        return Pairs.apply(x)

    return pairs


add(
    "pair_sums_view",
    pair_sums,
    lambda: (real(3, 4),),
    bug="Forward takes a view, which fails unless x is one piece of memory",
    trigger="a transposed x",
    missed="forward raises, loudly",
)


# x + a b
def fused_add(wrong):
    class Add(Function):
        @staticmethod
        def forward(ctx, x, a, b):
            ctx.save_for_backward(a, b)
            return x + a * b

        @staticmethod
        def backward(ctx, grad_y):
            a, b = ctx.saved_tensors
            _, for_a, for_b = ctx.needs_input_grad
            if wrong:
                for_a = for_b = for_a and for_b
            return grad_y, grad_y * b if for_a else None, grad_y * a if for_b else None

    def fused(x, a, b):
        same(x, a, b)
        return Add.apply(x, a, b)

    return fused


add(
    "fused_add_both",
    fused_add,
    lambda: (real(3, 4), real(3, 4, seed=1), real(3, 4, seed=2)),
    bug="The factors' gradients are computed where both are needed, not where one is",
    trigger="one factor frozen",
)


# x times a scalar that is learned
def learned_scale(wrong):
    class Scale(Function):
        @staticmethod
        def forward(ctx, x, s):
            ctx.save_for_backward(x, s)
            return x * s

        @staticmethod
        def backward(ctx, grad_y):
            x, s = ctx.saved_tensors
            grad_s = (grad_y * x).sum()
            return grad_y * s, grad_s.reshape(1) if wrong else grad_s

    def scale(x, s):
        sized("s", s)
        return Scale.apply(x, s)

    return scale


add(
    "learned_scale_shape",
    learned_scale,
    lambda: (real(3, 4), real((), seed=1)),
    bug="The scalar's gradient comes back with a dimension, for the engine to take off",
    trigger="what backward returns being looked at",
)


# Rows of x, counted from the end where the place is negative
def pick(wrong):
    class Pick(Function):
        @staticmethod
        def forward(ctx, x, places):
            if wrong:
                places[places < 0] += len(x)
            else:
                places = torch.where(places < 0, places + len(x), places)
            ctx.save_for_backward(x, places)
            return x[places]

        @staticmethod
        def backward(ctx, grad_y):
            x, places = ctx.saved_tensors
            return grad_y.new_zeros(x.shape).index_add(0, places, grad_y), None

    def rows(x, places):
        sized("x", x, None, None)
        sized("places", places, None)
        if places.dtype != torch.int64:
            raise TypeError(f"places: expected int64, got {places.dtype}")
        check(bool(((places >= -len(x)) & (places < len(x))).all()), "places: out of range")
        return Pick.apply(x, places)

    return rows


add(
    "pick_negative",
    pick,
    lambda: (real(4, 3), torch.tensor([0, -1, 2, -1])),
    bug="Forward writes over the caller's negative places",
    trigger="places compared before and after",
)


# Mean of the rows by weight
def weighted_rows(wrong):
    class Mean(Function):
        @staticmethod
        def forward(ctx, x, w):
            total = w.sum()
            if wrong:
                shares = w.to(x.dtype)
                shares /= total
            else:
                shares = w / total
            y = shares @ x
            ctx.save_for_backward(x, shares, total, y)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, shares, total, y = ctx.saved_tensors
            return shares[:, None] * grad_y, (x - y) @ grad_y / total

    def mean(x, w):
        sized("x", x, None, None)
        sized("w", w, x.shape[0])
        if x.dtype != w.dtype:
            raise TypeError(f"w: expected {x.dtype}, got {w.dtype}")
        positive("w", w)
        return Mean.apply(x, w)

    return mean


add(
    "weighted_rows_shares",
    weighted_rows,
    lambda: (real(4, 3), real(4, seed=1, positive=True)),
    bug="Forward divides in place what .to() returned, which for one dtype is the caller's tensor",
    trigger="weights compared before and after",
)


# Polynomial by Horner's rule
def horner(wrong):
    class Horner(Function):
        @staticmethod
        def forward(ctx, x, c):
            ctx.save_for_backward(x)
            y = c[-1].expand(x.shape).clone()
            ctx.steps = []
            for k in range(len(c) - 2, -1, -1):
                ctx.steps.append(y)
                y = y * x + c[k]
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            steps = ctx.steps if wrong else list(ctx.steps)
            grad_x, grad_c = torch.zeros_like(grad_y), []
            while steps:
                grad_c.append(grad_y.sum())
                grad_x = grad_x + grad_y * steps.pop()
                grad_y = grad_y * x
            return grad_x, torch.stack([*grad_c, grad_y.sum()])

    def polynomial(x, c):
        sized("c", c, None)
        return Horner.apply(x, c)

    return polynomial


add(
    "horner_pop",
    horner,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="Backward empties the list of steps",
    trigger="retain_graph and a second backward",
)
