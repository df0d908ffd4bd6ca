"""Weight-gradient norm of every parameter as the optimizer sees it, after clipping: ‖g_p‖₂."""

from torchbp.monitor._norms import norms, root
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

QUANTITY = Quantity(
    name="stepped_gradient_norm",
    title="weight-gradient norm after clipping, per parameter",
    unit="loss / weight",
    axis="parameter",
    at="stepped",
    measure=norms,
    finish=root,
    power=2,
    logarithm=True,
)
