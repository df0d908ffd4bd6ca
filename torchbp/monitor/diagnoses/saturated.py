"""Saturated units: sigmoid or tanh where they are flat, so that little gradient comes through.

An activation behind the last layer is the model's answer and may be as sure as it likes. And units become sure as
a network learns: saturation is trouble where it stands in learning's way, not where it came of it. So there is none
once the output's error signal, e = RMS(∂L/∂z)·B, is half of what it was in the first readings, but where more than
half of a layer's activations were saturated in each of these.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion

__all__ = ["DIAGNOSIS"]

_WARN, _ALERT, _CLEAR = 0.2, 0.5, 0.15
_FEW = 5  # readings that a level of the error is taken from
_LEARNT = 0.5


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield one suspicion a layer."""
    shares = np.nan_to_num(reading.values["saturated_share"])
    from_start = _from_start(reading, shares)
    if _has_learnt(reading):
        shares = np.where(from_start, shares, 0)
    for index in np.flatnonzero(reading.present["saturated_share"][:-1] & (shares[:-1] > _CLEAR)):
        share, layer = shares[index], reading.layers.names[index]
        severity = "alert" if share > _ALERT else "warning" if share > _WARN else None
        yield Suspicion(
            severity,
            layer,
            f"{share:.0%} of the activations behind {layer} are where the slope is below 6 % of "
            "its largest",
            "Xavier initialisation; inputs of zero mean and unit variance; a normalization before "
            "the activation; a smaller learning rate; ReLU or GELU",
            key=layer,
        )


def _from_start(reading: Reading, shares: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return bool ``(L,)``: the layers of which most was saturated in each of the first readings."""
    left, layers = reading.memory.get("start", (_FEW, shares > _ALERT))
    if left and layers.shape == shares.shape:
        layers = layers & (shares > _ALERT)
        reading.memory["start"] = left - 1, layers
    return layers if layers.shape == shares.shape else np.zeros(shares.shape, bool)


def _has_learnt(reading: Reading) -> bool:
    """Whether the output's error signal has fallen to half; the medians of a few readings are compared."""
    signals = reading.values["error_signal"][reading.present["error_signal"]]
    first, last = reading.memory.setdefault("errors", ([], deque(maxlen=_FEW)))
    if len(signals) and np.isfinite(signals[-1]):
        last.append(signals[-1])
        if len(first) < _FEW:
            first.append(signals[-1])
    return bool(last) and float(np.median(last)) < _LEARNT * float(np.median(first))


DIAGNOSIS = Diagnosis(
    name="saturated",
    reads=("saturated_share", "error_signal"),
    examine=examine,
    threshold="20 % of a layer's activations are saturated (alert: 50 %), in 10 readings, while the output's error "
    "signal is above half of what it was at first, or half of them were saturated from the start",
    source="chosen so as to separate healthy networks from ones with too large weights or inputs",
    begins=10,
    ends=5,
)
