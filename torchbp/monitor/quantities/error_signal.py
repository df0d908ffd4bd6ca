"""Error signal of every layer: e_l = RMS(∂L/∂z_l) · B, z_l the layer's output, B the batch size.

Under a loss that is a mean over the batch ∂L/∂z falls as 1/B; times B it does not. A layer that
runs several times in a step counts with all its outputs together.
"""

import torch
from torch import Tensor

from torchbp.monitor._norms import root_mean
from torchbp.monitor._quantity import Quantity, precise

__all__ = ["QUANTITY"]


def measure(delta: Tensor) -> Tensor:
    """Return √Σ δ². In double: deep down a vanished δ² is 0 in float32."""
    return torch.linalg.vector_norm(delta, dtype=precise(delta))


QUANTITY = Quantity(
    name="error_signal",
    title="error signal RMS(∂L/∂output)·batch, per layer",
    unit="loss / output",
    axis="layer",
    at="error",
    measure=measure,
    finish=root_mean,
    power=2,
    logarithm=True,
)
