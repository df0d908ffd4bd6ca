"""Share of every parameter's gradient that is exactly 0: #{g = 0} / n."""

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
        return bundle.sums(np.equal(bundle.values, 0).astype(np.float64))
    return torch.stack([(g == 0).sum() for g in bundle.tensors])


def finish(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide by the number of elements."""
    return sums / np.maximum(counts, 1)


QUANTITY = Quantity(
    name="gradient_zeros",
    title="share of zeros in the gradient, per parameter",
    unit="1",
    axis="parameter",
    at="gradient",
    measure=measure,
    finish=finish,
    often="rarely",
)
