"""Non-finite numbers: NaN or inf in a gradient or in the loss.

Backpropagation carries a NaN from where it arises to every layer before it, so the layer to look
at is the last, in the order in which layers run, whose gradient is not finite.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion

__all__ = ["DIAGNOSIS"]


def screen(readings: Sequence[Reading]) -> NDArray[np.bool_]:
    """Return where the model's norm or the loss is not finite."""
    norms = [r.values["global_gradient_norm"][0] for r in readings]
    losses = [r.values["loss_train"][0] if "loss_train" in r.values else 0.0 for r in readings]
    return ~(np.isfinite(norms) & np.isfinite(losses))


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield one suspicion, at the last layer whose gradient is not finite."""
    norms = reading.values["layer_gradient_norm"]
    loss = reading.values.get("loss_train")
    finite = np.isfinite(norms)
    lost = loss is not None and not np.isfinite(loss).all()
    if finite.all() and not lost:
        return
    bad = np.flatnonzero(~finite)
    layers = reading.layers
    with_parameters = np.unique(layers.owner)
    said = "the training loss is not finite" if loss is not None and lost else ""
    layer = ""
    if len(bad):
        every = len(bad) == len(with_parameters)
        layer = "" if every else layers.names[bad[-1]]
        kind = "NaN" if np.isnan(norms[bad]).any() else "inf"
        where = "every layer" if every else f"{len(bad)} of {len(with_parameters)} layers"
        said = f"{said}; " if said else ""
        said += f"the gradient is {kind} in {where}"
        said += (
            ": it comes from the loss or the forward pass"
            if every
            else f", and finite behind {layer}"
        )
    yield Suspicion(
        "alert",
        layer,
        said,
        "a smaller learning rate or a warm-up; clip_grad_norm_; an eps in divisions, logarithms "
        "and roots; torch.autograd.set_detect_anomaly(True) names the operation; in float16 a "
        "GradScaler, or bfloat16",
    )


DIAGNOSIS = Diagnosis(
    name="nonfinite",
    reads=("layer_gradient_norm", "global_gradient_norm"),
    examine=examine,
    screen=screen,
    threshold="every gradient and the loss are finite",
    source="IEEE 754: NaN and inf spread through every sum they enter",
    ends=10,
)
