"""State: buffers, caches, saved tensors, grad_output and draws that backward must leave alone."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.fortysecond import add, alike, bounded, check, same, sized


# An explicit step of the heat equation on rods (B, N) whose ends keep their temperature
def heat_step(wrong):
    class Step(Function):
        @staticmethod
        def forward(ctx, u, rate):
            ctx.save_for_backward(u, rate)
            bend = u[:, 2:] - 2 * u[:, 1:-1] + u[:, :-2]
            return u + rate * F.pad(bend, (1, 1))

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            u, rate = ctx.saved_tensors
            bend = u[:, 2:] - 2 * u[:, 1:-1] + u[:, :-2]
            inner = g[:, 1:-1] * rate
            grad = g.contiguous() if wrong else g.clone()
            by_rate = (g[:, 1:-1] * bend).sum()
            grad[:, :-2] += inner
            grad[:, 1:-1] -= 2 * inner
            grad[:, 2:] += inner
            return grad, by_rate

    def step(u, rate):
        sized("u", u, None, None)
        check(u.shape[1] >= 3, "u: expected three places or more")
        sized("rate", rate)
        alike(u, rate)
        bounded("u", u, -1e3, 1e3)
        bounded("rate", rate, 0, 0.5)
        return Step.apply(u, rate)

    return step


add(
    "heat_step_writes",
    heat_step,
    lambda: (real(2, 5), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)),
    bug="Backward adds the neighbours' parts into grad_output itself: contiguous() isn't a copy",
    trigger="a contiguous grad_output that somebody else reads, too",
)


# A stereo loss of left and right channels against others: mean squares of mid's and side's errors, side weighted
def mid_side(wrong):
    def gradients(left, right, other_left, other_right, weight):
        dl, dr = left - other_left, right - other_right
        mid, side = (dl + dr) / left.numel(), weight * (dl - dr) / left.numel()
        return mid + side, mid - side

    class MidSide(Function):
        @staticmethod
        def forward(ctx, left, right, other_left, other_right, weight):
            tensors = left, right, other_left, other_right
            if wrong:
                ctx.grads = gradients(*tensors, weight)
            else:
                ctx.save_for_backward(*tensors)
                ctx.weight = weight
            dl, dr = left - other_left, right - other_right
            return ((dl + dr).square() + weight * (dl - dr).square()).mean() / 2

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            if wrong:
                by_left, by_right = (t.mul_(g) for t in ctx.grads)
            else:
                by_left, by_right = (g * t for t in gradients(*ctx.saved_tensors, ctx.weight))
            return by_left, by_right, -by_left, -by_right, None

    def loss(left, right, other_left, other_right, weight=0.4):
        tensors = left, right, other_left, other_right
        check(left.numel() > 0, "left: expected samples")
        same(*tensors)
        alike(*tensors)
        check(0 <= weight <= 10, "weight: expected a number from 0 to 10")
        for name, t in zip(("left", "right", "other_left", "other_right"), tensors, strict=True):
            bounded(name, t, -1e3, 1e3)
        return MidSide.apply(*tensors, weight)

    return loss


add(
    "mid_side_scaled_twice",
    mid_side,
    lambda: tuple(real(2, 4, seed=k) for k in range(4)),
    bug="Backward scales the gradients that forward kept in place",
    trigger="backward twice through one graph",
)


# The soft least squared distance of rows (N, D) to centres (K, D)
def softmin_distance(wrong):
    def squares(x, centres):
        return (x[:, None] - centres).square().sum(2)

    class Least(Function):
        shares = None

        @staticmethod
        def forward(ctx, x, centres, gamma):
            ctx.save_for_backward(x, centres)
            ctx.gamma = gamma
            if wrong:
                Least.shares = (-squares(x, centres) / gamma).softmax(1)
            return -gamma * (-squares(x, centres) / gamma).logsumexp(1)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            x, centres = ctx.saved_tensors
            shares = (-squares(x, centres) / ctx.gamma).softmax(1)
            if wrong and Least.shares.shape == shares.shape:
                shares = Least.shares
            part = 2 * (g[:, None] * shares)[:, :, None] * (x[:, None] - centres)
            return part.sum(1), -part.sum(0), None

    def least(x, centres, gamma=1.0):
        sized("x", x, None, None)
        sized("centres", centres, None, x.shape[1])
        alike(x, centres)
        check(0.1 <= gamma <= 100, "gamma: expected a number from 0.1 to 100")
        bounded("x", x, -10, 10)
        bounded("centres", centres, -10, 10)
        return Least.apply(x, centres, gamma)

    return least


add(
    "softmin_class_shares",
    softmin_distance,
    lambda: (real(4, 2), real(3, 2, seed=1)),
    bug="Backward takes the shares that the class kept of the last call",
    trigger="two calls in one graph",
)


# Weighted quantile sums: scores (B, M) of pollutants, weighted by a softmax over M, times a slope
def quantile_sum(wrong):
    room = {}

    class QuantileSum(Function):
        @staticmethod
        def forward(ctx, scores, logits, slope):
            weights = logits.softmax(0)
            if wrong:
                key = logits.shape, logits.dtype, logits.device
                weights = room.setdefault(key, torch.empty_like(weights)).copy_(weights)
                ctx.weights = weights
            ctx.save_for_backward(scores, logits, slope)
            return slope * (scores @ weights)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            scores, logits, slope = ctx.saved_tensors
            weights = ctx.weights if wrong else logits.softmax(0)
            by_weights = slope * (g @ scores)
            by_logits = weights * (by_weights - (by_weights * weights).sum())
            by_scores = slope * g[:, None] * weights
            return by_scores, by_logits, (g * (scores @ weights)).sum()

    def index(scores, logits, slope):
        sized("scores", scores, None, None)
        sized("logits", logits, scores.shape[1])
        sized("slope", slope)
        alike(scores, logits, slope)
        bounded("scores", scores, -100, 100)
        bounded("logits", logits, -30, 30)
        bounded("slope", slope, -100, 100)
        return QuantileSum.apply(scores, logits, slope)

    return index


add(
    "quantile_sum_workspace",
    quantile_sum,
    lambda: (
        real(4, 3),
        real(3, seed=1),
        torch.tensor(0.7, dtype=torch.float64, requires_grad=True),
    ),
    bug="The weights lie in one workspace for all calls of a shape: the next call overwrites them",
    trigger="two calls of one shape before backward",
)


# Heun's step of van der Pol's oscillator: positions and speeds with a learned damping
def heun_step(wrong):
    def slope(x, v, mu):
        return v, mu * (1 - x.square()) * v - x

    def back(x, v, mu, gx, gv):
        """Return the gradients of slope by x, v and mu."""
        return (
            gv * (-2 * mu * x * v - 1),
            gx + gv * mu * (1 - x.square()),
            gv * (1 - x.square()) * v,
        )

    class Heun(Function):
        @staticmethod
        def forward(ctx, x, v, mu, step):
            ctx.save_for_backward(x, v, mu)
            ctx.step = step
            dx, dv = slope(x, v, mu)
            ex, ev = slope(x + step * dx, v + step * dv, mu)
            return x + step / 2 * (dx + ex), v + step / 2 * (dv + ev)

        @staticmethod
        @once_differentiable
        def backward(ctx, gx, gv):
            x, v, mu = ctx.saved_tensors
            step = ctx.step
            dx, dv = (step * t for t in slope(x, v, mu))
            half = step / 2 * gx, step / 2 * gv
            far = (x.add_(dx), v.add_(dv)) if wrong else (x + dx, v + dv)
            ends = back(*far, mu, *half)
            start = far[0] - dx, far[1] - dv
            mine = back(*start, mu, half[0] + step * ends[0], half[1] + step * ends[1])
            by_mu = (ends[2] + mine[2]).sum()
            return gx + ends[0] + mine[0], gv + ends[1] + mine[1], by_mu, None

    def moved(x, v, mu, step=0.1):
        same(x, v)
        sized("mu", mu)
        alike(x, v, mu)
        check(0 < step <= 1, "step: expected a number above 0, up to 1")
        bounded("x", x, -10, 10)
        bounded("v", v, -10, 10)
        bounded("mu", mu, 0, 10)
        return Heun.apply(x, v, mu, step)

    return moved


add(
    "heun_step_moves",
    heun_step,
    lambda: (real(4), real(4, seed=1), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)),
    bug="Backward moves the saved states to the step's end in place, and leaves them there",
    trigger="backward twice, or a look at the inputs after backward",
)


# Competing units (B, K): a row's winner, drawn from its softmax, passes its square, the others a tenth of it
def competing(wrong):
    def drawn(x, source):
        u = torch.rand(x.shape, generator=source, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        score = x.detach().double() - (-u.log()).log().to(x.device)
        return F.one_hot(score.argmax(1), x.shape[1]).to(x.dtype)

    class Competing(Function):
        @staticmethod
        def forward(ctx, x, seed):
            ctx.source = torch.Generator().manual_seed(seed)
            ctx.seed = seed
            ctx.save_for_backward(x)
            return x.square() * (0.1 + 0.9 * drawn(x, ctx.source))

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            source = ctx.source if wrong else torch.Generator().manual_seed(ctx.seed)
            return g * 2 * x * (0.1 + 0.9 * drawn(x, source)), None

    def units(x, seed=3):
        sized("x", x, None, None)
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(isinstance(seed, int) and 0 <= seed < 2**31, "seed: expected an integer")
        bounded("x", x, -100, 100)
        return Competing.apply(x, seed)

    return units


add(
    "competing_units_draws_on",
    competing,
    lambda: (real(4, 5),),
    bug="Backward draws the winners again, further on in the generator's sequence",
)
