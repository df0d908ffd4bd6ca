"""Overfitting: the validation loss rises while it is already well above the training loss."""

from collections.abc import Iterator

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion

__all__ = ["DIAGNOSIS"]

_GAP, _RISES = 0.1, 3


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield at most one suspicion, for the run."""
    val = float(reading.values["loss_val"][0])
    gap = float(reading.values["generalisation_gap"][0])
    memory = reading.memory
    rises = memory.get("rises", 0) + 1 if val > memory.get("before", val) else 0
    best = min(val, memory.get("best", (val, 0))[0])
    memory.update(rises=rises, before=val)
    if val == best:
        memory["best"] = (val, reading.step)
    best, since = memory["best"]
    if gap <= _GAP or val <= 1.02 * best:
        return
    yield Suspicion(
        "warning" if rises >= _RISES else None,
        "",
        f"the validation loss is {val:.3g}, {gap:.0%} above the training loss, has risen "
        f"{rises} times in a row and was best at step {since}, with {best:.3g}",
        "stop at the best validation loss; more data or augmentation; weight decay; dropout; a "
        "smaller model",
    )


DIAGNOSIS = Diagnosis(
    name="overfitting",
    reads=("loss_val", "generalisation_gap"),
    examine=examine,
    threshold="(val − train) / train above 0.1 while the validation loss rises 3 times in a row",
    source="Amazon SageMaker Debugger's rule Overfit has the ratio 0.1; the rises are added",
)
