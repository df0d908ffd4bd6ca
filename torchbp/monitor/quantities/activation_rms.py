"""Root mean square of every layer's output: √(Σ z² / n)."""

from torchbp.monitor._norms import norms, root_mean
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="activation_rms",
    title="RMS of the output, per layer",
    unit="output",
    axis="layer",
    at="output",
    measure=norms,
    finish=root_mean,
    power=2,
    logarithm=True,
    often="rarely",
)
