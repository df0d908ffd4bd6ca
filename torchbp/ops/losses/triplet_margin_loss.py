r"""Triplet margin: ℓ = max(0, m + d(a, p) - d(a, n)), d(u, v) = ‖u - v + ε‖_p over the last dimension, then reduced.

With "swap", d(a, n) is replaced by min(d(a, n), d(p, n)).

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"), δ = [ℓ's argument ≥ 0]:
    D(v) = ∂‖v‖_p / ∂v = sign(v) (|v| / ‖v‖)^(p-1); for p = 2, v / ‖v‖                        (1)
    σ = share of d(p, n) in the minimum: 1, 0, or 1/2 where equal; 0 without swap
    G_ap = s δ D(a - p + ε),  G_an = -s δ (1 - σ) D(a - n + ε),  G_pn = -s δ σ D(p - n + ε)   (2)
    grad_a = G_ap + G_an,  grad_p = G_pn - G_ap,  grad_n = -G_an - G_pn                       (3)
    tangent_ℓ = Σ over the row of gradient · tangent, with s = 1                              (4)

Saves:
    a, p and n, which are inputs, and nothing else; torch keeps two differences and their distances besides.

Edge values:
    ‖v‖ = 0: the subgradient 0.   ℓ's argument 0: active, as in torch.   No rows: the mean is NaN.

Sources:
    Balntas, Riba, Ponsa, Mikolajczyk, "Learning local feature descriptors with triplets and shallow convolutional
    neural networks", 2016, doi:10.5244/C.30.119 (with the swap).
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import (
    Context,
    entry,
    fused,
    in_autocast_float32,
    is_half,
    public,
    scale_fresh,
)
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._reduction import named, reduce, spread
from torchbp.ops._samples import Make, Sample, square, stored

__all__ = ["TripletMarginLoss", "TripletMarginLossFunction", "triplet_margin_loss"]

_NAME = "triplet_margin_loss"


class TripletMarginLossFunction(Function):
    """Triplet margin with hand-written gradients. Call it through :func:`triplet_margin_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        a: Tensor,
        p: Tensor,
        n: Tensor,
        margin: float,
        power: float,
        eps: float,
        swap: bool,
        reduction: str,
    ) -> Tensor:  # (*, D) three times -> () or (*)
        if fused(a, p, n) and a.dtype == p.dtype == n.dtype and a.numel() > 0:
            v = torch.empty_like(a)
            distances = [
                _norm(torch.sub(u, w, out=v).add_(eps), power) for u, w in _pairs(a, p, n, swap)
            ]
        else:
            distances = [_norm(v, power) for v in _differences(a, p, n, eps, swap)]
        near, far = distances[0], distances[1]
        far = torch.minimum(far, distances[2]) if swap else far
        return reduce((near - far + margin).clamp(min=0), reduction).to(a.dtype)

    @staticmethod
    def setup_context(
        ctx: Context,
        inputs: tuple[Tensor, Tensor, Tensor, float, float, float, bool, str],
        output: Tensor,
    ) -> None:
        a, p, n, ctx.margin, ctx.power, ctx.eps, ctx.swap, ctx.reduction = inputs
        ctx.save_for_backward(a, p, n)
        ctx.save_for_forward(a, p, n)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, p, n = ctx.saved_tensors
        s = spread(grad, ctx.reduction, a.shape[:-1].numel())
        need_a, need_p, need_n, *_ = ctx.needs_input_grad
        if (
            ctx.power == 2
            and not ctx.swap
            and fused(grad, a, p, n)
            and a.dtype == p.dtype == n.dtype
        ):
            needs = (need_a, need_p, need_n)
            grads = _euclidean_gradients(a, p, n, s, ctx.margin, ctx.eps, needs)
            return *grads, None, None, None, None, None
        g_ap, g_an, g_pn = _gradients(a, p, n, s, ctx.margin, ctx.power, ctx.eps, ctx.swap)
        grad_a = (g_ap + g_an).to(a.dtype) if need_a else None  # (3)
        grad_p = grad_n = None
        if need_p:
            grad_p = (-g_ap if g_pn is None else g_pn - g_ap).to(p.dtype)
        if need_n:
            grad_n = (-g_an if g_pn is None else -g_an - g_pn).to(n.dtype)
        return grad_a, grad_p, grad_n, None, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Context,
        tangent_a: Tensor | None,
        tangent_p: Tensor | None,
        tangent_n: Tensor | None,
        *_: None,
    ) -> Tensor:
        a, p, n = ctx.saved_tensors
        one = a.new_ones(())
        g_ap, g_an, g_pn = _gradients(a, p, n, one, ctx.margin, ctx.power, ctx.eps, ctx.swap)
        none = torch.zeros_like(a)
        t_a, t_p, t_n = (none if t is None else t for t in (tangent_a, tangent_p, tangent_n))
        values = g_ap * (t_a - t_p) + g_an * (t_a - t_n)
        values = values if g_pn is None else values + g_pn * (t_p - t_n)
        return reduce(values.sum(-1), ctx.reduction)  # (4)


def _differences(a: Tensor, p: Tensor, n: Tensor, eps: float, swap: bool) -> list[Tensor]:
    """Return a - p + ε, a - n + ε and, with swap, p - n + ε; in float32 for half precision."""
    if is_half(a):
        a, p, n = a.float(), p.float(), n.float()
    pairs = _pairs(a, p, n, swap)
    return [(u - v).add_(eps) if fused(a, p, n) else u - v + eps for u, v in pairs]


def _pairs(a: Tensor, p: Tensor, n: Tensor, swap: bool) -> tuple[tuple[Tensor, Tensor], ...]:
    return ((a, p), (a, n), (p, n)) if swap else ((a, p), (a, n))


def _norm(v: Tensor, power: float) -> Tensor:
    return torch.linalg.vector_norm(v, power, dim=-1)


def _gradients(
    a: Tensor, p: Tensor, n: Tensor, s: Tensor, margin: float, power: float, eps: float, swap: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    vs = _differences(a, p, n, eps, swap)
    ds = [_norm(v, power) for v in vs]
    if swap:
        share = 0.5 * ((ds[2] < ds[1]).to(s.dtype) + (ds[2] <= ds[1]).to(s.dtype))
        far = torch.minimum(ds[1], ds[2])
    else:
        share, far = None, ds[1]
    s = s * (ds[0] - far + margin >= 0).to(ds[0].dtype)
    g_ap = _slope(vs[0], ds[0], power, s)  # (2)
    if share is None:
        return g_ap, _slope(vs[1], ds[1], power, -s), None
    g_an = _slope(vs[1], ds[1], power, -s * (1 - share))
    return g_ap, g_an, _slope(vs[2], ds[2], power, -s * share)


def _euclidean_gradients(
    a: Tensor,
    p: Tensor,
    n: Tensor,
    s: Tensor,
    margin: float,
    eps: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (3) for p = 2 without swap, each difference written where its gradient will be."""
    grad_p, grad_n = (p - a).sub_(eps), (a - n).add_(eps)
    near, far = _norm(grad_p, 2), _norm(grad_n, 2)
    s = s * (near - far + margin >= 0).to(near.dtype)
    by_near, by_far = ((s / d).masked_fill(d == 0, 0).unsqueeze(-1) for d in (near, far))
    grad_p.mul_(by_near)  # -G_ap
    grad_n.mul_(by_far)  # -G_an
    need_a, need_p, need_n = needs
    grad_a = torch.add(grad_p, grad_n).neg_() if need_a else None
    return grad_a, grad_p if need_p else None, grad_n if need_n else None


def _slope(v: Tensor, d: Tensor, power: float, s: Tensor) -> Tensor:
    """Return s · D(v), (1); v is the caller's own and may be written to."""
    zero = d == 0
    d, s = d.masked_fill(zero, 1), s.masked_fill(zero, 0)
    if power == 2:
        return scale_fresh(v, (s / d).unsqueeze(-1))
    if power == 1:
        return v.sgn() * s.unsqueeze(-1)
    if power == math.inf:
        largest = (v.abs() == d.unsqueeze(-1)).to(v.dtype)
        return v.sgn() * largest * (s / largest.sum(-1).clamp(min=1)).unsqueeze(-1)
    return v.sgn() * (v.abs() / d.unsqueeze(-1)).pow(power - 1) * s.unsqueeze(-1)


_triplet_margin_loss = entry(TripletMarginLossFunction)


@public
def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Triplet margin: :math:`\ell = \max(0, m + \|a - p + \epsilon\| - \|a - n + \epsilon\|)`, reduced.

    Args:
        anchor: Vectors a, ``(N, D)`` or ``(D,)``, floating point.
        positive: Vectors p, of a shape that can be broadcast with a.
        negative: Vectors n, of a shape that can be broadcast with a.
        margin: The lead m of the positive from which on the loss is 0; positive.
        p: The order of the norm.
        eps: :math:`\epsilon`, added to every component of a difference.
        swap: Whether the nearer of a and p counts for the negative.
        size_average: Deprecated in torch; see ``reduction``.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss in the unit of the vectors: a scalar, or ``(N,)`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction, or ``margin`` not positive.
        RuntimeError: Numbers of dimensions that differ, or shapes that cannot be broadcast.

    Example:
        >>> import torch
        >>> from torchbp.functional import triplet_margin_loss
        >>> a, p, n = torch.tensor([[0.0, 0.0], [0.0, 1.0], [3.0, 0.0]]).unsqueeze(1)
        >>> triplet_margin_loss(a, p, n, margin=3.0)
        tensor(1.)
    """
    reduction = named(_NAME, reduction, size_average, reduce)
    if not margin > 0:
        raise ValueError(wrong(_NAME, "a positive margin", margin, "1.0 is the default"))
    if not anchor.dim() == positive.dim() == negative.dim():
        got = f"{shape(anchor)}, {shape(positive)} and {shape(negative)}"
        raise RuntimeError(wrong(_NAME, "as many dimensions in all three", got, "unsqueeze first"))
    if not anchor.is_floating_point():  # torch's own
        own = F.triplet_margin_loss
        return own(anchor, positive, negative, margin, p, eps, swap, reduction=reduction)
    tensors = torch.broadcast_tensors(*in_autocast_float32(anchor, positive, negative))
    return _triplet_margin_loss(*tensors, margin, p, eps, swap, reduction)


class TripletMarginLoss(nn.TripletMarginLoss):
    """Module form of :func:`triplet_margin_loss`."""

    __module__ = "torchbp.nn"

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return triplet_margin_loss(
            anchor,
            positive,
            negative,
            margin=self.margin,
            p=self.p,
            eps=self.eps,
            swap=self.swap,
            reduction=self.reduction,
        )


def _triplet(make: Make, *dims: int) -> tuple[Tensor, Tensor, Tensor]:
    return make.normal(*dims), make.normal(*dims), make.normal(*dims)


def _samples(make: Make) -> Iterator[Sample]:
    for reduction in ("mean", "sum", "none"):
        yield Sample(_triplet(make, 3, 4), {"reduction": reduction}, reduction)
    for p in (2, 1, 3, math.inf):
        yield Sample(_triplet(make, 3, 4), {"p": p, "swap": True, "margin": 2.0}, f"swap-p{p}")
    yield Sample(_triplet(make, 4), name="1d")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    args = _triplet(make, 3, 4)
    yield TripletMarginLoss, Sample(), Sample(args)
    kwargs = {"margin": 0.5, "p": 1, "swap": True, "reduction": "sum"}
    yield TripletMarginLoss, Sample((), kwargs), Sample(args, name="all-arguments")


def _errors(make: Make) -> Iterator[Sample]:
    a, p, n = _triplet(make, 3, 4)
    yield Sample((a, p, n), {"reduction": "average"}, name="reduction")
    yield Sample((a, p, n), {"margin": 0.0}, name="margin")
    yield Sample((a, p, n[0]), name="dimensions")
    yield Sample((a, p, n[:, :3]), name="shape")


def _benchmark(make: Make, n: int) -> Sample:
    return Sample(_triplet(make, *square(make, n).args[0].shape))


OP = Op(
    function=triplet_margin_loss,
    modules=(TripletMarginLoss,),
    reference=rounded_once(F.triplet_margin_loss),
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda *args, **_: stored(*args),
    benchmark=_benchmark,
)
