"""Updates too large: a step changes the weights by more than a tenth of themselves.

The first steps of a healthy run may come near: initial weights are small, and Adam's first steps have
full length. Measured there: at most 0.2 for healthy runs, 0.7 and more in two steps for sick ones.
"""

from collections.abc import Iterator

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion
from torchbp.monitor._updates import updates

__all__ = ["DIAGNOSIS"]

_WARN, _ALERT, _CLEAR, _GOOD = -1.0, -0.5, -1.3, -3.0


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield at most one suspicion, at the weight that changes most."""
    found = updates(reading)
    if found is None or found.exponent < _CLEAR:
        return
    factor = max(10 ** (_GOOD - found.exponent), 0.01)
    yield Suspicion(
        "alert" if found.exponent > _ALERT else "warning" if found.exponent > _WARN else None,
        found.layer,
        f"a step changes the weights by {10**found.exponent:.1%} of their norm (median), at "
        f"{found.layer} by {found.largest:.1%}",
        f"the learning rate times {factor:.2g}; a warm-up; clip_grad_norm_",
    )


DIAGNOSIS = Diagnosis(
    name="update_too_large",
    reads=("update_ratio", "weight_norm"),
    examine=examine,
    threshold="‖ΔW‖ / ‖W‖ above 0.1 (alert: 0.3), the median over the weights, in 10 readings "
    "(alert: 2)",
    source="about 1e-3 is usual (Stanford CS231n, notes on neural networks 3); the bound chosen so "
    "as to separate sick networks from healthy ones",
    begins=10,
    begins_alert=2,
    ends=5,
)
