"""Weight-gradient norm of every parameter: ‖∂L/∂θ_p‖₂.

Read where the gradient is final: summed over micro-batches and ranks, unscaled, before clipping.
A parameter without a gradient counts as 0. Elements below about 1e-22 are lost in float32 squares.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchbp.monitor._quantity import Quantity, precise

__all__ = ["QUANTITY"]


def measure(gradients: list[Tensor]) -> Tensor:
    """Return the squared norms, in float32: half precision would overflow at 65504."""
    dtypes = {g.dtype for g in gradients}
    wide = torch.float64 if dtypes & {torch.float64, torch.complex128} else torch.float32
    norms = torch._foreach_norm(gradients, 2, dtype=wide)  # noqa: SLF001  # nothing public is as fast
    return torch.stack(list(norms)).to(precise(gradients[0])).square()


def finish(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """‖g‖ = √Σ g²."""
    return np.sqrt(squares)


QUANTITY = Quantity(
    name="gradient_norm",
    title="weight-gradient norm, per parameter",
    unit="loss / weight",
    axis="parameter",
    at="gradient",
    measure=measure,
    finish=finish,
    logarithm=True,
)
