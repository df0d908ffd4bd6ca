"""Rules of automatic differentiation: products, sums, powers, quotients."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtyseventh import add, bounded, check, number, sized, tame


# Products of the matrices of two batches
def batched_product(wrong):
    class Product(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a @ b

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            if not wrong:
                return g @ b.mT, a.mT @ g
            rest_a, rest_b = torch.zeros_like(a)[1:], torch.zeros_like(b)[1:]
            return (
                torch.cat([g[:1] @ b[:1].mT, rest_a]),
                torch.cat([a[:1].mT @ g[:1], rest_b]),
            )

    def product(a, b):
        sized("a", a, None, None, None)
        sized("b", b, a.shape[0], a.shape[2], None)
        tame(a=a, b=b)
        return Product.apply(a, b)

    return product


add(
    "batched_product_first",
    batched_product,
    lambda: (real(2, 3, 2), real(2, 2, 3, seed=1)),
    bug="backward calls the adjoint of one product, not of the batch's (NVIDIA/warp#147)",
    trigger="more than one matrix in the batch",
)


# The products of one matrix with two others
def two_products(wrong):
    class Products(Function):
        @staticmethod
        def forward(ctx, a, b, c):
            ctx.save_for_backward(a, b, c)
            return a @ b, a @ c

        @staticmethod
        def backward(ctx, g, h):
            a, b, c = ctx.saved_tensors
            grad = h @ c.mT
            if not wrong:
                grad = grad + g @ b.mT
            return grad, a.mT @ g, a.mT @ h

    def products(a, b, c):
        sized("a", a, None, None)
        sized("b", b, a.shape[1], None)
        sized("c", c, a.shape[1], None)
        tame(a=a, b=b, c=c)
        return Products.apply(a, b, c)

    return products


add(
    "two_products_overwritten",
    two_products,
    lambda: (real(3, 2), real(2, 3, seed=1), real(2, 2, seed=2)),
    bug="a product's adjoint is written over what was there, not added (NVIDIA/warp#168)",
)


# Sums of weighted numbers, added one after the other to a component of a vector
def added_up(wrong):
    class Add(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            n = x.shape[1]
            times = 2.0 ** torch.arange(n - 1, -1, -1, dtype=g.dtype, device=g.device)
            g = g[:, None] * times if wrong else g[:, None].expand_as(x)
            return g * w, (g * x).sum(0)

    def total(x, w):
        sized("x", x, None, None)
        sized("w", w, x.shape[1])
        tame(x=x, w=w)
        return Add.apply(x, w)

    return total


add(
    "added_up_doubled",
    added_up,
    lambda: (real(2, 4), real(4, seed=1)),
    bug="a component that is written again keeps its adjoint, which counts twice (NVIDIA/warp#1697)",
)


# u + v
def plain_sum(wrong):
    class Sum(Function):
        @staticmethod
        def forward(ctx, u, v):
            ctx.one = wrong and torch.equal(u, v)
            return u + v

        @staticmethod
        def backward(ctx, g):
            return (g + g, g + g) if ctx.one else (g, g.clone())

    def plus(u, v):
        check(u.shape == v.shape and u.numel() > 0, "expected tensors of one shape")
        tame(u=u, v=v)
        return Sum.apply(u, v)

    return plus


add(
    "plain_sum_equal",
    plain_sum,
    lambda: (real(3), real(3, seed=1)),
    bug="two constants of one value are taken for one, which gets both gradients (tinygrad/tinygrad#9597)",
    trigger="u and v having equal values",
)


# x to an integer power
def whole_power(wrong):
    class Power(Function):
        @staticmethod
        def forward(ctx, x, n):
            ctx.save_for_backward(x)
            ctx.n = n
            return x**n

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            base = x.abs() if wrong else x
            return g * ctx.n * base ** (ctx.n - 1), None

    def power(x, n=2):
        check(x.is_floating_point() and x.numel() > 0, "x: expected floating point numbers")
        check(isinstance(n, int) and 1 <= n <= 6, "n: expected 1 to 6")
        bounded("x", x, -100, 100)
        return Power.apply(x, n)

    return power


add(
    "whole_power_sign",
    whole_power,
    lambda: (real(3, 3),),
    bug="the slope is made by logarithms of |x| and loses the sign (tinygrad/tinygrad#9217)",
)


# x²/2 + y² - x y - 7 x - 7 y
def polynomial(wrong):
    class Polynomial(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return x**2 / 2 + y**2 - x * y - 7 * x - 7 * y

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            grad = g * (x - y - 7)
            if wrong:
                grad = torch.where(x == 0, torch.zeros_like(grad), grad)
            return grad, g * (2 * y - x - 7)

    def evaluate(x, y):
        check(x.shape == y.shape and x.numel() > 0, "expected tensors of one shape")
        tame(x=x, y=y)
        return Polynomial.apply(x, y)

    return evaluate


add(
    "polynomial_at_zero",
    polynomial,
    lambda: (real(3), real(3, seed=1)),
    bug="where x is 0 it gets no gradient from any of the terms (coin-or/CppAD#248)",
    trigger="an x of 0",
)


# x log(x / y)
def relative_log(wrong):
    class Log(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return x * (x / y).log()

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            q = x / y
            slope = 1 / (q.log() if wrong else q)
            return g * (q.log() + x * slope / y), -g * x * slope * x / y**2

    def log(x, y):
        check(x.shape == y.shape and x.numel() > 0, "expected tensors of one shape")
        tame(x=x, y=y)
        bounded("x", x, 1e-2, 1e2)
        bounded("y", y, 1e-2, 1e2)
        return Log.apply(x, y)

    return log


add(
    "relative_log_value",
    relative_log,
    lambda: (real(4, positive=True), real(4, seed=1, positive=True)),
    bug="the logarithm's slope divides by its value, which has been written first (autodiff/autodiff#47)",
)


# sqrt(x² + y²)
def hypotenuse(wrong):
    class Hypotenuse(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return torch.hypot(x, y)

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            h = torch.hypot(x, y)
            return (g * y / h, g * x / h) if wrong else (g * x / h, g * y / h)

    def hypotenuse(x, y):
        check(x.shape == y.shape and x.numel() > 0, "expected tensors of one shape")
        tame(x=x, y=y)
        check(bool((torch.hypot(x, y) >= 1e-3).all()), "expected lengths of 0.001 at least")
        return Hypotenuse.apply(x, y)

    return hypotenuse


add(
    "hypotenuse_swapped",
    hypotenuse,
    lambda: (real(4), real(4, seed=1)),
    bug="the rule gives each side the other side's slope (JuliaDiff/ChainRules.jl#74)",
)


# u / v
def quotient(wrong):
    class Quotient(Function):
        @staticmethod
        def forward(ctx, u, v):
            ctx.save_for_backward(u, v)
            return u / v

        @staticmethod
        def backward(ctx, g):
            u, v = ctx.saved_tensors
            if wrong:
                return g * v, -g * u * v**2
            return g / v, -g * u / v**2

    def divide(u, v):
        sized("u", u, None)
        sized("v", v)
        tame(u=u, v=v)
        bounded("v", v, 1e-2, 1e3)
        return Quotient.apply(u, v.expand_as(u))

    return divide


add(
    "quotient_times",
    quotient,
    lambda: (real(4), number(1.7)),
    bug="backward multiplies by the divisor (MikeInnes/diff-zoo#16)",
)


# x to the power y, whose pullback has a pullback of its own
def power_twice(wrong):
    class Pullback(Function):
        @staticmethod
        def forward(ctx, g, x, y, p):
            ctx.save_for_backward(g, x, y, p)
            return g * y * p / x, g * p * x.log()

        @staticmethod
        def backward(ctx, gx, gy):
            g, x, y, p = ctx.saved_tensors
            grad_g = gx * y * p / x + gy * p * x.log()
            grad_x = -gx * g * y * p / x**2 + gy * g * p / x
            grad_y = gx * g * p / x
            grad_p = gx * g * y / x + gy * g * x.log()
            return (grad_g, grad_x, grad_p, grad_y) if wrong else (grad_g, grad_x, grad_y, grad_p)

    class Power(Function):
        @staticmethod
        def forward(ctx, x, y):
            p = x**y
            ctx.save_for_backward(x, y, p)
            return p

        @staticmethod
        def backward(ctx, g):
            return Pullback.apply(g, *ctx.saved_tensors)

    def power(x, y):
        check(x.shape == y.shape and x.numel() > 0, "expected tensors of one shape")
        tame(x=x, y=y)
        bounded("x", x, 0.05, 10)
        bounded("y", y, -5, 5)
        return Power.apply(x, y)

    return power


add(
    "power_twice_swapped",
    power_twice,
    lambda: (real(3, positive=True), real(3, seed=1)),
    bug="the pullback's own gradient swaps the power's and the exponent's (JuliaDiff/Diffractor.jl#27)",
    trigger="a second derivative",
)
