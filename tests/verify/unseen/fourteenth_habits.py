"""First drafts with a habit's mistake."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.fourteenth import add, require


class Excite(Function):
    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w, b)
        return x * (x.mean((2, 3)) @ w.mT + b).sigmoid()[..., None, None]

    @staticmethod
    def gradients(ctx, g, count):
        x, w, b = ctx.saved_tensors
        mean = x.mean((2, 3))
        s = (mean @ w.mT + b).sigmoid()
        d = (g * x).sum((2, 3)) * s * (1 - s)
        back = (d @ w / count(*x.shape[2:]))[..., None, None]
        return g * s[..., None, None] + back, d.mT @ mean, d.sum(0)

    @staticmethod
    def backward(ctx, g):
        return Excite.gradients(ctx, g, lambda height, width: height * width)


class ExciteSquare(Excite):
    @staticmethod
    def backward(ctx, g):
        return Excite.gradients(ctx, g, lambda height, width: width * width)


def _excite(function):
    def excite(x, w, b):
        """x (N, C, H, W), H and W > 0, times the sigmoid of w (C, C) times its means over H and W, plus b (C,)."""
        require(x.dim() == 4 and x.shape[2] * x.shape[3] > 0, "x must be (N, C, H, W), H and W > 0")
        require(
            w.shape == (x.shape[1], x.shape[1]) and b.shape == x.shape[1:2], "w: (C, C), b: (C,)"
        )
        return function.apply(x, w, b)

    return excite


add(
    "excite_square",
    _excite,
    ExciteSquare,
    Excite,
    lambda: (real(2, 3, 4, 4), real(3, 3, seed=1), real(3, seed=2)),
    bug="the mean's gradient is divided by W W",
    trigger="images that are not square",
)


class Serf(Function):
    @staticmethod
    def slope(x):
        soft = torch.nn.functional.softplus(x)
        return soft.erf() + x * x.sigmoid() * (-soft.square()).exp() * 2 / math.sqrt(math.pi)

    @staticmethod
    def value(x):
        return x * torch.nn.functional.softplus(x).erf()

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return Serf.value(x)

    @staticmethod
    def backward(ctx, g):
        return g * Serf.slope(ctx.saved_tensors[0])


class SerfKept(Serf):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(Serf.slope(x))
        return Serf.value(x)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


def _serf(function):
    def serf(x):
        """x erf(log(1 + eˣ))."""
        return function.apply(x)

    return serf


add(
    "serf_kept",
    _serf,
    SerfKept,
    Serf,
    lambda: (real(3, 4),),
    bug="the slope is computed in forward and kept: a constant for a second derivative",
    trigger="a second derivative",
)


class LowRank(Function):
    @staticmethod
    def forward(ctx, x, y, u, v):
        ctx.save_for_backward(x, y, u, v)
        return (x @ u) * (y @ v)

    @staticmethod
    def gradients(ctx, g, needs):
        x, y, u, v = ctx.saved_tensors
        left, right = g * (y @ v), g * (x @ u)
        return (
            left @ u.mT if needs[0] else None,
            right @ v.mT if needs[1] else None,
            x.mT @ left if needs[2] else None,
            y.mT @ right if needs[3] else None,
        )

    @staticmethod
    def backward(ctx, g):
        return LowRank.gradients(ctx, g, ctx.needs_input_grad)


class LowRankFlags(LowRank):
    @staticmethod
    def backward(ctx, g):
        x, y, u, _ = ctx.needs_input_grad
        return LowRank.gradients(ctx, g, (x, y, u, u))


def _low_rank(function):
    def low_rank(x, y, u, v):
        """Low-rank bilinear pooling (x u) (y v) (N, R) of x (N, D), y (N, E), u (D, R) and v (E, R)."""
        require(x.dim() == y.dim() == u.dim() == v.dim() == 2, "all must be matrices")
        require(
            len(x) == len(y) and u.shape[1] == v.shape[1], "x and y: N rows; u and v: R columns"
        )
        return function.apply(x, y, u, v)

    return low_rank


add(
    "low_rank_flags",
    _low_rank,
    LowRankFlags,
    LowRank,
    lambda: (real(3, 2), real(3, 4, seed=1), real(2, 5, seed=2), real(4, 5, seed=3)),
    bug="v's gradient hangs on u's flag",
    trigger="a frozen u",
)


class AddKind(Function):
    @staticmethod
    def forward(ctx, x, table, kind):
        ctx.save_for_backward(kind)
        ctx.size = len(table)
        return x + table[kind]

    @staticmethod
    def gradients(ctx, g, rows):
        (kind,) = ctx.saved_tensors
        total = g.new_zeros(ctx.size, g.shape[-1])
        return g, total.index_add(0, kind.reshape(-1), rows), None

    @staticmethod
    def backward(ctx, g):
        return AddKind.gradients(ctx, g, g.reshape(-1, g.shape[-1]))


class AddKindView(AddKind):
    @staticmethod
    def backward(ctx, g):
        return AddKind.gradients(ctx, g, g.view(-1, g.shape[-1]))


def _add_kind(function):
    def add_kind(x, table, kind):
        """x (N, T, D), D > 0, plus the rows of a table (K, D) of the kinds (N, T), integers below K."""
        require(
            x.dim() == 3 and kind.shape == x.shape[:2] and x.shape[2] > 0, "x: (N, T, D), D > 0"
        )
        require(table.dim() == 2 and table.shape[1] == x.shape[2], "table must be (K, D)")
        return function.apply(x, table, kind)

    return add_kind


add(
    "add_kind_view",
    _add_kind,
    AddKindView,
    AddKind,
    lambda: (real(2, 3, 4), real(5, 4, seed=1), whole(5, 2, 3)),
    bug="grad_output.view raises where its rows do not lie one after the other",
    trigger="a transposed grad_output",
)


class DistanceBias(Function):
    @staticmethod
    def places(size, device):
        at = torch.arange(size, device=device)
        return (at.unsqueeze(1) - at + size - 1).reshape(-1)

    @staticmethod
    def forward(ctx, scores, table):
        size = scores.shape[-1]
        return scores + table[:, DistanceBias.places(size, table.device)].view(-1, size, size)

    @staticmethod
    def places_of(g):
        return DistanceBias.places(g.shape[-1], g.device)

    @staticmethod
    def backward(ctx, g):
        total = g.new_zeros(g.shape[0], 2 * g.shape[-1] - 1)
        return g, total.index_add(1, DistanceBias.places_of(g), g.reshape(len(g), -1))


class DistanceBiasSingle(DistanceBias):
    @staticmethod
    def backward(ctx, g):
        total = torch.zeros(g.shape[0], 2 * g.shape[-1] - 1, device=g.device)
        total.index_add_(1, DistanceBias.places_of(g), g.reshape(len(g), -1).float())
        return g, total.to(g.dtype)


def _distance_bias(function):
    def distance_bias(scores, table):
        """Scores (H, T, T), H and T > 0, plus each head's bias for a distance, of a table (H, 2 T - 1)."""
        require(
            scores.dim() == 3 and scores.shape[1] == scores.shape[2], "scores must be (H, T, T)"
        )
        require(scores.numel() > 0, "H and T must not be 0")
        good = table.shape == (scores.shape[0], 2 * scores.shape[2] - 1)
        require(good, "table must be (H, 2 T - 1)")
        return function.apply(scores, table)

    return distance_bias


add(
    "distance_bias_single",
    _distance_bias,
    DistanceBiasSingle,
    DistanceBias,
    lambda: (real(2, 3, 3), real(2, 5, seed=1)),
    bug="the table's gradient is summed up in torch.zeros, which is float32",
    trigger="float64, by 1e-8 or so",
)
