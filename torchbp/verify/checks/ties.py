"""Ties: where two elements are equal, a maximum has several gradients; what backward gives is one of them or between.

Two neighbours are made equal, at the largest or smallest place of a line, or two elements of inputs of one shape; not
at 0, where |x| has gradients of both signs. A little more of the one or of the other breaks the tie: that gives the two
gradients to either side. At the tie the gradient of an output element must lie on the segment between them.
`grad_output * (x == x.max())` gives their sum instead.

Where many gradients are 0, as a selection's are, all elements are made equal, too: `alike`.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.alike import CAUSE, selects, where_all_equal
from torchbp.verify.calls import Plain
from torchbp.verify.cases import Case
from torchbp.verify.raised import ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.smooth import COINCIDENT
from torchbp.verify.tolerance import largest

NAME = "ties"
NUDGE = 2.0**-20
FLAT = 1e-9  # a bend that is no kink, which would be about a nudge
CURVED = 16.0  # times what a nudge changes a slope by, where that bends and has no kink
JUMP = 64.0  # times what a kink bends, or a slope rises, within a nudge
SLACK = 1e-4  # of the distance between the two gradients; what smooth functions change by a nudge is below it

Place = tuple[int, int]  # which leaf, flat position in it
Tie = tuple[Place, Place]  # two elements to make equal


def _run(case: Case) -> Iterator[Finding]:
    inputs = [
        i
        for i, leaf in enumerate(case.leaves)
        if not (leaf.is_complex() or case.names[i].startswith("parameter"))
    ]
    across = _across(case, inputs)
    taken = {place for tie in across for place in tie}
    within = [tie for i in inputs for tie in _neighbours(case, i) if not taken.intersection(tie)]
    tested = False
    for ties in filter(None, (across + within, *((across, within) if across and within else ()))):
        try:
            side, tied = (_nudged(case, ties, sides) for sides in ((0,), ()))
            _ = side.plain, tied.plain
        except ForwardRaised:
            continue  # perhaps of only some of them
        tested = True
        yield from _where_apart(case, ties, side, tied)
        break
    yield from _coincident(case, inputs)
    selected = [i for i in inputs if selects(case, i)]
    if "differences" not in case.options.get("skip", ()):  # it is held against the slope of forward
        yield from where_all_equal(case, selected, NAME)
    if not tested and not selected:
        raise NotApplicable("no two elements that can be made equal")


def _where_apart(case: Case, ties: list[Tie], side: Case, tied: Case) -> Iterator[Finding]:
    """Look at every tie alone, unless its gradient is that of one side of it: smooth, or one of the two chosen.

    Where there is one of these only, all may stay tied: that is right or leaves a question.
    """
    one, here = _flat(side.plain.grads), _flat(tied.plain.grads)
    apart = ~((one - here).abs() <= SLACK * largest(one))  # NaN is apart
    if not bool(apart.any()):
        return
    starts = _starts(case)
    shown = [tie for tie in ties if any(bool(apart[starts[i] + k]) for i, k in tie)]
    if len(shown) == 1 < len(ties) and bool(here.isfinite().all()):
        cases = [side, _nudged(case, ties, (1,)), tied, _nudged(case, ties, (0, 1))]
        if not _at_tie(case, shown[0], cases):
            return
    for tie in shown or ties:  # an index may move the gradient of another input
        cases = [_nudged(case, [tie], sides) for sides in ((0,), (1,), (), (0, 1))]
        undefined = _not_a_number(case, tie, cases[0].plain, cases[2].plain)
        if undefined:
            yield undefined
            continue
        found = _at_tie(case, tie, cases)
        if found and found.expected is None:  # what bends much, and has no kink, bends less by less
            cases = [_nudged(case, [tie], s, NUDGE / 32) for s in ((0,), (1,), (), (0, 1))]
            found = _at_tie(case, tie, cases, NUDGE / 32)
        if found:
            yield found
            return


def _neighbours(case: Case, which: int) -> list[Tie]:
    """Return neighbours along the last and the first dimension, at the maximum and the minimum; no two overlap."""
    leaf = case.leaves[which]
    places = torch.arange(leaf.numel(), device="cpu").view(leaf.shape)
    used: set[int] = set()
    ties: list[Tie] = []
    for dim in dict.fromkeys((leaf.dim() - 1, 0) if leaf.dim() else ()):
        if leaf.shape[dim] < 2:
            continue
        lines = places.movedim(dim, -1).reshape(-1, leaf.shape[dim])
        values = leaf.detach().cpu().reshape(-1)[lines]
        for signed in (values, -values):
            rows = [r for r, line in enumerate(lines.tolist()) if not used.intersection(line)]
            if rows:
                best = signed[rows].amax(-1).argmax()
                line = lines[rows[int(best)]].tolist()
                k = int(signed[rows[int(best)]].argmax())
                pair = line[k], line[k + 1 if k + 1 < len(line) else k - 1]
                if signed[rows[int(best)]][k] != 0:
                    ties.append(((which, pair[0]), (which, pair[1])))
                    used.update(pair)
    return ties


def _across(case: Case, inputs: list[int]) -> list[Tie]:
    """Return the first elements of the first two inputs of one shape, or of which one is broadcast to the other."""
    pairs = [(i, j) for i, j in combinations(inputs, 2) if case.leaves[i].numel()]
    shapes = {i: case.leaves[i].shape for i in inputs}
    alike = [(i, j) for i, j in pairs if shapes[i] == shapes[j]]
    rows = [
        (i, j) for i, j in pairs if len(shapes[j]) > 0 and shapes[i][-len(shapes[j]) :] == shapes[j]
    ]
    return [((i, 0), (j, 0)) for i, j in (alike or rows)[:1]]


def _coincident(case: Case, inputs: list[int]) -> Iterator[Finding]:
    """Make the first rows of the first two inputs with equally long rows one point: a distance of 0."""
    rows = [
        (i, case.leaves[i].shape[-1])
        for i in inputs
        if case.leaves[i].dim() > 1 and case.leaves[i].numel()
    ]
    pair = next(((i, j, n) for i, n in rows for j, m in rows if i < j and m == n), None)
    if pair is None:
        return
    i, j, n = pair
    if case.memo.get(COINCIDENT) == (case.where[i], case.where[j]):
        return
    ties = [((i, k), (j, k)) for k in range(n)]
    try:
        tied = _nudged(case, ties, ()).plain
        if any(bool(g.isnan().any()) for g in tied.grads):
            found = _not_a_number(case, ties[0], _nudged(case, ties, (0,)).plain, tied)
            yield from [found] if found else []
    except ForwardRaised:
        return  # they have to differ


def _nudged(case: Case, ties: list[Tie], sides: tuple[int, ...], by: float = NUDGE) -> Case:
    """Return the case with each pair tied, and then the first, the second or both of the two a little more."""
    flat = [leaf.clone().reshape(-1) for leaf in case.leaves]
    for tie in ties:
        (i, k), (j, m) = tie
        flat[j][m] = flat[i][k]
        for side in sides:
            which, place = tie[side]
            flat[which][place] += _nudge(case.leaves[i], k, by)
    new = {
        at: f.view_as(case.leaves[i])
        for i, (at, f) in enumerate(zip(case.where, flat, strict=True))
    }
    return case.edited(new.get, parameters=True)


def _nudge(leaf: Tensor, place: int, by: float) -> float:
    return by * max(float(leaf.reshape(-1)[place].abs()), 2.0**-10)


def _flat(grads: Sequence[Tensor]) -> Tensor:
    """Return the gradients of all real leaves in one row."""
    return torch.cat([g.detach().reshape(-1).double().cpu() for g in grads if not g.is_complex()])


def _starts(case: Case) -> dict[int, int]:
    """Return where the gradient of each real leaf begins in the row of :func:`_flat`."""
    real = [i for i, leaf in enumerate(case.leaves) if not leaf.is_complex()]
    ends = np.cumsum([case.leaves[i].numel() for i in real]).tolist()
    return dict(zip(real, [0, *ends], strict=False))


def _at_tie(case: Case, tie: Tie, cases: list[Case], by: float = NUDGE) -> Finding | None:
    """Compare the gradient at the tie with those of one, of the other, of none and of both a little more."""
    one, other, tied, both = cases
    outputs = zip(*(c.kept[1] for c in (one, other, tied, both)), strict=True)
    for number, (a, b, y, up) in enumerate(outputs):
        # The output that bends most is about the tie; alone, as each output may choose a gradient of its own.
        bends = (a + b - y - up).detach().abs().reshape(-1)
        if not bends.numel() or not bool(bends.max() > 0):
            continue
        v = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in one.kept[1]]
        place = int(bends.argmax())
        v[number].reshape(-1)[place] = 1.0
        grads = [c.vjps([v])[0] for c in (one, other, tied)]
        left, right, got = map(_flat, grads)
        step = _nudge(case.leaves[tie[0][0]], tie[0][1], by)
        rise = max(float((t - y).detach().reshape(-1)[place].abs()) for t in (a, b, up))
        if max(rise, float(bends.max())) > JUMP * step * max(map(largest, (left, right))):
            continue  # a label, perhaps
        apart = right - left
        length = float(apart.norm())
        if not bool(got.isfinite().all()):
            continue  # infinitely steep
        if not length > max(SLACK * largest(left), CURVED * step):
            beside = float((got - left).norm())
            flat = float(bends.max()) <= FLAT * (1 + largest(y))  # and no jump there
            if flat and beside > max(100 * SLACK * largest(left), CURVED * step):
                return _smooth(case, tie, got, left)
            continue
        share = float(((got - left) * apart).sum()) / length**2
        beside = float((got - left - share * apart).norm()) / length
        if -10 * SLACK <= share <= 1 + 10 * SLACK and beside <= 10 * SLACK:
            continue
        places = _named(case, tie)
        here = [[float(g[i].reshape(-1)[k]) for i, k in tie] for g in grads]
        return Finding(
            check=NAME,
            severity="wrong",
            input=case.names[tie[0][0]],
            got=here[2][0],
            message=f"grad at {places[0]} and {places[1]}, which are equal, is {here[2][0]:.4g} and {here[2][1]:.4g}: "
            f"not between the gradients to either side of the tie, {here[0][0]:.4g} and {here[0][1]:.4g} or "
            f"{here[1][0]:.4g} and {here[1][1]:.4g}",
            cause=CAUSE,
        )
    return None


def _smooth(case: Case, tie: Tie, got: Tensor, expected: Tensor) -> Finding:
    """Return what is wrong where the function is smooth at the tie."""
    at = int((got - expected).abs().argmax())
    starts = _starts(case)
    which = max((i for i, start in starts.items() if start <= at), key=starts.__getitem__)
    places = _named(case, tie)
    g, e = float(got[at]), float(expected[at])
    return Finding(
        check=NAME,
        severity="wrong",
        input=case.names[which],
        got=g,
        expected=e,
        message=f"grad of {case.names[which]} is {g:.4g} where {places[0]} and {places[1]} are equal, "
        f"expected {e:.4g} as beside it: forward is smooth there",
        cause="another branch for equal elements",
    )


def _not_a_number(case: Case, tie: Tie, side: Plain, tied: Plain) -> Finding | None:
    """Return a gradient that is NaN where two inputs are equal, where forward is finite, and the gradient beside it.

    Inputs that are equal are often divided by their difference.
    """
    finite = all(bool(y.isfinite().all()) for y in tied.outputs) and bool(
        _flat(side.grads).isfinite().all()
    )
    across = tie[0][0] != tie[1][0]
    if not across or not finite or not bool(_flat(tied.grads).isnan().any()):
        return None
    places = _named(case, tie)
    return Finding(
        check=NAME,
        severity="wrong",
        input=case.names[tie[0][0]],
        got=float("nan"),
        message=f"grad at {places[0]} and {places[1]}, which are equal, is nan; beside it and in forward all is finite",
        cause="NaN or infinity made in backward: 0 / 0, or 0 · inf",
    )


def _named(case: Case, tie: Tie) -> list[str]:
    return [
        f"{case.names[i]} {list(map(int, np.unravel_index(k, case.leaves[i].shape)))}"
        for i, k in tie
    ]


CHECK = Check(
    name=NAME,
    tests="where two elements are equal the gradient is one of either side, or between",
    run=_run,
    order=84,
    needs=("no random numbers", "same values"),
    level="full",
)
