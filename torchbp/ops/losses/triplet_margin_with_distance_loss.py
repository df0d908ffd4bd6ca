r"""Triplet margin of any distance: ℓ = max(0, m + d(a, p) - d(a, n)), d being a function, then reduced.

With "swap", d(a, n) is replaced by min(d(a, n), d(p, n)).

Derivation:
    With t = 1 the margin ranking loss of the distances, max(0, m - t (d(a, n) - d(a, p))), whose gradients
    margin_ranking_loss.py derives                                                            (1)
    Without a function, d is the Euclidean distance of triplet_margin_loss.py, with its ε     (2)
    A function's own gradient, and that of the minimum, are autograd's.

Saves:
    For (1) a bool and the 1 for each row, beside what the function saves; for (2) its differences.

Edge values:
    Those of the two losses.

Sources:
    torch.nn.TripletMarginWithDistanceLoss, whose values, gradients and reductions these are.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops._autocast import autocasts
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import entry, is_half, public
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._reduction import as_composed, in_common_dtype, named
from torchbp.ops._samples import Make, Sample, square, stored
from torchbp.ops.losses.margin_ranking_loss import MarginRankingLossFunction
from torchbp.ops.losses.triplet_margin_loss import triplet_margin_loss

__all__ = ["TripletMarginWithDistanceLoss", "triplet_margin_with_distance_loss"]

_NAME = "triplet_margin_with_distance_loss"


_margin_ranking_loss = entry(MarginRankingLossFunction)


@public
def triplet_margin_with_distance_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> Tensor:
    r"""Triplet margin of any distance: :math:`\ell = \max(0, m + d(a, p) - d(a, n))`, reduced.

    Args:
        anchor: a, ``(N, *)``.
        positive: p, of as many dimensions as a.
        negative: n, of as many dimensions as a.
        distance_function: d, which takes two of them and gives a tensor of distances; Euclidean by default.
        margin: The lead m of the positive from which on the loss is 0; positive.
        swap: Whether the nearer of a and p counts for the negative.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss in the unit of the distance: a scalar, or the distances' shape for ``"none"``.

    Raises:
        ValueError: An unknown reduction, or ``margin`` not positive.
        RuntimeError: Numbers of dimensions that differ.

    Example:
        >>> import torch
        >>> from torchbp.functional import triplet_margin_with_distance_loss
        >>> a, p, n = torch.tensor([[0.0, 0.0], [0.0, 1.0], [3.0, 0.0]]).unsqueeze(1)
        >>> manhattan = lambda u, v: (u - v).abs().sum(-1)
        >>> triplet_margin_with_distance_loss(a, p, n, distance_function=manhattan, margin=3.0)
        tensor(1.)
    """
    reduction = named(_NAME, reduction, None, None)
    if not margin > 0:
        raise ValueError(wrong(_NAME, "a positive margin", margin, "1.0 is the default"))
    if not anchor.dim() == positive.dim() == negative.dim():
        got = f"{shape(anchor)}, {shape(positive)} and {shape(negative)}"
        raise RuntimeError(wrong(_NAME, "as many dimensions in all three", got, "unsqueeze first"))
    if distance_function is None:
        loss = triplet_margin_loss(  # (2)
            anchor, positive, negative, margin=margin, swap=swap, reduction=reduction
        )
        return as_composed(loss, anchor, positive, negative)
    near, far = distance_function(anchor, positive), distance_function(anchor, negative)
    if swap:
        far = torch.minimum(far, distance_function(positive, negative))
    if near.dtype != far.dtype:
        near, far = in_common_dtype(near, far)
    one = far.new_ones(()).expand_as(far)
    return _margin_ranking_loss(far, near, one, margin, reduction)[0]  # (1)


class TripletMarginWithDistanceLoss(nn.TripletMarginWithDistanceLoss):
    """Module form of :func:`triplet_margin_with_distance_loss`."""

    __module__ = "torchbp.nn"

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return triplet_margin_with_distance_loss(
            anchor,
            positive,
            negative,
            distance_function=self.distance_function,
            margin=self.margin,
            swap=self.swap,
            reduction=self.reduction,
        )


def _manhattan(u: Tensor, v: Tensor) -> Tensor:
    return (u - v).abs().sum(-1)


def _triplet(make: Make) -> tuple[Tensor, Tensor, Tensor]:
    return make.normal(3, 4), make.normal(3, 4), make.normal(3, 4)


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample(_triplet(make), {"margin": 2.0}, "euclidean")
    for reduction in ("mean", "sum", "none"):
        for swap in (False, True):
            kwargs = {"distance_function": _manhattan, "margin": 5.0, "swap": swap}
            yield Sample(_triplet(make), {"reduction": reduction, **kwargs}, f"{reduction}-{swap}")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield TripletMarginWithDistanceLoss, Sample(), Sample(_triplet(make))
    kwargs = {"margin": 2.0, "swap": True, "reduction": "sum"}
    yield (
        TripletMarginWithDistanceLoss,
        Sample((), kwargs),
        Sample(_triplet(make), name="swap"),
    )


def _errors(make: Make) -> Iterator[Sample]:
    a, p, n = _triplet(make)
    yield Sample((a, p, n), {"reduction": "average"}, name="reduction")
    yield Sample((a, p, n), {"margin": 0.0}, name="margin")
    yield Sample((a, p, n[0]), name="dimensions")


def _benchmark(make: Make, n: int) -> Sample:
    dims = square(make, n).args[0].shape
    return Sample((make.normal(*dims), make.normal(*dims), make.normal(*dims)))


def _saved_bytes(a: Tensor, p: Tensor, n: Tensor, **kwargs: object) -> int:
    if kwargs.get("distance_function") is None:
        return 2 * (stored(a) + (0 if is_half(a) else a.shape[0] * a.element_size()))
    rows, pairs = a.shape[0], 3 if kwargs["swap"] else 2
    minimum = 2 * rows * a.element_size() if kwargs["swap"] else 0
    return pairs * stored(a) + minimum + rows + a.element_size()  # differences, mask, the one


def _reference(a: Tensor, p: Tensor, n: Tensor, **kwargs: Any) -> Tensor:
    """Torch's; in half precision with a given function's distances as it rounds them, all else rounded once."""
    own = kwargs.get("distance_function")
    if own is not None and is_half(a) and not autocasts(a.device.type):
        kwargs["distance_function"] = lambda u, v: own(u.to(a.dtype), v.to(a.dtype)).float()
    elif own is not None:
        return F.triplet_margin_with_distance_loss(a, p, n, **kwargs)
    return rounded_once(F.triplet_margin_with_distance_loss)(a, p, n, **kwargs)


OP = Op(
    function=triplet_margin_with_distance_loss,
    modules=(TripletMarginWithDistanceLoss,),
    reference=_reference,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
)
