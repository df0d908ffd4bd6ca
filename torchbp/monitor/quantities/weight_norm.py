"""Norm of every parameter before the update: ‖θ_p‖₂."""

from torchbp.monitor._norms import root, squares
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="weight_norm",
    title="weight norm, per parameter",
    unit="weight",
    axis="parameter",
    at="weight",
    measure=squares,
    finish=root,
)
