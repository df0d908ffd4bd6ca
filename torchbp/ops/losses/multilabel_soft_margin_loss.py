r"""Multi-label soft margin: ℓ_n = -1/C Σ_c w_c [t_c log σ(x_c) + (1 - t_c) log σ(-x_c)], then reduced over n.

Derivation:
    Each term of the sum is w_c times the binary cross entropy b_c of logits, whose gradients
    binary_cross_entropy_with_logits.py derives; the product with w is autograd's own. Without w:
    ℓ_n  = mean over c of b_nc                                                                (1)
    mean = mean over all b                                                                    (2)
    sum  = sum over all b, divided by C                                                       (3)

Saves:
    x, t and w, which are inputs. torch keeps 20 bytes per float32 element.

Edge values:
    Those of the binary cross entropy.

Sources:
    torch.nn.MultiLabelSoftMarginLoss, whose values, gradients and reductions these are.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops._function import public
from torchbp.ops._op import Op, rounded_once
from torchbp.ops._reduction import as_composed, broadcast, in_common_dtype, named
from torchbp.ops._reduction import reduce as reduced
from torchbp.ops._samples import Make, Sample, against_bits, stored
from torchbp.ops.losses.binary_cross_entropy_with_logits import binary_cross_entropy_with_logits

__all__ = ["MultiLabelSoftMarginLoss", "multilabel_soft_margin_loss"]


@public
def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Multi-label soft margin: binary cross entropy of logits, averaged over the classes, then reduced.

    Args:
        input: Logits ``(*, C)``, floating point.
        target: 0 or 1, of a shape that can be broadcast with ``(*, C)``.
        weight: A factor of each class, ``(C,)``.
        size_average: Deprecated in torch; see ``reduction``.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss in nats: a scalar, or ``(*)`` for ``"none"``.

    Raises:
        ValueError: An unknown reduction.
        RuntimeError: Shapes that cannot be broadcast.

    Example:
        >>> import torch
        >>> from torchbp.functional import multilabel_soft_margin_loss
        >>> multilabel_soft_margin_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 1.0]]))
        tensor(0.4100)
    """
    reduction = named("multilabel_soft_margin_loss", reduction, size_average, reduce)
    if input.is_complex() or target.is_complex():
        return F.multilabel_soft_margin_loss(input, target, weight, reduction=reduction)
    classes = input.size(-1)
    given = input, target
    input, target = broadcast(*in_common_dtype(*given))
    if not (target.is_floating_point() or target.dtype == torch.bool):
        target = target.to(input.dtype)
    if reduction == "none" or weight is not None:
        b = binary_cross_entropy_with_logits(input, target, reduction="none")
        values = (b if weight is None else b * weight).sum(-1) / classes  # (1)
        return as_composed(
            reduced(values, reduction), *given, *(() if weight is None else (weight,))
        )
    loss = binary_cross_entropy_with_logits(input, target, reduction=reduction)  # (2)
    return as_composed(loss / classes if reduction == "sum" else loss, *given)  # (3)


class MultiLabelSoftMarginLoss(nn.MultiLabelSoftMarginLoss):
    """Module form of :func:`multilabel_soft_margin_loss`; the weight is a buffer."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return multilabel_soft_margin_loss(
            input, target, weight=self.weight, reduction=self.reduction
        )


def _samples(make: Make) -> Iterator[Sample]:
    for reduction in ("mean", "sum", "none"):
        args = (make.normal(3, 4), make.uniform(3, 4).round())
        yield Sample(args, {"reduction": reduction}, reduction)
        kwargs = {"reduction": reduction, "weight": make.uniform(4)}
        yield Sample((make.normal(2, 3, 4), make.uniform(2, 3, 4)), kwargs, f"weight-{reduction}")
    yield Sample((make.normal(4), make.uniform(4, requires_grad=True)), name="1d")
    weight = make.uniform(4, requires_grad=True)
    yield Sample((make.normal(3, 4), make.uniform(3, 4)), {"weight": weight}, "trained-weight")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    args = (make.normal(3, 4), make.uniform(3, 4).round())
    yield MultiLabelSoftMarginLoss, Sample(), Sample(args)
    kwargs = {"weight": make.uniform(4), "reduction": "sum"}
    yield MultiLabelSoftMarginLoss, Sample((), kwargs), Sample(args, name="weight")


def _errors(make: Make) -> Iterator[Sample]:
    x = make.normal(3, 4)
    yield Sample((x, x), {"reduction": "average"}, name="reduction")
    yield Sample((x, make.uniform(5)), name="shape")


def _saved_bytes(x: Tensor, target: Tensor, **kwargs: object) -> int:
    weight = kwargs.get("weight")
    trained = isinstance(weight, Tensor) and weight.requires_grad
    return stored(x, target, weight, x if trained else None)  # b


OP = Op(
    function=multilabel_soft_margin_loss,
    modules=(MultiLabelSoftMarginLoss,),
    reference=rounded_once(F.multilabel_soft_margin_loss),
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=against_bits,
)
