r"""Triplet margin: ℓ = max(0, m + d(a, p) - d(a, n)), d(u, v) = ‖u - v + ε‖_p over the last dimension, then reduced.

With "swap", d(a, n) is replaced by min(d(a, n), d(p, n)).

Derivation, with s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"), δ = [ℓ's argument > 0]:
    D(v) = ∂‖v‖_p / ∂v = sign(v) (|v| / ‖v‖)^(p-1); for p = 2, v / ‖v‖                        (1)
    σ = share of d(p, n) in the minimum: 1, 0, or 1/2 where equal; 0 without swap
    G_ap = s δ D(a - p + ε),  G_an = -s δ (1 - σ) D(a - n + ε),  G_pn = -s δ σ D(p - n + ε)   (2)
    grad_a = G_ap + G_an,  grad_p = G_pn - G_ap,  grad_n = -G_an - G_pn                       (3)
    tangent_ℓ = Σ over the row of gradient · tangent, with s = 1                              (4)

Saves:
    a - p + ε, a - n + ε and, with swap, p - n + ε, as torch does, and their norms, which only the eager backward
    reads: 8 bytes for each float32 element of a, 12 with swap. Of a, p and n nothing is read any more. The differences
    are outputs that no caller sees; a second derivative goes through them, and what it brings adds to (2).

Edge values:
    ‖v‖ = 0: the subgradient 0.   ℓ's argument 0: δ is torch's, 1 until torch 2.13, then 0 (_clamp.py).
    No rows: the mean is NaN.

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
from torchbp.ops._function import Context, as_dtype, entry, is_half, public
from torchbp.ops._numbers import number
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._range import in_float64, in_range
from torchbp.ops._reduction import broadcast, in_common_dtype, named, reduce, spread
from torchbp.ops._samples import Make, Sample, square, stored
from torchbp.ops.losses._triplet_distances import euclidean_gradients, slopes, with_norms

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
    ) -> tuple[Tensor | None, ...]:
        """(*, D) three times -> the loss, () or (*); the differences, (*, D) each; their norms, (2 or 3, *)."""
        vs, ds = with_norms(a, p, n, power, eps, swap)
        far = torch.minimum(ds[1], ds[2]) if swap else ds[1]
        loss = reduce(torch.relu(ds[0] - far + number(margin, far)), reduction)
        return as_dtype(loss, a.dtype), vs[0], vs[1], vs[2] if swap else None, torch.stack(ds)

    @staticmethod
    def setup_context(
        ctx: Context,
        inputs: tuple[Tensor, Tensor, Tensor, float, float, float, bool, str],
        output: tuple[Tensor, ...],
    ) -> None:
        *tensors, ctx.margin, ctx.power, _, _, ctx.reduction = inputs
        _, *vs, ds = output
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(ds)
        ctx.save_for_backward(*vs, None if is_half(vs[0]) else ds)
        ctx.save_for_forward(*vs)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        g_ap, g_an, g_pn, _ = grads  # of a second derivative, through the differences
        needs = ctx.needs_input_grad[:3]
        if grad is not None:
            ap, an, pn, ds = ctx.saved_tensors
            s = spread(grad, ctx.reduction, ap.shape[:-1].numel())
            plain = ctx.power == 2 and pn is None and g_ap is None and g_an is None
            own = euclidean_gradients(ap, an, ds, s, ctx.margin, needs) if plain else None
            if own is not None:
                return *own, None, None, None, None, None
            of_loss = slopes(ap, an, pn, s, ctx.margin, ctx.power)
            pairs = zip((g_ap, g_an, g_pn), of_loss, strict=True)
            g_ap, g_an, g_pn = (_total(*pair) for pair in pairs)
        each = (g_ap, g_an), (g_pn, _minus(g_ap)), (_minus(g_an), _minus(g_pn))  # (3)
        totals = [
            _total(*terms) if needed else None for terms, needed in zip(each, needs, strict=True)
        ]
        of_inputs = (
            t if t is None else as_dtype(t, dtype)
            for t, dtype in zip(totals, ctx.dtypes, strict=True)
        )
        return *of_inputs, None, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Context,
        tangent_a: Tensor | None,
        tangent_p: Tensor | None,
        tangent_n: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        ap, an, pn = ctx.saved_tensors[:3]
        none = torch.zeros_like(ap)
        t_a, t_p, t_n = (none if t is None else t for t in (tangent_a, tangent_p, tangent_n))
        t_ap, t_an, t_pn = t_a - t_p, t_a - t_n, None if pn is None else t_p - t_n
        g_ap, g_an, g_pn = slopes(ap, an, pn, ap.new_ones(()), ctx.margin, ctx.power)
        values = g_ap * t_ap + g_an * t_an
        if g_pn is not None and t_pn is not None:
            values = values + g_pn * t_pn
        return reduce(values.sum(-1), ctx.reduction), t_ap, t_an, t_pn, None  # (4)


def _minus(g: Tensor | None) -> Tensor | None:
    return None if g is None else -g


def _total(g: Tensor | None, h: Tensor | None) -> Tensor | None:
    if g is None or h is None:
        return h if g is None else g
    return g + h


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
    tensors = broadcast(*in_common_dtype(anchor, positive, negative))
    loss = _triplet_margin_loss(*tensors, margin, p, eps, swap, reduction)[0]
    if in_range(*tensors):
        return loss
    return in_float64(triplet_margin_loss, *tensors, margin, p, eps, swap, reduction=reduction)


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


def _saved_bytes(a: Tensor, *_: Tensor, **kwargs: object) -> int:
    pairs = 3 if kwargs.get("swap") else 2
    norms = 0 if is_half(a) else a.shape[:-1].numel() * a.element_size()
    return pairs * (stored(a) + norms)


OP = Op(
    function=triplet_margin_loss,
    modules=(TripletMarginLoss,),
    reference=rounded_once(F.triplet_margin_loss),
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
)
