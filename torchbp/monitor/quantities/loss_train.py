"""Training loss, as handed to ``monitor.log_loss(train=...)``."""

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity("loss_train", "training loss", "loss", "run", "host")
