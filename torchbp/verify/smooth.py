"""The gradient at samples where forward may have a kink or a pole: nothing is said of one that has."""

import re

import torch

from torchbp.verify.cases import Case
from torchbp.verify.conditioning import moved_by
from torchbp.verify.differences import central
from torchbp.verify.duals import by_hand
from torchbp.verify.elsewhere import check_lines, wrote
from torchbp.verify.finite import not_finite
from torchbp.verify.lines import Lines
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts, runs
from torchbp.verify.source import speaks
from torchbp.verify.tensors import Directions
from torchbp.verify.tolerance import largest

__all__ = [
    "COINCIDENT",
    "check_smooth",
    "leaves_a_question",
    "right_at_once",
    "right_soon",
    "whether_right",
]

COINCIDENT = "two inputs whose gradients are finite where their rows are equal"
DECOMPOSED = re.compile(r"svd|eig|cholesky|\bqr\b|inverse|\binv\b|pinv|solve|det\b")

MOVED = 1e-3  # of a gradient, by inputs rounded otherwise
STEEP = 1e6  # times as large gradients: rounding decides


def check_smooth(
    case: Case,
    check: str,
    when: str,
    most: float,
    *,
    singular: bool = False,
    asked: bool = False,
) -> Finding | None:
    """Compare the gradient with the slope of forward along a random line, unless forward is not smooth along it.

    Args:
        case: The function, at the sample to test.
        check: Name of the check that asks.
        when: The condition, for the message.
        most: The largest gradient in the user's sample.
        singular: Whether a matrix is singular there; then a gradient need not be finite.
        asked: Whether a question is known to be left, in a batch.
    """
    try:
        grads = case.plain.grads
    except BackwardRaised:
        return None  # loud, where much may be undefined
    if case.writes:
        return wrote(case, check, when)
    if not all(bool(g.isfinite().all()) for g in grads):
        if singular:
            return None
        # At a kink torch's own chain of functions may give NaN, and equal singular values may.
        kinks = by_hand(case) and not speaks(case, DECOMPOSED)
        return not_finite(case, check, when, kinks=kinks)
    lines = Lines(case, elsewhere=True)
    if not (asked or leaves_a_question(case, lines, most)) or _is_rounding(case):
        return None
    return check_lines(case, check, when, beside=False, elsewhere=False)


def leaves_a_question(case: Case, lines: Lines, most: float) -> bool:
    """Whether the gradient seems not to be the slope along a random line, and forward smooth along it."""
    grads = case.plain.grads
    if not all(bool(g.isfinite().all()) for g in grads):
        return True
    if max(map(largest, grads)) > STEEP * (1 + most):
        return False  # about singular
    direction = lines.direction(0)
    return not lines.rises_at_once(direction) and _is_linear(lines, direction)


def right_at_once(case: Case) -> bool:
    """Whether forward takes the sample, and its gradient is that of a short step; ``False`` leaves a question."""
    lines = Lines(case, elsewhere=True) if _is_ready(case) else None
    return bool(lines and lines.rises_at_once(lines.direction(0)))


def whether_right(case: Case) -> bool | None:
    """The same; ``False`` where forward is not smooth along that step, ``None`` where a question is left."""
    lines = Lines(case, elsewhere=True) if _is_ready(case) else None
    if not lines:
        return None
    direction = lines.direction(0)
    if lines.rises_at_once(direction):
        return True
    return None if _is_linear(lines, direction) else False


def right_soon(case: Case) -> bool:
    """The same, of a few shorter steps too, and of a gradient that is asked for in other ways at their ends."""
    lines = Lines(case, elsewhere=True, otherwise=True) if _is_ready(case) else None
    return bool(lines and lines.rises(lines.direction(0)) and not lines.hidden)


def _is_ready(case: Case) -> bool:
    ready = accepts(case) and runs(case) and not case.writes
    return ready and all(bool(g.isfinite().all()) for g in case.plain.grads)


def _is_rounding(case: Case) -> bool:
    """Whether the gradient is another where inputs are rounded otherwise, and wrong there too: of a singular matrix.

    One that is right there takes a branch of its own in the sample.
    """
    rounded = moved_by(2 * torch.finfo(torch.float64).eps, case)
    other = case.variant(rounded, parameters=True)
    try:
        moved = zip(other.plain.grads, case.plain.grads, strict=True)
        if all(float((g - e).norm()) <= MOVED * float(e.norm()) for g, e in moved):
            return False
        lines = Lines(other, elsewhere=True)
        return not lines.rises_at_once(lines.direction(0))
    except (ForwardRaised, BackwardRaised):
        return False


def _is_linear(lines: Lines, direction: Directions) -> bool:
    """Whether forward has one slope along ``direction``, that is not the gradient's, and its parts' add up to it.

    Those of a median of equal elements do not. ``lines`` has just gone up.
    """
    up, step = lines.rise, lines.near
    whole, bend = central(lambda t: up if t > 0 else lines.value(direction, t), step)
    off = abs(whole - lines.along(direction))
    slack = 0.02 * off - 2 * lines.noise / step
    if not bend < slack:
        return False
    for period in (2, 3):
        even = torch.arange(max(map(len, direction.values())), device="cpu") % period == 0
        parts = [
            {i: d * (even[: len(d)] == k) for i, d in direction.items()} for k in (True, False)
        ]
        rises = [lines.value(part, step) for part in parts]
        if not abs(whole - sum(rises) / step) < slack:
            return False
        bends = (abs(rise + lines.value(d, -step)) for d, rise in zip(parts, rises, strict=True))
        if not all(bend / step < slack for bend in bends):
            return False
    return True
