"""Upstream: what backward makes of grad_output, of one output or of two."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fortysecond import add, alike, bounded, check, indices, same, sized


# Lambert's azimuthal equal-area map (x, y) of longitudes and latitudes around the origin
def equal_area(wrong):
    class Map(Function):
        @staticmethod
        def forward(ctx, lon, lat):
            if wrong:
                ctx.set_materialize_grads(False)
            ctx.save_for_backward(lon, lat)
            k = (2 / (1 + lat.cos() * lon.cos())).sqrt()
            return k * lat.cos() * lon.sin(), k * lat.sin()

        @staticmethod
        def backward(ctx, gx, gy):
            lon, lat = ctx.saved_tensors
            sl, cl, sp, cp = lon.sin(), lon.cos(), lat.sin(), lat.cos()
            k = (2 / (1 + cp * cl)).sqrt()
            by_k = (gx * cp * sl + gy * sp) * k**3 / 4
            by_lon = gx * k * cp * cl + by_k * cp * sl
            return by_lon, k * (gy * cp - gx * sp * sl) + by_k * sp * cl

    def project(lon, lat):
        same(lon, lat)
        alike(lon, lat)
        bounded("lon", lon, -2.5, 2.5)
        bounded("lat", lat, -1.5, 1.5)
        return Map.apply(lon, lat)

    return project


add(
    "equal_area_undefined",
    equal_area,
    lambda: (
        real(5, grad=False).tanh().requires_grad_(),
        real(5, seed=1, grad=False).tanh().requires_grad_(),
    ),
    bug="Backward fails where one of the outputs has no gradient: None isn't expected",
    trigger="a loss of x alone",
)


# Bayesian personalised ranking: -log sigmoid(score of the bought - score of the other), pair by pair or their mean
def ranking(wrong):
    class Ranking(Function):
        @staticmethod
        def forward(ctx, bought, other, mean):
            ctx.save_for_backward(bought, other)
            ctx.mean = mean
            loss = F.softplus(other - bought)
            return loss.mean() if mean else loss

        @staticmethod
        def backward(ctx, g):
            bought, other = ctx.saved_tensors
            if wrong:
                g = g.flatten()[0]
            grad = g * (other - bought).sigmoid()
            if ctx.mean:
                grad = grad / bought.numel()
            return -grad, grad, None

    def loss(bought, other, mean=False):
        check(bought.numel() > 0, "bought: expected scores")
        same(bought, other)
        alike(bought, other)
        bounded("bought", bought, -100, 100)
        bounded("other", other, -100, 100)
        return Ranking.apply(bought, other, mean)

    return loss


add(
    "pairwise_ranking_first",
    ranking,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="Backward takes the first element of grad_output for all, as if the loss were always reduced",
    trigger="a grad_output of several numbers",
)


# Volumes of tetrahedra (B, 4, 3), with the sign of their orientation
def tetrahedron(wrong):
    class Volume(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            a, b, c = (x[:, 1:] - x[:, :1]).unbind(1)
            return (a * torch.linalg.cross(b, c)).sum(1) / 6

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            a, b, c = (x[:, 1:] - x[:, :1]).unbind(1)
            g = (g.abs() if wrong else g)[:, None] / 6
            cross = torch.linalg.cross
            parts = torch.stack([g * cross(b, c), g * cross(c, a), g * cross(a, b)], 1)
            return torch.cat([-parts.sum(1, keepdim=True), parts], 1)

    def volume(x):
        sized("x", x, None, 4, 3)
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -100, 100)
        return Volume.apply(x)

    return volume


add(
    "tetrahedron_abs",
    tetrahedron,
    lambda: (real(3, 4, 3),),
    bug="Backward takes |grad_output|, as if volumes could only grow",
    trigger="a negative grad_output",
)


# The running integral (B, T - 1) of samples (B, T) by the trapezoid rule, and each row's mean
def trapezoid(wrong):
    class Trapezoid(Function):
        @staticmethod
        def forward(ctx, x, step):
            ctx.step = step
            ctx.set_materialize_grads(False)
            ctx.shape = x.shape
            return ((x[:, 1:] + x[:, :-1]) * (step / 2)).cumsum(1), x.mean(1)

        @staticmethod
        def backward(ctx, g, gm):
            grad = None
            if g is not None:
                parts = g.flip(1).cumsum(1).flip(1) * (ctx.step / 2)
                grad = F.pad(parts, (1, 0)) + F.pad(parts, (0, 1))
            if gm is not None:
                share = (gm / ctx.shape[1])[:, None].expand(ctx.shape)
                grad = share if wrong or grad is None else grad + share
            return grad, None

    def integral(x, step=0.3):
        sized("x", x, None, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(x.shape[1] >= 2, "x: expected two samples or more")
        check(0 < step <= 10, "step: expected a number above 0, up to 10")
        bounded("x", x, -1e3, 1e3)
        return Trapezoid.apply(x, step)

    return integral


add(
    "trapezoid_mean_overwrites",
    trapezoid,
    lambda: (real(2, 5),),
    bug="The mean's gradient overwrites the integral's",
    trigger="a loss of both outputs",
)


# Lennard-Jones energies of pairs (2, P) of atoms of a mixture: Lorentz and Berthelot's means of sigma and epsilon
def lennard(wrong):
    class Energy(Function):
        @staticmethod
        def forward(ctx, x, sigma, depth, pairs):
            ctx.save_for_backward(x, sigma, depth, pairs)
            i, j = pairs
            r = (x[i] - x[j]).norm(dim=1)
            six = ((sigma[i] + sigma[j]) / 2 / r) ** 6
            return 4 * (depth[i] * depth[j]).sqrt() * six * (six - 1)

        @staticmethod
        def backward(ctx, g):
            x, sigma, depth, (i, j) = ctx.saved_tensors
            if wrong:
                g = g.clamp(-1, 1)
            d = x[i] - x[j]
            r = d.norm(dim=1)
            reach = (sigma[i] + sigma[j]) / 2
            deep = (depth[i] * depth[j]).sqrt()
            six = (reach / r) ** 6
            steep = g * 24 * deep * six * (2 * six - 1)
            pull = -(steep / r.square())[:, None] * d
            by_sigma = steep / reach / 2
            by_depth = g * 2 * deep * six * (six - 1)

            def gathered(t, at_i, at_j):
                return torch.zeros_like(t).index_add(0, i, at_i).index_add(0, j, at_j)

            return (
                gathered(x, pull, -pull),
                gathered(sigma, by_sigma, by_sigma),
                gathered(depth, by_depth / depth[i], by_depth / depth[j]),
                None,
            )

    def energy(x, sigma, depth, pairs):
        sized("x", x, None, 3)
        sized("sigma", sigma, len(x))
        sized("depth", depth, len(x))
        sized("pairs", pairs, 2, None)
        indices("pairs", pairs, len(x))
        alike(x, sigma, depth)
        bounded("x", x, -100, 100)
        bounded("sigma", sigma, 0.1, 3)
        bounded("depth", depth, 0.01, 10)
        r = (x[pairs[0]] - x[pairs[1]]).detach().norm(dim=1)
        reach = (sigma[pairs[0]] + sigma[pairs[1]]).detach() / 2
        bounded("distances by reach", r / reach, 0.5, 1e3)
        return Energy.apply(x, sigma, depth, pairs)

    return energy


add(
    "lennard_mixture_clamped",
    lennard,
    lambda: (
        real(4, 3),
        (0.8 + real(4, seed=1, grad=False).tanh() / 5).requires_grad_(),
        real(4, seed=2, positive=True),
        torch.tensor([[0, 0, 1, 2], [1, 2, 3, 3]]),
    ),
    bug="Backward clamps grad_output to [-1, 1] against exploding forces",
    trigger="|grad_output| > 1",
)


# Rusanov's flux of Burgers' equation through the faces between cells (B, N), with a speed (B, N - 1) of waves
def burgers_flux(wrong):
    class Flux(Function):
        @staticmethod
        def forward(ctx, u, speed):
            ctx.save_for_backward(u, speed)
            left, right = u[:, :-1], u[:, 1:]
            return (left.square() + right.square()) / 4 - speed * (right - left) / 2

        @staticmethod
        def backward(ctx, g):
            u, speed = ctx.saved_tensors
            by_left = g * (u[:, :-1] + speed) / 2
            by_right = g * (u[:, 1:] - speed) / 2
            jump = u.diff(dim=1) / -2
            by_u = F.pad(by_left, (0, 1)) + F.pad(by_right, (1, 0))
            return by_u, jump * torch.ones_like(g) if wrong else jump * g

    def flux(u, speed):
        sized("u", u, None, None)
        check(u.shape[1] >= 2, "u: expected two cells or more")
        sized("speed", speed, len(u), u.shape[1] - 1)
        alike(u, speed)
        bounded("u", u, -1e3, 1e3)
        bounded("speed", speed, 0, 1e3)
        return Flux.apply(u, speed)

    return flux


add(
    "burgers_flux_speed_alone",
    burgers_flux,
    lambda: (real(2, 5), real(2, 4, seed=1, positive=True)),
    bug="The wave speeds' gradient forgets grad_output",
    trigger="any grad_output but ones",
)
