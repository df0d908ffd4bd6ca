"""Dead units: ReLU units that no sample makes positive; they get no gradient and stay dead.

Deep ReLU networks without normalization have some from the start, so a layer counts only where two
fifths of it are dead over a whole window (:mod:`torchbp.monitor.quantities.dead_share`).
"""

from collections.abc import Iterator

import numpy as np

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion

__all__ = ["DIAGNOSIS"]

_WARN, _ALERT, _CLEAR = 0.4, 0.5, 0.3


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield one suspicion a layer."""
    shares = reading.values["dead_share"]
    for index in np.flatnonzero(reading.present["dead_share"]):
        share, layer = shares[index], reading.layers.names[index]
        if share > _CLEAR:
            severity = "alert" if share > _ALERT else "warning" if share > _WARN else None
            yield Suspicion(
                severity,
                layer,
                f"{share:.0%} of the units behind {layer} were positive for no sample",
                "a smaller learning rate, or a warm-up: a large step pushes biases down for good; "
                "He initialisation with zero biases; LeakyReLU or GELU; a normalization before "
                "the activation",
                key=layer,
            )


DIAGNOSIS = Diagnosis(
    name="dead",
    reads=("dead_share",),
    examine=examine,
    threshold="40 % of a layer's units are dead (alert: 50 %), over 1024 samples and more",
    source="Stanford CS231n, notes on neural networks 1: as much as 40 % may die where the learning "
    "rate is too high",
    ends=2,
)
