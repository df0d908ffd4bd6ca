"""Ignored index: where forward takes a target of -100, torch's default `ignore_index`, backward ignores it too."""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable, Refused
from torchbp.verify.cases import Case
from torchbp.verify.lines import check_lines
from torchbp.verify.raised import BackwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts

NAME = "ignored_index"
IGNORED = -100  # torch.nn.functional.cross_entropy, nll_loss


def _run(case: Case) -> Iterator[Finding]:
    labels = [i for i, t in case.arguments if t.dtype == torch.int64 and t.numel() > 1]
    if not labels:
        raise NotApplicable("no integer input")
    if not case.steady:
        raise NotApplicable("forward gives other values each time it is called")
    if any(t.device.type != "cpu" for t in case.leaves):
        raise NotApplicable("a wild index ends the process on this device")
    tested = False
    for i in labels:
        other = case.edited(lambda j, t, i=i: _ignore(t) if j == i else t)
        if not accepts(other):
            continue
        tested = True
        try:
            found = check_lines(other, NAME, f" where a target is {IGNORED}", number=2)
        except BackwardRaised as error:
            raise Refused(
                f"forward takes a target of {IGNORED}, backward raises {error}"
            ) from error
        if found:
            yield found
    if not tested:
        raise NotApplicable(f"forward takes no {IGNORED}")


def _ignore(t: Tensor) -> Tensor:
    t = t.clone()
    t.view(-1)[0] = IGNORED
    return t


CHECK = Check(
    name=NAME,
    tests="a target of -100, where forward takes it, is ignored in backward too",
    run=_run,
    order=83,
    level="full",
    differences=True,
)
