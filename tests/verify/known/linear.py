"""Several inputs or outputs."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.known import rand, register
from tests.verify.known.elementwise_pairs import T


def linear_grads(x, w, g):
    rows, cols = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    return g @ w.conj(), rows.mT @ cols.conj(), rows.sum(0)


class Linear(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, b):
        return x @ w.mT + b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return linear_grads(x, w, g)

    @classmethod
    def fn(cls, x, w, b):
        return cls.apply(x, w, b)


class LinearBiasMean(Linear):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        gx, gw, gb = linear_grads(x, w, g)
        return gx, gw, gb / max(g.numel() // g.shape[-1], 1)


class LinearTransposed(Linear):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.mT, *linear_grads(x, w, g)[1:]


class LinearFrozen(Linear):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        gx, gw, gb = linear_grads(x, w, g)
        nx, nw, _ = ctx.needs_input_grad
        return gx if nx else None, gw if nw else None, gb if nw else None


class LinearAutocast(Linear):
    """Under autocast the output is bfloat16 but the saved tensors are float32."""

    @staticmethod
    def forward(x, w, b):
        return F.linear(x, w, b)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return linear_grads(x, w, g)


class LinearAutocastOk(LinearAutocast):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return linear_grads(x, w, g.to(x.dtype))


L = rand((4, 3), (3, 3), (3,))
register(
    "bias_mean_not_sum",
    "formula",
    LinearBiasMean.fn,
    Linear.fn,
    L,
    reference=F.linear,
    gradcheck=True,
    bug="bias gradient averages over the batch instead of summing",
    trigger="batch > 1",
)
register(
    "transposed_weight",
    "formula",
    LinearTransposed.fn,
    Linear.fn,
    L,
    reference=F.linear,
    gradcheck=True,
    bug="multiplies by the transposed square weight",
    trigger="any input",
)
register(
    "frozen_weight",
    "coverage",
    LinearFrozen.fn,
    Linear.fn,
    L,
    reference=F.linear,
    gradcheck=False,
    bug="bias gradient is tied to the weight's flag: None when only the weight is frozen",
    trigger="weight frozen, bias not",
)
register(
    "autocast_dtype",
    "precision",
    LinearAutocast.fn,
    LinearAutocastOk.fn,
    L,
    reference=F.linear,
    gradcheck=False,
    bug="backward mixes dtypes under autocast",
    trigger="torch.autocast",
)


class SinCos(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin(), x.cos()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, gs, gc):
        (x,) = ctx.saved_tensors
        return gs * x.cos().conj() - gc * x.sin().conj()

    @classmethod
    def fn(cls, x):
        return cls.apply(x)


class SinCosOverwrite(SinCos):
    @staticmethod
    def backward(ctx, gs, gc):
        (x,) = ctx.saved_tensors
        gx = gs * x.cos()
        return torch.where(gc != 0, -gc * x.sin(), gx)  # should add


class SinCosUndefined(SinCos):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0])


register(
    "multi_output_overwrite",
    "upstream",
    SinCosOverwrite.fn,
    SinCos.fn,
    T,
    gradcheck=False,
    bug="gradients of two outputs overwrite each other instead of adding",
    trigger="both outputs used together",
)
register(
    "undefined_grad",
    "upstream",
    SinCosUndefined.fn,
    SinCos.fn,
    T,
    gradcheck=True,
    bug="fails when one grad_output is None",
    trigger="one output unused",
)
