"""Share of a layer's units that were never positive behind a ReLU, over at least 1024 samples.

A unit is a channel of images, otherwise a feature of the last dimension; a sample is one value of a
unit. The units that have been seen alive are remembered on the device until there are samples
enough and ten sampled steps; then the share is told and the count starts anew.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]


def measure(outputs: Tensor, function: str) -> Tensor | None:
    """Return bool ``(n, units)``: whether a unit is alive in each of n outputs of ``function``."""
    if function != "relu" or outputs.ndim < 3:
        return None
    units = 2 if outputs.ndim > 4 else outputs.ndim - 1
    samples = [d for d in range(1, outputs.ndim) if d != units]
    return ~(outputs.amax(samples) <= 0)  # NaN counts as alive: it is another trouble


def finish(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide the number of dead units by the number of units."""
    return sums / np.maximum(counts, 1)


QUANTITY = Quantity(
    name="dead_share",
    title="share of dead units behind a ReLU, per layer",
    unit="1",
    axis="layer",
    at="units",
    measure=measure,
    finish=finish,
)
