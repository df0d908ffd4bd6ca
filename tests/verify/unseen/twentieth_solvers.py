"""Solutions of equations, differential equations, particles and rotations."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.nineteenth import given, uniform
from tests.verify.unseen.twentieth import add, check, sized


# x = A^-1 b, A tridiagonal
def tridiagonal(wrong):
    def matrix(lower, diagonal, upper):
        return diagonal.diag() + lower.diag(-1) + upper.diag(1)

    class Solution(Function):
        @staticmethod
        def forward(ctx, lower, diagonal, upper, b):
            sized("diagonal", diagonal, None)
            n = len(diagonal)
            check(lower.shape == upper.shape == (n - 1,), f"expected {n - 1} beside the diagonal")
            sized("b", b, n)
            x = torch.linalg.solve(matrix(lower, diagonal, upper), b)
            ctx.save_for_backward(lower, diagonal, upper, x)
            return x

        @staticmethod
        def backward(ctx, grad_x):
            lower, diagonal, upper, x = ctx.saved_tensors
            a = matrix(lower, diagonal, upper)
            u = torch.linalg.solve(a if wrong else a.T, grad_x)
            return -u[1:] * x[:-1], -u * x, -u[:-1] * x[1:], u

    def call(lower, diagonal, upper, b):
        return Solution.apply(lower, diagonal, upper, b)

    return call


add(
    "tridiagonal_symmetric",
    tridiagonal,
    lambda: (given([-1.0] * 3), given([2.5] * 4), given([-1.0] * 3), real(4)),
    bug="Backward solves with the matrix, not with its transpose",
    trigger="a matrix that is not symmetric",
)


# z = tanh(W z + x)
def equilibrium(wrong):
    class Equilibrium(Function):
        @staticmethod
        def forward(ctx, w, x):
            sized("x", x, None)
            sized("w", w, len(x), len(x))
            close = 16 * torch.finfo(x.dtype).eps
            z = torch.zeros_like(x)
            for _ in range(5000):
                last, z = z, torch.tanh(w @ z + x)
                if bool((z - last).abs().max() <= close):
                    break
            else:
                raise RuntimeError("no fixed point found; scale W down")
            ctx.save_for_backward(w, z)
            return z

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_z):
            w, z = ctx.saved_tensors
            slope = 1 - z * z
            if wrong:
                u = grad_z
                for _ in range(20):
                    u = grad_z + w.T @ (slope * u)
            else:
                eye = torch.eye(len(z), dtype=z.dtype, device=z.device)
                u = torch.linalg.solve(eye - w.T * slope, grad_z)
            g = slope * u
            return g[:, None] * z, g

    return lambda w, x: Equilibrium.apply(w, x)


add(
    "equilibrium_series",
    equilibrium,
    lambda: ((0.1 * real(3, 3, grad=False)).requires_grad_(), real(3, seed=1)),
    bug="The linear system of a fixed point's gradient is summed up to twenty terms",
    trigger="a weight that contracts little",
)


# y' = A y from t0 to t1 in 8 steps of the classical method of fourth order
def integral(wrong):
    def run(a, y, t0, t1):
        h = (t1 - t0) / 8
        for _ in range(8):
            k1 = a @ y
            k2 = a @ (y + 0.5 * h * k1)
            k3 = a @ (y + 0.5 * h * k2)
            k4 = a @ (y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y

    class Integral(Function):
        @staticmethod
        def forward(ctx, a, y, t0, t1):
            sized("y", y, None)
            sized("a", a, len(y), len(y))
            sized("t0", t0)
            sized("t1", t1)
            ctx.save_for_backward(a, y, t0, t1)
            return run(a, y, t0, t1)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            kept = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            with torch.enable_grad():
                y = run(*kept)
            grads = list(torch.autograd.grad(y, kept, grad_y))
            if wrong:
                grads[2] = torch.zeros_like(grads[2])
            return tuple(grads)

    return lambda a, y, t0, t1: Integral.apply(a, y, t0, t1)


add(
    "integral_from",
    integral,
    lambda: (real(2, 2), real(2, seed=1), given(0.1), given(0.7)),
    bug="Stan (math, issue 1833): the time at which the solution starts gets no gradient",
)


# sum over pairs within the cutoff of 4 (r^-12 - r^-6), shifted to 0 there
def energy(wrong):
    def pairs(n, device):
        return torch.triu_indices(n, n, 1, device=device)

    class Energy(Function):
        @staticmethod
        def forward(ctx, position, cutoff):
            sized("position", position, None, 3)
            check(cutoff > 0, f"expected cutoff > 0, got {cutoff}")
            i, j = pairs(len(position), position.device)
            r2 = (position[i] - position[j]).square().sum(1)
            check(bool((r2 > 0).all()), "position: two particles at one place")
            ctx.save_for_backward(position)
            ctx.cutoff = cutoff
            s, c = r2**-3, cutoff**-6
            return torch.where(r2 < cutoff**2, 4 * (s * s - s - (c * c - c)), 0.0).sum()

        @staticmethod
        def backward(ctx, grad_e):
            (position,) = ctx.saved_tensors
            i, j = pairs(len(position), position.device)
            d = position[i] - position[j]
            r2 = d.square().sum(1)
            s = r2**-3
            slope = -24 * (2 * s * s - s) / r2
            if not wrong:
                slope = torch.where(r2 < ctx.cutoff**2, slope, 0.0)
            force = grad_e * slope[:, None] * d
            grad = torch.zeros_like(position).index_add(0, i, force)
            return grad.index_add(0, j, -force), None

    return lambda position, cutoff=2.5: Energy.apply(position, cutoff)


def particles():
    grid = torch.tensor([[0.0, 0, 0], [1.1, 0, 0], [0, 1.2, 0], [0, 0, 1.1]], dtype=F64)
    return ((grid + 0.05 * real(4, 3, grad=False)).requires_grad_(),)


add(
    "pair_energy_cutoff",
    energy,
    particles,
    bug="Pairs beyond the cutoff give forces but no energy",
    trigger="particles further apart than the cutoff",
)


# v k(|v|, w), k = 2 atan2(|v|, w)/|v|, the shorter way round (of a half turn, the positive one)
def quaternion_log(wrong):
    def factors(s2, w):
        """Return k, dk/ds / s and where both are from their series."""
        small = s2 < 1e-6 * w * w
        safe_w = torch.where(small, w, 1.0)
        s2_safe = torch.where(small, 1.0, s2)
        s = s2_safe.sqrt()
        sign = torch.where(w < 0, -1.0, 1.0)
        k = 2 * torch.atan2(s * sign, w * sign) / s
        slope = (2 * w / (s2_safe + w * w) - k) / s2_safe
        near = 2 / safe_w - 2 * s2 / (3 * safe_w**3) + 2 * s2 * s2 / (5 * safe_w**5)
        near_slope = -4 / (3 * safe_w**3) + 8 * s2 / (5 * safe_w**5)
        return torch.where(small, near, k), torch.where(small, near_slope, slope), small

    class Log(Function):
        @staticmethod
        def forward(ctx, q):
            check(q.ndim >= 1 and q.shape[-1] == 4, "expected (*, 4), the real part first")
            check(bool(q.any(-1).all()), "expected no zero quaternion")
            ctx.save_for_backward(q)
            q = q.double()
            w, v = q[..., :1], q[..., 1:]
            k, _, _ = factors(v.square().sum(-1, keepdim=True), w)
            return v * k

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (q,) = ctx.saved_tensors
            q = q.double()
            w, v = q[..., :1], q[..., 1:]
            s2 = v.square().sum(-1, keepdim=True)
            k, slope, small = factors(s2, w)
            if wrong:
                k, slope = torch.where(small, 2.0, k), torch.where(small, 0.0, slope)
            along = (grad_y * v).sum(-1, keepdim=True)
            return torch.cat([-2 * along / (s2 + w * w), k * grad_y + v * along * slope], -1)

    return lambda q: Log.apply(q).to(q.dtype)


add(
    "quaternion_log_negative",
    quaternion_log,
    lambda: (real(3, 4),),
    bug="kornia (pull request 4246): without a rotation, backward takes the real part to be 1",
    trigger="the identity as -1, or as another number than 1",
)


# p cos + (r x p) A + r (r p) B, A = sin t/t, B = (1 - cos t)/t^2, t = |r|
def rotation(wrong):
    def factors(r):
        """Return cos t, A, B, (dA/dt)/t, (dB/dt)/t."""
        t2 = (r * r).sum()
        if t2 < 1e-4:
            return (
                t2.sqrt().cos(),
                1 - t2 / 6 + t2**2 / 120,
                0.5 - t2 / 24 + t2**2 / 720,
                -1 / 3 + t2 / 30 - t2**2 / 840,
                -1 / 12 + t2 / 180 - t2**2 / 6720,
            )
        t = t2.sqrt()
        a, b = t.sin() / t, 2 * (t / 2).sin() ** 2 / t2
        return t.cos(), a, b, (t.cos() - a) / t2, (a - 2 * b) / t2

    class Rotation(Function):
        @staticmethod
        def forward(ctx, r, p):
            sized("r", r, 3)
            sized("p", p, None, 3)
            ctx.save_for_backward(r, p)
            r, p = r.double(), p.double()
            c, a, b, _, _ = factors(r)
            return c * p + a * torch.linalg.cross(r.expand_as(p), p) + b * (p @ r)[:, None] * r

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            r, p = (t.double() for t in ctx.saved_tensors)
            c, a, b, da, db = factors(r)
            rows = r.expand_as(p)
            turned = torch.linalg.cross(rows, p)
            back = torch.linalg.cross(grad_y, rows)
            grad_p = c * grad_y + a * back + b * (grad_y @ r)[:, None] * r
            if wrong and (r * r).sum() < 1e-12:
                return torch.zeros_like(r), grad_p
            grad_r = a * torch.linalg.cross(p, grad_y).sum(0)
            grad_r = grad_r + b * ((p @ r)[:, None] * grad_y + (grad_y @ r)[:, None] * p).sum(0)
            scale = da * (grad_y * turned).sum() - a * (grad_y * p).sum()
            return grad_r + r * (scale + db * ((grad_y @ r) * (p @ r)).sum()), grad_p

    return lambda r, p: Rotation.apply(r, p).to(p.dtype)


add(
    "rotation_vector_zero",
    rotation,
    lambda: (uniform(3, low=-1.0, high=1.0), real(4, 3, seed=1)),
    bug="Where the angle is zero the rotation is constant to backward",
    trigger="a rotation vector of zeros, where training starts",
)
