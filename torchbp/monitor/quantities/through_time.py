"""Error signal through time: what comes back to a layer's first time steps, over what its last ones get.

r = max ‖δ_t‖ over the first tenth of the steps / max ‖δ_t‖ over the second half, δ_t the gradient of

- the input x_t of a recurrent module (``nn.RNN``, ``nn.LSTM``, ``nn.GRU``), which is the error of its gates
  at t times the input weights, W_ihᵀ; or of
- the output of a layer that runs once a time step, as cells unrolled by hand do (of ``nn.LSTMCell`` both
  outputs together).

Where the loss stands at the end of the sequence r is what the recurrence does to the signal on its way back.
Where there is a loss at every step, each has its own signal, and r is near 1. From 5 time steps on; NaN
for layers without any.
"""

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Reading
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]


def finish(reading: Reading) -> NDArray[np.float64] | None:
    """Divide, for every layer that has time steps."""
    if not reading.times:
        return None
    ratios = np.full(len(reading.layers.names), np.nan)
    for index, norms in reading.times.items():
        first = norms[: -(-len(norms) // 10)].max()
        later = norms[len(norms) // 2 :].max() or norms.max()  # padding at the end gets nothing
        ratios[index] = first / later if later else np.nan
    there = reading.present["through_time"] = np.zeros(len(ratios), bool)
    there[list(reading.times)] = True
    return ratios


QUANTITY = Quantity(
    name="through_time",
    title="error signal at the first time steps over that at the last, per layer",
    unit="1",
    axis="layer",
    at="derived",
    finish=finish,
    looks_back=True,
    logarithm=True,
)
