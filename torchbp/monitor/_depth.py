"""How the error signal changes over depth, as vanishing and exploding read it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Layers, Reading

__all__ = ["Profile", "profile"]

_FADED = 1e-4


@dataclass(frozen=True)
class Profile:
    """The error signals of the n weighted layers that had one, in the order in which they run.

    Attributes:
        layers: All layers.
        here: int ``(n,)``: where those stand among them.
        signals: float64 ``(n,)``, RMS(∂L/∂z)·B, finite.
        reached: float64 ``(n,)``: the largest signal at this layer or an earlier one. A residual
            branch may be still while the stream beside it carries the signal on; what no layer
            up to here receives is lost.
        output: The last layer's signal.
    """

    layers: Layers
    here: NDArray[np.int64]
    signals: NDArray[np.float64]
    reached: NDArray[np.float64]
    output: float

    def name(self, index: int) -> str:
        """Return the name of one of the n."""
        return self.layers.names[self.here[index]]


def profile(reading: Reading) -> Profile | None:
    """Return the profile; None where there is none to judge.

    That is: fewer than three layers, a signal that is not finite (which is another diagnosis), or
    a loss so far down (converged) that its error signals are next to nothing everywhere.
    """
    if "profile" not in reading.shared:
        reading.shared["profile"] = _found(reading)
    found = reading.shared["profile"]
    if found is None:
        return None
    peak = reading.memory["peak"] = max(found.output, reading.memory.get("peak", 0.0))
    return None if found.output <= _FADED * peak else found


def _found(reading: Reading) -> Profile | None:
    here = np.flatnonzero(reading.layers.weighted & reading.present["error_signal"])
    signals = reading.values["error_signal"][here]
    if len(signals) < 3 or not np.isfinite(signals).all():
        return None
    reached = np.maximum.accumulate(signals)
    return Profile(reading.layers, here, signals, reached, float(signals[-1]))
