"""Validation loss, as handed to ``monitor.log_loss(val=...)``."""

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="loss_val",
    title="validation loss",
    unit="loss",
    axis="run",
    at="host",
)
