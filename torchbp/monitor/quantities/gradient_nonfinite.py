"""Number of elements of every parameter's gradient that are NaN or inf."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchbp.monitor._bundle import Bundle
from torchbp.monitor._packing import Table
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]


def measure(bundle: Bundle | Table) -> Tensor | NDArray[np.float64]:
    """Count them."""
    if isinstance(bundle, Table):
        return bundle.sums(1.0 - np.isfinite(bundle.values))
    return torch.stack([g.numel() - torch.isfinite(g).sum() for g in bundle.tensors])


def finish(sums: NDArray[np.float64], _: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the number."""
    return sums


QUANTITY = Quantity(
    name="gradient_nonfinite",
    title="NaN and inf in the gradient, per parameter",
    unit="elements",
    axis="parameter",
    at="gradient",
    measure=measure,
    finish=finish,
    often="rarely",
)
