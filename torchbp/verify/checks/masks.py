"""Masks: the gradient is right where a boolean input keeps other elements than in the sample.

A sample whose mask keeps everything hides a count of all elements where that of the kept ones is due. What a mask takes
out may be anything: where forward is the same, the gradient must be finite.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.finite import not_finite
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts, same_outputs

__all__ = ["CHECK", "is_mask"]

NAME = "masks"
FAR = 1e4
UNWRITTEN = "what the mask takes out is NaN"


def _run(case: Case) -> Iterator[Finding]:
    masks = [i for i, t in case.arguments if i not in case.where and is_mask(t)]
    if not masks:
        raise NotApplicable("no mask")
    generator = case.generator(NAME)
    flipped = case.edited(lambda i, t: _half_flipped(t, generator) if i in masks else t)
    tries = {
        "half of the mask is flipped": flipped,
        "rows of the mask keep nothing, or all": _changed(flipped, masks, _rows_alike),
        "the mask keeps nothing": _changed(case, masks, torch.zeros_like),
    }
    if hidden := _hidden(case, flipped, masks):
        tries["what the mask takes out is 0 or 10000"] = hidden.far
        tries[UNWRITTEN] = hidden.unwritten
    if not accepts(flipped):
        tries["one less of each row is kept"] = _changed(case, masks, _one_less)
    tested = False
    for when, other in tries.items():
        if other is None or not accepts(other):
            continue
        tested = True
        found = not_finite(other, NAME, f" where {when}")
        if not found and when != UNWRITTEN:  # no line goes through NaN
            found = check_lines(other, NAME, f" where {when}")
        if found:
            yield found
            return
    if not tested:
        raise NotApplicable("forward takes no other mask")


def is_mask(t: Tensor) -> bool:
    """Whether t holds truth values, perhaps as numbers: a mask of floating-point zeros and ones."""
    if t.dtype == torch.bool:
        return t.numel() > 0
    if t.numel() < 2:
        return False
    kind = t.is_floating_point() or t.dtype == torch.uint8
    return kind and bool(((t == 0) | (t == 1)).all()) and bool((t == 1).any())


def _changed(case: Case, masks: list[int], change: Callable[[Tensor], Tensor]) -> Case:
    return case.edited(lambda i, t: change(t) if i in masks else t)


class _Hidden(NamedTuple):
    """The case with other values where forward does not look at them: zeros and large ones, or what is no number."""

    far: Case
    unwritten: Case


def _hidden(case: Case, flipped: Case, masks: list[int]) -> _Hidden | None:
    """Return the case with other values behind a mask of the input's shape."""
    for base in (case, flipped):
        for i in masks:
            mask = base.flat[i] != 0
            for k in (
                k for k, t in zip(base.where, base.leaves, strict=True) if t.shape == mask.shape
            ):
                for hidden in (~mask, mask):
                    count = hidden.reshape(-1).cumsum(0).view(hidden.shape)
                    other = _behind(base, k, hidden, torch.where(count % 2 == 0, FAR, 0.0))
                    if (
                        hidden.any()
                        and not hidden.all()
                        and accepts(other)
                        and same_outputs(base, other)
                    ):
                        nothing = torch.full(hidden.shape, torch.nan)
                        return _Hidden(other, _behind(base, k, hidden, nothing))
    return None


def _behind(case: Case, which: int, hidden: Tensor, values: Tensor) -> Case:
    return case.edited(lambda i, t: torch.where(hidden, values.to(t), t) if i == which else t)


def _rows_alike(mask: Tensor) -> Tensor:
    if mask.dim() < 2:
        return mask
    mask = mask.clone()
    mask[0], mask[-1] = 0, 1
    return mask


def _one_less(mask: Tensor) -> Tensor:
    """Return the mask without the first of each row's that it keeps, where there are others."""
    kept = mask != 0
    first = kept & (kept.cumsum(-1) == 1) if mask.dim() else ~kept
    several = kept.sum(-1, keepdim=True) > 1 if mask.dim() else kept
    return torch.where(first & several, torch.zeros_like(mask), mask)


def _half_flipped(mask: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(mask.numel(), generator=generator, device="cpu")
    flat = mask.clone().reshape(-1)
    chosen = order[: max(1, mask.numel() // 2)]
    flat[chosen] = (flat[chosen] == 0).to(flat.dtype)
    return flat.view(mask.shape)


CHECK = Check(
    name=NAME,
    tests="the gradient is right with another mask",
    run=_run,
    order=83,
    needs=("same values",),
    level="full",
    differences=True,
)
