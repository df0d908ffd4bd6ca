"""Root mean square of every layer's output: √(Σ z² / n)."""

import torch
from torch import Tensor

from torchbp.monitor._norms import root_mean
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]


def measure(output: Tensor) -> Tensor:
    """Return √Σ z², in float32 at least."""
    return torch.linalg.vector_norm(output, dtype=torch.promote_types(output.dtype, torch.float32))


QUANTITY = Quantity(
    name="activation_rms",
    title="RMS of the output, per layer",
    unit="output",
    axis="layer",
    at="output",
    measure=measure,
    finish=root_mean,
    power=2,
    logarithm=True,
    often="rarely",
)
