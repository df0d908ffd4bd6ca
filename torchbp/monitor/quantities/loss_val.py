"""Validation loss, as handed to ``monitor.log_loss(val=...)``."""

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity("loss_val", "validation loss", "loss", "run", "host")
