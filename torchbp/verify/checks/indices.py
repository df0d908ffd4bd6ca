"""Indices: the gradient is right for other integers than the sample's: in another order, all alike, and extreme.

Indices that are all different hide a backward that overwrites where it should add;
labels in order hide a sort.
"""

from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import combinations
from math import inf

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts

NAME = "indices"
KNOWN = "what integers were right with at another size"
REORDERED = "integers that are right in another order"
KINDS = (torch.int64, torch.int32)
CODES = torch.int8  # no index: what it holds are levels, of which all may occur


def _run(case: Case) -> Iterator[Finding]:
    codes = case.edited(lambda _, t: _all_codes(t) if t.dtype == CODES else t)
    tested = any(t.dtype == CODES for _, t in case.arguments) and accepts(codes)
    if tested:
        found = check_lines(codes, NAME, " where 8-bit integers are the smallest and the largest")
        yield from [found] if found else []
    integers = [i for i, t in case.arguments if t.dtype in KINDS and t.numel()]
    if not (integers or tested):
        raise NotApplicable("no integer input")
    sizes = {n for _, t in case.arguments for n in t.shape}
    known = set(case.memo.get(KNOWN, ()))
    # Counts of what has a number each; of labels 0 may stand for nothing.
    some_zero = partial(_some_zero, shapes={case.flat[i].shape for i in case.where})
    given_away = partial(_given_away, sizes=sizes)
    known |= {IMPLIED[change] for change in known & IMPLIED.keys()}
    for when, change in (
        ("some integers are the smallest, others the largest", extreme),
        ("the integers are in another order", _reversed),
        ("all integers are equal", equal),
        ("all rows of integers are the first", _rows_alike),
        ("a number is one more", _one_more),
        ("of the numbers in order one is there twice, and another lies between", _twice),
        ("a number in order lies between", _between),
        ("one of the numbers in order is left out", _left_out),
        ("the first of the numbers in order is not 0", _from_later),
        ("some integers are 0", some_zero),
        ("the first of the numbers occurs once", _once),
        ("one share is its neighbour's too", given_away),
    ):
        if change in known:
            tested = True
            continue  # right at another size, or where another change held it
        other = with_integers(case, change)
        if all(torch.equal(case.flat[i], other.flat[i]) for i in integers) or not accepts(other):
            continue
        tested = True
        found = check_lines(other, NAME, f" where {when}")
        # An element that no output depends on, since a later one was written to its place: indices must differ. Not
        # so what somebody has whose share is 0, nor what lies before the first.
        nothing = found and change in (_from_later, given_away)
        if found and (nothing or not (found.expected == 0 and 0 < abs(found.got or 0) < inf)):
            yield found
        if change in IMPLIED and not found:
            known.add(IMPLIED[change])
        if change in (extreme, _reversed) and not found:
            note_order(case, case, other)
    tested |= yield from _meeting(case, integers)
    if not tested:
        raise NotApplicable("forward takes no other integers")


def _meeting(case: Case, integers: list[int]) -> Generator[Finding, None, bool]:
    """Yield what is wrong where integers of two inputs are the same; return whether that was tested."""
    met = _met(case, integers)
    found = met and check_lines(met, NAME, " where integers of one input are another's")
    yield from [found] if found else []
    return bool(met)


def _met(case: Case, integers: list[int]) -> Case | None:
    """Return the case where one input has another's integers, if forward takes that: a target among what is drawn."""
    for i, j in combinations(integers, 2):
        for one, other in ((i, j), (j, i)):
            there, here = case.flat[one].reshape(-1), case.flat[other]
            again = there[torch.arange(here.numel(), device=there.device) % len(there)]
            met = case.replaced({other: again.view(here.shape).to(here)})
            if not torch.equal(met.flat[other], here) and accepts(met):
                return met
    return None


def note_order(case: Case, one: Case, other: Case) -> None:
    """Keep in mind which integers are right in another order: those of ``other`` that are not as in ``one``."""
    case.memo.setdefault(REORDERED, set()).update(
        i for i, t in one.arguments if t.dtype in KINDS and not torch.equal(t, other.flat[i])
    )


def with_integers(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    """Return the case with its integers changed."""
    return case.edited(lambda _, t: change(t) if t.dtype in KINDS and t.numel() else t)


def _all_codes(t: Tensor) -> Tensor:
    """Return the largest and the smallest number of that type by turns, but for every third, which stays."""
    flat = t.reshape(-1).clone()
    info = torch.iinfo(t.dtype)
    flat[::3], flat[1::3] = info.max, info.min
    return flat.view(t.shape)


def _reversed(t: Tensor) -> Tensor:
    """Return the integers in reverse, unless they are in order, as offsets must be."""
    flat = t.reshape(-1)
    return t if bool((flat[1:] >= flat[:-1]).all()) else flat.flip(0).view(t.shape)


def equal(t: Tensor) -> Tensor:
    """Return the first of the elements for all."""
    return t.reshape(-1)[:1].expand(t.numel()).clone().view(t.shape)


def _rows_alike(t: Tensor) -> Tensor:
    """Return the first row for all, of integers that may have to differ in a row: an edge, a triangle."""
    return t[:1].expand_as(t).clone() if t.dim() > 1 else t


def _one_more(t: Tensor) -> Tensor:
    """Return a single number, that of a step, one larger."""
    return t + 1 if t.numel() == 1 else t


def _between(t: Tensor) -> Tensor:
    """Return offsets, integers in order from 0 on, with one more: what was one segment are two."""
    if t.dim() != 1 or len(t) < 2 or t[0] != 0 or bool((t[1:] <= t[:-1]).any()):
        return t
    k = int(t.diff().argmax())
    middle = (t[k : k + 1] + t[k + 1 : k + 2]) // 2
    return torch.cat([t[: k + 1], middle, t[k + 1 :]])


def _twice(t: Tensor) -> Tensor:
    """Return the same with one more number, equal to another: an empty segment that is neither first nor last."""
    other = _between(t)
    return other if other is t or len(t) < 3 else torch.cat([other[:2], other[1:]])


def _once(t: Tensor) -> Tensor:
    """Return the integers, the first of them nowhere else: a segment of one has no spread."""
    flat = t.reshape(-1).clone()
    others = flat[flat != flat[0]]
    if len(others) in (0, len(flat) - 1):
        return t
    again = flat == flat[0]
    again[0] = False
    flat[again] = others[0]
    return flat.view(t.shape)


def _left_out(t: Tensor) -> Tensor:
    """Return integers in order, offsets or segments, with the first for the second of them: a segment is empty."""
    flat = t.reshape(-1).clone()
    if bool((flat[1:] < flat[:-1]).any()) or flat[0] == flat[-1]:
        return t
    flat[flat == flat[flat > flat[0]][0]] = flat[0].clone()  # CUDA takes no part of flat itself
    return flat.view(t.shape)


def _from_later(t: Tensor) -> Tensor:
    """Return offsets, integers in order from 0 on, that begin with 1."""
    if t.dim() != 1 or len(t) < 3 or t[0] != 0 or t[1] < 2 or bool((t[1:] <= t[:-1]).any()):
        return t
    return torch.cat([t[:1] + 1, t[1:]])


def _some_zero(t: Tensor, shapes: set[torch.Size]) -> Tensor:
    """Return counts, of which none is 0, with every third 0."""
    if t.numel() < 2 or t.shape not in shapes or bool((t <= 0).any()):
        return t
    flat = t.reshape(-1).clone()
    flat[::3] = 0
    return flat.view(t.shape)


def extreme(t: Tensor) -> Tensor:
    """Return the integers in reverse, unless in order, every third the smallest and every third the largest."""
    flat = t.reshape(-1).flip(0)
    if bool((flat[1:] <= flat[:-1]).all()):
        return t
    flat[::3], flat[1::3] = flat.min(), flat.max()
    return flat.view(t.shape)


def _given_away(t: Tensor, sizes: set[int]) -> Tensor:
    """Return shares, integers that sum to a size, of which one is added to the larger neighbour: somebody has none.

    Neither the first nor the last, where there are others.
    """
    if t.dim() != 1 or len(t) < 2 or bool((t <= 0).any()) or int(t.sum()) not in sizes:
        return t
    k = min(1, len(t) - 2)
    to = k - 1 if k and t[k - 1] > t[k + 1] else k + 1
    other = t.clone()
    other[k], other[to] = 0, t[k] + t[to]
    return other


# What is right is so after a change that is a part of it: another order, a segment that became two.
IMPLIED = {extreme: _reversed, _twice: _between, equal: _rows_alike}

CHECK = Check(
    name=NAME,
    tests="the gradient is right for other integers: in another order, all alike, the smallest or largest",
    run=_run,
    order=83,
    needs=("same values",),
    level="full",
    differences=True,
    once=True,
)
