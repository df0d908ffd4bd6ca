"""Mean of every layer's output: Σ z / n."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchbp.monitor._bundle import Bundle
from torchbp.monitor._packing import Table
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]


def measure(bundle: Bundle | Table) -> Tensor | NDArray[np.float64]:
    """Sum each, in float32 at least."""
    if isinstance(bundle, Table):
        return bundle.sums(bundle.values.astype(np.float64))
    wide = [torch.promote_types(t.dtype, torch.float32) for t in bundle.tensors]
    return torch.stack([t.sum(dtype=w) for t, w in zip(bundle.tensors, wide, strict=True)])


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
