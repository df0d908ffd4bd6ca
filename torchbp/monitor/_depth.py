"""How the error signal changes over depth, as vanishing and exploding read it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Reading

__all__ = ["Profile", "profile"]

_FADED = 1e-4


@dataclass(frozen=True)
class Profile:
    """The error signals of the weighted layers that had one, in the order in which they run.

    Attributes:
        names: Their names.
        signals: float64 ``(n,)``, RMS(∂L/∂z)·B, finite.
        reached: float64 ``(n,)``: the largest signal at this layer or an earlier one. A residual
            branch may be still while the stream beside it carries the signal on; what no layer
            up to here receives is lost.
        output: The last layer's signal.
    """

    names: tuple[str, ...]
    signals: NDArray[np.float64]
    reached: NDArray[np.float64]
    output: float


def profile(reading: Reading) -> Profile | None:
    """Return the profile; None where there is none to judge.

    That is: fewer than three layers, a signal that is not finite (which is another diagnosis), or
    a loss so far down (converged) that its error signals are next to nothing everywhere.
    """
    here = np.flatnonzero(reading.layers.weighted & reading.present["error_signal"])
    signals = reading.values["error_signal"][here]
    if len(signals) < 3 or not np.isfinite(signals).all():
        return None
    output = float(signals[-1])
    peak = reading.memory["peak"] = max(output, reading.memory.get("peak", 0.0))
    if output <= _FADED * peak:
        return None
    names = tuple(reading.layers.names[i] for i in here)
    return Profile(names, signals, np.maximum.accumulate(signals), output)
