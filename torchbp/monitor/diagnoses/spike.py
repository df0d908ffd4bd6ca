"""Spikes: a gradient norm far outside of what the last 128 steps had."""

from collections import deque
from collections.abc import Iterator

import numpy as np

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion

__all__ = ["DIAGNOSIS"]

_HISTORY, _SIGMAS, _TIMES = 128, 6.0, 4.0


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield at most one suspicion, at the layer whose gradient has grown most."""
    norm = float(reading.values["global_gradient_norm"][0])
    layers = reading.values["layer_gradient_norm"]
    recent = reading.memory.setdefault("recent", deque(maxlen=_HISTORY))
    if not np.isfinite(norm) or norm <= 0:
        return
    if len(recent) == _HISTORY and recent[0][1].shape == layers.shape:
        logs = np.log([n for n, _ in recent])
        usual, spread = float(np.exp(np.median(logs))), float(logs.std())
        sigmas = (np.log(norm) - logs.mean()) / max(spread, 1e-3)
        if sigmas > _SIGMAS and norm > _TIMES * usual:
            before = np.median([by_layer for _, by_layer in recent], axis=0)
            with np.errstate(divide="ignore", invalid="ignore"):
                grown = np.nan_to_num(layers / before, posinf=0.0)
            layer = reading.layers.names[int(np.argmax(grown))]
            yield Suspicion(
                "warning",
                layer,
                f"the gradient norm is {norm:.2g}, {norm / usual:.1f} times its median over the last "
                f"{_HISTORY} steps and {sigmas:.1f}σ above their mean in logarithm; most of all at "
                f"{layer}, {grown.max():.1f} times",
                f"clip_grad_norm_ at {2 * usual:.2g}; look at the batch of this step; a longer "
                "warm-up; a smaller β2 in Adam",
            )
    recent.append((norm, layers))


DIAGNOSIS = Diagnosis(
    name="spike",
    reads=("global_gradient_norm", "layer_gradient_norm"),
    examine=examine,
    threshold="the logarithm of the gradient norm is 6σ above its mean over 128 steps, and the norm "
    "4 times its median",
    source="OLMo-core: 6σ over 128 steps; the factor is added",
)
