"""One more leading dimension: sequences of tokens instead of rows, where forward takes them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.lines import check_lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts

NAME = "batch_dimension"


def _run(case: Case) -> Iterator[Finding]:
    if not case.steady:
        raise NotApplicable("forward gives other values each time it is called")
    arguments = case.arguments
    sizes = [t.shape[0] for _, t in arguments if t.dim()]
    if not sizes:
        raise NotApplicable("no dimension in the sample")
    every = [i for i, _ in arguments]
    rows = [i for i, t in arguments if t.dim() and t.shape[0] == sizes[0]]
    first = every[:1]
    tested = False
    for chosen in dict.fromkeys(map(tuple, (rows, every, first))):
        other = case.edited(lambda i, t, chosen=chosen: _stack(t) if i in chosen else t)
        if not accepts(other):
            continue
        tested = True
        shapes = ", ".join(str(tuple(t.shape)) for _, t in other.arguments)
        found = check_lines(other, NAME, f" with a leading dimension more, at shapes {shapes}")
        if found:
            yield found
            return
        break
    if not tested:
        raise NotApplicable("forward takes no further dimension")


def _stack(t: Tensor) -> Tensor:
    return torch.stack([t, t.roll(1, 0) if t.dim() else t])


CHECK = Check(
    name=NAME,
    tests="the gradient is right with a leading dimension more",
    run=_run,
    order=81,
    level="full",
)
