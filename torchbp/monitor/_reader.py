"""From sums on the host to readings: every quantity finished, in the order in which layers run."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Layers, Moment, Reading
from torchbp.monitor._harvest import Sums, Vector
from torchbp.monitor._registry import all_quantities

__all__ = ["Block", "Reader"]


@dataclass(frozen=True)
class Block:
    """R readings of the same quantities.

    Attributes:
        readings: In the order of their steps. Their values are rows of the tables, and what only
            some of them have besides.
        values: By quantity, ``(R, n)``.
        present: By quantity of layers, bool ``(R, L)``.
    """

    readings: list[Reading]
    values: Mapping[str, NDArray[np.float64]]
    present: Mapping[str, NDArray[np.bool_]]


class Reader:
    """Finishes quantities. Keeps what those that look back at earlier steps remember."""

    def __init__(self) -> None:
        quantities = all_quantities()
        derived = [q for q in quantities.values() if q.at == "derived"]
        self._quantities = quantities
        self._left: Sequence[Moment] = ()
        self._derived = [q for q in derived if not q.looks_back]
        self._looking_back = [q for q in derived if q.looks_back]
        self._memories: dict[str, dict[str, Any]] = {q.name: {} for q in self._looking_back}

    def read(
        self,
        found: list[Sums],
        layers: Layers,
        order: NDArray[np.int64],
        columns: NDArray[np.int64],
        between: Sequence[Moment] = (),
    ) -> tuple[list[Block], list[Reading]]:
        """Return what was measured, as blocks and as readings in the order of the steps.

        Args:
            found: The sums, in the order of registration.
            layers: The layers as they run.
            order: Where each of these layers stands by registration.
            columns: Where each of these parameters does.
            between: What was logged of steps that were not read, in the order of the steps.
        """
        blocks = [self._block(sums, layers, order, columns) for sums in found]
        placed = [
            (place, reading)
            for sums, block in zip(found, blocks, strict=True)
            for place, reading in zip(sums.places, block.readings, strict=True)
        ]
        readings = [reading for _, reading in sorted(placed, key=lambda pair: pair[0])]
        self._give([*self._left, *between], readings)
        for quantity in self._looking_back:
            memory, finish = self._memories[quantity.name], quantity.finish
            assert finish is not None
            for reading in readings:
                reading.memory = memory
                derived = finish(reading)
                if derived is not None:
                    reading.values[quantity.name] = derived
        return blocks, readings

    def _give(self, between: Sequence[Moment], readings: Sequence[Reading]) -> None:
        """Tell every reading what came between, its own step included; keep the rest for the next."""
        steps, start = [step for step, _, _ in between], 0
        for reading in readings if between else ():
            end = bisect_right(steps, reading.step, start)
            reading.between = [(step, loss) for step, _, loss in between[start:end]]
            start = end
        self._left = between[start:]

    def _block(
        self,
        sums: Sums,
        layers: Layers,
        order: NDArray[np.int64],
        columns: NDArray[np.int64],
    ) -> Block:
        quantities = self._quantities
        values: dict[str, NDArray[np.float64]] = {}
        present: dict[str, NDArray[np.bool_]] = {}
        for name, totals in sums.parameters.items():
            finish = quantities[name].finish
            assert finish is not None
            values[name] = finish(totals[:, columns], layers.sizes)
        for name, (totals, counts) in sums.layers.items():
            finish = quantities[name].finish
            assert finish is not None
            there = counts[:, order] > 0
            values[name] = np.where(there, finish(totals, counts)[:, order], np.nan)
            present[name] = there
        values.update(sums.host)
        for quantity in self._derived:
            assert quantity.finish is not None
            derived = quantity.finish(values, layers)
            if derived is not None:
                values[quantity.name] = derived
        nothing: list[tuple[()]] = [()] * len(sums.rows)
        readings = [
            Reading(
                row.step,
                dict(zip(values, parts, strict=True)),
                dict(zip(present, there, strict=True)),
                layers,
                row.when,
                row.sampled,
                row.rare,
                _times(times, order) if times else {},
                None if row.ran is None else _places(row.ran, order),
                _places(row.frozen, order) if row.frozen else row.frozen,
                _places(row.unowned, order) if row.unowned else row.unowned,
            )
            for row, times, parts, there in zip(
                sums.rows,
                sums.times,
                zip(*values.values(), strict=True),
                zip(*present.values(), strict=True) if present else nothing,
                strict=True,
            )
        ]
        return Block(readings, values, present)


def _places(layers: AbstractSet[int], order: NDArray[np.int64]) -> frozenset[int]:
    """Return layers by where they run."""
    return frozenset(k for k, place in enumerate(order.tolist()) if place in layers)


def _times(times: list[tuple[int, Vector]], order: NDArray[np.int64]) -> dict[int, Vector]:
    """Return the time steps by layer as it runs; of several backwards those of the longest together."""
    places = {int(place): index for index, place in enumerate(order)}
    found: dict[int, Vector] = {}
    for place, norms in times:
        before = found.get(places[place])
        if before is None or len(norms) > len(before):
            found[places[place]] = norms
        elif len(norms) == len(before):
            found[places[place]] = np.hypot(before, norms)
    return found
