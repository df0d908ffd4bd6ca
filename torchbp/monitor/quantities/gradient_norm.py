"""Weight-gradient norm of every parameter: ‖∂L/∂θ_p‖₂.

Read where the gradient is final: summed over micro-batches and ranks, unscaled, before clipping.
A parameter without a gradient counts as 0.
"""

from torchbp.monitor._norms import norms, root
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="gradient_norm",
    title="weight-gradient norm, per parameter",
    unit="loss / weight",
    axis="parameter",
    at="gradient",
    measure=norms,
    finish=root,
    power=2,
    logarithm=True,
    often="every step",
)
