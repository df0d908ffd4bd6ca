"""Number of backward passes whose gradients were summed for the step."""

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="backwards",
    title="backward passes per step",
    unit="1",
    axis="run",
    at="host",
)
