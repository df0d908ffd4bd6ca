"""Ties: where two elements are equal, a maximum has several gradients; what backward gives is one of them or between.

Two neighbours are made equal, at the largest or smallest place of a line. A little more of the one or of the other
breaks the tie: that gives the two gradients to either side. At the tie the gradient of an output element must lie on
the segment between them. `grad_output * (x == x.max())` gives their sum instead.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case, ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import largest

NAME = "ties"
NUDGE = 2.0**-20
SLACK = 1e-4  # of the distance between the two gradients; what smooth functions change by a nudge is below it

Pair = tuple[int, int]  # flat positions of two equal elements


def _run(case: Case) -> Iterator[Finding]:
    if case.draws or not case.steady:
        raise NotApplicable("forward draws random numbers")
    tested = False
    for which, leaf in enumerate(case.leaves):
        if leaf.is_complex() or case.names[which].startswith("parameter"):
            continue
        pairs = _pairs(leaf)
        try:
            sides = [_nudged(case, which, pairs, side).plain.grads[which] for side in (0, 1)]
        except ForwardRaised:
            continue
        tested = tested or bool(pairs)
        if not pairs or largest(sides[0] - sides[1]) <= SLACK * largest(sides[0]):
            continue  # smooth at the ties
        for pair in pairs:
            found = _at_tie(case, which, pair)
            if found:
                yield found
                return
    if not tested:
        raise NotApplicable("no two neighbours that can be made equal")


def _pairs(leaf: Tensor) -> list[Pair]:
    """Return neighbours along the last and the first dimension, at the maximum and the minimum; no two overlap."""
    places = torch.arange(leaf.numel()).view(leaf.shape)
    used: set[int] = set()
    pairs: list[Pair] = []
    for dim in dict.fromkeys((leaf.dim() - 1, 0) if leaf.dim() else ()):
        if leaf.shape[dim] < 2:
            continue
        lines = places.movedim(dim, -1).reshape(-1, leaf.shape[dim])
        for sign in (1.0, -1.0):
            free = [line for line in lines.tolist() if not used.intersection(line)]
            values = leaf.detach().cpu().reshape(-1) * sign
            if free:
                line = max(free, key=lambda line, v=values: max(float(v[i]) for i in line))
                k = max(range(len(line)), key=lambda k, line=line, v=values: float(v[line[k]]))
                pairs.append((line[k], line[k + 1 if k + 1 < len(line) else k - 1]))
                used.update(pairs[-1])
    return pairs


def _nudged(case: Case, which: int, pairs: list[Pair], side: int | None) -> Case:
    """Return the case with each pair tied, and then one of the two elements a little more; neither where ``None``."""

    def tie(i: int, t: Tensor) -> Tensor:
        if i != case.where[which]:
            return t
        flat = t.clone().reshape(-1)
        for pair in pairs:
            flat[pair[1]] = flat[pair[0]]
            if side is not None:
                flat[pair[side]] += NUDGE * max(float(flat[pair[0]].abs()), 2.0**-10)
        return flat.view(t.shape)

    return case.edited(tie)


def _at_tie(case: Case, which: int, pair: Pair) -> Finding | None:
    one, other, tied = (_nudged(case, which, [pair], side) for side in (0, 1, None))
    outputs = zip(one.kept[1], other.kept[1], tied.kept[1], strict=True)
    for number, (a, b, y) in enumerate(outputs):
        # The output that bends most is about the tie; alone, as each output may choose a gradient of its own.
        moved = (a + b - 2 * y).detach().abs().reshape(-1)
        if not moved.numel() or not bool(moved.max() > 0):
            continue
        v = [torch.zeros_like(y) for y in one.kept[1]]
        v[number].view(-1)[int(moved.argmax())] = 1.0
        left, right, got = (c.vjps([v])[0][which].double() for c in (one, other, tied))
        apart = right - left
        length = float(apart.square().sum())
        if not length > (SLACK * largest(left)) ** 2 or not bool(got.isfinite().all()):
            continue
        share = float(((got - left) * apart).sum()) / length
        beside = float((got - left - share * apart).norm()) / length**0.5
        if -SLACK * 10 <= share <= 1 + SLACK * 10 and beside <= 10 * SLACK:
            continue
        name = case.names[which]
        places = [list(map(int, np.unravel_index(i, case.leaves[which].shape))) for i in pair]
        g, low, high = (float(t.reshape(-1)[pair[0]]) for t in (got, left, right))
        return Finding(
            check=NAME,
            severity="wrong",
            input=name,
            got=g,
            message=f"grad of {name} where elements {places[0]} and {places[1]} are equal is {g:.4g} and "
            f"{float(got.reshape(-1)[pair[1]]):.4g}: not between the gradients to either side of the tie "
            f"({low:.4g} or {high:.4g} for the first)",
            cause="each of several equal elements gets the whole gradient: share it, or give it to one",
        )
    return None


CHECK = Check(
    name=NAME,
    tests="where two elements are equal the gradient is one of either side, or between",
    run=_run,
    order=84,
    level="full",
)
