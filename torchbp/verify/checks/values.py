"""Values: the gradient equals the slope of the function, measured by finite differences.

⟨v, f(x)⟩ is differenced for one random v of both signs over all outputs at once, while all inputs move together in
a random direction of both signs: the number of calls does not grow with the size. First by the trapezoidal rule, which
a right gradient nearly always meets, then by central differences. Where the direction disagrees, or
does not settle because of a kink, each element is moved alone if there are at most 64 real numbers; beyond that the
direction is halved until the culprit is left. A mismatch is measured again with more step sizes before it counts, and a
kink is told by its two one-sided slopes, between which any gradient is right.
"""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.builtin import inexact
from torchbp.verify.calls import Plain
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_beside
from torchbp.verify.halving import culprit
from torchbp.verify.lines import STEP, Lines, Step
from torchbp.verify.report import Finding
from torchbp.verify.tensors import Directions, like, like_mask, real
from torchbp.verify.tolerance import compare

NAME = "values"
EACH = 64  # real numbers up to which every one is moved alone, where the direction does not agree
OTHERS = 2  # grad_outputs beside the first, of two backwards each
ALONE = 2  # beyond that: this many
GROUP = 4  # elements moved together where all agree, in low precision
MOST = 150  # calls for that; once one element is known to be wrong, the others need not all be looked at


def _run(case: Case) -> Iterator[Finding]:
    lines = Lines(case)
    yield from _inexact(case)
    size = sum(g.numel() * (1 + g.is_complex()) for g in lines.grads)
    direction = lines.direction(0)
    rises = lines.rises(direction)
    agrees = rises or lines.agrees(direction)
    agrees = agrees and (_rises_for_others(case, lines, direction) or None)
    exact = case.epsilon < 1e-12  # else the tolerance of a direction would hide a single element
    if agrees and (exact or size > EACH):
        found = None if rises and not lines.hidden else check_beside(case, lines, direction, NAME)
        if found:
            yield found
        return
    known = [torch.zeros_like(real(g), dtype=torch.bool) for g in lines.grads]
    truth = [real(g).clone() for g in lines.grads]
    unsettled = 0
    elements = list(_elements(case, lines))
    elements = _in_question(lines, direction, elements) if agrees else elements
    enough = case.calls.forward + MOST
    for which, index in elements:
        if case.calls.forward > enough and _disagrees(lines, truth, known):
            break
        value, settled = lines.along_element(which, index, quick=agrees is False)
        unsettled += not settled
        known[which][index] = settled
        truth[which][index] = value
    for which, (name, g, leaf) in enumerate(zip(case.names, lines.grads, case.leaves, strict=True)):
        found = compare(
            NAME,
            name,
            g,
            like(truth[which], g),
            lines.tolerance(which),
            known=like_mask(known[which], g),
            leaf=leaf,
            ones=lines.ones(which),
            sizes=_sizes(case),
        )
        if found:
            case.wrong_here = True
            yield found
    if not case.wrong_here and size > EACH and agrees is False:
        found = culprit(lines, 0, NAME)
        if found:
            case.wrong_here = True
            yield found
    if unsettled == len(elements) and agrees is None:
        raise NotApplicable("finite differences settle nowhere: no smooth point in the sample")


def _inexact(case: Case) -> Iterator[Finding]:
    what, off = inexact(case)
    if what:
        yield Finding(
            check=NAME,
            severity="note",
            message=f"torch's {what} has a gradient that is right to {-math.log10(off):.0f} digits: "
            "no more are asked of this function",
            cause="a constant of float32",
        )


def _in_question(
    lines: Lines, direction: Directions, elements: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the elements, of a direction that agrees, of those few along which together it does not."""
    left = []
    for start in range(0, len(elements), GROUP):
        group = elements[start : start + GROUP]
        part = {i: torch.zeros_like(d) for i, d in direction.items()}
        for i, k in group:
            part[i][k] = direction[i][k]
        left += [] if lines.agrees_nearby(part) else group
    return left


def _rises_for_others(case: Case, lines: Lines, direction: Directions) -> bool:
    """Whether all is well for other grad_outputs too: chance may hide in one what is wrong in the eighth digit."""
    if lines.at_once:
        case.memo[STEP] = Step(direction, lines.near, *lines.end)
    for number in range(OTHERS if lines.at_once else 0):
        v = case.cotangents(case.plain.outputs, f"{NAME} {number}")
        other = copy.copy(case)
        other.plain = Plain(case.plain.outputs, v, case.vjps([v])[0])
        if not lines.rises_for(other, direction):
            return False
    return True


def _disagrees(lines: Lines, truth: list[Tensor], known: list[Tensor]) -> bool:
    """Whether some element that is settled is wrong."""
    return any(
        bool((known[i] & ((truth[i] - real(g)).abs() > real(lines.tolerance(i)).max())).any())
        for i, g in enumerate(lines.grads)
    )


def _elements(case: Case, lines: Lines) -> Iterator[tuple[int, int]]:
    grads = lines.grads
    sizes = [g.numel() * (1 + g.is_complex()) for g in grads]
    if sum(sizes) <= EACH:
        yield from ((i, j) for i, n in enumerate(sizes) for j in range(n) if lines.scales[i][j])
        return
    largest = max(range(len(sizes)), key=lambda i: sizes[i])
    n = sizes[largest]
    generator = case.generator("elements")
    random = int(torch.randint(n, (), generator=generator, device="cpu"))
    steepest = int(real(grads[largest]).abs().nan_to_num(torch.inf).argmax())
    alone = dict.fromkeys([steepest, n - 1, random][:ALONE])
    yield from ((largest, j) for j in alone if lines.scales[largest][j])


def _sizes(case: Case) -> list[int]:
    found: list[int] = []
    for t in (*case.leaves, *case.plain.outputs):
        found += [t.numel(), *t.shape]
    return sorted({n for n in found if n > 1}, reverse=True)


CHECK = Check(
    name=NAME,
    tests="the gradient equals finite differences of <v, f(x)> for a random signed v",
    run=_run,
    order=10,
    needs=("same values",),
    differences=True,
)
