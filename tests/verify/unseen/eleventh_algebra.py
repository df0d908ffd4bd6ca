"""Eleventh set: graphs, segments, distances, projections, matrix functions, implicit layers."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen.eleventh import add, leaf, randn


# scatter mean (custom op)
def _scatter_mean_fwd(src, index, dim_size):
    out = torch.zeros(dim_size, src.shape[1], dtype=src.dtype).index_add(0, index, src)
    return out / torch.bincount(index, minlength=dim_size).clamp(min=1)[:, None].to(src.dtype)


@torch.library.custom_op("eleventh::scatter_mean", mutates_args=())
def _scatter_mean(src: torch.Tensor, index: torch.Tensor, dim_size: int) -> torch.Tensor:
    return _scatter_mean_fwd(src, index, dim_size)


@torch.library.custom_op("eleventh::scatter_mean_w", mutates_args=())
def _scatter_mean_w(src: torch.Tensor, index: torch.Tensor, dim_size: int) -> torch.Tensor:
    return _scatter_mean_fwd(src, index, dim_size)


def _sm_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.n = inputs[2]


def _sm_bwd(ctx, g):
    (index,) = ctx.saved_tensors
    count = torch.bincount(index, minlength=ctx.n).clamp(min=1).to(g.dtype)
    return (g / count[:, None])[index], None, None


def _sm_bwd_w(ctx, g):
    (index,) = ctx.saved_tensors
    count = torch.bincount(index, minlength=ctx.n)
    per = g / count.clamp(min=1)[:, None].to(g.dtype)
    return per.repeat_interleave(count, 0), None, None


for _op in (_scatter_mean, _scatter_mean_w):
    _op.register_fake(lambda src, index, dim_size: src.new_empty(dim_size, src.shape[1]))
_scatter_mean.register_autograd(_sm_bwd, setup_context=_sm_setup)
_scatter_mean_w.register_autograd(_sm_bwd_w, setup_context=_sm_setup)

add(
    "scatter_mean_11",
    lambda s, i, n: _scatter_mean_w(s, i, n),
    lambda s, i, n: _scatter_mean(s, i, n),
    lambda: (randn(6, 2, seed=301), torch.tensor([0, 0, 1, 3, 3, 3]), 4),
    "Segment gradients are repeated count times in segment order, which assumes a sorted "
    "index; right for sorted (empty segments included), wrong for an unsorted one such as "
    "[2,0,1,0].",
    "own",
)


# scatter max, empty segments
class ScatterMax(Function):
    """Segment maximum of src (N,); empty segments give 0 and argument N."""

    @staticmethod
    def forward(ctx, src, index, n):
        out = torch.full((n,), -math.inf, dtype=src.dtype).scatter_reduce(0, index, src, "amax")
        arg = torch.full((n,), src.shape[0])
        for e in range(src.shape[0] - 1, -1, -1):
            if src[e] == out[index[e]]:
                arg[index[e]] = e
        ctx.save_for_backward(arg)
        ctx.n = src.shape[0]
        ctx.mark_non_differentiable(arg)
        return torch.where(arg == src.shape[0], torch.zeros_like(out), out), arg

    @staticmethod
    def backward(ctx, g, _):
        (arg,) = ctx.saved_tensors
        return torch.zeros(ctx.n + 1, dtype=g.dtype).index_add(0, arg, g)[:-1], None, None


class ScatterMaxBad(ScatterMax):
    @staticmethod
    def backward(ctx, g, _):
        (arg,) = ctx.saved_tensors
        return (
            torch.zeros(ctx.n, dtype=g.dtype).index_add(0, arg.clamp(max=ctx.n - 1), g),
            None,
            None,
        )


add(
    "scatter_max_empty_11",
    lambda s, i, n: ScatterMaxBad.apply(s, i, n)[0],
    lambda s, i, n: ScatterMax.apply(s, i, n)[0],
    lambda: (randn(6, seed=302), torch.tensor([2, 0, 1, 0, 2, 1]), 3),
    "An empty segment's argument N is clamped to N-1, so its gradient lands on the last "
    "element; right while every segment has a member, wrong with dim_size larger than that "
    "(isolated nodes).",
    "own (cf. https://github.com/rusty1s/pytorch_scatter/issues/373)",
)


# edge softmax
def _seg_sum(v, dst, n):
    return torch.zeros(n, v.shape[1], dtype=v.dtype).index_add(0, dst, v)


class EdgeSoftmax(Function):
    @staticmethod
    def _fwd(s, dst, n):
        m = torch.full((n, s.shape[1]), -math.inf, dtype=s.dtype).scatter_reduce(
            0, dst[:, None].expand_as(s), s, "amax"
        )
        e = torch.exp(s - m[dst])
        return e, _seg_sum(e, dst, n)

    @staticmethod
    def forward(ctx, s, dst, n):
        e, z = EdgeSoftmax._fwd(s, dst, n)
        a = e / z[dst]
        ctx.save_for_backward(a, dst)
        ctx.n = n
        return a

    @staticmethod
    def backward(ctx, g):
        a, dst = ctx.saved_tensors
        ga = g * a
        return ga - a * _seg_sum(ga, dst, ctx.n)[dst], None, None


class EdgeSoftmaxBad(EdgeSoftmax):
    @staticmethod
    def forward(ctx, s, dst, n):
        e, z = EdgeSoftmax._fwd(s, dst, n)
        ctx.save_for_backward(e, z, dst)
        ctx.n = n
        return e / z[dst]

    @staticmethod
    def backward(ctx, g):
        e, z, dst = ctx.saved_tensors
        a = e / z[dst]
        ga = g * a
        return ga - a * _seg_sum(ga, dst, ctx.n)[dst], None, None


add(
    "edge_softmax_second_11",
    lambda s, d, n: EdgeSoftmaxBad.apply(s, d, n),
    lambda s, d, n: EdgeSoftmax.apply(s, d, n),
    lambda: (randn(5, 2, seed=303), torch.tensor([0, 1, 0, 2, 1]), 3),
    "Intermediates (exp and segment sums) are saved instead of input or output and backward "
    "is not marked once_differentiable, so second derivatives silently treat the attention "
    "weights as constants.",
    "https://github.com/dmlc/dgl/pull/1172",
)


# sparse-dense product
class SpMM(Function):
    @staticmethod
    def forward(ctx, row, col, val, x, n):
        ctx.save_for_backward(row, col, val, x)
        return torch.zeros(n, x.shape[1], dtype=x.dtype).index_add(0, row, val[:, None] * x[col])

    @staticmethod
    def backward(ctx, g):
        row, col, val, x = ctx.saved_tensors
        dx = torch.zeros_like(x).index_add(0, col, val[:, None] * g[row])
        return None, None, (g[row] * x[col]).sum(1), dx, None


class SpMMBad(SpMM):
    @staticmethod
    def backward(ctx, g):
        row, col, val, x = ctx.saved_tensors
        dx = torch.zeros_like(x).index_add(0, row, val[:, None] * g[col])
        return None, None, (g[row] * x[col]).sum(1), dx, None


def _spmm_inputs():
    row = torch.tensor([0, 1, 1, 2, 2, 0])
    col = torch.tensor([1, 0, 2, 1, 0, 2])
    return row, col, leaf([0.5, 0.5, 1.5, 1.5, 0.7, 0.7]), randn(3, 2, seed=304), 3


add(
    "spmm_directed_11",
    lambda r, c, v, x, n: SpMMBad.apply(r, c, v, x, n),
    lambda r, c, v, x, n: SpMM.apply(r, c, v, x, n),
    _spmm_inputs,
    "The features' gradient multiplies by A instead of its transpose; the same for an "
    "undirected graph with symmetric weights, wrong for a directed one.",
    "own (cf. https://github.com/pyg-team/pytorch_geometric/pull/7428)",
)


# cdist
class CDist(Function):
    @staticmethod
    def forward(ctx, a, b, p):
        if p <= 0:
            raise ValueError("p must be positive")
        d = torch.linalg.vector_norm(a[:, None] - b[None], ord=p, dim=-1)
        ctx.save_for_backward(a, b, d)
        ctx.p = p
        return d

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, b, d = ctx.saved_tensors
        p, diff = ctx.p, a[:, None] - b[None]
        d = d[..., None]
        if p == 1:
            u = diff.sign()
        elif p == math.inf:
            hit = diff.abs() == d
            u = diff.sign() * hit / hit.sum(-1, keepdim=True)
        else:
            safe = torch.where(d == 0, torch.ones_like(d), d)
            u = torch.where(
                diff == 0, torch.zeros_like(diff), diff.sign() * (diff.abs() / safe) ** (p - 1)
            )
        u = u * g[..., None]
        return u.sum(1), -u.sum(0), None


class CDistBad(CDist):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, b, d = ctx.saved_tensors
        diff = a[:, None] - b[None]
        d = d[..., None]
        u = torch.where(
            d == 0, torch.zeros_like(diff), diff / torch.where(d == 0, torch.ones_like(d), d)
        )
        u = u * g[..., None]
        return u.sum(1), -u.sum(0), None


add(
    "cdist_p_11",
    lambda a, b, p=2.0: CDistBad.apply(a, b, p),
    lambda a, b, p=2.0: CDist.apply(a, b, p),
    lambda: (randn(3, 4, seed=305), randn(2, 4, seed=306)),
    "Backward computes the Euclidean gradient whatever p is; right for p=2, wrong for p=1, 3 "
    "or inf.",
    "https://github.com/flagos-ai/FlagGems/issues/5023",
)


# cumulative product
class CumProd(Function):
    """Cumulative product along the last dim."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.cumprod(-1)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        out, left = [], torch.ones_like(x[..., 0])
        for i in range(x.shape[-1]):
            tail = torch.cat([left[..., None], x[..., i + 1 :]], -1).cumprod(-1)
            out.append((tail * g[..., i:]).sum(-1))
            left = left * x[..., i]
        return torch.stack(out, -1)


class CumProdBad(CumProd):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        w = (g * x.cumprod(-1)).flip(-1).cumsum(-1).flip(-1)
        return torch.where(
            x == 0, torch.zeros_like(x), w / torch.where(x == 0, torch.ones_like(x), x)
        )


add(
    "cumprod_zero_11",
    lambda x: CumProdBad.apply(x),
    lambda x: CumProd.apply(x),
    lambda: (randn(2, 5, seed=307),),
    "Backward divides by the input and returns 0 where the input is exactly 0; the true "
    "derivative there is the product of the other factors (any row with a zero in it, e.g. "
    "1-alpha with alpha=1).",
    "own (cf. https://github.com/pytorch/pytorch/pull/53711)",
)


# sparsemax
class Sparsemax(Function):
    """Projection of the rows (last dim) onto the simplex."""

    @staticmethod
    def forward(ctx, z):
        s, _ = z.sort(-1, descending=True)
        k = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
        cs = s.cumsum(-1)
        n = ((1 + k * s) > cs).sum(-1, keepdim=True)
        tau = (cs.gather(-1, n - 1) - 1) / n
        p = (z - tau).clamp(min=0)
        ctx.save_for_backward(p > 0)
        return p

    @staticmethod
    def backward(ctx, g):
        (on,) = ctx.saved_tensors
        on = on.to(g.dtype)
        return on * (g - (g * on).sum(-1, keepdim=True) / on.sum(-1, keepdim=True))


class SparsemaxBad(Sparsemax):
    @staticmethod
    def backward(ctx, g):
        (on,) = ctx.saved_tensors
        on = on.to(g.dtype)
        return on * (g - (g * on).mean(-1, keepdim=True))


add(
    "sparsemax_11",
    lambda z: SparsemaxBad.apply(z),
    lambda z: Sparsemax.apply(z),
    lambda: (randn(3, 4, seed=308, scale=0.08),),
    "The gradient's mean over the support divides by the row length instead of the support's "
    "size; right while all entries are in the support (small scores), wrong once some are cut "
    "to 0.",
    "own",
)


# logarithm of an SPD matrix
class SpdLog(Function):
    """Matrix logarithm of the symmetric part of x, which must be positive definite."""

    @staticmethod
    def forward(ctx, x):
        lam, u = torch.linalg.eigh((x + x.transpose(-1, -2)) / 2)
        if (lam <= 0).any():
            raise ValueError("not positive definite")
        ctx.save_for_backward(lam, u)
        return (u * lam.log().unsqueeze(-2)) @ u.transpose(-1, -2)

    @staticmethod
    def _bwd(ctx, g, equal_to_zero):
        lam, u = ctx.saved_tensors
        a, b = lam.unsqueeze(-1), lam.unsqueeze(-2)
        x = (a - b) / (a + b)  # (log a - log b)/(a - b) = 2 atanh(x) / (x (a+b))
        k = 2 / (a + b) * torch.where(x == 0, 1.0, torch.atanh(x) / torch.where(x == 0, 1.0, x))
        if equal_to_zero:
            k = torch.where(x.abs() < 1e-9, torch.diag_embed(1 / lam), k)
        m = u.transpose(-1, -2) @ ((g + g.transpose(-1, -2)) / 2) @ u
        return u @ (k * m) @ u.transpose(-1, -2)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return SpdLog._bwd(ctx, g, False)


class SpdLogBad(SpdLog):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return SpdLog._bwd(ctx, g, True)


def _spd_inputs():
    a = randn(3, 3, seed=309, grad=False)
    return (
        (
            a @ a.t() + torch.diag(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
        ).requires_grad_(),
    )


add(
    "spd_logm_11",
    lambda x: SpdLogBad.apply(x),
    lambda x: SpdLog.apply(x),
    _spd_inputs,
    "Divided differences of equal eigenvalues are set to 0 off the diagonal instead of "
    "1/lambda; right for distinct eigenvalues, wrong at repeated ones such as 2*identity (the "
    "usual initial covariance).",
    "own",
)


# equality-constrained QP
class EqQP(Function):
    """argmin 1/2 x'Qx + q'x with Ax=b; the symmetric part of Q counts."""

    @staticmethod
    def _kkt(Q, A):
        m = A.shape[0]
        return torch.cat(
            [torch.cat([(Q + Q.t()) / 2, A.t()], 1), torch.cat([A, A.new_zeros(m, m)], 1)], 0
        )

    @staticmethod
    def forward(ctx, Q, q, A, b):
        ctx.save_for_backward(Q, q, A, b)
        return torch.linalg.solve(EqQP._kkt(Q, A), torch.cat([-q, b]))[: q.shape[0]].clone()

    @staticmethod
    def _parts(ctx, g):
        Q, q, A, b = ctx.saved_tensors
        n, k = q.shape[0], EqQP._kkt(Q, A)
        s = torch.linalg.solve(k, torch.cat([-q, b]))
        d = torch.linalg.solve(k, torch.cat([g, torch.zeros_like(b)]))
        return s[:n], s[n:], d[:n], d[n:]

    @staticmethod
    def backward(ctx, g):
        x, nu, dx, dn = EqQP._parts(ctx, g)
        dQ = -(torch.outer(dx, x) + torch.outer(x, dx)) / 2
        return dQ, -dx, -(torch.outer(dn, x) + torch.outer(nu, dx)), dn


class EqQPBad(EqQP):
    @staticmethod
    def backward(ctx, g):
        x, _nu, dx, dn = EqQP._parts(ctx, g)
        dQ = -(torch.outer(dx, x) + torch.outer(x, dx)) / 2
        return dQ, -dx, -torch.outer(dn, x), dn


def _qp_inputs():
    a = randn(4, 4, seed=310, grad=False)
    return (
        (a @ a.t() + torch.eye(4, dtype=torch.float64)).requires_grad_(),
        randn(4, seed=311),
        randn(2, 4, seed=312),
        randn(2, seed=313),
    )


add(
    "eqqp_layer_11",
    lambda *a: EqQPBad.apply(*a),
    lambda *a: EqQP.apply(*a),
    _qp_inputs,
    "The constraint matrix's gradient has only the primal term; the one with the multipliers "
    "(A enters stationarity too) is missing; shows at the sample.",
    "own",
)


# deep equilibrium layer
class Deq(Function):
    """z = tanh(W z + x), solved by iteration; W must be a contraction."""

    @staticmethod
    def forward(ctx, W, x):
        z = torch.zeros_like(x)
        for _ in range(300):
            new = torch.tanh(W @ z + x)
            done = bool((new - z).abs().max() <= 4 * torch.finfo(x.dtype).eps)
            z = new
            if done:
                break
        else:
            raise ValueError("the iteration does not converge")
        ctx.save_for_backward(W, z)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        W, z = ctx.saved_tensors
        s = 1 - z * z
        u = s * torch.linalg.solve((torch.eye(len(z), dtype=z.dtype) - s[:, None] * W).t(), g)
        return torch.outer(u, z), u


class DeqBad(Deq):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        W, z = ctx.saved_tensors
        s = 1 - z * z
        u = s * torch.linalg.solve(torch.eye(len(z), dtype=z.dtype) - s[:, None] * W, g)
        return torch.outer(u, z), u


add(
    "deq_transpose_11",
    lambda W, x: DeqBad.apply(W, x),
    lambda W, x: Deq.apply(W, x),
    lambda: (randn(4, 4, seed=314, scale=0.2), randn(4, seed=315)),
    "The adjoint system is solved with I-J instead of its transpose; shows at the sample, "
    "right only for symmetric J.",
    "own",
)
