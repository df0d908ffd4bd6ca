"""Disconnected layers: no gradient at all reaches a layer's parameters, or no optimizer, while others have theirs.

A layer that doesn't run may have its turn later, as an expert of a mixture or the head of another task has: it
counts where it has never had a gradient, after 100 readings. One that is frozen is meant to have none.
A layer whose gradient no optimizer takes was made after the optimizer, or forgotten in its groups. One that is
stepped by another optimizer, which the monitor was not given, changes, and is left in peace.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion

__all__ = ["DIAGNOSIS"]

_BEGINS, _IDLE = 20, 100


def screen(readings: Sequence[Reading]) -> NDArray[np.bool_]:
    """Return where a norm is 0, or error signals are to be remembered; note who had a gradient."""
    norms = np.stack([r.values["layer_gradient_norm"] for r in readings])
    memory, there = readings[0].memory, norms != 0
    memory["had"] = memory.get("had", False) | there.any(0)
    return ~there.all(1) | np.array(
        [bool(r.unowned) or "error_signal" in r.values for r in readings]
    )


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield one suspicion a layer."""
    yield from _unowned(reading)
    memory, norms = reading.memory, reading.values["layer_gradient_norm"]
    signals = reading.values.get("error_signal")
    if signals is not None:
        memory["signals"], memory["ran"] = np.nan_to_num(signals), reading.ran
    known, ran = memory.get("signals"), memory.get("ran")
    if norms.all() or not norms.any() or known is None or known.shape != norms.shape:
        return
    idle = memory.setdefault("idle", np.zeros(len(norms), int))
    owners = np.unique(reading.layers.owner)
    # A signal that arrives but is lost in the squares of a norm has vanished: not this trouble.
    for index in owners[(norms[owners] == 0) & (known[owners] == 0)]:
        if index in reading.frozen:
            continue
        layer = reading.layers.names[index]
        said = f"the gradient of every parameter of {layer} is None or exactly 0"
        if ran is not None and index not in ran:
            idle[index] += 1
            if memory["had"][index] or idle[index] <= _IDLE - _BEGINS:
                continue
            said += f", and {layer} has not run"
        yield Suspicion(
            "warning",
            layer,
            said,
            "see that its output reaches the loss, through no detach(), no .data, no argmax and no "
            "dead ReLU layer; set requires_grad=False where it is meant",
            key=layer,
        )


def _unowned(reading: Reading) -> Iterator[Suspicion]:
    norms = reading.values["layer_gradient_norm"]
    for index in sorted(reading.unowned):
        if norms[index] > 0:
            layer = reading.layers.names[index]
            yield Suspicion(
                "warning",
                layer,
                f"{layer} receives a gradient, but no optimizer has its parameters, and they have "
                "not changed",
                "give its parameters to the optimizer, which may have been made before the layer; "
                "set requires_grad=False where it is meant, which saves its backward",
                key=layer,
            )


DIAGNOSIS = Diagnosis(
    name="disconnected",
    reads=("layer_gradient_norm",),
    examine=examine,
    screen=screen,
    threshold="the gradient of all parameters of a layer is None or exactly 0, in 20 readings (100 "
    "where it does not run), or no optimizer has them and nobody changes them",
    source="the chain rule: what the loss depends on has a gradient; what is to learn has an optimizer",
    begins=_BEGINS,
    ends=1,
)
