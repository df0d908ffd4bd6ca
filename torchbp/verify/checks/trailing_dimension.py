"""One trailing dimension more: images instead of sequences, where channels stand second and forward takes both.

Forward takes it as such where its outputs have it too.
"""

import re
from collections.abc import Iterator

import torch

from torchbp.verify._check import Check, NotApplicable, Refused
from torchbp.verify.cases import Case
from torchbp.verify.depends import elementwise
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.raised import SHAPE
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts
from torchbp.verify.source import speaks

NAME = "trailing_dimension"
DIMENSIONS = re.compile(r"\.ndim\b|\.dim\(\)")


def _run(case: Case) -> Iterator[Finding]:
    if len(elementwise(case)) == len(case.leaves):
        raise NotApplicable("works element by element")
    chosen = _chosen(case)
    if not chosen:
        raise NotApplicable("no input of two dimensions")
    if not any(y.dim() for y in case.all_outputs):
        raise NotApplicable("the outputs have no dimension")
    other = case.edited(lambda i, t: torch.stack([t, t.roll(1, 0)], -1) if i in chosen else t)
    if not accepts(other) or not _has_it(case, other):
        raise NotApplicable("forward takes no further dimension, or not as one more place")
    found = check_lines(
        other, NAME, f" with a trailing dimension more, at shapes {other.shapes}", elsewhere=False
    )
    meant = found and SHAPE in found.message and speaks(case, DIMENSIONS)
    if found and found.got is None and not meant:
        raise Refused(found.message)
    if found:
        yield found


def _chosen(case: Case) -> list[int]:
    """Return the inputs of the most dimensions."""
    most = max(t.dim() for _, t in case.arguments)
    return [i for i, t in case.arguments if t.dim() == most > 1]


def _has_it(case: Case, other: Case) -> bool:
    pairs = zip(case.all_outputs, other.all_outputs, strict=False)
    return all(y.shape == (*one.shape, 2) for one, y in pairs)


CHECK = Check(
    name=NAME,
    tests="the gradient is right with a trailing dimension more",
    run=_run,
    order=81,
    needs=("same values",),
    level="full",
    differences=True,
)
