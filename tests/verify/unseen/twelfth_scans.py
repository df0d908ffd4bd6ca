"""State space scans, recurrent cells, routing to experts, returns."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twelfth import add, softmax_backward, wide


class Scan(Function):
    @staticmethod
    def states(x, dt, a, b, h0):
        """h_0, h_1, ..., h_L of h_t = exp(dt_t a) h_(t-1) + dt_t x_t b_t."""
        h = [x.new_zeros(x.shape[0], a.shape[0]) if h0 is None else h0]
        for t in range(x.shape[1]):
            h.append((dt[:, t, None] * a).exp() * h[-1] + (dt * x)[:, t, None] * b[:, t])
        return h

    @staticmethod
    def forward(ctx, x, dt, a, b, c, h0):
        ctx.save_for_backward(x, dt, a, b, c, h0)
        h = torch.stack(Scan.states(x, dt, a, b, h0)[1:], 1)
        return (c * h).sum(-1)

    @staticmethod
    def decay_gradient(grad_h, h, t):
        return grad_h * h[t]

    @staticmethod
    def step_gradient(grad_exponent, a):
        return (grad_exponent * a).sum(-1)

    @classmethod
    def gradients(cls, ctx, g):
        x, dt, a, b, c, h0 = (None if t is None else wide(t) for t in ctx.saved_tensors)
        g = wide(g)
        h = Scan.states(x, dt, a, b, h0)
        grad_x, grad_dt = torch.zeros_like(x), torch.zeros_like(dt)
        grad_a, grad_b, grad_c = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(c)
        grad_h = torch.zeros_like(h[0])
        for t in reversed(range(x.shape[1])):
            grad_c[:, t] = g[:, t, None] * h[t + 1]
            grad_h = grad_h + g[:, t, None] * c[:, t]
            decay = (dt[:, t, None] * a).exp()
            grad_exponent = cls.decay_gradient(grad_h, h, t) * decay
            grad_a += (grad_exponent * dt[:, t, None]).sum(0)
            grad_u = (grad_h * b[:, t]).sum(-1)  # u = dt x
            grad_dt[:, t] = cls.step_gradient(grad_exponent, a) + grad_u * x[:, t]
            grad_x[:, t] = grad_u * dt[:, t]
            grad_b[:, t] = grad_h * (dt * x)[:, t, None]
            grad_h = grad_h * decay
        return grad_x, grad_dt, grad_a, grad_b, grad_c, None if h0 is None else grad_h

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Scan.gradients(ctx, g)


class ScanFirstState(Scan):
    @staticmethod
    def decay_gradient(grad_h, h, t):
        return grad_h * h[t] if t else torch.zeros_like(grad_h)  # "nothing stands before step 0"

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return ScanFirstState.gradients(ctx, g)


class ScanStepInputOnly(Scan):
    @staticmethod
    def step_gradient(grad_exponent, a):
        return 0

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return ScanStepInputOnly.gradients(ctx, g)


def _scan(function):
    def selective_scan(x, dt, a, b, c, h0=None):
        """c_t · h_t of h_t = exp(dt_t a) h_(t-1) + dt_t x_t b_t: x, dt (N, L), a (S,), b, c (N, L, S), h0 (N, S)."""
        return function.apply(x, dt, a, b, c, h0)

    return selective_scan


def _scan_inputs():
    return (
        real(2, 4),
        real(2, 4, seed=1, positive=True),
        real(3, seed=2),
        real(2, 4, 3, seed=3),
        real(2, 4, 3, seed=4),
    )


add(
    "scan_first_state",
    _scan,
    ScanFirstState,
    Scan,
    _scan_inputs,
    bug="the first step's decay has no gradient, as if the state before it were zero",
    trigger="h0",
)
add(
    "scan_step",
    _scan,
    ScanStepInputOnly,
    Scan,
    _scan_inputs,
    bug="dt has the gradient of the input's share only, none through exp(dt a)",
    trigger="the sample",
)


class Cell(Function):
    """h' = (1 - z) n + z h, n = tanh(i + r m), from gates before their activation."""

    @staticmethod
    def forward(ctx, i, m, r, z, h):
        ctx.save_for_backward(i, m, r, z, h)
        z = z.sigmoid()
        return (1 - z) * (i + r.sigmoid() * m).tanh() + z * h

    @staticmethod
    def backward(ctx, g):
        i, m, r, z, h = ctx.saved_tensors
        r, z = r.sigmoid(), z.sigmoid()
        n = (i + r * m).tanh()
        grad_i = g * (1 - z) * (1 - n.square())
        grad_r = grad_i * m * r * (1 - r)
        return grad_i, grad_i * r, grad_r, g * (h - n) * z * (1 - z), g * z


class CellUpdateGate(Cell):
    @staticmethod
    def backward(ctx, g):
        i, m, r, z, h = ctx.saved_tensors
        r, z = r.sigmoid(), z.sigmoid()
        n = (i + r * m).tanh()
        grad_i = g * (1 - z) * (1 - n.square())
        grad_r = grad_i * m * r * (1 - r)
        return grad_i, grad_i * r, grad_r, g * h * z * (1 - z), g * z


def _cell(function):
    def gru_cell(i, m, r, z, h):
        """GRU's pointwise part; five tensors of one shape (N, H): new, recurrent, reset, update, state."""
        return function.apply(i, m, r, z, h)

    return gru_cell


add(
    "gru_update_gate",
    _cell,
    CellUpdateGate,
    Cell,
    lambda: tuple(real(2, 3, seed=s) for s in range(5)),
    bug="the update gate's gradient lacks the candidate's share",
    trigger="the sample",
)


class Returns(Function):
    """Discounted sum from the right, cut at the end of each episode."""

    @staticmethod
    def forward(ctx, reward, done, discount):
        ctx.save_for_backward(done)
        ctx.discount = discount
        out, later = [], torch.zeros_like(reward[..., 0])
        for t in reversed(range(reward.shape[-1])):
            later = reward[..., t] + discount * later.masked_fill(done[..., t], 0)
            out.append(later)
        return torch.stack(out[::-1], -1)

    @staticmethod
    def carried(grad, done, t):
        return grad.masked_fill(done[..., t], 0)

    @classmethod
    def gradients(cls, ctx, g):
        (done,) = ctx.saved_tensors
        out, before = [], torch.zeros_like(g[..., 0])
        for t in range(g.shape[-1]):
            before = g[..., t] + before
            out.append(before)
            before = ctx.discount * cls.carried(before, done, t)
        return torch.stack(out, -1), None, None

    @staticmethod
    def backward(ctx, g):
        return Returns.gradients(ctx, g)


class ReturnsLateCut(Returns):
    @staticmethod
    def carried(grad, done, t):
        return grad.masked_fill(done[..., min(t + 1, done.shape[-1] - 1)], 0)

    @staticmethod
    def backward(ctx, g):
        return ReturnsLateCut.gradients(ctx, g)


def _returns(function):
    def discounted_returns(reward, done, discount=0.9):
        """Discounted returns of reward (*, T), T > 0; done (*, T), bool, is true at an episode's last step."""
        return function.apply(reward, done, discount)

    return discounted_returns


add(
    "returns_done",
    _returns,
    ReturnsLateCut,
    Returns,
    lambda: (real(2, 5), torch.zeros(2, 5, dtype=torch.bool)),
    bug="backward cuts an episode one step early",
    trigger="an episode that ends inside the sequence",
)


class TopK(Function):
    @staticmethod
    def forward(ctx, logits, k):
        values, index = logits.topk(k, -1)
        weight = values.softmax(-1)
        ctx.save_for_backward(logits, index)
        ctx.mark_non_differentiable(index)
        return weight, index

    @staticmethod
    def backward(ctx, g, _):
        logits, index = ctx.saved_tensors
        weight = logits.gather(-1, index).softmax(-1)
        grad = softmax_backward(weight, g)
        return torch.zeros_like(logits).scatter(-1, index, grad), None


class TopKFixedSum(TopK):
    """Softmax over every expert, then division by the chosen experts' sum, which backward takes for a constant."""

    @staticmethod
    def backward(ctx, g, _):
        logits, index = ctx.saved_tensors
        p = logits.softmax(-1)
        total = p.gather(-1, index).sum(-1, keepdim=True)
        return softmax_backward(p, torch.zeros_like(p).scatter(-1, index, g / total)), None


def _top_k(function):
    def route(logits, k=2):
        """The k best experts of each token, logits (T, E): softmax weights (T, k) among them, and their index."""
        return function.apply(logits, k)

    return route


add(
    "router_renormalised",
    _top_k,
    TopKFixedSum,
    TopK,
    lambda: (real(3, 4),),
    bug="the sum by which the chosen weights are normalised is taken for a constant",
    trigger="the sample",
)


class Dispatch(Function):
    """Tokens into buffers of their experts; what is over an expert's capacity is dropped."""

    @staticmethod
    def slot(expert, experts):
        return (F.one_hot(expert, experts).cumsum(0) - 1).gather(1, expert[:, None])[:, 0]

    @staticmethod
    def forward(ctx, x, expert, experts, capacity):
        slot = Dispatch.slot(expert, experts)
        ctx.save_for_backward(expert, slot)
        ctx.capacity = capacity
        kept = slot < capacity
        buffer = x.new_zeros(experts, capacity, x.shape[-1])
        buffer[expert[kept], slot[kept]] = x[kept]
        return buffer

    @staticmethod
    def backward(ctx, g):
        expert, slot = ctx.saved_tensors
        grad = g[expert, slot.clamp(max=ctx.capacity - 1)]
        return grad.masked_fill((slot >= ctx.capacity)[:, None], 0), None, None, None


class DispatchDropped(Dispatch):
    @staticmethod
    def backward(ctx, g):
        expert, slot = ctx.saved_tensors
        return g[expert, slot.clamp(max=ctx.capacity - 1)], None, None, None


def _dispatch(function):
    def dispatch(x, expert, experts=3, capacity=3):
        """Put tokens x (T, D) into a buffer (experts, capacity, D) in order; those over capacity, > 0, are dropped."""
        return function.apply(x, expert, experts, capacity)

    return dispatch


add(
    "dispatch_capacity",
    _dispatch,
    DispatchDropped,
    Dispatch,
    lambda: (real(5, 2), torch.tensor([0, 2, 1, 2, 0])),
    bug="a dropped token has the gradient of the last slot",
    trigger="more tokens for one expert than its capacity",
)
