"""What was heard of the layers in a forward and its backward, until it is measured.

Small tensors are kept until the backward ends and measured together: a call a layer would cost more than
the measuring. Large ones are measured at once, on part of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchbp.monitor._bundle import Bundle
from torchbp.monitor._quantity import Quantity
from torchbp.monitor._registry import all_quantities
from torchbp.monitor._row import Row

__all__ = ["Forward", "Heard"]

_SMALL = 1 << 16  # elements of a tensor, and what a large one is thinned to
_KEPT = 1 << 20  # elements kept in all
_STEPS = 5  # time steps that make a sequence
_WINDOW_SAMPLES, _WINDOW_STEPS = 1024, 10


@dataclass
class Forward:
    """A forward pass of the model.

    Attributes:
        row: Its step.
        batch: Length of the first tensor that the model, or its first layer, was called with.
        last: The layer that ran last.
        told: Layers whose activation was seen.
        ran: Layers that ran outside a backward.
        calls: How often each layer ran.
        over: Whether the model has returned.
    """

    row: Row
    batch: int = 0
    last: int | None = None
    told: set[int] = field(default_factory=set)
    ran: set[int] = field(default_factory=set)
    calls: dict[int, int] = field(default_factory=dict)
    over: bool = False


@dataclass
class _Delta:
    """The gradient of an output of a layer, at its ``call``-th call; ``first``: its output proper."""

    forward: Forward
    place: int
    call: int
    first: bool
    value: Tensor


class Heard:
    """Measures what is heard, into the row it belongs to."""

    def __init__(self) -> None:
        quantities = all_quantities().values()
        self._error = next(q for q in quantities if q.at == "error")
        self._outputs = [q for q in quantities if q.at == "output"]
        self._activations = [q for q in quantities if q.at == "activation"]
        (self._units,) = (q for q in quantities if q.at == "units")
        self._deltas: list[_Delta] = []
        self._functions: list[tuple[Row, int, str, Tensor, int]] = []
        self._kept = 0
        self._windows: dict[tuple[int, ...], tuple[Tensor, int, int]] = {}

    def forget(self) -> None:
        """Drop what no backward has followed."""
        self._deltas, self._functions, self._kept = [], [], 0

    def settle(self) -> None:
        """Measure what was kept."""
        if not self._kept:
            return
        deltas, functions = self._deltas, self._functions
        self.forget()
        with torch.no_grad():
            devices: dict[torch.device, list[_Delta]] = {}
            for delta in deltas:
                devices.setdefault(delta.value.device, []).append(delta)
            for found in devices.values():
                self._measure_deltas(found)
            alike: dict[Any, list[tuple[int, Tensor]]] = {}
            for row, place, function, output, version in functions:
                if output._version == version:  # noqa: SLF001  # else it was overwritten since
                    key = id(row), function, output.shape, output.dtype, output.device
                    alike.setdefault(key, []).append((place, output))
            rows = {id(row): row for row, *_ in functions}
            for (row, function, *_), outputs in alike.items():
                places = tuple(place for place, _ in outputs)
                stack = torch.stack([output for _, output in outputs])
                self._measure_functions(rows[row], places, function, stack)

    # ---------------------------------------------------------------------------- error signals
    def delta(self, forward: Forward, place: int, call: int, first: bool, value: Tensor) -> None:
        """Take the gradient of a layer's output."""
        delta = _Delta(forward, place, call, first, value)
        if self._keeps(value):
            self._deltas.append(delta)
        elif first:
            delta.value = _thinned(value)
            with torch.no_grad():
                self._measure_deltas([delta])

    def times(self, row: Row, place: int, value: Tensor, dim: int) -> None:
        """Take the gradient of a sequence that a recurrent layer was called with."""
        if value.shape[dim] >= _STEPS:
            with torch.no_grad():
                others = [d for d in range(value.ndim) if d != dim]
                norms = torch.linalg.vector_norm(value, dim=others, dtype=torch.float64)
            row.times.append((place, norms))

    def _measure_deltas(self, deltas: Sequence[_Delta]) -> None:
        values = _measured(self._error, Bundle([d.value for d in deltas]))
        by_row: dict[int, list[int]] = {}
        for index, delta in enumerate(deltas):
            by_row.setdefault(id(delta.forward.row), []).append(index)
        for indices in by_row.values():
            chosen = [i for i in indices if deltas[i].first]
            mine = [deltas[i] for i in chosen]
            part = values if len(chosen) == len(deltas) else values[chosen]
            batches = [d.forward.batch or 1 for d in mine]
            row = mine[0].forward.row
            row.add(
                self._error.name,
                ([d.place for d in mine], part, batches, [d.value.numel() for d in mine]),
            )
        if len(deltas) >= _STEPS:
            _add_times(deltas, values)

    # ------------------------------------------------------------------ outputs and activations
    def output(self, row: Row, place: int, output: Tensor) -> None:
        """Take a layer's output."""
        if not row.rare:
            return
        with torch.no_grad():
            output = _thinned(output.detach())
            for quantity in self._outputs:
                total = _measured(quantity, output).reshape(1)
                row.add(quantity.name, ([place], total, [1.0], [output.numel()]))

    def function(self, row: Row, place: int, function: str, output: Tensor) -> None:
        """Take the output of the activation behind a layer."""
        output = output.detach()
        if self._keeps(output):
            self._functions.append((row, place, function, output, output._version))  # noqa: SLF001
            return
        with torch.no_grad():
            self._measure_functions(row, (place,), function, _thinned(output).unsqueeze(0))

    def _measure_functions(
        self, row: Row, places: tuple[int, ...], function: str, outputs: Tensor
    ) -> None:
        size = outputs[0].numel()
        for quantity in self._activations:
            totals = _measured(quantity, outputs, function)
            if totals is not None:
                ones = [1.0] * len(places)
                row.add(quantity.name, (places, totals, ones, [size] * len(places)))
        alive = _measured(self._units, outputs, function)
        if alive is not None:
            if len(set(places)) < len(places):  # a layer that ran several times
                places, alive = _joined(places, alive)
            self._note_units(row, places, alive, size // max(alive.shape[1], 1))

    def _note_units(self, row: Row, places: tuple[int, ...], alive: Tensor, samples: int) -> None:
        before, seen, steps = self._windows.get(places, (alive, 0, 0))
        if before.shape != alive.shape:
            before, seen, steps = alive, 0, 0
        alive, seen, steps = before | alive, seen + samples, steps + 1
        self._windows[places] = (alive, seen, steps)
        if seen >= _WINDOW_SAMPLES and steps >= _WINDOW_STEPS:
            dead = (~alive).sum(1, dtype=torch.float32)
            ones, units = [1.0] * len(places), [alive.shape[1]] * len(places)
            row.add(self._units.name, (places, dead, ones, units))
            del self._windows[places]

    def _keeps(self, tensor: Tensor) -> bool:
        size = tensor.numel()
        if size > _SMALL or self._kept + size > _KEPT:
            return False
        self._kept += size
        return True


def _measured(quantity: Quantity, *values: Any) -> Any:
    assert quantity.measure is not None
    return quantity.measure(*values)


def _thinned(tensor: Tensor) -> Tensor:
    """Return every k-th of the batch of a large tensor: a batch's samples are drawn alike."""
    size = tensor.numel()
    if size <= _SMALL or tensor.ndim < 2:
        return tensor
    return tensor[:: min(-(-size // _SMALL), tensor.shape[0])]


def _joined(places: tuple[int, ...], alive: Tensor) -> tuple[tuple[int, ...], Tensor]:
    found: dict[int, Tensor] = {}
    for place, units in zip(places, alive, strict=True):
        found[place] = found[place] | units if place in found else units
    return tuple(found), torch.stack(list(found.values()))


def _add_times(deltas: Sequence[_Delta], values: Any) -> None:
    """Lay what came back to the calls of one layer side by side: it ran once a time step."""
    layers: dict[tuple[int, int], dict[int, list[int]]] = {}
    for index, delta in enumerate(deltas):
        key = id(delta.forward), delta.place
        layers.setdefault(key, {}).setdefault(delta.call, []).append(index)
    for (_, place), calls in layers.items():
        if len(calls) < _STEPS:
            continue
        ordered = [calls[call] for call in sorted(calls)]
        width = max(map(len, ordered))  # an LSTM cell has two outputs
        columns = [[c[min(k, len(c) - 1)] for c in ordered] for k in range(width)]
        row = deltas[ordered[0][0]].forward.row
        squares = sum(values[column] ** 2 for column in columns)
        row.times.append((place, squares**0.5))
