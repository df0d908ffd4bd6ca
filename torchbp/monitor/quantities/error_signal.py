"""Error signal of every layer: e_l = RMS(∂L/∂z_l) · B, z_l the layer's output, B the batch size.

Under a loss that is a mean over the batch ∂L/∂z falls as 1/B; times B it does not. A layer that
runs several times in a step counts with all its outputs together.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchbp.monitor._quantity import Quantity, precise

__all__ = ["QUANTITY"]


def measure(delta: Tensor) -> Tensor:
    """Return Σ δ², for δ = ∂L/∂z · B. In double: deep down a vanished δ² is 0 in float32."""
    return torch.linalg.vector_norm(delta, dtype=precise(delta)).square()


def finish(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """RMS = √(Σ δ² / n)."""
    return np.sqrt(sums / np.maximum(counts, 1))


QUANTITY = Quantity(
    name="error_signal",
    title="error signal RMS(∂L/∂output)·batch, per layer",
    unit="loss / output",
    axis="layer",
    at="error",
    measure=measure,
    finish=finish,
    logarithm=True,
)
