"""The gradient at another sample than the user's: held against the slope along random lines, as at the user's own."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchbp.verify._check import NotApplicable, Refused
from torchbp.verify.cases import Case
from torchbp.verify.conditioning import spread, terms
from torchbp.verify.duals import jvp_by_hand
from torchbp.verify.finite import not_finite
from torchbp.verify.further import further
from torchbp.verify.halving import culprit
from torchbp.verify.lines import Lines
from torchbp.verify.otherwise import differs_otherwise
from torchbp.verify.raised import BackwardRaised, ForwardRaised, is_deliberate, reason
from torchbp.verify.report import Finding
from torchbp.verify.tensors import Directions

__all__ = ["check_beside", "check_lines", "wrote"]

BESIDE = 2.0**-4  # of the inputs
CLOSE = 1e-3  # a gradient that may be off by rounding
ASKED = "how often no length of steps told whether the gradient is right, by check"
ENOUGH = 1  # of these; what is wrong is so in short steps, too
MOVED = 16.0  # times what one rounding of all inputs does to it


def check_lines(
    case: Case,
    check: str,
    when: str = "",
    number: int = 1,
    *,
    elsewhere: bool = True,
    beside: bool = True,
    beyond: bool = True,
    rather: Callable[[], Finding | None] | None = None,
) -> Finding | None:
    """Compare the gradient at the sample of ``case`` with differences along random lines.

    Args:
        case: The function, at the sample to test.
        check: Name of the check that asks.
        when: The condition, for the message.
        number: How many lines; one forward and one backward each where all is well.
        beside: Whether to look beside the sample too where the gradient there seems to be wrong and is right in it.
        beyond: Whether to look at forward mode and second derivatives too, where they are written by hand.
        rather: What to say instead, if there is something, before the culprit is looked for: at a plainer sample.
        elsewhere: Whether the sample is so far from the user's that rounding is less well known.
    """
    if case.wrong_here:
        raise NotApplicable("the gradient is wrong at the sample itself: see values")
    done, found = _without_lines(case, check, when)
    if done:
        return found
    dual = beyond and jvp_by_hand(case)
    lines = Lines(case, elsewhere=elsewhere, otherwise=True, dual=dual)
    for n in range(number):
        direction = lines.direction(n)
        rises = lines.rises(direction)
        if rises and not lines.hidden:
            found = further(case, lines, direction, check, when) if beyond else None
        else:
            found = _in_question(case, lines, n, check, when, rather, rises=rises, beside=beside)
        if found:
            return found
    return None


def _in_question(
    case: Case,
    lines: Lines,
    number: int,
    check: str,
    when: str,
    rather: Callable[[], Finding | None] | None,
    *,
    rises: bool,
    beside: bool,
) -> Finding | None:
    """Return what is wrong where one step did not say that all is well."""
    direction, asked = lines.direction(number), case.given.memo.setdefault(ASKED, Counter())
    if lines.unlike and asked[check] >= ENOUGH:
        return None
    agrees = rises or lines.agrees(direction)
    if agrees is not False:
        asked[check] += lines.unlike
    elif lines.unlike and lines.jumps(direction):
        return None
    else:
        instead = rather() if rather else None
        if instead:
            return instead
        found = culprit(lines, number, check, when)
        return None if found and _is_rounding(case, found) else found
    found = None if rises else differs_otherwise(case, check, when)
    if agrees and beside and not found:
        found = check_beside(case, lines, direction, check, when)
    return found


def _is_rounding(case: Case, found: Finding) -> bool:
    """Whether the gradient is off by no more than rounding of inputs and grad_output moves it: about singular."""
    got, expected = found.got, found.expected
    if got is None or expected is None or not abs(got - expected) < CLOSE * abs(expected):
        return False
    which = case.names.index(str(found.input))
    size = max(float(case.plain.grads[which].norm()), terms(case))
    explained = MOVED * size * spread(case, torch.float64)[which]
    return math.isfinite(explained) and abs(got - expected) <= explained


def _without_lines(case: Case, check: str, when: str) -> tuple[bool, Finding | None]:
    """Return whether that is all there is to say, and what is, before anything is differenced."""
    try:
        grads = case.plain.grads
    except BackwardRaised as error:
        return True, _raised(check, when, error)
    if case.writes:
        return True, wrote(case, check, when)
    if not _finite(grads):
        return True, not_finite(case, check, when)
    return not any(g.numel() for g in grads), None


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)


def check_beside(
    case: Case, lines: Lines, direction: Directions, check: str, when: str = ""
) -> Finding | None:
    """Compare the gradient a step away from the sample, in which weights of 1 or a bias of 0 may hide a fault."""
    there = dict(zip(case.where, lines.moved(direction, BESIDE), strict=True))
    other = case.edited(lambda i, t: there[i].detach() if i in there else t, parameters=True)
    try:
        finite = _finite(other.all_outputs)
    except ForwardRaised:
        return None
    return check_lines(other, check, f"{when} beside the sample", beside=False) if finite else None


def wrote(case: Case, check: str, when: str) -> Finding:
    """Return what is to be said of a backward that writes in its grad_output or an input, which others may read."""
    elements = f"{case.wrote} elements of grad_output" if case.wrote else case.touched
    return Finding(
        check=check,
        severity="wrong",
        message=f"backward writes to {elements}{when}",
        got=float(case.wrote) or None,
        cause="an in-place operation on what backward was given: the next node reads it too",
    )


def _raised(check: str, when: str, error: BackwardRaised) -> Finding:
    """Return what is to be said of a backward that fails where forward does not; raise Refused where it was meant."""
    cause = error.__cause__ or error
    if is_deliberate(cause):
        raise Refused(f"{when.strip()}: backward raises {reason(cause)}") from error
    return Finding(
        check=check,
        severity="wrong",
        message=f"backward raised {reason(cause)}{when}",
        cause="backward fails where forward does not",
    )
