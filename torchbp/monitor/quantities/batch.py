"""Batch size of a backward: the length of the first tensor that the model is called with.

The length of its second dimension, where a layer with ``batch_first=False`` (recurrent, attention) is called
with a batch of so many. Absent where a compiled model has such a layer.
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
