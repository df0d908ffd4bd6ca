"""From readings to verdicts: a trouble counts when it lasts, and is over when it stays away."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torchbp.monitor._diagnosis import Diagnosis, Reading, Severity, Suspicion, Verdict

__all__ = ["Judge"]

_GRAVITY: dict[str, int] = {"info": 0, "warning": 1, "alert": 2}


@dataclass
class _Case:
    """One trouble of one layer, from the first suspicious reading on."""

    since: int
    seen: list[Suspicion] = field(default_factory=list)
    quiet: int = 0
    quiet_since: int = 0
    verdict: int | None = None

    @property
    def is_pending(self) -> bool:
        """Whether more readings decide whether a warning or an alert begins or ends."""
        now = self.seen[-1].severity
        return now != "info" and (self.verdict is None or self.quiet > 0)


class Judge:
    """Holds the verdicts of a run.

    Attributes:
        verdicts: In the order in which they were reached.
        restless: Whether, at the last reading, a trouble was about to become a verdict or to end as one;
            or one has done so since the readings before.
    """

    def __init__(self, diagnoses: Sequence[Diagnosis]) -> None:
        self.verdicts: list[Verdict] = []
        self.restless = False
        self._diagnoses = diagnoses
        self._cases: dict[str, dict[str, _Case]] = {d.name: {} for d in diagnoses}
        self._served: dict[tuple[str, ...], tuple[int, ...]] = {}
        self._memories: dict[str, dict[str, Any]] = {d.name: {} for d in diagnoses}

    def consider(self, readings: Sequence[Reading]) -> None:
        """Take more readings into account, in the order of their steps."""
        served = [self._serve(reading) for reading in readings]
        before = list(self.verdicts)
        due = [
            self._screened(number, [k for k, them in enumerate(served) if number in them], readings)
            for number in range(len(self._diagnoses))
        ]
        for k, reading in enumerate(readings):
            for number in served[k]:
                diagnosis, found = self._diagnoses[number], {}
                if k in due[number]:
                    reading.memory = self._memories[diagnosis.name]
                    found = {s.key: s for s in diagnosis.examine(reading)}
                if found or self._cases[diagnosis.name]:
                    self._follow(diagnosis, reading.step, found)
        cases = [case for them in self._cases.values() for case in them.values()]
        pending = any(case.is_pending for case in cases)
        self.restless = pending or _grave(self.verdicts) != _grave(before)

    def _serve(self, reading: Reading) -> tuple[int, ...]:
        """Return the numbers of the diagnoses that the reading serves."""
        names = tuple(reading.values)
        if names not in self._served:
            there = enumerate(self._diagnoses)
            self._served[names] = tuple(i for i, d in there if set(d.reads) <= set(names))
        return self._served[names]

    def _screened(self, number: int, mine: list[int], readings: Sequence[Reading]) -> set[int]:
        """Return which of the readings ``mine`` are to be examined."""
        diagnosis = self._diagnoses[number]
        if diagnosis.screen is None or not mine:
            return set(mine)
        chosen = [readings[k] for k in mine]
        for reading in chosen:
            reading.memory = self._memories[diagnosis.name]
        return {k for k, due in zip(mine, diagnosis.screen(chosen), strict=True) if due}

    def _follow(self, diagnosis: Diagnosis, step: int, found: dict[str, Suspicion]) -> None:
        cases = self._cases[diagnosis.name]
        for key, suspicion in found.items():
            if suspicion.severity is not None and key not in cases:
                cases[key] = _Case(step)
        for key, case in list(cases.items()):
            suspicion = found.get(key)
            if suspicion is not None and suspicion.severity is not None:
                case.quiet = 0
                case.seen = [*case.seen, suspicion][-diagnosis.begins :]
                if _lasts(diagnosis, case.seen):
                    self._pronounce(diagnosis, case, suspicion)
                continue
            if suspicion is not None and case.verdict is not None:
                continue  # between the two rules: neither more trouble nor less
            case.quiet_since = case.quiet_since if case.quiet else step
            case.quiet += 1
            if case.verdict is None:
                del cases[key]
            elif case.quiet >= diagnosis.ends:
                self.verdicts[case.verdict] = replace(
                    self.verdicts[case.verdict], until=case.quiet_since
                )
                del cases[key]

    def _pronounce(self, diagnosis: Diagnosis, case: _Case, now: Suspicion) -> None:
        # As grave as the mildest of the readings that make it, so that a peak alone is no alert.
        enough = case.seen
        if len(enough) < diagnosis.begins:
            enough = enough[-(diagnosis.begins_alert or 0) :]
        lasting = _mildest(enough)
        if case.verdict is None:
            case.verdict = len(self.verdicts)
            self.verdicts.append(
                Verdict(
                    kind=diagnosis.name,
                    severity=lasting,
                    layer=now.layer,
                    step=case.since,
                    until=None,
                    evidence=now.evidence,
                    threshold=diagnosis.threshold,
                    source=diagnosis.source,
                    advice=now.advice,
                )
            )
        elif _GRAVITY[lasting] > _GRAVITY[self.verdicts[case.verdict].severity]:
            self.verdicts[case.verdict] = replace(
                self.verdicts[case.verdict],
                severity=lasting,
                layer=now.layer,
                evidence=now.evidence,
                advice=now.advice,
            )


def _grave(verdicts: Sequence[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.severity != "info"]


def _lasts(diagnosis: Diagnosis, seen: list[Suspicion]) -> bool:
    alerts = diagnosis.begins_alert
    if len(seen) == diagnosis.begins:
        return True
    return (
        alerts is not None
        and len(seen) >= alerts
        and all(s.severity == "alert" for s in seen[-alerts:])
    )


def _mildest(seen: list[Suspicion]) -> Severity:
    return min((s.severity for s in seen if s.severity), key=lambda severity: _GRAVITY[severity])
