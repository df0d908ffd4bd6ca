"""Batch size of a backward: the length of the first tensor that the model is called with.

The length of its second dimension, where that is the batch of a layer that knows which of its input's is
(``batch_first``: recurrent, attention). Absent where a compiled model has a layer with the sequence first.
"""

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="batch",
    title="batch size of a backward",
    unit="samples",
    axis="run",
    at="host",
)
