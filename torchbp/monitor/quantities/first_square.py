"""Squared gradient norm after the first of a step's micro-batches; what the noise scale is made of."""

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="first_square",
    title="squared gradient norm of the first micro-batch",
    unit="(loss / weight)²",
    axis="run",
    at="host",
    logarithm=True,
)
