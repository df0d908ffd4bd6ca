"""What is written to the run's folder: vectors for the tab, and little else for the stock tabs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from torchbp.monitor._diagnosis import Layers, Reading, Verdict
from torchbp.monitor._quantity import Quantity
from torchbp.monitor._registry import all_quantities

if TYPE_CHECKING:
    from torchbp.tensorboard import EventWriter, Layout

__all__ = ["Journal"]

_FLOOR = 1e-45  # log10 of 0 is drawn here, below every float32


class Journal:
    """Writes readings and verdicts.

    Args:
        writer: The event file.
    """

    def __init__(self, writer: "EventWriter") -> None:
        self._writer = writer
        self._layouts: dict[tuple[str, int], Layout] = {}
        self._said: list[Verdict] = []

    def write(self, reading: Reading, when: float, *, chart: bool) -> None:
        """Write all that was measured at a step; ``chart``: the histograms too."""
        for name, values in reading.values.items():
            quantity = all_quantities().get(name)
            if quantity is None or quantity.axis == "run":
                tag, shown = _scalar(name, quantity, float(values[0]))
                about = quantity.title if quantity else ""
                self._writer.scalar(tag, reading.step, shown, help=about, when=when)
                continue
            layout = self._layout(quantity, reading.layers, len(values))
            self._writer.vector(layout, reading.step, values, when=when)
            if chart and quantity.axis == "layer":
                shown = np.log10(np.maximum(values, _FLOOR)) if quantity.logarithm else values
                tag = f"layers/{name}" + ("_log10" if quantity.logarithm else "")
                about = f"{quantity.title}, over all layers"
                self._writer.histogram(tag, reading.step, shown, help=about, when=when)

    def verdicts(self, step: int, verdicts: Sequence[Verdict]) -> None:
        """Write the verdicts as a table, where they have changed."""
        if list(verdicts) != self._said:
            self._said = list(verdicts)
            self._writer.text("verdicts", step, _table(verdicts))

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _layout(self, quantity: Quantity, layers: Layers, size: int) -> "Layout":
        from torchbp.tensorboard import Layout

        key = (quantity.name, id(layers))
        if key not in self._layouts:
            names = tuple(f"group {i}" for i in range(size))
            kinds: tuple[str, ...] = ()
            if quantity.axis == "layer":
                names, kinds = layers.names, layers.kinds
            elif quantity.axis == "parameter":
                names = layers.parameters
            self._layouts[key] = Layout(quantity.name, quantity.axis, names, kinds, quantity.unit)
        return self._layouts[key]


def _scalar(name: str, quantity: Quantity | None, value: float) -> tuple[str, float]:
    if quantity is None:
        return name, value
    if name.startswith("loss_"):
        return f"loss/{name.removeprefix('loss_')}", value
    if quantity.logarithm:
        return f"run/{name}_log10", float(np.log10(max(value, _FLOOR)))
    return f"run/{name}", value


def _table(verdicts: Sequence[Verdict]) -> str:
    rows = ["| | what | where | since step | until | measured | try |", "|-|-|-|-|-|-|-|"]
    rows += [
        f"| {v.severity} | **{v.kind}** | `{v.layer or 'the run'}` | {v.step} | "
        f"{'' if v.until is None else v.until} | {v.evidence} | {v.advice} |"
        for v in verdicts
    ]
    return "\n".join(rows)
