"""Formulas: terms, signs, normalisers, blocks and steps."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirtyninth import add, alike, bounded, check, indices, same, sized


# Hilbert-Schmidt independence criterion of two sets of rows under Gaussian kernels: tr(K H L H) / (n - 1)^2
def independence(wrong):
    def kernel(x, width):
        return (-(x[:, None] - x).square().sum(-1) / (2 * width**2)).exp()

    def centred(k):
        return k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()

    class Criterion(Function):
        @staticmethod
        def forward(ctx, x, y, width):
            ctx.save_for_backward(x, y)
            ctx.width = width
            k, m = kernel(x, width), kernel(y, width)
            return (k * centred(m)).sum() / (len(x) - 1) ** 2

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            k, m = kernel(x, ctx.width), kernel(y, ctx.width)
            g = g / (len(x) ** 2 if wrong else (len(x) - 1) ** 2)
            grads = []
            for a, weight in ((x, k * centred(m)), (y, m * centred(k))):
                along = a * weight.sum(1, keepdim=True) - weight @ a
                grads.append(-2 * g * along / ctx.width**2)
            return *grads, None

    def criterion(x, y, width=1.0):
        sized("x", x, None, None)
        sized("y", y, len(x), None)
        check(len(x) >= 2, "x: expected two rows or more")
        alike(x, y)
        check(0.1 <= width <= 10, "width: expected a number from 0.1 to 10")
        bounded("x", x, -100, 100)
        bounded("y", y, -100, 100)
        return Criterion.apply(x, y, width)

    return criterion


add(
    "independence_rows",
    independence,
    lambda: (real(5, 3), real(5, 2, seed=1)),
    bug="Backward divides by n^2 where forward divides by (n - 1)^2",
)


# Goldman's flux of an ion through a membrane at the scaled voltage u: p u (inner - outer exp(-u)) / (1 - exp(-u))
def goldman_flux(wrong):
    def share(u):
        return u / torch.expm1(u)

    def slope(u):
        return share(u) * (1 / u + 1 / torch.expm1(-u))

    class Flux(Function):
        @staticmethod
        def forward(ctx, p, inner, outer, u):
            ctx.save_for_backward(p, inner, outer, u)
            return p * (inner * share(-u) - outer * share(u))

        @staticmethod
        def backward(ctx, g):
            p, inner, outer, u = ctx.saved_tensors
            along = -inner * slope(-u)
            if not wrong:
                along = along - outer * slope(u)
            flux = inner * share(-u) - outer * share(u)
            return g * flux, g * p * share(-u), -g * p * share(u), g * p * along

    def flux(p, inner, outer, u):
        same(p, inner, outer, u)
        alike(p, inner, outer, u)
        for name, t in {"p": p, "inner": inner, "outer": outer}.items():
            bounded(name, t, 0, 1e3)
        bounded("u", u.abs(), 0.1, 50)
        return Flux.apply(p, inner, outer, u)

    return flux


add(
    "goldman_flux_outer",
    goldman_flux,
    lambda: (*(real(6, seed=s, positive=True) for s in (1, 2, 3)), real(6, positive=True)),
    bug="The gradient by the voltage lacks the outer concentration's term",
)


# Perlin's noise on a line at places x, from slopes (K + 1) at the integers
def gradient_noise(wrong):
    def fade(t):
        return t**3 * (t * (t * 6 - 15) + 10), 30 * t**2 * (t - 1) ** 2

    class Noise(Function):
        @staticmethod
        def forward(ctx, x, slopes):
            ctx.save_for_backward(x, slopes)
            i = x.floor().long().clamp(max=len(slopes) - 2)
            t = x - i
            left, right = slopes[i] * t, slopes[i + 1] * (t - 1)
            return left + fade(t)[0] * (right - left)

        @staticmethod
        def backward(ctx, g):
            x, slopes = ctx.saved_tensors
            i = x.detach().floor().long().clamp(max=len(slopes) - 2)
            t = x - i
            a, b = slopes[i], slopes[i + 1]
            s, ds = fade(t)
            grad_x = g * (a + s * (b - a) + ds * (b * (t - 1) - a * t))
            ends = (1 - t) if wrong else (t - 1)
            grad = torch.zeros_like(slopes).index_add(0, i.flatten(), (g * (1 - s) * t).flatten())
            return grad_x, grad.index_add(0, i.flatten() + 1, (g * s * ends).flatten())

    def noise(x, slopes):
        sized("slopes", slopes, None)
        check(len(slopes) >= 2, "slopes: expected two or more")
        alike(x, slopes)
        bounded("x", x, 0, len(slopes) - 1)
        bounded("slopes", slopes, -1e3, 1e3)
        return Noise.apply(x, slopes)

    return noise


add(
    "gradient_noise_ends",
    gradient_noise,
    lambda: ((real(7, grad=False).sigmoid() * 4).requires_grad_(), real(5, seed=1)),
    bug="The slope at the right end gets its gradient with the wrong sign",
)


# Welsch's loss c^2 / 2 (1 - exp(-(d / c)^2)) of each element, with a learned width per column
def welsch(wrong):
    class Welsch(Function):
        @staticmethod
        def forward(ctx, x, y, c):
            ctx.save_for_backward(x, y, c)
            return -c.square() / 2 * torch.expm1(-((x - y) / c).square())

        @staticmethod
        def backward(ctx, g):
            x, y, c = ctx.saved_tensors
            d = x - y
            fall = -(d / c).square()
            grad = g * d * fall.exp()
            by_c = (g * c * (fall * fall.exp() - torch.expm1(fall))).flatten(0, -2)
            return grad, -grad, by_c.mean(0) if wrong else by_c.sum(0)

    def loss(x, y, c):
        same(x, y)
        alike(x, y, c)
        check(x.ndim >= 2 and x.numel() > 0, "x: expected rows of numbers")
        sized("c", c, x.shape[-1])
        bounded("x", x, -1e3, 1e3)
        bounded("y", y, -1e3, 1e3)
        bounded("c", c, 0.05, 1e3)
        return Welsch.apply(x, y, c)

    return loss


add(
    "welsch_width_mean",
    welsch,
    lambda: (real(4, 3), real(4, 3, seed=1), real(3, seed=2, positive=True)),
    bug="The widths' gradient is the mean over the rows, not the sum",
)


# Light through Fabry and Perot's etalons of thickness d, averaged over wave numbers: mean 1 / (1 + f sin(k d)^2)
def etalon(wrong):
    class Etalon(Function):
        @staticmethod
        def forward(ctx, d, reflected, k):
            ctx.save_for_backward(d, reflected, k)
            finesse = 4 * reflected / (1 - reflected).square()
            return (1 / (1 + finesse[:, None] * (d[:, None] * k).sin().square())).mean(1)

        @staticmethod
        def backward(ctx, g):
            d, reflected, k = ctx.saved_tensors
            finesse = (4 * reflected / (1 - reflected).square())[:, None]
            angle = d[:, None] * k
            through = 1 / (1 + finesse * angle.sin().square())
            along = -g[:, None] * through.square()
            if not wrong:
                along = along / len(k)
            rise = 4 * (1 + reflected) / (1 - reflected) ** 3
            by_d = (along * finesse * (2 * angle).sin() * k).sum(1)
            return by_d, rise * (along * angle.sin().square()).sum(1), None

    def transmission(d, reflected, k):
        sized("d", d, None)
        sized("k", k, None)
        same(d, reflected)
        alike(d, reflected, k)
        check(not k.requires_grad, "k: expected wave numbers without gradient")
        bounded("d", d, -10, 10)
        bounded("k", k, 0, 10)
        bounded("reflected", reflected, 0, 0.9)
        return Etalon.apply(d, reflected, k)

    return transmission


add(
    "etalon_average",
    etalon,
    lambda: (
        real(4),
        (real(4, seed=1, grad=False).sigmoid() * 0.8).requires_grad_(),
        real(5, seed=2, grad=False, positive=True),
    ),
    bug="Backward sums over the wave numbers where forward averages",
)


# Rotations (N, 3, 3) from six numbers each: two columns made orthogonal, and their cross product
def six_numbers(wrong):
    def dot(a, b):
        return (a * b).sum(-1, keepdim=True)

    def frame(x):
        first, second = x[:, :3], x[:, 3:]
        long = first.norm(dim=-1, keepdim=True)
        u = first / long
        rest = second - dot(u, second) * u
        short = rest.norm(dim=-1, keepdim=True)
        v = rest / short
        return u, v, torch.linalg.cross(u, v), long, short

    def block_grad(x, g):
        u, v, _, long, short = frame(x)
        second = x[:, 3:]
        gu, gv, gw = g.unbind(-1)
        gv = gv + torch.linalg.cross(gw, u)
        rest = (gv - v * dot(v, gv)) / short
        gu = gu + torch.linalg.cross(v, gw) - dot(u, second) * rest - second * dot(u, rest)
        return torch.cat([(gu - u * dot(u, gu)) / long, rest - u * dot(u, rest)], 1)

    class Rotations(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.stack(frame(x)[:3], -1)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            grad = torch.zeros_like(x)
            stop = len(x) // 4 * 4 if wrong else len(x)
            for start in range(0, stop, 4):
                rows = slice(start, start + 4)
                grad[rows] = block_grad(x[rows], g[rows])
            return grad

    def rotations(x):
        sized("x", x, None, 6)
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -1e3, 1e3)
        *_, long, short = frame(x.detach())
        bounded("the columns' lengths", long, 1e-2, 1e4)
        bounded("the second column's rest", short, 1e-2, 1e4)
        return Rotations.apply(x)

    return rotations


add(
    "six_numbers_blocks",
    six_numbers,
    lambda: (real(4, 6),),
    bug="Backward goes over whole blocks of four rows only",
    trigger="a number of rows that four doesn't divide",
)


# NeuS: how much each stretch of a ray weighs, from signed distances (R, S + 1) at its ends and a sharpness
def surface_weights(wrong):
    def opacity(f, s):
        level = F.logsigmoid(s * f)
        fall = (level[:, 1:] - level[:, :-1]).clamp(max=0)
        before = (fall.cumsum(1) - fall).exp()
        return fall, before, -torch.expm1(fall) * before

    class Weights(Function):
        @staticmethod
        def forward(ctx, f, s):
            ctx.save_for_backward(f, s)
            return opacity(f, s)[2]

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            f, s = ctx.saved_tensors
            fall, before, w = opacity(f, s)
            later = (g * w).flip(1).cumsum(1).flip(1)
            if not wrong:
                later = later - g * w
            h = (later - g * before * fall.exp()) * (fall < 0)
            level = F.pad(h, (1, 0)) - F.pad(h, (0, 1))
            level = level * torch.sigmoid(-s * f)
            return s * level, (f * level).sum()

    def weights(f, s):
        sized("f", f, None, None)
        sized("s", s)
        check(f.shape[1] >= 2, "f: expected two distances or more")
        alike(f, s)
        bounded("f", f, -20, 20)
        bounded("s", s, 1e-2, 4)
        return Weights.apply(f, s)

    return weights


add(
    "surface_weights_later",
    surface_weights,
    lambda: (real(3, 6), torch.tensor(1.7, dtype=torch.float64, requires_grad=True)),
    bug="The sum over what lies behind a stretch takes in the stretch itself",
)


# Behler's radial symmetry functions: for each atom the sum over its neighbours of exp(-eta (r - s)^2) f(r);
# edges (2, E) lead from an atom (first) to its neighbour (second)
def radial_symmetry(wrong):
    class Symmetry(Function):
        @staticmethod
        def forward(ctx, x, edges, eta, centre, cutoff):
            ctx.save_for_backward(x, edges)
            ctx.settings = eta, centre, cutoff
            r = (x[edges[1]] - x[edges[0]]).norm(dim=-1)
            hood = torch.where(r < cutoff, (1 + (math.pi * r / cutoff).cos()) / 2, 0 * r)
            terms = (-eta * (r - centre).square()).exp() * hood
            return torch.zeros_like(x[:, 0]).index_add(0, edges[0], terms)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            x, edges = ctx.saved_tensors
            eta, centre, cutoff = ctx.settings
            away = x[edges[1]] - x[edges[0]]
            r = away.norm(dim=-1)
            turn = math.pi * r / cutoff
            slope = -math.pi / cutoff * turn.sin() / 2 - eta * (r - centre) * (1 + turn.cos())
            slope = torch.where(r < cutoff, slope, 0 * r) * (-eta * (r - centre).square()).exp()
            owner = edges[1] if wrong else edges[0]
            pull = (g[owner] * slope / r)[:, None] * away
            grad = torch.zeros_like(x).index_add(0, edges[1], pull)
            return grad.index_add(0, edges[0], -pull), None, None, None, None

    def symmetry(x, edges, eta=0.5, centre=0.7, cutoff=3.0):
        sized("x", x, None, 3)
        sized("edges", edges, 2, None)
        indices("edges", edges, len(x))
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(0 <= eta <= 10, "eta: expected a number from 0 to 10")
        check(0 <= centre <= 10, "centre: expected a number from 0 to 10")
        check(0.5 <= cutoff <= 10, "cutoff: expected a number from 0.5 to 10")
        bounded("x", x, -100, 100)
        bounded("distances", (x[edges[1]] - x[edges[0]]).detach().norm(dim=-1), 1e-2, 1e3)
        return Symmetry.apply(x, edges, eta, centre, cutoff)

    return symmetry


add(
    "radial_symmetry_owner",
    radial_symmetry,
    lambda: (real(4, 3), torch.tensor([[0, 0, 1, 2, 3], [1, 2, 2, 3, 0]])),
    bug="Backward takes the neighbour's grad_output where the sum is the centre's",
    trigger="a grad_output that isn't constant, and edges in one direction",
)


# Mahalanobis' distance of rows x from a centre: sqrt(|(x - centre) scale|^2 + eps)
def scaled_distance(wrong):
    class Distance(Function):
        @staticmethod
        def forward(ctx, x, centre, scale, eps):
            ctx.save_for_backward(x, centre, scale)
            ctx.eps = eps
            return (((x - centre) @ scale).square().sum(-1) + eps).sqrt()

        @staticmethod
        def backward(ctx, g):
            x, centre, scale = ctx.saved_tensors
            d = x - centre
            z = d @ scale
            square = z.square().sum(-1)
            length = square.sqrt() + ctx.eps if wrong else (square + ctx.eps).sqrt()
            h = z * (g / length)[:, None]
            grad = h @ scale.mT
            return grad, -grad.sum(0), d.mT @ h, None

    def distance(x, centre, scale, eps=1e-2):
        sized("x", x, None, None)
        sized("centre", centre, x.shape[1])
        sized("scale", scale, x.shape[1], None)
        alike(x, centre, scale)
        check(1e-6 <= eps <= 1, "eps: expected a number from 1e-6 to 1")
        for name, t in {"x": x, "centre": centre, "scale": scale}.items():
            bounded(name, t, -1e3, 1e3)
        return Distance.apply(x, centre, scale, eps)

    return distance


add(
    "scaled_distance_eps",
    scaled_distance,
    lambda: (real(4, 3), real(3, seed=1), real(3, 3, seed=2)),
    bug="Backward adds eps to the root where forward adds it to the square",
)
