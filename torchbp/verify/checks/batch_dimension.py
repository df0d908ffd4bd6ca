"""One leading dimension more, or less: sequences of tokens instead of rows, one row, where forward takes them.

Where forward makes of a batch what it makes of its samples, backward must make of it what it makes of them: no
differences are needed, unless the two disagree. Where backward raises, a batch of as many samples as one has rows is
tried as well: that is how an exchange of the first two dimensions, instead of the last, goes unseen.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable, Refused
from torchbp.verify.cases import Case
from torchbp.verify.depends import elementwise
from torchbp.verify.duals import by_hand
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.raised import BackwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts
from torchbp.verify.together import ADDED, STACKED
from torchbp.verify.tolerance import compare_all

NAME = "batch_dimension"
MANY = 8  # samples

Join = Literal["stack", "sum", "mean"]
Gradients = Sequence[Tensor]  # one a leaf


Pull = Callable[[Sequence[Tensor]], Gradients]


class Known(NamedTuple):
    """A sample of which all outputs are known, and what makes gradients of a grad_output for each."""

    outputs: list[Tensor]
    pull: Pull


_JOINED: dict[Join, Callable[[Tensor, Tensor], Tensor]] = {
    "stack": lambda a, b: torch.stack([a, b]),
    "sum": lambda a, b: a + b,
    "mean": lambda a, b: (a + b) / 2,
}

# What each of two samples gets of the grad_output of their batch.
_SHARES: dict[Join, Callable[[Tensor, int], Tensor]] = {
    "stack": lambda v, number: v[number],
    "sum": lambda v, _: v,
    "mean": lambda v, _: 0.5 * v,
}


def _run(case: Case) -> Iterator[Finding]:
    sizes = [t.shape[0] for _, t in case.arguments if t.dim()]
    if not sizes:
        raise NotApplicable("no dimension in the sample")
    rows = tuple(i for i, t in case.arguments if t.dim() and t.shape[0] == sizes[0])
    single = _single(case, rows) or _number(case)
    if single and not _has_gradients(single, lambda v: _of_first(case, v, single)):
        found = check_lines(single, NAME, " with a dimension less", elsewhere=False)
        if found and found.got is not None:
            yield found
            return
    every = tuple(i for i, _ in case.arguments)
    # Without its labels, one a row, a batch of rows is none.
    labelled = any(_counts(case.flat[i]) and case.flat[i].dim() == 1 for i in rows[1:])
    alone = every if labelled else every[:1]
    for chosen in dict.fromkeys((rows, every, alone)):
        batches = _drawn(case, chosen) if case.draws else _batches(case, chosen)
        for batch in batches or ():
            found = check_lines(batch, NAME, _when(batch), elsewhere=False)
            if found and found.got is None:
                found = _of_as_many(case, chosen, found.message)
            if found:
                yield found
                return
        if batches is not None:
            return
    if not single:
        raise NotApplicable("forward takes no further dimension, or not as a batch")


def _of_as_many(case: Case, chosen: tuple[int, ...], refused: str) -> Finding:
    """Return what is wrong with a batch of as many samples as a sample has rows, where two are refused.

    A backward that exchanges the first two dimensions, and not the last, takes those without a word.

    Raises:
        Refused: That nothing is, so ``refused`` stands.
    """
    n = len(case.flat[chosen[0]]) if case.flat[chosen[0]].dim() else 0

    def several(t: Tensor) -> Tensor:
        return torch.stack([t.roll(k, 0) if t.dim() else t for k in range(n)])

    other = case.edited(lambda i, t: several(t) if i in chosen else t)
    if 2 < n <= MANY and not case.draws and accepts(other):
        found = check_lines(other, NAME, _when(other), elsewhere=False)
        if found and found.got is not None:
            return found
    raise Refused(refused)


def _when(batch: Case) -> str:
    return f" with a leading dimension more, at shapes {batch.shapes}"


def _single(case: Case, rows: Sequence[int]) -> Case | None:
    """Return the first row alone, where forward makes of it what stands first in what it makes of all."""
    if case.leaves[0].dim() < 2 or elementwise(case):
        return None
    single = case.edited(lambda i, t: t[0] if i in rows and len(t) else t)
    pairs = list(zip(case.all_outputs, single.all_outputs, strict=False)) if accepts(single) else []
    first = all(
        y.shape[1:] == one.shape
        and y.dim() > one.dim()
        and len(y) > 0
        and torch.allclose(y[0], one, rtol=1e-6, atol=1e-9)
        for y, one in pairs
    )
    return single if pairs and first else None


def _number(case: Case) -> Case | None:
    """Return the first number alone, without any dimension, of what works element by element."""
    shape = case.plain.outputs[0].shape
    if not shape or len(elementwise(case)) < len(case.leaves):
        return None
    single = case.edited(lambda _, t: t.reshape(-1)[0] if t.shape == shape else t)
    return single if accepts(single) and not any(y.dim() for y in single.all_outputs) else None


def _batches(case: Case, chosen: tuple[int, ...]) -> list[Case] | None:
    """Return the batches whose gradients are not known to be right; ``None`` where forward takes no batch."""
    other = case.edited(lambda i, t: _stack(t) if i in chosen else t)
    rolled = case.edited(lambda i, t: _rolled(t) if i in chosen else t)
    if all(torch.equal(rolled.flat[i], case.flat[i]) for i in chosen):
        rolled = case  # of one row each
    if not accepts(other):
        return None
    here = Known(case.all_outputs, lambda v: case.vjps([v])[0])
    for there in _of_rolled(case, rolled, chosen):
        joins = _joins(other, here, there)
        if joins is not None:
            break
    else:
        return None
    known = _has_gradients(other, lambda v: _of_both(case, (here, there), joins, v, chosen))
    if known:  # for `degenerate`
        case.memo[STACKED if set(joins) == {"stack"} else ADDED] = chosen
    return [*([] if known else [other]), *_beyond(case, other, chosen, (here, there), joins)]


def _drawn(case: Case, chosen: tuple[int, ...]) -> list[Case] | None:
    """Return the batch for a function that draws random numbers, and so makes something else of each sample."""
    other = case.edited(lambda i, t: _stack(t) if i in chosen else t)
    return [other] if len(chosen) == len(case.arguments) == 1 and accepts(other) else None


def _has_gradients(other: Case, expected: Pull) -> bool:
    """Whether the gradients are those that are known from the sample, for the same grad_output."""
    try:
        got = other.plain.grads
        return not compare_all(NAME, other, got, expected(other.plain.cotangents))
    except BackwardRaised:
        return False


def _of_first(case: Case, several: Sequence[Tensor], single: Case) -> Gradients:
    """Return the gradients where what is ``single`` alone has a grad_output: of that, and the whole of what is shared.

    It stands first in the sample: a row, or a number.
    """
    first = []
    for v, y in zip(several, case.plain.outputs, strict=True):
        first.append(torch.zeros_like(y, memory_format=torch.contiguous_format))
        first[-1].view(-1, *v.shape)[0] = v
    (grads,) = case.vjps([first])
    pairs = zip(grads, single.leaves, strict=True)
    return [g if g.shape == leaf.shape else g.reshape(-1, *leaf.shape)[0] for g, leaf in pairs]


def _of_rolled(case: Case, rolled: Case, chosen: Sequence[int]) -> Iterator[Known]:
    """Yield what is known of the sample with its rows moved on by one, dearest last.

    A function of rows gives the same rows moved on, a sum over them the same sum: no call is needed where that fits.
    """
    if rolled is not case:
        yield _rolled_with(case, chosen, moved=True)
        yield _rolled_with(case, chosen, moved=False)
    if accepts(rolled):
        yield Known(rolled.all_outputs, lambda v: rolled.vjps([v])[0])


def _rolled_with(case: Case, chosen: Sequence[int], *, moved: bool) -> Known:
    """Return what rolled inputs give where outputs are ``moved`` with them, or stay."""

    def pull(v: Sequence[Tensor]) -> Gradients:
        (grads,) = case.vjps([[t.roll(-1, 0) if moved and t.dim() else t for t in v]])
        return [_rolled(g) if i in chosen else g for i, g in zip(case.where, grads, strict=True)]

    return Known([_rolled(y) if moved else y for y in case.all_outputs], pull)


def _of_both(
    case: Case,
    pair: tuple[Known, Known],
    joins: list[Join],
    several: Sequence[Tensor],
    stacked: Sequence[int],
) -> Gradients:
    """Return the gradients of a batch of two samples: those of both, or their sum where they share an input."""
    parts = []
    for number, sample in enumerate(pair):
        outputs = zip(case.differentiable, several, strict=True)
        parts.append(sample.pull([_SHARES[joins[k]](v, number) for k, v in outputs]))
    return [
        torch.stack(two) if i in stacked else two[0] + two[1]
        for i, two in zip(case.where, zip(*parts, strict=True), strict=True)
    ]


def _beyond(
    case: Case, other: Case, chosen: tuple[int, ...], pair: tuple[Known, Known], joins: list[Join]
) -> list[Case]:
    """Return a batch of batches of one row only, where that is taken: a dimension of 1 may be squeezed away.

    Not where its gradients are known to be right.
    """
    if elementwise(case):
        return []
    single = other.edited(lambda i, t: t[:, :1] if i in chosen and t.dim() > 1 else t)
    same = all(single.flat[i].shape == other.flat[i].shape for i in chosen)
    also = by_hand(case)  # what is tested beside the gradient, then: a jvp, a second derivative
    # Of one row nothing is known where outputs are a sum over rows; one row is among the `sizes`.
    summed = set(joins) != {"stack"} and not also
    for base in (other,) if same else (other, single) if summed else (single, other):
        twice = base.edited(lambda i, t: _stack(t) if i in chosen else t)
        if accepts(twice):
            if also:
                return [twice]
            expected = (
                _of_first_rows(case, twice, chosen)
                if base is single
                else _of_batches(case, twice, chosen, pair, joins)
            )
            return [] if expected and _has_gradients(twice, expected) else [twice]
    return [single] if not same and accepts(single) else []


def _of_first_rows(case: Case, twice: Case, chosen: tuple[int, ...]) -> Pull | None:
    """Return what makes the gradients of first rows in batches of batches, where rows are known to be apart.

    They are the first row and the last, then the last and the first.
    """
    rows = {
        len(t) if t.dim() else 0 for t in (*map(case.flat.__getitem__, chosen), *case.all_outputs)
    }
    if len(rows) > 1 or rows <= {0, 1}:
        return None

    def in_batches(one: Tensor, other: Tensor) -> Tensor:
        return torch.stack([torch.stack([one[:1], one[-1:]]), torch.stack([other[-1:], other[:1]])])

    def pull(several: Sequence[Tensor]) -> Gradients:
        halves = []
        for k in range(2):
            alone = [
                torch.zeros_like(y, memory_format=torch.contiguous_format)
                for y in case.plain.outputs
            ]
            for whole, v in zip(alone, several, strict=True):
                whole[0], whole[-1] = v[k, k, 0], v[k, 1 - k, 0]
            halves.append(case.vjps([alone])[0])
        return [
            in_batches(one, other) if i in chosen else one + other
            for i, one, other in zip(case.where, *halves, strict=True)
        ]

    pairs = zip(case.all_outputs, twice.all_outputs, strict=True)
    return pull if all(_is_close(in_batches(y, y), two) for y, two in pairs) else None


def _of_batches(
    case: Case, twice: Case, chosen: tuple[int, ...], pair: tuple[Known, Known], joins: list[Join]
) -> Pull | None:
    """Return what makes the gradients of two batches, the second in the other order, where that is known."""

    def joined(one: Known, other: Known) -> Known:
        outputs = [
            _JOINED[j](a, b) for j, a, b in zip(joins, one.outputs, other.outputs, strict=True)
        ]
        return Known(outputs, lambda v: _of_both(case, (one, other), joins, v, chosen))

    one, other = pair
    batches = joined(one, other), joined(other, one)
    again = _joins(twice, *batches)
    if again is None:
        return None
    return lambda v: _of_both(case, batches, again, v, chosen)


def _counts(x: Any) -> bool:
    return isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex())


def _stack(t: Tensor) -> Tensor:
    return torch.stack([t, _rolled(t)])


def _rolled(t: Tensor) -> Tensor:
    return t.roll(1, 0) if t.dim() else t


def _is_close(expected: Tensor, y: Tensor) -> bool:
    return y.shape == expected.shape and torch.allclose(y, expected.to(y), rtol=1e-6, atol=1e-9)


def _joins(both: Case, one: Known, other: Known) -> list[Join] | None:
    """Return what forward makes of a batch, an output: what it makes of its samples, stacked, added or averaged."""
    found: list[Join] = []
    for y, a, b in zip(both.all_outputs, one.outputs, other.outputs, strict=True):
        kinds: list[Join] = [kind for kind, join in _JOINED.items() if _is_close(join(a, b), y)]
        if not kinds:
            return None
        found += kinds[:1]
    return found


CHECK = Check(
    name=NAME,
    tests="the gradient is right with a leading dimension more, or less",
    run=_run,
    order=81,
    needs=("same values",),
    level="full",
    differences=True,
)
