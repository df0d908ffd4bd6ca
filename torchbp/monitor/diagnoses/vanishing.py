"""Vanishing gradient: the error signal dies out on its way back, through the layers or through time.

Compared are error signals, e_l = RMS(∂L/∂z_l)·B, not weight-gradient norms: those also hold the
activations, and a network whose signal has vanished can have a first layer with a large one.
A layer counts as lost when neither it nor any layer before it receives 1e-3 of the output's signal.
Through time the first time steps of a sequence stand against the last
(:mod:`torchbp.monitor.quantities.through_time`).
"""

from collections.abc import Iterator

import numpy as np

from torchbp.monitor._depth import profile
from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion
from torchbp.monitor._time import course

__all__ = ["DIAGNOSIS"]

_WARN, _ALERT, _CLEAR = 1e-3, 1e-5, 3e-3


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield at most two suspicions: at the last layer that is cut off, and through time."""
    yield from _through_depth(reading)
    yield from _through_time(reading)


def _through_time(reading: Reading) -> Iterator[Suspicion]:
    found = course(reading, np.nanargmin)
    if found is None or found.ratio >= _CLEAR:
        return
    severity = "alert" if found.ratio < _ALERT else "warning" if found.ratio < _WARN else None
    rate = "" if found.ratio == 0 else f"; a factor {found.factor:.2g} per time step"
    yield Suspicion(
        severity,
        found.name,
        f"through time: the first of {found.steps} time steps receive {found.ratio:.1e} of the "
        f"error signal of the last; it reaches {found.reach} steps back{rate}",
        "LSTM or GRU instead of a plain recurrent cell, the forget gate's bias at log(steps) to "
        "begin with; orthogonal initialisation of the recurrent weights; a loss at every time "
        "step, attention, or shorter sequences",
        key="time",
    )


def _through_depth(reading: Reading) -> Iterator[Suspicion]:
    found = profile(reading)
    if found is None or found.reached[0] >= _CLEAR * found.output:
        return
    ratio = found.reached[0] / found.output
    cut_off = np.flatnonzero(found.reached < _WARN * found.output)
    last = int(cut_off[-1]) if len(cut_off) else 0
    severity = "alert" if ratio < _ALERT else "warning" if ratio < _WARN else None
    below = (
        "nothing (less than double precision holds)"
        if ratio == 0
        else f"{ratio:.1e} of the output's"
    )
    per_layer = (
        ""
        if ratio == 0
        else f"; a factor {ratio ** (1 / max(len(found.here) - 1, 1)):.2g} per layer"
    )
    yield Suspicion(
        severity,
        found.name(last),
        f"the error signal is {found.output:.1e} at {found.name(-1)}, "
        f"{found.signals[last]:.1e} at {found.name(last)} and {found.signals[0]:.1e} at "
        f"{found.name(0)}: the first layer receives {below}{per_layer}",
        "residual connections around every one or two layers with a normalization in them; ReLU "
        "or GELU instead of sigmoid or tanh, with He initialisation (Xavier for tanh); fewer "
        "layers",
    )


DIAGNOSIS = Diagnosis(
    name="vanishing",
    reads=("error_signal",),
    examine=examine,
    threshold="no layer up to here receives 1e-3 of the output's error signal (alert: the first "
    "layer 1e-5), or the first time steps of the last ones', in 10 readings",
    source="chosen between measured healthy networks (0.02 to 3.6) and sick ones (1e-8 and less)",
    begins=10,
    ends=5,
)
