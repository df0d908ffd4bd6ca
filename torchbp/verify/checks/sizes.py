"""Sizes beyond the sample: block boundaries, where kernels handle the last partial block; what is equal made unequal."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torchbp.verify._check import Check, NotApplicable, Refused
from torchbp.verify.cases import Case
from torchbp.verify.lines import check_lines
from torchbp.verify.raised import BackwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.resize import (
    Size,
    accepts,
    explodes,
    fits,
    free_sizes,
    one_more,
    resized,
    scaled,
    uneven,
)

NAME = "sizes"
TRIES = 2
# Each row is one run: the new sizes of the dimensions that can change, in their order.
RUNS = (
    (1025, 31, 2, 3, 5),
    (33, 1025, 3, 2, 4),
    (127, 129, 4, 5, 2),
    (1, 1, 1, 1, 1),
    (32, 128, 33, 3, 2),
    (64, 192, 5, 2, 3),
)
# Two rows are run at other scales at once, which saves calls.
SCALED = {RUNS[5]: 2.0**-10}
UNEVEN = RUNS[4]
LARGEST = 2**16  # elements
EXPLODES = 1e14  # times, and the root of that where the size alone is another


@dataclass(frozen=True)
class Run:
    """A case at other sizes, and perhaps scales; ``plain`` is at the sizes alone, to tell which of them it is."""

    case: Case
    plain: Case
    scale: str = ""


def _run(case: Case) -> Iterator[Finding]:
    free = free_sizes(case)
    if not free:
        raise NotApplicable("no dimension can change")
    for run in (*(Run(c, c) for c in one_more(case)), *_runs(case, free)):
        other = run.case
        when = f" at shapes {', '.join(str(tuple(t.shape)) for _, t in other.arguments)}"
        try:
            found = check_lines(other, NAME, when + run.scale)
            if found and run.scale and accepts(run.plain):
                found = check_lines(run.plain, NAME, when) or found
        except BackwardRaised as error:
            raise Refused(f"{when[1:]} backward raises {error}") from error
        if found:
            out = explodes(case, other, EXPLODES if run.scale else EXPLODES**0.5)
            yield replace(found, severity="note") if out else found
            return


def _runs(case: Case, free: list[Size]) -> Iterator[Run]:
    indexed = any(not (t.is_floating_point() or t.is_complex()) for _, t in case.arguments)
    ran = False
    for row in RUNS:
        sizes = {size: size.near(n) for size, n in zip(free, row, strict=False)}
        if indexed and any(new < size.now for size, new in sizes.items()):
            continue  # an index may point at what is gone
        run = None
        if ran and row in SCALED:
            run = _largest_that_runs(case, sizes, SCALED[row])
            if run:
                case.memo.setdefault("scaled", set()).add(SCALED[row])
        elif ran and row == UNEVEN:
            run = _largest_that_runs(case, sizes, None)
        run = run or _largest_that_runs(case, sizes)
        if run:
            ran = True
            yield run


def _largest_that_runs(
    case: Case, sizes: dict[Size, int], factor: float | None = 1.0
) -> Run | None:
    """Return the case at these sizes; where that is too large, or refused, at as many of them as will do.

    Inputs are ``factor`` times as large; ``None`` makes their slices unequal.
    """
    names = list(sizes)
    choices = [names, names[1:], names[:-1], names[:1]]
    tries = 0
    for chosen in filter(None, choices[: 1 if len(names) == 1 else None]):
        part = {n: sizes[n] for n in chosen}
        if tries < TRIES and fits(case, part, LARGEST):
            tries += 1
            plain = resized(case, part)
            if factor is None:
                run = Run(uneven(plain, chosen[0]), plain, ", for slices of very unequal magnitude")
            else:
                times = f", for inputs {factor:g} times as large" if factor != 1 else ""
                run = Run(scaled(plain, factor), plain, times)
            if accepts(run.case) and any(y.numel() for y in run.case.all_outputs):
                return run
    return None


CHECK = Check(
    name=NAME,
    tests="the gradient is right at other sizes: one more, 1, 31, 32, 33, 64, 127, 128, 129, 192, 1025",
    run=_run,
    order=80,
    needs=("same values",),
    level="full",
    differences=True,
)
