"""Statistics, transport, segments."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyfifth import add, check, indices, leaf, positive, same, sized


# Sums of rows by segment; a row of segment -1 is left out
def segment_total(wrong):
    class Total(Function):
        @staticmethod
        def forward(ctx, x, i, n):
            ctx.save_for_backward(i)
            kept = i >= 0
            return x.new_zeros(n, x.shape[1]).index_add(0, i[kept], x[kept])

        @staticmethod
        def backward(ctx, grad_y):
            (i,) = ctx.saved_tensors
            grad_x = grad_y[i]
            if not wrong:
                grad_x = torch.where((i >= 0)[:, None], grad_x, 0)
            return grad_x, None, None

    def total(x, i, n=3):
        sized("x", x, None, None)
        sized("i", i, len(x))
        check(n >= 1, "n: expected one segment at least")
        indices("i", i + 1, n + 1)
        return Total.apply(x, i.long(), n)

    return total


add(
    "segment_total_left_out",
    segment_total,
    lambda: (real(4, 2), torch.tensor([0, 2, 0, 1])),
    bug="The index -1, which forward leaves out, means the last segment to backward",
    trigger="rows of segment -1",
)


# Rows of several sequences one after the other, as a padded batch that is cut at a largest length
def padded_batch(wrong):
    class Padded(Function):
        @staticmethod
        def places(lengths, longest):
            t = torch.arange(longest, device=lengths.device)
            starts = lengths.cumsum(0) - lengths
            return starts[:, None] + t, t < lengths[:, None]

        @staticmethod
        def forward(ctx, x, lengths, longest):
            ctx.save_for_backward(lengths)
            ctx.longest = longest
            place, there = Padded.places(lengths, longest)
            return torch.where(there[..., None], x[place.clamp(max=len(x) - 1)], 0)

        @staticmethod
        def backward(ctx, grad_y):
            (lengths,) = ctx.saved_tensors
            n = torch.arange(len(lengths), device=lengths.device)
            row = n.repeat_interleave(lengths)
            t = torch.arange(len(row), device=row.device) - (lengths.cumsum(0) - lengths)[row]
            grad_x = grad_y[row, t.clamp(max=ctx.longest - 1)]
            if not wrong:
                grad_x = torch.where((t < ctx.longest)[:, None], grad_x, 0)
            return grad_x, None, None

    def padded(x, lengths, longest=4):
        sized("x", x, None, None)
        sized("lengths", lengths, None)
        indices("lengths", lengths, len(x) + 1)
        check(int(lengths.sum()) == len(x), "lengths: expected the rows of x in all")
        check(longest >= 1, "longest: expected a number of at least 1")
        return Padded.apply(x, lengths.long(), longest)

    return padded


add(
    "padded_batch_cut",
    padded_batch,
    lambda: (real(6, 2), torch.tensor([2, 3, 1])),
    bug="Rows that were cut off get the last kept row's gradient",
    trigger="a sequence longer than the largest length",
)


# The mean of a column without its k smallest and k largest numbers
def trimmed_mean(wrong):
    class Trimmed(Function):
        @staticmethod
        def forward(ctx, x, k):
            order = x.argsort(dim=0, stable=True)[k : len(x) - k]
            ctx.save_for_backward(x, order)
            return x.gather(0, order).mean(0)

        @staticmethod
        def backward(ctx, grad_y):
            x, order = ctx.saved_tensors
            kept = torch.zeros_like(x).scatter(0, order, 1)
            if wrong:
                inner = x.gather(0, order)
                kept = ((x >= inner[0]) & (x <= inner[-1])).to(x.dtype)
            return grad_y * kept / len(order), None

    def mean(x, k=1):
        sized("x", x, None, None)
        check(0 <= 2 * k < len(x), "k: expected to leave one row at least")
        check(not bool(x.isnan().any()), "x: expected no NaN")
        return Trimmed.apply(x, k)

    return mean


add(
    "trimmed_mean_equal",
    trimmed_mean,
    lambda: (real(5, 3),),
    bug="Backward keeps what lies between two thresholds, which equal numbers reach too",
    trigger="equal numbers where the cut is",
)


# Box and Cox's transform: y = (x^p - 1) / p = L phi(p L), L = log(x), phi(z) = (e^z - 1) / z
def box_cox(wrong):
    def curve(z):
        """((z - 1) e^z + 1) / z^2, phi's derivative."""
        near = z.abs() < 0.1
        far = torch.where(near, 1, z)
        series = z / 403200 + 1 / 45360
        for divisor in (5760, 840, 144, 30, 8, 3, 2):
            series = series * z + 1 / divisor
        return torch.where(near, series, ((far - 1) * far.exp() + 1) / far**2)

    class Transform(Function):
        @staticmethod
        def forward(ctx, x, p):
            ctx.save_for_backward(x, p)
            log = x.log()
            power = torch.where(p == 0, 1, p)
            return torch.where(p == 0, log, (power * log).expm1() / power)

        @staticmethod
        def backward(ctx, grad_y):
            x, p = ctx.saved_tensors
            log = x.log()
            slope = log * log * curve(p * log)
            if wrong:
                slope = (x**p * log - (x**p - 1) / p) / p
            return grad_y * x ** (p - 1), (grad_y * slope).sum()

    def transform(x, p):
        check(p.ndim == 0 and bool(p.abs() <= 20), "p: expected a single number up to 20")
        positive("x", x)
        return Transform.apply(x, p)

    return transform


add(
    "box_cox_zero",
    box_cox,
    lambda: (real(3, 4, positive=True), leaf(torch.tensor(0.5, dtype=torch.float64))),
    bug="Forward knows the logarithm as the power 0's limit, backward divides by the power",
    trigger="p = 0, a common start",
)


# The logarithm of a gamma density with shape a and rate b, without its constants of x
def gamma_density(wrong):
    class Density(Function):
        @staticmethod
        def forward(ctx, x, a, b):
            ctx.save_for_backward(x, a, b)
            return a * b.log() + (a - 1) * x.log() - b * x - a.lgamma()

        @staticmethod
        def backward(ctx, grad_y):
            x, a, b = ctx.saved_tensors
            grad_x = grad_y * ((a - 1) / x - (0 if wrong else b))
            grad_a = grad_y * (b.log() + x.log() - a.digamma())
            return grad_x, grad_a, grad_y * (a / b - x)

    def density(x, a, b):
        same(x, a, b)
        for name, t in zip("xab", (x, a, b), strict=True):
            positive(name, t)
        return Density.apply(x, a, b)

    return density


add(
    "gamma_density_sample",
    gamma_density,
    lambda: (
        real(3, 4, positive=True, grad=False),
        real(3, 4, seed=1, positive=True),
        real(3, 4, seed=2, positive=True),
    ),
    bug="The sample's gradient, which maximum likelihood never asks for, lacks the rate",
    trigger="a sample that requires a gradient, as in variational inference",
)


# Gromov and Wasserstein's cost of a plan P: sum (C_ik - D_jl)^2 P_ij P_kl
def plan_cost(wrong):
    def against(c, d, p):
        """sum over k, l of (C_ik - D_jl)^2 P_kl."""
        rows, columns = c.square() @ p.sum(1), d.square() @ p.sum(0)
        return rows[:, None] + columns - 2 * c @ p @ d.mT

    class Cost(Function):
        @staticmethod
        def forward(ctx, c, d, p):
            ctx.save_for_backward(c, d, p)
            return (p * against(c, d, p)).sum()

        @staticmethod
        def backward(ctx, grad_y):
            c, d, p = ctx.saved_tensors
            other = against(c, d, p) if wrong else against(c.mT, d.mT, p)
            a, b = p.sum(1), p.sum(0)
            grad_c = 2 * (c * a[:, None] * a - p @ d @ p.mT)
            grad_d = 2 * (d * b[:, None] * b - p.mT @ c @ p)
            return grad_y * grad_c, grad_y * grad_d, grad_y * (against(c, d, p) + other)

    def cost(c, d, p):
        sized("p", p, None, None)
        sized("c", c, len(p), len(p))
        sized("d", d, p.shape[1], p.shape[1])
        return Cost.apply(c, d, p)

    return cost


def distances(n, seed):
    x = real(n, 2, seed=seed, grad=False)
    return (x[:, None] - x).square().sum(-1).sqrt()


add(
    "plan_cost_directed",
    plan_cost,
    lambda: (distances(3, 0), distances(4, 1), leaf(real(3, 4, seed=2).softmax(1) / 3)),
    bug="The plan's gradient is twice one half, as for distances that are the same both ways",
    trigger="costs that depend on the direction",
)


# The energy of weighted edges: y = sum over edges of w (x_i - x_j)^2
def edge_energy(wrong):
    class Energy(Function):
        @staticmethod
        def forward(ctx, x, w, edges):
            ctx.save_for_backward(x, w, edges)
            i, j = edges
            return (w * (x[i] - x[j]).square().sum(1)).sum()

        @staticmethod
        def backward(ctx, grad_y):
            x, w, edges = ctx.saved_tensors
            i, j = edges
            d = x[i] - x[j]
            flow = (grad_y * 2 * w[:, None] * d).to(x.dtype)
            zeros = torch.zeros_like(x)
            if wrong:
                adjacency = w.new_zeros(len(x), len(x)).index_put((i, j), w)
                adjacency = adjacency + adjacency.mT
                grad_x = grad_y * 2 * (adjacency.sum(1)[:, None] * x - adjacency @ x)
            else:
                grad_x = zeros.index_add(0, i, flow).index_add(0, j, -flow)
            return grad_x, grad_y * d.square().sum(1), None

    def energy(x, w, edges):
        sized("x", x, None, None)
        sized("w", w, None)
        sized("edges", edges, 2, len(w))
        indices("edges", edges, len(x))
        return Energy.apply(x, w, edges.long())

    return energy


add(
    "edge_energy_twice",
    edge_energy,
    lambda: (real(4, 2), real(3, seed=1, positive=True), torch.tensor([[0, 1, 2], [1, 2, 3]])),
    bug="Backward makes a matrix of the edges, in which an edge that is named twice counts once",
    trigger="parallel edges",
)
