"""The record that every diagnosis file ends with, and what a diagnosis says."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Diagnosis", "Layers", "Moment", "Reading", "Severity", "Suspicion", "Verdict"]

Severity = Literal["info", "warning", "alert"]

# A step that was not read, its wall time in seconds since 1970, and its training loss.
Moment = tuple[int, float, float]


@dataclass(frozen=True)
class Verdict:
    """A trouble that was found, in one layer or the run.

    Attributes:
        kind: The name of the diagnosis, e.g. ``"vanishing"``.
        severity: ``"info"``, ``"warning"`` or ``"alert"``, the gravest it has been.
        layer: The layer's name, as in ``model.named_modules()``; empty for the run as a whole.
        step: The step since when.
        until: The first step without the trouble; None while it lasts.
        evidence: The measured numbers, in a sentence.
        threshold: The rule they broke.
        source: Where the rule comes from.
        advice: What to try.
    """

    kind: str
    severity: Severity
    layer: str
    step: int
    until: int | None
    evidence: str
    threshold: str
    source: str
    advice: str

    def __str__(self) -> str:
        where = f" at {self.layer}" if self.layer else ""
        ended = "" if self.until is None else f" until step {self.until}"
        return (
            f"{self.severity}: {self.kind}{where} since step {self.step}{ended}\n"
            f"  measured  {self.evidence}\n"
            f"  rule      {self.threshold} ({self.source})\n"
            f"  try       {self.advice}"
        )


@dataclass(frozen=True)
class Layers:
    """The layers of the model in the order in which they run, and their parameters.

    Attributes:
        names: One a layer, as in ``model.named_modules()``.
        kinds: The class of each.
        weighted: bool ``(L,)``: the layer maps its input by a weight of two or more dimensions.
        parameters: One a trainable parameter, as in ``model.named_parameters()``, in the order of
            the layers.
        owner: int ``(P,)``: the layer each parameter belongs to.
        sizes: float64 ``(P,)``: number of elements of each parameter.
        matrices: bool ``(P,)``: the parameter has two or more dimensions.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    weighted: NDArray[np.bool_]
    parameters: tuple[str, ...]
    owner: NDArray[np.int64]
    sizes: NDArray[np.float64]
    matrices: NDArray[np.bool_]


@dataclass
class Reading:
    """All that was measured at one step.

    Attributes:
        step: The step.
        values: By quantity; one that was not sampled at this step is absent.
        present: By quantity of layers, bool ``(L,)``: what was there to measure. A layer that did
            not run, or whose output no gradient reached, has NaN as its value.
        layers: What the entries of the vectors are.
        when: Wall time at its end, in seconds since 1970.
        sampled: Whether the layers were listened to at this step.
        rare: Whether what is measured rarely was.
        times: By layer of ``layers``: norms of what came back to it at each time step ``(T,)``.
        ran: Layers of ``layers`` that ran; None where that is not known.
        frozen: Layers of ``layers`` none of whose parameters requires grad any more.
        unowned: Layers of ``layers`` whose parameters no optimizer has and nobody has changed.
        between: Steps that were not read and their training losses: since the reading before, up to its own.
        memory: Belongs to the quantity or diagnosis that reads; lasts as long as the monitor.
        shared: What several diagnoses make of the reading, made once.
    """

    step: int
    values: dict[str, NDArray[np.float64]]
    present: dict[str, NDArray[np.bool_]]
    layers: Layers
    when: float = 0.0
    sampled: bool = True
    rare: bool = True
    times: Mapping[int, NDArray[np.float64]] = field(default_factory=dict)
    ran: frozenset[int] | None = None
    frozen: frozenset[int] = frozenset()
    unowned: frozenset[int] = frozenset()
    between: Sequence[tuple[int, float]] = ()
    memory: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suspicion:
    """What one reading says about one layer, before it is known whether it lasts.

    Attributes:
        severity: The rule that is broken now; None where only the milder rule is, which ends a
            verdict: the trouble neither begins nor ends.
        layer: The layer's name; empty for the run.
        evidence: The measured numbers, in a sentence.
        advice: What to try.
        key: What must last for this to become a verdict; one verdict a key at a time.
    """

    severity: Severity | None
    layer: str
    evidence: str
    advice: str
    key: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """A rule that turns readings into verdicts.

    Attributes:
        name: The verdict's ``kind``.
        reads: The quantities it needs; a reading without all of them is passed over.
        examine: What one reading says: a suspicion for every key in trouble.
        screen: Takes the readings of a drain, in their order, before any of them is examined; bool
            ``(R,)``: those that have to be. Of the others it notes what there is to note.
        threshold: The rule in words.
        source: Where the rule comes from.
        begins: So many readings in a row make a verdict.
        begins_alert: So many in a row, each an alert, do as well.
        ends: So many readings in a row without the trouble end it.
    """

    name: str
    reads: tuple[str, ...]
    examine: Callable[[Reading], Iterable[Suspicion]]
    threshold: str
    source: str
    begins: int = 1
    begins_alert: int | None = None
    ends: int = 1
    screen: Callable[[Sequence[Reading]], NDArray[np.bool_]] | None = None
