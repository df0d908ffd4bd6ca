"""Number of backward passes before the step whose gradients were not finite: a GradScaler skipped them."""

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="skipped",
    title="skipped steps",
    unit="1",
    axis="run",
    at="host",
)
