r"""Smooth L1 loss: ℓ = d² / (2β) where |d| < β, else |d| - β/2, with d = x - t, then reduced.

Derivation:
    β · ℓ = d²/2 where |d| < β, else β · (|d| - β/2)
          = the Huber loss with δ = β, whose gradients huber_loss.py derives
    ℓ = huber(x, t; δ = β) / β                                                                (1)
    For β → 0 this is |d|, the L1 loss.

Saves:
    x and t, which are inputs; for β = 0 what the L1 loss saves.

Edge values:
    Those of the Huber loss: d = ±∞ gives grad = ±s.

Sources:
    torch.nn.SmoothL1Loss, whose values, gradients and reductions these are.
    Huber, "Robust Estimation of a Location Parameter", 1964, doi:10.1214/aoms/1177703732.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops._errors import wrong
from torchbp.ops._function import public
from torchbp.ops._op import Op
from torchbp.ops._reduction import matched, named
from torchbp.ops._samples import Make, Sample, against_values, pairs, stored
from torchbp.ops.losses.huber_loss import huber_loss
from torchbp.ops.losses.l1_loss import l1_loss

__all__ = ["SmoothL1Loss", "smooth_l1_loss"]


@public
def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    r"""Smooth L1 loss: :math:`d^2 / (2 \beta)` where :math:`|d| < \beta`, else :math:`|d| - \beta / 2`, reduced.

    Args:
        input: Any shape ``(*)``, floating point.
        target: The shape of ``input``; other shapes that can be broadcast are, with a warning.
        size_average: Deprecated in torch; see ``reduction``.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        beta: The error from which on the loss is linear; 0 gives the L1 loss.

    Returns:
        The loss in the unit of ``input``: a scalar, or ``(*)`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction.
        RuntimeError: A negative ``beta``.
        NotImplementedError: Integer or complex ``input``.

    Example:
        >>> import torch
        >>> from torchbp.functional import smooth_l1_loss
        >>> smooth_l1_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]))
        tensor(1.2500)
    """
    reduction = named("smooth_l1_loss", reduction, size_average, reduce)
    if beta < 0:
        raise RuntimeError(wrong("smooth_l1_loss", "beta ≥ 0", beta, "0 gives the L1 loss"))
    input, target = matched("smooth_l1_loss", input, target)
    if not input.is_floating_point() and target.is_floating_point():
        input = input.to(target.dtype)
    if beta == 0:
        return l1_loss(input, target, reduction=reduction)
    loss = huber_loss(input, target, reduction, beta)
    return loss if beta == 1 else loss / beta  # (1)


class SmoothL1Loss(nn.SmoothL1Loss):
    """Module form of :func:`smooth_l1_loss`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


def _samples(make: Make) -> Iterator[Sample]:
    yield from pairs(make.normal, make.normal)
    for beta in (0.0, 0.4):
        for reduction in ("mean", "none"):
            args = (make.normal(3, 4), make.normal(3, 4))
            yield Sample(args, {"reduction": reduction, "beta": beta}, f"beta{beta}-{reduction}")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    sample = Sample((make.normal(3, 4), make.normal(3, 4)))
    yield SmoothL1Loss, Sample(), sample
    kwargs = {"reduction": "sum", "beta": 0.3}
    yield SmoothL1Loss, Sample((), kwargs), Sample(sample.args, name="sum")


def _errors(make: Make) -> Iterator[Sample]:
    x = make.normal(3, 4)
    yield Sample((x, x), {"reduction": "average"}, name="reduction")
    yield Sample((x, x), {"beta": -1.0}, name="beta")
    integers = make.labels(3, classes=5)
    yield Sample((integers, integers), name="integers")


def _saved_bytes(x: Tensor, target: Tensor, **kwargs: object) -> int:
    return x.numel() if kwargs.get("beta") == 0 else stored(x, target)


OP = Op(
    function=smooth_l1_loss,
    modules=(SmoothL1Loss,),
    reference=F.smooth_l1_loss,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=against_values,
    fused="aten::huber_loss_backward",
)
