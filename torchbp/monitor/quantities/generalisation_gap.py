"""Generalisation gap: (validation loss − training loss) / |training loss|.

The training loss is the mean over the steps since the validation before.
"""

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Reading
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]


def finish(reading: Reading) -> NDArray[np.float64] | None:
    """Average the training loss from one validation to the next."""
    train, val = reading.values.get("loss_train"), reading.values.get("loss_val")
    losses = reading.memory.setdefault("train", [])
    losses.extend(loss for _, loss in reading.between)
    if train is not None:
        losses.append(float(train[0]))
    if val is None or not losses:
        return None
    mean = float(np.mean(losses))
    losses.clear()
    return (val - mean) / abs(mean) if mean else None


QUANTITY = Quantity(
    name="generalisation_gap",
    title="(val − train) / train",
    unit="1",
    axis="run",
    at="derived",
    finish=finish,
    looks_back=True,
)
