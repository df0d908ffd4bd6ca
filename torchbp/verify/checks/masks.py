"""Masks: the gradient is right where a boolean input keeps other elements than in the sample.

A sample whose mask keeps everything hides a count of all elements where that of the kept ones is due.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts

NAME = "masks"


def _run(case: Case) -> Iterator[Finding]:
    masks = [i for i, t in case.arguments if t.dtype == torch.bool and t.numel() > 1]
    if not masks:
        raise NotApplicable("no boolean input")
    generator = case.generator(NAME)
    others = {
        "half of the mask is flipped": lambda t: _half_flipped(t, generator),
        "the mask keeps nothing": torch.zeros_like,
    }
    tested = False
    for when, change in others.items():
        other = case.edited(lambda i, t, change=change: change(t) if i in masks else t)
        if not accepts(other):
            continue
        tested = True
        found = check_lines(other, NAME, f" where {when}")
        if found:
            yield found
            return
    if not tested:
        raise NotApplicable("forward takes no other mask")


def _half_flipped(mask: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(mask.numel(), generator=generator)
    flat = mask.clone().reshape(-1)
    flat[order[: mask.numel() // 2]] ^= True
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
