"""State-space scans, recurrences and short convolutions that carry a state."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.nineteenth import uniform
from tests.verify.unseen.twentieth import add, check, same, sized


# h_t = a_t h_{t-1} + x_t
def blocked_scan(wrong):
    class Scan(Function):
        @staticmethod
        def forward(ctx, a, x):
            check(a.ndim >= 1, "expected at least one dimension")
            same(a, x)
            h, steps = torch.zeros_like(x[..., 0]), []
            for t in range(x.shape[-1]):
                h = a[..., t] * h + x[..., t]
                steps.append(h)
            h = torch.stack(steps, -1)
            ctx.save_for_backward(a, h)
            return h

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_h):
            a, h = ctx.saved_tensors
            length, block = a.shape[-1], 8
            d, carry = torch.empty_like(a), torch.zeros_like(a[..., 0])
            for start in reversed(range(0, length, block)):
                stop = min(start + block, length)
                last = stop == length
                # the block alone, and how much of what comes after it reaches each step
                local = torch.zeros_like(carry)
                through = torch.zeros_like(carry) if last else a[..., stop]
                for t in reversed(range(start, stop)):
                    if t + 1 < stop:
                        through = through * a[..., t + 1]
                        local = local * a[..., t + 1]
                    local = local + grad_h[..., t]
                    if wrong and not last:
                        d[..., t] = local * through + carry
                    else:
                        d[..., t] = local + through * carry
                carry = d[..., start]
            before = torch.cat([torch.zeros_like(h[..., :1]), h[..., :-1]], -1)
            return d * before, d

    return lambda a, x: Scan.apply(a, x)


add(
    "linear_scan_blocks",
    blocked_scan,
    lambda: (uniform(2, 5, low=0.3, high=0.9), real(2, 5, seed=1)),
    bug="accelerated-scan (pull request 15): the carry from one block to the block before it"
    " multiplies what is local instead of being multiplied",
    trigger="sequences longer than one block",
)


# dt = softplus(delta); h_t = exp(-rate dt_t) h_{t-1} + dt_t x_t; returns h and its last step
def padded_scan(wrong):
    softplus = torch.nn.functional.softplus

    def scan(a, b):
        h, steps = torch.zeros_like(b[:, 0]), []
        for t in range(b.shape[1]):
            h = a[:, t] * h + b[:, t]
            steps.append(h)
        return torch.stack(steps, 1)

    class Scan(Function):
        @staticmethod
        def forward(ctx, delta, rate, x):
            sized("delta", delta, None, None)
            sized("rate", rate, delta.shape[0])
            same(delta, x)
            dt = softplus(delta)
            h = scan(torch.exp(-rate[:, None] * dt), dt * x)
            ctx.save_for_backward(delta, rate, x, h)
            return h, h[:, -1].clone()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_h, grad_last):
            delta, rate, x, h = ctx.saved_tensors
            length, chunk = delta.shape[1], 4
            pad = -length % chunk
            padded = torch.nn.functional.pad
            dt = softplus(delta)
            a = torch.exp(-rate[:, None] * dt)
            # the tail must let the last state's gradient through as it is
            if wrong:
                a_tail = torch.exp(-rate[:, None] * softplus(padded(delta, (0, pad))))
            else:
                a_tail = padded(a, (0, pad), value=1.0)
            g = padded(grad_h, (0, pad))
            d, steps = grad_last, []
            for t in reversed(range(length + pad)):
                if t + 1 < length + pad:
                    d = a_tail[:, t + 1] * d
                d = g[:, t] + d
                steps.append(d)
            d = torch.stack(steps[::-1], 1)[:, :length]
            before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
            da = d * before * a
            grad_dt = d * x - da * rate[:, None]
            return grad_dt * torch.sigmoid(delta), -(da * dt).sum(1), d * dt

    return lambda delta, rate, x: Scan.apply(delta, rate, x)


add(
    "scan_padded_tail",
    padded_scan,
    lambda: (real(2, 4), uniform(2, low=0.5, high=1.5, seed=1), real(2, 4, seed=2)),
    bug="mamba (issue 368): steps behind the sequence's end are padded before the softplus, which"
    " makes their decay less than 1",
    trigger="lengths that are no multiple of the chunk, through the last state",
)


# h_t = a_t h_{t-1} + x_t from h_0; returns all h and the last
def stateful_scan(wrong):
    class Scan(Function):
        @staticmethod
        def forward(ctx, a, x, h0):
            sized("a", a, None, None)
            same(a, x)
            sized("h0", h0, a.shape[0])
            h, steps = h0, []
            for t in range(x.shape[1]):
                h = a[:, t] * h + x[:, t]
                steps.append(h)
            y = torch.stack(steps, 1)
            ctx.save_for_backward(a, y, h0)
            return y, h

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y, grad_last):
            a, y, h0 = ctx.saved_tensors
            d = grad_last if ctx.needs_input_grad[2] or not wrong else torch.zeros_like(h0)
            steps = []
            for t in reversed(range(a.shape[1])):
                d = d + grad_y[:, t]
                steps.append(d)
                d = a[:, t] * d
            grad_x = torch.stack(steps[::-1], 1)
            before = torch.cat([h0[:, None], y[:, :-1]], 1)
            return grad_x * before, grad_x, d

    return lambda a, x, h0: Scan.apply(a, x, h0)


add(
    "scan_last_state",
    stateful_scan,
    lambda: (uniform(2, 4, low=0.3, high=0.9), real(2, 4, seed=1), real(2, seed=2)),
    bug="The last state's gradient is taken up only where the first state is trained",
    trigger="a first state that needs no gradient",
)


# y_t = sum_k w_k z_{t+k} with z = (state, x); returns y and the last W - 1 of z
def short_convolution(wrong):
    class Convolution(Function):
        @staticmethod
        def forward(ctx, x, w, state):
            sized("x", x, None, None)
            sized("w", w, x.shape[0], None)
            check(
                state.shape == (x.shape[0], w.shape[1] - 1),
                f"state: expected shape {(x.shape[0], w.shape[1] - 1)}, got {tuple(state.shape)}",
            )
            z = torch.cat([state, x], 1)
            ctx.save_for_backward(z, w)
            y = (z.unfold(1, w.shape[1], 1) * w[:, None]).sum(-1)
            return y, z[:, x.shape[1] :].clone()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y, grad_state):
            z, w = ctx.saved_tensors
            width, length = w.shape[1], grad_y.shape[1]
            grad_z = torch.zeros_like(z)
            for k in range(width):
                grad_z[:, k : k + length] += w[:, k : k + 1] * grad_y
            grad_w = (z.unfold(1, width, 1) * grad_y[..., None]).sum(1)
            if wrong:
                start = max(0, length - (width - 1))
                n = min(length, width - 1)
                grad_z[:, width - 1 + start :] += grad_state[:, :n]
            else:
                grad_z[:, length:] += grad_state
            return grad_z[:, width - 1 :], grad_w, grad_z[:, : width - 1]

    return lambda x, w, state: Convolution.apply(x, w, state)


add(
    "short_convolution_state",
    short_convolution,
    lambda: (real(2, 5), real(2, 4, seed=1), real(2, 3, seed=2)),
    bug="flash-linear-attention (issue 1140): the last state's gradient finds its step through"
    " max(0, T - (W - 1)), and what remains of the first state gets none",
    trigger="sequences shorter than the state",
)


# S_t = gamma S_{t-1} + k_t v_t', o_t = q_t S_t
def retention(wrong):
    class Retention(Function):
        @staticmethod
        def forward(ctx, q, k, v, gamma):
            sized("q", q, None, None)
            same(q, k)
            sized("v", v, q.shape[0], None)
            sized("gamma", gamma)
            ctx.save_for_backward(q, k, v, gamma)
            state, steps = v.new_zeros(k.shape[1], v.shape[1]), []
            for t in range(q.shape[0]):
                state = gamma * state + k[t, :, None] * v[t]
                steps.append(q[t] @ state)
            return torch.stack(steps)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_o):
            q, k, v, gamma = ctx.saved_tensors
            states = [v.new_zeros(k.shape[1], v.shape[1])]
            for t in range(q.shape[0]):
                states.append(gamma * states[-1] + k[t, :, None] * v[t])
            d = torch.zeros_like(states[0])
            grad_q, grad_k, grad_v = (torch.zeros_like(z) for z in (q, k, v))
            grad_gamma = torch.zeros_like(gamma)
            for t in reversed(range(q.shape[0])):
                d = d + q[t, :, None] * grad_o[t]
                grad_q[t] = states[t + 1] @ grad_o[t]
                grad_k[t] = d @ v[t]
                grad_v[t] = k[t] @ d
                grad_gamma = grad_gamma + (d * states[t + 1 if wrong else t]).sum()
                d = gamma * d
            return grad_q, grad_k, grad_v, grad_gamma

    return lambda q, k, v, gamma: Retention.apply(q, k, v, gamma)


add(
    "retention_decay",
    retention,
    lambda: (
        real(4, 2),
        real(4, 2, seed=1),
        real(4, 3, seed=2),
        torch.tensor(0.8, dtype=torch.float64, requires_grad=True),
    ),
    bug="The decay's gradient pairs the state's gradient with the state of the same step, not of"
    " the one before",
)


# y_i = sum_{j <= i} exp(c_i - c_j) m_ij x_j, c = cumsum(a)
def decayed_product(wrong):
    def decay(a):
        c = a.cumsum(0)
        above = torch.ones(len(a), len(a), dtype=torch.bool, device=a.device).triu(1)
        return torch.exp((c[:, None] - c).masked_fill(above, -torch.inf))

    class Product(Function):
        @staticmethod
        def forward(ctx, a, m, x):
            sized("a", a, None)
            sized("m", m, len(a), len(a))
            sized("x", x, len(a), None)
            ctx.save_for_backward(a, m, x)
            return (decay(a) * m) @ x

        @staticmethod
        def backward(ctx, grad_y):
            a, m, x = ctx.saved_tensors
            e = decay(a)
            grad_p = grad_y @ x.T
            grad_e = grad_p * m * e
            grad_c = grad_e.sum(1)
            if not wrong:
                grad_c = grad_c - grad_e.sum(0)
            return grad_c.flip(0).cumsum(0).flip(0), grad_p * e, (e * m).T @ grad_y

    return lambda a, m, x: Product.apply(a, m, x)


add(
    "decayed_product",
    decayed_product,
    lambda: (uniform(4, low=-1.0, high=-0.1), real(4, 4, seed=1), real(4, 2, seed=2)),
    bug="Gradient of a cumulative decay only from the rows it scales up, not from the columns it"
    " scales down",
)


# weights of step t: exp(-(t-1-i) w + k_i) for i < t, exp(u + k_t); y = weighted mean of v
def weighted_keys(wrong):
    def exponents(w, u, k):
        t = torch.arange(len(k), device=k.device)
        gap = (t[:, None] - 1 - t).to(k.dtype)
        past = -gap[..., None] * w + k
        now = (gap == -1)[..., None]
        above = (t > t[:, None])[..., None]
        return torch.where(now, u + k, past).masked_fill(above, -torch.inf), gap

    class Keys(Function):
        @staticmethod
        def forward(ctx, w, u, k, v):
            sized("k", k, None, None)
            same(k, v)
            sized("w", w, k.shape[1])
            sized("u", u, k.shape[1])
            ctx.save_for_backward(w, u, k, v)
            return (torch.softmax(exponents(w, u, k)[0], 1) * v).sum(1)

        @staticmethod
        def backward(ctx, grad_y):
            w, u, k, v = ctx.saved_tensors
            e, gap = exponents(w, u, k)
            if wrong:
                e = torch.exp(e)
                p = e / e.sum(1, keepdim=True)
            else:
                p = torch.softmax(e, 1)
            y = (p * v).sum(1)
            grad_e = p * (v - y[:, None]) * grad_y[:, None]
            now = (gap == -1).to(k.dtype)[..., None]
            past = grad_e * (1 - now)
            grad_w = -(past * gap[..., None]).sum((0, 1))
            return grad_w, (grad_e * now).sum((0, 1)), grad_e.sum(0), (p * grad_y[:, None]).sum(0)

    return lambda w, u, k, v: Keys.apply(w, u, k, v)


add(
    "weighted_keys_overflow",
    weighted_keys,
    lambda: (
        uniform(2, low=0.1, high=0.9),
        real(2, seed=1),
        real(4, 2, seed=2),
        real(4, 2, seed=3),
    ),
    bug="Backward takes exponentials without the largest one out, which forward has out",
    trigger="large keys",
)
