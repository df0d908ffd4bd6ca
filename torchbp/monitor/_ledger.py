"""The rows that wait for a drain, and what the loop logs beside them, each number with its step."""

import time
from typing import Any

from torch import Tensor

from torchbp.monitor._diagnosis import Moment
from torchbp.monitor._row import Row
from torchbp.monitor.capture import Capture

__all__ = ["Ledger", "number"]


def number(name: str, value: Tensor | float) -> Tensor | float:
    """Return ``value`` as a number, or a copy of a tensor that would have to be waited for.

    Raises:
        ValueError: It is a tensor of more than one element.
    """
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        message = (
            f"log: expected one number for {name!r}, got shape {tuple(value.shape)}; "
            "reduce it, e.g. by .mean()"
        )
        raise ValueError(message)
    return value.item() if type(value) is Tensor and value.is_cpu else value.detach().clone()


class Ledger:
    """Keeps rows in the order of their steps.

    Args:
        capture: Knows the step under way.

    Attributes:
        rows: The rows.
        latest: The last of them, also when it has been taken out.
        between: Training losses of steps that are not read.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self.rows: list[Row] = []
        self.latest: Row | None = None
        self.between: list[Moment] = []
        self._logged: dict[str, Any] = {}  # for the row that comes next
        self._early: set[str] = set()  # what is logged before the step that it belongs to has ended

    def add(self, row: Row) -> None:
        """Add the row of a step that has ended."""
        row.host.update(self._logged)
        self._logged = {}
        self.rows.append(row)
        self.latest = row

    def log(self, name: str, value: Tensor | float) -> None:
        """Note a number of the step under way, or of the last step if it comes after it."""
        capture, latest = self._capture, self.latest
        known = name == "loss_train" and not isinstance(value, Tensor) and not capture.reading
        if known and latest is not None and latest.step + 1 < capture.step:
            self.between.append((capture.step, time.time(), float(value)))  # no row for so little
            return
        step = self._step_of(name)
        if step == capture.awaited:
            self._logged[name] = value
        else:
            self._row_at(step).host[name] = value

    def take_out(self, keep: int) -> tuple[list[Row], list[Moment]]:
        """Return the rows but for the last ``keep``, and what came between."""
        rows = self.rows[: len(self.rows) - keep]
        late = self._capture.knows_optimizers and "loss_train" in self._early
        between = [(step - (not late), when, loss) for step, when, loss in self.between]
        del self.rows[: len(rows)]
        self.between = []
        return rows, between

    def _step_of(self, name: str) -> int:
        """Return which step something that is logged now belongs to: that under way, or the last.

        One that is not read doesn't show whether its backward is over; then it is as at others.
        """
        capture, last = self._capture, self.latest
        step, before = capture.step, max(capture.step - 1, capture.first)
        if not capture.knows_optimizers:
            return before
        known = last is not None and last.step == step - 1 and name in last.host
        if known or capture.row.backwards:
            self._early.add(name)
        elif capture.reading:
            self._early.discard(name)
        return step if name in self._early else before

    def _row_at(self, step: int) -> Row:
        """Return the row of a step; where it was not read, one for what is logged alone."""
        if not self.rows or self.rows[-1].step != step:
            self.latest = Row(step, when=time.time())
            self.rows.append(self.latest)
        return self.rows[-1]
