"""Disconnected layers: no gradient at all reaches a layer's parameters, while others get theirs."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion

__all__ = ["DIAGNOSIS"]


def screen(readings: Sequence[Reading]) -> NDArray[np.bool_]:
    """Return where a norm is 0, or error signals are to be remembered."""
    zeros = ~np.stack([r.values["layer_gradient_norm"] for r in readings]).all(1)
    return zeros | np.array(["error_signal" in r.values for r in readings])


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield one suspicion a layer."""
    signals = reading.values.get("error_signal")
    if signals is not None:
        reading.memory["signals"] = np.nan_to_num(signals)
    norms = reading.values["layer_gradient_norm"]
    known = reading.memory.get("signals")
    if norms.all() or not norms.any() or known is None or known.shape != norms.shape:
        return
    owners = np.unique(reading.layers.owner)
    # A signal that arrives but is lost in the squares of a norm has vanished: not this trouble.
    for index in owners[(norms[owners] == 0) & (known[owners] == 0)]:
        if index in reading.frozen:
            continue
        layer = reading.layers.names[index]
        yield Suspicion(
            "warning",
            layer,
            f"the gradient of every parameter of {layer} is None or exactly 0",
            "see that its output reaches the loss, through no detach(), no .data, no argmax and no "
            "dead ReLU layer; set requires_grad=False where it is meant",
            key=layer,
        )


DIAGNOSIS = Diagnosis(
    name="disconnected",
    reads=("layer_gradient_norm",),
    examine=examine,
    screen=screen,
    threshold="the gradient of all parameters of a layer is None or exactly 0, in 20 readings",
    source="the chain rule: what the loss depends on has a gradient",
    begins=20,
    ends=1,
)
