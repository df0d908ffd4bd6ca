"""Edges: ±0, kinks, tiny, large and infinite values, for functions that work element by element.

At each value forward is differenced to the left and to the right, as many values in one call as fit. The gradient must
lie between the two slopes: at a kink any subgradient is right, elsewhere there is one value. A value where forward is
not finite, or refuses, is outside of the function's domain.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.growth import elementwise, fits, free_sizes
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts, resized

NAME = "edges"
MAGNITUDES = (0.0, 1.0, 1e-8, 0.5, 3.0, 6.0, 30.0, 800.0, 1e4)
OPTIONS: Any = {"dtype": torch.float64, "device": "cpu"}  # whatever the default is
POINTS = torch.tensor([sign * m for m in MAGNITUDES for sign in (1, -1)], **OPTIONS)
SIZE = POINTS.abs().clamp(min=1.0).sqrt()
STEPS = (2.0**-12, 2.0**-15)  # times SIZE
SIDES = [(h, sign) for h in STEPS for sign in (-1, 1)]
FAR = (1e6, 1e10)  # where a gradient that has a limit at infinity has about reached it
BEYOND = torch.tensor([torch.inf, -torch.inf, *FAR, *(-x for x in FAR)], **OPTIONS)
# So close to 0 that the gradient is that at 0: what takes large numbers from each other shows at one in four.
TINY = torch.tensor([(-1) ** k * 1e-17 * 1.7**k for k in range(16)], **OPTIONS)
# All that is asked of an input: the points, what lies beside them, what is tiny, and what is far away.
ASKED = torch.cat([POINTS, *(POINTS + sign * h * SIZE for h, sign in SIDES), TINY, BEYOND])
# A point, and what lies beside it: one place.
HOME = torch.arange(len(ASKED), device="cpu") % len(POINTS)
HOME[len(POINTS) * (1 + len(SIDES)) : -len(BEYOND)] = 0
TOLERANCE = 1e-3
LARGEST = 2**16  # elements


def _run(case: Case) -> Iterator[Finding]:
    chosen = elementwise(case)
    if not chosen:
        raise NotApplicable("no input that is worked on element by element")
    wide = _longer(case, chosen, 2 * len(ASKED) * len(chosen))
    together = _together(wide, chosen) if wide else None
    asked = together or (_apart(wide, chosen) if wide else None)
    for which in chosen:
        y, g = asked[which] if asked else _one_place(case, which)
        n, tiny = len(BEYOND), g[-len(BEYOND) - len(TINY) : -len(BEYOND)]
        found = list(_at_points(case, which, y[: -n - len(TINY)], g[: -n - len(TINY)]))
        yield from found
        if together and not found:
            yield from _at_tiny(case, which, y, g[: len(POINTS)], tiny)
        yield from _at_infinity(case, which, y[-n:], g[-n:])


Slopes = dict[int, tuple[Tensor, Tensor]]  # value and slope of each input at what is asked of it


def _together(wide: Case, chosen: list[int]) -> Slopes | None:
    """Return value and slope at all that is asked of each input, from one call.

    To the left and to the right of a point the other inputs are what they are at it. All is asked twice, in two orders;
    ``None`` where the answers differ, as for a slope per channel.
    """
    n = torch.arange(len(ASKED), device="cpu")
    twice = torch.cat([n, n.flip(0)])
    found = _ask(wide, chosen, ASKED[twice], HOME[twice]) or {}
    for which, (y, g) in found.items():
        one, other = (y.nan_to_num()[part] for part in (n, len(y) - 1 - n))
        if not torch.equal(one, other):
            return None
        found[which] = y[n], g[n]
    return found or None


def _apart(wide: Case, chosen: list[int]) -> Slopes | None:
    """Return the same from several calls, each value and what lies beside it in one and the same place."""
    parts = [_ask(wide, chosen, asked) for asked in ASKED.split(len(POINTS))]
    found: Slopes = {}
    for which in chosen:
        pairs = [part[which] for part in parts if part is not None]
        if len(pairs) < len(parts):
            return None
        found[which] = torch.cat([y for y, _ in pairs]), torch.cat([g for _, g in pairs])
    return found


def _ask(
    wide: Case, chosen: list[int], values: Tensor, home: Tensor | None = None
) -> Slopes | None:
    """Return what one call says of ``values``, given to each input in a part of its own; ``None`` where it refuses.

    The other inputs stay as they are there, or are what they are at ``home``.
    """
    n, placed = len(values), {}
    for k, which in enumerate(chosen):
        flat = wide.leaves[which].clone().reshape(-1)
        if home is not None:
            flat[: n * len(chosen)] = flat[home.to(flat.device)].repeat(len(chosen))
        flat[k * n : (k + 1) * n] = values.to(flat)
        placed[wide.where[which]] = flat.view(wide.leaves[which].shape)
    other = wide.edited(placed.get, parameters=True)
    try:
        leaves, outputs = other.kept
        slopes = other.backward(outputs, leaves, [torch.ones_like(y) for y in outputs])
    except (ForwardRaised, BackwardRaised):
        return None
    return {
        which: (
            outputs[0].detach().reshape(-1)[k * n : (k + 1) * n].double().cpu(),
            slopes[which].reshape(-1)[k * n : (k + 1) * n].double().cpu(),
        )
        for k, which in enumerate(chosen)
    }


def _longer(case: Case, chosen: list[int], most: int) -> Case | None:
    """Return the case with one dimension of the chosen inputs longer, so that they have ``most`` elements."""
    shape = case.leaves[chosen[0]].shape
    by = -(-most // shape.numel())
    for size in (s for s in free_sizes(case) if s.of(case.where[chosen[0]])):
        sizes = {size: size.now * by}
        if fits(case, sizes, LARGEST):
            wide = resized(case, sizes)
            same = {wide.leaves[i].shape for i in chosen}
            if accepts(wide) and same == {wide.all_outputs[0].shape}:
                return wide
    return None


def _one_place(case: Case, which: int) -> tuple[Tensor, Tensor]:
    """Return the same of one input of a sample that cannot be longer, or whose function refuses some of the values."""
    n = len(POINTS)
    parts = [_evaluate(case, which, ASKED[i : i + n]) for i in range(0, len(ASKED), n)]
    return torch.cat([y for y, _ in parts]), torch.cat([g for _, g in parts])


def _at_points(case: Case, which: int, values: Tensor, slopes: Tensor) -> Iterator[Finding]:
    """Compare the gradient at each point with the slopes to its left and right."""
    y, *beside = values.split(len(POINTS))
    g = slopes[: len(POINTS)]
    sample = case.leaves[which]
    left, right, left_near, right_near = (
        (there - y) / (sign * h * SIZE) for there, (h, sign) in zip(beside, SIDES, strict=True)
    )
    noise = 8 * case.epsilon * y.abs() / (STEPS[1] * SIZE)
    drift = torch.maximum((left - left_near).abs(), (right - right_near).abs())
    low, high = torch.minimum(left_near, right_near), torch.maximum(left_near, right_near)
    steepness = torch.maximum(low.abs(), high.abs())
    settled = y.isfinite() & (drift <= 0.05 * steepness + TOLERANCE + noise)
    slack = TOLERANCE * (1 + steepness) + 4 * drift + noise
    wrong = settled & ~((g >= low - slack) & (g <= high + slack))
    home = _inside(sample, POINTS) | ~g.isfinite()
    for i in wrong.nonzero().flatten().tolist()[:1]:
        if _stairs(case, which, float(POINTS[i]), (float(left_near[i]), float(right_near[i]))):
            continue
        kink = bool((high - low)[i] > 4 * slack[i])
        p, got = float(POINTS[i]), float(g[i])
        expected = (
            f"between {float(low[i]):.4g} and {float(high[i]):.4g}"
            if kink
            else f"{float(right_near[i]):.4g}"
        )
        name = case.names[which]
        yield Finding(
            check=NAME,
            severity="wrong" if home[i] else "note",
            input=name,
            message=f"grad of {name} at the value {p:g} is {got:.4g}, expected {expected}",
            got=got,
            expected=float(right_near[i]),
            ratio=got / float(right_near[i]) if right_near[i] else None,
            cause="NaN or infinity made in backward: an overflow, 0 · inf, or NaN through where"
            if not torch.isfinite(g[i])
            else "outside of the subgradient at a kink"
            if kink
            else "another branch than forward's",
        )


def _at_tiny(
    case: Case, which: int, values: Tensor, slopes: Tensor, tiny: Tensor
) -> Iterator[Finding]:
    """Compare the gradient close to 0 with that at 0, where forward has one and the same slope to both sides."""
    y, below, above = (float(values[k * len(POINTS)]) for k in (0, 3, 4))
    h = STEPS[1] * float(SIZE[0])
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


def _stairs(case: Case, which: int, point: float, slopes: tuple[float, float]) -> bool:
    """Return whether in far shorter steps the slopes are others: those were over the steps of a function like round."""
    h = STEPS[1] / 64 * max(1.0, abs(point)) ** 0.5
    (below, y, above), _ = _evaluate(
        case, which, torch.tensor([point - h, point, point + h], **OPTIONS)
    )
    noise = 8 * case.epsilon * float(y.abs()) / h
    near = float((y - below) / h), float((above - y) / h)
    return any(
        abs(a - b) > 0.05 * abs(b) + TOLERANCE + noise for a, b in zip(near, slopes, strict=True)
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


def _evaluate(case: Case, which: int, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return value and slope at each point, as many in one call as the leaf has elements; NaN where forward refuses."""
    leaf = case.leaves[which]
    values, slopes = [], []
    for part in points.split(leaf.numel()):
        other = _placed(case, which, part)
        try:
            leaves, outputs = other.kept
            grads = other.backward(outputs, leaves, [torch.ones_like(y) for y in outputs])
            y, g = outputs[0].detach(), grads[which]
        except ForwardRaised:  # one by one those that are no further than the sample
            inside = (part >= float(leaf.min())) & (part <= float(leaf.max()))
            y, g = torch.full_like(part, torch.nan), torch.full_like(part, torch.nan)
            for k in inside.nonzero().flatten().tolist() if len(part) > 1 else ():
                y[k : k + 1], g[k : k + 1] = _evaluate(case, which, part[k : k + 1])
        values.append(y.reshape(-1)[: len(part)].double().cpu())
        slopes.append(g.reshape(-1)[: len(part)].double().cpu())
    return torch.cat(values), torch.cat(slopes)


def _placed(case: Case, which: int, points: Tensor) -> Case:
    """Return the case with ``points`` for the first elements of one leaf."""

    def place(i: int, t: Tensor) -> Tensor:
        if i != case.where[which]:
            return t
        flat = t.clone().reshape(-1)
        flat[: len(points)] = points.to(flat)
        return flat.view(t.shape)

    return case.edited(place, parameters=True)


def _inside(leaf: Tensor, points: Tensor) -> Tensor:
    """Return which points are in the sample's domain: of both signs if it has both, else of its sign or 0."""
    low, high = float(leaf.min()), float(leaf.max())
    if low < 0 < high:
        return torch.ones_like(points, dtype=torch.bool)
    return points * (1 if high > 0 else -1) > 0


CHECK = Check(
    name=NAME,
    tests="the gradient is right at 0, kinks, tiny, large and infinite values",
    run=_run,
    order=84,
    needs=("no random numbers", "same values"),
    level="full",
    differences=True,
)
