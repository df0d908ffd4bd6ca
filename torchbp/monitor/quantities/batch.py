"""Batch size of a backward: the length of the first tensor that the model is called with."""

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="batch",
    title="batch size of a backward",
    unit="samples",
    axis="run",
    at="host",
)
