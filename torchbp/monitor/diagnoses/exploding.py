"""Exploding gradient: the error signal grows on its way back, through the layers or through time.

Compared are error signals, e_l = RMS(∂L/∂z_l)·B. The first three layers (their median) stand
against the larger of the last two: the head's own width may set it apart from what feeds it.
Through time the first time steps of a sequence stand against the last
(:mod:`torchbp.monitor.quantities.through_time`).
"""

from collections.abc import Iterator

import numpy as np

from torchbp.monitor._depth import profile
from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion
from torchbp.monitor._time import course

__all__ = ["DIAGNOSIS"]

_WARN, _ALERT, _CLEAR = 30.0, 1e3, 10.0


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield at most two suspicions: at the layer from which on the signal is too large, and through time."""
    if not np.isfinite(reading.values["error_signal"][reading.present["error_signal"]]).all():
        # It has exploded altogether: what was suspected before still holds.
        yield from reading.memory.get("before", [])
        return
    reading.memory["before"] = [*_through_depth(reading), *_through_time(reading)]
    yield from reading.memory["before"]


def _through_time(reading: Reading) -> Iterator[Suspicion]:
    found = course(reading, np.nanargmax)
    if found is None or found.ratio <= _CLEAR:
        return
    yield Suspicion(
        "alert" if found.ratio > _ALERT else "warning" if found.ratio > _WARN else None,
        found.name,
        f"through time: the first of {found.steps} time steps receive {found.ratio:.1e} times the "
        f"error signal of the last; a factor {found.factor:.2g} per time step",
        "clip_grad_norm_; orthogonal initialisation of the recurrent weights; LSTM or GRU instead "
        "of a plain recurrent cell; truncated backpropagation through time (detach the state every "
        "so many steps)",
        key="time",
    )


def _through_depth(reading: Reading) -> Iterator[Suspicion]:
    found = profile(reading)
    if found is None:
        return
    end = float(found.signals[-2:].max())
    ratio = float(np.median(found.signals[:3])) / end
    if ratio <= _CLEAR:
        return
    last = int(np.flatnonzero(found.signals > min(_WARN, ratio / 2) * end)[-1])
    growth = ratio ** (1 / max(len(found.here) - 1, 1))
    yield Suspicion(
        "alert" if ratio > _ALERT else "warning" if ratio > _WARN else None,
        found.name(last),
        f"the error signal is {found.output:.1e} at {found.name(-1)}, "
        f"{found.signals[last]:.1e} at {found.name(last)} and {found.signals[0]:.1e} at "
        f"{found.name(0)}: {ratio:.1e} times what the last layers have; a factor {growth:.2g} "
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
    "1e3), or the first time steps that of the last, in 10 readings (alert: 3)",
    source="chosen between measured healthy networks (0.02 to 3.6) and sick ones (33 and more)",
    begins=10,
    begins_alert=3,
    ends=5,
)
