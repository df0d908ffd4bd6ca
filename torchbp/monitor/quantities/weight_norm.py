"""Norm of every parameter before the update: ‖θ_p‖₂."""

from torchbp.monitor._norms import norms, root
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="weight_norm",
    title="weight norm, per parameter",
    unit="weight",
    axis="parameter",
    at="weight",
    measure=norms,
    finish=root,
    power=2,
)
