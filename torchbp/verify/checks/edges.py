"""Edges: ±0, kinks, tiny, large and infinite values, for functions that work element by element.

At each value forward is differenced to the left and to the right, as many values in one call as fit. The gradient must
lie between the two slopes: at a kink any subgradient is right, elsewhere there is one value. A value where forward is
not finite, or refuses, is outside of the function's domain.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.raised import ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts, fits, free_sizes, resized

NAME = "edges"
POINTS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-8,
    -1e-8,
    0.5,
    -0.5,
    3.0,
    -3.0,
    6.0,
    -6.0,
    30.0,
    -30.0,
    800.0,
    -800.0,
    1e4,
    -1e4,
)
STEPS = (2.0**-12, 2.0**-15)
FAR = (1e6, 1e10)  # where a gradient that has a limit at infinity has about reached it
TOLERANCE = 1e-3
LARGEST = 2**16  # elements


def _run(case: Case) -> Iterator[Finding]:
    if case.draws or not case.steady:
        raise NotApplicable("forward draws random numbers")
    tested = False
    for which, leaf in enumerate(case.leaves):
        if leaf.is_complex() or leaf.numel() == 0 or not _elementwise(case, which):
            continue
        tested = True
        wide = _wide(case, which)
        yield from _at_points(wide, which, leaf)
        yield from _at_infinity(wide, which)
    if not tested:
        raise NotApplicable("no input that is worked on element by element")


def _wide(case: Case, which: int) -> Case:
    """Return the case with one dimension longer, where it may be: all points fit in one call then."""
    leaf = case.leaves[which]
    by = -(-len(POINTS) * (1 + 2 * len(STEPS)) // leaf.numel())
    for n in (n for n in free_sizes(case) if by > 1 and n in leaf.shape):
        sizes = {n: n * by}
        if fits(case, sizes, LARGEST):
            wide = resized(case, sizes)
            if accepts(wide) and wide.all_outputs[0].shape == wide.leaves[which].shape:
                return wide
    return case


def _at_points(case: Case, which: int, sample: Tensor) -> Iterator[Finding]:
    """Compare the gradient at each point with the slopes to its left and right."""
    points = torch.tensor(POINTS, dtype=torch.float64)
    size = points.abs().clamp(min=1.0).sqrt()
    sides = [points + sign * h * size for h in STEPS for sign in (-1, 1)]
    if _uniform(case, which):
        values, grads = _evaluate(case, which, torch.cat([points, *sides]))
        y, *beside = values.split(len(POINTS))
        g = grads[: len(POINTS)]
    else:  # each value and what lies beside it in one and the same place
        y, g = _evaluate(case, which, points)
        beside = [_evaluate(case, which, there)[0] for there in sides]
    left, right, left_near, right_near = (
        (there - y) / (sign * h * size)
        for there, (h, sign) in zip(beside, [(h, s) for h in STEPS for s in (-1, 1)], strict=True)
    )
    noise = 8 * case.epsilon * y.abs() / (STEPS[1] * size)
    drift = torch.maximum((left - left_near).abs(), (right - right_near).abs())
    low, high = torch.minimum(left_near, right_near), torch.maximum(left_near, right_near)
    steepness = torch.maximum(low.abs(), high.abs())
    settled = y.isfinite() & (drift <= 0.05 * steepness + TOLERANCE + noise)
    slack = TOLERANCE * (1 + steepness) + 4 * drift + noise
    wrong = settled & ~((g >= low - slack) & (g <= high + slack))
    home = _inside(sample, points) | ~g.isfinite()
    for i in wrong.nonzero().flatten().tolist()[:1]:
        kink = bool((high - low)[i] > 4 * slack[i])
        p, got = float(points[i]), float(g[i])
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


def _at_infinity(case: Case, which: int) -> Iterator[Finding]:
    """Where forward is finite at ±inf, the gradient is the limit of that at large values, where there is one."""
    infinite, far = torch.tensor([torch.inf, -torch.inf]), torch.tensor(FAR, dtype=torch.float64)
    values, grads = _evaluate(case, which, torch.cat([infinite.double(), far, -far]))
    limits = grads[len(infinite) :]
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
                severity="wrong",
                input=name,
                message=f"grad of {name} at the value {float(infinite[i])} is {float(grads[i])}, "
                f"expected {last:.4g}, its limit",
                got=float(grads[i]),
                expected=last,
                cause="0 · inf or inf - inf in backward; forward is finite there",
            )
            return


def _evaluate(case: Case, which: int, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return value and slope at each point, as many in one call as the leaf has elements; NaN where forward refuses."""
    values, slopes = [], []
    for part in points.split(case.leaves[which].numel()):
        other = _placed(case, which, part)
        try:
            leaves, outputs = other.kept
            grads = other.backward(outputs, leaves, [torch.ones_like(y) for y in outputs])
            values.append(outputs[0].detach().reshape(-1)[: len(part)].double().cpu())
            slopes.append(grads[which].reshape(-1)[: len(part)].double().cpu())
        except ForwardRaised:
            alone = [_evaluate(case, which, p[None]) for p in part] if len(part) > 1 else []
            values += [y for y, _ in alone] or [torch.full_like(part, torch.nan)]
            slopes += [g for _, g in alone] or [torch.full_like(part, torch.nan)]
    return torch.cat(values), torch.cat(slopes)


def _uniform(case: Case, which: int) -> bool:
    """Whether all elements are treated alike; a slope per channel is not."""
    leaf = case.leaves[which]
    up = torch.randint(2, (leaf.numel(),), generator=case.generator("signs")).bool().to(leaf.device)
    up[0] = True
    size = leaf.abs().mean()
    try:
        y = _placed(case, which, torch.where(up, size, -size)).all_outputs[0].reshape(-1)
    except ForwardRaised:
        return False
    return all(
        bool((same == same[:1]).all()) or bool(same.isnan().all()) for same in (y[up], y[~up])
    )


def _placed(case: Case, which: int, points: Tensor) -> Case:
    """Return the case with ``points`` for the first elements of one leaf."""

    def place(i: int, t: Tensor) -> Tensor:
        if i != case.where[which]:
            return t
        flat = t.clone().reshape(-1)
        flat[: len(points)] = points.to(flat)
        return flat.view(t.shape)

    return case.edited(place, parameters=True)


def _elementwise(case: Case, which: int) -> bool:
    """Whether output element k depends on element k of this leaf alone: each half sees only its own half."""
    leaf = case.leaves[which]
    if (
        len(case.plain.outputs) != 1
        or case.plain.outputs[0].shape != leaf.shape
        or leaf.numel() < 2
    ):
        return False
    generator = case.generator(NAME)
    v = case.plain.cotangents[0]
    half = torch.randint(2, leaf.shape, generator=generator).bool().to(v.device)
    half.view(-1)[0], half.view(-1)[-1] = True, False
    one, other = case.vjps([[v * half], [v * ~half]])
    return bool((one[which][~half] == 0).all()) and bool((other[which][half] == 0).all())


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
    level="full",
    differences=True,
)
