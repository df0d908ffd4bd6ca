"""What was heard of the layers in a forward and its backward, until it is measured.

Small tensors are kept until the backward ends and measured together: a call a layer would cost more than
the measuring. Large ones are measured at once, on part of the batch.
"""

import time
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchbp.monitor._bundle import Bundle
from torchbp.monitor._packing import Packing, Shelf, small
from torchbp.monitor._quantity import Quantity
from torchbp.monitor._registry import all_quantities
from torchbp.monitor._row import Row

__all__ = ["Forward", "Heard"]

_SMALL = 1 << 16  # elements of a tensor, and what a large one is thinned to
_KEPT = 1 << 20  # elements kept in all
_SHELVES = 8
_STEPS = 5  # time steps that make a sequence
_WINDOW_SAMPLES, _WINDOW_STEPS = 1024, 10


@dataclass(slots=True)
class Forward:
    """A forward pass of the model.

    Attributes:
        row: Its step.
        shape: Of the first tensor that the model, or its first layer, was called with.
        samples: Size of the batch as a recurrent or an attention layer had it, by its ``batch_first``.
        last: The layer that ran last.
        told: Layers whose activation was seen.
        activations: What was taken for one, by its id: it may go into several layers.
        ran: Layers that ran outside a backward.
        calls: How often each layer ran.
        over: Whether the model has returned.
    """

    row: Row
    shape: tuple[int, ...] = ()
    samples: int = 0
    last: int | None = None
    told: set[int] = field(default_factory=set)
    activations: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)
    ran: set[int] = field(default_factory=set)
    calls: dict[int, int] = field(default_factory=dict)
    over: bool = False

    @property
    def batch(self) -> int:
        """Size of the batch; 0 where it is not known."""
        leading = self.shape[:2]
        if self.samples in leading:
            return self.samples
        return leading[0] if leading else 0


# The gradient of a layer's output: place of the layer, its how manieth call this is, whether it is its
# output proper, and the gradient.
_Delta = tuple[Forward, int, int, bool, Tensor]


class Heard:
    """Measures what is heard, into the row it belongs to.

    Attributes:
        own_time: Seconds spent while training went on, in hooks.
        windows: By layers, which of their units have been seen alive, of how many samples, in how many steps.
    """

    def __init__(self) -> None:
        self.own_time = 0.0
        quantities = all_quantities().values()
        self._error = next(q for q in quantities if q.at == "error")
        self._of_outputs = [q for q in quantities if q.at == "output"]
        self._activations = [q for q in quantities if q.at == "activation"]
        (self._units,) = (q for q in quantities if q.at == "units")
        self._deltas: list[_Delta] = []
        self._outputs: list[tuple[Row, int, Tensor]] = []
        self._functions: list[tuple[Row, int, str, Tensor, int]] = []
        self._kept = 0
        self._shelves: dict[tuple[torch.Size, ...], Shelf] = {}
        self._waiting: list[tuple[Row, tuple[int, ...], str, Tensor]] = []
        self._waits = 0
        self.windows: dict[tuple[int, ...], tuple[Tensor, int, int]] = {}

    def forget(self) -> None:
        """Drop what no backward has followed."""
        self._deltas, self._outputs, self._functions, self._kept = [], [], [], 0

    def settle(self) -> None:
        """Copy what was kept, to be measured with that of other steps."""
        if not self._kept:
            return
        deltas, outputs, functions = self._deltas, self._outputs, self._functions
        self.forget()
        with torch.no_grad():
            self._measure_deltas(deltas)
            self._measure_outputs(outputs)
            alike: dict[Any, tuple[Row, list[tuple[int, Tensor]]]] = {}
            for row, place, function, output, version in functions:
                if output._version == version:  # noqa: SLF001  # else it was overwritten since
                    key = id(row), function, output.shape, output.dtype, output.device
                    alike.setdefault(key, (row, []))[1].append((place, output))
            for (_, function, shape, _, device), (row, found) in alike.items():
                places = tuple([place for place, _ in found])
                # By cat, which copies the small tensors: a stack is another cold function.
                joined = torch.cat([output for _, output in found]).view(len(found), *shape)
                if device.type == "cpu":
                    self._waiting.append((row, places, function, joined))
                    self._waits += joined.numel()
                else:
                    self._measure_functions(row, places, function, joined)
        if self._waits > _KEPT:
            self.measure()

    def measure(self) -> None:
        """Measure what was copied."""
        for shelf in self._shelves.values():
            shelf.empty()
        waiting, self._waiting, self._waits = self._waiting, [], 0
        with torch.no_grad():
            for row, places, function, outputs in waiting:
                self._measure_functions(row, places, function, outputs)

    def _bundles(self, tensors: list[Tensor]) -> Iterator[tuple[Sequence[int], Bundle]]:
        """Yield tensors that are measured together, with their indices."""
        packed = small(tensors)
        if packed:
            shapes = tuple([tensors[i].shape for i in packed])
            shelf = self._shelves.get(shapes)  # that of the last time, as a rule
            if shelf is None:
                if len(self._shelves) == _SHELVES:
                    self.measure()
                    self._shelves.clear()
                shelf = self._shelves[shapes] = Shelf(Packing(shapes))
            order = [packed[k] for k in shelf.packing.order]
            yield order, Bundle([tensors[i] for i in order], shelf)
        if len(packed) < len(tensors):
            devices: dict[torch.device, list[int]] = {}
            for i in sorted(set(range(len(tensors))).difference(packed)):
                devices.setdefault(tensors[i].device, []).append(i)
            for order in devices.values():
                yield order, Bundle([tensors[i] for i in order])

    # ---------------------------------------------------------------------------- error signals
    def delta(
        self, forward: Forward, place: int, call: int, first: bool, value: Tensor | None
    ) -> None:
        """Take the gradient of a layer's output; None of one of several that nothing was made of."""
        if value is None:
            return
        start = time.perf_counter()
        if self._keeps(value):
            self._deltas.append((forward, place, call, first, value))
        elif first:
            with torch.no_grad():
                self._measure_deltas([(forward, place, call, first, _thinned(value))])
        self.own_time += time.perf_counter() - start

    def times(self, row: Row, place: int, value: Tensor | None, dim: int) -> None:
        """Take the gradient of a sequence that a recurrent layer was called with."""
        if value is not None and value.shape[dim] >= _STEPS:
            with torch.no_grad():
                others = [d for d in range(value.ndim) if d != dim]
                norms = torch.linalg.vector_norm(value, dim=others, dtype=torch.float64)
            row.times.append((place, norms))

    def _measure_deltas(self, deltas: list[_Delta]) -> None:
        for order, bundle in self._bundles([value for *_, value in deltas]):
            values = _measured(self._error, bundle)
            over_time = max(Counter([place for _, place, *_ in deltas]).values()) >= _STEPS
            if over_time:
                self.measure()
            rows: dict[int, tuple[Row, list[int]]] = {}
            for index, i in enumerate(order):
                forward, _, _, first, _ = deltas[i]
                if first:
                    rows.setdefault(id(forward.row), (forward.row, []))[1].append(index)
            for row, chosen in rows.values():
                mine = [deltas[order[index]] for index in chosen]
                part = values if len(chosen) == len(order) else _picked(values, chosen)
                places = [place for _, place, _, _, _ in mine]
                batches = [forward.batch or 1 for forward, _, _, _, _ in mine]
                sizes = [value.numel() for *_, value in mine]
                row.add(self._error.name, (places, part, batches, sizes))
            if over_time:
                _add_times([deltas[i] for i in order], values)

    # ------------------------------------------------------------------ outputs and activations
    def output(self, row: Row, place: int, output: Tensor) -> None:
        """Take a layer's output, where it is to be measured."""
        output = output.detach()
        if self._keeps(output):
            # A copy, for an activation in place may overwrite it.
            self._outputs.append((row, place, output.clone()))
        else:
            with torch.no_grad():
                self._measure_outputs([(row, place, _thinned(output))])

    def _measure_outputs(self, outputs: list[tuple[Row, int, Tensor]]) -> None:
        for order, bundle in self._bundles([output for *_, output in outputs]):
            mine = [outputs[i] for i in order]
            rows = dict.fromkeys(id(row) for row, *_ in mine)
            for quantity in self._of_outputs:
                values = _measured(quantity, bundle)
                for key in rows:
                    chosen = [k for k, (row, *_) in enumerate(mine) if id(row) == key]
                    places = [mine[k][1] for k in chosen]
                    sizes = [mine[k][2].numel() for k in chosen]
                    part = values if len(chosen) == len(mine) else _picked(values, chosen)
                    row = mine[chosen[0]][0]
                    row.add(quantity.name, (places, part, [1.0] * len(chosen), sizes))

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
            totals = quantity.measure(outputs, function) if quantity.measure else None
            if totals is not None:
                ones = [1.0] * len(places)
                row.add(quantity.name, (places, totals, ones, [size] * len(places)))
        alive = self._units.measure(outputs, function) if self._units.measure else None
        if alive is not None:
            if len(set(places)) < len(places):  # a layer that ran several times
                places, alive = _joined(places, alive)
            self._note_units(row, places, alive, size // max(alive.shape[1], 1))

    def _note_units(self, row: Row, places: tuple[int, ...], alive: Tensor, samples: int) -> None:
        before, seen, steps = self.windows.get(places, (alive, 0, 0))
        if before.shape != alive.shape:
            before, seen, steps = alive, 0, 0
        alive, seen, steps = before | alive, seen + samples, steps + 1
        self.windows[places] = (alive, seen, steps)
        if seen >= _WINDOW_SAMPLES and steps >= _WINDOW_STEPS:
            dead = (~alive).sum(1, dtype=torch.float32)
            ones, units = [1.0] * len(places), [alive.shape[1]] * len(places)
            row.add(self._units.name, (places, dead, ones, units))
            del self.windows[places]

    def _keeps(self, tensor: Tensor) -> bool:
        size = tensor.numel()
        if size > _SMALL or self._kept + size > _KEPT:
            return False
        self._kept += size
        return True


def _measured(quantity: Quantity, bundle: Bundle) -> Any:
    assert quantity.measure is not None
    return bundle.measured(quantity.measure)


def _picked(values: Any, indices: list[int]) -> Any:
    """Return some of ``values``. A list as an index is copied to a GPU, and the host waits for that."""
    if isinstance(values, Tensor) and not values.is_cpu:
        parts = values.unbind()
        return torch.stack([parts[i] for i in indices])
    return values[indices]


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
    for index, (forward, place, call, _, _) in enumerate(deltas):
        layers.setdefault((id(forward), place), {}).setdefault(call, []).append(index)
    for (_, place), calls in layers.items():
        if len(calls) < _STEPS:
            continue
        ordered = [calls[call] for call in sorted(calls)]
        width = max(map(len, ordered))  # an LSTM cell has two outputs
        columns = [[c[min(k, len(c) - 1)] for c in ordered] for k in range(width)]
        row = deltas[ordered[0][0]][0].row
        squares = sum(_picked(values, column) ** 2 for column in columns)
        row.times.append((place, squares**0.5))
