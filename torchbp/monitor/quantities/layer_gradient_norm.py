"""Weight-gradient norm of every layer: ‖g_l‖ = √Σ_p ‖∂L/∂θ_p‖², over the layer's own parameters."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Layers
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]


def finish(values: Mapping[str, NDArray[np.float64]], layers: Layers) -> NDArray[np.float64] | None:
    """Sum the squares of the parameters by layer."""
    norms = values.get("gradient_norm")
    if norms is None:
        return None
    owners, starts = np.unique(layers.owner, return_index=True)  # sorted, as parameters are
    found = np.zeros((len(norms), len(layers.names)))
    found[:, owners] = np.sqrt(np.add.reduceat(np.square(norms), starts, axis=1))
    return found


QUANTITY = Quantity(
    name="layer_gradient_norm",
    title="weight-gradient norm, per layer",
    unit="loss / weight",
    axis="layer",
    at="derived",
    finish=finish,
    logarithm=True,
)
