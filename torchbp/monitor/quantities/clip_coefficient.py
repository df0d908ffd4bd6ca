"""Clip coefficient: ‖g‖ as the optimizer sees it / ‖g‖ before clipping; 1 without clipping."""

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Reading
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]


def finish(reading: Reading) -> NDArray[np.float64] | None:
    """Divide the norms over all parameters."""
    before = reading.values.get("gradient_norm")
    after = reading.values.get("stepped_gradient_norm")
    if before is None or after is None:
        return None
    whole = np.linalg.norm(before)
    if not np.isfinite(whole) or whole == 0:
        return None
    stepped = before[after > 0] if after.any() else before  # another optimizer may step the rest
    return np.array([float(np.linalg.norm(after) / np.linalg.norm(stepped))])


QUANTITY = Quantity(
    name="clip_coefficient",
    title="clip coefficient",
    unit="1",
    axis="run",
    at="derived",
    finish=finish,
    looks_back=True,
)
