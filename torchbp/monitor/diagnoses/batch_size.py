"""Batch size: advice, where the gradient noise scale is far from the batch in use."""

from collections.abc import Iterator

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion

__all__ = ["DIAGNOSIS"]

_FAR = 4.0


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield at most one suspicion, for the run."""
    values = reading.values
    batch = float((values["batch"] * values["backwards"] * values.get("ranks", 1.0))[0])
    value, low, high = values["noise_scale"]
    if low > _FAR * batch:
        factor, effect = (
            min(low / batch, 16.0),
            "fewer steps for the same samples' worth of progress",
        )
    elif high < batch / _FAR:
        factor, effect = max(high / batch, 1 / 16), "the same progress from fewer samples"
    else:
        return
    yield Suspicion(
        "info",
        "",
        f"the gradient noise scale is {value:.3g} samples ({low:.3g} to {high:.3g}), the batch {batch:g}",
        f"a batch {factor:.2g} times as large, the learning rate with it: {effect}",
    )


DIAGNOSIS = Diagnosis(
    name="batch_size",
    reads=("noise_scale", "batch", "backwards"),
    examine=examine,
    threshold="the 90 % interval of the noise scale lies beyond 4 times the batch, or below a quarter, "
    "in 10 readings",
    source="McCandlish et al. 2018, arXiv:1812.06162",
    begins=10,
    ends=5,
)
