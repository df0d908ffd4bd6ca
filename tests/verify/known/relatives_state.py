"""Relatives of reported bugs: state, approximations, overflow; and the pairs of all relatives."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.known import rand, register
from tests.verify.known.losses import MeanSquare
from tests.verify.known.relatives import (
    Broadcast,
    BroadcastFirstRow,
    BroadcastFreezes,
    Drop,
    DropNewMask,
    DropReseeds,
    DropUnscaled,
    Gather,
    GatherOverwrites,
    MaskedSoftmax,
    MaskedSoftmaxNaN,
    Scan,
    ScanStep,
    Square,
    SquareOverflow,
    table,
)


class Numpy(Function):
    """sin through numpy."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.from_numpy(np.cos(x.detach().numpy()))


class NumpyAlias(Numpy):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = x.detach().numpy()
        return torch.from_numpy(np.sin(ctx.kept))

    @staticmethod
    def backward(ctx, g):
        return g * torch.from_numpy(np.cos(ctx.kept))


class Cached(Function):
    """exp, with a cache per shape that holds the wrong call's output."""

    cache: dict = {}  # noqa: RUF012  # the bug

    @staticmethod
    def forward(ctx, x):
        Cached.cache[x.shape] = y = x.exp()
        ctx.shape = x.shape
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return g * Cached.cache[ctx.shape]


class Exp(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class ExpScalesSaved(Exp):
    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return y.detach().mul_(g)


class MeanConstant(MeanSquare):
    """Divides by the sample's own size, written into the kernel."""

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        gx = g * 2 * (x - y) / 12
        return gx, -gx


class Gelu(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (torch.special.ndtr(x) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi))


class GeluTanh(Gelu):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(F.gelu(leaf, approximate="tanh"), leaf, g)[0]


class LogSumExp(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.logsumexp(-1)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g[..., None] * x.softmax(-1)


class LogSumExpOverflow(LogSumExp):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g[..., None] * x.exp() / x.exp().sum(-1, keepdim=True)


T = rand((3, 4))
for _name, _wrong, _right, _make, _bug in [
    ("masked_softmax_nan", MaskedSoftmaxNaN, MaskedSoftmax, T, "0 · log 0 at a masked element"),
    (
        "scan_time_step",
        ScanStep,
        Scan,
        rand((5, 3), ()),
        "this time step's state instead of the last",
    ),
    ("gather_overwrites", GatherOverwrites, Gather, table, "a row used twice gets one gradient"),
    ("fp16_overflow", SquareOverflow, Square, T, "an intermediate beyond float16's range"),
    ("dropout_unscaled", DropUnscaled, Drop, T, "backward without 1 / (1 - p)"),
    ("dropout_new_mask", DropNewMask, Drop, T, "backward draws another mask"),
    ("dropout_reseeds", DropReseeds, Drop, T, "backward reseeds the global generator"),
    (
        "broadcast_first_row",
        BroadcastFirstRow,
        Broadcast,
        rand((4, 3), (3,)),
        "gradient of the first row only",
    ),
    (
        "broadcast_freezes",
        BroadcastFreezes,
        Broadcast,
        rand((4, 3), (3,)),
        "no weight gradient where x is frozen",
    ),
    ("numpy_alias", NumpyAlias, Numpy, T, "a numpy view of the input is kept: no version check"),
    ("cache_per_shape", Cached, Exp, T, "the last output of that shape serves all"),
    ("saved_scaled", ExpScalesSaved, Exp, T, "the saved output is scaled in place"),
    (
        "constant_count",
        MeanConstant,
        MeanSquare,
        rand((3, 4), (3, 4)),
        "the count is the sample's, a constant",
    ),
    ("gelu_tanh", GeluTanh, Gelu, T, "backward of the tanh approximation"),
    (
        "logsumexp_overflow",
        LogSumExpOverflow,
        LogSumExp,
        T,
        "exp overflows in backward, not in forward",
    ),
]:
    register(_name, "relative", _wrong.apply, _right.apply, _make, bug=_bug, trigger="")
