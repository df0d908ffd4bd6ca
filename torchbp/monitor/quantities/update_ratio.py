"""Update-to-weight ratio of every parameter: ‖Δθ_p‖ / ‖θ_p‖; NaN where the parameter is 0."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Layers
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]


def finish(values: Mapping[str, NDArray[np.float64]], _: Layers) -> NDArray[np.float64] | None:
    """Divide the norms."""
    update, weight = values.get("update_norm"), values.get("weight_norm")
    if update is None or weight is None:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(weight > 0, update / weight, np.nan)


QUANTITY = Quantity(
    name="update_ratio",
    title="update-to-weight ratio, per parameter",
    unit="1",
    axis="parameter",
    at="derived",
    finish=finish,
    logarithm=True,
)
