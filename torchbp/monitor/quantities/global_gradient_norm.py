"""Weight-gradient norm of the model: ‖g‖ = √Σ_p ‖∂L/∂θ_p‖², what ``clip_grad_norm_`` returns."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Layers
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]


def finish(values: Mapping[str, NDArray[np.float64]], _: Layers) -> NDArray[np.float64] | None:
    """Sum the squares of all parameters."""
    norms = values.get("gradient_norm")
    return None if norms is None else np.sqrt(np.square(norms).sum(1, keepdims=True))


QUANTITY = Quantity(
    name="global_gradient_norm",
    title="weight-gradient norm of the model, before clipping",
    unit="loss / weight",
    axis="run",
    at="derived",
    finish=finish,
    logarithm=True,
)
