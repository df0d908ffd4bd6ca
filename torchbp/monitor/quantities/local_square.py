"""Squared gradient norm of a rank alone, before DDP reduces it; the mean over ranks. For the noise scale."""

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="local_square",
    title="squared gradient norm of one rank",
    unit="(loss / weight)²",
    axis="run",
    at="host",
    logarithm=True,
)
