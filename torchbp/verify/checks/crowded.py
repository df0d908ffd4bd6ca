"""Crowded: the gradient is right where all elements of an input lie close together, in one bin, cell or interval.

Elements that fall into different ones hide a backward that overwrites where it should add. Only where the source speaks
of such: a search among edges, a floor, numbers made into indices.
"""

import re
from collections.abc import Iterator

from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts
from torchbp.verify.source import speaks

NAME = "crowded"
SPEAKS = re.compile(
    r"searchsorted|bucketize|histc|\.floor\(|\.trunc\(|\.long\(|\.int\(|torch\.int|torch\.long"
)
CLOSE = 2.0**-6  # times the distances of the sample
MOST = 3  # inputs


def _run(case: Case) -> Iterator[Finding]:
    inputs = [
        (i, name)
        for i, leaf, name in zip(case.where, case.leaves, case.names, strict=True)
        if i < case.size and leaf.numel() > 1 and not leaf.is_complex()
    ]
    tested = False
    for i, name in inputs[:MOST] if speaks(case, SPEAKS) else ():
        other = case.edited(lambda k, t, i=i: _together(t) if k == i else t)
        if accepts(other):
            tested = True
            found = check_lines(other, NAME, f" where all of {name} lies close together")
            if found:
                yield found
                return
    if not tested:
        raise NotApplicable("nothing is put into bins, cells or intervals")


def _together(t: Tensor) -> Tensor:
    """Return t about the median of each coordinate, the last dimension of several."""
    middle = t.reshape(-1, t.shape[-1]).median(0).values if t.dim() > 1 else t.median()
    return middle + CLOSE * (t - middle)


CHECK = Check(
    name=NAME,
    tests="the gradient is right where all of an input lies in one bin, cell or interval",
    run=_run,
    order=83,
    needs=("no random numbers", "same values"),
    level="full",
    differences=True,
)
