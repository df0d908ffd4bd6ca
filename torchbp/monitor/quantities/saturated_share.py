"""Share of a layer's activations where the slope of sigmoid or tanh is below 6 % of its largest.

For tanh 1 − y² < 0.06, that is |y| > 0.97; for sigmoid 4 y (1 − y) < 0.06, y outside (0.0152, 0.985).
The activation is the one behind the layer, as a module or as a function.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

_SLOPE = 0.06


def measure(outputs: Tensor, function: str) -> Tensor | None:
    """Count the saturated elements of each of n outputs of ``function``: ``(n,)``."""
    if function == "tanh":
        flat = 1 - outputs.square() < _SLOPE
    elif function == "sigmoid":
        flat = 4 * outputs * (1 - outputs) < _SLOPE
    else:
        return None
    return flat.flatten(1).sum(1, dtype=torch.float32)


def finish(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide by the number of elements."""
    return sums / np.maximum(counts, 1)


QUANTITY = Quantity(
    name="saturated_share",
    title="share of saturated activations behind a sigmoid or tanh, per layer",
    unit="1",
    axis="layer",
    at="activation",
    measure=measure,
    finish=finish,
)
