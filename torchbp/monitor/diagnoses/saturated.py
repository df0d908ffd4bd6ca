"""Saturated units: sigmoid or tanh where they are flat, so that little gradient comes through.

An activation behind the last layer is the model's answer and may be as sure as it likes.
"""

from collections.abc import Iterator

import numpy as np

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion

__all__ = ["DIAGNOSIS"]

_WARN, _ALERT, _CLEAR = 0.2, 0.5, 0.15


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield one suspicion a layer."""
    shares = reading.values["saturated_share"]
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


DIAGNOSIS = Diagnosis(
    name="saturated",
    reads=("saturated_share",),
    examine=examine,
    threshold="20 % of a layer's activations are saturated (alert: 50 %), in 10 readings",
    source="chosen so as to separate healthy networks from ones with too large weights or inputs",
    begins=10,
    ends=5,
)
