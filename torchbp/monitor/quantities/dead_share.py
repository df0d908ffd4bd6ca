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


def measure(output: Tensor, function: str) -> Tensor | None:
    """Return bool ``(units,)``, whether a unit is alive in this output of ``function``."""
    if function != "relu" or output.ndim < 2:
        return None
    units = 1 if output.ndim > 3 else output.ndim - 1
    return (output > 0).movedim(units, 0).flatten(1).any(1)


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
