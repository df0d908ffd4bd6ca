"""Which dimensions of the sample may change, together or alone.

Dimensions of one size, in whatever inputs, first change together: rows of two inputs that are added. What then may
change alone is a size of its own: the keys of an attention whose sample has as many queries. A size that refuses one
more is made a multiple (channels in groups), or takes along those that are multiples of it (gates in one matrix).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from torchbp.verify.cases import Case
from torchbp.verify.depends import elementwise, of_outputs
from torchbp.verify.resize import Places, Size, accepts, apart, resized, runs
from torchbp.verify.source import speaks
from torchbp.verify.tensors import counts
from torchbp.verify.tolerance import largest

__all__ = [
    "LARGER",
    "REFUSES",
    "fits",
    "free_sizes",
    "one_more",
    "refuses_alone",
    "tie",
    "without_numbers",
]

MOST = 5  # sizes of the sample that are looked at
SURE = 3  # of them, a 1 apart; of others backward has to agree, for forward may take them by chance
LATER = 3  # sizes that may change alone, beside them
LARGER = "which case of other sizes was seen with larger inputs"
TIED = "sizes of integers of several dimensions stay"
REFUSES = "what refusals of other sizes say, without numbers"
REFUSED = "places that forward refuses to be larger alone"
SAME = 2**12  # elements of an input whose sizes are all the same
ATTEMPTS = 10  # calls to find out
# Of what there may be two for each, beside the sample's sizes.
SHARED = re.compile(r"//|% ?\w|groups=")
NUMBERS = re.compile(r"\d+")  # in what a refusal says


def free_sizes(case: Case) -> list[Size]:
    """Return the sizes that the function lets change, those of the most dimensions first."""
    return list(_growth(case))


def one_more(case: Case) -> list[Case]:
    """Return the case with its free sizes one larger, or all the same if it takes that; and what may change alone."""
    _ = _growth(case)
    return case.memo.get("one more", [])


def tie(case: Case) -> bool:
    """Leave all sizes of integers of several dimensions as they are from now on; ``False`` if they were before.

    Indices that are repeated may write over each other: whose gradient that is then nobody knows.
    """
    if TIED in case.memo:
        return False
    for name in ("growth", "one more", LARGER, REFUSED):
        case.memo.pop(name, None)
    case.memo[TIED] = True
    return True


def without_numbers(refusal: str) -> str:
    """Return what a refusal says of any sizes."""
    return NUMBERS.sub("", refusal)


def refuses_alone(case: Case, position: int, dim: int) -> bool:
    """Whether forward is known to refuse this one dimension, of this input alone, to be larger."""
    return ((position, dim, 1),) in case.memo.get(REFUSED, ())


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
        self.said = ""  # by what refused last
        self.stands: set[str] = set()  # what was said of one more, and of another attempt, too
        # What a Module's parameters have too stays in them: features, channels; a kernel's size stays by chance.
        self.fixed = {n for t in case.flat[case.size :] for n in t.shape}
        places = self._places()
        # A size of 1 may be a batch, a step or a channel of which the sample has one only.
        sizes = [*[n for n in places if n > 1][:MOST], *([1] if 1 in places else ())]
        free = [n for n in sizes if n not in self.fixed]
        large = [n for n in free if n > 1]
        for some in dict.fromkeys((tuple(free), tuple(large), tuple(large[:SURE]))):
            if some and self._at_once([Size(n, places[n]) for n in some]):
                sizes = [n for n in sizes if n not in some]
                break
        for k, n in enumerate(sizes):
            self._together(n, places, backward=n > 1 and k >= SURE)
        alone = 0
        for size in list(self.growth):
            if alone < LATER and size.places == places[size.now]:
                alone += self._apart(size)

    def _places(self) -> dict[int, Places]:
        """Return the places of each size, in the order of the floating-point arguments."""
        arguments = self.case.arguments
        values = [t for _, t in arguments if t.is_floating_point() or t.is_complex()]
        # One size of integers alone is that of offsets or lengths: repeated, they would mean something else.
        integers = [t for _, t in arguments if counts(t)]
        tied = {1 for t in integers if 1 in t.shape}
        if TIED in self.case.memo:
            tied.update(n for t in integers if t.dim() > 1 for n in t.shape)
        return {
            n: tuple((i, d, 1) for i, t in arguments for d, m in enumerate(t.shape) if m == n)
            for n in dict.fromkeys(n for t in values for n in t.shape)
            if n and n not in tied
        }

    def _at_once(self, sizes: list[Size]) -> bool:
        """Find whether all sizes may be the same larger one, which spares a call each; outputs tell how they grow.

        A number that is another's and one more, or twice it, will not be the same. A size of 1, which may be broadcast
        to what is the same now, becomes 2. What is refused for an odd number may be taken for an even one, of which
        that 2 is a part: heads of queries for each head of keys.
        """
        same, kept = max(size.now for size in sizes) + 1, self.case.memo.setdefault("one more", [])
        other, outputs, new = self._same(sizes, same)
        several = sum(size.now > 1 for size in sizes) > SURE
        seen = apart(other) if other and self.case.memo.get(LARGER) is other else other
        if seen and several and not runs(seen):
            return False
        if other is None:
            may_divide = same % 2 and any(size.now == 1 for size in sizes)
            even = self._same(sizes, same + 1)[0] if may_divide else None
            kept.extend([] if even is None else [even])
            return False
        growth = dict.fromkeys(sizes, 0.0)
        by_change = {(size.now, n): size for size, n in new.items()}
        here, there = (max(ys, key=Tensor.numel).shape for ys in (self.case.all_outputs, outputs))
        for change in zip(here, there, strict=False):
            if change in by_change:
                growth[by_change[change]] += 1
            elif change[0] != change[1]:
                return False  # of several dimensions in one
        self.growth = growth
        kept.append(other)
        return True

    def _same(
        self, sizes: list[Size], same: int
    ) -> tuple[Case | None, list[Tensor], dict[Size, int]]:
        """Return the case in which all sizes are ``same``, if forward takes it, its outputs, and what each is then.

        The outputs are those for larger inputs, with which `sizes` tests it, where such are in the domain.
        """
        new = {size: same if size.now > 1 else size.more for size in sizes}
        wanted = {(i, d): n for size, n in new.items() for i, d, _ in size.places}
        most = max(
            math.prod(wanted.get((i, d), n) for d, n in enumerate(t.shape))
            for i, t in self.case.arguments
        )
        if most > SAME:
            return None, [], new
        self.attempts += 1
        other = resized(self.case, new)
        for seen in dict.fromkeys((apart(other) if self._exceeds_1() else other, other)):
            if accepts(seen):
                self.case.memo[LARGER] = seen is not other and other
                return other, seen.all_outputs, new
            if "first" not in seen.__dict__:
                break  # refused, and so are the sizes
        return None, [], new

    def _exceeds_1(self, step: int = 1) -> bool:
        """Whether inputs, every ``step``-th of them, are beyond the domain of a probability, a cosine."""
        which = [i for i in self.case.where[::step] if i < self.case.size]
        return all(largest(self.case.flat[i]) > 1 for i in which)

    def _together(self, n: int, places: Mapping[int, Places], *, backward: bool) -> None:
        """Find what of the dimensions of size ``n`` may change together: all of them, or the first or last alone."""
        whole = places[n]
        multiples = tuple(
            (i, d, m // n)
            for m in places
            if n > 1 and m > n and m % n == 0
            for i, d, _ in places[m]
        )
        tries = [Size(n, whole)]
        if n > 1 and n not in self.fixed:
            tries.append(Size(n, whole, n))
        if multiples and n not in self.fixed:
            tries.append(Size(n, whole + multiples))
        if len(whole) > 1:
            tries += [Size(n, whole[:1]), Size(n, whole[-1:])]
        said = ""
        for size in tries:
            if size.unit > 1 and said in self.stands:
                continue
            grown = self._grows(size, backward=backward)
            if grown is not None:
                if not self._is_broadcast(size, places):
                    self.growth[size] = grown
                self._stacked(size, whole)
                return
            if size.unit > 1 and said == self.said:
                self.stands.add(said)
            said = said or self.said

    def _is_broadcast(self, size: Size, places: Mapping[int, Places]) -> bool:
        """Whether a size of 1 may only be what another size is, which 2 was by chance."""
        if size.now > 1 or size.more not in places:
            return False
        self.attempts += 1
        return not accepts(resized(self.case, {size: max(places) + 1}))

    def _stacked(self, size: Size, whole: Places) -> None:
        """Find whether the first dimensions of what is left take one more: layers, in stacks of parameters.

        No size is made of them: a thousand layers are chaos.
        """
        first = tuple(p for p in whole if p not in size.places and p[1] == 0)
        if not first or len(size.places) > 1:
            return
        if self._grows(Size(size.now, first), backward=True) is not None:
            kept = self.case.memo["one more"]
            kept.insert(0, kept.pop())  # the last is tried at another scale at once

    def _apart(self, size: Size) -> bool:
        """Find a part of ``size`` that may change alone, and make two sizes of it."""
        whole = size.places
        several = len(whole) > 2
        along = tuple(p for p in whole if p[1] == whole[0][1])  # one dimension, of all inputs
        if self.alike and not self.elementwise and len(along) < len(whole):
            grown = self._grows(Size(size.now, along, size.unit), backward=True)
            if grown is not None:
                self._part(size, along, grown)
                return True
        parts, split = self._parts(size, along)
        said: list[str] = []
        for part in parts if several else parts[:1]:
            rest = tuple(p for p in whole if p not in part)
            if not rest:
                continue
            if len(said) > 1 and len(set(said)) == 1 and part not in _two_and_two(whole):
                break  # what is refused to one and to the rest, for one reason, is refused to all
            first = several and part == parts[0]
            one, other = Size(size.now, part, size.unit), Size(size.now, rest, size.unit)
            if found := self._alone(one, twice=first and not split):
                one, grown = found
                other = replace(other, unit=one.unit)
            else:
                said.append(self.said)
                if first and self.said in self.stands:
                    break
                # Keys, perhaps, that may be more than queries, and not less.
                found = self._alone(other, twice=False) if first else None
                if not found:
                    if not several and speaks(self.case, SHARED):
                        self._grows(replace(other, unit=size.now), backward=True)
                    said += [self.said] if first else []
                    self.stands.update(said if len(said) > 1 and len(set(said)) == 1 else ())
                    continue
                grown = self.growth[size] - found[1]
            self._part(size, one.places, grown, one.unit)
            return True
        return False

    def _parts(self, size: Size, along: Places) -> tuple[list[Places], bool]:
        """Return what may be a size of its own, the likeliest first, and whether outputs told so."""
        whole = size.places
        if self.elementwise:
            return [along], False
        # Channels beside a kernel as wide, heads beside features: the same dimension of each, the first or the last.
        ends = [{p[0]: p for p in some} for some in (whole[::-1], whole)]
        alike = [tuple(p for p in whole if p in end.values()) for end in ends]
        parts = [part for part in alike if 1 < len(part) < len(whole) and part[0][0] != part[-1][0]]
        parts += [(p,) for p in (whole[0], whole[-1], *(whole[1:2] if len(whole) == 3 else ()))]
        parts = _two_and_two(whole) + parts
        part = of_outputs(self.case, size) if len(whole) > 2 else ()
        if not part:
            return parts, False
        # Of what all share with outputs the first may be a multiple: heads of queries for each of the keys.
        return ([part], True) if part != whole else (parts[:1], False)

    def _part(self, size: Size, places: Places, grown: float, unit: int | None = None) -> None:
        """Make a size of its own of some places of ``size``."""
        rest = tuple(p for p in size.places if p not in places)
        unit = size.unit if unit is None else unit
        one, other = Size(size.now, places, unit), Size(size.now, rest, unit)
        self.growth = {
            (other if s == size else s): g - grown * (s == size) for s, g in self.growth.items()
        }
        self.growth[one] = grown

    def _alone(self, size: Size, *, twice: bool) -> tuple[Size, float] | None:
        """Return the size, with its unit, if forward takes it larger, and how outputs grow with it.

        With ``twice`` a multiple will do: heads of queries, where those of keys stay as they are. What refuses to
        double refuses one more, too.
        """
        if not twice:
            grown = self._grows(size, backward=True)
            return None if grown is None else (size, grown)
        double = replace(size, unit=size.now)
        grown = self._grows(double, backward=True)
        if grown is None:
            return None
        once = self._alone(size, twice=False) if size.now > 1 else None
        if once:
            self.case.memo["one more"].pop(-2)  # one more is enough
        return once or (double, grown)

    def _grows(self, size: Size, *, backward: bool = False) -> float | None:
        """Return how outputs grow with the size, if forward takes it one larger; keep that case.

        A forward that does not look at its inputs takes what was never meant: there ``backward`` has to agree.
        """
        if self.attempts >= ATTEMPTS:
            return None
        self.attempts += 1
        case, other = self.case, resized(self.case, {size: size.more})
        self.said = ""
        # What is tested for larger inputs is seen for these.
        larger = not backward and not case.memo.get(LARGER) and self._exceeds_1(2)
        seen = apart(other) if larger else other
        if larger and not accepts(seen) and "first" in seen.__dict__:
            larger, seen = False, other
        if not accepts(seen):
            self.said = without_numbers(seen.refusal)
            if self.said and seen is other:
                case.memo.setdefault(REFUSES, set()).add(self.said)
            if size.unit == size.now or backward:  # groups refuse what is one more, too
                case.memo.setdefault(REFUSED, set()).add(size.places)
            return None
        if backward and not runs(other):
            return None
        if larger:
            case.memo[LARGER] = other
        case.memo.setdefault("one more", []).append(other)
        grown = _count(seen.all_outputs) / _count(case.all_outputs)
        return math.log(grown) / math.log(size.more / size.now)

    @property
    def alike(self) -> bool:
        """Whether there are several inputs, all of one shape."""
        shapes = [t.shape for _, t in self.case.arguments]
        return len(shapes) > 1 == len(set(shapes))

    @property
    def elementwise(self) -> bool:
        return len(elementwise(self.case)) == len(self.case.leaves)


def _two_and_two(places: Places) -> list[Places]:
    """Return two of four places, of which one input has two: what its weights make, or what they are given."""
    of_one = [p for p in places if sum(q[0] == p[0] for q in places) == 2]
    if len(places) != 4 or len(of_one) != 2:
        return []
    rest = [p for p in places if p not in of_one]
    return [tuple(p for p in places if p in (of_one[1], other)) for other in rest[::-1]]


def _count(tensors: Iterable[Tensor]) -> int:
    return max([1, *(t.numel() for t in tensors)])
