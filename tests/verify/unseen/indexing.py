"""Index operations and scans."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import pair, real


class Embed(Function):
    @staticmethod
    def forward(ctx, w, i):
        ctx.save_for_backward(i)
        ctx.rows = len(w)
        return w[i]

    @staticmethod
    def backward(ctx, g):
        (i,) = ctx.saved_tensors
        return g.new_zeros(ctx.rows, g.shape[-1]).index_add(
            0, i.reshape(-1), g.reshape(-1, g.shape[-1])
        ), None


class EmbedAssign(Embed):
    @staticmethod
    def backward(ctx, g):
        (i,) = ctx.saved_tensors
        grad = g.new_zeros(ctx.rows, g.shape[-1])
        grad[i.reshape(-1)] = g.reshape(-1, g.shape[-1])
        return grad, None


pair(
    "embedding_duplicates",
    EmbedAssign.apply,
    Embed.apply,
    lambda: (real(6, 3), torch.tensor([4, 0, 3])),
    "a row looked up twice keeps one gradient; the sample has no duplicate",
)


class TopK(Function):
    """The two largest of each row, sorted; and where they were."""

    @staticmethod
    def forward(ctx, x):
        y, i = x.topk(2, -1)
        ctx.save_for_backward(i)
        ctx.mark_non_differentiable(i)
        ctx.shape = x.shape
        return y, i

    @staticmethod
    def backward(ctx, g, _):
        (i,) = ctx.saved_tensors
        return g.new_zeros(ctx.shape).scatter(-1, i, g)


class TopKFirst(TopK):
    @staticmethod
    def backward(ctx, g, _):
        return F.pad(g, (0, ctx.shape[-1] - g.shape[-1]))


pair(
    "topk_positions",
    TopKFirst.apply,
    TopK.apply,
    lambda: (real(3, 5),),
    "the gradient goes to the first two places",
)


class Sort(Function):
    @staticmethod
    def forward(ctx, x):
        y, i = x.sort(-1)
        ctx.save_for_backward(i)
        return y

    @staticmethod
    def backward(ctx, g):
        (i,) = ctx.saved_tensors
        return torch.zeros_like(g).scatter(-1, i, g)


class SortInverse(Sort):
    @staticmethod
    def backward(ctx, g):
        (i,) = ctx.saved_tensors
        return g.gather(-1, i)


pair(
    "sort_inverse",
    SortInverse.apply,
    Sort.apply,
    lambda: (real(3, 5),),
    "the permutation instead of its inverse",
)


class ScatterMean(Function):
    """Mean of the rows of each of three groups; an empty group gives 0."""

    @staticmethod
    def forward(ctx, x, group):
        count = torch.bincount(group, minlength=3).clamp(min=1)
        ctx.save_for_backward(group, count)
        return x.new_zeros(3, x.shape[1]).index_add(0, group, x) / count[:, None]

    @staticmethod
    def backward(ctx, g):
        group, count = ctx.saved_tensors
        return (g / count[:, None])[group], None


class ScatterMeanOnce(ScatterMean):
    @staticmethod
    def backward(ctx, g):
        group, count = ctx.saved_tensors
        return g[group] / count[0], None


pair(
    "scatter_mean_count",
    ScatterMeanOnce.apply,
    ScatterMean.apply,
    lambda: (real(6, 2), torch.tensor([0, 0, 1, 1, 2, 2])),
    "every group is divided by the first one's count; the sample's groups are equal",
)


class Scan(Function):
    """h[t] = a[t] h[t-1] + x[t], h[-1] = 0."""

    @staticmethod
    def run(a, x):
        h, out = torch.zeros_like(x[0]), []
        for at, xt in zip(a, x, strict=True):
            h = at * h + xt
            out.append(h)
        return torch.stack(out)

    @staticmethod
    def forward(ctx, a, x):
        h = Scan.run(a, x)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def pull(ctx, g, steps):
        a, h = ctx.saved_tensors
        back, ga, gx = torch.zeros_like(g[0]), [], []
        for t in reversed(range(len(a))):
            last = t + 1 == len(a) or (t + 1) % steps == 0
            back = g[t] + (0 if last else a[t + 1] * back)
            gx.append(back)
            ga.append(back * (h[t - 1] if t else 0))
        return torch.stack(ga[::-1]), torch.stack(gx[::-1])

    @staticmethod
    def backward(ctx, g):
        return Scan.pull(ctx, g, 10**9)


class ScanChunks(Scan):
    @staticmethod
    def backward(ctx, g):
        return Scan.pull(ctx, g, 16)


pair(
    "scan_chunk_border",
    ScanChunks.apply,
    Scan.apply,
    lambda: (real(5, 2).detach().tanh().requires_grad_(), real(5, 2, seed=1)),
    "the state's gradient does not cross chunks of 16 steps; the sample has 5",
)


class CumProd(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.cumprod(-1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, _ = ctx.saved_tensors
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (gx,) = torch.autograd.grad(z.cumprod(-1), z, g.detach())
        return gx


class CumProdDivide(CumProd):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return (g * y).flip(-1).cumsum(-1).flip(-1) / x


pair(
    "cumprod_zero",
    CumProdDivide.apply,
    lambda x: x.cumprod(-1),
    lambda: (real(3, 4),),
    "divides by x: NaN where an element is 0",
)
