"""Updates too large: a step changes the weights by more than a tenth of themselves.

The first steps of a healthy run may do so: initial weights are small, and Adam's and Adagrad's first steps have
full length. Of a sick one's the loss rises; an alert in two readings takes that, where the loss is logged.
"""

from collections.abc import Iterator

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion
from torchbp.monitor._updates import updates

__all__ = ["DIAGNOSIS"]

_WARN, _ALERT, _CLEAR, _GOOD = -1.0, -0.5, -1.3, -3.0
_RISE = 0.1


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield at most one suspicion, at the weight that changes most."""
    found, risen = updates(reading), _has_risen(reading)
    if found is None or found.exponent < _CLEAR:
        return
    grave = found.exponent > _ALERT and risen
    factor = max(10 ** (_GOOD - found.exponent), 0.01)
    yield Suspicion(
        "alert" if grave else "warning" if found.exponent > _WARN else None,
        found.layer,
        f"a step changes the weights by {10**found.exponent:.1%} of their norm (median), at "
        f"{found.layer} by {found.largest:.1%}",
        f"the learning rate times {factor:.2g}; a warm-up; clip_grad_norm_",
    )


def _has_risen(reading: Reading) -> bool:
    """Whether the training loss has been well above its first; also where no two of them are known."""
    losses = [loss for _, loss in reading.between] + list(reading.values.get("loss_train", ()))
    known = [*reading.memory.get("losses", ()), *losses]  # the first, the highest since, more
    reading.memory["losses"] = known = [*known[:1], max(known[1:])] if len(known) > 1 else known
    return len(known) < 2 or not known[1] <= known[0] + _RISE * abs(known[0])


DIAGNOSIS = Diagnosis(
    name="update_too_large",
    reads=("update_ratio", "weight_norm"),
    examine=examine,
    threshold="‖ΔW‖ / ‖W‖ above 0.1 (alert: 0.3), the median over the weights, in 10 readings "
    "(alert: 2, where the loss has risen by a tenth or is not logged)",
    source="about 1e-3 is usual (Stanford CS231n, notes on neural networks 3); the bound chosen so "
    "as to separate sick networks from healthy ones",
    begins=10,
    begins_alert=2,
    ends=5,
)
