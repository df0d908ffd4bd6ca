"""Exploding gradient: the error signal grows on its way back through the layers.

Compared are error signals, e_l = RMS(∂L/∂z_l)·B. The first three layers (their median) stand
against the larger of the last two: the head's own width may set it apart from what feeds it.
"""

from collections.abc import Iterator

import numpy as np

from torchbp.monitor._depth import profile
from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion

__all__ = ["DIAGNOSIS"]

_WARN, _ALERT, _CLEAR = 30.0, 1e3, 10.0


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield at most one suspicion, at the layer from which on the signal is too large."""
    if not np.isfinite(reading.values["error_signal"][reading.present["error_signal"]]).all():
        # It has exploded altogether: what was suspected before still holds.
        yield from reading.memory.get("before", [])
        return
    reading.memory["before"] = list(_suspect(reading))
    yield from reading.memory["before"]


def _suspect(reading: Reading) -> Iterator[Suspicion]:
    found = profile(reading)
    if found is None:
        return
    end = float(found.signals[-2:].max())
    ratio = float(np.median(found.signals[:3])) / end
    if ratio <= _CLEAR:
        return
    last = int(np.flatnonzero(found.signals > min(_WARN, ratio / 2) * end)[-1])
    growth = ratio ** (1 / max(len(found.names) - 1, 1))
    yield Suspicion(
        "alert" if ratio > _ALERT else "warning" if ratio > _WARN else None,
        found.names[last],
        f"the error signal is {found.output:.1e} at {found.names[-1]}, "
        f"{found.signals[last]:.1e} at {found.names[last]} and {found.signals[0]:.1e} at "
        f"{found.names[0]}: {ratio:.1e} times what the last layers have; a factor {growth:.2g} "
        "per layer",
        "a smaller initialisation (He for ReLU, Xavier for tanh); a normalization before or after "
        "every layer; residual connections with a scaled-down branch; clip_grad_norm_ keeps the "
        "steps finite meanwhile",
    )


DIAGNOSIS = Diagnosis(
    name="exploding",
    reads=("error_signal",),
    examine=examine,
    threshold="the first layers receive more than 30 times the last layers' error signal (alert: "
    "1e3), in 10 readings (alert: 3)",
    source="chosen between measured healthy networks (0.02 to 3.6) and sick ones (33 and more)",
    begins=10,
    begins_alert=3,
    ends=5,
)
