"""Gradients that are not finite where forward is finite and smooth."""

import math

import torch

from torchbp.verify.cases import Case
from torchbp.verify.differences import one_sided
from torchbp.verify.lines import Lines
from torchbp.verify.report import Finding
from torchbp.verify.tensors import Directions, real, signed_like

__all__ = ["not_a_number", "not_finite", "not_finite_at"]

STEP = 2.0**-12
SHORT = 2.0**-24  # where what is clamped, a norm beside 0, is no kink yet


def _is_smooth(lines: Lines, direction: Directions, step: float) -> bool:
    """Whether forward has one finite slope along ``direction``, one tensor a leaf."""
    (left, left_bound), (right, right_bound) = one_sided(
        lambda t: lines.value(direction, t), step, lines.noise
    )
    size = max(abs(left), abs(right))
    slack = 1e-4 * size + 1e-6 + 2 * (left_bound + right_bound)
    steep = max(left_bound, right_bound) > 0.05 * size + 1e-3
    return math.isfinite(size) and not steep and abs(left - right) <= slack


def not_finite(case: Case, check: str, when: str) -> Finding | None:
    """Return the first gradient that is not finite, of whichever input, though forward is smooth along it."""
    lines = Lines(case)
    for which, leaf in enumerate(case.leaves):
        if not_finite_at(case, which):
            d = real(signed_like(leaf, case.generator(check))).cpu() * lines.scales[which]
            d[real(case.plain.grads[which]).cpu().isfinite()] = 0
            if any(_is_smooth(lines, {which: d}, step) for step in (STEP, SHORT)):
                return _finding(case, which, check, when)
    return None


def not_a_number(case: Case, check: str, when: str) -> Finding | None:
    """Return the first gradient that is NaN where forward has a slope to either side, be it another to each."""
    lines = Lines(case)
    for which, leaf in enumerate(case.leaves):
        nan = real(case.plain.grads[which]).cpu().isnan()
        if bool(nan.any()):
            d = real(signed_like(leaf, case.generator(check))).cpu() * lines.scales[which] * nan
            if any(_has_slopes(lines, {which: d}, step) for step in (STEP, SHORT)):
                return _finding(case, which, check, when)
    return None


def _has_slopes(lines: Lines, direction: Directions, step: float) -> bool:
    """Whether forward has a finite slope to each side along ``direction``."""
    sides = one_sided(lambda t: lines.value(direction, t), step, lines.noise)
    return all(math.isfinite(s) and bound <= 0.05 * abs(s) + 1e-3 for s, bound in sides)


def not_finite_at(case: Case, which: int) -> bool:
    """Whether the gradient of this leaf is not finite everywhere."""
    return not bool(case.plain.grads[which].isfinite().all())


def _finding(case: Case, which: int, check: str, when: str) -> Finding:
    g = (
        torch.view_as_real(case.plain.grads[which])
        if case.plain.grads[which].is_complex()
        else case.plain.grads[which]
    )
    at = tuple((~g.isfinite()).nonzero()[0].tolist())
    count = int((~g.isfinite()).sum())
    name = case.names[which]
    return Finding(
        check=check,
        severity="wrong",
        input=name,
        index=at,
        got=float(g[at]),
        message=f"grad of {name} is not finite in {count}/{g.numel()} elements, "
        f"first {float(g[at])} at {list(at)}{when}",
        cause="NaN or infinity made in backward: an overflow, 0 · inf, or a division by 0",
    )
