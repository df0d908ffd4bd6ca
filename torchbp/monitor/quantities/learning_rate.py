"""Learning rate of every parameter group, at the step."""

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="learning_rate",
    title="learning rate, per group",
    unit="1",
    axis="group",
    at="host",
)
