"""Clipping as a rule: most steps are clipped, so that their length says nothing any more.

Many a good run has this with a clip value of 1, and Adam divides a constant factor out: it is information, and a
warning only where the clip value is far below what the gradients are.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion

__all__ = ["DIAGNOSIS"]

_BEGIN, _CLEAR = 0.5, 0.4
_FAR = 0.05
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
        factor = float(np.median(coefficients))
        value = float(np.median(coefficients * norms))
        severity = "warning" if factor < _FAR else "info"
        yield Suspicion(
            severity if share > _BEGIN else None,
            "",
            f"{share:.0%} of the last {_HISTORY} sampled steps were clipped, the median by a factor "
            f"{factor:.2g}, to a norm of {value:.2g}",
            f"a clip value near {np.quantile(norms, 0.9):.2g}, the norm that 9 of 10 steps stay "
            "below; or a smaller learning rate without clipping",
        )


DIAGNOSIS = Diagnosis(
    name="clipping",
    reads=("clip_coefficient", "global_gradient_norm"),
    examine=examine,
    threshold="more than half of the sampled steps are clipped, after the first 10 (warning: the median to a "
    "twentieth of its length)",
    source="chosen: clipping is meant for the exception",
    ends=3,
)
