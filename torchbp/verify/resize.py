"""The sample at other sizes and scales: its dimensions made larger or smaller, its values."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.source import speaks
from torchbp.verify.tensors import has_both_signs, scale_of, uniform
from torchbp.verify.tolerance import largest

__all__ = [
    "APART",
    "LARGE",
    "Size",
    "accepts",
    "apart",
    "broadcast",
    "explodes",
    "is_indexed",
    "negated",
    "one_for_all",
    "resized",
    "runs",
    "same_outputs",
    "scaled",
    "uneven",
    "with_ones",
    "with_zero",
    "with_zeros",
    "within_limits",
]

UNEVEN = (1.0, 2.0**-18, 2.0**3, 2.0**-7, 2.0**6, 2.0**-11)  # of rows: a norm clamped, a branch
NARROW = 2.0  # times the smallest
GOLDEN = 0.6180339887  # its multiples lie evenly between whole numbers

ONE = re.compile(r"\(1,|broadcast|\bexpand\b")  # of what is given once for all

APART = 2.0**3  # times, of several inputs every other one
LARGE = 2.0**10
LIMITED = (2.0**8, 2.0**6)  # where that is refused

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

    def within(self, case: Case) -> int:
        """Return what the size is in another case."""
        position, dim, times = self.places[0]
        return case.flat[position].shape[dim] // times

    def of(self, position: int) -> list[int]:
        """Return the dimensions of the tensor at ``position`` in ``flat``."""
        return [d for i, d, _ in self.places if i == position]


def resized(case: Case, sizes: Mapping[Size, int], moved: float = 0.05) -> Case:
    """Return the case with the dimensions of each size made another.

    Elements are repeated; those of the leaves a little ``moved``, in parts of themselves, so that there are no ties.
    """
    wanted = {(i, d): times * n for size, n in sizes.items() for i, d, times in size.places}
    return _grown(case, wanted, moved)


def _grown(case: Case, wanted: Mapping[tuple[int, int], int], moved: float = 0.05) -> Case:
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
            r = uniform(t.shape, generator).to(t.real)
            t = t * (1 + moved * r) + moved / 5 * r * largest(t)
        return t

    other = case.edited(change)
    other.bounded = 1
    return other


def scaled(case: Case, factor: float, chosen: Sequence[int] | None = None) -> Case:
    """Return the case with its leaves, or those chosen, ``factor`` times as large; the same one each time.

    A negative factor changes the sign of those that have both signs.
    """
    everything = [i for i, k in enumerate(case.where) if k < case.size]
    which = tuple(everything if chosen is None else [i for i in chosen if i in everything])
    where = [case.where[i] for i in which]
    if not any(has_both_signs(case.leaves[i]) for i in which):
        factor = abs(factor)
    if factor == 1:
        return case
    if ("scaled", factor, which) not in case.memo:
        case.memo["scaled", factor, which] = case.edited(
            lambda i, t: _times(t, factor) if i in where else t
        )
    return case.memo["scaled", factor, which]


def apart(case: Case) -> Case:
    """Return the case with its inputs, of several every other one, larger; the same one each time."""
    return scaled(case, APART, range(0, len(case.leaves), 2))


def _times(t: Tensor, factor: float) -> Tensor:
    return negated(t, factor) if factor < 0 and has_both_signs(t) else t * abs(factor)


def negated(t: Tensor, factor: float) -> Tensor:
    """Return t times a negative factor; points of a plane are mirrored, for all negated they would be turned only."""
    plane = t.dim() > 1 and t.shape[-1] == 2 and not t.is_complex()
    return t * t.new_tensor([factor, -factor]) if plane else t * factor


def within_limits(case: Case) -> tuple[float, Case | None]:
    """Return the case with its inputs as large as a function takes them that refuses far larger ones, and how much."""
    known = -LARGE in case.memo.get("scaled", ())  # at another size
    if known or not _refuses(scaled(case, LARGE)):
        return 1.0, None
    for factor in LIMITED:
        other = scaled(case, factor)
        if not _refuses(other):
            return factor, other if accepts(other) else None
    return 1.0, None


def _refuses(case: Case) -> bool:
    try:
        _ = case.first
    except ForwardRaised:
        return True
    return False


def uneven(case: Case, size: Size) -> Case:
    """Return the case with the slices of its leaves along ``size`` of very different magnitude."""

    def along(t: Tensor, dims: list[int]) -> Tensor:
        for d in dims[:1]:
            by = _magnitudes(t.shape[d], has_both_signs(t)).to(t)
            t = t * by.view(-1, *[1] * (t.dim() - 1 - d))
        return t

    some = [i for i in case.where if not _is_narrow(case.flat[i])]
    other = case.edited(lambda i, t: along(t, size.of(i)) if i in some else t)
    # A step is a part of what the slice holds, not of what is typical.
    other.memo["steps"] = [
        along(scale_of(leaf.cpu()).view(leaf.shape), size.of(i)).abs().reshape(-1)
        if i in some and not leaf.is_complex()
        else None
        for i, leaf in zip(case.where, case.leaves, strict=True)
    ]
    return other


def _is_narrow(t: Tensor) -> bool:
    """Whether several positive numbers are about as large: exponents, of which others would mean something else."""
    if t.is_complex() or t.numel() < 2:
        return False
    low, high = float(t.min()), float(t.max())
    return low > 0 and high <= NARROW * low


def _magnitudes(n: int, both: bool) -> Tensor:
    """Return a factor for each of ``n`` slices: no slice of the sample always has the same, and all between come up."""
    k = torch.arange(n, device="cpu")
    turn = k // len(UNEVEN)
    by = torch.tensor(UNEVEN, dtype=torch.float64, device="cpu")[(k + turn) % len(UNEVEN)]
    between = 2.0 ** (-3 * (turn * GOLDEN % 1))
    by = (by * between).clamp(min=min(UNEVEN))
    return by * torch.where((turn % 2 == 1) & both, -1.0, 1.0)


def with_zeros(case: Case, times: float = 0.0) -> Case:
    """Return the case with a 0 in each real input of several elements, or one so many times as large.

    The same one each time.
    """
    return _with_one_at(case, (0.0, times), lambda t: t.numel() > 1)


def with_ones(case: Case) -> Case:
    """Return the case with a 1 in each real input of elements between 0 and 1; the same one each time."""
    return _with_one_at(
        case, (1.0, 0.0), lambda t: t.numel() > 1 and bool(t.min() > 0 and t.max() < 1)
    )


def with_zero(case: Case, position: int) -> Case:
    """Return the case with this input all zero; the same one each time."""
    if ("zero", position) not in case.memo:
        case.memo["zero", position] = case.edited(
            lambda i, t: torch.zeros_like(t) if i == position else t
        )
    return case.memo["zero", position]


def _with_one_at(case: Case, value: tuple[float, float], takes: Callable[[Tensor], Any]) -> Case:
    """Return the case with one element another in each real input that ``takes`` says, itself where there is none.

    The first of ``value`` is added to the element times the second.

    Each is in another place: equal elements of two inputs may be a kink.
    """
    if ("one at", value) not in case.memo:
        where = [
            i
            for i, t in zip(case.where, case.leaves, strict=True)
            if i < case.size and not t.is_complex() and takes(t)
        ]

        def change(i: int, t: Tensor) -> Tensor:
            if i not in where:
                return t
            flat = t.clone().reshape(-1)
            k = -1 - where.index(i) % t.numel()
            flat[k] = value[0] + value[1] * flat[k]
            return flat.view(t.shape)

        case.memo["one at", value] = case.edited(change) if where else case
    return case.memo["one at", value]


def broadcast(case: Case) -> list[Case]:
    """Return the case with leaves that are broadcast along a dimension as large as what they are broadcast to.

    And, where that leaves two dimensions of them, along all but the last.
    """
    others = [t.shape for _, t in case.arguments if t.dim()]
    larger: dict[tuple[int, int], int] = {}
    smaller: dict[tuple[int, int], int] = {}
    for i in case.where:
        shape = case.flat[i].shape if i < case.size else ()
        for d, n in enumerate(shape):
            like = [s[d - len(shape)] for s in others if len(s) >= len(shape) - d]
            if n == 1 and max(like) > 1:
                larger[i, d] = max(like)
        if any((i, d) in larger for d in range(len(shape))):
            kept = [d for d, n in enumerate(shape) if n > 1]
            smaller.update(((i, d), 1) for d in kept[:-1])
    return [
        other
        for wanted in (larger, smaller)
        if wanted and accepts(other := _grown(case, wanted)) and _same_shapes(case, other)
    ]


def one_for_all(case: Case) -> list[Case]:
    """Return the case with one row of inputs that have as many as another, if that serves for all: one table, one bias.

    The largest keeps its rows; where what else may be is refused, the smallest is tried alone. Only where the source
    speaks of it, and not what has the shape of another: nobody promised that it is broadcast.
    """
    if not speaks(case, ONE):
        return []
    shapes = [(i, t.shape) for i, t in case.arguments if t.dim() and len(t) > 1]
    alike = [
        i
        for i, shape in shapes
        if i in case.where
        and any(s[0] == shape[0] for j, s in shapes if j != i)
        and not any(s == shape for j, s in shapes if j != i)
    ]
    by_size = sorted(alike, key=lambda i: case.flat[i].numel())
    rows = {len(case.flat[i]) for i in alike}
    others = [i for i, shape in shapes if shape[0] in rows and i not in alike]
    chosen = by_size if others else by_size[:-1]
    for some in dict.fromkeys((tuple(sorted(chosen)), tuple(by_size[:1]))):
        other = _grown(case, {(i, 0): 1 for i in some})
        if some and accepts(other) and _same_shapes(case, other):
            return [other]
    return []


def _same_shapes(case: Case, other: Case) -> bool:
    pairs = zip(case.all_outputs, other.all_outputs, strict=False)
    return all(a.shape == b.shape for a, b in pairs)


def accepts(case: Case) -> bool:
    """Whether forward takes this sample and gives finite, differentiable outputs."""
    try:
        return bool(case.differentiable) and all(bool(y.isfinite().all()) for y in case.all_outputs)
    except ForwardRaised:
        return False


def is_indexed(case: Case) -> bool:
    """Whether there are integers, or a mask, which may point at what is gone where a size is smaller."""
    return any(not (t.is_floating_point() or t.is_complex()) for _, t in case.arguments)


def runs(case: Case) -> bool:
    """Whether neither forward nor backward raises at this sample."""
    try:
        _ = case.plain
    except (ForwardRaised, BackwardRaised):
        return False
    return True


def same_outputs(case: Case, other: Case) -> bool:
    """Whether forward gives the same for both."""
    if len(case.all_outputs) != len(other.all_outputs):
        return False
    pairs = zip(case.all_outputs, other.all_outputs, strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def explodes(case: Case, other: Case, times: float) -> bool:
    """Whether outputs are so much larger than the sample's that they are out of its domain: a product of hundreds."""
    return max(map(largest, other.all_outputs)) > times * (1 + max(map(largest, case.all_outputs)))
