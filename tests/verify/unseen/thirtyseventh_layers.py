"""Layers: norms, linear layers, convolutions, attention, sampling."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtyseventh import add, bounded, check, sized, tame


# A signal (B, C, L) read at shifted places with linear interpolation, 0 outside
def shifted_read(wrong):
    def parts(x, shift):
        length = x.shape[-1]
        at = torch.arange(length, device=x.device) + shift
        low = at.detach().floor()
        f = (at - low)[:, None]

        def read(i):
            inside = ((i >= 0) & (i < length))[:, None].to(x.dtype)
            i = i.clamp(0, length - 1).long()[:, None].expand_as(x)
            return i, inside

        return at, f, read(low), read(low + 1)

    class Read(Function):
        @staticmethod
        def forward(ctx, x, shift):
            ctx.save_for_backward(x, shift)
            _, f, (i, ok), (j, fine) = parts(x, shift)
            return (1 - f) * ok * x.gather(2, i) + f * fine * x.gather(2, j)

        @staticmethod
        def backward(ctx, g):
            x, shift = ctx.saved_tensors
            at, f, (i, ok), (j, fine) = parts(x, shift)
            grad = torch.zeros_like(x).scatter_add(2, i, g * (1 - f) * ok)
            grad = grad.scatter_add(2, j, g * f * fine)
            slope = fine * x.gather(2, j) - ok * x.gather(2, i)
            if wrong:
                slope = slope * ((at >= 0) & (at <= x.shape[-1] - 1))[:, None]
            return grad, (g * slope).sum(1)

    def read(x, shift):
        sized("x", x, None, None, None)
        sized("shift", shift, x.shape[0], x.shape[2])
        tame(x=x, shift=shift)
        return Read.apply(x, shift)

    return read


add(
    "shifted_read_border",
    shifted_read,
    lambda: (
        real(1, 2, 4),
        torch.tensor([[0.3, 0.6, -0.4, -0.8]], dtype=torch.float64, requires_grad=True),
    ),
    bug="between the border and the first place outside, the shift has no gradient (pytorch/vision#6885)",
    trigger="places less than 1 outside of the signal",
)


# A block with its norm at the end: norm(x + tanh(x w)) gain
def post_norm_block(wrong):
    def parts(x, w):
        t = (x @ w).tanh()
        d = x + t
        d = d - d.mean(-1, keepdim=True)
        r = torch.rsqrt(d.square().mean(-1, keepdim=True) + 1e-5)
        return t, d * r, r

    class Block(Function):
        @staticmethod
        def forward(ctx, x, w, gain):
            ctx.save_for_backward(x, w, gain)
            return parts(x, w)[1] * gain

        @staticmethod
        def backward(ctx, g):
            x, w, gain = ctx.saved_tensors
            t, y, r = parts(x, w)
            h = g * gain
            along = (h * y).mean(-1, keepdim=True)
            before = r * (h - h.mean(-1, keepdim=True) - y * along)
            inner = before * (1 - t * t)
            return (g if wrong else before) + inner @ w.mT, x.mT @ inner, (g * y).sum(0)

    def block(x, w, gain):
        sized("x", x, None, None)
        sized("w", w, x.shape[1], x.shape[1])
        sized("gain", gain, x.shape[1])
        tame(bound=100, x=x, w=w, gain=gain)
        return Block.apply(x, w, gain)

    return block


add(
    "post_norm_block_residual",
    post_norm_block,
    lambda: (real(4, 3), real(3, 3, seed=1), real(3, seed=2)),
    bug="the residual gets the norm's output gradient, not its input's (deepspeedai/DeepSpeed#1563)",
)


# One encoder for two inputs
def shared_encoder(wrong):
    class Encode(Function):
        @staticmethod
        def forward(ctx, x, z, w):
            ctx.save_for_backward(x, z, w)
            return (x @ w).tanh(), (z @ w).tanh()

        @staticmethod
        def backward(ctx, g, h):
            x, z, w = ctx.saved_tensors
            g = g * (1 - (x @ w).tanh().square())
            h = h * (1 - (z @ w).tanh().square())
            grad_w = x.mT @ g
            if not wrong:
                grad_w = grad_w + z.mT @ h
            return g @ w.mT, h @ w.mT, grad_w

    def encode(x, z, w):
        sized("x", x, None, None)
        sized("z", z, None, x.shape[1])
        sized("w", w, x.shape[1], None)
        tame(bound=100, x=x, z=z, w=w)
        return Encode.apply(x, z, w)

    return encode


add(
    "shared_encoder_second",
    shared_encoder,
    lambda: (real(3, 4), real(2, 4, seed=1), real(4, 2, seed=2)),
    bug="of two uses of one encoder only the first gives the weight a gradient (deepspeedai/DeepSpeed#8224)",
)


# A linear layer whose weight gradient is made part by part, as the rows arrive
def linear_in_parts(wrong):
    class Linear(Function):
        @staticmethod
        def forward(ctx, x, w, parts):
            ctx.save_for_backward(x, w)
            ctx.parts = parts
            return x @ w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            xs, gs = x.chunk(ctx.parts), g.chunk(ctx.parts)
            grad = torch.zeros_like(w)
            for i in range(ctx.parts):
                buffer = xs[min(i + 1, ctx.parts - 1)] if wrong else xs[i]
                grad = grad + buffer.mT @ gs[i]
            return g @ w.mT, grad, None

    def linear(x, w, parts=2):
        check(isinstance(parts, int) and parts >= 1, "parts: expected a positive integer")
        sized("x", x, None, None)
        check(len(x) % parts == 0, "x: expected parts of one size")
        sized("w", w, x.shape[1], None)
        tame(x=x, w=w)
        return Linear.apply(x, w, parts)

    return linear


add(
    "linear_in_parts_buffer",
    linear_in_parts,
    lambda: (real(4, 3), real(3, 2, seed=1)),
    bug="the next part is in the buffer before the weight's gradient has read it (NVIDIA/TransformerEngine#1616)",
)


# Layer norm over the last two dimensions (N, A, B)
def layer_norm_two(wrong):
    def parts(x):
        d = x - x.mean((1, 2), keepdim=True)
        r = torch.rsqrt(d.square().mean((1, 2), keepdim=True) + 1e-5)
        return d * r, r

    class Norm(Function):
        @staticmethod
        def forward(ctx, x, gain, bias):
            ctx.save_for_backward(x, gain)
            return parts(x)[0] * gain + bias

        @staticmethod
        def backward(ctx, g):
            x, gain = ctx.saved_tensors
            y, r = parts(x)
            h = g * gain
            along = (h * y).mean((1, 2), keepdim=True)
            grad = r * (h - h.mean((1, 2), keepdim=True) - y * along)
            grad_gain, grad_bias = (g * y).sum(0), g.sum(0)
            if wrong and len(x) > 8:
                width = x.shape[2]
                rows = g.reshape(-1, width)[: len(x)], (g * y).reshape(-1, width)[: len(x)]
                zero = torch.zeros_like(gain)[1:]
                grad_bias, grad_gain = (torch.cat([t.sum(0)[None], zero]) for t in rows)
            return grad, grad_gain, grad_bias

    def norm(x, gain, bias):
        sized("x", x, None, None, None)
        sized("gain", gain, *x.shape[1:])
        sized("bias", bias, *x.shape[1:])
        tame(x=x, gain=gain, bias=bias)
        return Norm.apply(x, gain, bias)

    return norm


add(
    "layer_norm_two_stages",
    layer_norm_two,
    lambda: (real(4, 2, 3), real(2, 3, seed=1), real(2, 3, seed=2)),
    bug="the sum in two stages takes the last dimension for all that is normalised (intel/torch-xpu-ops#5018)",
    trigger="more than eight rows",
)


# silu(x g) (x u), an expert's first half
def gated_expert(wrong):
    class Expert(Function):
        @staticmethod
        def forward(ctx, x, gate, up):
            ctx.save_for_backward(x, gate, up)
            return F.silu(x @ gate) * (x @ up)

        @staticmethod
        def backward(ctx, g):
            x, gate, up = ctx.saved_tensors
            a, b = x @ gate, x @ up
            s = a.sigmoid()
            grad_a, grad_b = g * b * s * (1 + a * (1 - s)), g * a * s
            grad_x = grad_a @ gate.mT
            if not wrong:
                grad_x = grad_x + grad_b @ up.mT
            return grad_x, x.mT @ grad_a, x.mT @ grad_b

    def expert(x, gate, up):
        sized("x", x, None, None)
        sized("gate", gate, x.shape[1], None)
        sized("up", up, *gate.shape)
        tame(bound=100, x=x, gate=gate, up=up)
        return Expert.apply(x, gate, up)

    return expert


add(
    "gated_expert_up",
    gated_expert,
    lambda: (real(3, 4), real(4, 2, seed=1), real(4, 2, seed=2)),
    bug="of the two products that share an accumulator the input gets one (linkedin/Liger-Kernel#1413)",
)


# Batch norm (B, C) without gain and bias
def batch_norm_bare(wrong):
    class Norm(Function):
        @staticmethod
        def forward(ctx, x, eps):
            ctx.save_for_backward(x)
            ctx.eps = eps
            d = x - x.mean(0)
            return d * torch.rsqrt(d.square().mean(0) + eps)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            d = x - x.mean(0)
            r = torch.rsqrt(d.square().mean(0) + (0 if wrong else ctx.eps))
            y = d * r
            return r * (g - g.mean(0) - y * (g * y).mean(0)), None

    def norm(x, eps=1e-5):
        sized("x", x, None, None)
        check(isinstance(eps, float) and 1e-8 <= eps <= 1, "eps: expected 1e-8 to 1")
        tame(x=x)
        return Norm.apply(x, eps)

    return norm


add(
    "batch_norm_bare_eps",
    batch_norm_bare,
    lambda: (real(4, 3),),
    bug="backward leaves eps out of the deviation (Oneflow-Inc/oneflow#8256)",
    trigger="columns that vary little: in others the error is small",
)


# Layer norm of rows (N, C)
def layer_norm_rows(wrong):
    def parts(x):
        d = x - x.mean(-1, keepdim=True)
        r = torch.rsqrt(d.square().mean(-1, keepdim=True) + 1e-5)
        return d * r, r

    class Norm(Function):
        @staticmethod
        def forward(ctx, x, gain, bias):
            ctx.save_for_backward(x, gain)
            return parts(x)[0] * gain + bias

        @staticmethod
        def backward(ctx, g):
            x, gain = ctx.saved_tensors
            y, r = parts(x)
            place = torch.arange(x.numel(), device=x.device).view_as(x)
            h = g * gain[place // len(x) if wrong else place % len(gain)]
            along = (h * y).mean(-1, keepdim=True)
            grad = r * (h - h.mean(-1, keepdim=True) - y * along)
            return grad, (g * y).sum(0), g.sum(0)

    def norm(x, gain, bias):
        sized("x", x, None, None)
        sized("gain", gain, x.shape[1])
        sized("bias", bias, x.shape[1])
        tame(x=x, gain=gain, bias=bias)
        return Norm.apply(x, gain, bias)

    return norm


add(
    "layer_norm_rows_index",
    layer_norm_rows,
    lambda: (real(4, 3), real(3, seed=1), real(3, seed=2)),
    bug="backward finds the gain's index by a quotient in place of the rest (Oneflow-Inc/oneflow#6149)",
)


# Convolution of a signal (B, C, L) with kernels (O, C, K)
def convolution(wrong):
    class Convolve(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return F.conv1d(x, w)

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            grad_x = F.conv_transpose1d(g, w)
            columns = x.unfold(2, w.shape[2], 1)
            if wrong:
                columns = columns[-1:].expand_as(columns)
            return grad_x, torch.einsum("bol,bclk->ock", g, columns)

    def convolve(x, w):
        sized("x", x, None, None, None)
        sized("w", w, None, x.shape[1], None)
        check(w.shape[2] <= x.shape[2], "w: expected kernels no longer than the signal")
        tame(x=x, w=w)
        return Convolve.apply(x, w)

    return convolve


add(
    "convolution_workspace",
    convolution,
    lambda: (real(3, 2, 5), real(2, 2, 3, seed=1)),
    bug="the batch's threads unfold into one workspace for the kernels' gradient (FluxML/NNlib.jl#197)",
    trigger="more than one in the batch",
)


# Attention (H, T, D) with a learned score per head to which nothing belongs
def attention_sink(wrong):
    def weights(q, k, sink):
        s = q @ k.mT * q.shape[-1] ** -0.5
        s = torch.cat([s, sink[:, None, None].expand(*s.shape[:2], 1)], -1)
        return s.softmax(-1)

    class Attend(Function):
        @staticmethod
        def forward(ctx, q, k, v, sink):
            ctx.save_for_backward(q, k, v, sink)
            return weights(q, k, sink)[..., :-1] @ v

        @staticmethod
        def backward(ctx, g):
            q, k, v, sink = ctx.saved_tensors
            full = weights(q, k, sink)
            p, rest = full[..., :-1], full[..., -1]
            gp = g @ v.mT
            along = (p * gp).sum(-1, keepdim=True)
            gs = p * (gp - along) * q.shape[-1] ** -0.5
            grad_sink = None if wrong else -(rest * along[..., 0]).sum(-1)
            return gs @ k, gs.mT @ q, p.mT @ g, grad_sink

    def attend(q, k, v, sink):
        sized("q", q, None, None, None)
        sized("k", k, q.shape[0], None, q.shape[2])
        sized("v", v, *k.shape[:2], None)
        sized("sink", sink, q.shape[0])
        tame(bound=30, q=q, k=k, v=v, sink=sink)
        bounded("sink", sink, -30, 30)
        return Attend.apply(q, k, v, sink)

    return attend


add(
    "attention_sink_none",
    attention_sink,
    lambda: (real(2, 3, 2), real(2, 4, 2, seed=1), real(2, 4, 3, seed=2), real(2, seed=3)),
    bug="the sink's score gets no gradient (Dao-AILab/flash-attention#1973)",
)
