"""The sample at other sizes: every dimension of one size, in whatever input, made another; and at other scales."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchbp.verify.cases import Case
from torchbp.verify.raised import ForwardRaised
from torchbp.verify.tolerance import largest

__all__ = ["FACTORS", "accepts", "fits", "free_sizes", "one_more", "resized", "scaled"]

FACTORS = (2.0**-6, 2.0**3)  # other scales: clamps, other branches


def resized(case: Case, sizes: dict[int, int]) -> Case:
    """Return the case with every dimension of size ``old`` made ``new``, for each ``old: new`` of ``sizes``.

    Elements are repeated; those of the leaves a little moved, so that there are no ties.
    """
    generator = case.generator("resize")

    def change(i: int, t: Tensor) -> Tensor:
        grown = False
        for d, n in enumerate(t.shape):
            if n in sizes:
                at = torch.arange(sizes[n], device=t.device) % max(n, 1)
                t = t.index_select(d, at)
                grown = True
        if grown and i in case.where and t.numel():
            r = torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t.real)
            t = t * (1 + 0.05 * r) + 0.01 * r * largest(t)
        return t

    return case.edited(change)


def scaled(case: Case, factor: float, chosen: Sequence[int] | None = None) -> Case:
    """Return the case with its leaves, or those chosen, ``factor`` times as large."""
    where = case.where if chosen is None else [case.where[i] for i in chosen]
    return case.edited(lambda i, t: t * factor if i in where else t) if factor != 1 else case


def free_sizes(case: Case, most: int = 3) -> list[int]:
    """Return the sizes of the sample's dimensions that the function lets change."""
    return list(_growth(case, most))


def one_more(case: Case) -> list[Case]:
    """Return the case with one size a time larger by one, for each that may change: odd ones are even there."""
    free_sizes(case)
    return case.memo.get("one more", [])


def fits(case: Case, sizes: dict[int, int], most: int) -> bool:
    """Whether inputs and outputs at these sizes would have at most ``most`` elements.

    The outputs' growth is read from what one more row makes of them, before anything large is computed.
    """
    growth = _growth(case, len(sizes))
    inputs = outputs = 1.0
    for old, new in sizes.items():
        inputs_by, outputs_by = growth.get(old, (1.0, 1.0))
        inputs *= (new / old) ** inputs_by
        outputs *= (new / old) ** outputs_by
    return max(inputs * _count(_arguments(case)), outputs * _count(case.all_outputs)) <= most


def _growth(case: Case, most: int) -> dict[int, tuple[float, float]]:
    """Return, for each size that may change, the powers with which inputs and outputs grow."""
    known: dict[int, tuple[float, float]] = case.memo.setdefault("growth", {})
    if not known and not case.memo.get("grown"):
        case.memo["grown"] = True
        _ = case.differentiable
        # An integer input of several dimensions indexes single elements, one size of integers alone is that of
        # offsets or lengths: repeated, they would mean something else.
        values = [t for t in _arguments(case) if t.is_floating_point() or t.is_complex()]
        indexes = any(
            t.dim() > 1
            for t in _arguments(case)
            if not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
        )
        candidates = (
            [] if indexes else list(dict.fromkeys(n for t in values for n in t.shape if n > 1))
        )
        for n in candidates[:most]:
            other = resized(case, {n: n + 1})
            if accepts(other):
                case.memo.setdefault("one more", []).append(other)
                base = math.log((n + 1) / n)
                known[n] = (
                    math.log(_count(_arguments(other)) / _count(_arguments(case))) / base,
                    math.log(_count(other.all_outputs) / _count(case.all_outputs)) / base,
                )
    return known


def _arguments(case: Case) -> list[Tensor]:
    return [t for _, t in case.arguments]


def _count(tensors: list[Tensor]) -> int:
    return max(1, *(t.numel() for t in tensors)) if tensors else 1


def accepts(case: Case) -> bool:
    """Whether forward takes this sample and gives finite, differentiable outputs."""
    try:
        return bool(case.differentiable) and all(bool(y.isfinite().all()) for y in case.all_outputs)
    except ForwardRaised:
        return False
