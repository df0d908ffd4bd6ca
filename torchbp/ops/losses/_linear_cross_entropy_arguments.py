"""What the arguments of linear_cross_entropy must be; of the type of torch's own errors."""

import math

import torch
from torch import Tensor

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import visible

__all__ = ["NAME", "check", "check_dtypes", "check_range"]

NAME = "linear_cross_entropy"


def check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
    softcap: float | None,
) -> bool:
    """Raise for what does not fit; return whether the target holds probabilities."""
    if softcap is not None and not softcap > 0:
        raise ValueError(wrong(NAME, "a positive softcap", softcap, "None does not cap"))
    if not 0 <= label_smoothing <= 1:
        rule = "label_smoothing in [0, 1]"
        raise RuntimeError(wrong(NAME, rule, label_smoothing, "0 does not smooth"))
    _check_linear(input, linear_weight, linear_bias)
    classes, *places = linear_weight.shape[:-1]
    positions = (*input.shape[:-1], *places)
    soft = target.shape == (*input.shape[:-1], classes, *places)
    if soft:
        if not target.is_floating_point():
            rule = "floating-point probabilities where target has the logits' shape"
            advice = "indices have no class dimension"
            raise RuntimeError(wrong(NAME, rule, target.dtype, advice))
        if ignore_index is not None:
            rule = "no ignore_index with class probabilities"
            raise RuntimeError(wrong(NAME, rule, ignore_index, "mask with reduction='none'"))
    else:
        _check_indices(target, positions)
    if weight is not None and weight.shape != (classes,):
        rule = f"a weight of shape ({classes},)"
        raise RuntimeError(wrong(NAME, rule, shape(weight), "pass a factor of each class"))
    if weight is not None and weight.requires_grad and torch.is_grad_enabled() and not soft:
        rule = "a weight without requires_grad for class indices, as in torch"
        raise RuntimeError(wrong(NAME, rule, "one that requires it", "detach it"))
    return soft


def _check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    if input.dim() < 1:
        rule = "input of shape (*, D)"
        raise RuntimeError(wrong(NAME, rule, shape(input), "the last dimension holds the features"))
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        rule = f"linear_weight of shape (C, {input.shape[-1]}) for input of shape {shape(input)}"
        advice = "pass the weight of a Linear"
        raise RuntimeError(wrong(NAME, rule, shape(linear_weight), advice))
    if linear_weight.dim() > 2 and input.dim() != 2:
        rule = "input of shape (N, D) for a loss of several dimensions"
        raise RuntimeError(wrong(NAME, rule, shape(input), "flatten its first dimensions"))
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        rule = f"linear_bias of shape {tuple(linear_weight.shape[:-1])}"
        raise RuntimeError(wrong(NAME, rule, shape(linear_bias), "pass one for each logit"))


def _check_indices(target: Tensor, positions: tuple[int, ...]) -> None:
    alone = len(positions) == 0 and target.shape == (1,)  # torch takes it as one of ()
    if target.shape != positions and not alone:
        rows = positions and target.dim() and target.shape[0] != positions[0]
        rule = f"a target of shape {positions}, or of the logits' with probabilities"
        message = wrong(NAME, rule, shape(target), "pass one index for each position")
        raise (ValueError if rows else RuntimeError)(message)
    if target.dtype not in (torch.int64, torch.uint8):
        rule = "class indices of dtype int64 or uint8"
        raise RuntimeError(wrong(NAME, rule, target.dtype, "probabilities have the logits' shape"))


def check_dtypes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """Raise where the product, or the logarithm, does not exist."""
    for t in (linear_weight, linear_bias):
        if t is not None and t.dtype != input.dtype:
            rule = f"linear weight and bias of the input's dtype {input.dtype}"
            raise RuntimeError(wrong(NAME, rule, t.dtype, "cast one of them"))
    if not input.is_floating_point():
        rule = "floating-point input"
        raise NotImplementedError(wrong(NAME, rule, input.dtype, "cast it"))


def check_range(target: Tensor, ignored: int, classes: int) -> None:
    """Raise for an index that no class has: on a CPU, in eager mode; looking costs other devices a wait."""
    if not (visible(target) and math.prod(target.shape)):
        return
    counted = target[target != ignored]
    if counted.numel() and not 0 <= counted.min() <= counted.max() < classes:
        got = counted.min() if counted.min() < 0 else counted.max()
        rule = f"class indices in [0, {classes})"
        raise IndexError(wrong(NAME, rule, int(got), "ignore_index leaves positions out"))
