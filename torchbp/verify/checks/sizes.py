"""Sizes beyond the sample: block boundaries, where kernels handle the last partial block."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from torchbp.verify._check import Check, NotApplicable, Refused
from torchbp.verify.cases import Case
from torchbp.verify.lines import check_lines
from torchbp.verify.raised import BackwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.resize import FACTORS, accepts, fits, free_sizes, one_more, resized, scaled
from torchbp.verify.tolerance import largest

NAME = "sizes"
TRIES = 2
# Each row is one run: the new size of the first, second and third dimension that can change.
RUNS = ((1025, 31, 2), (33, 1025, 3), (127, 129, 4), (1, 1, 1), (32, 128, 33), (64, 192, 5))
# This row is run at another scale at once, which saves calls. The other factor is left to `scales`, at the sample's own
# sizes: that finds what is kept from call to call by size.
SCALED = {RUNS[-1]: FACTORS[0]}
LARGEST = 2**16  # elements
EXPLODES = 1e12  # times


def _run(case: Case) -> Iterator[Finding]:
    free = free_sizes(case)
    if not free:
        raise NotApplicable("no dimension can change")
    for other, factor in chain(((c, 1.0) for c in one_more(case)), _runs(case, free)):
        when = f" at shapes {', '.join(str(tuple(t.shape)) for _, t in other.arguments)}"
        try:
            found = check_lines(other, NAME, f"{when}{_times(factor)}")
            if found and factor != 1:  # is it the size or the scale?
                same = scaled(other, 1 / factor)
                found = (accepts(same) and check_lines(same, NAME, when)) or found
        except BackwardRaised as error:
            raise Refused(f"{when[1:]} backward raises {error}") from error
        if found:
            yield replace(found, severity="note") if _explodes(case, other) else found
            return
        case.memo.setdefault("scaled", set()).add(factor)


def _explodes(case: Case, other: Case) -> bool:
    """Whether outputs are so much larger than the sample's that they are out of its domain: a product of hundreds."""
    size = 1 + max(map(largest, case.all_outputs))
    return max(map(largest, other.all_outputs)) > EXPLODES * size


def _times(factor: float) -> str:
    return f", for inputs {factor:g} times as large" if factor != 1 else ""


def _runs(case: Case, free: list[int]) -> Iterator[tuple[Case, float]]:
    indexed = any(not (t.is_floating_point() or t.is_complex()) for _, t in case.arguments)
    ran = False
    for row in RUNS:
        sizes = dict(zip(free, row, strict=False))
        if indexed and any(new < old for old, new in sizes.items()):
            continue  # an index may point at what is gone
        factors = (SCALED.get(row, 1.0), 1.0) if ran else (1.0,)
        for factor in dict.fromkeys(factors):
            other = _largest_that_runs(case, sizes, factor)
            if other is not None:
                ran = True
                yield other, factor
                break


def _largest_that_runs(case: Case, sizes: dict[int, int], factor: float) -> Case | None:
    """Return the case at these sizes; where that is too large, or refused, at as many of them as will do."""
    names = list(sizes)
    choices = [names, names[1:], names[:-1], names[:1]]
    tries = 0
    for chosen in filter(None, choices[: 1 if len(names) == 1 else None]):
        part = {n: sizes[n] for n in chosen}
        if tries < TRIES and fits(case, part, LARGEST):
            tries += 1
            other = scaled(resized(case, part), factor)
            if accepts(other) and any(y.numel() for y in other.all_outputs):
                return other
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
