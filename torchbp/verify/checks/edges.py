"""Edges: ±0, kinks, tiny, large and infinite values, for functions that work element by element.

At each value forward is differenced to the left and to the right, as many values in one call as fit. The gradient must
lie between the two slopes: at a kink any subgradient is right, elsewhere there is one value. A value where forward is
not finite, or refuses, is outside of the function's domain; at its end there is one slope, or 0. Numbers among the
arguments, and bounds in the source, are values too; of two inputs of which only the difference counts, it has the
values: the other is 0. Of other functions the gradient is looked at where elements are such numbers, if forward is
smooth there.
"""

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.depends import elementwise
from torchbp.verify.options import options
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts
from torchbp.verify.slopes import evaluate, inside, slopes
from torchbp.verify.smooth import check_smooth
from torchbp.verify.source import bounds
from torchbp.verify.tensors import graph
from torchbp.verify.tolerance import largest

NAME = "edges"
HUGE = 1e12
EXPLODES = HUGE**2.5  # more than a square
MAGNITUDES = (0.0, 1.0, 1e-8, 0.5, 3.0, 6.0, 30.0, 800.0, 1e4, HUGE)
OPTIONS: Any = {"dtype": torch.float64, "device": "cpu"}  # whatever the default is
STEPS = (2.0**-12, 2.0**-15)  # times the root of the value, or 1
SIDES = [(h, sign) for h in STEPS for sign in (-1, 1)]
FAR = (1e6, 1e10)  # where a gradient that has a limit at infinity has about reached it
BEYOND = torch.tensor([torch.inf, -torch.inf, *FAR, *(-x for x in FAR)], **OPTIONS)
# So close to 0 that the gradient is that at 0: what takes large numbers from each other shows at one in four.
TINY = torch.tensor([(-1) ** k * 1e-17 * 1.7**k for k in range(16)], **OPTIONS)
TOLERANCE = 1e-3
FEW = 2  # points that are looked at more closely
MOST = 4  # numbers of the function's own
LARGE = 1e3  # beside which other elements are nothing
# What torch sums in steps of one, up from what is below 0: from -1e12 for hours.
SERIES = ("Polygamma", "SpecialZeta")


class _Points(NamedTuple):
    """What is asked of an input.

    Attributes:
        at: The values.
        size: Of each, that of which steps are a part.
    """

    at: Tensor
    size: Tensor

    @property
    def asked(self) -> Tensor:
        """The values, what lies beside them, what is tiny, and what is far away."""
        beside = (self.at + sign * h * self.size for h, sign in SIDES)
        return torch.cat([self.at, *beside, TINY, BEYOND])

    @property
    def home(self) -> Tensor:
        """For each that is asked the place of a value: its own, for what lies beside it."""
        home = torch.arange(len(self.asked), device="cpu") % len(self.at)
        home[len(self.at) * (1 + len(SIDES)) : -len(BEYOND)] = 0
        return home


def _run(case: Case) -> Iterator[Finding]:
    chosen = elementwise(case)
    if not chosen:
        yield from _at_own(case)
        return
    points = _points(case)
    summed = any(n.name().startswith(SERIES) for n in graph(case.kept[1]))
    asked = points.asked.where(points.asked > -1e5, torch.nan) if summed else points.asked
    base = _at_difference(case, chosen)
    found_at, together = slopes(base, chosen, asked, points.home, len(points.at))
    for which, (y, g) in found_at.items():
        n, tiny = len(BEYOND), g[-len(BEYOND) - len(TINY) : -len(BEYOND)]
        home = inside(case.leaves[which], points.at)
        found = list(
            _at_points(base, which, points, home, y[: -n - len(TINY)], g[: -n - len(TINY)])
        )
        yield from found
        if together and not found:
            defined = y[-n - len(TINY) : -n].isfinite()
            g_points = g[: len(points.at)]
            yield from _at_tiny(case, which, points, y, g_points, tiny.where(defined, g[0]))
        yield from _at_infinity(case, which, y[-n:], g[-n:])


def _points(case: Case) -> _Points:
    """Return the values that every input is given, of either sign, those of the arguments among them."""
    own = [x for x in _own(case) if x not in MAGNITUDES]
    magnitudes = (*MAGNITUDES, *own[:MOST])
    at = torch.tensor([sign * m for m in magnitudes for sign in (1, -1)], **OPTIONS)
    return _Points(at, at.abs().clamp(min=1.0).sqrt())


def _own(case: Case) -> list[float]:
    """Return the magnitudes of the function's own numbers: arguments, and bounds that its source names."""
    given = [x for x in options(case).values() if type(x) is float and math.isfinite(x)]
    return [x for x in dict.fromkeys(map(abs, (*given, *bounds(case)))) if 0 < x < HUGE]


def _at_own(case: Case) -> list[Finding]:
    """Compare the gradient where some elements of the first input are such numbers, and those of its like are 0."""
    leaves = zip(case.where, case.leaves, strict=True)
    inputs = [i for i, t in leaves if i < case.size and not t.is_complex() and t.numel() > 1]
    numbers = [sign * x for x in _own(case)[:MOST] if x < LARGE for sign in (1, -1)]
    if not (numbers and inputs):
        raise NotApplicable("no input that is worked on element by element")
    first = case.flat[inputs[0]]
    at = torch.tensor(numbers[: first.numel() - 1], **OPTIONS)
    at = at[inside(first, at)].to(first)

    def change(i: int, t: Tensor) -> Tensor:
        if i not in inputs or t.shape != first.shape:
            return t
        flat = t.clone().reshape(-1)
        flat[: len(at)] = at if i == inputs[0] else 0
        return flat.view(t.shape)

    other = case.edited(change)
    if not accepts(other):
        raise NotApplicable("forward refuses its own numbers, and works not element by element")
    when = f" where elements are {', '.join(f'{x:g}' for x in at.tolist())}"
    found = check_smooth(other, NAME, when, max(map(largest, case.plain.grads)))
    return [found] if found else []


def _at_difference(case: Case, chosen: list[int]) -> Case:
    """Return the case with two inputs 0, of which the difference alone counts: what one is given is that.

    But for the last two elements, which keep what shows the domain.
    """
    pairs = (
        (i, j)
        for i, j in combinations(chosen, 2)
        if torch.equal(case.plain.grads[i], -case.plain.grads[j])
    )
    if not (pair := next(pairs, None)):
        return case
    where = [case.where[i] for i in pair]
    other = case.edited(lambda i, t: _mostly_zero(t) if i in where else t)
    return other if accepts(other) else case


def _mostly_zero(t: Tensor) -> Tensor:
    flat = torch.zeros_like(t, memory_format=torch.contiguous_format).reshape(-1)
    flat[-2], flat[-1] = t.min(), t.max()
    return flat.view(t.shape)


def _at_points(
    case: Case, which: int, points: _Points, home: Tensor, values: Tensor, slopes: Tensor
) -> Iterator[Finding]:
    """Compare the gradient at each point with the slopes to its left and right; what is not at ``home`` is a note."""
    at, size = points
    y, *beside = values.split(len(at))
    g = slopes[: len(at)]
    left, right, left_near, right_near = (
        (there - y) / (sign * h * size) for there, (h, sign) in zip(beside, SIDES, strict=True)
    )
    noise = 8 * case.epsilon * y.abs() / (STEPS[1] * size)
    drift = torch.maximum((left - left_near).abs(), (right - right_near).abs())
    low, high = torch.minimum(left_near, right_near), torch.maximum(left_near, right_near)
    steepness = torch.maximum(low.abs(), high.abs())
    settled = y.isfinite() & (drift <= 0.05 * steepness + TOLERANCE + noise)
    # At the end of the domain there is one side: the gradient is its slope, or 0, or between.
    known = left_near.isfinite(), right_near.isfinite()
    end = known[0] ^ known[1]
    far, near = (torch.where(known[0], a, b) for a, b in ((left, right), (left_near, right_near)))
    settled |= end & y.isfinite() & ((far - near).abs() <= 0.05 * near.abs() + TOLERANCE + noise)
    low, high = low.where(~end, near.clamp(max=0)), high.where(~end, near.clamp(min=0))
    drift, steepness = drift.where(~end, (far - near).abs()), steepness.where(~end, near.abs())
    # NaN is no slope, whichever it is: enough that those of shorter steps are not steeper.
    flat = [
        b.abs() <= a.abs() + noise + TOLERANCE for a, b in ((left, left_near), (right, right_near))
    ]
    bounded = (flat[0] | ~known[0]) & (flat[1] | ~known[1]) & (known[0] | known[1])
    settled |= g.isnan() & y.isfinite() & bounded
    settled &= STEPS[1] * size > case.epsilon * at.abs()  # else that rounds the step away
    slack = TOLERANCE * (1 + steepness) + 4 * drift + noise
    slope = near.where(end, right_near)
    wrong = settled & ~((g >= low - slack) & (g <= high + slack))
    # What overflows at 1e12 alone is a smaller domain, and what explodes there.
    home = torch.where(g.isfinite(), (home | end) & (y.abs() < EXPLODES), at.abs() < HUGE)
    for i in wrong.nonzero().flatten().tolist()[:FEW]:
        if not bool(g[i].isnan()) and _stairs(case, which, float(at[i]), float(g[i])):
            continue
        kink = bool((high - low)[i] > 4 * slack[i])
        p, got = float(at[i]), float(g[i])
        expected = (
            f"between {float(low[i]):.4g} and {float(high[i]):.4g}"
            if kink
            else f"{float(slope[i]):.4g}"
        )
        name = case.names[which]
        yield Finding(
            check=NAME,
            severity="wrong" if home[i] else "note",
            input=name,
            message=f"grad of {name} at the value {p:g} is {got:.4g}, expected {expected}",
            got=got,
            expected=float(slope[i]),
            ratio=got / float(slope[i]) if slope[i] else None,
            cause="NaN or infinity made in backward: an overflow, 0 · inf, or NaN through where"
            if not torch.isfinite(g[i])
            else "outside of the subgradient at a kink"
            if kink
            else "another branch than forward's",
        )
        return


def _at_tiny(
    case: Case, which: int, points: _Points, values: Tensor, slopes: Tensor, tiny: Tensor
) -> Iterator[Finding]:
    """Compare the gradient close to 0 with that at 0, where forward has one and the same slope to both sides."""
    y, below, above = (float(values[k * len(points.at)]) for k in (0, 3, 4))
    h = STEPS[1] * float(points.size[0])
    left, right, got = (y - below) / h, (above - y) / h, float(slopes[0])
    slack = TOLERANCE * (1 + abs(got)) + 8 * case.epsilon * abs(y) / h
    off = (tiny - got).abs()
    off = torch.where(tiny.isfinite(), off, torch.inf)
    if not max(abs(left - got), abs(right - got)) <= slack or not bool(off.max() > slack):
        return
    worst = int(off.argmax())
    name, p, g = case.names[which], float(TINY[worst]), float(tiny[worst])
    yield Finding(
        check=NAME,
        severity="wrong",
        input=name,
        message=f"grad of {name} at the value {p:.3g} is {g:.4g}, expected {got:.4g}, as at 0",
        got=g,
        expected=got,
        ratio=g / got if got else None,
        cause="large numbers that cancel in backward, or a division by what is about 0",
    )


def _stairs(case: Case, which: int, point: float, gradient: float) -> bool:
    """Return whether in far shorter steps the slopes are others: those were over the steps of a function like round.

    Or whether the gradient is another, and one of the slopes, where the point stands alone: of the largest of several.
    All are of one element, for which the other inputs are the same.
    """

    def value(at: float) -> float:
        return float(evaluate(case, which, torch.tensor([at], **OPTIONS))[0])

    y, g = (float(t) for t in evaluate(case, which, torch.tensor([point], **OPTIONS)))
    h = STEPS[1] * max(1.0, abs(point)) ** 0.5
    near = h / 64
    noise = 8 * case.epsilon * abs(y) / near
    slopes = [
        ((value(point + sign * near) - y) / near, (value(point + sign * h) - y) / h)
        for sign in (-1, 1)
    ]
    alone = any(abs(g - b) <= TOLERANCE * (1 + abs(b)) + noise for _, b in slopes)
    return (alone and abs(g - gradient) > TOLERANCE * (1 + abs(g))) or any(
        abs(a - b) > 0.05 * abs(b) + TOLERANCE + noise for a, b in slopes
    )


def _at_infinity(case: Case, which: int, values: Tensor, grads: Tensor) -> Iterator[Finding]:
    """Where forward is finite at ±inf, the gradient is the limit of that at large values, where there is one."""
    infinite, limits = (torch.inf, -torch.inf), grads[2:]
    for i in range(2):
        near, last = limits[2 * i : 2 * i + 2].tolist()
        if (
            bool(values[i].isfinite())
            and not bool(grads[i].isfinite())
            and abs(near - last) <= TOLERANCE * (1 + abs(last))
        ):
            name = case.names[which]
            yield Finding(
                check=NAME,
                severity="note",
                input=name,
                message=f"grad of {name} at the value {infinite[i]} is {float(grads[i])}, "
                f"expected {last:.4g}, its limit",
                got=float(grads[i]),
                expected=last,
                cause="0 · inf or inf - inf in backward; forward is finite there",
            )
            return


CHECK = Check(
    name=NAME,
    tests="the gradient is right at 0, kinks, tiny, large and infinite values",
    run=_run,
    order=84,
    needs=("no random numbers", "same values"),
    level="full",
    differences=True,
)
