"""Derivatives from values alone: central differences, extrapolated, with an error bound that is measured.

Sources:
    C. Ridders, "Accurate computation of F'(x) and F'(x) F''(x)", Advances in Engineering Software 4(2), 1982,
    doi:10.1016/S0141-1195(82)80057-0.
"""

import math
from collections.abc import Callable

__all__ = ["CURVED", "Slope", "central", "one_sided", "settle", "slope"]

CURVED = 2.0**13  # times what is allowed: what is plainly wrong, a kink or a pole is off by more
DEEP = 7  # step sizes where two did not settle it

Slope = tuple[float, float]  # value, error bound


def slope(phi: Callable[[float], float], step: float, noise: float, levels: int = 2) -> Slope:
    """Return φ'(0) and a bound of its error.

    φ is evaluated at ±step, ±step/4, ... (2·``levels`` calls) and the differences are extrapolated to step 0. The bound
    is what the last extrapolation changed, plus the rounding of φ.

    Args:
        phi: The function of one variable, centred: φ(t) - φ(0).
        step: First step, in units of the variable.
        noise: Rounding error of one value of φ, absolute.
        levels: How many step sizes, at least 2.
    """
    best: Slope = (math.nan, math.inf)
    previous: list[float] = []
    h = step
    for _ in range(levels):
        row = [(phi(h) - phi(-h)) / (2 * h)]
        factor = 1.0
        for k, older in enumerate(previous):
            factor *= 16.0  # the step shrinks by 4, the error terms are even powers of it
            row.append((factor * row[k] - older) / (factor - 1))
            # h^2 f'''/6 falls by 16 a level, so the change of one level bounds what is left 15 times over.
            change = max(abs(row[-1] - row[-2]), abs(row[-1] - older)) / (1 if k else 15)
            bound = change + 2 * noise / h
            if math.isfinite(row[-1]) and bound < best[1]:
                best = (row[-1], bound)
        previous = row
        h /= 4
    return best


def one_sided(
    phi: Callable[[float], float], step: float, noise: float, levels: int = 3
) -> tuple[Slope, Slope]:
    """Return the slopes of a centred φ to the left and to the right of 0, each with a bound of its error."""

    def side(sign: float) -> Slope:
        h = step
        best, older = (math.nan, math.inf), math.nan
        for _ in range(levels):
            here = sign * phi(sign * h) / h
            bound = abs(here - older) + 2 * noise / h
            if math.isfinite(bound) and bound < best[1]:
                best = (here, bound)
            older, h = here, h / 8
        return best

    return side(-1.0), side(1.0)


def central(phi: Callable[[float], float], step: float) -> tuple[float, float]:
    """Return the central difference of a centred φ, and by how much its two sides differ: much at a kink."""
    up, down = phi(step), phi(-step)
    return (up - down) / (2 * step), abs(up + down) / step


def settle(  # noqa: PLR0911  # one return a verdict
    phi: Callable[[float], float],
    got: float,
    allowed: float,
    step: float,
    noise: float,
    near: float,
) -> tuple[float, bool]:
    """Decide whether φ'(0) can be ``got``: cheaply where it can, with more step sizes where it seems not.

    Args:
        phi: The function of one variable, centred.
        got: The derivative to test.
        allowed: How far it may be off.
        step: First step.
        noise: Rounding error of one value of φ, absolute.
        near: Step at which rounding and h²·φ‴/6 are about equal: one difference with it agrees nearly always.

    Returns:
        The derivative, which is ``got`` where that is within the error, and whether the differences settle it. At a
        kink they do not, unless ``got`` lies outside of the two one-sided slopes.
    """
    close_by, bend = central(phi, near)
    soon = _soon(phi, close_by, got, allowed, step, near)
    if soon:
        return soon
    value, bound = slope(phi, step, noise)
    off = abs(value - got)
    if off <= allowed or (math.isfinite(bound) and not math.isfinite(got)):
        return value, True
    plain = (
        max(abs(close_by - value), bound) < 0.02 * off
    )  # smooth at all of these steps, and not got
    if plain and bend < 0.02 * off:  # and no kink: both sides have that slope
        return value, True
    if not plain:
        value, bound = slope(phi, 4 * step, noise, DEEP)
        if abs(value - got) <= max(allowed, 5 * bound):
            return got, bound < 0.1 * abs(got) or bound < allowed
    (left, left_bound), (right, right_bound) = one_sided(phi, step / 64, noise)
    low = min(left - left_bound, right - right_bound)
    high = max(left + left_bound, right + right_bound)
    kink = abs(left - right) > 10 * (left_bound + right_bound)
    if kink and low <= got <= high:
        return got, False  # any slope between the two is right
    if not math.isfinite(value):
        return value, False
    if not math.isfinite(got):
        return value, True
    return value, _settled(phi, value, bound, abs(value - got), step, noise, plain)


def _soon(
    phi: Callable[[float], float],
    close_by: float,
    got: float,
    allowed: float,
    step: float,
    near: float,
) -> tuple[float, bool] | None:
    """Return what ``close_by``, the difference with ``near``, and one more settle, if they do."""
    off = abs(close_by - got)
    if off <= allowed:
        return close_by, True
    shortest = 4 * step / 4.0 ** (DEEP - 1)
    if not math.isfinite(close_by) and not math.isfinite(central(phi, shortest)[0]):
        return close_by, False  # at the end of the domain, where no step is short enough
    if off < CURVED * allowed:
        value = close_by + (close_by - central(phi, 4 * near)[0]) / 15
        if abs(value - got) <= allowed:
            return value, True  # the rest is curvature, which falls as the square of the step
    return None


def _settled(
    phi: Callable[[float], float],
    value: float,
    bound: float,
    off: float,
    step: float,
    noise: float,
    plain: bool,
) -> bool:
    """Return whether other steps say the same as ``value``, which is ``off`` from what is tested."""
    tiny = step * 2.0**-14  # the function may bend within larger steps: a median that changes hands
    if not abs(central(phi, tiny)[0] - value) < 0.05 * off + 2 * noise / tiny:
        return False
    if plain:
        return True
    # Near a jump other steps say another thing.
    again, bound_again = slope(phi, 1.3 * step, noise, DEEP)
    return abs(again - value) < 0.05 * off and max(bound, bound_again) < 0.1 * off
