"""Spikes: a gradient norm far outside of what the last 128 readings had."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion

__all__ = ["DIAGNOSIS"]

_HISTORY, _SIGMAS, _TIMES = 128, 6.0, 4.0
_PART = 0.1  # of the gradient's norm, which a layer has that is named


def screen(readings: Sequence[Reading]) -> NDArray[np.bool_]:
    """Return which steps stand out; note them all, and what the 128 before each that does had."""
    memory = readings[0].memory
    norms = np.array([r.values["global_gradient_norm"][0] for r in readings])
    counted = np.isfinite(norms) & (norms > 0)
    layers = np.stack([r.values["layer_gradient_norm"] for r in readings])[counted]
    if "logs" in memory and memory["layers"].shape[1] == layers.shape[1]:
        logs = np.concatenate((memory["logs"], np.log(norms[counted])))
        layers = np.concatenate((memory["layers"], layers))
    else:
        logs = np.log(norms[counted])
    memory["logs"], memory["layers"] = logs[-_HISTORY:], layers[-_HISTORY:]
    memory["before"] = {}
    suspect = np.zeros(len(readings), bool)
    new = np.flatnonzero(counted)
    sigmas = _sigmas(logs)[-len(new) :] if len(new) else np.empty(0)
    for k in np.flatnonzero(sigmas > _SIGMAS):
        end = len(logs) - len(new) + k
        start = end - _HISTORY
        before = logs[start:end], layers[start:end], float(sigmas[k])
        memory["before"][readings[new[k]].step] = before
        suspect[new[k]] = True
    return suspect


def _sigmas(logs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how many standard deviations each lies above the mean of the 128 before it."""
    found = np.zeros(len(logs))
    if len(logs) > _HISTORY:
        centred = logs - logs[0]
        sums, squares = np.cumsum(centred), np.cumsum(centred**2)
        first = np.arange(len(logs) - _HISTORY)
        last = first + _HISTORY - 1
        mean = (sums[last] - sums[first] + centred[first]) / _HISTORY
        square = (squares[last] - squares[first] + centred[first] ** 2) / _HISTORY
        spread = np.sqrt(np.maximum(square - mean**2, 0))
        found[_HISTORY:] = (centred[_HISTORY:] - mean) / np.maximum(spread, 1e-3)
    return found


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield at most one suspicion, at the layer whose gradient has grown most."""
    logs, layers, sigmas = reading.memory["before"][reading.step]
    norm = float(reading.values["global_gradient_norm"][0])
    usual = float(np.exp(np.median(logs)))
    if norm <= _TIMES * usual:
        return
    now, before = reading.values["layer_gradient_norm"], np.median(layers, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        grown = np.nan_to_num(now / before, posinf=0.0)
    grown[~(now > _PART * norm)] = 0.0  # from nothing to next to nothing is a large factor, too
    layer = reading.layers.names[int(np.argmax(grown))]
    yield Suspicion(
        "warning",
        layer,
        f"the gradient norm is {norm:.2g}, {norm / usual:.3g} times its median over the last "
        f"{_HISTORY} readings and {sigmas:.1f}σ above their mean in logarithm; most of all at "
        f"{layer}, {grown.max():.3g} times",
        f"clip_grad_norm_ at {2 * usual:.2g}; look at the batch of this step; a longer "
        "warm-up; a smaller β2 in Adam",
    )


DIAGNOSIS = Diagnosis(
    name="spike",
    reads=("global_gradient_norm", "layer_gradient_norm"),
    examine=examine,
    screen=screen,
    threshold="the logarithm of the gradient norm is 6σ above its mean over 128 readings, and the norm "
    "4 times its median",
    source="OLMo-core: 6σ over 128 steps; the factor is added",
)
