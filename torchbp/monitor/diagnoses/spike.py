"""Spikes: a gradient norm far outside of what the last 128 readings had.

At a step whose gradients are not read the training loss stands for them, where it is logged.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion

__all__ = ["DIAGNOSIS"]

_HISTORY, _SIGMAS, _TIMES = 128, 6.0, 4.0
_PART = 0.1  # of the gradient's norm, which a layer has that is named


def screen(readings: Sequence[Reading]) -> NDArray[np.bool_]:
    """Return which steps stand out; note them all, and what the 128 before each that does had."""
    readings[0].memory["before"] = {}
    read = np.array(["global_gradient_norm" in r.values for r in readings])
    suspect = _losses(readings)
    if read.any():
        suspect[read] |= _norms([r for r, there in zip(readings, read, strict=True) if there])
    return suspect


def _norms(readings: Sequence[Reading]) -> NDArray[np.bool_]:
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
    suspect = np.zeros(len(readings), bool)
    new = np.flatnonzero(counted)
    for k, sigmas in _outside(logs, len(new)):
        end = len(logs) - len(new) + k
        before = logs[end - _HISTORY : end], layers[end - _HISTORY : end], sigmas
        memory["before"][readings[new[k]].step] = before
        suspect[new[k]] = True
    return suspect


def _losses(readings: Sequence[Reading]) -> NDArray[np.bool_]:
    """The same of losses; where the gradients were read, these decide."""
    memory = readings[0].memory
    found: list[tuple[int, int, float]] = []  # of which reading, at which step
    for k, reading in enumerate(readings):
        own = [(reading.step, float(loss)) for loss in reading.values.get("loss_train", ())]
        losses = (*reading.between, *own)
        found += [(k, step, loss) for step, loss in losses if 0 < loss < np.inf]
    logs = np.concatenate((memory.get("losses", []), np.log([loss for _, _, loss in found])))
    memory["losses"], memory["high"] = logs[-_HISTORY:], {}
    suspect = np.zeros(len(readings), bool)
    for k, sigmas in _outside(logs, len(found)):
        place, step, loss = found[k]
        end = len(logs) - len(found) + k
        at = readings[place]
        usual = float(np.exp(np.median(logs[end - _HISTORY : end])))
        is_read = step == at.step and "global_gradient_norm" in at.values
        if not is_read and loss > _TIMES * usual:
            memory["high"].setdefault(at.step, (step, loss, usual, sigmas))
            suspect[place] = True
    return suspect


def _outside(logs: NDArray[np.float64], new: int) -> Iterator[tuple[int, float]]:
    """Yield which of the last ``new`` stand out, and by how many σ."""
    sigmas = _sigmas(logs)[len(logs) - new :]
    for k in np.flatnonzero(sigmas > _SIGMAS):
        yield int(k), float(sigmas[k])


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
    memory, step = reading.memory, reading.step
    if step in memory["before"]:
        yield from _of_gradient(reading, *memory["before"][step])
    elif step in memory["high"]:
        when, loss, usual, sigmas = memory["high"][step]
        yield Suspicion(
            "warning",
            "",
            f"the training loss of step {when}, whose gradients were not read, is {loss:.2g}, "
            f"{loss / usual:.3g} times its median over the last {_HISTORY} and {sigmas:.1f}σ "
            "above their mean in logarithm",
            "look at the batch of this step; clip_grad_norm_; a longer warm-up; a smaller β2 in Adam",
        )


def _of_gradient(
    reading: Reading, logs: NDArray[np.float64], layers: NDArray[np.float64], sigmas: float
) -> Iterator[Suspicion]:
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
    reads=(),
    examine=examine,
    screen=screen,
    threshold="the logarithm of the gradient norm is 6σ above its mean over 128 readings, and the norm "
    "4 times its median; the same of the training loss at steps whose gradients are not read",
    source="OLMo-core: 6σ over 128 steps; the factor is added",
)
