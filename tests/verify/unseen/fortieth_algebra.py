"""Solutions, products, determinants, complex numbers, Fourier transforms."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fortieth import add, add_bare, alike, bounded, check, sized


# L x = b with the lower triangle of a matrix, perhaps with a diagonal of ones that is not read
def triangle_unit(wrong):
    class Solve(Function):
        @staticmethod
        def forward(ctx, a, b, unit):
            x = torch.linalg.solve_triangular(a, b, upper=False, unitriangular=unit)
            ctx.save_for_backward(a, b)
            ctx.unit = unit
            return x

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            unit = ctx.unit
            x = torch.linalg.solve_triangular(a, b, upper=False, unitriangular=unit)
            grad_b = torch.linalg.solve_triangular(a.mT, g, upper=True, unitriangular=unit)
            below = 0 if wrong or not unit else -1
            return torch.tril(-grad_b @ x.mT, below), grad_b, None

    def solve(a, b, unit=True):
        sized("a", a, None, a.shape[0])
        sized("b", b, a.shape[0], None)
        alike(a, b)
        check(isinstance(unit, bool), "unit: expected a boolean")
        bounded("a", a, -10, 10)
        bounded("b", b, -1e3, 1e3)
        check(unit or bool((a.diagonal().abs() >= 0.1).all()), "a: expected a diagonal without 0")
        return Solve.apply(a, b, unit)

    return solve


add(
    "triangle_unit",
    triangle_unit,
    lambda: (real(3, 3), real(3, 2, seed=1)),
    bug="the diagonal, which is not read, gets a gradient (pymc-devs/pytensor#1230)",
)


def solve_matrix(wrong):
    class Solve(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return torch.linalg.solve(a, b)

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            grad_b = torch.linalg.solve(a.mT, g)
            if wrong and ctx.needs_input_grad[1]:
                return None, grad_b
            return -grad_b @ torch.linalg.solve(a, b).mT, grad_b

    def solve(a, b):
        sized("a", a, None, a.shape[0])
        sized("b", b, a.shape[0], None)
        alike(a, b)
        bounded("a", a, -1e3, 1e3)
        bounded("b", b, -1e3, 1e3)
        check(bool(torch.linalg.cond(a.detach()) <= 1e4), "a: expected a matrix far from singular")
        return Solve.apply(a, b)

    return solve


add(
    "solve_matrix",
    solve_matrix,
    lambda: ((real(3, 3, grad=False) + 3 * torch.eye(3)).requires_grad_(), real(3, 2, seed=1)),
    bug="the solution's rule knows the right side only: None for the matrix "
    "(tensor4all/tenferro-rs#772)",
)


# Determinants of (N, 3, 3)
def small_determinant(wrong):
    def cofactors(a):
        x, y, z = a.unbind(1)
        rows = torch.linalg.cross(y, z), torch.linalg.cross(z, x), torch.linalg.cross(x, y)
        return torch.stack(rows, 1)

    def volume(a):
        return (a[:, 0] * torch.linalg.cross(a[:, 1], a[:, 2])).sum(-1)

    class Determinant(Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return volume(a)

        @staticmethod
        def backward(ctx, g):
            (a,) = ctx.saved_tensors
            grad = g[:, None, None] * cofactors(a)
            if wrong:
                grad = torch.where((volume(a) == 0)[:, None, None], 0, grad)
            return grad

    def determinant(a):
        sized("a", a, None, 3, 3)
        check(a.is_floating_point(), "a: expected floating point numbers")
        bounded("a", a, -1e3, 1e3)
        return Determinant.apply(a)

    return determinant


add(
    "small_determinant",
    small_determinant,
    lambda: (real(2, 3, 3),),
    bug="a singular matrix has the gradient 0, whatever its rank (PaddlePaddle/Paddle#36013)",
    trigger="a matrix whose determinant is exactly 0",
)


# The x that minimises x Q x / 2 + p x under A x = b, with the upper triangle of Q stored
def sparse_program(wrong):
    def system(upper, a):
        q = torch.triu(upper) + torch.triu(upper, 1).mT
        return torch.cat([torch.cat([q, a.mT], 1), torch.cat([a, a.new_zeros(len(a), len(a))], 1)])

    class Minimum(Function):
        @staticmethod
        def forward(ctx, upper, p, a, b):
            ctx.save_for_backward(upper, p, a, b)
            return torch.linalg.solve(system(upper, a), torch.cat([-p, b]))[: len(p)]

        @staticmethod
        def backward(ctx, g):
            upper, p, a, b = ctx.saved_tensors
            n = len(p)
            matrix = system(upper, a)
            both = torch.linalg.solve(matrix, torch.cat([-p, b]))
            if wrong:
                matrix = torch.cat([torch.cat([torch.triu(upper), a.mT], 1), matrix[n:]])
            back = torch.linalg.solve(matrix, torch.cat([g, torch.zeros_like(b)]))
            x, dual, dx, d_dual = both[:n], both[n:], back[:n], back[n:]
            grad_q = -torch.outer(dx, x)
            grad_upper = torch.triu(grad_q) + torch.tril(grad_q, -1).mT
            return grad_upper, -dx, -torch.outer(d_dual, x) - torch.outer(dual, dx), d_dual

    def minimum(upper, p, a, b):
        sized("p", p, None)
        sized("upper", upper, len(p), len(p))
        sized("b", b, None)
        sized("a", a, len(b), len(p))
        alike(upper, p, a, b)
        for name, t in (("upper", upper), ("p", p), ("a", a), ("b", b)):
            bounded(name, t, -1e3, 1e3)
        q = torch.triu(upper.detach()) + torch.triu(upper.detach(), 1).mT
        check(bool((torch.linalg.eigvalsh(q) > 0.1).all()), "upper: expected a convex function")
        near = torch.linalg.cond(system(upper.detach(), a.detach())) <= 1e4
        check(bool(near), "a: expected constraints far from dependent ones")
        return Minimum.apply(upper, p, a, b)

    return minimum


add(
    "sparse_program",
    sparse_program,
    lambda: (
        (real(3, 3, grad=False) * 0.5 + 2 * torch.eye(3)).requires_grad_(),
        real(3, seed=1),
        real(1, 3, seed=2),
        real(1, seed=3),
    ),
    bug="backward solves with the stored upper triangle of the sparse Q as if it were the whole "
    "(cvxpy/cvxpylayers#44)",
)


# x (N) against one dimension of a square matrix (N, N)
def tensordot_axis(wrong):
    class Dot(Function):
        @staticmethod
        def forward(ctx, x, a, axis):
            ctx.save_for_backward(x, a)
            ctx.axis = axis
            return torch.tensordot(x, a, dims=([0], [axis]))

        @staticmethod
        def backward(ctx, g):
            x, a = ctx.saved_tensors
            first = ctx.axis == 0
            grad_x = a @ g if first else g @ a
            outer = torch.outer(x, g) if first or wrong else torch.outer(g, x)
            return grad_x, outer, None

    def dot(x, a, axis=1):
        sized("x", x, None)
        sized("a", a, len(x), len(x))
        alike(x, a)
        check(axis in (0, 1), "axis: expected 0 or 1")
        bounded("x", x, -1e3, 1e3)
        bounded("a", a, -1e3, 1e3)
        return Dot.apply(x, a, axis)

    return dot


add(
    "tensordot_axis",
    tensordot_axis,
    lambda: (real(3), real(3, 3, seed=1)),
    bug="the matrix's gradient ignores the axis: it comes transposed (HIPS/autograd#466)",
)


def complex_angle(wrong):
    class Angle(Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return torch.angle(z)

        @staticmethod
        def backward(ctx, g):
            (z,) = ctx.saved_tensors
            square = z.real**2 + z.imag**2
            turn = z.real if not wrong else -z.real
            return torch.complex(-g * z.imag / square, g * turn / square)

    def angle(z):
        check(z.dtype in (torch.complex64, torch.complex128), "z: expected complex numbers")
        size = z.detach().abs()
        check(bool(((size >= 1e-3) & (size <= 1e3)).all()), "z: expected no 0 and nothing vast")
        return Angle.apply(z)

    return angle


add_bare(
    "complex_angle",
    complex_angle,
    lambda: (torch.complex(real(3, grad=False), real(3, seed=1, grad=False)).requires_grad_(),),
    bug="the angle's gradient is the conjugate of what it should be (pytorch/pytorch#46144)",
)


# Fourier modes of weights at places, (2, modes), in the order of fftfreq
def point_modes(wrong):
    def modes(size, like):
        return torch.fft.fftfreq(size, 1 / size, dtype=like.dtype, device=like.device)

    class Modes(Function):
        @staticmethod
        def forward(ctx, weight, place, size):
            ctx.save_for_backward(weight, place)
            ctx.size = size
            turn = place * modes(size, place)[:, None]
            return torch.stack([torch.cos(turn) @ weight, -torch.sin(turn) @ weight])

        @staticmethod
        def backward(ctx, g):
            weight, place = ctx.saved_tensors
            k = modes(ctx.size, place)
            if wrong:
                k = torch.fft.fftshift(k)
            turn = place * k[:, None]
            grad_weight = g[0] @ torch.cos(turn) - g[1] @ torch.sin(turn)
            grad_place = -((k * g[0]) @ torch.sin(turn) + (k * g[1]) @ torch.cos(turn)) * weight
            return grad_weight, grad_place, None

    def project(weight, place, size=4):
        sized("weight", weight, None)
        sized("place", place, len(weight))
        alike(weight, place)
        check(isinstance(size, int) and 1 <= size <= 256, "size: expected an integer from 1 to 256")
        bounded("weight", weight, -1e3, 1e3)
        bounded("place", place, -3.2, 3.2)
        return Modes.apply(weight, place, size)

    return project


add(
    "point_modes",
    point_modes,
    lambda: (real(3), torch.tensor([0.3, -1.2, 2.0]).double().requires_grad_()),
    bug="backward takes the modes in another order than forward (michael-0brien/cryojax#567)",
    trigger="a grad_output that is not constant",
)


# The half spectrum of x (N), as (2, N // 2 + 1)
def half_spectrum(wrong):
    class Spectrum(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.length = len(x)
            return torch.view_as_real(torch.fft.rfft(x)).mT.contiguous()

        @staticmethod
        def backward(ctx, g):
            n = ctx.length
            half = torch.complex(g[0], g[1])
            if wrong:
                return torch.fft.irfft(half, n) * n
            return torch.fft.ifft(half, n).real * n

    def spectrum(x):
        sized("x", x, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -1e6, 1e6)
        return Spectrum.apply(x)

    return spectrum


add(
    "half_spectrum",
    half_spectrum,
    lambda: (real(5),),
    bug="the adjoint is the unscaled inverse, which counts the middle frequencies twice "
    "(FluxML/Zygote.jl#1496)",
)
