"""Overfitting: the validation loss rises while it is already well above the training loss."""

from collections import deque
from collections.abc import Iterator
from itertools import pairwise

from torchbp.monitor._diagnosis import Diagnosis, Reading, Suspicion

__all__ = ["DIAGNOSIS"]

_GAP, _RISES, _RISE = 0.1, 3, 1.05


def examine(reading: Reading) -> Iterator[Suspicion]:
    """Yield at most one suspicion, for the run."""
    val = float(reading.values["loss_val"][0])
    gap = float(reading.values["generalisation_gap"][0])
    memory = reading.memory
    recent = memory.setdefault("recent", deque(maxlen=2 * _RISES))
    recent.append(val)
    if val <= memory.get("best", (val, 0))[0]:
        memory["best"] = (val, reading.step)
    best, since = memory["best"]
    rises = _rises(list(recent))
    if gap <= _GAP or val <= 1.02 * best:
        return
    yield Suspicion(
        "warning" if rises else None,
        "",
        f"the validation loss is {val:.3g}, {gap:.0%} above the training loss; it was "
        f"best at step {since}, with {best:.3g}",
        "stop at the best validation loss; more data or augmentation; weight decay; dropout; a "
        "smaller model",
    )


def _rises(recent: list[float]) -> bool:
    """Whether the loss rose three times in a row, or on average over twice three evaluations."""
    last = recent[-_RISES - 1 :]
    if len(last) == _RISES + 1 and all(a < b for a, b in pairwise(last)):
        return True
    if len(recent) < 2 * _RISES:
        return False
    return sum(recent[_RISES:]) > _RISE * sum(recent[:_RISES])


DIAGNOSIS = Diagnosis(
    name="overfitting",
    reads=("loss_val", "generalisation_gap"),
    examine=examine,
    threshold="(val − train) / train above 0.1 while the validation loss rises 3 times in a row, or by 5 % "
    "from the mean of three evaluations to that of the next three",
    source="Amazon SageMaker Debugger's rule Overfit has the ratio 0.1; the rises are added",
)
