"""Ignored index: where forward takes a target of -100, torch's default `ignore_index`, or -1, backward does so too.

Where -1 is a label it is 0.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable, Refused
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts
from torchbp.verify.tensors import graph

NAME = "ignored_index"
UNCHECKED = ("CtcLossBackward",)  # torch 2.13: backward writes where a negative target points
IGNORED = (-100, -1)  # the default of torch.nn.functional.cross_entropy; what many use instead


def _run(case: Case) -> Iterator[Finding]:
    labels = _labels(case)
    tested, taken = False, set()
    for i, ignored in product(labels, IGNORED):
        if ignored == -1 and bool((case.flat[i] == -1).any()):
            ignored = 0  # noqa: PLW2901  # of labels 1 and -1
        elif i in taken:
            continue  # what ignores -100 ignores all that is negative, or that number alone
        for what, change in (("a target is", _first), ("all targets are", torch.full_like)):
            other = case.edited(
                lambda j, t, i=i, to=ignored, change=change: change(t, to) if j == i else t
            )
            if not accepts(other):
                break
            tested = True
            taken.add(i)
            found = check_lines(other, NAME, f" where {what} {ignored}")
            if found and found.got is None:  # backward raised: loud enough
                raise Refused(f"forward takes a target of {ignored}: {found.message}")
            if found:
                yield found
                return
    if not tested:
        raise NotApplicable("forward takes no -100 or -1")


def _labels(case: Case) -> list[int]:
    """Return which inputs may be labels."""
    labels = [i for i, t in case.arguments if t.dtype == torch.int64 and t.numel() > 1]
    if not labels:
        raise NotApplicable("no integer input")
    if any(node.name().startswith(UNCHECKED) for node in graph(case.kept[1])):
        raise NotApplicable(
            "ctc_loss of torch looks at no target: it would write where that points"
        )
    return labels


def _first(t: Tensor, value: int) -> Tensor:
    t = t.clone()
    t.view(-1)[0] = value
    return t


CHECK = Check(
    name=NAME,
    tests="a target of -100 or -1, where forward takes it, is treated alike in backward",
    run=_run,
    order=83,
    needs=("same values",),
    level="full",
    differences=True,
)
