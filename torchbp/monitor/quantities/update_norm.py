"""Norm of what a step adds to every parameter: ‖Δθ_p‖₂, Δθ = θ after − θ before."""

from torchbp.monitor._norms import norms, root
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="update_norm",
    title="update norm, per parameter",
    unit="weight",
    axis="parameter",
    at="update",
    measure=norms,
    finish=root,
    power=2,
    logarithm=True,
)
