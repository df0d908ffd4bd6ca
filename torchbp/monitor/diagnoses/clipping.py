"""Clipping as a rule: most steps are clipped, so that their length says nothing any more."""

from collections import deque
from collections.abc import Iterator

import numpy as np

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion

__all__ = ["DIAGNOSIS"]

_WARN, _CLEAR = 0.5, 0.4
_WARM_UP, _HISTORY = 10, 20


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield at most one suspicion, for the run."""
    memory = reading.memory
    seen = memory["seen"] = memory.get("seen", 0) + 1
    recent = memory.setdefault("recent", deque(maxlen=_HISTORY))
    if seen > _WARM_UP:
        recent.append(
            (
                float(reading.values["clip_coefficient"][0]),
                float(reading.values["global_gradient_norm"][0]),
            )
        )
    if len(recent) < _HISTORY:
        return
    coefficients, norms = np.array(recent).T
    share = float((coefficients < 0.999).mean())
    if share > _CLEAR:
        value = float(np.median(coefficients * norms))
        yield Suspicion(
            "warning" if share > _WARN else None,
            "",
            f"{share:.0%} of the last {_HISTORY} sampled steps were clipped, the median by a factor "
            f"{np.median(coefficients):.2g}, to a norm of {value:.2g}",
            f"a clip value near {np.quantile(norms, 0.9):.2g}, the norm that 9 of 10 steps stay "
            "below; or a smaller learning rate without clipping",
        )


DIAGNOSIS = Diagnosis(
    name="clipping",
    reads=("clip_coefficient", "global_gradient_norm"),
    examine=examine,
    threshold="more than half of the sampled steps are clipped, after the first 10",
    source="chosen: clipping is meant for the exception",
    ends=3,
)
