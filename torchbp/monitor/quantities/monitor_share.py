"""The monitor's own share of a step's wall time, on the host, since the reading before."""

from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="monitor_share",
    title="the monitor's share of the time",
    unit="1",
    axis="run",
    at="host",
)
