"""Mean of every layer's output: Σ z / n."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]


def measure(output: Tensor) -> Tensor:
    """Sum, in float32 at least."""
    return output.sum(dtype=torch.promote_types(output.dtype, torch.float32))


def finish(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide by the number of elements."""
    return sums / np.maximum(counts, 1)


QUANTITY = Quantity(
    name="activation_mean",
    title="mean of the output, per layer",
    unit="output",
    axis="layer",
    at="output",
    measure=measure,
    finish=finish,
    often="rarely",
)
