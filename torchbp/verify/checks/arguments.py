"""Arguments: the gradient is right where a number, flag or word among the arguments is another.

A sample with alpha=1, dim=-1 or reduction="mean" hides a factor that is missing, a dimension that is fixed, a count
that is due to one reduction only. So does a default that the sample leaves as it is, or an attribute of a Module. What
changes nothing in forward, nor at larger inputs, is left in peace: a flag that detaches, a factor that reverses
gradients; so is a forward that is flat there: `hard=True` asks for a straight-through gradient. No negative number is
tried where the name of the argument says that there is none.
"""

import math
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.afterwards import afterwards
from torchbp.verify.asking import given_unasked
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.options import NEVER_NEGATIVE, Values, nearby, options, others, with_options
from torchbp.verify.raised import BackwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts, same_outputs, scaled
from torchbp.verify.source import compared
from torchbp.verify.tensors import counts, signed_like
from torchbp.verify.tolerance import largest

NAME = "arguments"
MOST = 8  # arguments alone, beside all real numbers at once and all others at once
EACH = 3  # other values of one, that forward takes
TRIED = 4  # calls for those
LARGER = (8.0, 2.0)  # times, the inputs of what says nothing in the sample
CLOSE = 1.0625  # times, where no other value is taken
UNTAKEN = "returned an incorrect number of gradients"  # torch says of a backward
DIMENSION = re.compile(r"(^|_)(dim|dims|axis|axes)$")  # in the name of one
# Names of a norm's order, of which 1 and infinity are special.
NORM = re.compile("p|ord|order|norm|norm_type|power")


def _run(case: Case) -> Iterator[Finding]:
    """Yield what is wrong, in the order of what is tried: who has the first need not go on."""
    values = options(case)
    nothing: list[Values] = []  # what says nothing in the sample
    tested = yield from _each_of(case, values, _tries(case, values), nothing)
    if not tested:  # what lies between two bounds
        close = [{i: CLOSE * x} for i, x in values.items() if type(x) is float and x]
        tested = yield from _each_of(case, values, [[change] for change in close[:EACH]], nothing)
    idle = {i: x for change in reversed(nothing) for i, x in change.items()}
    tested = (yield from _beyond(case, values, idle)) or tested
    tested = (yield from _otherwise_named(case, values)) or tested
    yield from afterwards(case, NAME, "arguments") if tested else ()
    if not tested:
        raise NotApplicable("no number, flag or word among the arguments that may be another")


def _each_of(
    case: Case, values: Values, tries: Iterable[list[Values]], nothing: list[Values]
) -> Generator[Finding, None, bool]:
    """Try other values; return whether there were such. Add what says ``nothing``."""
    asking = _asking(case)
    tested = False
    right: list[Values] = []
    for some in tries:
        accepted = 0
        for change in some:
            if _is_part(change, right):
                accepted += 1
                continue
            if (
                accepted >= EACH
                or _is_part(change, nothing)
                or _says_nothing(values, change, nothing)
            ):
                continue
            other = _with(case, asking, change)
            if not _is_another(case, other):
                nothing += [change] if accepts(other) else []
                continue
            accepted += 1
            tested = True
            found = check_lines(other, NAME, _when(case, values, change))
            if found and _counts(other, found, change):
                yield found
            if not found:
                right.append(change)
            if len(change) > 1:
                break
    return tested


def _when(case: Case, values: Values, change: Values) -> str:
    return " where " + " and ".join(
        f"{i if isinstance(i, str) else case.name_at[i]} is {x!r} instead of {values[i]!r}"
        for i, x in change.items()
    )


def _beyond(case: Case, values: Values, idle: Values) -> Generator[Finding, None, bool]:
    """Try what says nothing in the sample at inputs so large that it does: a limit, a border. Return whether."""
    for times in LARGER if idle else ():
        large = scaled(case, times)
        if not accepts(large):
            continue
        other = with_options(large, idle)
        if _is_another(large, other):
            when = f"{_when(case, values, idle)}, for inputs {times:g} times as large"
            found = check_lines(other, NAME, when)
            if found and _counts(other, found, idle):
                yield found
            return True
        break
    return False


def _otherwise_named(case: Case, values: Values) -> Generator[Finding, None, bool]:
    """Try dimensions counted from the other end, and several in another order. Return whether forward takes that."""
    named = {i: x for i, x in values.items() if DIMENSION.search(_name(case, i))}
    dims, tested = case.leaves[0].dim(), False
    for rename in (partial(_from_other_end, dims=dims), _reversed):
        change = {i: other for i, x in named.items() if (other := rename(x)) != x}
        other = with_options(case, change)
        if change and accepts(other):
            tested = True
            found = check_lines(other, NAME, _when(case, values, change))
            yield from [found] if found and _counts(other, found, change) else []
    return tested


def _from_other_end(x: Any, dims: int) -> Any:
    """Return a dimension, or several, counted from the other end."""
    if isinstance(x, tuple):
        return tuple(_from_other_end(n, dims) for n in x)
    return x if type(x) is not int else x - dims if x >= 0 else x + dims


def _reversed(x: Any) -> Any:
    return x[::-1] if isinstance(x, tuple) else x


def _asking(case: Case) -> Case:
    """Return the case that asks for the gradients of other inputs too, which the sample does not, where it has them."""
    at = given_unasked(case)
    return case.asking(at) if at else case


def _with(case: Case, asking: Case, change: Values) -> Case:
    """Return the case with other arguments, asking for as many gradients as it gives there."""
    other = with_options(asking, change)
    try:
        # What is refused is so, asked or not.
        if asking is case or not accepts(other) or other.plain:
            return other
    except BackwardRaised:
        pass
    return with_options(case, change)


def _is_another(case: Case, other: Case) -> bool:
    """Whether forward takes the other arguments, gives something else for them, and something at all."""
    if not accepts(other) or same_outputs(case, other):
        return False
    return any(y.numel() for y in other.all_outputs)


def _is_part(change: Values, tried: Sequence[Values]) -> bool:
    """Whether all of that was tried together with others; what a number does a flag or a word may hide."""
    return any(
        all(
            whole.get(i) == x and (isinstance(x, (bool, str)) or _are_numbers(whole))
            for i, x in change.items()
        )
        for whole in tried
    )


def _are_numbers(values: Values) -> bool:
    return not any(isinstance(x, (bool, str)) for x in values.values())


def _says_nothing(values: Values, change: Values, nothing: Sequence[Values]) -> bool:
    """Whether a number that is to be 0 said nothing as its negative: 0 lies between."""
    return all(x == 0 for x in change.values()) and any(
        whole == {i: -values[i] for i in change} for whole in nothing
    )


def _counts(case: Case, found: Finding, change: Values) -> bool:
    """Whether what was found is a fault; where forward is flat a gradient may be a straight-through estimator's.

    A factor of 0 makes none of it, nor a power or a number of steps, nor does a part of the input that is not read.
    """
    if UNTAKEN in found.message:  # a default that backward leaves no place for, and says so
        return False
    zero = all(x == 0 and type(x) is not bool for x in change.values())
    return _has_slope(found) or zero or not _is_flat(case, found)


def _has_slope(found: Finding) -> bool:
    """Whether forward rises by more than rounding does, as in ``hard + soft - soft.detach()``."""
    got, expected = found.got, found.expected
    return got is None or expected is None or not abs(expected) <= 1e-6 * abs(got)


def _is_flat(case: Case, found: Finding) -> bool:
    """Whether forward stays as it is, but for rounding, as the whole of that input moves a little."""
    generator = case.generator(NAME)
    step = max(2.0**-20, 2.0**10 * case.epsilon)
    moving = {w for w, name in zip(case.where, case.names, strict=True) if name == found.input}

    def move(i: int, t: Tensor) -> Tensor:
        return t * (1 + step * signed_like(t, generator)) if i in moving else t

    moved = case.edited(move, parameters=True)
    return accepts(moved) and all(
        torch.equal(a, b)
        or (a.is_floating_point() and largest(a - b) <= 64 * case.epsilon * largest(a))
        for a, b in zip(case.all_outputs, moved.all_outputs, strict=True)
    )


def _tries(case: Case, values: Values) -> Iterator[list[Values]]:
    """Yield what to change: all real numbers, all else, each alone."""
    reals = {i: x for i, x in values.items() if isinstance(x, float)}
    rest = {
        i: ys
        for i, x in values.items()
        if i not in reals and (ys := others(case, x, _name(case, i)))
    }
    if reals:
        moved = _apart(reals)
        # Beside integer inputs whole numbers are such integers, too: a class that is ignored.
        counted = {i: ys[0] for i, ys in rest.items() if type(values[i]) is int}
        numbers = any(counts(t) for _, t in case.arguments) and counted
        yield [*([moved | counted] if numbers else []), *_all_or_each(moved)]
        if signed := {i: -x for i, x in reals.items() if not NEVER_NEGATIVE.search(_name(case, i))}:
            yield [signed]
        special = [n for n in compared(case) if n not in (0.0, *reals.values())]
        for i in islice(reals, MOST):
            yield [{i: n} for n in special[:TRIED]]
        # Of several one half at a time: where all are 0 a product of them hides what each does.
        zero = [i for i, x in reals.items() if x]
        for half in (zero[: len(zero) // 2], zero[len(zero) // 2 :]):
            yield _all_or_each(dict.fromkeys(half, 0.0))
    if len(rest) > 1:
        yield [{i: ys[0] for i, ys in rest.items()}]
    for i, ys in islice(rest.items(), MOST):
        yield [{i: y} for y in ys[:TRIED]]
    # Far more of what is counted: what is read at one ratio may be cut off at another.
    for i, x in values.items():
        if NORM.fullmatch(_name(case, i)) and type(x) in (int, float):
            yield [{i: p} for p in (math.inf, 1.0) if p != x and p not in rest.get(i, ())]
        elif type(x) is int and x > 1 and i in rest:
            yield [{i: 4 * x}]


def _apart(reals: Mapping[int | str, float]) -> Values:
    """Return other numbers, of which no two are equal: what is so in the sample may have to be, or not."""
    seen: Counter[float] = Counter()
    moved: Values = {}
    for i, x in reals.items():
        moved[i] = nearby(x) + seen[x] / 16
        seen[x] += 1
    return moved


def _name(case: Case, i: int | str) -> str:
    """Return the name of an argument: of one given by its place, there is none."""
    return i if isinstance(i, str) else case.name_at[i].removeprefix("argument ")


def _all_or_each(change: Values) -> list[Values]:
    """Return all changes at once and, where that is several, the first of them alone; nothing for none."""
    alone = [{i: x} for i, x in change.items()]
    return [change, *alone[:MOST]] if len(alone) > 1 else alone


CHECK = Check(
    name=NAME,
    tests="the gradient is right with another number, flag or word among the arguments",
    run=_run,
    order=83,
    needs=("same values",),
    level="full",
    differences=True,
    once=True,
)
