"""The governor: how often the monitor looks, so that its share of the time stays below a goal.

A step that is read costs r seconds, one that is also sampled s, a drain d; a training step takes T. With
periods n, m and k the share is 2·(r·(1/n − 1/m) + s/m + d/k) / T. r, s and d are what the clocks in the
monitor's own calls say, the writer's thread included. They are doubled: benchmarks find twice of it added,
for reaching the calls costs, and training finds its data and code less often in the processor's caches.

At every drain the periods become the shortest that keep the share below the goal, a quarter of it for
drains. Sampled steps are spread out first, then reading too; each by 16 at most. They become shorter again
when there is a third to spare. What the user asked for by name is kept as it is.

Trouble is looked at closely, as often as was asked for: the first 300 steps; when the loss jumps; and when
readings make a verdict likely or are about to end one, so that ten readings in a row are no further apart
than ever. That is bounded too: a sixteenth of all steps, saved up for 400 at most.
"""

from collections.abc import Sequence
from math import ceil, lcm
from statistics import fmean, median
from typing import NamedTuple

__all__ = ["DRAIN_EVERY", "UNSEEN", "Governor", "Periods", "Usual", "Vote"]

DRAIN_EVERY = 50
_FIRST = 300  # steps: as many as the diagnosis that looks back furthest needs, 30 samples
UNSEEN = 2.0
_OF_DRAINS = 0.25
_SPARE = 0.7
_SAVED, _LOOK, _EARNED = 400.0, 100, 1 / 16  # steps of a closer look: at most, at least, a step
_FACTORS = (1, 2, 4, 8, 16)
# Of sample_every and every.
_LADDER = ((1, 1), (2, 1), (4, 1), (4, 2), (8, 2), (8, 4), (16, 4), (16, 8), (16, 16))


class Usual(int):
    """A period that nobody asked for by name."""


class Periods(NamedTuple):
    """Numbers of steps.

    Attributes:
        every: From one reading of gradient norms to the next.
        sample_every: From one step whose layers are listened to to the next.
        drain_every: From one time that readings are judged and written to the next.
    """

    every: int
    sample_every: int
    drain_every: int


class Vote(NamedTuple):
    """What a rank is for. Ranks agree on the mean, and look closely when one of them wants to.

    Attributes:
        reads: The place on the ladder of reading.
        drains: The same of drains.
        looks: 1 to look closely, else 0.
    """

    reads: float = 0
    drains: float = 0
    looks: float = 0


class Governor:
    """Decides the periods.

    Args:
        share: The goal; None to keep to what was asked for.
        every: What was asked for; :class:`Usual` where it may be stretched.
        sample_every: The same.

    Attributes:
        periods: In force.
        asked: As asked for.
        longest: The longest so far.
    """

    def __init__(self, share: float | None, every: int, sample_every: int) -> None:
        periods = Periods(int(every), int(sample_every), DRAIN_EVERY * int(every))
        self.asked = self.periods = self.longest = periods
        self._share = share
        self._spread = isinstance(sample_every, Usual), isinstance(every, Usual)
        self._at = Vote()
        self._samples: list[float] = []  # since the last decision: seconds
        self._reads: list[float] = []
        self._times: list[float] = []
        self._read = self._sample = self._drain = self._time = 0.0
        self._until = 0  # which step a closer look lasts
        self._saved, self._since = _SAVED, 0

    def note(self, sampled: bool, own: float, step: float) -> None:
        """Take note of a step that was read: the seconds of the monitor, and of all of it."""
        (self._samples if sampled else self._reads).append(own)
        self._times.append(step)

    def keep_reading(self) -> None:
        """Read every step that was asked for: optimizers take turns, and a stride would meet one of them."""
        self._spread = self._spread[0], False

    def vote(self, drain: float, *, restless: bool) -> Vote:
        """Return what the measurements speak for.

        Args:
            drain: Seconds the drain has taken, and the judging and writing of the one before.
            restless: Whether something is about to become a verdict, or to end one.
        """
        for kind, found in (("_read", self._reads), ("_sample", self._samples)):
            before = getattr(self, kind)
            if found:
                setattr(self, kind, (before + fmean(found)) / 2 if before else fmean(found))
        self._drain = (self._drain + drain) / 2 if self._drain else drain
        self._time = median(self._times) if self._times else self._time
        self._reads, self._samples, self._times = [], [], []
        if self._share is None or not self._time:
            return Vote()
        limit = self._share * self._time / UNSEEN
        reads = [self._cost(*self._strides(place)) for place in range(len(_LADDER))]
        drains = [self._drain / (self.asked.drain_every * factor) for factor in _FACTORS]
        return Vote(
            _least(reads, (1 - _OF_DRAINS) * limit, int(self._at.reads)),
            _least(drains, _OF_DRAINS * limit, int(self._at.drains)),
            restless,
        )

    def decide(self, step: int, vote: Vote, ranks: int = 1) -> bool:
        """Set the periods; return whether they have changed.

        Args:
            step: Number of steps so far.
            vote: The sum over all ranks.
            ranks: How many.
        """
        self._save(step)
        self._at = Vote(*(ceil(v / ranks) for v in vote))
        if vote.looks:
            self._look(step)
        if step >= self._until:
            self._until = 0
        return self._set(step)

    def look(self, step: int) -> bool:
        """Look closely from now on; return whether that has changed the periods."""
        self._save(step)
        self._look(step)
        return self._set(step)

    def _look(self, step: int) -> None:
        if self._saved >= _LOOK or step < self._until:
            self._until = step + min(_LOOK, int(self._saved))

    def _save(self, step: int) -> None:
        steps, self._since = step - max(self._since, _FIRST), step
        if steps > 0:
            gain = -steps if self._until else _EARNED * steps
            self._saved = min(self._saved + gain, _SAVED)

    def _set(self, step: int) -> bool:
        before = self.periods
        if self._share is None or step < _FIRST or self._until:
            self.periods = self.asked
        else:
            every, sample_every = self._strides(int(self._at.reads))
            drain_every = self.asked.drain_every * _FACTORS[int(self._at.drains)]
            self.periods = Periods(every, sample_every, max(drain_every, every))
        self.longest = Periods(*map(max, self.longest, self.periods))
        return self.periods != before

    def told(self, periods: Periods) -> str:
        """Return the periods in a sentence."""
        what = ("gradient norms are read", "layers are listened to", "readings are judged")
        said = [
            f"{name} every {now} steps (asked for: {asked})"
            for name, now, asked in zip(what, periods, self.asked, strict=True)
            if now != asked
        ]
        if not said or self._share is None:
            return "as often as asked for"
        return f"{', '.join(said)}, to keep the monitor's share of the time below {self._share:.1%}"

    def _strides(self, place: int) -> tuple[int, int]:
        """Return every and sample_every at a place of the ladder."""
        of_samples, of_reads = _LADDER[place]
        asked = self.asked
        sample_every = asked.sample_every * (of_samples if self._spread[0] else 1)
        if not self._spread[1]:
            return asked.every, sample_every
        fits = [f for f in _FACTORS if f <= of_reads and sample_every % (asked.every * f) == 0]
        return asked.every * max(fits, default=1), sample_every

    def _cost(self, every: int, sample_every: int) -> float:
        """Return the seconds a step, drains left out."""
        sampled = lcm(every, sample_every)
        return self._read * (1 / every - 1 / sampled) + self._sample / sampled


def _least(costs: Sequence[float], limit: float, now: int) -> int:
    """Return the first that is within the limit; one before ``now`` only with something to spare."""
    for place, cost in enumerate(costs):
        if cost <= limit * (_SPARE if place < now else 1):
            return place
    return len(costs) - 1
