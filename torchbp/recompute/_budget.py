"""Which outputs of Linear, convolution and attention are let go, so that what is kept fits a budget.

One forward is measured, with nothing dear let go: each output that could be made again is a candidate, with its bytes,
the floating-point operations to make it again, and the candidates it is made from. The cheapest in operations a byte
are chosen, so many that the budget is met. What is let go is made from the nearest of what is kept, and what is made on
the way is there at once: such chains are limited, or backward would need what forward saved.

A candidate is known by its place in the forward. A forward that does not go the same way is measured anew.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from torchbp.ops._errors import wrong
from torchbp.recompute._kept import Kept, Made, Recipe, Share

__all__ = ["Plan"]

Chain = dict[int, int]  # what is made, by identity -> bytes

# What a chain may hold at once, as shares of what torch keeps: the least with which the budget is met.
_CHAINS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


@dataclass
class Candidate:
    """An output that is dear to make again.

    Attributes:
        nbytes: Of the output.
        flops: To make it again.
        recipe: How, while it is measured.
        kept: What is kept for it, while it is measured.
    """

    nbytes: int
    flops: int
    recipe: Recipe
    kept: Kept | None = None


@dataclass
class Measured:
    """One forward with nothing dear let go."""

    candidates: list[Candidate] = field(default_factory=list)
    kept: dict[int, Kept] = field(default_factory=dict)  # by storage, which is alive
    made: int = 0  # bytes that are made again, cheaply

    def kept_bytes(self) -> int:
        """Return the bytes kept."""
        return sum(k.nbytes for k in self.kept.values())


class Plan:
    """What one model lets go; it lives as long as the model is lean.

    Args:
        budget: What may be kept: a share of what torch keeps, or bytes.
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.dropped: list[bool] | None = None  # for each candidate in order; None: to be measured
        self.sizes: list[int] = []  # bytes of each candidate as it was measured
        self._measured: Measured | None = None
        self._place = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_measured": None}

    def begin(self) -> None:
        """Start a forward."""
        self._place = 0
        self._measured = Measured() if self.dropped is None else None

    def end(self) -> None:
        """End a forward: choose, if it was measured; measure the next one if it went another way."""
        measured, self._measured = self._measured, None
        if measured is not None:
            self._choose(measured)
        elif self.dropped is not None and self._place != len(self.dropped):
            self.dropped = None

    def drops(self, recipe: Recipe, output: Tensor) -> bool:
        """Whether the next candidate is let go."""
        place, self._place = self._place, self._place + 1
        nbytes = output.numel() * output.element_size()
        if self._measured is not None:
            self._measured.candidates.append(Candidate(nbytes, recipe.flops, recipe))
            return False
        if self.dropped is None or place >= len(self.dropped):
            return False
        if self.budget > 1 and nbytes != self.sizes[place]:
            self._place = -1  # another size: bytes have to be counted anew
        return self.dropped[place]

    def keep(self, kept: Kept) -> None:
        """Count what is kept."""
        measured = self._measured
        if measured is None:
            return
        measured.kept[kept.storage] = kept
        if measured.candidates and measured.candidates[-1].kept is None:
            last = measured.candidates[-1]
            if last.nbytes == kept.nbytes:
                last.kept = kept

    def make(self, made: Made) -> None:
        """Count what is made again."""
        if self._measured is not None:
            self._measured.made += made.nbytes

    def _choose(self, measured: Measured) -> None:
        kept = measured.kept_bytes()
        torchs = kept + measured.made
        budget = self.budget if self.budget > 1 else self.budget * torchs
        candidates = [c for c in measured.candidates if c.kept is not None]
        self.sizes = [c.nbytes for c in measured.candidates]
        chosen: set[int] = set()
        left = kept
        for chain in _CHAINS:
            chosen = _cheapest(candidates, kept - budget, chain * torchs)
            left = kept - sum(c.nbytes for c in candidates if id(c) in chosen)
            if left <= budget:
                break
        if left > budget:
            rule = f"a budget that can be met, of at least {left / torchs:.3f} of what torch keeps"
            message = wrong("lean", rule, f"{budget / torchs:.3f}", "all that can be made again is")
            warnings.warn(message, UserWarning, stacklevel=2)
        self.dropped = [id(c) in chosen for c in measured.candidates]


def _cheapest(candidates: list[Candidate], needed: float, chain: float) -> set[int]:
    """Return the ids of candidates of ``needed`` bytes, cheapest first, no chain of which holds over ``chain``."""
    by_kept = {id(c.kept): c for c in candidates}
    chosen: set[int] = set()
    freed = 0
    for c in sorted(candidates, key=lambda c: c.flops / c.nbytes):
        if freed >= needed:
            break
        chosen.add(id(c))
        chains: dict[int, Chain] = {}
        made = (_chain(o, chosen, by_kept, chains) for o in candidates if id(o) in chosen)
        if any(sum(m.values()) > chain for m in made):
            chosen.remove(id(c))
        else:
            freed += c.nbytes
    return chosen


def _chain(
    c: Candidate, chosen: set[int], by_kept: dict[int, Candidate], chains: dict[int, Chain]
) -> Chain:
    """Return the bytes of all that is made on the way from what is kept to ``c``, itself included, each once."""
    if id(c) in chains:
        return chains[id(c)]
    made = {id(c): c.nbytes}

    def along(recipe: Recipe) -> None:
        for a in recipe.arguments:
            if type(a) is Share:
                if id(a.made) not in made:
                    made[id(a.made)] = a.made.nbytes
                    along(a.made.recipe)
            elif type(a) is Recipe:
                along(a)
            elif type(a) is Kept:
                parent = by_kept.get(id(a.whole or a))
                if parent is not None and id(parent) in chosen:
                    made.update(_chain(parent, chosen, by_kept, chains))

    along(c.recipe)
    chains[id(c)] = made
    return made
