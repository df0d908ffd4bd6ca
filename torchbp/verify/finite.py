"""Gradients that are not finite where forward is finite and smooth."""

import math

import torch

from torchbp.verify.cases import Case
from torchbp.verify.differences import Slope, one_sided
from torchbp.verify.lines import Lines
from torchbp.verify.report import Finding
from torchbp.verify.tensors import Directions, real, signed_like
from torchbp.verify.tolerance import largest

__all__ = ["not_finite", "not_finite_at"]

STEP = 2.0**-12
SHORT = 2.0**-24  # where what is clamped, a norm beside 0, is no kink yet


def _sides(lines: Lines, direction: Directions, step: float) -> tuple[Slope, Slope]:
    """Return the slopes of forward to either side along ``direction``, one tensor a leaf, with their bounds."""
    return one_sided(lambda t: lines.value(direction, t), step, lines.noise)


def _are_one(sides: tuple[Slope, Slope], typical: float) -> bool:
    """Whether these are one finite slope."""
    (left, left_bound), (right, right_bound) = sides
    size = max(abs(left), abs(right))
    slack = 1e-4 * size + 1e-6 + 2 * (left_bound + right_bound)
    steep = max(left_bound, right_bound) > 0.05 * size + 1e-3 * typical
    return math.isfinite(size) and not steep and abs(left - right) <= slack


def _are_known(sides: tuple[Slope, Slope], typical: float) -> bool:
    """Whether each is finite, be it another than the other; or the only one, at the end of the domain."""
    there = [side for side in sides if not math.isnan(side[0])]
    return bool(there) and all(
        math.isfinite(s) and bound <= 0.05 * abs(s) + 1e-3 * typical for s, bound in there
    )


def not_finite(case: Case, check: str, when: str, *, kinks: bool = False) -> Finding | None:
    """Return the first gradient that is not finite, of whichever input, though forward is finite and smooth along it.

    With ``kinks`` also one that is NaN where forward has a slope to either side, or to the one there is.
    """
    lines = Lines(case)
    # Differences of large outputs are no closer than this.
    typical = 1 + max(largest(torch.where(g.isfinite(), g, 0)) for g in case.plain.grads)
    for which, leaf in enumerate(case.leaves):
        if not_finite_at(case, which):
            g = real(case.plain.grads[which]).cpu()
            d = real(signed_like(leaf, case.generator(check))).cpu() * lines.scales[which]
            d[g.isfinite()] = 0
            if kinks:  # into the domain, if that ends there
                d = torch.where(real(leaf).cpu() == 0, d.abs(), d)
            for step in (STEP, SHORT):
                sides = _sides(lines, {which: d}, step)
                if _are_one(sides, typical):
                    return _finding(
                        case, which, check, f"{when}, where forward is finite and smooth"
                    )
                if kinks and bool(g.isnan().any()) and _are_known(sides, typical):
                    return _finding(
                        case, which, check, f"{when}, and forward has a slope to a side"
                    )
    return None


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
