"""Training loss, as handed to ``monitor.log_loss(train=...)``."""

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="loss_train",
    title="training loss",
    unit="loss",
    axis="run",
    at="host",
)
