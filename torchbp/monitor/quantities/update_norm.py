"""Norm of what a step adds to every parameter: ‖Δθ_p‖₂, Δθ = θ after − θ before."""

from torchbp.monitor._norms import root, squares
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="update_norm",
    title="update norm, per parameter",
    unit="weight",
    axis="parameter",
    at="update",
    measure=squares,
    finish=root,
    logarithm=True,
)
