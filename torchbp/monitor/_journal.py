"""What is written to the run's folder: vectors for the tab, and little else for the stock tabs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from torchbp.monitor._diagnosis import Layers, Reading, Verdict
from torchbp.monitor._quantity import Quantity
from torchbp.monitor._registry import all_diagnoses, all_quantities

if TYPE_CHECKING:
    from torchbp.tensorboard import EventWriter, Layout

__all__ = ["Journal"]

_EVERY_STEP = frozenset({"gradient_norm", "loss_train", "loss_val", "global_gradient_norm"})
_INTERVAL = 50
_FLOOR = 1e-45  # log10 of 0 is drawn here, below every float32
_ROWS = 50  # of the table of verdicts
_GRAVITY = ("alert", "warning", "info")
_CHARTS = {
    "training": {
        "loss": ["loss/train", "loss/val"],
        "gradient norm of the model, log10": ["run/global_gradient_norm_log10"],
        "gap between validation and training loss": ["run/generalisation_gap"],
    },
    "optimizer": {
        "learning rate": ["run/learning_rate"],
        "gradient norm after clipping / before": ["run/clip_coefficient"],
        "skipped steps": ["run/skipped"],
    },
    "cost": {
        "time of a step, seconds": ["run/step_time"],
        "share of the monitor": ["run/monitor_share"],
    },
}


class Journal:
    """Writes readings and verdicts.

    Args:
        writer: The event file.
        about: What the run was made with.
    """

    def __init__(
        self, writer: "EventWriter", about: Mapping[str, bool | float | str] | None = None
    ) -> None:
        from torchbp.tensorboard import Layout, with_absent

        self._writer = writer
        self._make_layout, self._with_absent = Layout, with_absent
        self._about = about
        self._layouts: dict[tuple[str, int], Layout] = {}
        self._said: list[Verdict] = []
        self._judged = False
        self._range: tuple[np.ndarray, np.ndarray, int] | None = None

    def write(self, readings: Iterable[Reading]) -> None:
        """Write what was measured at some steps, in one go."""
        with self._writer.together():
            for reading in readings:
                self._write(reading)

    def _write(self, reading: Reading) -> None:
        self._introduce(reading)
        for name, values in reading.values.items():
            quantity = all_quantities().get(name)
            if quantity is None or quantity.axis == "run":
                if quantity is None or reading.sampled or name in _EVERY_STEP:
                    self._scalar(name, quantity, reading, float(values[0]))
            elif reading.sampled or name in _EVERY_STEP:
                layout = self._layout(quantity, reading.layers, len(values))
                present = reading.present.get(name)
                kept = values if present is None else self._with_absent(values, present)
                self._writer.vector(layout, reading.step, kept, when=reading.when)
                if quantity.axis == "layer" and reading.rare:
                    self._histogram(quantity, reading, values)
        if reading.sampled and "learning_rate" in reading.values:
            rate = float(reading.values["learning_rate"][0])
            about = "learning rate of the first parameter group"
            self._writer.scalar(
                "run/learning_rate", reading.step, rate, help=about, when=reading.when
            )
        self._extremes(reading)

    def _introduce(self, reading: Reading) -> None:
        """Write what the run was made with, once, when the batch is known."""
        if self._about is None:
            return
        about = dict(self._about)
        if "batch" in reading.values:
            about["batch_size"] = float(reading.values["batch"][0])
        self._about = None
        self._writer.record("run", reading.step, about)
        self._writer.hyperparameters(about, reading.step)
        self._writer.charts(_CHARTS, reading.step)

    def _scalar(self, name: str, quantity: Quantity | None, reading: Reading, value: float) -> None:
        tag, shown = _scalar(name, quantity, value)
        about = quantity.title if quantity else ""
        self._writer.scalar(tag, reading.step, shown, help=about, when=reading.when)

    def _histogram(self, quantity: Quantity, reading: Reading, values: np.ndarray) -> None:
        tag, about = f"layers/{quantity.name}", f"{quantity.title}; all layers together"
        if quantity.logarithm:
            tag, about = f"{tag}_log10", f"log10 of the {about}"
            values = np.log10(np.maximum(values, _FLOOR))
        self._writer.histogram(tag, reading.step, values, help=about, when=reading.when)

    def _extremes(self, reading: Reading) -> None:
        """Keep the largest and smallest gradient norm of every layer, and write them now and then."""
        norms = reading.values.get("layer_gradient_norm")
        if norms is None:
            return
        same = self._range is not None and self._range[0].shape == norms.shape
        high, low, count = self._range if same and self._range is not None else (norms, norms, 0)
        self._range = (np.maximum(high, norms), np.minimum(low, norms), count + 1)
        if count + 1 >= _INTERVAL:
            quantity = all_quantities()["layer_gradient_norm"]
            layout = self._layout(quantity, reading.layers, len(norms))
            for kind, values in zip(("max", "min"), self._range[:2], strict=True):
                self._writer.vector(layout, reading.step, values, kind=kind, when=reading.when)
            self._range = None

    def verdicts(self, step: int, verdicts: Sequence[Verdict]) -> None:
        """Write what has changed of the verdicts; and the table for people, where anything has."""
        known = len(self._said)
        changes = [
            [i, _told(v)] for i, v in enumerate(verdicts) if i >= known or v != self._said[i]
        ]
        if changes or not self._judged:
            self._judged, self._said = True, list(verdicts)
            self._writer.record("verdicts", step, changes)
            self._writer.text("verdicts", step, _table(verdicts))

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _layout(self, quantity: Quantity, layers: Layers, size: int) -> "Layout":
        key = (quantity.name, id(layers))
        if key not in self._layouts:
            names = tuple(f"group {i}" for i in range(size))
            kinds: tuple[str, ...] = ()
            if quantity.axis == "layer":
                names, kinds = layers.names, layers.kinds
            elif quantity.axis == "estimate":
                names = ("value", "low", "high")
            elif quantity.axis == "parameter":
                names = layers.parameters
            self._layouts[key] = self._make_layout(
                quantity.name,
                quantity.axis,
                names,
                kinds,
                quantity.unit,
                quantity.title,
                quantity.logarithm,
            )
        return self._layouts[key]


def _scalar(name: str, quantity: Quantity | None, value: float) -> tuple[str, float]:
    if quantity is None:
        return name, value
    if name.startswith("loss_"):
        return f"loss/{name.removeprefix('loss_')}", value
    if quantity.logarithm:
        return f"run/{name}_log10", float(np.log10(max(value, _FLOOR)))
    return f"run/{name}", value


def _told(verdict: Verdict) -> dict[str, Any]:
    reads = next((d.reads for d in all_diagnoses() if d.name == verdict.kind), ())
    return asdict(verdict) | {"quantities": reads}


def _table(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return "Nothing is wrong so far."
    worst = sorted(
        verdicts, key=lambda v: (v.until is not None, _GRAVITY.index(v.severity), v.step)
    )
    rows = ["| | what | where | since step | until | measured | try |", "|-|-|-|-|-|-|-|"]
    rows += [
        f"| {v.severity} | **{v.kind}** | `{_cell(v.layer or 'the run')}` | {v.step} | "
        f"{'' if v.until is None else v.until} | {_cell(v.evidence)} | {_cell(v.advice)} |"
        for v in worst[:_ROWS]
    ]
    if len(worst) > _ROWS:
        rows.append(f"\nand {len(worst) - _ROWS} more")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
