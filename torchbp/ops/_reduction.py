"""What a loss's ``reduction`` does to its values, and to the gradient that comes back."""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import _reduction as torch_reduction

from torchbp.ops._autocast import autocasts
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import as_dtype, in_autocast_float32, is_half, scale_fresh, widened
from torchbp.ops._numbers import number
from torchbp.ops._one_kernel import in_one_kernel
from torchbp.ops._pieces import (
    FEW,
    at_once,
    in_pieces,
    is_few,
    pieces,
    separable,
    writable,
    written,
)
from torchbp.ops.kernels import SUM, in_one_loop, many

__all__ = [
    "FEW",
    "REDUCTIONS",
    "WIDE",
    "as_composed",
    "broadcast",
    "in_common_dtype",
    "laid_out",
    "matched",
    "named",
    "reduce",
    "reduced",
    "reduced_in_one_kernel",
    "reduced_in_one_loop",
    "scaled_signs",
    "spread",
]
# Autocast leaves losses of these dtypes alone; a mean is the sum's quotient.
WIDE = (torch.float32, torch.float64)
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as torch's kernels count them


def named(op: str, reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    """Return ``reduction`` checked; torch's older two arguments, where given, decide (and warn) as in torch."""
    if size_average is not None or reduce is not None:
        reduction = torch_reduction.legacy_get_string(size_average, reduce)
    if reduction not in ("none", "mean", "sum"):
        rule = "reduction to be 'none', 'mean' or 'sum'"
        raise ValueError(wrong(op, rule, repr(reduction), "pass one of the three"))
    return reduction


def reduce(values: Tensor, reduction: str) -> Tensor:
    """Return ``values`` themselves, their mean or their sum."""
    if reduction == "none":
        return values
    if values.dtype not in WIDE:
        return values.mean() if reduction == "mean" else values.sum()  # of integers in int64
    return _of_sum(values.sum(), reduction, values)


def _of_sum(total: Tensor, reduction: str, like: Tensor, negative: bool = False) -> Tensor:
    """Return the mean or the sum of values of the shape and dtype of ``like``, whose sum is ±``total``."""
    count = -like.numel() if negative else like.numel()
    value = total / number(count, total) if reduction == "mean" else -total if negative else total
    return as_dtype(value, like.dtype)


def reduced(
    formula: Callable[..., Tensor],
    reduction: str,
    *tensors: Tensor,
    into: Callable[..., object] | None = None,
    spare: int = 0,
    negative: bool = False,
) -> Tensor:
    """Return the reduced values of an elementwise formula, of half precision in float32.

    A mean or a sum of many values is taken piece by piece: no large tensor is made only to be summed.

    Args:
        formula: Elementwise function of ``tensors``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        tensors: Of one shape.
        into: The formula as :func:`in_pieces` takes it.
        spare: How many spares it takes.
        negative: Whether the values count with the other sign: a mean is then the quotient by -N, one kernel less.
    """
    first = tensors[0]
    if reduction != "none" and (first.is_cuda or many(first)):
        loss = reduced_in_one_kernel(formula, reduction, *tensors)
        if loss is not None:
            return -loss if negative else loss
    if reduction != "none" and into is not None and writable(*tensors):
        if is_few(first):
            total = at_once(into, spare, *tensors).sum()
            return _of_sum(total, reduction, first, negative)
        sums = [piece.sum() for piece in written(into, spare, *tensors)]
        total = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
        return _of_sum(total, reduction, first, negative)
    if reduction == "none" or not separable(*tensors):
        loss = reduce(in_pieces(formula, *tensors, into=into, spare=spare), reduction)
        return -loss if negative else loss
    parts = pieces(*tensors)
    if is_half(first):
        parts = (tuple(t.float() for t in part) for part in parts)
    total = torch.stack([formula(*part).sum() for part in parts]).sum()
    return _of_sum(total, reduction, first, negative)


def reduced_in_one_kernel(
    formula: Callable[..., Tensor], reduction: str, *tensors: Tensor
) -> Tensor | None:
    """Return what :func:`reduced` does where ``formula`` is one kernel, or one loop; else ``None``."""
    first = tensors[0]
    if not (first.is_cuda or many(first)):
        return None
    values = in_one_kernel(formula, *tensors, summed=reduction != "none")
    if values is None or reduction == "none":
        return values
    return _of_sum(values.sum() if values.dim() else values, reduction, first)


def reduced_in_one_loop(
    formula: Callable[..., tuple[Tensor, ...]],
    reduction: str,
    *tensors: Tensor,
    beside: tuple[torch.dtype | None, ...],
) -> tuple[Tensor, Tensor] | None:
    """Return the loss and what backward keeps from one loop on the CPU; ``None`` where there is none.

    Args:
        formula: Elementwise function of ``tensors``: the loss of each element, and what is kept.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, of the first alone.
        tensors: As :func:`in_one_loop` takes them.
        beside: The dtype of what is kept; ``None`` for that of the first tensor.
    """
    outputs = (None if reduction == "none" else SUM, *beside)
    made = in_one_loop(formula, *tensors, outputs=outputs)
    if made is None:
        return None
    values, kept = made
    return values if reduction == "none" else _of_sum(values, reduction, tensors[0]), kept


def scaled_signs(sign: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``sign * s`` in ``dtype``: signs in int8, and what :func:`spread` gives."""
    if many(sign):
        product = in_one_loop(torch.mul, sign, s, outputs=(dtype,))
        if product is not None:
            return product
    # a product of int8 and a float takes three times as long as both steps
    return as_dtype(scale_fresh(sign.to(s.dtype), s), dtype)


def spread(grad: Tensor, reduction: str, count: int | Tensor, *, negative: bool = False) -> Tensor:
    """Return the gradient of each value, or one for all, from that of the reduced loss over ``count`` values.

    In float32 for half precision: the quotient for a million values is subnormal in float16. Or its ``negative``.
    """
    grad = widened(grad)
    if reduction != "mean":
        return -grad if negative else grad
    count = -count if negative else count
    return grad / (count if isinstance(count, Tensor) else number(count, grad))


def broadcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return ``torch.broadcast_tensors(*tensors)``, or they themselves where they have one shape."""
    size = tensors[0].size()
    for t in tensors:
        if t.size() != size:
            return tuple(torch.broadcast_tensors(*tensors))
    return tensors


def in_common_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast does for its float32 ops, and then to the widest floating-point dtype there is.

    That is what torch's arithmetic computes in. Outside the op, so that each has its gradient in its own dtype.
    Integers stay. What has no dimensions does not widen the others, as in torch.
    """
    first = tensors[0].dtype
    for t in tensors:
        if t.dtype != first:
            break
    else:
        if first in WIDE:
            return tensors
    tensors = in_autocast_float32(*tensors)
    first = tensors[0].dtype
    if all(t.dtype == first for t in tensors):
        return tensors
    inexact = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    dtypes = [t.dtype for t in inexact if t.dim()] or [t.dtype for t in inexact]
    if not dtypes:
        return tensors
    widest = functools.reduce(torch.promote_types, dtypes)
    return tuple(t.to(widest) if t.is_floating_point() or t.is_complex() else t for t in tensors)


def as_composed(loss: Tensor, *tensors: Tensor) -> Tensor:
    """Return a loss that torch composes of several ops in the dtype that it has there under autocast.

    On the CPU autocast casts none of them, and the loss has the dtype of ``tensors``; on a GPU it is float32.
    """
    if not (loss.is_cpu and autocasts("cpu")):
        return loss
    dtypes = (t.dtype for t in tensors if t.is_floating_point())
    return loss.to(functools.reduce(torch.promote_types, dtypes))


def laid_out(loss: Tensor, like: Tensor) -> Tensor:
    """Return ``loss`` contiguous where ``like`` is, whose layout torch's has, so that it can be viewed in any shape."""
    return loss.contiguous() if loss.dim() and like.is_contiguous() else loss


def matched(op: str, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one shape; torch, too, warns where they have to be broadcast for that."""
    if target.size() == input.size():
        return input, target
    advice = "they are broadcast, which is seldom what is meant"
    message = wrong(op, f"target of the input's shape {shape(input)}", shape(target), advice)
    warnings.warn(message, UserWarning, stacklevel=4)
    first, second = torch.broadcast_tensors(input, target)
    return first, second
