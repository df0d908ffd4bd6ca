"""Error signal of every layer: e_l = RMS(∂L/∂z_l) · B, z_l the layer's output, B the batch size.

Under a loss that is a mean over the batch ∂L/∂z falls as 1/B; times B it does not. A layer that
runs several times in a step counts with all its outputs together.
"""

from torchbp.monitor._norms import norms, root_mean
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="error_signal",
    title="error signal RMS(∂L/∂output)·batch, per layer",
    unit="loss / output",
    axis="layer",
    at="error",
    measure=norms,
    finish=root_mean,
    power=2,
    logarithm=True,
)
