"""Elementwise functions: sign, factor, grad_output, layouts, state, transforms."""

import math

import torch
from torch.autograd import Function

from tests.verify.known import raw


class Pointwise(Function):
    """Base of elementwise functions."""

    generate_vmap_rule = True

    @classmethod
    def fn(cls, x):
        return cls.apply(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])


def dtanh(x):
    return (1 - x.tanh() ** 2).conj()


class Tanh(Pointwise):
    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * dtanh(x)

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * dtanh(x).conj()


class TanhSign(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return -g * dtanh(x)


class TanhFactor(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * dtanh(x) * 2


class TanhNoUpstream(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return dtanh(x) * torch.ones_like(g)


class TanhOneElement(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        gx = g * dtanh(x)
        gx = gx.clone()
        gx.view(-1)[-1:] *= 1.01
        return gx


class TanhClamp(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.clamp(-1, 1) * dtanh(x)


class TanhAbs(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.abs() * dtanh(x)


class TanhRawGrad(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return raw(g, g.numel()).view(g.shape) * dtanh(x)


class TanhInnerStride(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if g.dim() and g.stride(-1) != 1:
            g = g.contiguous()
        return raw(g, g.numel()).view(g.shape) * dtanh(x)


class TanhStrideZero(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        expanded = g.numel() > 1 and 0 in g.stride()
        g = raw(g, g.numel()).view(g.shape) if expanded else g
        return g * dtanh(x)


class TanhRawInput(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - raw(x, x.numel()).view(x.shape).tanh() ** 2)


class TanhEatsGrad(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.mul_(dtanh(x))


class TanhNoise(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * dtanh(x) * (1 + 1e-6 * torch.rand_like(x))


class TanhJvp(Tanh):
    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * (1 - x.tanh())


class TanhDetached(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.detach().tanh() ** 2)


class TanhHalf(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (g.half() * (1 - x.half().tanh() ** 2)).to(g.dtype)


class TanhFloatGrad(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.float() * (1 - x.float().tanh() ** 2)


class TanhWrongDevice(Tanh):
    @staticmethod
    def backward(ctx, g):
        return torch.empty_like(g, device="meta")


class TanhCompilePath(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        d = dtanh(x)
        return g * d * (0.5 if torch.compiler.is_compiling() else 1.0)


class TanhGraphBreak(Tanh):
    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        if not math.isfinite(float(x.detach().sum())):
            raise ValueError("non-finite input")
        return x.tanh()


class TanhEmpty(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        scale = x.abs().max()
        return g * (1 - (x / scale * scale).tanh() ** 2)


class TanhVmap(Tanh):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info, in_dims, x):
        return TanhVmap.apply(x), 0  # right only for in_dims == 0


class TanhStale(Tanh):
    last = None

    @staticmethod
    def setup_context(ctx, inputs, output):
        TanhStale.last = inputs[0]
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return g * (1 - TanhStale.last.tanh() ** 2)


class TanhCtxOutput(Tanh):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.y = output
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.y**2)


class TanhLeak(Tanh):
    kept: list = []  # noqa: RUF012  # the bug

    @staticmethod
    def setup_context(ctx, inputs, output):
        TanhLeak.kept.append(inputs[0].detach().clone())
        ctx.i = len(TanhLeak.kept) - 1
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])


class TanhDirty(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.detach().tanh_()  # writes over the caller's x without mark_dirty
        ctx.save_for_backward(x)
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y**2)


class TanhNoConj(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)
