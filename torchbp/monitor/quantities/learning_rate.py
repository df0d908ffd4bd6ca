"""Learning rate of every parameter group, at the step."""

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity("learning_rate", "learning rate, per group", "1", "group", "host")
