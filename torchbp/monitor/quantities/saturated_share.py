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


def measure(output: Tensor, function: str) -> Tensor | None:
    """Count the saturated elements of the output of ``function``."""
    if function == "tanh":
        return (1 - output.square() < _SLOPE).sum(dtype=torch.float32)
    if function == "sigmoid":
        return (4 * output * (1 - output) < _SLOPE).sum(dtype=torch.float32)
    return None


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
