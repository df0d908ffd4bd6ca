"""Pairing: the gradient is right where inputs meet others than in the sample: rows of one other rows, two exchanged.

Boxes that all overlap, hinges that are all active, anchors that are all nearer to their positives hide the other
branch. Each row, and each input, is still one of the sample's.
"""

from collections.abc import Callable, Iterator
from functools import reduce

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.checks.indices import REORDERED
from torchbp.verify.depends import elementwise
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts

NAME = "pairing"
PAIRED = "a sample of another size was right with its inputs paired otherwise"


def _run(case: Case) -> Iterator[Finding]:
    if PAIRED in case.memo:
        return  # right in all ways at once, at another size
    ways = dict(_ways(case))
    every = paired(case, case)
    if len(ways) > 1 and accepts(every) and not check_lines(every, NAME):
        return  # right in all ways at once: each alone leaves no question
    tested = False
    for when, change in ways.items():
        other = change(case)
        if not accepts(other):
            continue
        tested = True
        found = check_lines(other, NAME, f" where {when}")
        if found:
            yield found
            return
    if not tested:
        raise NotApplicable("no two inputs that may be paired otherwise")


def paired(case: Case, other: Case) -> Case:
    """Return another sample of the case with its inputs paired in all other ways at once; itself for none."""
    return reduce(lambda c, change: change(c), dict(_ways(case)).values(), other)


def _ways(case: Case) -> Iterator[tuple[str, Callable[[Case], Case]]]:
    inputs = [i for i in case.where if i < case.size]
    others = [t for i, t in case.arguments if i not in case.where and t.is_floating_point()]
    if len(elementwise(case)) == len(case.leaves) and not others:
        return
    first = next((i for i in inputs if case.flat[i].dim() and len(case.flat[i]) > 1), None)
    if first is not None:
        rows = len(case.flat[first])
        partners = {i for i, t in case.arguments if i != first and t.shape[:1] == (rows,)}
        if partners - case.memo.get(REORDERED, set()):  # else rows met others already
            yield (
                f"the rows of {case.name_at[first]} are moved on by one",
                lambda c: c.edited(lambda i, t: t.roll(1, 0) if i == first else t),
            )
    pairs = [(i, j) for i in inputs for j in inputs if i < j]
    # Sets of points, of one number or not.
    alike = [(i, j) for n in (0, 1) for i, j in pairs if _same_shape(case, i, j, n)]
    for i, j in alike[:1]:
        yield (
            f"{case.name_at[i]} and {case.name_at[j]} are exchanged",
            lambda c, i=i, j=j: c.edited({i: c.flat[j], j: c.flat[i]}.get),
        )


def _same_shape(case: Case, i: int, j: int, first: int) -> bool:
    """Whether two inputs have one shape, but for the ``first`` dimensions."""
    a, b = case.flat[i], case.flat[j]
    alike = a.dim() == b.dim() > first and a.shape[first:] == b.shape[first:]
    return alike and a.dtype == b.dtype and a.numel() > 1


CHECK = Check(
    name=NAME,
    tests="the gradient is right where rows of one input meet other rows, and two inputs are exchanged",
    run=_run,
    order=83,
    needs=("same values",),
    level="full",
    differences=True,
)
