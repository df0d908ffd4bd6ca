"""Linear algebra, complex numbers and an implicit root."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.twentysixth import add, add_bare, check, finite, positive, same, sized


def conditioned(**matrices):
    """Refuse matrices that are near to losing their rank."""
    finite(**matrices)
    for name, a in matrices.items():
        check(bool(torch.linalg.cond(a) < 100), f"{name}: expected a condition below 100")


# exp(A) by Taylor's polynomial of degree 4
def taylor_exp(wrong):
    def turned(a):
        return a.transpose(0, 1) if wrong else a.mT

    def stages(a):
        one = torch.eye(a.shape[-1], device=a.device, dtype=a.dtype)
        b = [one.expand_as(a)]
        for k in (4, 3, 2, 1):
            b.append(one + a @ b[-1] / k)
        return b

    class Exp(Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return stages(a)[-1]

        @staticmethod
        def backward(ctx, grad_y):
            (a,) = ctx.saved_tensors
            b, grad_a = stages(a), 0
            for k, inner in zip((1, 2, 3, 4), b[-2::-1], strict=True):
                grad_a = grad_a + grad_y @ turned(inner) / k
                grad_y = turned(a) @ grad_y / k
            return grad_a

    def exp(a):
        check(a.ndim >= 2 and a.shape[-1] == a.shape[-2] >= 1, "a: expected square matrices")
        return Exp.apply(a)

    return exp


add(
    "taylor_exp_batch",
    taylor_exp,
    lambda: (real(3, 3),),
    bug="Backward transposes the first two dimensions",
    trigger="a batch of matrices",
)


# exp([[a, b], [b, d]]) of rows (a, b, d), as rows
def symmetric_exp(wrong):
    def parts(x):
        a, b, d = x.unbind(-1)
        h = (a - d) / 2
        q = torch.hypot(h, b)
        small = q == 0
        ratio = torch.where(small, 1, q.sinh() / torch.where(small, 1, q))
        return ((a + d) / 2).exp(), h, b, q, ratio

    def second(q, ratio):
        # (cosh q - sinh q / q) / q², by its series near 0
        if wrong:
            return (q.cosh() - ratio) / q**2
        s = q**2
        series = 1 / 3 + s / 30 + s**2 / 840 + s**3 / 45360 + s**4 / 3991680 + s**5 / 518918400
        near = q < 0.5
        return torch.where(near, series, (q.cosh() - ratio) / torch.where(near, 1, s))

    class Exp(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            e, h, b, q, ratio = parts(x)
            c = q.cosh()
            return e[..., None] * torch.stack((c + ratio * h, ratio * b, c - ratio * h), -1)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            e, h, b, q, ratio = parts(x)
            g0, g1, g2 = (grad_y * e[..., None]).unbind(-1)
            c, t = q.cosh(), second(q, ratio)
            grad_c, grad_ratio = g0 + g2, (g0 - g2) * h + g1 * b
            common = grad_c * ratio + grad_ratio * t
            grad_h = (g0 - g2) * ratio + common * h
            grad_b = g1 * ratio + common * b
            grad_m = grad_c * c + grad_ratio * ratio
            return torch.stack(((grad_m + grad_h) / 2, grad_b, (grad_m - grad_h) / 2), -1)

    def exp(x):
        check(x.ndim >= 1 and x.shape[-1] == 3, "x: expected (*, 3)")
        check(bool((x.abs() <= 5).all()), "x: expected numbers from -5 to 5")
        return Exp.apply(x)

    return exp


add(
    "symmetric_exp_equal",
    symmetric_exp,
    lambda: (real(4, 3),),
    bug="Forward has sinh q / q at 0, backward's next quotient is 0 / 0 there, and rounds near it",
    trigger="a multiple of the identity",
)


# Pseudoinverse of tall matrices of full rank
def pseudoinverse(wrong):
    class Inverse(Function):
        @staticmethod
        def forward(ctx, x):
            p = torch.linalg.pinv(x)
            ctx.save_for_backward(x, p)
            return p

        @staticmethod
        def backward(ctx, grad_p):
            x, p = ctx.saved_tensors
            grad_x = -p.mT @ grad_p @ p.mT
            if wrong:
                return grad_x
            outside = torch.eye(len(x), device=x.device, dtype=x.dtype) - x @ p
            return grad_x + outside @ grad_p.mT @ p @ p.mT

    def inverse(x):
        sized("x", x, None, None)
        check(x.shape[0] >= x.shape[1], "x: expected as many rows as columns, or more")
        conditioned(x=x)
        return Inverse.apply(x)

    return inverse


add(
    "pseudoinverse_square",
    pseudoinverse,
    lambda: ((real(3, 3).detach() + 2 * torch.eye(3, dtype=F64)).requires_grad_(),),
    bug="The gradient is the inverse's: the part outside of the columns' span is missing",
    trigger="more rows than columns",
)


# Solution of L Lᴴ x = b by the factor
def factor_solve(wrong):
    def turned(a):
        return a.mT if wrong else a.mH

    class Solve(Function):
        @staticmethod
        def forward(ctx, b, factor):
            x = torch.cholesky_solve(b, factor)
            ctx.save_for_backward(x, factor)
            return x

        @staticmethod
        def backward(ctx, grad_x):
            x, factor = ctx.saved_tensors
            grad_b = torch.cholesky_solve(grad_x, factor.tril())
            grad_a = -grad_b @ turned(x)
            return grad_b, ((grad_a + turned(grad_a)) @ factor.tril()).tril()

    def solve(b, factor):
        sized("factor", factor, None, len(factor))
        sized("b", b, len(factor), None)
        conditioned(factor=factor.tril())
        return Solve.apply(b, factor)

    return solve


def lower(seed):
    return (real(3, 3, seed=seed).detach().tril() + 2 * torch.eye(3, dtype=F64)).requires_grad_()


add_bare(
    "factor_solve_complex",
    factor_solve,
    lambda: (real(3, 2), lower(1)),
    bug="Backward transposes without conjugating",
    trigger="complex matrices",
)


# Cross product, with a forward mode
def cross(wrong):
    class Cross(Function):
        @staticmethod
        def forward(a, b):
            return torch.linalg.cross(a, b)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            a, b = ctx.saved_tensors
            return torch.linalg.cross(b, grad_y), torch.linalg.cross(grad_y, a)

        @staticmethod
        def jvp(ctx, tangent_a, tangent_b):
            a, b = ctx.saved_tensors
            y = torch.zeros_like(a)
            if tangent_a is not None:
                y = y + torch.linalg.cross(tangent_a, b)
            if tangent_b is not None:
                second = (tangent_b, a) if wrong else (a, tangent_b)
                y = y + torch.linalg.cross(*second)
            return y

    def product(a, b):
        same(a, b)
        check(a.ndim >= 1 and a.shape[-1] == 3, "a: expected (*, 3)")
        return Cross.apply(a, b)

    return product


add(
    "cross_tangent",
    cross,
    lambda: (real(4, 3), real(4, 3, seed=1)),
    bug="The second tangent's product has its factors exchanged",
    trigger="forward mode",
)


# |z|²
def squared_magnitude(wrong):
    class Squared(Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return (z * z.conj()).real.clone()

        @staticmethod
        def backward(ctx, grad_y):
            (z,) = ctx.saved_tensors
            return grad_y * z if wrong else 2 * grad_y * z

    return Squared.apply


add_bare(
    "squared_magnitude_wirtinger",
    squared_magnitude,
    lambda: (torch.complex(real(3, 4).detach(), real(3, 4, seed=1).detach()).requires_grad_(),),
    bug="The gradient is the Wirtinger derivative, half of torch's",
)


# The root of x³ + a x = b, a > 0, by Newton's method
def cubic_root(wrong):
    class Root(Function):
        @staticmethod
        def forward(ctx, a, b):
            size = b.abs()
            x = torch.minimum(size / a, size ** (1 / 3))
            for _ in range(60):
                step = (x**3 + a * x - size) / (3 * x * x + a)
                x = x - step
                if wrong and step.abs().max() <= 1e-15:
                    break
            x = x * b.sgn()
            ctx.save_for_backward(x, a)
            return x

        @staticmethod
        def backward(ctx, grad_x):
            x, a = ctx.saved_tensors
            grad_b = grad_x / (3 * x * x + a)
            return -grad_b * x, grad_b

    def root(a, b):
        same(a, b)
        positive("a", a)
        finite(b=b)
        return Root.apply(a, b)

    return root


add(
    "cubic_root_empty",
    cubic_root,
    lambda: (real(5, positive=True), real(5, seed=1)),
    bug="Newton's method asks for the largest step, which an empty tensor does not have",
    trigger="an empty tensor",
    missed="forward raises, loudly",
)
