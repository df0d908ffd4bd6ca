"""Whether a loss jumps, at next to no cost: one number at a time, against a running mean."""

from math import isfinite

__all__ = ["Jump"]

_MEMORY, _DEVIATIONS, _PART = 50, 6.0, 0.1


class Jump:
    """Remembers the mean of about 50 losses and their mean deviation from it."""

    def __init__(self) -> None:
        self._seen = 0
        self._mean = self._deviation = 0.0

    def note(self, loss: float) -> bool:
        """Take a loss; return whether it lies far above those before, or is not finite."""
        if not isfinite(loss):
            return True
        away = loss - self._mean
        far = self._seen >= _MEMORY and away > (
            _DEVIATIONS * self._deviation + _PART * abs(self._mean)
        )
        self._seen += 1
        part = 1 / min(self._seen, _MEMORY)
        self._mean += part * away
        if self._seen > 1:
            self._deviation += part * (abs(away) - self._deviation)
        return far
