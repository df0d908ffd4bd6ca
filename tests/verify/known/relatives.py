"""Relatives of reported bugs: masks, scans, indexing, random numbers, broadcasting."""

import torch
from torch.autograd import Function

from tests.verify.known import rand


class MaskedSoftmax(Function):
    """Softmax over the last dimension."""

    @staticmethod
    def forward(ctx, x):
        y = x.softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return y * (g - (g * y).sum(-1, keepdim=True))


class MaskedSoftmaxNaN(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.softmax(-1)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        y = x.softmax(-1)
        return y * g - (y * y.log() * 0 + y) * (g * y).sum(-1, keepdim=True)


class Scan(Function):
    """h[t] = a h[t-1] + x[t] over the first dimension."""

    @staticmethod
    def forward(ctx, x, a):
        h, out = torch.zeros_like(x[0]), []
        for row in x:
            h = a * h + row
            out.append(h)
        y = torch.stack(out)
        ctx.save_for_backward(y, a)
        return y

    @staticmethod
    def backward(ctx, g):
        y, a = ctx.saved_tensors
        carry, gx, ga = torch.zeros_like(g[0]), [], torch.zeros_like(a, dtype=torch.float64)
        for t in reversed(range(len(g))):
            carry = g[t] + carry
            gx.append(carry)
            ga = ga + (carry * (y[t - 1] if t else 0)).sum()
            carry = a * carry
        return torch.stack(gx[::-1]), ga.to(a.dtype)


class ScanStep(Scan):
    @staticmethod
    def backward(ctx, g):
        y, _a = ctx.saved_tensors
        gx, _ = Scan.backward(ctx, g)
        return gx, (gx * y).sum()  # this step's state instead of the one before


class Gather(Function):
    """Rows of a table; the gradient of a row used twice adds up."""

    @staticmethod
    def forward(ctx, table, index):
        ctx.save_for_backward(index)
        ctx.rows = table.shape[0]
        return table[index]

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return g.new_zeros(ctx.rows, g.shape[-1]).index_add(0, index, g), None


class GatherOverwrites(Gather):
    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return g.new_zeros(ctx.rows, g.shape[-1]).index_copy(0, index, g), None


def table(dtype=torch.float64, seed=0):
    return rand((5, 3))(dtype, seed)[0], torch.tensor([0, 2, 2, 4])


class Square(Function):
    """Mean of squares over the last dimension."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (
            x.float().square().mean(-1).to(x.dtype)
            if x.dtype == torch.float16
            else x.square().mean(-1)
        )

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g[..., None] * x / x.shape[-1]


class SquareOverflow(Square):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 4096 * x * 32 * g[..., None] / (65536 * x.shape[-1])


class Drop(Function):
    """Dropout from a seed."""

    @staticmethod
    def mask(x, seed):
        return (
            torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            > 0.5
        )

    @staticmethod
    def forward(ctx, x):
        ctx.seed = int(torch.randint(2**31, ()))
        return x * Drop.mask(x, ctx.seed).to(x.dtype) * 2

    @staticmethod
    def backward(ctx, g):
        return g * Drop.mask(g, ctx.seed).to(g.dtype) * 2


class DropUnscaled(Drop):
    @staticmethod
    def backward(ctx, g):
        return g * Drop.mask(g, ctx.seed).to(g.dtype)


class DropReseeds(Drop):
    @staticmethod
    def backward(ctx, g):
        torch.manual_seed(ctx.seed)  # everybody's generator
        return g * Drop.mask(g, ctx.seed).to(g.dtype) * 2


class DropNewMask(Drop):
    @staticmethod
    def backward(ctx, g):
        return g * (torch.rand_like(g) > 0.5) * 2


class Broadcast(Function):
    """x * w with w broadcast over rows."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).reshape(-1, w.shape[-1]).sum(0)


class BroadcastFirstRow(Broadcast):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).reshape(-1, w.shape[-1])[0]


class BroadcastFreezes(Broadcast):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).reshape(-1, w.shape[-1]).sum(0) * (
            1 if ctx.needs_input_grad[0] else 0
        )
