"""What backward keeps, shares and cuts off: solvers, tables, circuits."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtyseventh import add, alike, bounded, check, sized, tame


# x³ - x
def cubic(wrong):
    class Cubic(Function):
        @staticmethod
        def forward(ctx, x):
            if wrong:
                ctx.x = x
            else:
                ctx.save_for_backward(x)
            return x**3 - x

        @staticmethod
        def backward(ctx, g):
            x = ctx.x if wrong else ctx.saved_tensors[0]
            return g * (3 * x**2 - 1)

    def evaluate(x):
        check(x.is_floating_point() and x.numel() > 0, "x: expected floating point numbers")
        bounded("x", x, -100, 100)
        return Cubic.apply(x)

    return evaluate


add(
    "cubic_current",
    cubic,
    lambda: (real(4),),
    bug="backward takes what the input holds by then, and nothing tells of a change (NVIDIA/warp#1350)",
    trigger="an input that is changed in place between forward and backward",
)


# Where an arm in the plane ends: lengths (J), angles (B, J)
def arm_end(wrong):
    class End(Function):
        @staticmethod
        def forward(ctx, angles, lengths):
            ctx.save_for_backward(angles, lengths)
            ctx.buffer = torch.zeros_like(angles)
            a = angles.cumsum(1)
            return torch.stack([(lengths * a.cos()).sum(1), (lengths * a.sin()).sum(1)], 1)

        @staticmethod
        def backward(ctx, g):
            angles, lengths = ctx.saved_tensors
            a = angles.cumsum(1)
            gx, gy = g[:, :1], g[:, 1:]
            each = lengths * (gy * a.cos() - gx * a.sin())
            grad = each.flip(1).cumsum(1).flip(1)
            if wrong:
                grad = ctx.buffer = ctx.buffer + grad
            return grad, (gx * a.cos() + gy * a.sin()).sum(0)

    def end(angles, lengths):
        sized("angles", angles, None, None)
        sized("lengths", lengths, angles.shape[1])
        tame(bound=100, angles=angles, lengths=lengths)
        return End.apply(angles, lengths)

    return end


add(
    "arm_end_again",
    arm_end,
    lambda: (real(2, 3), real(3, seed=1, positive=True)),
    bug="the gradient's memory is added to and never set to 0 (NVIDIA/warp#159)",
    trigger="a second backward through one graph",
)


# Euler's method for y' = tanh(y w), its adjoint going back over the steps
def euler(wrong):
    def path(y, w, steps):
        states = [y]
        for _ in range(steps - 1):
            states.append(states[-1] + (states[-1] @ w).tanh() / steps)
        return states

    class Euler(Function):
        @staticmethod
        def forward(ctx, y, w, steps):
            ctx.save_for_backward(y, w)
            ctx.steps = steps
            last = path(y, w, steps)[-1]
            return last + (last @ w).tanh() / steps

        @staticmethod
        def backward(ctx, g):
            y, w = ctx.saved_tensors
            grad = torch.zeros_like(w)
            for state in reversed(path(y, w, ctx.steps)):
                h = g * (1 - (state @ w).tanh().square()) / ctx.steps
                if not wrong:
                    grad = grad + state.mT @ h
                g = g + h @ w.mT
            return g, grad, None

    def solve(y, w, steps=4):
        check(isinstance(steps, int) and 1 <= steps <= 100, "steps: expected 1 to 100")
        sized("y", y, None, None)
        sized("w", w, y.shape[1], y.shape[1])
        tame(bound=10, y=y, w=w)
        return Euler.apply(y, w, steps)

    return solve


add(
    "euler_parameters",
    euler,
    lambda: (real(3, 2), real(2, 2, seed=1)),
    bug="the adjoint finds no parameters in a replica: their gradient is 0 (rtqichen/torchdiffeq#119)",
)


# A cubic spline on 0 to 1, its coefficients in a table
def tabulated(wrong):
    def parts(x, table):
        n = len(table) - 3
        piece = (x.detach() * n).floor().clamp(0, n - 1)
        i = piece.long()
        return x * n - piece, [table[i + j] for j in range(4)]

    class Spline(Function):
        @staticmethod
        def forward(ctx, x, table):
            ctx.save_for_backward(x, table)
            u, (a, b, c, d) = parts(x, table)
            y = a * (1 - u) ** 3 + b * (3 * u**3 - 6 * u**2 + 4)
            return (y + c * (1 + 3 * u + 3 * u**2 - 3 * u**3) + d * u**3) / 6

        @staticmethod
        def backward(ctx, g):
            x, table = ctx.saved_tensors
            u, (a, b, c, d) = parts(x.detach() if wrong else x, table)
            slope = b * (3 * u**2 - 4 * u) - a * (1 - u) ** 2
            slope = slope + c * (1 + 2 * u - 3 * u**2) + d * u**2
            return g * slope / 2 * (len(table) - 3), None

    def look_up(x, table):
        check(x.numel() > 0, "x: expected numbers")
        sized("table", table, None)
        check(len(table) >= 4, "table: expected four numbers at least")
        check(not table.requires_grad, "table: expected constants")
        tame(x=x, table=table)
        bounded("x", x, 0, 1)
        return Spline.apply(x, table)

    return look_up


add(
    "tabulated_second",
    tabulated,
    lambda: (
        torch.tensor([0.1, 0.35, 0.6, 0.9], dtype=torch.float64, requires_grad=True),
        real(6, seed=1, grad=False),
    ),
    bug="the slope comes from a kernel that autograd does not see (deepmodeling/deepmd-kit#5537)",
    trigger="a second derivative",
)


# Spherical harmonics of degree two, without their factors
def harmonics(wrong):
    def slopes(r):
        x, y, z = r.unbind(1)
        o = torch.zeros_like(x)
        rows = [(y, x, o), (o, z, y), (-2 * x, -2 * y, 4 * z), (z, o, x), (2 * x, -2 * y, o)]
        return torch.stack([torch.stack(row, 1) for row in rows], 1)

    class Harmonics(Function):
        @staticmethod
        def forward(ctx, r):
            ctx.save_for_backward(r)
            ctx.slopes = slopes(r)
            x, y, z = r.unbind(1)
            return torch.stack([x * y, y * z, 2 * z**2 - x**2 - y**2, x * z, x**2 - y**2], 1)

        @staticmethod
        def backward(ctx, g):
            (r,) = ctx.saved_tensors
            return torch.einsum("nk,nkd->nd", g, ctx.slopes if wrong else slopes(r))

    def evaluate(r):
        sized("r", r, None, 3)
        tame(r=r)
        return Harmonics.apply(r)

    return evaluate


add(
    "harmonics_second",
    harmonics,
    lambda: (real(3, 3),),
    bug="the slopes that forward keeps are constants to a second derivative (lab-cosmo/sphericart#59)",
    trigger="a second derivative",
)


# Ridge regression with a fixed design: the solution b of (x'x + 1) b = x'y
def ridge(wrong):
    class Ridge(Function):
        @staticmethod
        def forward(ctx, y, x):
            one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            ctx.kept = torch.linalg.solve(x.mT @ x + one, x.mT)
            return ctx.kept @ y

        @staticmethod
        def backward(ctx, g):
            if wrong:
                ctx.kept = ctx.kept * g[:, None]
                return ctx.kept.sum(0), None
            return g @ ctx.kept, None

    def solve(y, x):
        sized("x", x, None, None)
        sized("y", y, len(x))
        check(not x.requires_grad, "x: expected constants")
        alike(y, x)
        bounded("y", y, -1e3, 1e3)
        bounded("x", x, -3, 3)
        return Ridge.apply(y, x)

    return solve


add(
    "ridge_again",
    ridge,
    lambda: (real(4), real(4, 2, seed=1, grad=False)),
    bug="differentiating changes what the solver keeps (cvxpy/cvxpylayers#119)",
    trigger="a second backward through one graph, with cotangents other than ones",
)


# cos(a) sin(b) exp(-c), each gradient by its index
def circuit(wrong):
    class Circuit(Function):
        @staticmethod
        def forward(ctx, a, b, c):
            ctx.save_for_backward(a, b, c)
            return a.cos() * b.sin() * (-c).exp()

        @staticmethod
        def backward(ctx, g):
            a, b, c = ctx.saved_tensors
            e = (-c).exp()
            slopes = [-a.sin() * b.sin() * e, a.cos() * b.cos() * e, -a.cos() * b.sin() * e]
            grads = [None, None, None]
            trained = [i for i in range(3) if ctx.needs_input_grad[i]]
            for k, i in enumerate(trained):
                grads[i] = g * slopes[k if wrong else i]
            return tuple(grads)

    def run(a, b, c):
        check(a.shape == b.shape == c.shape and a.numel() > 0, "expected tensors of one shape")
        tame(bound=100, a=a, b=b, c=c)
        bounded("c", c, -10, 10)
        return Circuit.apply(a, b, c)

    return run


add(
    "circuit_index",
    circuit,
    lambda: (real(3), real(3, seed=1), real(3, seed=2)),
    bug="the index among the trained parameters is taken for that among all (PennyLaneAI/pennylane#1060)",
    trigger="a parameter that needs no gradient, before one that does",
)


# A product of 1 - x and cos(x), differentiated by each gate's own shifts
def shifted_gates(wrong):
    def value(x, damped):
        return torch.where(damped, 1 - x, x.cos()).prod(-1)

    class Gates(Function):
        @staticmethod
        def forward(ctx, x, damped):
            ctx.save_for_backward(x, damped)
            return value(x, damped)

        @staticmethod
        def backward(ctx, g):
            x, damped = ctx.saved_tensors
            one = torch.eye(len(x), dtype=x.dtype, device=x.device)
            half = one * math.pi / 2
            turned = (value(x + half, damped) - value(x - half, damped)) / 2
            slope = torch.where(damped, value(x + one, damped), turned)
            here = damped.sort().values if wrong else damped
            return g * (slope - here.to(x.dtype) * value(x, damped)), None

    def gates(x, damped):
        sized("x", x, None)
        sized("damped", damped, len(x))
        check(damped.dtype == torch.bool, "damped: expected booleans")
        tame(bound=10, x=x)
        check(len(x) <= 16, "x: expected sixteen gates at most")
        return Gates.apply(x, damped)

    return gates


add(
    "shifted_gates_order",
    shifted_gates,
    lambda: (real(3), torch.tensor([True, False, False])),
    bug="the terms without a shift are given to the wrong gates (PennyLaneAI/pennylane#2833)",
)


# The cosines' product and the sines' sum, differentiated by the shift rule
def shift_rule(wrong):
    def value(x):
        return x.cos().prod(-1) + x.sin().sum(-1)

    class Shift(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return value(x)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            half = torch.eye(len(x), dtype=x.dtype, device=x.device) * math.pi / 2
            up, down = x + half, x - half
            if wrong:
                down = up - half
            return g * (value(up) - value(down)) / 2

    def evaluate(x):
        sized("x", x, None)
        tame(bound=10, x=x)
        return Shift.apply(x)

    return evaluate


add(
    "shift_rule_back",
    shift_rule,
    lambda: (real(3),),
    bug="the shift back starts from the shift forth (PennyLaneAI/demos#1050)",
)


# The root x in 0 to 1 of (a x² + b x) / (a + b) = y
def quadratic_root(wrong):
    class Root(Function):
        @staticmethod
        def forward(ctx, a, b, y):
            x = torch.ones_like(y)
            for _ in range(60):
                x = x - (a * x**2 + b * x - y * (a + b)) / (2 * a * x + b)
            ctx.save_for_backward(a, b, y, x)
            return x

        @staticmethod
        def backward(ctx, g):
            a, b, y, x = ctx.saved_tensors
            x = x.detach() if wrong else x
            h = g / (2 * a * x + b)
            return h * (y - x**2), h * (y - x), h * (a + b)

    def root(a, b, y):
        check(a.shape == b.shape == y.shape and a.numel() > 0, "expected tensors of one shape")
        alike(a, b, y)
        bounded("a", a, 0.1, 10)
        bounded("b", b, 0.1, 10)
        bounded("y", y, 0, 1)
        return Root.apply(a, b, y)

    return root


add(
    "quadratic_root_second",
    quadratic_root,
    lambda: (
        real(3, positive=True),
        real(3, seed=1, positive=True),
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64, requires_grad=True),
    ),
    bug="behind the root's gradient the root itself is a constant (google/jaxopt#141)",
    trigger="a second derivative",
)
