"""Sizes beyond the sample: block boundaries, the last partial block; equal ones made unequal; dimensions more."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, combinations, product
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable, Refused
from torchbp.verify.afterwards import afterwards
from torchbp.verify.cases import Case
from torchbp.verify.checks.indices import KINDS, KNOWN, equal, extreme, note_order, with_integers
from torchbp.verify.checks.pairing import PAIRED, paired
from torchbp.verify.depends import elementwise
from torchbp.verify.dimensions import wider
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.growth import (
    LARGER,
    REFUSES,
    fits,
    free_sizes,
    one_more,
    tie,
    without_numbers,
)
from torchbp.verify.raised import SHAPE, BackwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.resize import (
    APART,
    Size,
    accepts,
    apart,
    broadcast,
    explodes,
    is_indexed,
    one_for_all,
    resized,
    runs,
    scaled,
    uneven,
)
from torchbp.verify.smooth import right_soon
from torchbp.verify.source import speaks

NAME = "sizes"
TRIES = 2
GROUPED = 4  # a size that may hold several groups,
GROUPS = re.compile(r"-\(-|ceil|// *\w")  # of which the last need not be full
BLOCK = 33  # which every size reaches at least, where that can be;
EIGHTS = 40  # instead, where it was small and odd in a row: full vectors
OTHERS = 1 / APART  # beside which what else there is is larger
FEW = 2
PLANE = 2  # sizes that fit as they are, however large
FAR = 1.0  # by how much rows that are repeated may be moved, in parts of themselves
LARGEST = 2**16  # elements
FEWER = 257  # rows, where 2053 or 1025 are too many for what forward makes of them
STOPPED = "elements of the inputs with which a call did too much"
OUTSIDE = "out of bounds"  # what is said of an index, of a table of one
EXPLODES = 1e14  # times, and the root of that where the size alone is another


Place = tuple[int, int]  # position in flat, dimension
Pair = tuple[Place, Place]


class Varied(NamedTuple):
    """What is another in a row too, which saves calls of the check that asks for it.

    Attributes:
        change: Makes the sample of the one at the row's sizes; told the user's case first.
        right: Notes for that check that it was right.
    """

    change: Callable[[Case, Case], Case]
    right: Callable[[Case, "Run"], None]


class Row(NamedTuple):
    """New sizes of the dimensions that can change, in their order: one run.

    Attributes:
        few: Of one or two sizes. None of them, where what they are is in another row too.
        many: Of more, which have to fit together.
        factor: The scale of the inputs there, which saves calls; at 0 slices are of very unequal magnitude.
        together: Whether what is equal in the sample stays so.
        varied: What is another there too. Not at other scales, where much is saturated.
    """

    few: tuple[int, ...]
    many: tuple[int, ...]
    factor: float = 1.0
    together: bool = False
    varied: Varied | None = None


def _paired_too(case: Case, plain: Case) -> Case:
    return _reaching(case, with_integers(paired(case, plain), equal))


def _note_paired(case: Case, run: "Run") -> None:
    if paired(case, run.plain) is not run.plain:
        case.memo[PAIRED] = True
    case.memo.setdefault(KNOWN, set()).add(equal)


def _extreme_too(case: Case, plain: Case) -> Case:
    return _reaching(case, with_integers(plain, extreme))


def _reaching(case: Case, larger: Case) -> Case:
    """Return the largest of the integers as large as a table that has more rows now lets them be."""

    def reaching(i: int, t: Tensor) -> Tensor:
        given = case.flat[i]
        most = int(given.max()) if given.dtype in KINDS and given.numel() else 0
        rows = [
            (was, now)
            for k, leaf in case.arguments
            for was, now in zip(leaf.shape, larger.flat[k].shape, strict=True)
            if leaf.is_floating_point() and most < was < now
        ]
        return torch.where(t == t.max(), min(rows)[1] - 1, t) if most and rows else t

    return larger.edited(reaching)


def _reaches(case: Case, other: Case) -> bool:
    """Whether an integer is larger there than in the sample."""
    return any(
        bool(other.flat[i].max() > t.max())
        for i, t in case.arguments
        if t.dtype in KINDS and t.numel()
    )


def _note_order(case: Case, run: "Run") -> None:
    case.memo.setdefault(KNOWN, set()).add(extreme)
    note_order(case, run.plain, run.case)


ROWS = (
    Row((2053, 31), (2053, 5, 3, 2), together=True, varied=Varied(_paired_too, _note_paired)),
    Row(
        (33, 1025),
        (3, 1025, 4, 5),
        varied=Varied(_extreme_too, _note_order),
    ),
    Row((127, 129), (127, 2, 129, 2), factor=-(2.0**10), together=True),
    Row((), (32, 33, 31, 2), factor=2.0**-10),
    Row((64, 192), (2, 192, 64, 2), factor=0.0, together=True),
)
BESIDE = ROWS[1]  # where of several inputs every other one is larger
# One row, or one column: what is squeezed away, or broadcast, where others are more. If these are right, all 1 is, too.
SINGLE = tuple(Row(row[:PLANE], row) for row in ((1, 3, 1, 4, 1), (3, 1, 4, 1, 2)))
ONES = Row((1, 1), (1, 1, 1, 1, 1))


@dataclass(frozen=True)
class Run:
    """A case at other sizes, and perhaps scales; ``plain`` is at the sizes alone, to tell which of them it is."""

    case: Case
    plain: Case
    scale: str = ""
    near: bool = False
    beyond: bool = False  # whether to look at forward mode and second derivatives there
    chance: bool = False  # whether forward may take it by chance all the same
    varied: Varied | None = None  # what it tells another check, if it is right
    unless: Case | None = (
        None  # where that is wrong too, it is so whatever the sizes: for another check to say
    )


def _run(case: Case) -> Iterator[Finding]:
    free = free_sizes(case)
    if not free:
        raise NotApplicable("no dimension can change")
    refused: list[str] = []
    nearby = _nearby(case, free)
    stay: list[Size] = []  # which backward refuses to be another, alone
    parted: list[set[Pair]] = []  # by larger runs
    later = [run for run in nearby[1:] if _may_wait(case, run)]
    nearby = [run for run in nearby if run not in later]
    larger = chain(_runs(case, free, parted, stay, refused), _alone(case, free, refused, stay))
    for run in chain(nearby, larger, _not_yet(case, later, parted)):
        other, found = run.case, _wrong_at(case, run)
        if found and found.got is None:  # backward raised: sizes that do not go together, perhaps
            shape = SHAPE in found.message and _of_one_shape(case) and _of_one_shape(other)
            shape = shape and not run.chance
            if shape or (_all_one(run.plain) and OUTSIDE not in found.message):
                yield found
                return
            if not run.chance:
                refused.append(found.message)
                alone = free if run in nearby else []
                stay += [size for size in alone if _is_alone(case, run.plain, size)]
            continue
        if found and _is_overwritten(case, other, found) and tie(case):
            yield from _run(case)
            return
        if found:
            # Else it is so of the sizes alone.
            scaled = bool(run.scale) and run.scale in found.message
            there, times = (other, EXPLODES) if scaled else (run.plain, EXPLODES**0.5)
            out = explodes(case, there, times)
            yield replace(found, severity="note") if out else found
            return
    yield from afterwards(case, NAME, "sizes")
    if refused:
        raise Refused(refused[0])


def _nearby(case: Case, free: list[Size]) -> list[Run]:
    """Return runs at about the sample's sizes, one of them with inputs of which every other one is larger."""
    nearby = [
        *(Run(c, c, near=True, beyond=True) for c in broadcast(case)),
        *(Run(c, c, near=True, chance=True) for c in (*one_for_all(case), *wider(case))),
        *(Run(c, c, near=True, beyond=True) for c in one_more(case)),
    ]
    alike = _as_what_stays(case, free)
    if alike:  # one more alone is no other case, then
        nearby = [alike, *(run for run in nearby if run.chance or _parted(case, run.plain))]
    if nearby:
        seen = [k for k, run in enumerate(nearby) if run.plain is case.memo.get(LARGER)]
        k = seen[0] if seen else -1
        nearby[k] = _apart(case, nearby[k])
    return nearby


def _as_what_stays(case: Case, free: list[Size]) -> Run | None:
    """Return what may change as large as what may not, if forward takes that: as many points as coordinates."""
    taken = {(i, d) for size in free for i, d, _ in size.places}
    places = [(n, (i, d)) for i, t in case.arguments for d, n in enumerate(t.shape)]
    stay = [n for n, place in places if n > 1 and place not in taken]
    indexed = is_indexed(case)
    sizes = {s: stay[0] for s in free if stay and s.near(stay[0]) == stay[0] != s.now}
    if not sizes or (indexed and any(n < s.now for s, n in sizes.items())):
        return None
    run = Run(other := resized(case, sizes), other, near=True, chance=True, beyond=True)
    return run if _runs_through(case, run) else None


def _all_one(case: Case) -> bool:
    """Whether all sizes are 1: they go together, whatever forward makes of them."""
    return all(n == 1 for _, t in case.arguments for n in t.shape)


def _of_one_shape(case: Case) -> bool:
    """Whether all tensors among the arguments have one shape: there are no sizes that may not go together."""
    return len({t.shape for _, t in case.arguments}) == 1


def _wrong_at(case: Case, run: Run) -> Finding | None:
    """Return what is wrong at a run, of its sizes alone where these will do."""
    when = f" at shapes {run.case.shapes}"

    @cache
    def plainly() -> Finding | None:
        return check_lines(run.plain, NAME, when, beyond=run.beyond) if accepts(run.plain) else None

    if run.varied:
        if right_soon(run.case):
            run.varied.right(case, run)
            return None
        found = plainly()
        # What else is another there other checks tell, at the sample's sizes.
        alone = run.varied.change(case, case)
        far = not found and _reaches(case, run.case) and right_soon(alone)
        return check_lines(run.case, NAME, f"{when}, of integers as large") if far else found
    if run.scale and explodes(case, run.case, EXPLODES):
        return plainly()  # out of the sample's domain: the sizes alone
    rather = plainly if run.scale else None
    found = check_lines(
        run.case,
        NAME,
        when + run.scale,
        elsewhere=not run.near,
        beyond=run.beyond,
        rather=rather,
    )
    if found and run.unless and accepts(run.unless) and not right_soon(run.unless):
        return None
    return (found and rather and plainly()) or found


def _parted(case: Case, other: Case) -> set[Pair]:
    """Return the pairs of dimensions that are of one size in the sample, and not there."""
    places = [(i, d) for i, t in case.arguments for d in range(t.dim())]
    return {
        (a, b)
        for a, b in combinations(places, 2)
        if case.flat[a[0]].shape[a[1]] == case.flat[b[0]].shape[b[1]]
        and other.flat[a[0]].shape[a[1]] != other.flat[b[0]].shape[b[1]]
    }


def _not_yet(case: Case, later: list[Run], parted: list[set[Pair]]) -> Iterator[Run]:
    """Yield what may change alone and has not, with others, in a larger run."""
    yield from (
        run for run in later if not any(_parted(case, run.case) <= pairs for pairs in parted)
    )


def _is_overwritten(case: Case, other: Case, found: Finding) -> bool:
    """Whether no output depends on an element that has a gradient, where integers of several dimensions are more."""
    repeated = any(
        t.dim() > 1
        and t.shape != case.flat[i].shape
        and not (t.is_floating_point() or t.is_complex())
        for i, t in other.arguments
    )
    return repeated and found.expected == 0 and 0 < abs(found.got or 0) < inf


def _apart(case: Case, run: Run) -> Run:
    """Return the run for inputs of which every other one is larger, which saves calls."""
    other = apart(run.plain)
    if not accepts(other):
        return run
    case.memo.setdefault("scaled", set()).add(APART)
    return Run(other, run.plain, f", for every other input {APART:g} times as large", beyond=True)


def _may_wait(case: Case, run: Run) -> bool:
    """Whether a larger run may have what is alone another here, with others; not what backward refuses."""
    return run.case is run.plain and bool(_parted(case, run.case)) and runs(run.case)


def _is_alone(case: Case, other: Case, size: Size) -> bool:
    """Whether nothing but this size is another there."""
    places = ((i, d) for i, t in case.arguments for d in range(t.dim()))
    another = {(i, d) for i, d in places if other.flat[i].shape[d] != case.flat[i].shape[d]}
    return another == {(i, d) for i, d, _ in size.places}


def _runs(
    case: Case, free: list[Size], parted: list[set[Pair]], stay: list[Size], refused: list[str]
) -> Iterator[Run]:
    integers = [t for _, t in case.arguments if not (t.is_floating_point() or t.is_complex())]
    indexed = bool(integers)
    # What an integer reaches is the end of something: of a box, of a row. A slice that ends beyond is not refused.
    ends = {int(t.max()) for t in integers if t.numel()}
    ran, free = False, [size for size in free if size not in stay]
    reached = dict.fromkeys(free, 0)
    single = 0
    for row in _rows(case, free) if free else ():
        sizes = _at_row(case, free, row)
        if indexed and any(new < size.now for size, new in sizes.items()):
            # An index may point at what is gone: 0 does not.
            yield from _of_zeros(case, sizes) if row in SINGLE else ()
            continue
        if row is ONES and single == len(SINGLE) and not refused:
            continue
        factor, varied = _how(case, row) if ran else (1.0, row.varied)
        failed: dict[str, Run] = {}
        run = _largest_that_runs(case, sizes, factor, varied, failed)
        if run and run.scale:
            case.memo.setdefault("scaled", set()).add(factor)
        run = run or _largest_that_runs(case, sizes, failed=failed)
        if run:
            ran = True
            single += row in SINGLE
            parted.append(_parted(case, run.plain))
            for size in free:
                reached[size] = max(reached[size], size.within(run.plain))
            yield run
    for sizes in _left(free, reached, [size for size in free if indexed and size.now not in ends]):
        run = _largest_that_runs(case, sizes)
        if run:
            for size in sizes:
                reached[size] = max(reached[size], size.within(run.plain))
            yield run
    yield from _far_apart(case, free, reached)
    yield from _one_less(case, free)


def _of_zeros(case: Case, sizes: dict[Size, int]) -> Iterator[Run]:
    """Yield the case at these sizes with 0 for all integers, if forward takes that."""
    other, alone = (with_integers(c, torch.zeros_like) for c in (resized(case, sizes), case))
    run = Run(other, other, unless=alone)
    yield from [run] if _runs_through(case, run) else []


def _at_row(case: Case, free: list[Size], row: Row) -> dict[Size, int]:
    """Return what each size is in a row."""
    new = row.many if len(free) > PLANE else row.few
    stays = row in ROWS and is_indexed(case)  # an index may point at what is gone
    pairs = zip(free, new, strict=False)
    sizes = {size: size.near(max(n, size.now) if stays else n) for size, n in pairs}
    if row.together:
        first = {size.now: size for size in reversed(sizes)}
        tied = {size: size.near(sizes[first[size.now]]) for size in sizes}
        return tied if fits(case, tied, LARGEST) else sizes
    return sizes


def _how(case: Case, row: Row) -> tuple[float, Varied | None]:
    """Return at which scale to run a row, and what is another there; of numbers without indices every other input."""
    several = len(case.leaves) > 1 and all(t.is_floating_point() for _, t in case.arguments)
    return (OTHERS, None) if row is BESIDE and several else (row.factor, row.varied)


def _one_less(case: Case, free: list[Size]) -> Iterator[Run]:
    """Yield the largest size that may not be one more, one less: the last group need not be full."""
    arguments = case.arguments
    taken = {(i, d) for size in free for i, d, times in size.places if size.unit == times == 1}
    sizes = {n for i, t in arguments for d, n in enumerate(t.shape) if (i, d) not in taken}
    n = max(sizes, default=0)
    if n < GROUPED or not speaks(case, GROUPS):
        return
    places = tuple((i, d, 1) for i, t in arguments for d, m in enumerate(t.shape) if m == n)
    other = resized(case, {Size(n, places): n - 1})
    run = Run(other, other, near=True, chance=True)
    yield from [run] if _runs_through(case, run) else []


def _far_apart(case: Case, free: list[Size], reached: Mapping[Size, int]) -> Iterator[Run]:
    """Yield a larger size whose rows are far from each other, where none was taken of rows that are alike."""
    if any(n >= BLOCK for n in reached.values()):
        return
    run = Run(other := resized(case, {size: size.near(BLOCK) for size in free}, FAR), other)
    yield from [run] if _runs_through(case, run) else []


def _alone(case: Case, free: list[Size], refused: list[str], stay: list[Size]) -> Iterator[Run]:
    """Yield each size alone, small and large, where backward refused several that do not go together.

    What is one in the sample becomes as many as something else is, too: what is broadcast along the wrong dimension
    raises for any other number.
    """
    indexed = is_indexed(case)
    if not refused:
        return
    several = list(dict.fromkeys(size.now for size in free if size.now > FEW))[:TRIES]
    as_many = [(size, n) for size in free if size.now == 1 for n in several]
    each = product(free, (FEW, BLOCK)) if len(refused) > len(stay) else ()
    for size, n in chain(as_many, each):
        if size.near(n) != size.now and not (indexed and n < size.now):
            run = _largest_that_runs(case, {size: size.near(n)})
            yield from [run] if run else []


def _rows(case: Case, free: list[Size]) -> list[Row]:
    """Return the rows to run; what works element by element squeezes nothing."""
    squeezes = len(free) > 1 and len(elementwise(case)) < len(case.leaves)
    rows = [*ROWS, *(SINGLE if squeezes else ()), ONES]
    if len(free) > PLANE:
        return rows
    # For which `scales` need not ask: small inputs are like the sample's, where there is no larger size.
    case.memo.setdefault("scaled", set()).update(row.factor for row in ROWS if not row.few)
    return [row for row in rows if row.few]


def _left(
    free: list[Size], reached: dict[Size, int], lessened: list[Size]
) -> Iterator[dict[Size, int]]:
    """Yield sizes that came along small, or not at all, where others are large; and fewer frames than labels.

    All at once, then alone each that is not ``reached`` yet; small once more each that is to be ``lessened``.
    """
    small = {
        size: size.near(EIGHTS if reached[size] > GROUPED else BLOCK)
        for size in free
        if reached[size] < BLOCK
    }
    if len(small) > 1:
        yield small
    for size in free:
        if reached[size] < BLOCK:
            yield {size: small[size]}
        few = size.near(min(FEW, size.now - 1))
        # Forward refuses where an index points at what is gone.
        if size in lessened and 0 < few < size.now:
            yield {size: few}


def _largest_that_runs(
    case: Case,
    sizes: dict[Size, int],
    factor: float = 1.0,
    varied: Varied | None = None,
    failed: dict[str, Run] | None = None,
) -> Run | None:
    """Return the case at these sizes; where that is too large, or refused, at as many of them as will do.

    Inputs are ``factor`` times as large; 0 makes their slices unequal. ``varied`` is what else is another there.
    What ``failed``, so varied, is not tried again where it was at the sizes alone, or was refused by what refuses
    other sizes, too.
    """
    failed = {} if failed is None else failed
    refuses = case.memo.setdefault(REFUSES, set())
    first = next(iter(sizes))
    # What is equal stays so where it is to be equal here too, and unequal where not.
    with_first = [s for s in sizes if s.now == first.now and sizes[s] == sizes[first]]
    others = [s for s in sizes if s not in with_first]
    small = {s: s.more + s.unit * (s.now == first.now and s in others) for s in sizes}
    choices = [
        sizes,
        {s: small[s] if s in with_first else sizes[s] for s in sizes},
        {s: sizes[s] if s in with_first else small[s] for s in sizes},
        {s: sizes[s] for s in others},
        {s: sizes[s] for s in with_first},
    ]
    tries = 0
    for part in filter(None, choices if others else choices[:1]):
        if tries < TRIES and fits(case, part, LARGEST):
            tries += 1
            before = failed.get(str(part))
            if before and (before.case is before.plain or _said(before) in refuses):
                continue
            run = _at(case, part, factor, varied)
            if _runs_through(case, run):
                return run
            failed[str(part)] = run
            if run.case is run.plain and _said(run):
                refuses.add(_said(run))
            if factor not in (0, 1) and _said(run) and not accepts(scaled(case, factor)):
                return None  # which `scales` asks for too, then
            if run.case.stopped:  # by a matrix of all pairs of rows, perhaps
                run = _at(case, {s: min(n, s.near(FEWER)) for s, n in part.items()}, factor, varied)
                if _runs_through(case, run):
                    return run
    return None


def _said(run: Run) -> str:
    """Return what refused a run, if anything did, without numbers."""
    return "" if run.case.stopped else without_numbers(run.case.refusal)


def _at(case: Case, sizes: dict[Size, int], factor: float, varied: Varied | None) -> Run:
    plain = resized(case, sizes)
    if varied:
        other = varied.change(case, plain)
        same = all(torch.equal(other.flat[i], t) for i, t in plain.arguments)
        return Run(plain, plain) if same else Run(other, plain, varied=varied)
    if factor == 0:
        return Run(
            uneven(plain, next(iter(sizes))), plain, ", for slices of very unequal magnitude"
        )
    if factor == OTHERS:
        smaller = scaled(plain, factor, range(0, len(plain.leaves), 2))
        return Run(smaller, plain, f", for every other input {factor:g} times as large")
    times = f", for inputs {factor:g} times as large" if factor != 1 else ""
    return Run(scaled(plain, factor), plain, times)


def _runs_through(case: Case, run: Run) -> bool:
    """Whether forward gives something there, and neither it nor backward does too much, as what was smaller did."""
    there = run.case
    elements = sum(t.numel() for _, t in there.arguments)
    if elements >= case.memo.get(STOPPED, inf):
        there.stopped = True
        return False
    try:
        if accepts(there) and any(y.numel() for y in there.all_outputs):
            _ = there.plain
            return True
    except BackwardRaised:
        if not there.stopped:
            return True
    if there.stopped:
        case.memo[STOPPED] = elements
    return False


CHECK = Check(
    name=NAME,
    tests="the gradient is right at other sizes: one more, equal, 1, 31, 32, 33, 64, 127, 128, 129, 192, 1025, 2053",
    run=_run,
    order=80,
    needs=("same values",),
    level="full",
    differences=True,
)
