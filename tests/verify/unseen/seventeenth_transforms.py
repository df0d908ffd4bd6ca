"""Functions with rules for forward mode and for vmap."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.seventeenth import add
from tests.verify.unseen.sixteenth import expect


class Gegenbauer(Function):
    """Of degree n and order a; its derivative is 2 a times that of degree n - 1, order a + 1."""

    @staticmethod
    def polynomial(x, n, a):
        before, now = torch.zeros_like(x), torch.ones_like(x)
        for k in range(1, n + 1):
            before, now = now, (2 * (k + a - 1) * x * now - (k + 2 * a - 2) * before) / k
        return now if n >= 0 else before

    @staticmethod
    def forward(x, n, a):
        return Gegenbauer.polynomial(x, n, a)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.options = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def slope(ctx, order):
        n, a = ctx.options
        return 2 * a * Gegenbauer.polynomial(ctx.saved_tensors[0], n - 1, order(a))

    @staticmethod
    def backward(ctx, g):
        return g * Gegenbauer.slope(ctx, lambda a: a + 1), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return tangent * Gegenbauer.slope(ctx, lambda a: a + 1)


class GegenbauerOrder(Gegenbauer):
    @staticmethod
    def jvp(ctx, tangent, *_):
        return tangent * Gegenbauer.slope(ctx, lambda a: a)


def _gegenbauer(function):
    def gegenbauer(x, n=3, a=0.5):
        """Gegenbauer's polynomial of degree n, from 0 to 8, and order a, from 0.1 to 4, of x (*), |x| <= 2."""
        expect(isinstance(n, int) and 0 <= n <= 8 and 0.1 <= a <= 4, "n, a", (n, a))
        expect((x.abs() <= 2).all(), "|x| <= 2", x)
        return function.apply(x, n, a)

    return gegenbauer


add(
    "gegenbauer_jvp",
    _gegenbauer,
    GegenbauerOrder,
    Gegenbauer,
    lambda: ((real(3, 4, grad=False) / 2).requires_grad_(),),
    bug="jvp takes the derivative's polynomial of order a, not a + 1",
    shows="forward mode",
)


class Crossfade(Function):
    @staticmethod
    def forward(a, b, t):
        return a + t * (b - a)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        a, b, t = ctx.saved_tensors
        return g * (1 - t), g * t, g * (b - a)

    @staticmethod
    def jvp(ctx, da, db, dt):
        a, b, t = ctx.saved_tensors
        out = torch.zeros_like(a)
        for d, slope in ((da, 1 - t), (db, t), (dt, b - a)):
            out = out if d is None else out + d * slope
        return out


class CrossfadeWeight(Crossfade):
    @staticmethod
    def jvp(ctx, da, db, dt):
        return Crossfade.jvp(ctx, da, db, None)


def _crossfade(function):
    def crossfade(a, b, t):
        """a + t (b - a), of one shape."""
        expect(a.shape == b.shape == t.shape, "one shape", tuple(t.shape))
        return function.apply(a, b, t)

    return crossfade


add(
    "crossfade_tangent",
    _crossfade,
    CrossfadeWeight,
    Crossfade,
    lambda: (real(3, 4), real(3, 4, seed=1), torch.full((3, 4), 0.25, dtype=F64)),
    bug="jvp lacks the weight's tangent",
    shows="forward mode in the weight",
)


class Siren(Function):
    @staticmethod
    def forward(x, w, omega):
        return (omega * (x @ w.mT)).sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, ctx.omega = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        d = g * ctx.omega * (ctx.omega * (x @ w.mT)).cos()
        return (d @ w).sum_to_size(x.shape), (d.mT @ x).sum_to_size(w.shape), None

    @staticmethod
    def batched(function, in_dims, x, w, omega):
        x, w = (
            a if dim is None else a.movedim(dim, 0)
            for a, dim in zip((x, w), in_dims[:2], strict=True)
        )
        return function.apply(x, w, omega)

    @staticmethod
    def vmap(info, in_dims, x, w, omega):
        return Siren.batched(Siren, in_dims, x, w, omega), 0


class SirenOutDim(Siren):
    @staticmethod
    def vmap(info, in_dims, x, w, omega):
        return Siren.batched(SirenOutDim, in_dims, x, w, omega), in_dims[0] or 0


def _siren(function):
    def siren(x, w, omega=30.0):
        """sin(omega x wᵀ) of x (N, D), w (O, D); omega from 0.1 to 100. May be vmapped."""
        expect(
            x.dim() == w.dim() == 2 and x.shape[1] == w.shape[1],
            "x (N, D), w (O, D)",
            tuple(w.shape),
        )
        expect(0.1 <= omega <= 100, "omega from 0.1 to 100", omega)
        return function.apply(x, w, omega)

    return siren


add(
    "siren_vmap",
    _siren,
    SirenOutDim,
    Siren,
    lambda: (real(3, 4), real(2, 4, seed=1)),
    bug="vmap's rule says that the output's batch is where the input's was; it is first",
    shows="vmap over a dimension other than the first",
)


class PolynomialKernel(Function):
    @staticmethod
    def forward(x, y, c, degree):
        return (x @ y.mT + c) ** degree

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, *ctx.options = inputs
        ctx.save_for_backward(x, y)

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        c, degree = ctx.options
        d = g * degree * (x @ y.mT + c) ** (degree - 1)
        return (d @ y).sum_to_size(x.shape), (d.mT @ x).sum_to_size(y.shape), None, None

    @staticmethod
    def vmap(info, in_dims, x, y, c, degree):
        x, y = (
            a if dim is None else a.movedim(dim, 0)
            for a, dim in zip((x, y), in_dims[:2], strict=True)
        )
        return PolynomialKernel.apply(x, y, c, degree), 0


class PolynomialKernelDim(PolynomialKernel):
    @staticmethod
    def vmap(info, in_dims, x, y, c, degree):
        dim = next(d for d in in_dims if d is not None)
        x, y = (
            a if d is None else a.movedim(dim, 0) for a, d in zip((x, y), in_dims[:2], strict=True)
        )
        return PolynomialKernelDim.apply(x, y, c, degree), 0


def _polynomial_kernel(function):
    def polynomial_kernel(x, y, c=1.0, degree=3):
        """(x yᵀ + c)^degree of x (N, D), y (M, D); c from 0 to 10, degree from 1 to 6. May be vmapped."""
        expect(
            x.dim() == y.dim() == 2 and x.shape[1] == y.shape[1],
            "x (N, D), y (M, D)",
            tuple(y.shape),
        )
        expect(degree in range(1, 7) and 0 <= c <= 10, "c, degree", (c, degree))
        return function.apply(x, y, c, degree)

    return polynomial_kernel


add(
    "polynomial_kernel_vmap",
    _polynomial_kernel,
    PolynomialKernelDim,
    PolynomialKernel,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="vmap's rule takes both inputs' batch to be in the dimension where one has it",
    shows="vmap over different dimensions of x and y",
)
