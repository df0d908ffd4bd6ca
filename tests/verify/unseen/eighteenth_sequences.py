"""Attention, scans and causal convolution."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.eighteenth import add, memory


class PScan(Function):
    @staticmethod
    def states(a, x):
        h, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = a[:, t] * h + x[:, t]
            states.append(h)
        return torch.stack(states, 1)

    @staticmethod
    def forward(ctx, a, x):
        ctx.save_for_backward(a, x)
        return PScan.states(a, x)

    @staticmethod
    def gradients(ctx, g, conj):
        a, x = ctx.saved_tensors
        before = F.pad(PScan.states(a, x)[:, :-1], (0, 0, 1, 0))
        d, grads = torch.zeros_like(x[:, 0]), []
        for t in reversed(range(x.shape[1])):
            d = d + g[:, t]
            grads.insert(0, d)
            d = conj(a[:, t]) * d
        grad = torch.stack(grads, 1)
        return grad * conj(before), grad

    @staticmethod
    def backward(ctx, g):
        return PScan.gradients(ctx, g, torch.conj)


class PScanReal(PScan):
    @staticmethod
    def backward(ctx, g):
        return PScan.gradients(ctx, g, lambda t: t)


def _pscan(function):
    def pscan(a, x):
        """States h[t] = a[t] h[t-1] + x[t] of a and x (B, L, D), L > 0, from 0; real or complex."""
        return function.apply(a, x)

    return pscan


def _complex(*shape, seed):
    return torch.complex(
        real(*shape, seed=seed, grad=False), real(*shape, seed=seed + 1, grad=False)
    ).requires_grad_()


add(
    "pscan_complex",
    _pscan,
    PScanReal,
    PScan,
    lambda: (_complex(2, 4, 3, seed=0), _complex(2, 4, 3, seed=2)),
    bug="nothing is conjugated (alxndrTL/mamba.py#65)",
    trigger="the sample",
)


class PreAttention(Function):
    """u = (I + beta A)⁻¹ v, A being the softmax over all earlier keys."""

    @staticmethod
    def weights(q, k):
        s = q @ k.mT * q.shape[-1] ** -0.5
        earlier = torch.ones_like(s, dtype=torch.bool).tril(-1)
        top = s.masked_fill(~earlier, -torch.inf)[:, 1:].softmax(-1)
        return torch.cat((torch.zeros_like(s[:, :1]), top), 1)

    @staticmethod
    def system(q, k, beta):
        a = PreAttention.weights(q, k)
        return a, torch.eye(q.shape[1], dtype=q.dtype, device=q.device) + beta.unsqueeze(-1) * a

    @staticmethod
    def forward(ctx, q, k, v, beta):
        ctx.save_for_backward(q, k, v, beta)
        return torch.linalg.solve_triangular(PreAttention.system(q, k, beta)[1], v, upper=False)

    @staticmethod
    def gradients(ctx, g, of_beta):
        q, k, v, beta = ctx.saved_tensors
        a, system = PreAttention.system(q, k, beta)
        u = torch.linalg.solve_triangular(system, v, upper=False)
        grad_v = torch.linalg.solve_triangular(system.mT, g, upper=True)
        d = -grad_v @ u.mT
        da = beta.unsqueeze(-1) * d
        row_dot = (da * a).sum(-1)
        ds = a * (da - row_dot.unsqueeze(-1)) * q.shape[-1] ** -0.5
        return ds @ k, ds.mT @ q, grad_v, of_beta((d * a).sum(-1), row_dot)

    @staticmethod
    def backward(ctx, g):
        return PreAttention.gradients(ctx, g, lambda grad, row_dot: grad)


class PreAttentionDot(PreAttention):
    @staticmethod
    def backward(ctx, g):
        return PreAttention.gradients(ctx, g, lambda grad, row_dot: row_dot)


def _pre_attention(function):
    def pre_attention(q, k, v, beta):
        """u[t] = v[t] - beta[t] Σ A[t, s] u[s] over s < t, of q and k (N, T, D), v (N, T, E), beta (N, T).

        A[t] is the softmax over s < t of the scaled products of q[t] and k[s]; D, T > 0.
        """
        return function.apply(q, k, v, beta)

    return pre_attention


add(
    "pre_attention_beta",
    _pre_attention,
    PreAttentionDot,
    PreAttention,
    lambda: (
        real(2, 4, 3),
        real(2, 4, 3, seed=1),
        real(2, 4, 3, seed=2),
        real(2, 4, seed=3, grad=False).sigmoid().requires_grad_(),
    ),
    bug="the softmax's row sums are returned as beta's gradient (fla-org/flash-linear-attention#584)",
    trigger="the sample",
)


class FlashAttention(Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    @staticmethod
    def gradients(ctx, dout):
        q, k, v = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        p = (q @ k.mT * scale).softmax(-1)
        dp = dout @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        return ds @ k, ds.mT @ q, p.mT @ dout

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return FlashAttention.gradients(ctx, dout)


class FlashAttentionMemory(FlashAttention):
    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return FlashAttention.gradients(ctx, memory(dout))


def _flash_attention(function):
    def flash_attention(q, k, v):
        """Attention of q, k and v (B, H, T, D), D > 0."""
        return function.apply(q, k, v)

    return flash_attention


add(
    "flash_attention_dout",
    _flash_attention,
    FlashAttentionMemory,
    FlashAttention,
    lambda: (real(2, 2, 3, 4), real(2, 2, 3, 4, seed=1), real(2, 2, 3, 4, seed=2)),
    bug="backward takes dout to be contiguous (Dao-AILab/flash-attention#355)",
    trigger="a cotangent that is transposed or expanded",
)


class CausalConv(Function):
    """The last W - 1 inputs are carried over as state."""

    @staticmethod
    def forward(ctx, x, weight, initial_state):
        ctx.save_for_backward(x, weight, initial_state)
        full = torch.cat((initial_state, x), -1)
        y = (full.unfold(-1, weight.shape[-1], 1) * weight.unsqueeze(-2)).sum(-1)
        return y, full[..., x.shape[-1] :].clone()

    @staticmethod
    def through(x, weight, initial_state, g):
        """The gradients of the states and inputs, and of the weight, from that of y."""
        width, steps = weight.shape[-1], x.shape[-1]
        windows = torch.cat((initial_state, x), -1).unfold(-1, width, 1)
        grad = sum(F.pad(g * weight[:, w : w + 1], (w, width - 1 - w)) for w in range(width))
        return (
            grad[..., : grad.shape[-1] - steps],
            grad[..., width - 1 :],
            (g.unsqueeze(-1) * windows).sum((0, 2)),
        )

    @staticmethod
    def backward(ctx, g, dht):
        x, weight, initial_state = ctx.saved_tensors
        steps, keep = x.shape[-1], initial_state.shape[-1]
        dh0, dx, dw = CausalConv.through(x, weight, initial_state, g)
        tail = F.pad(dht, (steps, 0))
        return dx + tail[..., keep:], dw, dh0 + tail[..., :keep]


class CausalConvClamped(CausalConv):
    """Token t takes slot t - max(0, T - (W - 1)); what is still of the initial state gets nothing."""

    @staticmethod
    def backward(ctx, g, dht):
        x, weight, initial_state = ctx.saved_tensors
        steps, keep = x.shape[-1], initial_state.shape[-1]
        dh0, dx, dw = CausalConv.through(x, weight, initial_state, g)
        start = max(0, steps - keep)
        return dx + F.pad(dht[..., : steps - start], (start, 0)), dw, dh0


def _causal_conv(function):
    def causal_conv(x, weight, initial_state):
        """Causal convolution of x (N, D, T), T > 0, after initial_state (N, D, W - 1), with weight (D, W).

        Returns the outputs (N, D, T) and the state after them (N, D, W - 1).
        """
        return function.apply(x, weight, initial_state)

    return causal_conv


add(
    "causal_conv_short",
    _causal_conv,
    CausalConvClamped,
    CausalConv,
    lambda: (real(2, 3, 6), real(3, 4, seed=1), real(2, 3, 3, seed=2)),
    bug="a chunk's state gradient goes to shifted slots (fla-org/flash-linear-attention#1140)",
    trigger="T < W - 1",
)


class CachedConv(Function):
    @staticmethod
    def forward(ctx, x, weight, initial_state, output_final_state):
        y, state = CausalConv.forward(ctx, x, weight, initial_state)
        ctx.output_final_state = output_final_state
        return (y, state) if output_final_state else y

    @staticmethod
    def backward(ctx, g, *dht):
        dht = dht[0] if dht else torch.zeros_like(ctx.saved_tensors[2])
        return *CausalConv.backward(ctx, g, dht), None


class CachedConvGated(CachedConv):
    """Without the final state's gradient the kernel starts from zeros."""

    @staticmethod
    def backward(ctx, g, *dht):
        dx, dw, dh0, _ = CachedConv.backward(ctx, g, *dht)
        if not dht:
            x, weight, initial_state = ctx.saved_tensors
            dw = CausalConv.through(x, weight, torch.zeros_like(initial_state), g)[2]
        return dx, dw, dh0, None


def _cached_conv(function):
    def cached_conv(x, weight, initial_state, output_final_state=False):
        """Causal convolution of x (N, D, T), T > 0, after initial_state (N, D, W - 1), with weight (D, W).

        Returns the outputs (N, D, T), and with output_final_state the state after them.
        """
        return function.apply(x, weight, initial_state, output_final_state)

    return cached_conv


add(
    "cached_conv_state",
    _cached_conv,
    CachedConvGated,
    CachedConv,
    lambda: (real(2, 3, 6), real(3, 4, seed=1), real(2, 3, 3, seed=2)),
    bug="the weight's gradient knows the initial state only with a final one (fla-org/flash-linear-attention#568)",
    trigger="the sample",
)
