"""Number of ranks whose batches make up a step, under DDP and FSDP2."""

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="ranks",
    title="ranks",
    unit="1",
    axis="run",
    at="host",
)
