"""State: what is written to, kept between calls, or drawn again."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.thirtyninth import (
    add,
    add_bare,
    alike,
    bounded,
    check,
    indices,
    same,
    sized,
)


# A step of Izhikevich's neuron below its threshold: the potential v and the recovery u after a time dt
def izhikevich(wrong):
    class Step(Function):
        @staticmethod
        def forward(ctx, v, u, current, dt):
            ctx.save_for_backward(v.clone() if wrong else v)
            ctx.dt = dt
            after = u + dt * 0.02 * (0.2 * v - u)
            change = dt * (0.04 * v.square() + 5 * v + 140 - u + current)
            return v.add_(change).clone() if wrong else v + change, after

        @staticmethod
        def backward(ctx, gv, gu):
            (v,) = ctx.saved_tensors
            by_v = gv * (1 + ctx.dt * (0.08 * v + 5)) + gu * ctx.dt * 0.004
            return by_v, gu * (1 - ctx.dt * 0.02) - ctx.dt * gv, ctx.dt * gv, None

    def step(v, u, current, dt=0.1):
        same(v, u, current)
        alike(v, u, current)
        check(1e-3 <= dt <= 1, "dt: expected a number from 0.001 to 1")
        for name, t in {"v": v, "u": u, "current": current}.items():
            bounded(name, t, -200, 200)
        return Step.apply(v, u, current, dt)

    return step


add(
    "izhikevich_written",
    izhikevich,
    lambda: tuple(real(5, seed=s) for s in (0, 1, 2)),
    bug="Forward adds the step to the caller's potential in place, without mark_dirty",
    trigger="a look at the potential after the call",
)


# A step of an LSTM whose output is projected: w (4 H, I + P), projection (P, H)
def projected_lstm(wrong):
    class Step(Function):
        @staticmethod
        def forward(ctx, x, h, c, w, projection):
            joined = torch.cat([x, h], 1)
            z = joined @ w.mT
            n = c.shape[1]
            gates = torch.cat([z[:, : 3 * n].sigmoid(), z[:, 3 * n :].tanh()], 1)
            i, f, o, new = gates.chunk(4, 1)
            after = f * c + i * new
            ctx.save_for_backward(joined, c, w, projection, gates, after.tanh())
            return (o * after.tanh()) @ projection.mT, after

        @staticmethod
        @once_differentiable
        def backward(ctx, gh, gc):
            joined, c, w, projection, gates, bent = ctx.saved_tensors
            i, f, o, new = gates.chunk(4, 1)
            q = gh @ projection
            by_projection = gh.mT @ (o * bent)
            gc = gc + q * o * (1 - bent.square())
            before = gc * f
            parts = [
                gc * new * i * (1 - i),
                gc * c * f * (1 - f),
                q * bent * o * (1 - o),
                gc * i * (1 - new.square()),
            ]
            gz = torch.cat(parts, 1, out=gates.data) if wrong else torch.cat(parts, 1)
            back = gz @ w
            inputs = joined.shape[1] - projection.shape[0]
            return back[:, :inputs], back[:, inputs:], before, gz.mT @ joined, by_projection

    def step(x, h, c, w, projection):
        sized("x", x, None, None)
        sized("h", h, len(x), None)
        sized("c", c, len(x), None)
        sized("w", w, 4 * c.shape[1], x.shape[1] + h.shape[1])
        sized("projection", projection, h.shape[1], c.shape[1])
        alike(x, h, c, w, projection)
        for name, t in {"x": x, "h": h, "c": c, "w": w, "projection": projection}.items():
            bounded(name, t, -100, 100)
        return Step.apply(x, h, c, w, projection)

    return step


add(
    "projected_lstm_gates",
    projected_lstm,
    lambda: (real(2, 2), real(2, 2, seed=1), real(2, 3, seed=2), real(12, 4, seed=3), real(2, 3)),
    bug="Backward puts the gates' gradients into the memory of the saved gates",
    trigger="a second backward through the same graph",
)


# Noise contrastive estimation: x (N, D) against rows of a table, its targets (N) and noise (N, K) drawn with odds q
def contrast_with_noise(wrong):
    class Contrast(Function):
        @staticmethod
        def forward(ctx, x, table, log_odds, target, noise):
            shift = log_odds + torch.log(torch.full_like(log_odds, noise.shape[1]))
            hit = (x * table[target]).sum(1) - shift[target]
            miss = torch.einsum("nd,nkd->nk", x, table[noise]) - shift[noise]
            ctx.save_for_backward(x, table, target, noise, -(-hit).sigmoid(), miss.sigmoid())
            ctx.terms = [torch.einsum("nk,nkd->nd", miss.sigmoid(), table[noise])]
            return F.softplus(-hit).sum() + F.softplus(miss).sum()

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            x, table, target, noise, hit, miss = ctx.saved_tensors
            terms = ctx.terms if wrong else list(ctx.terms)
            terms.append(hit[:, None] * table[target])
            rows = g * torch.einsum("nk,nd->nkd", miss, x).flatten(0, 1)
            by_table = torch.zeros_like(table).index_add(0, noise.flatten(), rows)
            by_table = by_table.index_add(0, target, g * hit[:, None] * x)
            return g * sum(terms), by_table, None, None, None

    def contrast(x, table, log_odds, target, noise):
        sized("x", x, None, None)
        sized("table", table, None, x.shape[1])
        sized("log_odds", log_odds, len(table))
        sized("target", target, len(x))
        sized("noise", noise, len(x), None)
        alike(x, table, log_odds)
        check(not log_odds.requires_grad, "log_odds: expected odds without gradient")
        indices("target", target, len(table))
        indices("noise", noise, len(table))
        bounded("x", x, -100, 100)
        bounded("table", table, -100, 100)
        bounded("log_odds", log_odds, -100, 0)
        return Contrast.apply(x, table, log_odds, target, noise)

    return contrast


add(
    "contrast_with_noise_terms",
    contrast_with_noise,
    lambda: (
        real(3, 4),
        real(5, 4, seed=1),
        real(5, seed=2, grad=False).log_softmax(0),
        whole(5, 3),
        whole(5, 3, 2, seed=1),
    ),
    bug="Each backward appends the targets' term to the list that forward left on ctx",
    trigger="a second backward through the same graph",
)


class Minimal(Function):
    @staticmethod
    def forward(ctx, x, w, packed):
        z, new = (x @ w.mT).chunk(2, -1)
        z = z.sigmoid()
        states = [torch.zeros_like(new[:, 0])]
        for t in range(x.shape[1]):
            states.append(states[-1] + z[:, t] * (new[:, t] - states[-1]))
        ctx.save_for_backward(x, w if packed is None else packed, z, new, torch.stack(states, 1))
        return torch.stack(states[1:], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, z, new, states = ctx.saved_tensors
        carry, parts = torch.zeros_like(g[:, 0]), []
        for t in reversed(range(x.shape[1])):
            carry = carry + g[:, t]
            by_z = carry * (new[:, t] - states[:, t]) * z[:, t] * (1 - z[:, t])
            parts.append(torch.cat([by_z, carry * z[:, t]], -1))
            carry = carry * (1 - z[:, t])
        h = torch.stack(parts[::-1], 1)
        return h @ w, h.flatten(0, 1).mT @ x.flatten(0, 1), None


class MinimalGRU(nn.Module):
    """The minimal GRU h + z (c - h) over x (B, T, D), z and c linear in x."""

    def __init__(self, inputs, width, wrong):
        super().__init__()
        self.gate = nn.Parameter(real(width, inputs, seed=5, grad=False))
        self.candidate = nn.Parameter(real(width, inputs, seed=6, grad=False))
        self.packed, self.wrong = None, wrong

    def forward(self, x):
        check(x.dtype == self.gate.dtype, "x: expected the parameters' dtype")
        check(x.dtype in (torch.float32, torch.float64), "x: expected float32 or float64")
        sized("x", x, None, None, self.gate.shape[1])
        bounded("x", x, -100, 100)
        w = torch.cat([self.gate, self.candidate])
        if self.wrong and self.packed is None:
            self.packed = w.detach()
        with torch.autocast(x.device.type, enabled=False):
            return Minimal.apply(x, w, self.packed)


add_bare(
    "minimal_gru_packed",
    lambda wrong: MinimalGRU(3, 2, wrong),
    lambda: (real(2, 4, 3),),
    bug="Backward multiplies by weights that the module packed at its first call",
    trigger="parameters that an optimiser has changed since the first call",
)


# The cotangent Laplacian of a mesh in the plane, applied to values u (V, C) of its vertices
def cotangent_laplacian(wrong):
    buffers = {}

    def room(u):
        if not wrong:
            return torch.zeros_like(u)
        key = u.shape, u.dtype, u.device
        if key not in buffers:
            buffers[key] = torch.zeros_like(u)
        return buffers[key].data.zero_()

    def apply(u, place, faces, out):
        for a, b, c in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
            i, j = faces[:, b], faces[:, c]
            p, q = place[i] - place[faces[:, a]], place[j] - place[faces[:, a]]
            area = (p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]).abs()
            flow = ((p * q).sum(1) / area / 2)[:, None] * (u[i] - u[j])
            out = out.index_add_(0, i, flow).index_add_(0, j, -flow)
        return out

    class Laplacian(Function):
        @staticmethod
        def forward(ctx, u, place, faces):
            ctx.save_for_backward(place, faces)
            return apply(u, place, faces, room(u.contiguous()))

        @staticmethod
        def backward(ctx, g):
            place, faces = ctx.saved_tensors
            return apply(g, place, faces, torch.zeros_like(g.contiguous())), None, None

    def laplacian(u, place, faces):
        sized("u", u, None, None)
        sized("place", place, len(u), 2)
        sized("faces", faces, None, 3)
        indices("faces", faces, len(u))
        alike(u, place)
        check(not place.requires_grad, "place: expected places without gradient")
        bounded("u", u, -1e3, 1e3)
        bounded("place", place, -100, 100)
        a, b, c = place[faces].unbind(1)
        twice = (b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]
        bounded("the faces' areas", twice.abs(), 1e-2, 1e5)
        return Laplacian.apply(u, place, faces)

    return laplacian


add(
    "cotangent_laplacian_buffer",
    cotangent_laplacian,
    lambda: (
        real(4, 2),
        torch.tensor([[0.0, 0], [1, 0.1], [0.2, 1], [1.2, 1.3]], dtype=torch.float64),
        torch.tensor([[0, 1, 2], [1, 3, 2]]),
    ),
    bug="Outputs of one shape share a static buffer",
    trigger="another call before the first result is used",
)


class Truncated(Function):
    @staticmethod
    def forward(ctx, x, counts, shift, owner, train):
        ctx.save_for_backward(x, counts, shift)
        ctx.owner, ctx.train = owner, train
        eta = x - (x.mean(0) if train else shift)
        rate = eta.exp()
        return (rate + torch.log(-torch.expm1(-rate)) - counts * eta).sum()

    @staticmethod
    def backward(ctx, g):
        x, counts, shift = ctx.saved_tensors
        train = ctx.train if ctx.owner is None else ctx.owner.training
        eta = x - (x.mean(0) if train else shift)
        grad = g * (-eta.exp() / torch.expm1(-eta.exp()) - counts)
        return grad - grad.mean(0) if train else grad, None, None, None, None


class TruncatedPoisson(nn.Module):
    """Minus the log likelihood of counts above 0 at log rates x (N, D), centred by batch or by a buffer."""

    def __init__(self, width, wrong):
        super().__init__()
        self.register_buffer("shift", real(width, seed=5, grad=False))
        self.wrong = wrong

    def forward(self, x, counts):
        check(x.dtype == self.shift.dtype, "x: expected the buffer's dtype")
        check(x.dtype in (torch.float32, torch.float64), "x: expected float32 or float64")
        sized("x", x, None, len(self.shift))
        same(x, counts)
        check(counts.dtype == torch.int64, "counts: expected int64")
        bounded("x", x, -10, 10)
        bounded("counts", counts, 1, 10**6)
        owner = self if self.wrong else None
        return Truncated.apply(x, counts.to(x.dtype), self.shift, owner, self.training)


add_bare(
    "truncated_poisson_mode",
    lambda wrong: TruncatedPoisson(3, wrong),
    lambda: (real(4, 3), whole(5, 4, 3) + 1),
    bug="Backward asks the module whether it trains, not what it did in forward",
    trigger="eval() between forward and backward",
)


# Minus the log density of a log-normal at counts to which noise from a seed is added
def dequantised(wrong):
    def logarithm(counts, generator, like):
        noise = torch.rand(counts.shape, generator=generator, dtype=torch.float64)
        return (counts + (noise.to(counts.device) + 1e-3) / 1.002).log().to(like.dtype)

    class Density(Function):
        @staticmethod
        def forward(ctx, mean, width, counts, seed):
            ctx.save_for_backward(mean, width, counts)
            ctx.seed, ctx.generator = seed, torch.Generator().manual_seed(seed)
            y = logarithm(counts, ctx.generator, mean)
            return ((y - mean) / width.exp()).square() / 2 + width + y

        @staticmethod
        def backward(ctx, g):
            mean, width, counts = ctx.saved_tensors
            if not wrong:
                ctx.generator.manual_seed(ctx.seed)
            d = (logarithm(counts, ctx.generator, mean) - mean) / width.exp()
            return -g * d / width.exp(), g * (1 - d.square()), None, None

    def density(mean, width, counts, seed=0):
        same(mean, width, counts)
        alike(mean, width)
        check(counts.dtype == torch.int64, "counts: expected int64")
        bounded("mean", mean, -100, 100)
        bounded("width", width, -5, 5)
        bounded("counts", counts, 0, 10**6)
        return Density.apply(mean, width, counts, seed)

    return density


add(
    "dequantised_drawn_on",
    dequantised,
    lambda: (real(5), real(5, seed=1), whole(6, 5)),
    bug="Backward draws the noise from where forward left the generator",
)


# The real-gated linear recurrence h a + sqrt(1 - a^2) sigmoid(i) x, log a = -8 softplus(decay) sigmoid(r)
def real_gated(wrong):
    def gates(r, i, decay):
        log_a = -8 * F.softplus(decay) * r.sigmoid()
        return log_a, (-torch.expm1(2 * log_a)).sqrt(), i.sigmoid()

    class Recurrence(Function):
        @staticmethod
        def forward(ctx, x, r, i, decay):
            log_a, scale, gate = gates(r, i, decay)
            h, states = torch.zeros_like(x[0]), []
            for a, step in zip(log_a.exp(), scale * gate * x, strict=True):
                states.append(h)
                h = a * h + step
            ctx.save_for_backward(x, r, i, decay, torch.stack(states))
            return torch.stack([*states[1:], h])

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            x, r, i, decay, states = ctx.saved_tensors
            log_a, scale, gate = gates(r, i, decay)
            a = log_a.exp()
            d = g.contiguous() if wrong else g.clone()
            for t in reversed(range(len(x) - 1)):
                d[t] += a[t + 1] * d[t + 1]
            by_log = d * (states * a - gate * x * a.square() / scale)
            by_input = d * scale
            by_decay = (by_log * r.sigmoid()).sum(0) * -8 * decay.sigmoid()
            by_r = by_log * -8 * F.softplus(decay) * r.sigmoid() * (1 - r.sigmoid())
            return by_input * gate, by_r, by_input * x * gate * (1 - gate), by_decay

    def recurrence(x, r, i, decay):
        sized("x", x, None, None)
        same(x, r, i)
        sized("decay", decay, x.shape[1])
        alike(x, r, i, decay)
        bounded("x", x, -1e3, 1e3)
        bounded("r", r, -8, 8)
        bounded("i", i, -20, 20)
        bounded("decay", decay, -5, 5)
        return Recurrence.apply(x, r, i, decay)

    return recurrence


add(
    "real_gated_contiguous",
    real_gated,
    lambda: (*(real(5, 3, seed=s) for s in (0, 1, 2)), real(3, seed=3)),
    bug="Backward scans in place on g.contiguous(), which is grad_output itself where that is contiguous",
    trigger="a grad_output that another branch needs, too",
)
