"""How the error signal changes through time, as vanishing and exploding read it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from torchbp.monitor._diagnosis import Reading

__all__ = ["Course", "course"]

_FADED = 1e-4
_LOST = 1e-3


@dataclass(frozen=True)
class Course:
    """The worst layer that runs through time.

    Attributes:
        name: Its name.
        ratio: The error signal at its first time steps over that at its last.
        steps: Number of time steps.
        reach: From the end, the number of them that receive 1e-3 of the largest signal.
    """

    name: str
    ratio: float
    steps: int
    reach: int

    @property
    def factor(self) -> float:
        """By how much a step changes the signal."""
        return self.ratio ** (1 / max(self.steps - 1, 1))


def course(reading: Reading, worst: Callable[..., np.intp]) -> Course | None:
    """Return the worst course; None where there is none to judge.

    Args:
        reading: The reading.
        worst: ``np.nanargmin`` or ``np.nanargmax`` of the ratios.
    """
    ratios = reading.values.get("through_time")
    if ratios is None or not np.isfinite(ratios).any():
        return None
    # As over depth: where the model has converged, error signals are next to nothing everywhere.
    largest = max(float(norms.max()) for norms in reading.times.values())
    peak = reading.memory["peak time"] = max(largest, reading.memory.get("peak time", 0.0))
    if not np.isfinite(peak) or largest <= _FADED * peak:
        return None
    index = int(worst(np.where(np.isfinite(ratios), ratios, np.nan)))
    norms = reading.times[index]
    received = np.flatnonzero(norms >= _LOST * norms.max())
    reach = len(norms) - int(received[0])
    return Course(reading.layers.names[index], float(ratios[index]), len(norms), reach)
