"""One step after the other: cells with memory, clocks, discretisations, returns."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentyfirst import add, check, positive, same, sized


# mLSTM: C_t = f C + i v k', n_t = f n + i k, h = C q / max(|n q|, 1), all scaled by exp(-m)
def matrix_memory(wrong):
    def constant(m):
        return m.detach() if wrong else m

    def memory(q, k, v, i, f):
        sized("q", q, None, None)
        same(q, k)
        sized("v", v, len(q), None)
        sized("i", i, len(q))
        same(i, f)
        log_f = F.logsigmoid(f)
        m = constant(i[0])
        c, n, hs = 0, 0, []
        for t in range(len(q)):
            new = constant(torch.maximum(log_f[t] + m, i[t])) if t else m
            keep, write = (log_f[t] + m - new).exp() if t else 0, (i[t] - new).exp()
            c = keep * c + write * torch.outer(v[t], k[t])
            n = keep * n + write * k[t]
            hs.append(c @ q[t] / (n @ q[t]).abs().clamp_min(1))
            m = new
        return torch.stack(hs)

    return memory


add(
    "matrix_memory_floor",
    matrix_memory,
    lambda: (
        (real(4, 2, positive=True).detach() + 1).requires_grad_(),
        (real(4, 2, seed=1, positive=True).detach() + 1).requires_grad_(),
        real(4, 2, seed=2),
        real(4, seed=3),
        real(4, seed=4),
    ),
    bug="The scale that keeps the exponentials small is detached, though the floor 1 of the"
    " denominator is not scaled by it",
    trigger="a query that the keys do not match, where the floor holds",
)


# Clockwork RNN: unit i takes its new value at the times that its period divides
def clockwork(wrong):
    class Clockwork(Function):
        @staticmethod
        def forward(ctx, x, u, periods):
            clock = torch.tensor(periods, device=x.device)
            h, hs = torch.zeros_like(x[0]), []
            for t in range(len(x)):
                h = torch.where(t % clock == 0, (x[t] + u @ h).tanh(), h)
                hs.append(h)
            hs = torch.stack(hs)
            ctx.save_for_backward(u, hs)
            ctx.clock = clock
            return hs

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_hs):
            u, hs = ctx.saved_tensors
            grad_x, grad_u = torch.zeros_like(hs), torch.zeros_like(u)
            grad_h = torch.zeros_like(hs[0])
            for t in reversed(range(len(hs))):
                grad_h = grad_h + grad_hs[t]
                time = len(hs) - 1 - t if wrong else t
                new = time % ctx.clock == 0
                grad_x[t] = torch.where(new, grad_h * (1 - hs[t] ** 2), 0)
                if t:
                    grad_u += torch.outer(grad_x[t], hs[t - 1])
                grad_h = u.T @ grad_x[t] + torch.where(new, 0, grad_h)
            return grad_x, grad_u, None

    def run(x, u, periods=(1, 2, 4)):
        sized("x", x, None, len(periods))
        sized("u", u, x.shape[1], x.shape[1])
        check(all(p >= 1 for p in periods), "expected periods >= 1")
        return Clockwork.apply(x, u, tuple(periods))

    return run


add(
    "clockwork_reversed",
    clockwork,
    lambda: (real(5, 3), real(3, 3, seed=1)),
    bug="Backward counts the time from the end and asks the clock with it",
    trigger="a length that is not one more than a multiple of every period",
)


# Phased LSTM: the gate rises and falls in the first part of each period and is shut in the rest
def phase_gate(wrong):
    class Gate(Function):
        @staticmethod
        def forward(ctx, t, shift, period, part):
            ctx.save_for_backward(t, shift, period)
            ctx.part = part
            turns = (t[:, None] - shift) / period
            phase = turns - turns.floor()
            return (1 - (2 * phase / part - 1).abs()).clamp_min(0)

        @staticmethod
        def backward(ctx, grad_y):
            t, shift, period = ctx.saved_tensors
            turns = (t[:, None] - shift) / period
            phase = turns - turns.floor().detach()
            slope = torch.where(phase < ctx.part / 2, 2.0, -2.0) / ctx.part
            grad_turns = torch.where(phase < ctx.part, slope * grad_y, 0)
            grad_t = grad_turns / period
            grad_period = -grad_turns * (phase if wrong else turns) / period
            return grad_t.sum(1), -grad_t.sum(0), grad_period.sum(0), None

    def gate(t, shift, period, part=0.5):
        sized("t", t, None)
        sized("shift", shift, None)
        same(shift, period)
        positive("period", period)
        check(0 < part <= 1, "expected 0 < part <= 1")
        return Gate.apply(t, shift, period, part)

    return gate


def gate_inputs():
    t = torch.tensor([0.31, 0.52, 0.93, 1.24], dtype=torch.float64)
    shift, period = torch.tensor([[0.1, 0.2], [2.0, 3.1]], dtype=torch.float64)
    return tuple(a.clone().requires_grad_() for a in (t, shift, period))


add(
    "phase_gate_period",
    phase_gate,
    gate_inputs,
    bug="The period's gradient takes the time since the last turn for that since the first",
    trigger="times beyond the first period",
)


# Adams-Bashforth for x' = k sin x, its first step by Euler's rule
def two_step(wrong):
    class Steps(Function):
        @staticmethod
        def forward(ctx, x, k, h, steps):
            same(x, k)
            check(steps >= 1, "expected steps >= 1")
            xs, last = [x.clone()], None
            for _ in range(steps):
                now = k * xs[-1].sin()
                rate = now if last is None else 1.5 * now - 0.5 * last
                xs.append(xs[-1] + h * rate)
                last = now
            ctx.save_for_backward(k, *xs)
            ctx.h = h
            return xs[-1]

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_x):
            k, *xs = ctx.saved_tensors
            grad_k, later = torch.zeros_like(k), torch.zeros_like(k)
            for n in reversed(range(len(xs) - 1)):
                share = 1.0 if n == 0 and not wrong else 1.5
                grad_rate = ctx.h * (share * grad_x - 0.5 * later)
                later = grad_x
                grad_k = grad_k + grad_rate * xs[n].sin()
                grad_x = grad_x + grad_rate * k * xs[n].cos()
            return grad_x, grad_k, None, None

    return lambda x, k, h=0.2, steps=3: Steps.apply(x, k, h, steps)


add(
    "two_step_start",
    two_step,
    lambda: (real(4), real(4, seed=1)),
    bug="The adjoint gives the first rate the weight that all others have",
)


# Tustin's rule: a, b -> (1 + d a / 2) / (1 - d a / 2), d b / (1 - d a / 2)
def bilinear_step(wrong):
    class Step(Function):
        @staticmethod
        def forward(ctx, d, a, b):
            same(d, a, b)
            check(bool((d * a < 2).all()), "expected d a < 2")
            ctx.save_for_backward(d, a, b)
            r = 1 / (1 - d * a / 2)
            return (1 + d * a / 2) * r, d * b * r

        @staticmethod
        def backward(ctx, grad_a, grad_b):
            d, a, b = ctx.saved_tensors
            r = 1 / (1 - d * a / 2)
            into_a = grad_a * d * r**2
            if not wrong:
                into_a = into_a + grad_b * d**2 * b / 2 * r**2
            return (grad_a * a + grad_b * b) * r**2, into_a, grad_b * d * r

    return lambda d, a, b: Step.apply(d, a, b)


add(
    "bilinear_step_drive",
    bilinear_step,
    lambda: (
        real(3, positive=True),
        (-real(3, seed=1, positive=True)).detach().requires_grad_(),
        real(3, seed=2),
    ),
    bug="The drive is differentiated as if the implicit half of the step did not divide it",
)


# V-trace: A_t = rho_t (r_t + g V_{t+1} - V_t) + g c_t A_{t+1}, rho and c the clipped ratios
def v_trace(wrong):
    class Trace(Function):
        @staticmethod
        def forward(ctx, log_ratio, reward, value, g, rho_bar, c_bar):
            ratio = log_ratio.exp()
            rho, c = ratio.clamp_max(rho_bar), ratio.clamp_max(c_bar)
            error = reward + g * value[1:] - value[:-1]
            a = torch.zeros_like(value)
            for t in reversed(range(len(reward))):
                a[t] = rho[t] * error[t] + g * c[t] * a[t + 1]
            ctx.save_for_backward(ratio, rho, c, error, a)
            ctx.g, ctx.bars = g, (c_bar if wrong else rho_bar, c_bar)
            return a[:-1] + value[:-1]

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            ratio, rho, c, error, a = ctx.saved_tensors
            grad_a = grad_y.clone()
            for t in range(1, len(grad_a)):
                grad_a[t] += ctx.g * c[t - 1] * grad_a[t - 1]
            unclipped = [torch.where(ratio < bar, ratio, 0) for bar in ctx.bars]
            grad_log = grad_a * (unclipped[0] * error + unclipped[1] * ctx.g * a[1:])
            grad_error = grad_a * rho
            grad_value = torch.zeros_like(a)
            grad_value[:-1] += grad_y - grad_error
            grad_value[1:] += ctx.g * grad_error
            return grad_log, grad_error, grad_value, None, None, None

    def trace(log_ratio, reward, value, g=0.9, rho_bar=2.0, c_bar=1.0):
        sized("log_ratio", log_ratio, None)
        same(log_ratio, reward)
        sized("value", value, len(reward) + 1)
        return Trace.apply(log_ratio, reward, value, g, rho_bar, c_bar)

    return trace


add(
    "v_trace_clips",
    v_trace,
    lambda: (
        (-real(4, positive=True)).detach().requires_grad_(),
        real(4, seed=1),
        real(5, seed=2),
    ),
    bug="Both weights' gradients are cut where the trace's weight is clipped",
    trigger="a ratio between the two bounds",
)
