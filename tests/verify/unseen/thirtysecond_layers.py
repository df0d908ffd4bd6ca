"""Layers: convolutions, norms, adapters, experts, graphs, activations."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.thirtysecond import (
    add,
    add_bare,
    bounded,
    check,
    indices,
    read_flat,
    same,
    sized,
)


# Depthwise causal convolution with a bias, as in front of state-space layers
def causal_depthwise(wrong):
    class Depthwise(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, w, bias):
            taps = w.shape[1]
            windows = F.pad(x, (taps - 1, 0)).unfold(-1, taps, 1)
            return (windows * w[:, None]).sum(-1) + bias[:, None]

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            x, w, _ = ctx.saved_tensors
            taps = w.shape[1]
            windows = F.pad(x, (taps - 1, 0)).unfold(-1, taps, 1)
            grad_w = (grad_y[..., None] * windows).sum((0, 2))
            ahead = F.pad(grad_y, (0, taps - 1)).unfold(-1, taps, 1)
            grad_x = (ahead * w.flip(-1)[:, None]).sum(-1)
            grad_bias = grad_y.sum(-1)
            return grad_x, grad_w, grad_bias if wrong else grad_bias.sum(0)

    def convolution(x, w, bias):
        sized("x", x, None, None, None)
        sized("w", w, x.shape[1], None)
        sized("bias", bias, x.shape[1])
        return Depthwise.apply(x, w, bias)

    return convolution


add(
    "depthwise_bias_rows",
    causal_depthwise,
    lambda: (real(2, 3, 6), real(3, 4, seed=1), real(3, seed=2)),
    bug="The bias' gradient keeps the batch dimension; only autograd's engine sums it",
    trigger="what backward returns, before the engine's repair",
)


# A diffusion transformer's modulation: x + gate * (layer_norm(x) * (1 + scale) + shift)
def modulated_residual(wrong):
    def parts(x):
        c = x - x.mean(-1, keepdim=True)
        r = torch.rsqrt(c.square().mean(-1, keepdim=True) + 1e-6)
        return c * r, r

    class Modulate(Function):
        @staticmethod
        def forward(ctx, x, shift, scale, gate):
            ctx.save_for_backward(x, shift, scale, gate)
            n, _ = parts(x)
            return x + gate[:, None] * (n * (1 + scale[:, None]) + shift[:, None])

        @staticmethod
        def backward(ctx, grad_y):
            x, shift, scale, gate = ctx.saved_tensors
            n, r = parts(x)
            factor = 1 + scale[:, None]
            grad_h = grad_y * gate[:, None]
            grad_gate = grad_y * (n * factor + shift[:, None])
            grad_n = grad_h * factor
            mean, along = grad_n.mean(-1, keepdim=True), (grad_n * n).mean(-1, keepdim=True)
            grad_x = grad_y + r * (grad_n - mean - n * along)
            if wrong:
                small = [t.float().sum(1) for t in (grad_h, grad_h * n, grad_gate)]
            else:
                small = [t.sum(1) for t in (grad_h, grad_h * n, grad_gate)]
            return grad_x, *small

    def modulate(x, shift, scale, gate):
        sized("x", x, None, None, None)
        sized("shift", shift, x.shape[0], x.shape[2])
        same(shift, scale, gate)
        bounded("x", x, -1e4, 1e4)
        return Modulate.apply(x, shift, scale, gate)

    return modulate


add(
    "modulation_float32",
    modulated_residual,
    lambda: (real(2, 3, 4), *(real(2, 4, seed=s) for s in (1, 2, 3))),
    bug="The conditioning's gradients are summed and returned in float32",
    trigger="float64 inputs, with the dtypes or the eighth digit watched",
)


# Modulated deformable convolution over one dimension, 0 outside of the signal
def deformable(wrong):
    def sample(x, places):
        n = x.shape[-1]
        low = places.floor()
        part = (places - low)[:, None]
        index = low.long()

        def at(i):
            inside = ((i >= 0) & (i < n))[:, None]
            rows = i.clamp(0, n - 1).flatten(1)[:, None].expand(-1, x.shape[1], -1)
            return torch.where(inside, x.gather(2, rows).unflatten(2, i.shape[1:]), 0), inside, rows

        return at(index), at(index + 1), part

    def places_of(x, offset):
        taps = offset.shape[1]
        here = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
        tap = torch.arange(taps, device=x.device, dtype=x.dtype) - taps // 2
        return offset + here + tap[:, None]

    class Deform(Function):
        @staticmethod
        def forward(ctx, x, offset, mask, w):
            ctx.save_for_backward(x, offset, mask, w)
            (v0, _, _), (v1, _, _), part = sample(x, places_of(x, offset))
            value = v0 * (1 - part) + v1 * part
            return torch.einsum("ock,bckl->bol", w, value * mask[:, None])

        @staticmethod
        def backward(ctx, grad_y):
            x, offset, mask, w = ctx.saved_tensors
            (v0, in0, rows0), (v1, in1, rows1), part = sample(x, places_of(x, offset))
            slope = v1 - v0
            if wrong:
                slope = (x.gather(2, rows1) - x.gather(2, rows0)).unflatten(2, part.shape[2:])
            value = v0 * (1 - part) + v1 * part
            grad_w = torch.einsum("bol,bckl->ock", grad_y, value * mask[:, None])
            grad_cols = torch.einsum("ock,bol->bckl", w, grad_y)
            grad_mask = (grad_cols * value).sum(1)
            grad_value = grad_cols * mask[:, None]
            grad_offset = (grad_value * slope).sum(1)
            grad_x = torch.zeros_like(x)
            grad_x = grad_x.scatter_add(2, rows0, (grad_value * in0 * (1 - part)).flatten(2))
            grad_x = grad_x.scatter_add(2, rows1, (grad_value * in1 * part).flatten(2))
            return grad_x, grad_offset, grad_mask, grad_w

    def convolution(x, offset, mask, w):
        sized("x", x, None, None, None)
        sized("offset", offset, x.shape[0], None, x.shape[2])
        same(offset, mask)
        sized("w", w, None, x.shape[1], offset.shape[1])
        bounded("offset", offset, -1e4, 1e4)
        return Deform.apply(x, offset, mask, w)

    return convolution


add(
    "deformable_offsets_border",
    deformable,
    lambda: (
        real(2, 2, 6),
        real(2, 3, 6, seed=1),
        real(2, 3, 6, seed=2, positive=True),
        real(3, 2, 3, seed=3),
    ),
    bug="The offsets' gradient takes the border's value for positions outside",
    trigger="the sample",
)


# RepVGG's block: three branches in training, one merged convolution in eval
def merged_branches(wrong):
    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            generator = torch.Generator().manual_seed(3)
            wide = torch.randn(channels, channels, 3, generator=generator, dtype=torch.float64)
            point = torch.randn(channels, channels, 1, generator=generator, dtype=torch.float64)
            self.wide = nn.Parameter(0.3 * wide)
            self.point = nn.Parameter(0.3 * point)
            self.shift = nn.Parameter(torch.zeros(channels, dtype=torch.float64))

        def merged(self):
            center = torch.eye(len(self.shift), dtype=self.shift.dtype, device=self.shift.device)
            kernel = self.wide + F.pad(self.point, (1, 1)) + F.pad(center[..., None], (1, 1))
            return kernel, self.shift

        def forward(self, x):
            sized("x", x, None, len(self.shift), None)
            if self.training:
                wide = F.conv1d(x, self.wide, self.shift, padding=1)
                return torch.tanh(wide + F.conv1d(x, self.point) + x)
            if wrong:
                with torch.no_grad():
                    kernel, shift = self.merged()
            else:
                kernel, shift = self.merged()
            return torch.tanh(F.conv1d(x, kernel, shift, padding=1))

    return Block(2)


add_bare(
    "merged_branches_eval",
    merged_branches,
    lambda: (real(2, 2, 5),),
    bug="In eval the branches are merged under no_grad: the kernels have no gradient",
    trigger="eval(), as when a frozen teacher's last block is fine-tuned",
)


# A linear layer with an update that is the Kronecker product of two small parameters
def kronecker_adapter(wrong):
    class Adapt(Function):
        @staticmethod
        def forward(ctx, x, a, b):
            ctx.save_for_backward(x, a, b)
            grid = x.unflatten(-1, (a.shape[1], b.shape[1]))
            return (a @ grid @ b.mT).flatten(-2)

        @staticmethod
        def backward(ctx, grad_y):
            x, a, b = ctx.saved_tensors
            grid = x.unflatten(-1, (a.shape[1], b.shape[1]))
            g = grad_y.unflatten(-1, (a.shape[0], b.shape[0]))
            grad_x = grad_a = grad_b = None
            if ctx.needs_input_grad[0]:
                grad_x = (a.mT @ g @ b).flatten(-2)
            if ctx.needs_input_grad[1]:
                grad_a = (g @ (grid @ b.mT).mT).sum(0)
            if ctx.needs_input_grad[2]:
                left = grid if wrong and not ctx.needs_input_grad[1] else a @ grid
                grad_b = (g.mT @ left).sum(0)
            return grad_x, grad_a, grad_b

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(real(3, 3, seed=s, grad=False)) for s in (4, 5))
            self.base = nn.Parameter(real(9, 9, seed=6, grad=False))

        def forward(self, x):
            sized("x", x, None, 9)
            with torch.autocast(x.device.type, enabled=False):
                update = Adapt.apply(x, self.a, self.b)
            return F.linear(x, self.base) + update

    return Layer()


add_bare(
    "kronecker_frozen_factor",
    kronecker_adapter,
    lambda: (real(2, 9),),
    bug="Where one factor is frozen the other's gradient is computed without it",
    trigger="the first factor frozen (requires_grad=False) and the second trained",
)


# PReLU with one slope a channel
def channel_slopes(wrong):
    class Slopes(Function):
        @staticmethod
        def forward(ctx, x, slope):
            ctx.save_for_backward(x, slope)
            return torch.where(x > 0, x, slope[:, None] * x)

        @staticmethod
        def backward(ctx, grad_y):
            x, slope = ctx.saved_tensors
            grad_x = torch.where(x > 0, grad_y, slope[:, None] * grad_y)
            wide = torch.promote_types(x.dtype, torch.float32)
            if wrong:
                total = torch.zeros_like(slope)
                for row in torch.where(x > 0, 0, grad_y * x).transpose(1, 2).flatten(0, 1):
                    total = total + row
            else:
                products = grad_y.to(wide) * x.to(wide)
                total = torch.where(x > 0, 0, products).sum((0, 2)).to(slope.dtype)
            return grad_x, total

    def prelu(x, slope):
        sized("x", x, None, None, None)
        sized("slope", slope, x.shape[1])
        check(slope.dtype == x.dtype, "slope: expected x's dtype")
        return Slopes.apply(x, slope)

    return prelu


add(
    "channel_slopes_half_sum",
    channel_slopes,
    lambda: (real(3, 2, 4), torch.full((2,), 0.25).double().requires_grad_()),
    bug="The slopes' gradient is a running sum in the inputs' own type",
    trigger="bfloat16 or float16 and many rows",
    own=True,
)


# A linear layer with int8 weights and a scale for each group of columns
def grouped_int8(wrong):
    def weights(q, scale):
        return (q.unflatten(1, (scale.shape[1], -1)).to(scale.dtype) * scale[..., None]).flatten(1)

    class Linear(Function):
        @staticmethod
        def forward(ctx, x, q, scale):
            ctx.save_for_backward(x, q, scale)
            return x @ weights(q, scale).mT

        @staticmethod
        def backward(ctx, grad_y):
            x, q, scale = ctx.saved_tensors
            w = weights(q, scale)
            grad_w = grad_y.mT @ x
            groups = (scale.shape[1], -1)
            grad_scale = (grad_w * q.to(scale.dtype)).unflatten(1, groups).sum(-1)
            if wrong:
                w = w.half().to(w.dtype)
            return grad_y @ w, None, grad_scale

    def linear(x, q, scale):
        sized("x", x, None, None)
        sized("q", q, None, x.shape[1])
        if q.dtype != torch.int8:
            raise TypeError(f"q: expected int8, got {q.dtype}")
        sized("scale", scale, q.shape[0], None)
        check(q.shape[1] % scale.shape[1] == 0, "scale: expected groups of one width")
        return Linear.apply(x, q, scale)

    return linear


add(
    "int8_weights_half",
    grouped_int8,
    lambda: (
        real(3, 6),
        (whole(255, 4, 6) - 127).to(torch.int8),
        (0.01 * real(4, 2, seed=1, grad=False).abs() + 0.001).requires_grad_(),
    ),
    bug="Backward rebuilds the weights in float16",
    trigger="gradients compared to more than three digits",
)


# Instance norm with the gain and shift of a condition
def conditioned(wrong):
    class Norm(Function):
        @staticmethod
        def forward(ctx, x, gamma, beta):
            ctx.save_for_backward(x, gamma)
            c = x - x.mean(-1, keepdim=True)
            r = torch.rsqrt(c.square().mean(-1, keepdim=True) + 1e-5)
            return c * r * gamma[..., None] + beta[..., None]

        @staticmethod
        def backward(ctx, grad_y):
            x, gamma = ctx.saved_tensors
            c = x - x.mean(-1, keepdim=True)
            r = torch.rsqrt(c.square().mean(-1, keepdim=True) + 1e-5)
            n, g = c * r, grad_y * gamma[..., None]
            along = (g * n).mean(-1, keepdim=True)
            grad_x = r * (g - g.mean(-1, keepdim=True) - n * along)
            grad_gamma, grad_beta = (grad_y * n).sum(-1), grad_y.sum(-1)
            return grad_x, *((grad_beta, grad_gamma) if wrong else (grad_gamma, grad_beta))

    def norm(x, *, gamma, beta):
        sized("x", x, None, None, None)
        sized("gamma", gamma, *x.shape[:2])
        sized("beta", beta, *x.shape[:2])
        bounded("x", x, -1e4, 1e4)
        return Norm.apply(x, gamma, beta)

    return norm


add(
    "conditioned_norm_keywords",
    conditioned,
    lambda: (real(2, 3, 5),),
    kwargs=lambda: {"gamma": real(2, 3, seed=1), "beta": real(2, 3, seed=2)},
    bug="The gradients of the keywords gamma and beta are exchanged",
    trigger="the gradients of keyword arguments",
)


# Mean squared cosine between different heads
def head_diversity(wrong):
    def unit(x):
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    class Diversity(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            u = unit(x)
            others = 1 - torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            return ((u @ u.mT).square() * others).sum((1, 2)) / others.sum().clamp(min=1)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            u = unit(x)
            others = 1 - torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            share = others / (others.sum() if wrong else others.sum().clamp(min=1))
            grad_u = 4 * grad_y[:, None, None] * ((u @ u.mT) * share) @ u
            r = torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
            return r * (grad_u - u * (u * grad_u).sum(-1, keepdim=True))

    def diversity(x):
        sized("x", x, None, None, None)
        bounded("x", x, -1e4, 1e4)
        return Diversity.apply(x)

    return diversity


add(
    "head_diversity_single",
    head_diversity,
    lambda: (real(2, 3, 4),),
    bug="Backward divides by the number of pairs, of which one head has none: 0 / 0",
    trigger="one head",
)


# Local response normalisation over five channels
def local_response(wrong):
    def near(t):
        return F.pad(t, (0, 0, 2, 2)).unfold(1, 5, 1).sum(-1)

    class Response(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * (2 + 0.1 * near(x.square())) ** -0.75

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong:
                x = read_flat(x)
            d = 2 + 0.1 * near(x.square())
            return grad_y * d**-0.75 - 0.15 * x * near(grad_y * x * d**-1.75)

    def normalise(x):
        sized("x", x, None, None, None)
        bounded("x", x, -1e4, 1e4)
        return Response.apply(x)

    return normalise


add(
    "local_response_layout",
    local_response,
    lambda: (real(2, 6, 3),),
    bug="Backward reads the saved input as if it were contiguous",
    trigger="a transposed or sliced input",
)


# Each token's best expert, computed for tokens sorted by expert, times the router's probability
def sorted_experts(wrong):
    def route(x, router):
        p = (x @ router).softmax(-1)
        chosen = p.detach().argmax(-1)
        order = chosen.argsort(stable=True)
        return p, chosen, order, chosen.bincount(minlength=p.shape[1]).tolist()

    class Experts(Function):
        @staticmethod
        def forward(ctx, x, router, w):
            ctx.save_for_backward(x, router, w)
            p, chosen, order, counts = route(x, router)
            parts = [a @ m for a, m in zip(x[order].split(counts), w, strict=True)]
            y = torch.cat(parts)[order.argsort()]
            return y * p.gather(1, chosen[:, None])

        @staticmethod
        def backward(ctx, grad_y):
            x, router, w = ctx.saved_tensors
            p, chosen, order, counts = route(x, router)
            rows = x[order].split(counts)
            gain = p.gather(1, chosen[:, None])
            back = order if wrong else order.argsort()
            y = torch.cat([a @ m for a, m in zip(rows, w, strict=True)])[order.argsort()]
            g = (grad_y * gain)[order].split(counts)
            grad_x = torch.cat([a @ m.mT for a, m in zip(g, w, strict=True)])[back]
            grad_w = torch.stack([a.mT @ b for a, b in zip(rows, g, strict=True)])
            along = (grad_y * y).sum(-1, keepdim=True)
            hot = F.one_hot(chosen, p.shape[1]).to(p.dtype)
            grad_s = along * gain * (hot - p)
            return grad_x + grad_s @ router.mT, x.mT @ grad_s, grad_w

    def layer(x, router, w):
        sized("x", x, None, None)
        sized("router", router, x.shape[1], None)
        sized("w", w, router.shape[1], x.shape[1], None)
        return Experts.apply(x, router, w)

    return layer


add(
    "sorted_experts_order",
    sorted_experts,
    lambda: (real(7, 4), real(4, 3, seed=1), real(3, 4, 2, seed=2)),
    bug="Gradients of sorted tokens are put back by the sorting order, not its inverse",
)


# Graph attention: a softmax over each node's incoming edges
def graph_attention(wrong):
    def shares(h, a, b, source, target):
        pre = (h[source] * a + h[target] * b).sum(-1)
        e = torch.where(pre > 0, pre, 0.2 * pre)
        top = torch.full((len(h),), -math.inf, dtype=h.dtype, device=h.device)
        top = top.scatter_reduce(0, target, e.detach(), "amax")
        held = (e - top[target]).exp()
        total = torch.zeros(len(h), dtype=h.dtype, device=h.device).index_add(0, target, held)
        return pre, held / total[target]

    class Attend(Function):
        @staticmethod
        def forward(ctx, h, a, b, source, target):
            ctx.save_for_backward(h, a, b, source, target)
            _, p = shares(h, a, b, source, target)
            return torch.zeros_like(h).index_add(0, target, p[:, None] * h[source])

        @staticmethod
        def backward(ctx, grad_y):
            h, a, b, source, target = ctx.saved_tensors
            pre, p = shares(h, a, b, source, target)
            if wrong:
                p = p.detach()
            grad_p = (grad_y[target] * h[source]).sum(-1)
            total = torch.zeros_like(h[:, 0]).index_add(0, target, p * grad_p)
            grad_e = p * (grad_p - total[target])
            grad_pre = torch.where(pre > 0, grad_e, 0.2 * grad_e)[:, None]
            grad_h = torch.zeros_like(h)
            grad_h = grad_h.index_add(0, source, p[:, None] * grad_y[target] + grad_pre * a)
            grad_h = grad_h.index_add(0, target, grad_pre * b)
            grad_a, grad_b = (grad_pre * h[source]).sum(0), (grad_pre * h[target]).sum(0)
            return grad_h, grad_a, grad_b, None, None

    def layer(h, a, b, source, target):
        sized("h", h, None, None)
        sized("a", a, h.shape[1])
        same(a, b)
        check(source.ndim == 1, "source: expected a list of nodes")
        same(source, target)
        indices("source", source, len(h))
        indices("target", target, len(h))
        return Attend.apply(h, a, b, source, target)

    return layer


add(
    "graph_attention_detached",
    graph_attention,
    lambda: (
        real(4, 3),
        real(3, seed=1),
        real(3, seed=2),
        torch.tensor([0, 1, 2, 3, 0, 2]),
        torch.tensor([1, 1, 1, 0, 3, 3]),
    ),
    bug="Backward detaches the attention shares",
    trigger="second derivatives",
)
