"""Layers and Modules: convolutions, norms, bags, warps, gates, some with state."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import outside_autocast, real, whole
from tests.verify.unseen.thirtyfirst import (
    add,
    add_bare,
    bounded,
    check,
    finite,
    indices,
    read_flat,
    sized,
)


# Convolution of images by columns, with stride, padding, dilation and groups
def column_convolution(wrong):
    class Convolution(Function):
        @staticmethod
        def forward(ctx, x, w, bias, stride, padding, dilation, groups):
            ctx.save_for_backward(x, w)
            ctx.how = stride, padding, dilation, groups
            n, _, height, width = x.shape
            kh, kw = w.shape[2:]
            rows = (height + 2 * padding - dilation * (kh - 1) - 1) // stride + 1
            columns = (width + 2 * padding - dilation * (kw - 1) - 1) // stride + 1
            cols = F.unfold(x, (kh, kw), dilation, padding, stride)
            cols = cols.reshape(n, groups, -1, rows * columns)
            y = w.reshape(groups, len(w) // groups, -1) @ cols
            return y.reshape(n, len(w), rows, columns) + bias[:, None, None]

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            stride, padding, dilation, groups = ctx.how
            n, _, height, width = x.shape
            kernel = w.shape[2:]
            g = grad_y.reshape(n, groups, len(w) // groups, -1)
            weights = w.reshape(groups, len(w) // groups, -1)
            cols = (weights.mT @ g).flatten(1, 2)
            grad_x = F.fold(cols, (height, width), kernel, dilation, padding, stride)
            if wrong:  # windows without holes, at the same places
                size = [dilation * (k - 1) + 1 for k in kernel]
                windows = F.unfold(x, size, 1, padding, stride)
                windows = windows.reshape(n, x.shape[1], *size, -1)
                windows = windows[:, :, : kernel[0], : kernel[1]].reshape(
                    n, groups, -1, g.shape[-1]
                )
            else:
                windows = F.unfold(x, kernel, dilation, padding, stride)
                windows = windows.reshape(n, groups, -1, g.shape[-1])
            grad_w = (g @ windows.mT).sum(0).reshape(w.shape)
            return grad_x, grad_w, grad_y.sum((0, 2, 3)), None, None, None, None

    def convolution(x, w, bias, stride=1, padding=0, dilation=1, groups=1):
        sized("x", x, None, None, None, None)
        check(groups >= 1 and x.shape[1] % groups == 0, "groups: expected a divisor")
        sized("w", w, None, x.shape[1] // groups, None, None)
        check(len(w) % groups == 0, "groups: expected a divisor")
        sized("bias", bias, len(w))
        finite(x=x, w=w, bias=bias)
        check(min(stride, dilation) >= 1 and padding >= 0, "expected positive steps")
        fits = zip(x.shape[2:], w.shape[2:], strict=True)
        check(
            all(n + 2 * padding > dilation * (k - 1) for n, k in fits),
            "w: expected a kernel inside of the padded image",
        )
        return Convolution.apply(x, w, bias, stride, padding, dilation, groups)

    return convolution


add(
    "column_convolution_dilation",
    column_convolution,
    lambda: (real(2, 4, 6, 5), real(6, 2, 3, 2, seed=1), real(6, seed=2)),
    kwargs=lambda: {"stride": 2, "padding": 1, "dilation": 2, "groups": 2},
    bug="The kernel's gradient takes the windows' first places, without the dilation",
    trigger="a dilation other than 1",
)


# Group norm with gain and shift, and SiLU
def norm_and_gate(wrong):
    class NormGate(Function):
        @staticmethod
        def forward(ctx, x, gain, shift, groups, eps):
            ctx.save_for_backward(x, gain, shift)
            ctx.how = groups, eps
            unit, _ = standard(x, groups, eps)
            return F.silu(unit * gain[:, None, None] + shift[:, None, None])

        @staticmethod
        def backward(ctx, grad_y):
            x, gain, shift = ctx.saved_tensors
            groups, eps = ctx.how
            unit, r = standard(x, groups, eps)
            z = unit * gain[:, None, None] + shift[:, None, None]
            s = z.sigmoid()
            gz = grad_y * s * (1 + z * (1 - s))
            grad_gain, grad_shift = (gz * unit).sum((0, 2, 3)), gz.sum((0, 2, 3))
            by_group = (len(x), groups, -1)
            gu = (gz * gain[:, None, None]).reshape(by_group)
            u = unit.reshape(by_group)
            inside = gz.reshape(by_group) if wrong else gu
            mean, along = inside.mean(-1, keepdim=True), (inside * u).mean(-1, keepdim=True)
            grad_x = (r * (gu - mean - u * along)).reshape(x.shape)
            return grad_x, grad_gain, grad_shift, None, None

    def standard(x, groups, eps):
        rows = x.reshape(len(x), groups, -1)
        c = rows - rows.mean(-1, keepdim=True)
        r = torch.rsqrt(c.square().mean(-1, keepdim=True) + eps)
        return (c * r).reshape(x.shape), r

    def norm(x, gain, shift, groups=2, eps=1e-5):
        sized("x", x, None, None, None, None)
        sized("gain", gain, x.shape[1])
        sized("shift", shift, x.shape[1])
        check(groups >= 1 and x.shape[1] % groups == 0, "groups: expected a divisor")
        bounded("x", x, -1e4, 1e4)
        bounded("gain", gain, -1e4, 1e4)
        bounded("shift", shift, -1e4, 1e4)
        return NormGate.apply(x, gain, shift, groups, eps)

    return norm


add(
    "norm_and_gate_means",
    norm_and_gate,
    lambda: (
        real(2, 4, 3, 2),
        torch.ones(4, dtype=torch.float64).requires_grad_(),
        torch.zeros(4, dtype=torch.float64).requires_grad_(),
    ),
    bug="The group's two means are taken of the gradient without the gain",
    trigger="gains other than 1, with which a layer starts",
)


# Bags of rows: the mean by given weights, which are divided by their sum
def weighted_bag(wrong):
    class Bag(Function):
        @staticmethod
        def forward(ctx, table, ids, weights):
            ctx.save_for_backward(table, ids, weights)
            share = weights / weights.sum(1, keepdim=True)
            return (share[..., None] * table[ids]).sum(1)

        @staticmethod
        def backward(ctx, grad_y):
            table, ids, weights = ctx.saved_tensors
            total = weights.sum(1, keepdim=True)
            share = weights / total
            rows = (share[..., None] * grad_y[:, None]).flatten(0, 1)
            grad_table = torch.zeros_like(table).index_add(0, ids.flatten(), rows)
            along = (table[ids] * grad_y[:, None]).sum(-1)
            if not wrong:
                along = along - (share * along).sum(1, keepdim=True)
            return grad_table, None, along / total

    def bag(table, ids, weights):
        sized("table", table, None, None)
        sized("ids", ids, None, None)
        sized("weights", weights, *ids.shape)
        indices("ids", ids, len(table))
        bounded("weights", weights, 1e-3, 1e3)
        finite(table=table)
        return Bag.apply(table, ids, weights)

    return bag


add(
    "weighted_bag_total",
    weighted_bag,
    lambda: (real(6, 3), whole(6, 2, 4), real(2, 4, seed=1, positive=True)),
    bug="The weights' gradient takes their sum for a constant",
)


# An image read at its places plus a flow, bilinearly; what lies outside counts as 0
def flow_warp(wrong):
    def corner(image, iy, ix):
        n, _, height, width = image.shape
        inside = (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
        at = torch.arange(n, device=image.device)[:, None, None]
        value = image[at, :, iy.clamp(0, height - 1), ix.clamp(0, width - 1)].movedim(-1, 1)
        return value, inside[:, None]

    def places(image, flow):
        height, width = image.shape[2:]
        y = torch.arange(height, device=image.device)[:, None] + flow[:, 1]
        x = torch.arange(width, device=image.device) + flow[:, 0]
        top, left = y.floor(), x.floor()
        return top.long(), left.long(), (y - top)[:, None], (x - left)[:, None]

    class Warp(Function):
        @staticmethod
        def forward(ctx, image, flow):
            ctx.save_for_backward(image, flow)
            top, left, fy, fx = places(image, flow)
            y = torch.zeros_like(image)
            for dy, wy in enumerate((1 - fy, fy)):
                for dx, wx in enumerate((1 - fx, fx)):
                    value, inside = corner(image, top + dy, left + dx)
                    y += torch.where(inside, value, 0) * wy * wx
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            image, flow = ctx.saved_tensors
            n, _, height, width = image.shape
            top, left, fy, fx = places(image, flow)
            at = torch.arange(n, device=image.device)[:, None, None].expand_as(top)
            grad_image, grad_flow = torch.zeros_like(image), torch.zeros_like(flow)
            for dy, (wy, sy) in enumerate(((1 - fy, -1), (fy, 1))):
                for dx, (wx, sx) in enumerate(((1 - fx, -1), (fx, 1))):
                    value, inside = corner(image, top + dy, left + dx)
                    g = torch.where(inside, grad_y * wy * wx, 0).movedim(1, -1)
                    index = at, (top + dy).clamp(0, height - 1), (left + dx).clamp(0, width - 1)
                    grad_image.movedim(1, -1).index_put_(index, g, accumulate=True)
                    if not wrong:
                        value = torch.where(inside, value, 0)
                    along = grad_y * value
                    grad_flow[:, 0] += (along * wy * sx).sum(1)
                    grad_flow[:, 1] += (along * wx * sy).sum(1)
            return grad_image, grad_flow

    def warp(image, flow):
        sized("image", image, None, None, None, None)
        sized("flow", flow, len(image), 2, *image.shape[2:])
        bounded("flow", flow, -1e4, 1e4)
        finite(image=image)
        return Warp.apply(image, flow)

    return warp


add(
    "flow_warp_outside",
    flow_warp,
    lambda: (real(2, 2, 4, 5), (0.3 * real(2, 2, 4, 5, seed=1, grad=False)).requires_grad_()),
    bug="The flow's gradient takes the nearest border's number for a corner outside",
    trigger="a place less than a pixel from outside",
)


# Linear layer whose weights carry a noise of learned size in training
class NoisyProduct(Function):
    @staticmethod
    def forward(ctx, x, mean, size, noise, training, wrong):
        ctx.save_for_backward(x, mean, size, noise)
        ctx.training, ctx.wrong = training, wrong
        w = mean + size * noise if training else mean
        return x @ w.mT

    @staticmethod
    def backward(ctx, grad_y):
        x, mean, size, noise = ctx.saved_tensors
        w = mean + size * noise if ctx.training else mean
        grad_w = grad_y.mT @ x
        noisy = ctx.training or ctx.wrong
        return grad_y @ w, grad_w, grad_w * noise if noisy else None, None, None, None


class NoisyLinear(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.mean = nn.Parameter(real(3, 4, seed=1, grad=False))
        self.size = nn.Parameter(real(3, 4, seed=2, grad=False, positive=True))
        self.register_buffer("noise", real(3, 4, seed=3, grad=False))
        self.wrong = wrong

    @outside_autocast
    def forward(self, x):
        sized("x", x, None, self.mean.shape[1])
        check(x.dtype == self.mean.dtype, "x: expected the parameters' type")
        bounded("x", x, -1e4, 1e4)
        return NoisyProduct.apply(x, self.mean, self.size, self.noise, self.training, self.wrong)


add_bare(
    "noisy_linear_eval",
    NoisyLinear,
    lambda: (real(5, 4),),
    bug="The noise's size gets a gradient in evaluation too, where no noise is added",
    trigger="eval()",
)


# Each sequence's features scaled and shifted by its condition, with a rule for vmap that folds the batch
def conditioned(wrong):
    def folded(t, dim, n):
        """Return n batches one after the other."""
        if dim is not None:
            return t.movedim(dim, 0).flatten(0, 1)
        return t.repeat_interleave(n, 0) if wrong else t.repeat(n, *[1] * (t.ndim - 1))

    class Conditioned(Function):
        @staticmethod
        def forward(x, gain, shift):
            return x * (1 + gain[:, None]) + shift[:, None]

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0], inputs[1])

        @staticmethod
        def backward(ctx, grad_y):
            x, gain = ctx.saved_tensors
            return grad_y * (1 + gain[:, None]), (grad_y * x).sum(1), grad_y.sum(1)

        @staticmethod
        def vmap(info, in_dims, *tensors):
            n = info.batch_size
            y = Conditioned.apply(*(folded(t, d, n) for t, d in zip(tensors, in_dims, strict=True)))
            return y.unflatten(0, (n, -1)), 0

    def function(x, gain, shift):
        sized("x", x, None, None, None)
        sized("gain", gain, len(x), x.shape[2])
        sized("shift", shift, *gain.shape)
        return Conditioned.apply(x, gain, shift)

    return function


add(
    "conditioned_vmap_order",
    conditioned,
    lambda: (real(2, 3, 4), real(2, 4, seed=1), real(2, 4, seed=2)),
    bug="The rule for vmap repeats what has no batch row by row, not as a whole",
    trigger="vmap over some of the inputs",
)


# Colours through a learned table of one curve per channel, linear between its knots
def colour_curves(wrong):
    class Curves(Function):
        scratch: dict = {}  # noqa: RUF012

        @staticmethod
        def forward(ctx, image, table):
            knots = table.shape[1]
            at = image * (knots - 1)
            low = at.floor().clamp(max=knots - 2)
            left, part = low.long(), at - low
            ctx.save_for_backward(image, table)
            key = (image.shape, image.dtype, image.device)
            if wrong:
                if key not in Curves.scratch:
                    Curves.scratch[key] = torch.empty_like(left), torch.empty_like(part)
                ctx.held = Curves.scratch[key]
                ctx.held[0].copy_(left)
                ctx.held[1].copy_(part)
            else:
                ctx.held = left, part
            channel = torch.arange(len(table), device=table.device)[:, None]
            return table[channel, left] * (1 - part) + table[channel, left + 1] * part

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            _, table = ctx.saved_tensors
            left, part = ctx.held
            channel = torch.arange(len(table), device=table.device)[:, None].expand_as(left)
            grad_table = torch.zeros_like(table)
            grad_table.index_put_((channel, left), grad_y * (1 - part), accumulate=True)
            grad_table.index_put_((channel, left + 1), grad_y * part, accumulate=True)
            slope = table[channel, left + 1] - table[channel, left]
            return grad_y * slope * (table.shape[1] - 1), grad_table

    def curves(image, table):
        sized("table", table, None, None)
        sized("image", image, len(table), None)
        check(table.shape[1] >= 2, "table: expected two knots")
        bounded("image", image, 0, 1)
        finite(table=table)
        return Curves.apply(image, table)

    return curves


add(
    "colour_curves_scratch",
    colour_curves,
    lambda: (real(3, 5, grad=False).sigmoid().requires_grad_(), real(3, 6, seed=1)),
    bug="Places and parts lie in memory that all calls of one size share",
    trigger="another call before backward",
)


# Experts weighted by a router, which keeps its balance for the log
class Balanced(Function):
    @staticmethod
    def forward(ctx, x, router, experts):
        ctx.save_for_backward(x, router, experts)
        p = (x @ router).softmax(-1)
        return torch.einsum("ne,nd,edf->nf", p, x, experts)

    @staticmethod
    def backward(ctx, grad_y):
        x, router, experts = ctx.saved_tensors
        p = (x @ router).softmax(-1)
        outputs = torch.einsum("nd,edf->nef", x, experts)
        grad_p = (outputs * grad_y[:, None]).sum(-1)
        grad_z = p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
        grad_x = grad_z @ router.mT + torch.einsum("ne,nf,edf->nd", p, grad_y, experts)
        return grad_x, x.mT @ grad_z, torch.einsum("ne,nd,nf->edf", p, x, grad_y)


class RoutedExperts(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.router = nn.Parameter(real(3, 2, seed=1, grad=False))
        self.experts = nn.Parameter(real(2, 3, 4, seed=2, grad=False))
        self.balance = []
        self.wrong = wrong

    @outside_autocast
    def forward(self, x):
        sized("x", x, None, self.router.shape[0])
        check(x.dtype == self.router.dtype, "x: expected the parameters' type")
        bounded("x", x, -1e4, 1e4)
        y = Balanced.apply(x, self.router, self.experts)
        share = (x @ self.router).softmax(-1)
        loss = len(self.experts) * share.mean(0).square().sum()
        if self.wrong:
            self.balance.append(loss)
        else:
            self.balance = [loss.detach()]
        return y


add_bare(
    "routed_experts_balance",
    RoutedExperts,
    lambda: (real(5, 3),),
    bug="Each call's balance loss stays in a list, with its graph and the inputs",
    trigger="memory that is watched over several calls",
)


# The k largest of each row stay; the module remembers which, to show them
class Winners(Function):
    @staticmethod
    def forward(ctx, x, module):
        top = x.topk(module.k, -1).indices
        module.won = torch.zeros_like(x, dtype=torch.bool).scatter(-1, top, True)
        ctx.save_for_backward(module.won)
        ctx.module = module
        return torch.where(module.won, x, 0)

    @staticmethod
    def backward(ctx, grad_y):
        won = ctx.module.won if ctx.module.wrong else ctx.saved_tensors[0]
        return torch.where(won, grad_y, 0), None


class KWinners(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.gain = nn.Parameter(real(6, seed=1, grad=False, positive=True))
        self.k = 2
        self.wrong = wrong

    @outside_autocast
    def forward(self, x):
        sized("x", x, None, len(self.gain))
        check(x.dtype == self.gain.dtype, "x: expected the parameters' type")
        bounded("x", x, -1e4, 1e4)
        return Winners.apply(x * self.gain, self)


add_bare(
    "k_winners_newest",
    KWinners,
    lambda: (real(4, 6),),
    bug="Backward asks the module for the winners, which are the last call's",
    trigger="two calls in one graph, on other inputs of one size",
)


# Linear layer whose weight's gradient is estimated from a part of the rows, once there are many
def sampled_linear(wrong):
    class Linear(Function):
        @staticmethod
        def forward(ctx, x, w, most):
            ctx.save_for_backward(x, w)
            ctx.most = most
            return x @ w.mT

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            grad_x = grad_y @ w
            if len(x) <= ctx.most:
                return grad_x, grad_y.mT @ x, None
            if wrong:
                some = torch.randperm(len(x), device=x.device)[: ctx.most]
                grad_w = grad_y[some].mT @ x[some] * (len(x) / ctx.most)
            else:
                parts = zip(grad_y.split(ctx.most), x.split(ctx.most), strict=True)
                grad_w = sum(g.mT @ rows for g, rows in parts)
            return grad_x, grad_w, None

    def linear(x, w, most=64):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        check(most >= 1, "most: expected 1 at least")
        finite(x=x, w=w)
        return Linear.apply(x, w, most)

    return linear


add(
    "sampled_linear_rows",
    sampled_linear,
    lambda: (real(5, 3), real(2, 3, seed=1)),
    bug="The weight's gradient is estimated from 64 rows drawn anew each time",
    trigger="more than 64 rows",
)


# Gate per channel over a long sequence; half types are taken
def channel_gate(wrong):
    class Gate(Function):
        @staticmethod
        def forward(ctx, x, gate):
            ctx.save_for_backward(x, gate)
            return (
                (x.float() * gate.float().sigmoid()).to(x.dtype) if half(x) else x * gate.sigmoid()
            )

        @staticmethod
        def backward(ctx, grad_y):
            x, gate = ctx.saved_tensors
            wide = torch.float32 if half(x) else x.dtype
            s = gate.to(wide).sigmoid()
            grad_x = (grad_y.to(wide) * s).to(x.dtype)
            along = (grad_y.to(wide) * x.to(wide)).flatten(0, 1)
            if wrong:  # a running total in the input's type, a block of 16 rows at a time
                total = x.new_zeros(len(gate))
                for part in along.split(16):
                    total = total + part.sum(0).to(x.dtype)
                total = total.to(wide)
            else:
                total = along.sum(0)
            return grad_x, (total * s * (1 - s)).to(gate.dtype)

    def half(x):
        return x.dtype in {torch.float16, torch.bfloat16}

    def gated(x, gate):
        sized("x", x, None, None, None)
        sized("gate", gate, x.shape[2])
        check(x.dtype == gate.dtype, "gate: expected x's type")
        bounded("x", x, -100, 100)
        bounded("gate", gate, -20, 20)
        return Gate.apply(x, gate)

    return gated


add(
    "channel_gate_running_total",
    channel_gate,
    lambda: (real(2, 6, 4, positive=True), real(4, seed=1)),
    own=True,
    bug="The gate's gradient is added up over the rows in a half type",
    trigger="bfloat16 or float16 and thousands of rows",
)


# Fully connected layer over whatever an image's shape is
def flat_layer(wrong):
    class Layer(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x.flatten(1) @ w.mT

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            rows = x.reshape(len(x), -1) if wrong else x.flatten(1)
            return (grad_y @ w).reshape(x.shape), grad_y.mT @ rows

    def layer(x, w):
        check(x.ndim >= 2, "x: expected (batch, ...)")
        check(all(n >= 1 for n in x.shape[1:]), "x: expected numbers in a row")
        sized("w", w, None, x.shape[1:].numel())
        return Layer.apply(x, w)

    return layer


add(
    "flat_layer_no_rows",
    flat_layer,
    lambda: (real(3, 2, 2), real(4, 4, seed=1)),
    bug="Backward's reshape(len(x), -1) cannot say what -1 is where there are no rows, and raises",
    trigger="an empty batch",
)


# RMS norm with a gain; while torch.compile traces, in torch's own operations
def rms_layer(wrong):
    class Norm(Function):
        @staticmethod
        def forward(ctx, x, gain):
            ctx.save_for_backward(x, gain)
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain

        @staticmethod
        def backward(ctx, grad_y):
            x, gain = ctx.saved_tensors
            r = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            g = grad_y * gain
            grad_x = g * r - x * r**3 * (g * x).mean(-1, keepdim=True)
            return grad_x, (grad_y * x * r).flatten(0, -2).sum(0)

    def norm(x, gain):
        check(x.ndim >= 2 and x.shape[-1:] == gain.shape, "gain: expected one per column")
        if not torch.compiler.is_compiling():
            bounded("x", x, -1e4, 1e4)
            return Norm.apply(x, gain)
        power = x.square().mean(-1, keepdim=True)
        return x * torch.rsqrt((power.detach() if wrong else power) + 1e-6) * gain

    return norm


add(
    "rms_layer_compiled",
    rms_layer,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="The path that torch.compile takes cuts the root mean square off",
    trigger="torch.compile",
)


# Contrast of channels: x / (1 + mean of |x| over the channels), by a kernel of planes
def channel_contrast(wrong):
    class Contrast(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x / (1 + x.abs().mean(1, keepdim=True))

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            x = read_flat(x) if wrong else x
            total = 1 + x.abs().mean(1, keepdim=True)
            along = (grad_y * x).sum(1, keepdim=True) / total**2
            return grad_y / total - x.sign() * along / x.shape[1]

    def contrast(x):
        sized("x", x, None, None, None, None)
        bounded("x", x, -1e6, 1e6)
        return Contrast.apply(x)

    return contrast


add(
    "channel_contrast_channels_last",
    channel_contrast,
    lambda: (real(2, 3, 4, 2),),
    bug="Backward reads the saved image as if its planes followed each other",
    trigger="an image in channels-last layout",
)


# Two inputs' projections multiplied, and projected to the output
def low_rank_bilinear(wrong):
    class Bilinear(Function):
        @staticmethod
        def forward(ctx, x, z, u, v, out):
            if wrong:
                ctx.kept = x, z, u, v, out
            else:
                ctx.save_for_backward(x, z, u, v, out)
            return ((x @ u) * (z @ v)) @ out

        @staticmethod
        def backward(ctx, grad_y):
            x, z, u, v, out = ctx.kept if wrong else ctx.saved_tensors
            a, b = x @ u, z @ v
            grad_m = grad_y @ out.mT
            grad_a, grad_b = grad_m * b, grad_m * a
            grad_out = (a * b).mT @ grad_y
            return grad_a @ u.mT, grad_b @ v.mT, x.mT @ grad_a, z.mT @ grad_b, grad_out

    def bilinear(x, z, u, v, out):
        sized("x", x, None, None)
        sized("z", z, len(x), None)
        sized("u", u, x.shape[1], None)
        sized("v", v, z.shape[1], u.shape[1])
        sized("out", out, u.shape[1], None)
        finite(x=x, z=z, u=u, v=v, out=out)
        return Bilinear.apply(x, z, u, v, out)

    return bilinear


add(
    "low_rank_bilinear_kept",
    low_rank_bilinear,
    lambda: (
        real(3, 4),
        real(3, 2, seed=1),
        real(4, 2, seed=2),
        real(2, 2, seed=3),
        real(2, 3, seed=4),
    ),
    bug="What backward needs is kept on ctx, past the check of the versions",
    trigger="a weight that is changed in place before backward, which must raise",
)
