"""What is written to the run's folder: vectors for the tab, and little else for the stock tabs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from torchbp.monitor._diagnosis import Layers, Moment, Reading, Verdict
from torchbp.monitor._quantity import Quantity
from torchbp.monitor._reader import Block
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
        self._layouts: dict[tuple[str, int, int], Layout] = {}
        self._said: list[Verdict] = []
        self._judged = False
        self._range: tuple[Any, Any, int] | None = None

    def write(
        self, blocks: Iterable[Block], readings: Sequence[Reading], between: Sequence[Moment] = ()
    ) -> None:
        """Write what was measured at some steps, and the losses of those between, in one go."""
        others = [(step, when) for step, when, _ in between]
        moments = [(r.step, r.when) for r in readings]
        with self._writer.together(sorted(moments + others) if others else moments):
            if readings:
                self._introduce(readings[0])
            if between:
                losses = np.array([[loss] for _, _, loss in between])
                self._scalar("loss_train", others, losses)
            for block in blocks:
                self._write(block)
            self._extremes(readings)

    def _write(self, block: Block) -> None:
        first = block.readings[0]
        moments = [(r.step, r.when) for r in block.readings]
        for name, values in block.values.items():
            quantity = all_quantities().get(name)
            if quantity is None or first.sampled or name in _EVERY_STEP:
                self._quantity(name, moments, values, block.present.get(name), first.layers)
        for reading, moment in zip(block.readings, moments, strict=True):
            for name in reading.values.keys() - block.values.keys():
                values, there = reading.values[name][None], reading.present.get(name)
                present = None if there is None else there[None]
                self._quantity(name, [moment], values, present, first.layers)
            if reading.rare:
                self._histograms(reading)
        if first.sampled and "learning_rate" in block.values:
            rates = block.values["learning_rate"][:, 0]
            about = "learning rate of the first parameter group"
            self._writer.scalars("run/learning_rate", moments, rates, help=about)

    def _quantity(
        self,
        name: str,
        moments: Sequence[tuple[int, float]],
        values: np.ndarray,
        present: np.ndarray | None,
        layers: Layers,
    ) -> None:
        quantity = all_quantities().get(name)
        if quantity is None or quantity.axis == "run":
            self._scalar(name, moments, values)
        else:
            layout = self._layout(quantity, layers, values.shape[1])
            kept = values if present is None else self._with_absent(values, present)
            self._writer.vectors(layout, moments, kept)

    def _scalar(self, name: str, moments: Sequence[tuple[int, float]], values: np.ndarray) -> None:
        quantity = all_quantities().get(name)
        tag, shown = _scalar(name, quantity, values[:, 0])
        about = quantity.title if quantity else ""
        self._writer.scalars(tag, moments, shown, help=about)

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

    def _histograms(self, reading: Reading) -> None:
        for name, values in reading.values.items():
            quantity = all_quantities().get(name)
            if quantity is None or quantity.axis != "layer":
                continue
            tag, about = f"layers/{name}", f"{quantity.title}; all layers together"
            if quantity.logarithm:
                tag, about = f"{tag}_log10", f"log10 of the {about}"
            shown = np.log10(np.maximum(values, _FLOOR)) if quantity.logarithm else values
            self._writer.histogram(tag, reading.step, shown, help=about, when=reading.when)

    def _extremes(self, readings: Sequence[Reading]) -> None:
        """Keep the largest and smallest gradient norm of every layer, and write them now and then."""
        name = "layer_gradient_norm"
        there = [reading for reading in readings if name in reading.values]
        while there:
            high, low, count = self._range or (-np.inf, np.inf, 0)
            part, there = there[: _INTERVAL - count], there[_INTERVAL - count :]
            norms = np.stack([reading.values[name] for reading in part])
            high, low = np.maximum(high, norms.max(0)), np.minimum(low, norms.min(0))
            self._range = high, low, count + len(part)
            if count + len(part) == _INTERVAL:
                moment, layers = (part[-1].step, part[-1].when), part[-1].layers
                layout = self._layout(all_quantities()[name], layers, len(high))
                self._writer.vectors(layout, [moment], high[None], kind="max")
                self._writer.vectors(layout, [moment], low[None], kind="min")
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

    def periods(self, step: int, told: str) -> None:
        """Write how often is looked from now on."""
        self._writer.text("periods", step, f"{told[0].upper()}{told[1:]}.")

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _layout(self, quantity: Quantity, layers: Layers, size: int) -> "Layout":
        key = (quantity.name, id(layers), size)  # groups may be added on the way
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


def _scalar(name: str, quantity: Quantity | None, values: np.ndarray) -> tuple[str, np.ndarray]:
    if quantity is None:
        return name, values
    if name.startswith("loss_"):
        return f"loss/{name.removeprefix('loss_')}", values
    if quantity.logarithm:
        return f"run/{name}_log10", np.log10(np.maximum(values, _FLOOR))
    return f"run/{name}", values


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
