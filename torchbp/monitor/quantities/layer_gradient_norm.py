"""Weight-gradient norm of every layer: ‖g_l‖ = √Σ_p ‖∂L/∂θ_p‖², over the layer's own parameters."""

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Reading
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]


def finish(reading: Reading) -> NDArray[np.float64] | None:
    """Sum the squares of the parameters by layer."""
    norms = reading.values.get("gradient_norm")
    if norms is None:
        return None
    count = len(reading.layers.names)
    return np.sqrt(np.bincount(reading.layers.owner, np.square(norms), count))


QUANTITY = Quantity(
    name="layer_gradient_norm",
    title="weight-gradient norm, per layer",
    unit="loss / weight",
    axis="layer",
    at="derived",
    finish=finish,
    logarithm=True,
)
