"""Eleventh set: needs_input_grad, transforms, state, aliasing, unused outputs."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen.eleventh import add, need_dim, randn


# linear with frozen input
class Linear(Function):
    @staticmethod
    def forward(ctx, x, w, b):
        need_dim(x, 2)
        ctx.save_for_backward(x, w)
        return x @ w.t() + b

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        dx = g @ w if ctx.needs_input_grad[0] else None
        dw = g.t() @ x if ctx.needs_input_grad[1] else None
        return dx, dw, g.sum(0) if ctx.needs_input_grad[2] else None


class LinearBad(Linear):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = g @ w
            dw = g.t() @ x
        if ctx.needs_input_grad[2]:
            db = g.sum(0)
        return dx, dw, db


add(
    "linear_frozen_input_11",
    lambda x, w, b: LinearBad.apply(x, w, b),
    lambda x, w, b: Linear.apply(x, w, b),
    lambda: (randn(3, 4, seed=501), randn(2, 4, seed=502), randn(2, seed=503)),
    "The weight's gradient is made only if the input needs one; right when everything "
    "requires grad, missing (None, the weight never trains) when x is plain data, as in a "
    "first layer.",
    "own (cf. https://github.com/pytorch/ao/pull/4817)",
)


# per-channel scale with vmap rules
class ScaleBwd(Function):
    @staticmethod
    def forward(g, x, w):
        return g * w, (g * x).sum_to_size(w.shape) if w.dim() == g.dim() else (g * x).sum(
            tuple(range(g.dim() - 1))
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, a, b):
        g, x, w = ctx.saved_tensors
        dw = a * g
        dw = dw.sum_to_size(w.shape) if w.dim() == g.dim() else dw.sum(tuple(range(g.dim() - 1)))
        return a * w + b * x, g * b, dw

    @staticmethod
    def _front(info, d, t):
        return t.movedim(d, 0) if d is not None else t.expand(info.batch_size, *t.shape)

    @staticmethod
    def vmap(info, in_dims, g, x, w):
        g, x, w = (ScaleBwd._front(info, d, t) for d, t in zip(in_dims, (g, x, w), strict=False))
        n = g.dim() - w.dim()
        dx, dw = ScaleBwd.apply(g, x, w.reshape(w.shape[0], *[1] * n, *w.shape[1:]))
        return (dx, dw.reshape(w.shape)), (0, 0)


class ScaleBwdBad(ScaleBwd):
    @staticmethod
    def vmap(info, in_dims, g, x, w):
        if in_dims[2] is None and w.dim() == 1:  # a shared weight: sum over the batch as well
            g, x = (ScaleBwd._front(info, d, t) for d, t in zip(in_dims, (g, x), strict=False))
            return ScaleBwdBad.apply(g, x, w), (0, None)
        return ScaleBwd.vmap(info, in_dims, g, x, w)


class Scale(Function):
    BWD = ScaleBwd

    @staticmethod
    def forward(x, w):
        return x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return ScaleBwd.apply(g, x, w)

    @classmethod
    def _vmap(cls, info, in_dims, x, w):
        x, w = (
            ScaleBwd._front(info, d, t) if d is not None or t is x else t
            for d, t in zip(in_dims, (x, w), strict=False)
        )
        if in_dims[1] is not None:
            n = x.dim() - w.dim()
            w = w.reshape(w.shape[0], *[1] * n, *w.shape[1:])
        return cls.apply(x, w), 0

    @staticmethod
    def vmap(info, in_dims, x, w):
        return Scale._vmap(info, in_dims, x, w)


class ScaleBad(Scale):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return ScaleBwdBad.apply(g, x, w)

    @staticmethod
    def vmap(info, in_dims, x, w):
        return ScaleBad._vmap(info, in_dims, x, w)


add(
    "per_sample_scale_vmap_11",
    lambda x, w: ScaleBad.apply(x, w),
    lambda x, w: Scale.apply(x, w),
    lambda: (randn(3, 4, seed=504), randn(4, seed=505)),
    "The vmap rule of the backward sums a shared weight's gradient over the vmapped batch; "
    "plain backward is right, per-sample gradients by torch.func.vmap(grad) (and batched "
    "grad_outputs) all equal their sum.",
    "own",
)


# gain with a forward-mode rule
class ExpGain(Function):
    """x (N,C) * exp(s) (C,)"""

    @staticmethod
    def forward(ctx, x, s):
        need_dim(x, 2)
        ctx.save_for_backward(x, s)
        ctx.save_for_forward(x, s)
        return x * s.exp()

    @staticmethod
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        e = s.exp()
        return g * e, (g * x * e).sum(0)

    @staticmethod
    def jvp(ctx, tx, ts, *_):
        x, s = ctx.saved_tensors
        e, out = s.exp(), 0
        if tx is not None:
            out = out + tx * e
        if ts is not None:
            out = out + x * e * ts
        return out


class ExpGainBad(ExpGain):
    @staticmethod
    def jvp(ctx, tx, ts, *_):
        x, s = ctx.saved_tensors
        out = 0
        if tx is not None:
            out = out + tx * s.exp()
        if ts is not None:
            out = out + x * ts
        return out


add(
    "exp_gain_forward_mode_11",
    lambda x, s: ExpGainBad.apply(x, s),
    lambda x, s: ExpGain.apply(x, s),
    lambda: (randn(3, 2, seed=506), randn(2, seed=507)),
    "The forward-mode rule differentiates the gain as if it were linear (exp(s) missing in "
    "its tangent); reverse mode is right, forward-mode AD (jvp, jacfwd, dual numbers) is "
    "wrong for s other than 0.",
    "own",
)


# mish with a shared workspace
class Mish(Function):
    @staticmethod
    def forward(ctx, x):
        t = torch.tanh(torch.nn.functional.softplus(x))
        ctx.save_for_backward(x, t)
        return x * t

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, t = ctx.saved_tensors
        return g * (t + x * (1 - t * t) * torch.sigmoid(x))


_WORKSPACE = {}


class MishBad(Mish):
    @staticmethod
    def forward(ctx, x):
        key = (tuple(x.shape), x.dtype)
        if key not in _WORKSPACE:
            _WORKSPACE[key] = torch.empty(x.shape, dtype=x.dtype)
        t = _WORKSPACE[key]
        torch.tanh(torch.nn.functional.softplus(x.detach()), out=t)
        ctx.x, ctx.t = x.detach(), t
        return x * t

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, t = ctx.x, ctx.t
        return g * (t + x * (1 - t * t) * torch.sigmoid(x))


add(
    "mish_workspace_11",
    lambda x: MishBad.apply(x),
    lambda x: Mish.apply(x),
    lambda: (randn(3, 4, seed=508),),
    "The activation kept for backward lives in a workspace shared by all calls of one shape; "
    "right for forward-backward pairs, wrong when a second call of the same shape comes "
    "before the first one's backward (two layers, two branches).",
    "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2034",
)


# sigmoid that keeps an alias of its output
class Sigmoid(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        s = torch.sigmoid(ctx.saved_tensors[0])
        return g * s * (1 - s)


class SigmoidBad(Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.sigmoid(x)
        ctx.y = y.detach()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.y * (1 - ctx.y)


add(
    "sigmoid_output_alias_11",
    lambda x: SigmoidBad.apply(x),
    lambda x: Sigmoid.apply(x),
    lambda: (randn(3, 4, seed=509),),
    "Backward reads a plain reference to the output, outside save_for_backward; when the "
    "caller changes the output in place (y.mul_(2), y.clamp_()) no error is raised and the "
    "gradient is made from the changed values.",
    "own (cf. https://github.com/pytorch/pytorch/issues/197887)",
)


# mean and variance in one pass
class MeanVar(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        m = x.mean(0)
        return m, (x - m).square().mean(0)

    @staticmethod
    def backward(ctx, gm, gv):
        (x,) = ctx.saved_tensors
        if gm is None and gv is None:
            return None
        out = torch.zeros_like(x)
        if gm is not None:
            out = out + gm / x.shape[0]
        if gv is not None:
            out = out + 2 * (x - x.mean(0)) * gv / x.shape[0]
        return out


class MeanVarBad(MeanVar):
    @staticmethod
    def backward(ctx, gm, gv):
        (x,) = ctx.saved_tensors
        if gm is None:
            return None
        out = gm.expand_as(x) / x.shape[0]
        if gv is not None:
            out = out + 2 * (x - x.mean(0)) * gv / x.shape[0]
        return out


add(
    "mean_var_unused_11",
    lambda x: MeanVarBad.apply(x),
    lambda x: MeanVar.apply(x),
    lambda: (randn(4, 3, seed=510),),
    "With unmaterialised gradients backward returns nothing as soon as the mean's gradient is "
    "None; right when both outputs are used, wrong (no gradient at all) for a loss on the "
    "variance alone.",
    "own",
)
