"""Value and slope at chosen values, of inputs that a function works on element by element: many in one call.

Of several outputs those of their sum.
"""

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from torchbp.verify.cases import Case
from torchbp.verify.growth import fits, free_sizes
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.resize import Size, accepts

__all__ = ["Slopes", "evaluate", "inside", "slopes"]

LARGEST = 2**16  # elements
PATIENCE = 2  # refusals

Slopes = dict[int, tuple[Tensor, Tensor]]  # value and slope of each input at what is asked of it


def slopes(
    case: Case, chosen: list[int], asked: Tensor, home: Tensor, block: int
) -> tuple[Slopes, bool]:
    """Return value and slope of each chosen input at all values ``asked``, NaN where forward refuses.

    And whether they come from one call, in which the other inputs are at a value what they are at the one of position
    ``home``: at a point for what lies beside it. Otherwise what is as far apart as ``block`` shares a place.
    """
    wide = _longer(case, chosen, 2 * len(asked) * len(chosen))
    together = _together(wide, chosen, asked, home) if wide else {}
    if together:
        return together, True
    if len(case.plain.outputs) > 1:
        return {}, False  # of which one call has to do
    found = _apart(wide, chosen, asked, block) if wide and together is None else None
    return found or {which: _one_place(case, which, asked, block) for which in chosen}, False


def _together(wide: Case, chosen: list[int], asked: Tensor, home: Tensor) -> Slopes | None:
    """Return value and slope at all that is asked of each input, from one call.

    To the left and to the right of a point the other inputs are what they are at it. All is asked twice, in two orders;
    ``None`` where the answers differ, as for a slope per channel. Nothing where forward refuses.
    """
    n = torch.arange(len(asked), device="cpu")
    twice = torch.cat([n, n.flip(0)])
    found = _ask(wide, chosen, asked[twice], home[twice]) or {}
    for which, (y, g) in found.items():
        one, other = (y.nan_to_num()[part] for part in (n, len(y) - 1 - n))
        if not torch.equal(one, other):
            return None
        found[which] = y[n], g[n]
    return found


def _apart(wide: Case, chosen: list[int], asked: Tensor, block: int) -> Slopes | None:
    """Return the same from several calls, each value and what lies beside it in one and the same place."""
    widest = [0]
    parts = [_ask(wide, chosen, part, widest=widest) for part in asked.split(block)]
    found: Slopes = {}
    for which in chosen:
        pairs = [part[which] for part in parts if part is not None]
        if len(pairs) < len(parts):
            return None
        found[which] = torch.cat([y for y, _ in pairs]), torch.cat([g for _, g in pairs])
    return found


def _ask(
    wide: Case,
    chosen: list[int],
    values: Tensor,
    home: Tensor | None = None,
    widest: list[int] | None = None,
) -> Slopes | None:
    """Return what one call says of ``values``, given to each input in a part of its own; ``None`` where it refuses.

    The other inputs stay as they are there, or are what they are at ``home``. Where forward refuses it is asked for
    fewer: a deviation is positive, a probability no larger than 1. What is taken is kept as the ``widest`` domain, from
    which the next call goes on.
    """
    widest = [0] if widest is None else widest
    tried = []
    domains = zip(*(_domains(wide.leaves[i], values) for i in chosen), strict=True)
    for number, some in enumerate(domains):
        asked = dict(zip(chosen, some, strict=True))
        if number >= widest[0] and not any(all(map(torch.equal, some, o)) for o in tried):
            tried.append(some)
            if found := _ask_for(wide, asked, values, home):
                widest[0] = number
                return found
    return None


def _domains(leaf: Tensor, values: Tensor) -> Iterator[Tensor]:
    """Yield which of ``values`` may be in an input's domain, the widest first.

    All; those of its sign, if it has one, and 0; without 0; of them those that are not smaller; those of a probability;
    those between its elements.
    """
    low, high = float(leaf.min()), float(leaf.max())
    own = inside(leaf, values)
    larger = own
    yield torch.ones_like(values, dtype=torch.bool)
    if low < 0 < high:
        yield own
    else:
        own &= values.isfinite()
        yield own | (values == 0)
        larger = own & (values.abs() >= min(abs(low), abs(high)))
    yield own
    yield larger
    between = (values >= low) & (values <= high)
    yield (values >= 0) & (values <= 1) if 0 <= low <= high <= 1 else between
    yield between


def _ask_for(
    wide: Case, asked: dict[int, Tensor], values: Tensor, home: Tensor | None
) -> Slopes | None:
    """Return the same of those values of each input that are ``asked`` for; NaN for the others."""
    n, shape = len(values), wide.leaves[next(iter(asked))].shape
    beside = {i: t for i, t in wide.arguments if i not in wide.where and t.shape == shape}
    placed = {i: _at_home(t, home, len(asked)).view(shape) for i, t in beside.items()}
    for k, (which, some) in enumerate(asked.items()):
        flat = _at_home(wide.leaves[which], home, len(asked))
        flat[k * n : (k + 1) * n][some.to(flat.device)] = values[some].to(flat)
        placed[wide.where[which]] = flat.view(wide.leaves[which].shape)
    other = wide.edited(placed.get, parameters=True)
    try:
        leaves, outputs = other.kept
        grads = other.backward(outputs, leaves, [torch.ones_like(y) for y in outputs])
    except (ForwardRaised, BackwardRaised):
        return None
    found = {}
    for k, (which, some) in enumerate(asked.items()):
        y, g = (
            t.detach().reshape(-1)[k * n : (k + 1) * n].double().cpu()
            for t in (reduce(torch.add, outputs), grads[which])
        )
        found[which] = y.where(some, torch.nan), g.where(some, torch.nan)
    return found


def _at_home(t: Tensor, home: Tensor | None, times: int) -> Tensor:
    """Return a flat copy whose first elements are those at ``home``, as often as there are parts; a copy without."""
    flat = t.clone().reshape(-1)
    if home is not None:
        flat[: times * len(home)] = flat[home.to(flat.device)].repeat(times)
    return flat


def _longer(case: Case, chosen: list[int], most: int) -> Case | None:
    """Return the case with one dimension of the chosen inputs longer, so that they have ``most`` elements."""
    shape = case.leaves[chosen[0]].shape
    by = -(-most // shape.numel())
    for size in (s for s in free_sizes(case) if s.of(case.where[chosen[0]])):
        if not fits(case, {size: size.now * by}, LARGEST):
            continue
        wide = _repeated(case, size, by)
        same = {wide.leaves[i].shape for i in chosen}
        if accepts(wide) and same == {wide.all_outputs[0].shape}:
            return wide
    return None


def _repeated(case: Case, size: Size, by: int) -> Case:
    """Return the case with a dimension ``by`` times as long, its values as they are."""

    def repeat(i: int, t: Tensor) -> Tensor:
        for d in size.of(i):
            t = torch.cat([t] * by, d)
        return t

    return case.edited(repeat)


def _one_place(case: Case, which: int, asked: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the same of one input of a sample that cannot be longer, or whose function refuses some of the values."""
    refusals = [0]
    parts = [evaluate(case, which, part, refusals) for part in asked.split(block)]
    return torch.cat([y for y, _ in parts]), torch.cat([g for _, g in parts])


def evaluate(
    case: Case, which: int, points: Tensor, refusals: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Return value and slope at each point, as many in one call as the leaf has elements; NaN where forward refuses.

    Where it refuses, those that are no further than the sample are asked for, or each alone; after some ``refusals``
    nothing else.
    """
    leaf = case.leaves[which]
    refusals = [0] if refusals is None else refusals
    values, gradients = [], []
    for part in points.split(leaf.numel()):
        found = None
        if refusals[0] < PATIENCE or len(part) == 1:
            found = _at(case, which, part)
            refusals[0] += found is None
        if found is None:
            within = ((part >= float(leaf.min())) & (part <= float(leaf.max()))).nonzero().flatten()
            y, g = torch.full_like(part, torch.nan), torch.full_like(part, torch.nan)
            for some in within.split(max(1, len(within)) if len(within) < len(part) else 1):
                if len(some) > 0 and len(part) > 1:
                    y[some], g[some] = evaluate(case, which, part[some])
            found = y, g
        values.append(found[0])
        gradients.append(found[1])
    return torch.cat(values), torch.cat(gradients)


def _at(case: Case, which: int, points: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return value and slope at points that one call takes, nothing where forward refuses."""
    try:
        other = _placed(case, which, points)
        leaves, outputs = other.kept
        grads = other.backward(outputs, leaves, [torch.ones_like(y) for y in outputs])
    except ForwardRaised:
        return None
    n = len(points)
    y, g = reduce(torch.add, outputs).detach().reshape(-1), grads[which].reshape(-1)
    return y[:n].double().cpu(), g[:n].double().cpu()


def _placed(case: Case, which: int, points: Tensor) -> Case:
    """Return the case with ``points`` for the first elements of one leaf."""

    def place(i: int, t: Tensor) -> Tensor:
        if i != case.where[which]:
            return t
        flat = t.clone().reshape(-1)
        flat[: len(points)] = points.to(flat)
        return flat.view(t.shape)

    return case.edited(place, parameters=True)


def inside(leaf: Tensor, points: Tensor) -> Tensor:
    """Return which points are in the sample's domain: of both signs if it has both, else of its sign or 0."""
    low, high = float(leaf.min()), float(leaf.max())
    if low < 0 < high:
        return torch.ones_like(points, dtype=torch.bool)
    return points * (1 if high > 0 else -1) > 0
