"""The two ways to evaluate linear and cross entropy, formula and chunks; numbers as in linear_cross_entropy.py."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchbp.ops._function import is_half
from torchbp.ops._reduction import spread
from torchbp.ops.losses._chunked_logits import (
    Gradients,
    Indices,
    Probabilities,
    Rows,
    over_chunks,
)
from torchbp.ops.losses._logits_gradient import (
    gradient_of_indices,
    gradient_of_probabilities,
    terms_of_probabilities,
)
from torchbp.ops.losses._shards import Shard
from torchbp.ops.losses._z_loss import LogPartitionPenaltyFunction, gradient_of_penalty

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Settings",
    "by_chunks",
    "gradient_of_logits",
    "of_products",
    "values_by_formula",
    "wide",
]


class Settings(NamedTuple):
    """What of the loss is not a tensor; the Function takes it flat."""

    reduction: str
    ignored: int
    smoothing: float
    z_loss: float
    softcap: float | None
    rows: int  # of a chunk
    early: tuple[bool, bool, bool]  # whether the gradients of x, W, b are made in the forward
    tokens: bool  # whether each position's value and prediction are outputs
    group: "ProcessGroup | None"


def wide(x: Tensor) -> torch.dtype:
    return torch.float32 if is_half(x) else x.dtype


def of_products(x: Tensor) -> torch.dtype:
    return x.dtype if is_half(x) and not x.is_cpu else wide(x)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    low = of_products(x)
    u = F.linear(x.to(low), weight.to(low)).to(wide(x))
    u = u if bias is None else u + bias
    return u if softcap is None else torch.tanh(u / softcap) * softcap


def values_by_formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    w: Tensor | None,
    given: Settings,
) -> tuple[Tensor, ...]:
    """Return the loss and what else is asked for; all logits stand for a moment."""
    z = _logits(x, weight, bias, given.softcap)
    w = None if w is None else w.to(z.dtype)
    indices = target.dim() == 1
    options: dict[str, Any] = {"weight": w, "label_smoothing": given.smoothing}
    if indices:
        target = target.long()  # torch has no batching rule for uint8
        options["ignore_index"] = given.ignored
    else:
        target = target.to(z.dtype)

    def value(reduction: str) -> Tensor:
        loss = F.cross_entropy(z, target, reduction=reduction, **options)
        if given.z_loss == 0:
            return loss
        counts = target != given.ignored if indices else None
        return loss + LogPartitionPenaltyFunction.forward(z, counts, given.z_loss, reduction)

    loss = value(given.reduction)
    return (loss, value("none"), z.argmax(1)) if given.tokens else (loss,)


def gradient_of_logits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    w: Tensor | None,
    grad: Tensor,
    given: Settings,
) -> Tensor:
    """Return g, (N, C), for the gradient of the loss, as a formula."""
    z = _logits(x, weight, bias, given.softcap)
    counts = None
    if target.dim() == 1:
        counts = target != given.ignored
        settings = (given.reduction, given.ignored, given.smoothing)
        g = gradient_of_indices(z, grad, target, w, *settings)  # (1)
    else:
        q, log_p, wide_w = terms_of_probabilities(z, target, w, given.smoothing)
        s = spread(grad, given.reduction, x.shape[0])
        s = s.unsqueeze(1) if s.dim() else s
        g = gradient_of_probabilities(s, q, log_p, wide_w, 1)  # (1)
    if given.z_loss:
        g = g + gradient_of_penalty(z, grad, counts, given.z_loss, given.reduction)  # (1)
    return g if given.softcap is None else g * (1 - (z / given.softcap).square())  # (5)


def by_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    w: Tensor | None,
    given: Settings,
    grad: Tensor | None,
    need: tuple[bool, ...],
) -> tuple[Rows, Tensor, Tensor]:
    """Return what comes of the rows, the loss, and its values; gradients for ``grad`` of the loss, unless ``None``."""
    dtype, shard = wide(x), Shard(weight.shape[0], given.group, x.device)
    counts: Tensor | None = None
    total: Tensor | int = x.shape[0]
    count: Tensor | int = x.shape[0]
    if target.dim() == 1:
        against = Indices(target, w, given.ignored, given.smoothing, shard, dtype)
        counts, total, count = against.counts, against.w_t.sum(), against.counts.sum()
    else:
        against = Probabilities(target, w, given.smoothing, shard, dtype)
    gradients = None
    if grad is not None:
        s, s_penalty = spread(grad, given.reduction, total).expand(x.shape[:1]), None
        if counts is not None:
            s = s.masked_fill(~counts, 0)  # nothing counted: 0, not 0/0
        if given.z_loss:
            s_penalty = spread(grad * given.z_loss, given.reduction, count).expand(x.shape[:1])
            s_penalty = s_penalty if counts is None else s_penalty.masked_fill(~counts, 0)
        gradients = Gradients(s, s_penalty, *need)
    made = over_chunks(
        x,
        weight,
        bias,
        against,
        softcap=given.softcap,
        rows=given.rows,
        shard=shard,
        gradients=gradients,
        predict=given.tokens,
    )
    values = made.values
    loss = values if given.reduction == "none" else spread(values.sum(), given.reduction, total)
    if given.z_loss:
        penalty = made.log_partition.square() * given.z_loss
        penalty = penalty if counts is None else penalty.masked_fill_(~counts, 0)
        values = values + penalty
        reduced = penalty if given.reduction == "none" else penalty.sum()
        loss = loss + spread(reduced, given.reduction, count)
    return made, loss, values
