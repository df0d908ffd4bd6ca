"""Probabilities: the gradient is right where a target holds a probability a class, in the place of the class's number.

A loss that takes both has two backwards, and a sample shows one of them. Forward takes the probabilities as such where
it makes of those that are 0 and 1 what it makes of the numbers.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable, Refused
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts
from torchbp.verify.tensors import uniform

NAME = "probabilities"
KINDS = (torch.int64, torch.int32)


def _run(case: Case) -> Iterator[Finding]:
    for i, dim in _targets(case):
        other = _asking(case.replaced({i: _drawn(case, dim)}), i)
        if not accepts(other):
            continue
        shape = tuple(other.flat[i].shape)
        found = check_lines(
            other, NAME, f" where {case.name_at[i]} holds probabilities, of shape {shape}"
        )
        if found and found.got is None:  # backward raised: loud enough
            raise Refused(f"forward takes probabilities: {found.message}")
        if found and _meant(case, i, dim):
            yield found
        return
    raise NotApplicable("no integer target whose place probabilities may take")


def _targets(case: Case) -> Iterator[tuple[int, int]]:
    """Yield the integer inputs that have the first input's shape but for one dimension, and which that is."""
    shape = case.leaves[0].shape
    for i, t in case.arguments:
        if t.dtype in KINDS and t.numel():
            for dim in dict.fromkeys((min(1, len(shape) - 1), len(shape) - 1)):
                if shape and t.shape == shape[:dim] + shape[dim + 1 :]:
                    yield i, dim


def _drawn(case: Case, dim: int) -> Tensor:
    first = case.leaves[0]
    r = uniform(first.shape, case.generator(NAME)) + 0.1
    return (r / r.sum(dim, keepdim=True)).to(device=first.device, dtype=first.real.dtype)


def _asking(case: Case, position: int) -> Case:
    """Return the case that asks for the gradient of the probabilities too, where there is one."""
    asking = case.asking([position])
    try:
        given = bool(asking.plain.grads[asking.where.index(position)].any())
    except (ForwardRaised, BackwardRaised):
        return case
    return asking if given else case


def _meant(case: Case, position: int, dim: int) -> bool:
    """Whether forward takes a probability of 1 as it takes the number of the class."""
    classes = case.flat[position].long()
    count = case.leaves[0].shape[dim]
    if not bool(((classes >= 0) & (classes < count)).all()):
        return False
    certain = F.one_hot(classes, count).movedim(-1, dim).to(case.leaves[0].real.dtype)
    other = case.replaced({position: certain})
    pairs = zip(case.all_outputs, other.all_outputs, strict=False) if accepts(other) else ()
    alike = [a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in pairs]
    return bool(alike) and all(alike)


CHECK = Check(
    name=NAME,
    tests="the gradient is right for a target of probabilities, where forward takes it instead of class numbers",
    run=_run,
    order=83,
    needs=("same values",),
    level="full",
    differences=True,
)
