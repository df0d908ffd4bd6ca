"""Spikes: a gradient norm far outside of what the last 128 steps had."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion

__all__ = ["DIAGNOSIS"]

_HISTORY, _SIGMAS, _TIMES = 128, 6.0, 4.0


@dataclass
class _Window:
    """The last steps: logarithms of the norm with their sums, and norms by layer."""

    logs: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    layers: deque[NDArray[np.float64]] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    total: float = 0.0
    squares: float = 0.0

    def add(self, log: float, layers: NDArray[np.float64]) -> None:
        if len(self.logs) == _HISTORY:
            self.total -= self.logs[0]
            self.squares -= self.logs[0] ** 2
        self.logs.append(log)
        self.layers.append(layers)
        self.total += log
        self.squares += log * log

    def sigmas(self, log: float) -> float:
        """How many standard deviations ``log`` lies above the mean."""
        mean = self.total / _HISTORY
        return (log - mean) / max(math.sqrt(max(self.squares / _HISTORY - mean**2, 0.0)), 1e-3)


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield at most one suspicion, at the layer whose gradient has grown most."""
    norm = float(reading.values["global_gradient_norm"][0])
    layers = reading.values["layer_gradient_norm"]
    window = reading.memory.setdefault("window", _Window())
    if not math.isfinite(norm) or norm <= 0:
        return
    log = math.log(norm)
    if len(window.logs) == _HISTORY and window.layers[0].shape == layers.shape:
        sigmas = window.sigmas(log)
        if sigmas > _SIGMAS:
            yield from _suspect(reading, window, norm, sigmas)
    window.add(log, layers)


def _suspect(reading: Reading, window: _Window, norm: float, sigmas: float) -> Iterator[Suspicion]:
    usual = math.exp(float(np.median(window.logs)))
    if norm <= _TIMES * usual:
        return
    before = np.median(window.layers, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        grown = np.nan_to_num(reading.values["layer_gradient_norm"] / before, posinf=0.0)
    layer = reading.layers.names[int(np.argmax(grown))]
    yield Suspicion(
        "warning",
        layer,
        f"the gradient norm is {norm:.2g}, {norm / usual:.1f} times its median over the last "
        f"{_HISTORY} steps and {sigmas:.1f}σ above their mean in logarithm; most of all at "
        f"{layer}, {grown.max():.1f} times",
        f"clip_grad_norm_ at {2 * usual:.2g}; look at the batch of this step; a longer "
        "warm-up; a smaller β2 in Adam",
    )


DIAGNOSIS = Diagnosis(
    name="spike",
    reads=("global_gradient_norm", "layer_gradient_norm"),
    examine=examine,
    threshold="the logarithm of the gradient norm is 6σ above its mean over 128 steps, and the norm "
    "4 times its median",
    source="OLMo-core: 6σ over 128 steps; the factor is added",
)
