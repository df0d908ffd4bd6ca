"""The update-to-weight ratio of a model, as update_too_small and update_too_large read it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Layers, Reading

__all__ = ["Updates", "updates"]


@dataclass(frozen=True)
class Updates:
    """The weights whose ratio means what it says.

    That leaves out biases and scales, weights that began at 0, tables of which a step touches few
    rows, and weights before a normalization, whose size has no effect.

    Attributes:
        exponent: The median of log10 ‖ΔW‖ / ‖W‖.
        largest: The largest ‖ΔW‖ / ‖W‖.
        layer: The layer that has it.
    """

    exponent: float
    largest: float
    layer: str


def updates(reading: Reading) -> Updates | None:
    """Return the ratios; None where there are none to judge."""
    if "updates" not in reading.shared:
        reading.shared["updates"] = _found(reading)
    return reading.shared["updates"]


def _found(reading: Reading) -> Updates | None:
    layers, ratios = reading.layers, reading.values["update_ratio"]
    first = reading.memory.setdefault("first", reading.values["weight_norm"])
    if first.shape != ratios.shape:
        return None
    if "judged" not in reading.memory:
        reading.memory["judged"] = _judged(layers) & (first > 0)
    usable = reading.memory["judged"] & np.isfinite(ratios) & (ratios > 0)
    if not usable.any():
        return None
    chosen = np.flatnonzero(usable)[np.argsort(ratios[usable])]
    middle = ratios[chosen[[(len(chosen) - 1) // 2, len(chosen) // 2]]]
    worst = int(chosen[-1])
    layer = layers.names[layers.owner[worst]]
    return Updates(float(np.log10(middle).mean()), float(ratios[worst]), layer)


def _judged(layers: Layers) -> NDArray[np.bool_]:
    """Return bool ``(P,)``: weights that are no table and stand before no normalization."""
    kinds = np.array(layers.kinds)
    norms = np.char.find(kinds, "Norm") >= 0
    free = np.append(~norms[1:], True) & (np.char.find(kinds, "Embedding") < 0)
    return layers.matrices & free[layers.owner]
