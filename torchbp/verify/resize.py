"""The sample at other sizes: what of its dimensions may change, together or alone; and at other scales.

Dimensions of one size, in whatever inputs, first change together: rows of two inputs that are added. What then may
change alone is a size of its own: the keys of an attention whose sample has as many queries. A size that refuses one
more is made a multiple (channels in groups), or takes along those that are multiples of it (gates in one matrix).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.tensors import scale_of
from torchbp.verify.tolerance import largest

__all__ = [
    "Size",
    "accepts",
    "broadcast",
    "elementwise",
    "explodes",
    "fits",
    "free_sizes",
    "one_more",
    "resized",
    "scaled",
    "uneven",
]

UNEVEN = (1.0, 2.0**-18, 2.0**3, 2.0**-7, 2.0**6, 2.0**-11)  # of rows: a norm clamped, a branch
MOST = 3  # sizes of the sample that are looked at
LATER = 2  # sizes that may change alone, beside them
ATTEMPTS = 10  # calls to find out


Places = tuple[tuple[int, int, int], ...]  # position in flat, dimension, how many times the size


@dataclass(frozen=True)
class Size:
    """Dimensions that change together.

    Attributes:
        now: The size in the sample.
        places: Position in ``flat`` and dimension of each, and how many times ``now`` it is.
        unit: What the size must be a multiple of.
    """

    now: int
    places: Places
    unit: int = 1

    def near(self, size: int) -> int:
        """Return a size the function may take instead of ``size``: the next multiple of the unit."""
        return -(-size // self.unit) * self.unit

    @property
    def more(self) -> int:
        """The next larger size."""
        return self.now + self.unit

    def of(self, position: int) -> list[int]:
        """Return the dimensions of the tensor at ``position`` in ``flat``."""
        return [d for i, d, _ in self.places if i == position]


def resized(case: Case, sizes: Mapping[Size, int]) -> Case:
    """Return the case with the dimensions of each size made another.

    Elements are repeated; those of the leaves a little moved, so that there are no ties.
    """
    return _grown(
        case, {(i, d): times * n for size, n in sizes.items() for i, d, times in size.places}
    )


def _grown(case: Case, wanted: Mapping[tuple[int, int], int]) -> Case:
    """Return the case with other sizes, by position in ``flat`` and dimension."""
    generator = case.generator("resize")

    def change(i: int, t: Tensor) -> Tensor:
        grown = False
        for d, n in enumerate(t.shape):
            if wanted.get((i, d), n) != n:
                at = torch.arange(wanted[i, d], device=t.device) % max(n, 1)
                t = t.index_select(d, at)
                grown = True
        if grown and i in case.where and t.numel():
            r = torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t.real)
            t = t * (1 + 0.05 * r) + 0.01 * r * largest(t)
        return t

    return case.edited(change)


def scaled(case: Case, factor: float, chosen: Sequence[int] | None = None) -> Case:
    """Return the case with its leaves, or those chosen, ``factor`` times as large; the same one each time.

    A negative factor changes the sign of those that have both signs.
    """
    everything = [i for i, k in enumerate(case.where) if k < case.size]
    which = tuple(everything if chosen is None else [i for i in chosen if i in everything])
    where = [case.where[i] for i in which]
    if factor == 1:
        return case
    if ("scaled", factor, which) not in case.memo:
        case.memo["scaled", factor, which] = case.edited(
            lambda i, t: _times(t, factor) if i in where else t
        )
    return case.memo["scaled", factor, which]


def _times(t: Tensor, factor: float) -> Tensor:
    both = t.is_complex() or bool((t < 0).any() and (t > 0).any())
    return t * (factor if both else abs(factor))


def uneven(case: Case, size: Size) -> Case:
    """Return the case with the slices of its leaves along ``size`` of very different magnitude."""

    def along(t: Tensor, dims: list[int]) -> Tensor:
        for d in dims[:1]:
            by = torch.tensor(UNEVEN, dtype=torch.float64, device=t.device)
            by = by[torch.arange(t.shape[d], device=t.device) % len(UNEVEN)]
            t = t * by.to(t).view(-1, *[1] * (t.dim() - 1 - d))
        return t

    other = case.edited(lambda i, t: along(t, size.of(i)) if i in case.where else t)
    # A step is a part of what the slice holds, not of what is typical.
    other.memo["steps"] = [
        along(scale_of(leaf.cpu()).view(leaf.shape), size.of(i)).reshape(-1)
        if not leaf.is_complex()
        else None
        for i, leaf in zip(case.where, case.leaves, strict=True)
    ]
    return other


def elementwise(case: Case) -> list[int]:
    """Return the leaves whose element k alone output element k depends on: their gradient is a slope times grad_output.

    For two random grad_outputs v and w that is so exactly where the gradients g and h fulfil g w = h v.
    """
    if "elementwise" not in case.memo:
        case.memo["elementwise"] = _elementwise(case)
    return case.memo["elementwise"]


def _elementwise(case: Case) -> list[int]:
    if len(case.plain.outputs) != 1:
        return []
    y, v = case.plain.outputs[0], case.plain.cotangents[0]
    alike = [
        i
        for i, leaf in enumerate(case.leaves)
        if leaf.shape == y.shape and leaf.numel() > 1 and not leaf.is_complex()
    ]
    if not alike:
        return []
    (w,) = case.cotangents((y,), "elementwise")
    (other,) = case.vjps([[w]])
    return [i for i in alike if _proportional(case.plain.grads[i], v, other[i], w)]


def _proportional(g: Tensor, v: Tensor, h: Tensor, w: Tensor) -> bool:
    one, other = g * w, h * v
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-4 * largest(one), equal_nan=True))


def free_sizes(case: Case) -> list[Size]:
    """Return the sizes that the function lets change, those of the most dimensions first."""
    return list(_growth(case))


def one_more(case: Case) -> list[Case]:
    """Return the case with every other free size one larger, and with the rest so: odd ones are even there.

    Where it refuses those, each alone.
    """
    free = free_sizes(case)
    if len(free) > 2:
        # What may change alone goes with the half that its like is not in.
        order = {n: k for k, n in enumerate(dict.fromkeys(s.now for s in free))}
        seen: set[int] = set()
        sides: list[dict[Size, int]] = [{}, {}]
        for s in free:
            sides[(order[s.now] + (s.now in seen)) % 2][s] = s.more
            seen.add(s.now)
        halves = [resized(case, side) for side in sides if side]
        if all(map(accepts, halves)):
            return halves
    return case.memo.get("one more", [])


def broadcast(case: Case) -> list[Case]:
    """Return the case with leaves that are broadcast along a dimension as large as what they are broadcast to."""
    others = [t.shape for _, t in case.arguments if t.dim()]
    wanted: dict[tuple[int, int], int] = {}
    for i in case.where:
        shape = case.flat[i].shape if i < case.size else ()
        for d, n in enumerate(shape):
            like = [s[d - len(shape)] for s in others if len(s) >= len(shape) - d]
            if n == 1 and max(like) > 1:
                wanted[i, d] = max(like)
    if not wanted:
        return []
    other = _grown(case, wanted)
    same = accepts(other) and all(
        a.shape == b.shape for a, b in zip(case.all_outputs, other.all_outputs, strict=False)
    )
    return [other] if same else []


def fits(case: Case, sizes: Mapping[Size, int], most: int) -> bool:
    """Whether inputs and outputs at these sizes would have at most ``most`` elements.

    The outputs' growth is read from what one more row makes of them, before anything large is computed.
    """
    growth = _growth(case)
    wanted = {(i, d): times * n for size, n in sizes.items() for i, d, times in size.places}
    inputs = max(
        math.prod(wanted.get((i, d), n) for d, n in enumerate(t.shape)) for i, t in case.arguments
    )
    outputs = float(_count(case.all_outputs))
    for size, new in sizes.items():
        outputs *= (new / size.now) ** growth.get(size, 1.0)
    return max(inputs, outputs) <= most


def _growth(case: Case) -> dict[Size, float]:
    """Return, for each size that may change, the power with which outputs grow."""
    if "growth" not in case.memo:
        case.memo["growth"] = {}
        _ = case.differentiable
        case.memo["growth"] = _Search(case).growth
    return case.memo["growth"]


class _Search:
    """Tries which dimensions may change."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.attempts = 0
        self.growth: dict[Size, float] = {}
        places = self._places()
        # A size of 1 may be a batch, a step or a channel of which the sample has one only.
        for n in [*[n for n in places if n > 1][:MOST], *([1] if 1 in places else ())]:
            self._together(n, places)
        alone = 0
        for size in list(self.growth):
            if alone < LATER and size.places == places[size.now]:
                alone += self._apart(size)

    def _places(self) -> dict[int, Places]:
        """Return the places of each size, in the order of the floating-point arguments."""
        arguments = self.case.arguments
        # An integer input of several dimensions indexes single elements, one size of integers alone is that of offsets
        # or lengths: repeated, they would mean something else.
        values = [t for _, t in arguments if t.is_floating_point() or t.is_complex()]
        tied = {
            n
            for _, t in arguments
            for n in t.shape
            if t.dim() > 1
            and not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
        }
        tied.update(  # one index twice would mean something else
            1
            for _, t in arguments
            if 1 in t.shape
            and not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
        )
        return {
            n: tuple((i, d, 1) for i, t in arguments for d, m in enumerate(t.shape) if m == n)
            for n in dict.fromkeys(n for t in values for n in t.shape)
            if n and n not in tied
        }

    def _together(self, n: int, places: Mapping[int, Places]) -> None:
        """Find what of the dimensions of size ``n`` may change together: all of them, or the first or last alone."""
        whole = places[n]
        multiples = tuple(
            (i, d, m // n)
            for m in places
            if n > 1 and m > n and m % n == 0
            for i, d, _ in places[m]
        )
        tries = [Size(n, whole)]
        if n > 1:
            tries.append(Size(n, whole, n))
        if multiples:
            tries.append(Size(n, whole + multiples))
        if len(whole) > 1:
            tries += [Size(n, whole[:1]), Size(n, whole[-1:])]
        for size in tries:
            grown = self._grows(size)
            if grown is not None:
                self.growth[size] = grown
                return

    def _apart(self, size: Size) -> bool:
        """Find a part of ``size`` that may change alone, and make two sizes of it."""
        whole = size.places
        if self.elementwise:
            parts = [tuple(p for p in whole if p[1] == whole[0][1])]  # one dimension, of all inputs
        else:
            parts = [(p,) for p in (whole[0], whole[-1], *(whole[1:2] if len(whole) == 3 else ()))]
        units = (size.unit, size.now) if len(whole) > 2 else (size.unit,)
        for part in parts[:1] if len(whole) == 2 else parts:
            rest = tuple(p for p in whole if p not in part)
            for unit in dict.fromkeys(units) if rest else ():
                alone = Size(size.now, part, unit)
                grown = self._grows(alone, backward=True)
                if grown is not None:
                    self.growth = {
                        (Size(s.now, rest, unit) if s == size else s): g - grown * (s == size)
                        for s, g in self.growth.items()
                    }
                    self.growth[alone] = grown
                    return True
        return False

    def _grows(self, size: Size, *, backward: bool = False) -> float | None:
        """Return how outputs grow with the size, if forward takes it one larger; keep that case.

        A forward that does not look at its inputs takes what was never meant: there ``backward`` has to agree.
        """
        if self.attempts >= ATTEMPTS:
            return None
        self.attempts += 1
        case, other = self.case, resized(self.case, {size: size.more})
        if not accepts(other):
            return None
        if backward:
            try:
                _ = other.plain
            except BackwardRaised:
                return None
        case.memo.setdefault("one more", []).append(other)
        grown = _count(other.all_outputs) / _count(case.all_outputs)
        return math.log(grown) / math.log(size.more / size.now)

    @property
    def elementwise(self) -> bool:
        return len(elementwise(self.case)) == len(self.case.leaves)


def _count(tensors: Iterable[Tensor]) -> int:
    return max([1, *(t.numel() for t in tensors)])


def accepts(case: Case) -> bool:
    """Whether forward takes this sample and gives finite, differentiable outputs."""
    try:
        return bool(case.differentiable) and all(bool(y.isfinite().all()) for y in case.all_outputs)
    except ForwardRaised:
        return False


def explodes(case: Case, other: Case, times: float) -> bool:
    """Whether outputs are so much larger than the sample's that they are out of its domain: a product of hundreds."""
    return max(map(largest, other.all_outputs)) > times * (1 + max(map(largest, case.all_outputs)))
