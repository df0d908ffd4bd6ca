"""Which outputs of Linear, convolution and attention are let go, so that what is kept fits a budget.

One forward is measured, with nothing dear let go: each output that could be made again is a candidate, with its bytes,
the floating-point operations to make it again, and the candidates it is made from. The cheapest in operations a byte
are chosen, so many that the budget is met. What is let go is made from the nearest of what is kept, and what is made on
the way is there at once: such chains are limited, or backward would need what forward saved.

A candidate is known by its place in the forward. A forward that does not go the same way is measured anew.
"""

import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from torchbp.ops._errors import wrong
from torchbp.recompute._kept import Kept, Made, Recipe, Share

__all__ = ["Forward", "Plan"]

Chain = dict[int, int]  # what is made, by identity -> bytes

# What a chain may hold at once, as shares of what torch keeps: the least with which the budget is met.
_CHAINS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)

# How many outputs a chain may make: each is made inside the call of the next, and Python's calls go 1000 deep.
_LONGEST = 48


@dataclass
class Candidate:
    """An output that is dear to make again.

    Attributes:
        nbytes: Of the output.
        flops: To make it again.
        recipe: How.
        kept: What is kept for it; ``None`` where nobody was seen to keep it.
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


class Choice(NamedTuple):
    """What becomes of a candidate, in the order of the forward."""

    dropped: bool
    nbytes: int  # as it was measured


class Plan:
    """What one model lets go; it lives as long as the model is lean.

    Args:
        budget: What may be kept: a share of what torch keeps, or bytes.

    Attributes:
        choices: One for each candidate; ``None``: the next forward is measured.
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.choices: list[Choice] | None = None

    def choose(self, measured: Measured) -> None:
        """Choose what is let go from now on."""
        kept = measured.kept_bytes()
        torchs = kept + measured.made
        budget = self.budget if self.budget > 1 else self.budget * torchs
        candidates = [c for c in measured.candidates if c.kept is not None]
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
        self.choices = [Choice(id(c) in chosen, c.nbytes) for c in measured.candidates]


class Forward:
    """One forward under a plan; several may run at once, in threads.

    Args:
        plan: Of the model.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._choices = plan.choices
        self._measured = Measured() if plan.choices is None else None
        self._place = 0
        self._as_measured = True

    @property
    def measures(self) -> bool:
        """Whether nothing dear is let go in this one."""
        return self._measured is not None

    def end(self) -> None:
        """End it: choose, if it was measured; have the next one measured if it went another way."""
        measured, self._measured = self._measured, None
        if measured is not None:
            self.plan.choose(measured)
        elif not self._as_measured or self._place != len(self._choices or ()):
            self.plan.choices = None

    def drops(self, recipe: Recipe, output: Tensor) -> bool:
        """Whether the next candidate is let go."""
        place, self._place = self._place, self._place + 1
        nbytes = output.numel() * output.element_size()
        if self._measured is not None:
            self._measured.candidates.append(Candidate(nbytes, recipe.flops, recipe))
            return False
        if self._choices is None or place >= len(self._choices):
            return False
        choice = self._choices[place]
        if self.plan.budget > 1 and nbytes != choice.nbytes:
            self._as_measured = False  # another size: bytes have to be counted anew
        return choice.dropped

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


def _cheapest(candidates: list[Candidate], needed: float, most: float) -> set[int]:
    """Return the ids of candidates of ``needed`` bytes, cheapest first, no chain of which holds over ``most`` bytes."""
    chains = _Chains(candidates)
    freed = 0
    for c in sorted(candidates, key=lambda c: c.flops / c.nbytes):
        if freed >= needed:
            break
        if chains.let_go(c, most):
            freed += c.nbytes
    return set(chains.made)


class _Chains:
    """What backward makes on the way from what is kept to each candidate that is let go.

    Args:
        candidates: Of which some will be.

    Attributes:
        made: By the candidate's identity, what is made for it: identity -> bytes, itself included, each once.
    """

    def __init__(self, candidates: list[Candidate]) -> None:
        self.made: dict[int, Chain] = {}
        by_kept = {id(c.kept): c for c in candidates}
        self._cheap: dict[int, Chain] = {}  # made for it whatever else is let go
        self._sources: dict[int, list[Candidate]] = {}  # read for it
        self._readers: dict[int, list[Candidate]] = {id(c): [] for c in candidates}
        for c in candidates:
            self._cheap[id(c)] = {id(c): c.nbytes}
            self._sources[id(c)] = []
            self._read(c, c.recipe, by_kept)

    def _read(self, c: Candidate, recipe: Recipe, by_kept: dict[int, Candidate]) -> None:
        cheap = self._cheap[id(c)]
        for a in recipe.arguments:
            if type(a) is Share:
                if id(a.made) not in cheap:
                    cheap[id(a.made)] = a.made.nbytes
                    self._read(c, a.made.recipe, by_kept)
            elif type(a) is Recipe:
                self._read(c, a, by_kept)
            elif type(a) is Kept and (source := by_kept.get(id(a.whole or a))) is not None:
                self._sources[id(c)].append(source)
                self._readers[id(source)].append(c)

    def let_go(self, c: Candidate, most: float) -> bool:
        """Let ``c`` go, unless a chain were to hold over ``most`` bytes, or too many outputs."""
        grown: dict[int, Chain] = {}
        waiting = [c]
        while waiting:  # it, and all that is made from it
            reader = waiting.pop()
            chain = dict(self._cheap[id(reader)])
            for source in self._sources[id(reader)]:
                chain |= grown.get(id(source)) or self.made.get(id(source), {})
            if sum(chain.values()) > most or len(chain) > _LONGEST:
                return False
            if chain != grown.get(id(reader)):
                grown[id(reader)] = chain
                waiting += [r for r in self._readers[id(reader)] if id(r) in self.made]
        self.made |= grown
        return True
