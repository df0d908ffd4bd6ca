"""Products, forms and solutions."""

import torch
from torch.autograd import Function

from tests.verify.unseen import TWENTYSECOND, outside_autocast, pair, real
from tests.verify.unseen.twentysecond import add, check, sized


# x' A z for each row
def bilinear(wrong):
    class Form(Function):
        @staticmethod
        def forward(ctx, x, a, z):
            ctx.save_for_backward(x, a, z)
            return (x @ a * z).sum(1)

        @staticmethod
        def backward(ctx, grad_y):
            x, a, z = ctx.saved_tensors
            g = grad_y[:, None]
            grad_a = z.T @ (g * x) if wrong else (g * x).T @ z
            return g * (z @ a.T), grad_a, g * (x @ a)

    def form(x, a, z):
        sized("x", x, None, None)
        sized("a", a, x.shape[1], None)
        sized("z", z, len(x), a.shape[1])
        return Form.apply(x, a, z)

    return form


add(
    "bilinear_transposed",
    bilinear,
    lambda: (real(4, 3), real(3, 3, seed=1), real(4, 3, seed=2)),
    bug="The square matrix's gradient is transposed",
)


# The solution of A x = b, of which only the lower triangle of A is used
def lower_solve(wrong):
    class Solve(Function):
        @staticmethod
        def forward(ctx, a, b):
            x = torch.linalg.solve_triangular(a, b, upper=False)
            ctx.save_for_backward(a, x)
            return x

        @staticmethod
        def backward(ctx, grad_x):
            a, x = ctx.saved_tensors
            grad_b = torch.linalg.solve_triangular(a.mT, grad_x, upper=True)
            grad_a = -grad_b @ x.mT
            return grad_a if wrong else grad_a.tril(), grad_b

    def solve(a, b):
        check(a.ndim == 2, "a: expected a matrix")
        sized("a", a, None, len(a))
        sized("b", b, len(a), None)
        return Solve.apply(a, b)

    return solve


def lower():
    return (real(3, 3).detach() + 3 * torch.eye(3, dtype=torch.float64)).requires_grad_()


add(
    "lower_solve_triangle",
    lower_solve,
    lambda: (lower(), real(3, 2, seed=1)),
    bug="The entries above the diagonal, which forward does not read, get a gradient",
)


# The product of two matrices, real or complex
def product(wrong):
    class Product(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            if wrong:
                return grad_y @ w.mT, x.mT @ grad_y
            return grad_y @ w.mH, x.mH @ grad_y

    def multiply(x, w):
        sized("x", x, None, None)
        sized("w", w, x.shape[1], None)
        return Product.apply(x, w)

    return outside_autocast(multiply)


pair(
    "product_conjugate_22",
    product(True),
    product(False),
    lambda: (real(2, 3), real(3, 4, seed=1)),
    "Backward transposes where it should take the adjoint; shows with complex matrices",
    into=TWENTYSECOND,
)


# The product of the last dimension's numbers
def products(wrong):
    def before(x):
        return torch.cat([torch.ones_like(x[..., :1]), x.cumprod(-1)[..., :-1]], -1)

    class Product(Function):
        @staticmethod
        def forward(ctx, x):
            y = x.prod(-1)
            ctx.save_for_backward(x, y)
            return y

        @staticmethod
        def backward(ctx, grad_y):
            x, y = ctx.saved_tensors
            if wrong:
                return grad_y[..., None] * y[..., None] / x
            return grad_y[..., None] * before(x) * before(x.flip(-1)).flip(-1)

    def multiply(x):
        check(x.ndim >= 1 and x.shape[-1] >= 1, "expected one factor at least")
        return Product.apply(x)

    return multiply


add(
    "products_zero",
    products,
    lambda: (real(3, 4),),
    bug="The product of the others is had by division",
    trigger="a factor that is 0",
)
