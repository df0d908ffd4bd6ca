"""Updates too small: a step hardly changes the weights, and the loss stands still.

It is no trouble while the learning rate warms up or has been brought down, when the gradient has
faded because the model has learnt what it can, or while the loss falls all the same.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np

from torchbp.monitor._depth import profile
from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion
from torchbp.monitor._updates import updates

__all__ = ["DIAGNOSIS"]

_WARN, _CLEAR, _GOOD = -4.5, -4.2, -3.0
_HISTORY, _LOST = 10, 3e-3


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield at most one suspicion, for the run."""
    found = updates(reading)
    loss = reading.values.get("loss_train")
    if found is None or loss is None or not _at_full_strength(reading) or _is_cut_off(reading):
        return
    losses = reading.memory.setdefault("losses", deque(maxlen=_HISTORY))
    losses.append(float(loss[0]))
    if found.exponent > _CLEAR or not _is_flat(losses):
        return
    factor = min(10 ** (_GOOD - found.exponent), 10.0)
    yield Suspicion(
        "warning" if found.exponent < _WARN else None,
        "",
        f"a step changes the weights by {10**found.exponent:.1e} of their norm (median), and the "
        f"loss stands at {np.mean(losses):.3g}",
        f"the learning rate times {factor:.2g}",
    )


def _is_cut_off(reading: Reading) -> bool:
    """Whether the gradient vanishes on its way, which no learning rate mends."""
    depth = profile(reading) if "error_signal" in reading.values else None
    return depth is not None and depth.reached[0] < _LOST * depth.output


def _at_full_strength(reading: Reading) -> bool:
    """Whether neither the learning rate nor the gradient is far below what it has been."""
    memory = reading.memory
    rate = float(reading.values.get("learning_rate", np.ones(1)).max())
    gradient = float(reading.values["global_gradient_norm"][0])
    rising = rate > memory.get("rate", rate)
    memory["rate"] = rate
    memory["peak rate"] = max(rate, memory.get("peak rate", 0.0))
    memory["peak gradient"] = max(gradient, memory.get("peak gradient", 0.0))
    faded = gradient < 0.03 * memory["peak gradient"]
    return not rising and not faded and rate > 0.2 * memory["peak rate"]


def _is_flat(losses: "deque[float]") -> bool:
    if len(losses) < _HISTORY:
        return False
    half = _HISTORY // 2
    before, after = np.mean(list(losses)[:half]), np.mean(list(losses)[half:])
    return bool(before - after < 0.02 * abs(before))


DIAGNOSIS = Diagnosis(
    name="update_too_small",
    reads=("update_ratio", "weight_norm", "global_gradient_norm"),
    examine=examine,
    threshold="‖ΔW‖ / ‖W‖ below 3e-5, the median over the weights, while the loss falls by less than "
    "2 %, in 10 readings at full learning rate",
    source="about 1e-3 is usual (Stanford CS231n, notes on neural networks 3); the bound chosen so "
    "as to separate sick networks from healthy ones",
    begins=10,
    ends=3,
)
