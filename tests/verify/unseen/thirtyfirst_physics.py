"""Steps of simulations, cameras and meshes, and what second order, forward mode and vmap see of them."""

import math

import numpy as np
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirtyfirst import add, bounded, check, finite, same, sized


# A step of velocity Verlet for masses on an anharmonic chain: new places and new velocities
def verlet_step(wrong):
    def force(x, k, cubic):
        d = torch.diff(x, dim=-1)
        f = k * d + cubic * d**3
        return torch.nn.functional.pad(f, (0, 1)) - torch.nn.functional.pad(f, (1, 0))

    def force_back(x, k, cubic, g):
        d = torch.diff(x, dim=-1)
        gf = -torch.diff(g, dim=-1)
        gd = gf * (k + 3 * cubic * d**2)
        grad_x = torch.nn.functional.pad(gd, (1, 0)) - torch.nn.functional.pad(gd, (0, 1))
        return grad_x, (gf * d).sum(), (gf * d**3).sum()

    class Step(Function):
        @staticmethod
        def forward(ctx, x, v, k, cubic, dt):
            ctx.save_for_backward(x, v, k, cubic)
            ctx.dt = dt
            first = force(x, k, cubic)
            new = x + dt * v + dt * dt / 2 * first
            return new, v + dt / 2 * (first + force(new, k, cubic))

        @staticmethod
        def backward(ctx, grad_new, grad_speed):
            x, v, k, cubic = ctx.saved_tensors
            dt = ctx.dt
            new = x + dt * v + dt * dt / 2 * force(x, k, cubic)
            at = x if wrong else new
            through, k1, c1 = force_back(at, k, cubic, dt / 2 * grad_speed)
            grad_new = grad_new + through
            back, k2, c2 = force_back(x, k, cubic, dt * dt / 2 * grad_new + dt / 2 * grad_speed)
            return grad_new + back, dt * grad_new + grad_speed, k1 + k2, c1 + c2, None

    def step(x, v, k, cubic, dt=0.1):
        sized("x", x, None, None)
        sized("v", v, *x.shape)
        sized("k", k)
        sized("cubic", cubic)
        check(0 < dt <= 1, "dt: expected a number from 0 to 1")
        bounded("x", x, -100, 100)
        bounded("v", v, -100, 100)
        bounded("k", k, -100, 100)
        bounded("cubic", cubic, -100, 100)
        return Step.apply(x, v, k, cubic, float(dt))

    return step


add(
    "verlet_step_second_force",
    verlet_step,
    lambda: (
        real(2, 5),
        real(2, 5, seed=1),
        torch.tensor(1.0, dtype=torch.float64).requires_grad_(),
        torch.tensor(0.25, dtype=torch.float64).requires_grad_(),
    ),
    bug="The second force's gradient is taken at the old places",
)


# An implicit step of diffusion, (1 + dt K) new = old, with forward mode
def implicit_diffusion(wrong):
    def system(k):
        """Return 1 + the conductances' Laplacian."""
        n = k.shape[-1] + 1
        d = torch.diff(torch.eye(n, dtype=k.dtype, device=k.device), dim=0)
        return torch.eye(n, dtype=k.dtype, device=k.device) + d.mT @ (k[:, None] * d)

    class Step(Function):
        @staticmethod
        def forward(u, k):
            return torch.linalg.solve(system(k), u)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[1], output)
            ctx.save_for_forward(inputs[1], output)

        @staticmethod
        def backward(ctx, grad_y):
            k, y = ctx.saved_tensors
            back = torch.linalg.solve(system(k), grad_y)
            return back, -(torch.diff(back, dim=0) * torch.diff(y, dim=0)).sum(-1)

        @staticmethod
        def jvp(ctx, u_t, k_t):
            k, y = ctx.saved_tensors
            right = torch.zeros_like(y) if u_t is None else u_t
            if k_t is not None:
                flow = k_t[:, None] * torch.diff(y, dim=0)
                pad = torch.zeros_like(y[:1])
                change = torch.cat((pad, flow)) - torch.cat((flow, pad))
                right = right + change if wrong else right - change
            return torch.linalg.solve(system(k), right)

    def step(u, k):
        sized("u", u, None, None)
        sized("k", k, len(u) - 1)
        bounded("k", k, 0, 1e3)
        bounded("u", u, -1e4, 1e4)
        return Step.apply(u, k)

    return step


add(
    "implicit_diffusion_tangent",
    implicit_diffusion,
    lambda: (real(5, 2), real(4, seed=1, positive=True)),
    bug="The conductances' part of the tangent has the other sign",
    trigger="forward mode",
)


# Velocities of at most a speed: v min(1, most / |v|)
def speed_limit(wrong):
    class Limit(Function):
        @staticmethod
        def forward(ctx, v, most):
            ctx.save_for_backward(v)
            ctx.most = most
            speed = v.norm(dim=-1, keepdim=True)
            return torch.where(speed > most, v * most / speed, v)

        @staticmethod
        def backward(ctx, grad_y):
            (v,) = ctx.saved_tensors
            speed = v.square().sum(-1, keepdim=True).sqrt()
            fast = speed > ctx.most
            safe = speed if wrong else torch.where(fast, v, 1).square().sum(-1, keepdim=True).sqrt()
            unit = v / safe
            turned = (grad_y - unit * (unit * grad_y).sum(-1, keepdim=True)) * ctx.most / safe
            if wrong:
                return fast * turned + ~fast * grad_y, None
            return torch.where(fast, turned, grad_y), None

    def limit(v, most=1.0):
        sized("v", v, None, None)
        check(most > 0, "most: expected a positive number")
        bounded("v", v, -1e4, 1e4)
        return Limit.apply(v, float(most))

    return limit


add(
    "speed_limit_still",
    speed_limit,
    lambda: (real(4, 2),),
    bug="The two cases are added up with their masks: 0 times NaN where nothing moves",
    trigger="a velocity of 0",
)


# Signals read at other times, linearly, through NumPy as a data pipeline does
def resampled(wrong):
    def resample(x, times):
        sized("x", x, None, None)
        check(x.shape[1] >= 2, "x: expected two samples")
        finite(x=x)
        sized("times", times, None)
        check(not times.requires_grad, "times: are constants")
        bounded("times", times, 0, x.shape[1] - 1)
        if wrong:
            grid = np.arange(x.shape[1])
            rows = [np.interp(times.tolist(), grid, row) for row in x.tolist()]
            y = torch.tensor(np.array(rows), dtype=x.dtype, device=x.device)
            return y.requires_grad_(x.requires_grad)
        left = times.floor().clamp(max=x.shape[1] - 2)
        part = (times - left).to(x.dtype)
        left = left.long()
        return x[:, left] * (1 - part) + x[:, left + 1] * part

    return resample


add(
    "resampled_numpy",
    resampled,
    lambda: (
        real(2, 6),
        torch.tensor([0.0, 1.5, 2.25, 4.75], dtype=torch.float64),
    ),
    bug="What NumPy computed is made a new tensor that asks for gradients: nothing reaches the input",
)


# log(1 - exp(-x)), the logarithm of an event's probability by its rate
def log_event(wrong):
    class Event(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            near = torch.log(-torch.expm1(-x))
            return torch.where(x < math.log(2), near, torch.log1p(-torch.exp(-x)))

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            e = torch.exp(-x)
            return grad_y * e / (1 - e) if wrong else -grad_y * e / torch.expm1(-x)

    def event(x):
        bounded("x", x, 1e-30, 1e4)
        return Event.apply(x)

    return event


add(
    "log_event_small",
    log_event,
    lambda: (real(3, 4, positive=True),),
    bug="Backward's 1 - exp(-x) loses its digits, and is 0 for the smallest rates",
    trigger="a small rate, the smaller in float32",
)


# A residual branch that whole rows leave out, drawn from a seed, and drawn again in backward
def dropped_branch(wrong):
    def mask(x, p, drawn):
        kept = (drawn >= p).to(x) / (1 - p)
        return kept.reshape(-1, *[1] * (x.ndim - 1))

    def draw(n, seed):
        return torch.rand(n, generator=torch.Generator().manual_seed(seed))

    class Branch(Function):
        @staticmethod
        def forward(ctx, x, branch, p, seed):
            ctx.how = p, seed
            return x + mask(x, p, draw(len(x), seed)) * branch

        @staticmethod
        def backward(ctx, grad_y):
            p, seed = ctx.how
            n = len(grad_y)
            if wrong:
                torch.manual_seed(seed)
            drawn = torch.rand(n) if wrong else draw(n, seed)
            return grad_y, mask(grad_y, p, drawn) * grad_y, None, None

    def branch_of(x, branch, p=0.3, seed=0):
        same(x, branch)
        check(x.ndim >= 1, "x: expected rows")
        finite(x=x, branch=branch)
        check(0 <= p < 1, "p: expected a number from 0 up to 1")
        return Branch.apply(x, branch, p, seed)

    return branch_of


add(
    "dropped_branch_global_seed",
    dropped_branch,
    lambda: (real(5, 3), real(5, 3, seed=1)),
    bug="Backward draws the mask again by seeding the global generator, which stays where that left it",
    trigger="random numbers drawn after backward",
)


# silu(a) b, whose backward is a Function with a backward of its own
def gated_silu(wrong):
    class Backward(Function):
        @staticmethod
        def forward(ctx, a, b, g):
            ctx.save_for_backward(a, b, g)
            s = a.sigmoid()
            return g * b * s * (1 + a * (1 - s)), g * a * s

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_ga, grad_gb):
            a, b, g = ctx.saved_tensors
            s = a.sigmoid()
            first = s * (1 + a * (1 - s))
            second = s * (1 - s) * (2 + a * (1 - 2 * s))
            grad_a = grad_ga * g * b * second
            if not wrong:
                grad_a = grad_a + grad_gb * g * first
            return grad_a, grad_ga * g * first, grad_ga * b * first + grad_gb * a * s

    class Gated(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a * a.sigmoid() * b

        @staticmethod
        def backward(ctx, grad_y):
            return Backward.apply(*ctx.saved_tensors, grad_y)

    def gated(a, b):
        same(a, b)
        bounded("a", a, -1e4, 1e4)
        bounded("b", b, -1e4, 1e4)
        return Gated.apply(a, b)

    return gated


add(
    "gated_silu_mixed",
    gated_silu,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="The backward of backward leaves out the mixed derivative from b to a",
    trigger="second order",
)


# How far levels are filled at their energies, whose backward calls a kernel with its own rule for vmap
def occupation(wrong):
    class Kernel(Function):
        @staticmethod
        def forward(x, g):
            s = (-x).sigmoid()
            return -g * s * (1 - s)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            x, g = ctx.saved_tensors
            s = (-x).sigmoid()
            return grad_y * g * (1 - 2 * s) * s * (1 - s), -grad_y * s * (1 - s)

        @staticmethod
        def vmap(info, in_dims, x, g):
            of_x, of_g = in_dims
            x = x if of_x is None else x.movedim(of_x, 0)
            g = g if of_g is None else g.movedim(of_g, 0)
            return Kernel.apply(x, g), None if wrong and of_x is None else 0

    class Occupation(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return (-x).sigmoid()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            return Kernel.apply(*ctx.saved_tensors, grad_y)

    def occupied(x):
        sized("x", x, None, None)
        return Occupation.apply(x)

    return occupied


add(
    "occupation_batched_backward",
    occupation,
    lambda: (real(3, 4),),
    bug="The rule for vmap of backward's kernel says that a batch comes out only where x has one",
    trigger="vmap over the vjp of one input, as jacrev has it",
)
