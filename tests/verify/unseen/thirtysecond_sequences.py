"""Sequences, signals and steps that keep something between calls: automata, filters, recurrences, tables."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.thirtysecond import add, bounded, check, finite, indices, same, sized

SOBEL = [(dy, dx, wy * wx) for dy, wy in ((-1, 1), (0, 2), (1, 1)) for dx, wx in ((-1, -1), (1, 1))]


# One step of a neural cellular automaton: x + w2 relu(w1 [x, Sobel x, Sobel' x])
def automaton(wrong):
    def slope(x, axes, sign):
        return sum(w / 8 * x.roll((sign * dy, sign * dx), axes) for dy, dx, w in SOBEL)

    def perceive(x):
        return torch.cat([x, slope(x, (2, 3), 1), slope(x, (3, 2), 1)], 1)

    kept: dict[torch.Size, torch.Tensor] = {}

    class Step(Function):
        @staticmethod
        def forward(ctx, x, w1, w2):
            p = perceive(x)
            if wrong:
                kept[x.shape] = p
            ctx.save_for_backward(x, w1, w2)
            h = torch.einsum("mp,bphw->bmhw", w1, p).relu()
            return x + torch.einsum("cm,bmhw->bchw", w2, h)

        @staticmethod
        def backward(ctx, grad_y):
            x, w1, w2 = ctx.saved_tensors
            with torch.autocast(x.device.type, enabled=False):
                p = kept[x.shape] if wrong else perceive(x)
                pre = torch.einsum("mp,bphw->bmhw", w1, p)
                grad_w2 = torch.einsum("bchw,bmhw->cm", grad_y, pre.relu())
                grad_h = torch.einsum("cm,bchw->bmhw", w2, grad_y) * (pre > 0)
                grad_w1 = torch.einsum("bmhw,bphw->mp", grad_h, p)
                g, gy, gx = torch.einsum("mp,bmhw->bphw", w1, grad_h).chunk(3, 1)
                return grad_y + g + slope(gy, (2, 3), -1) + slope(gx, (3, 2), -1), grad_w1, grad_w2

    def step(x, w1, w2):
        sized("x", x, None, None, None, None)
        sized("w1", w1, None, 3 * x.shape[1])
        sized("w2", w2, x.shape[1], w1.shape[0])
        return Step.apply(x, w1, w2)

    return step


add(
    "automaton_kept_perception",
    automaton,
    lambda: (real(1, 2, 4, 4), real(5, 6, seed=1), real(2, 5, seed=2)),
    bug="Keeps the last call's perception in a dictionary, by shape",
    trigger="two steps before one backward, as in every roll-out",
)


# A driven oscillator with a saturating spring: positions after each step of 0.1
def driven_oscillator(wrong):
    h, drag, segment = 0.1, 0.5, 32

    def run(start, force):
        states = [start]
        for t in range(force.shape[1]):
            p, v = states[-1].unbind(-1)
            pull = force[:, t] - torch.tanh(p) - drag * v
            states.append(torch.stack([p + h * v, v + h * pull], -1))
        return states

    class Run(Function):
        @staticmethod
        def forward(ctx, start, force):
            ctx.save_for_backward(start, force)
            return torch.stack([s[:, 0] for s in run(start, force)[1:]], 1)

        @staticmethod
        def backward(ctx, grad_y):
            start, force = ctx.saved_tensors
            states = run(start, force)
            to_p, to_v = torch.zeros_like(start[:, 0]), torch.zeros_like(start[:, 0])
            grad_force = []
            for t in reversed(range(force.shape[1])):
                if wrong and (t + 1) % segment == 0:  # begins a segment between checkpoints
                    to_p, to_v = torch.zeros_like(to_p), torch.zeros_like(to_v)
                to_p = to_p + grad_y[:, t]
                grad_force.append(h * to_v)
                bent = 1 - torch.tanh(states[t][:, 0]).square()
                to_p, to_v = to_p - h * bent * to_v, h * to_p + (1 - h * drag) * to_v
            return torch.stack([to_p, to_v], -1), torch.stack(grad_force[::-1], 1)

    def positions(start, force):
        sized("start", start, None, 2)
        sized("force", force, start.shape[0], None)
        finite(start=start, force=force)
        return Run.apply(start, force)

    return positions


add(
    "oscillator_checkpoints",
    driven_oscillator,
    lambda: (real(2, 2), real(2, 6, seed=1)),
    bug="The adjoint state is not carried over the borders between segments of 32 steps",
    trigger="more than 32 steps",
)


# QRNN's fo-pooling: c = f c + (1 - f) z, from an initial state
def forget_pool(wrong):
    class Pool(Function):
        @staticmethod
        def forward(ctx, f, z, c0):
            ctx.save_for_backward(f, z, c0)
            return torch.stack(Pool.states(f, z, c0)[1:], 1)

        @staticmethod
        def states(f, z, c0):
            c, s = [c0], f.sigmoid()
            for t in range(f.shape[1]):
                c.append(s[:, t] * c[-1] + (1 - s[:, t]) * z[:, t])
            return c

        @staticmethod
        def backward(ctx, grad_y):
            f, z, c0 = ctx.saved_tensors
            c, s = Pool.states(f, z, c0), f.sigmoid()
            grad_f, grad_z = [], []
            carry = torch.zeros_like(c0)
            for t in reversed(range(f.shape[1])):
                carry = carry + grad_y[:, t]
                grad_f.append(carry * (c[t] - z[:, t]) * s[:, t] * (1 - s[:, t]))
                grad_z.append(carry * (1 - s[:, t]))
                carry = carry * s[:, t]
            if wrong and f.shape[1] < 2:
                carry = torch.zeros_like(c0)  # "no recurrence, no state"
            return torch.stack(grad_f[::-1], 1), torch.stack(grad_z[::-1], 1), carry

    def pool(f, z, c0):
        sized("f", f, None, None, None)
        same(f, z)
        sized("c0", c0, f.shape[0], f.shape[2])
        return Pool.apply(f, z, c0)

    return pool


add(
    "fo_pool_single_step",
    forget_pool,
    lambda: (real(2, 4, 3), real(2, 4, 3, seed=1), real(2, 3, seed=2)),
    bug="With one step the initial state has no gradient",
    trigger="sequences of one step, as in decoding",
)


# A projection's square whose gradient travels compressed between workers
def squared_projection(wrong):
    class Project(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return (x @ w).square()

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            g = 2 * grad_y * (x @ w)
            grad_w = x.mT @ g
            if wrong:
                step = 2.0 ** (grad_w.abs().clamp(min=1e-30).log2().floor() - 23)
                grad_w = (grad_w / step + torch.rand_like(grad_w)).floor() * step
            return g @ w.mT, grad_w

    def project(x, w):
        sized("x", x, None, None)
        sized("w", w, x.shape[1], None)
        return Project.apply(x, w)

    return project


add(
    "stochastic_rounding",
    squared_projection,
    lambda: (real(3, 4), real(4, 2, seed=1)),
    bug="Backward rounds the weights' gradient up or down at random",
    trigger="the same backward twice",
)


# Log band energies of a signal: log(1 + 100 bank |rfft(window * frame)|^2)
def band_frontend(wrong):
    size, hop = 8, 4
    kept = []

    def window(x):
        return torch.hann_window(size, dtype=x.dtype, device=x.device)

    class Bands(Function):
        @staticmethod
        def forward(ctx, x, bank):
            ctx.save_for_backward(x, bank)
            power = torch.fft.rfft(x.unfold(-1, size, hop) * window(x)).abs().square()
            if wrong:
                kept.append(power)
            return torch.log1p(100 * power @ bank.mT)

        @staticmethod
        def backward(ctx, grad_y):
            x, bank = ctx.saved_tensors
            spectrum = torch.fft.rfft(x.unfold(-1, size, hop) * window(x))
            power = spectrum.real.square() + spectrum.imag.square()
            g = 100 * grad_y / (1 + 100 * power @ bank.mT)
            grad_bank = (g[..., None] * power[..., None, :]).sum((0, 1))
            padded = F.pad(2 * (g @ bank), (0, size - bank.shape[1])) * F.pad(
                spectrum, (0, size - bank.shape[1])
            )
            frames = size * torch.fft.ifft(padded).real * window(x)
            grad_x = torch.zeros_like(x)
            for i in range(frames.shape[1]):
                rest = (i * hop, x.shape[1] - i * hop - size)
                grad_x = grad_x + F.pad(frames[:, i], rest)
            return grad_x, grad_bank

    def bands(x, bank):
        sized("x", x, None, None)
        check(x.shape[1] >= size, f"x: expected {size} samples at least")
        sized("bank", bank, None, size // 2 + 1)
        bounded("x", x, -1e6, 1e6)
        bounded("bank", bank, 0, 1e6)
        return Bands.apply(x, bank)

    return bands


add(
    "band_frontend_debug_list",
    band_frontend,
    lambda: (real(2, 16), real(3, 5, seed=1, positive=True)),
    bug="Appends each call's power spectrum to a list that was meant for debugging",
    trigger="memory watched over calls",
)


# One level of a wavelet by lifting: d = odd - p even, s = even + u d
def lifting(wrong):
    class Lift(Function):
        @staticmethod
        def forward(ctx, x, p, u):
            if wrong:
                ctx.x, ctx.taps = x, (p, u)
            else:
                ctx.save_for_backward(x, p, u)
            even, odd = x[..., ::2], x[..., 1::2]
            d = odd - p * even
            return even + u * d, d

        @staticmethod
        def backward(ctx, grad_s, grad_d):
            x, p, u = (ctx.x, *ctx.taps) if wrong else ctx.saved_tensors
            even, odd = x[..., ::2], x[..., 1::2]
            grad_odd = grad_d + u * grad_s
            grad_even = grad_s - p * grad_odd
            grad_x = torch.stack([grad_even, grad_odd], -1).flatten(-2)
            grad_p = -(grad_odd * even).sum().reshape(1)
            return grad_x, grad_p, (grad_s * (odd - p * even)).sum().reshape(1)

    def lift(x, p, u):
        sized("x", x, None, None)
        check(x.shape[1] % 2 == 0, "x: expected an even number of samples")
        sized("p", p, 1)
        sized("u", u, 1)
        return Lift.apply(x, p, u)

    return lift


add(
    "lifting_attributes",
    lifting,
    lambda: (
        real(2, 6),
        torch.full((1,), 0.9).double().requires_grad_(),
        torch.full((1,), 0.5).double().requires_grad_(),
    ),
    bug="Keeps its inputs as attributes, where autograd does not see that they were changed",
    trigger="an input changed in place between forward and backward",
)


# Words as the mean of their hashed n-grams' rows
def hashed_ngrams(wrong):
    class Words(Function):
        @staticmethod
        def forward(ctx, table, grams):
            ctx.save_for_backward(grams)
            ctx.rows = len(table)
            if wrong:
                ctx.grad_table = torch.zeros_like(table)
            return table[grams].mean(1)

        @staticmethod
        def backward(ctx, grad_y):
            (grams,) = ctx.saved_tensors
            share = (grad_y / grams.shape[1])[:, None].expand(-1, grams.shape[1], -1)
            fresh = grad_y.new_zeros(ctx.rows, grad_y.shape[1])
            grad_table = ctx.grad_table if wrong else fresh
            return grad_table.index_add_(0, grams.flatten(), share.flatten(0, 1)), None

    def words(table, grams):
        sized("table", table, None, None)
        sized("grams", grams, None, None)
        indices("grams", grams, len(table))
        return Words.apply(table, grams)

    return words


add(
    "hashed_ngrams_buffer",
    hashed_ngrams,
    lambda: (real(6, 3), whole(6, 4, 2)),
    bug="Backward adds to a buffer that forward has made, so a second one adds to the first's",
    trigger="backward twice with retain_graph",
)


# Stereo matching: mean product of left features and right ones that are d columns further left
def cost_volume(wrong):
    buffers = {}

    class Volume(Function):
        @staticmethod
        def forward(ctx, left, right, count):
            ctx.save_for_backward(left, right)
            ctx.count = count
            costs = [
                F.pad((left[..., d:] * right[..., : right.shape[-1] - d]).mean(1), (d, 0))
                for d in range(count)
            ]
            y = torch.stack(costs, 1)
            if not wrong:
                return y
            key = (y.shape, y.dtype, y.device)
            if key not in buffers:
                buffers[key] = torch.empty_like(y)
            return buffers[key].copy_(y).detach()

        @staticmethod
        def backward(ctx, grad_y):
            left, right = ctx.saved_tensors
            grad_left, grad_right = torch.zeros_like(left), torch.zeros_like(right)
            for d in range(ctx.count):
                g = grad_y[:, d : d + 1, d:] / left.shape[1]
                grad_left = grad_left + F.pad(g * right[..., : right.shape[-1] - d], (d, 0))
                grad_right = grad_right + F.pad(g * left[..., d:], (0, d))
            return grad_left, grad_right, None

    def volume(left, right, count=3):
        sized("left", left, None, None, None)
        same(left, right)
        check(1 <= count <= left.shape[2], "left: expected as many columns as disparities")
        return Volume.apply(left, right, count)

    return volume


add(
    "cost_volume_static_output",
    cost_volume,
    lambda: (real(2, 3, 5), real(2, 3, 5, seed=1)),
    bug="Every call of one shape returns the same memory",
    trigger="two calls before the first result is used",
)


# A leaky recurrent layer: h = 0.7 h + 0.3 tanh(w h + x)
def leaky_recurrent(wrong):
    def run(x, w):
        h = [torch.zeros_like(x[:, 0])]
        for t in range(x.shape[1]):
            h.append(0.7 * h[-1] + 0.3 * torch.tanh(h[-1] @ w.mT + x[:, t]))
        return h

    class Layer(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return torch.stack(run(x, w)[1:], 1)

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            h = run(x, w)
            carry, grad_w, grad_x = torch.zeros_like(h[0]), torch.zeros_like(w), []
            for t in reversed(range(x.shape[1])):
                carry = carry + grad_y[:, t]
                if wrong:
                    norm = carry.norm()
                    carry = carry * (10 / norm.clamp(min=10))
                bent = 1 - torch.tanh(h[t] @ w.mT + x[:, t]).square()
                pre = 0.3 * carry * bent
                grad_x.append(pre)
                grad_w = grad_w + pre.mT @ h[t]
                carry = 0.7 * carry + pre @ w
            return torch.stack(grad_x[::-1], 1), grad_w

    def layer(x, w):
        sized("x", x, None, None, None)
        sized("w", w, x.shape[2], x.shape[2])
        finite(x=x, w=w)
        return Layer.apply(x, w)

    return layer


add(
    "leaky_recurrent_clip",
    leaky_recurrent,
    lambda: (real(2, 4, 3), real(3, 3, seed=1)),
    bug="Backward clips the norm of the state's gradient at 10",
    trigger="a large grad_output, as with a scaled loss",
)


# Rows of a factorised table: (a * b) c, of which only gradients that matter are sent
def factor_rows(wrong):
    class Rows(Function):
        @staticmethod
        def forward(ctx, a, b, c):
            ctx.save_for_backward(a, b, c)
            return (a * b) @ c

        @staticmethod
        def backward(ctx, grad_y):
            a, b, c = ctx.saved_tensors
            if wrong:
                grad_y = torch.where(grad_y.abs() < 1e-6, 0, grad_y)
            through = grad_y @ c.mT
            return through * b, through * a, (a * b).mT @ grad_y

    def rows(a, b, c):
        sized("a", a, None, None)
        same(a, b)
        sized("c", c, a.shape[1], None)
        return Rows.apply(a, b, c)

    return rows


add(
    "factor_rows_threshold",
    factor_rows,
    lambda: (real(3, 4), real(3, 4, seed=1), real(4, 2, seed=2)),
    bug="Backward drops elements of grad_output below 1e-6",
    trigger="a small grad_output: a mean over a million elements",
)
