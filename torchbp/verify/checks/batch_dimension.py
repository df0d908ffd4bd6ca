"""One leading dimension more, or less: sequences of tokens instead of rows, one row, where forward takes them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable, Refused
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.growth import elementwise
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts

NAME = "batch_dimension"


def _run(case: Case) -> Iterator[Finding]:
    arguments = case.arguments
    sizes = [t.shape[0] for _, t in arguments if t.dim()]
    if not sizes:
        raise NotApplicable("no dimension in the sample")
    every = [i for i, _ in arguments]
    rows = [i for i, t in arguments if t.dim() and t.shape[0] == sizes[0]]
    first = every[:1]
    tested = False
    single = case.edited(lambda i, t: t[0] if i in rows and len(t) else t)
    fewer = case.leaves[0].dim() > 1 and not elementwise(case)
    if fewer and accepts(single) and _is_first(case, single):
        tested = True
        found = check_lines(single, NAME, " with a dimension less", elsewhere=False)
        if found and found.got is not None:
            yield found
            return
    for chosen in dict.fromkeys(map(tuple, (rows, every, first))):
        other = case.edited(lambda i, t, chosen=chosen: _stack(t) if i in chosen else t)
        rolled = case.edited(lambda i, t, chosen=chosen: _rolled(t) if i in chosen else t)
        if not accepts(other) or not accepts(rolled) or not _means_a_batch(other, case, rolled):
            continue
        tested = True
        for batch in (other, *_beyond(case, other, chosen)):
            shapes = ", ".join(str(tuple(t.shape)) for _, t in batch.arguments)
            when = f" with a leading dimension more, at shapes {shapes}"
            found = check_lines(batch, NAME, when, elsewhere=False)
            if found and found.got is None:
                raise Refused(found.message)
            if found:
                yield found
                return
        break
    if not tested:
        raise NotApplicable("forward takes no further dimension, or not as a batch")


def _is_first(case: Case, single: Case) -> bool:
    """Whether forward makes of the first row what stands first in what it makes of all."""
    pairs = list(zip(case.all_outputs, single.all_outputs, strict=False))
    return bool(pairs) and all(
        y.shape[1:] == one.shape
        and y.dim() > one.dim()
        and len(y) > 0
        and torch.allclose(y[0], one, rtol=1e-6, atol=1e-9)
        for y, one in pairs
    )


def _beyond(case: Case, other: Case, chosen: tuple[int, ...]) -> list[Case]:
    """Return a batch of batches of one row only, where that is taken: a dimension of 1 may be squeezed away."""
    if elementwise(case):
        return []
    single = other.edited(lambda i, t: t[:, :1] if i in chosen and t.dim() > 1 else t)
    for base in (single, other):
        twice = base.edited(lambda i, t: _stack(t) if i in chosen else t)
        if accepts(twice):
            return [twice]
    return [single] if accepts(single) else []


def _stack(t: Tensor) -> Tensor:
    return torch.stack([t, _rolled(t)])


def _rolled(t: Tensor) -> Tensor:
    return t.roll(1, 0) if t.dim() else t


def _means_a_batch(both: Case, one: Case, other: Case) -> bool:
    """Whether forward makes of a batch what it makes of its samples: their stack, sum or mean."""
    for y, a, b in zip(both.all_outputs, one.all_outputs, other.all_outputs, strict=True):
        wanted = [torch.stack([a, b]), a + b, 0.5 * (a + b)]
        if not any(
            y.shape == w.shape and torch.allclose(y, w.to(y), rtol=1e-6, atol=1e-9) for w in wanted
        ):
            return False
    return True


CHECK = Check(
    name=NAME,
    tests="the gradient is right with a leading dimension more, or less",
    run=_run,
    order=81,
    needs=("same values",),
    level="full",
    differences=True,
)
