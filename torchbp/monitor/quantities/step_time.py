"""Wall time from the end of the step before to the end of this one, in milliseconds."""

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="step_time",
    title="time of a step",
    unit="ms",
    axis="run",
    at="host",
)
