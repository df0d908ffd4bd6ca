"""Sequences: filters, chains, memories, neurons, spectra, groups of rows."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real, whole
from tests.verify.unseen.thirtyfourth import add, alike, bounded, check, indices, same, sized


# Log likelihood of a scalar state-space model: transition a, noises q and r; starts at mean 0, variance 1
def kalman(wrong):
    def steps(y, a, q, r):
        m, p = torch.zeros_like(a), torch.ones_like(a)
        for observed in y:
            expected, spread = a * m, a * a * p + q
            off, total = observed - expected, spread + r
            gain = spread / total
            yield m, p, spread, off, total, gain
            m, p = expected + gain * off, (1 - gain) * spread

    class Likelihood(Function):
        @staticmethod
        def forward(ctx, y, a, q, r):
            ctx.save_for_backward(y, a, q, r)
            done = list(steps(y, a, q, r))
            off, total = torch.stack([s[3] for s in done]), torch.stack([s[4] for s in done])
            return -((2 * torch.pi * total).log() + off.square() / total).sum() / 2

        @staticmethod
        def backward(ctx, g):
            y, a, q, r = ctx.saved_tensors
            grad_m = grad_p = grad_a = grad_q = grad_r = torch.zeros_like(a)
            grad_y = []
            for m, p, spread, off, total, gain in reversed(list(steps(y, a, q, r))):
                grad_gain = grad_m * off - grad_p * spread
                grad_off = grad_m * gain - g * off / total
                grad_total = (
                    g * (off.square() / total - 1) / total / 2 - grad_gain * spread / total**2
                )
                grad_spread = grad_p * (1 - gain) + grad_gain / total + grad_total
                grad_expected = grad_m - grad_off
                grad_y.append(grad_off)
                grad_r = grad_r + grad_total
                grad_q = grad_q + grad_spread
                grad_a = grad_a + 2 * a * p * grad_spread + m * grad_expected
                grad_m = a * grad_expected
                grad_p = (a if wrong else a * a) * grad_spread
            return torch.stack(grad_y[::-1]), grad_a, grad_q, grad_r

    def likelihood(y, a, q, r):
        sized("y", y, None)
        alike(y, a, q, r)
        check(a.ndim == q.ndim == r.ndim == 0, "a, q, r: expected one number each")
        bounded("y", y, -1e3, 1e3)
        bounded("a", a, -1, 1)
        bounded("q", q, 1e-2, 1e2)
        bounded("r", r, 1e-2, 1e2)
        return Likelihood.apply(y, a, q, r)

    return likelihood


add(
    "kalman_variance",
    kalman,
    lambda: (
        real(6),
        *(torch.tensor(n, dtype=F64, requires_grad=True) for n in (0.8, 0.3, 0.5)),
    ),
    bug="The variance's gradient passes to the step before with the transition, not with its square",
)


# Logarithm of a linear-chain CRF's partition functions: scores (B, T, K), transitions (K, K), lengths (B)
def partition(wrong):
    def forwards(scores, transitions, lengths):
        rows = [scores[:, 0]]
        for t in range(1, scores.shape[1]):
            new = (rows[-1][:, :, None] + transitions).logsumexp(1) + scores[:, t]
            rows.append(torch.where((t < lengths)[:, None], new, rows[-1]))
        return rows

    class Partition(Function):
        @staticmethod
        def forward(ctx, scores, transitions, lengths):
            ctx.save_for_backward(scores, transitions, lengths)
            return forwards(scores, transitions, lengths)[-1].logsumexp(1)

        @staticmethod
        def backward(ctx, g):
            scores, transitions, lengths = ctx.saved_tensors
            rows = forwards(scores, transitions, lengths)
            grad, grad_scores = g[:, None] * rows[-1].softmax(1), []
            grad_transitions = torch.zeros_like(transitions)
            for t in reversed(range(1, len(rows))):
                live = (t < lengths)[:, None]
                share = (rows[t - 1][:, :, None] + transitions).softmax(1)
                here = torch.where(live, grad, torch.zeros_like(grad))
                grad_scores.append(here)
                flow = share * (grad if wrong else here)[:, None]
                grad_transitions = grad_transitions + flow.sum(0)
                grad = torch.where(live, (share * grad[:, None]).sum(2), grad)
            return torch.stack([grad, *grad_scores[::-1]], 1), grad_transitions, None

    def log_partition(scores, transitions, lengths):
        sized("scores", scores, None, None, None)
        sized("transitions", transitions, scores.shape[2], scores.shape[2])
        sized("lengths", lengths, len(scores))
        indices("lengths", lengths, scores.shape[1] + 1)
        check(bool((lengths >= 1).all()), "lengths: expected 1 at least")
        alike(scores, transitions)
        bounded("scores", scores, -100, 100)
        bounded("transitions", transitions, -100, 100)
        return Partition.apply(scores, transitions, lengths)

    return log_partition


add(
    "partition_lengths",
    partition,
    lambda: (real(2, 5, 3), real(3, 3, seed=1), torch.tensor([5, 3])),
    bug="The steps behind a sequence's end count in the transitions' gradient",
    trigger="sequences of several lengths, as the sample has",
)


# De-emphasis of signals (B, T): y_t = x_t + a y_(t-1)
def deemphasis(wrong):
    def run(x, a):
        rows = [x[:, 0]]
        for t in range(1, x.shape[1]):
            rows.append(x[:, t] + a * rows[-1])
        return torch.stack(rows, 1)

    class Filter(Function):
        @staticmethod
        def forward(ctx, x, a):
            ctx.save_for_backward(x, a)
            return run(x, a)

        @staticmethod
        def backward(ctx, g):
            x, a = ctx.saved_tensors
            back = run(g.flip(1), a).flip(1)
            before = x if wrong else run(x, a)
            return back, (back[:, 1:] * before[:, :-1]).sum()

    def filtered(x, a):
        sized("x", x, None, None)
        alike(x, a)
        check(a.ndim == 0, "a: expected one number")
        bounded("x", x, -1e3, 1e3)
        bounded("a", a, -0.99, 0.99)
        return Filter.apply(x, a)

    return filtered


add(
    "deemphasis_saved",
    deemphasis,
    lambda: (real(2, 6), torch.tensor(0.9, dtype=F64, requires_grad=True)),
    bug="The coefficient's gradient is taken from the input before, not from the output before",
)


# Means of the rows (N, D) of each group; it takes half types and sums in float32
def group_mean(wrong):
    def up(t):
        return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t

    class Mean(Function):
        @staticmethod
        def forward(ctx, x, group, groups):
            ctx.save_for_backward(group)
            ctx.groups = groups
            total = up(x).new_zeros(groups, x.shape[1]).index_add(0, group, up(x))
            count = torch.bincount(group, minlength=groups).clamp(min=1)
            return (total / count[:, None]).to(x.dtype)

        @staticmethod
        def backward(ctx, g):
            (group,) = ctx.saved_tensors
            if wrong:
                count = g.new_zeros(ctx.groups).index_add(0, group, g.new_ones(len(group)))
            else:
                count = torch.bincount(group, minlength=ctx.groups)
            count = count.clamp(min=1).to(up(g).dtype)
            return (up(g) / count[:, None])[group].to(g.dtype), None, None

    def mean(x, group, groups=3):
        sized("x", x, None, None)
        sized("group", group, len(x))
        indices("group", group, groups)
        check(x.is_floating_point(), "expected floating point numbers")
        bounded("x", x, -1e4, 1e4)
        return Mean.apply(x, group, groups)

    return mean


add(
    "group_mean_counts",
    group_mean,
    lambda: (real(10, 2), whole(3, 10, seed=1)),
    bug="Backward counts a group's rows in the gradient's type, which in bfloat16 ends at 256",
    trigger="bfloat16 with more than 256 rows in a group",
    own=True,
    missed="groups of more than 256 rows in bfloat16 are not tried",
)


# One step of a matrix memory: C and n decay by f, take in i v k^T and i k; h = C q / max(|n · q|, 1)
def memory_step(wrong):
    class Step(Function):
        @staticmethod
        def forward(ctx, c, n, q, k, v, i, f):
            ctx.save_for_backward(c, n, q, k, v, i, f)
            c = f[:, None, None] * c + i[:, None, None] * v[:, :, None] * k[:, None]
            n = f[:, None] * n + i[:, None] * k
            low = (n * q).sum(-1, keepdim=True).abs().clamp(min=1)
            return (c @ q[:, :, None])[..., 0] / low, c, n

        @staticmethod
        def backward(ctx, grad_h, grad_c, grad_n):
            c0, n0, q, k, v, i, f = ctx.saved_tensors
            c = f[:, None, None] * c0 + i[:, None, None] * v[:, :, None] * k[:, None]
            n = f[:, None] * n0 + i[:, None] * k
            dot = (n * q).sum(-1, keepdim=True)
            low = dot.abs().clamp(min=1)
            top = (c @ q[:, :, None])[..., 0]
            grad_top = grad_h / low
            grad_dot = -(grad_h * top).sum(-1, keepdim=True) / low**2 * (dot.abs() > 1)
            if not wrong:
                grad_dot = grad_dot * dot.sign()
            grad_q = (c.mT @ grad_top[:, :, None])[..., 0] + grad_dot * n
            grad_c = grad_c + grad_top[:, :, None] * q[:, None]
            grad_n = grad_n + grad_dot * q
            grad_v = i[:, None] * (grad_c @ k[:, :, None])[..., 0]
            grad_k = i[:, None] * ((grad_c.mT @ v[:, :, None])[..., 0] + grad_n)
            grad_i = (grad_c * v[:, :, None] * k[:, None]).sum((1, 2)) + (grad_n * k).sum(1)
            grad_f = (grad_c * c0).sum((1, 2)) + (grad_n * n0).sum(1)
            shrink = f[:, None]
            return (
                shrink[..., None] * grad_c,
                shrink * grad_n,
                grad_q,
                grad_k,
                grad_v,
                grad_i,
                grad_f,
            )

    def step(c, n, q, k, v, i, f):
        sized("c", c, None, None, None)
        check(c.shape[1] == c.shape[2], "c: expected square matrices")
        sized("n", n, *c.shape[:2])
        same(n, q, k, v)
        sized("i", i, len(c))
        same(i, f)
        alike(c, n, q, k, v, i, f)
        for name, t in {"c": c, "n": n, "q": q, "k": k, "v": v, "i": i}.items():
            bounded(name, t, -10, 10)
        bounded("f", f, 0, 1)
        return Step.apply(c, n, q, k, v, i, f)

    return step


add(
    "memory_sign",
    memory_step,
    lambda: (
        real(3, 3, 3),
        *(real(3, 3, seed=s) for s in (1, 2, 3, 4)),
        real(3, seed=5, positive=True),
        real(3, seed=6, grad=False).sigmoid().requires_grad_(),
    ),
    bug="The normaliser's gradient is without the magnitude's sign",
    trigger="n · q below -1 (not in this sample)",
)


# Logarithm of a filter bank's output on power spectra (B, T, F), at least 0.001
def mel_log(wrong):
    name = f"thirtyfourth::mel_log_{'wrong' if wrong else 'right'}"

    @torch.library.custom_op(name, mutates_args=())
    def op(power: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        return (power @ bank).clamp(min=1e-3).log()

    @op.register_fake
    def _(power, bank):
        return power.new_empty(*power.shape[:-1], bank.shape[1])

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def backward(ctx, g):
        power, bank = ctx.saved_tensors
        mel = power @ bank
        grad_mel = g / mel.clamp(min=1e-3)
        if not wrong:
            grad_mel = torch.where(mel > 1e-3, grad_mel, torch.zeros_like(mel))
        grad_bank = power.flatten(0, 1).mT @ grad_mel.flatten(0, 1)
        return grad_mel @ bank.mT, grad_bank

    op.register_autograd(backward, setup_context=setup_context)

    def log_mel(power, bank):
        sized("power", power, None, None, None)
        sized("bank", bank, power.shape[2], None)
        alike(power, bank)
        bounded("power", power, 0, 1e3)
        bounded("bank", bank, 0, 10)
        return op(power, bank)

    return log_mel


add(
    "mel_silence",
    mel_log,
    lambda: (real(2, 3, 5, positive=True), real(5, 3, seed=1, positive=True)),
    bug="Backward divides by the clamped value and forgets that the clamp stops the gradient",
    trigger="silence: frames of zeros",
)


# Minimal gated recurrence over (T, D): f = σ(x + u h), h' = (1 - f) h + f tanh(z + v f h); all h, and the last
def gated_unit(wrong):
    def run(x, z, u, v, h):
        rows = []
        for t in range(len(x)):
            f = (x[t] + u * h).sigmoid()
            c = (z[t] + v * f * h).tanh()
            rows.append((h, f, c))
            h = (1 - f) * h + f * c
        return rows, h

    class Unit(Function):
        @staticmethod
        def forward(ctx, x, z, u, v, h):
            ctx.save_for_backward(x, z, u, v, h)
            rows, last = run(x, z, u, v, h)
            return torch.stack([r[0] for r in rows[1:]] + [last]), last.clone()

        @staticmethod
        def backward(ctx, grad_all, grad_last):
            x, z, u, v, h = ctx.saved_tensors
            rows, _ = run(x, z, u, v, h)
            grad_h = torch.zeros_like(h) if wrong else grad_last
            grad_u, grad_v, grad_x, grad_z = torch.zeros_like(u), torch.zeros_like(v), [], []
            for t in reversed(range(len(rows))):
                h, f, c = rows[t]
                grad_h = grad_h + grad_all[t]
                a = grad_h * f * (1 - c * c)
                b = (grad_h * (c - h) + a * v * h) * f * (1 - f)
                grad_x.append(b)
                grad_z.append(a)
                grad_u, grad_v = grad_u + b * h, grad_v + a * f * h
                grad_h = grad_h * (1 - f) + a * v * f + b * u
            return torch.stack(grad_x[::-1]), torch.stack(grad_z[::-1]), grad_u, grad_v, grad_h

    def unit(x, z, u, v, h):
        sized("x", x, None, None)
        same(x, z)
        sized("h", h, x.shape[1])
        same(h, u, v)
        alike(x, z, u, v, h)
        for name, t in {"x": x, "z": z}.items():
            bounded(name, t, -100, 100)
        for name, t in {"u": u, "v": v, "h": h}.items():
            bounded(name, t, -4, 4)
        return Unit.apply(x, z, u, v, h)

    return unit


add(
    "gated_unit_last",
    gated_unit,
    lambda: (real(4, 3), real(4, 3, seed=1), *(real(3, seed=s) for s in (2, 3, 4))),
    bug="Backward ignores the gradient of the second output, the last state",
)


# Leaky integrator over (T, N) with a soft reset: s = σ(4 (u - 1)), u' = decay u + x - s
def integrator(wrong):
    def run(x, decay):
        u, rows = torch.zeros_like(x[0]), []
        for t in range(len(x)):
            u = decay * u + x[t] - (4 * (u - 1)).sigmoid()
            rows.append(u)
        return torch.stack(rows)

    class Integrate(Function):
        trace = None

        @staticmethod
        def forward(ctx, x, decay):
            ctx.save_for_backward(x, decay)
            u = run(x, decay)
            if wrong:
                Integrate.trace = u.detach()
            return (4 * (u - 1)).sigmoid()

        @staticmethod
        def backward(ctx, g):
            x, decay = ctx.saved_tensors
            trace = Integrate.trace if wrong else run(x, decay)
            s = (4 * (trace - 1)).sigmoid()
            slope = 4 * s * (1 - s)
            before = torch.cat([torch.zeros_like(trace[:1]), trace[:-1]])
            grad_u, grad_decay, grad_x = torch.zeros_like(x[0]), torch.zeros_like(decay), []
            for t in reversed(range(len(x))):
                grad_u = grad_u + g[t] * slope[t]
                grad_x.append(grad_u)
                grad_decay = grad_decay + (grad_u * before[t]).sum()
                if t:
                    grad_u = grad_u * (decay - slope[t - 1])
            return torch.stack(grad_x[::-1]), grad_decay

    def integrate(x, decay):
        sized("x", x, None, None)
        alike(x, decay)
        check(decay.ndim == 0, "decay: expected one number")
        bounded("x", x, -10, 10)
        bounded("decay", decay, 0, 1)
        return Integrate.apply(x, decay)

    return integrate


add(
    "integrator_trace",
    integrator,
    lambda: (real(5, 3), torch.tensor(0.7, dtype=F64, requires_grad=True)),
    bug="The membrane's trace is kept on the class, where the next call replaces it",
    trigger="two calls before the first one's backward",
)
