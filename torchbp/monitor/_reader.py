"""From sums on the host to a reading: every quantity finished, in the order in which layers run."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Layers, Reading
from torchbp.monitor._harvest import Sums
from torchbp.monitor._registry import all_quantities

__all__ = ["Reader"]


class Reader:
    """Finishes quantities. Keeps what those that look back at earlier steps remember."""

    def __init__(self) -> None:
        self._memories: dict[str, dict[str, Any]] = {}
        self._quantities = all_quantities()
        self._derived = [q for q in self._quantities.values() if q.at == "derived"]

    def read(
        self, sums: Sums, layers: Layers, order: NDArray[np.int64], columns: NDArray[np.int64]
    ) -> Reading:
        """Return the reading of one step.

        Args:
            sums: What was measured, in the order of registration.
            layers: The layers as they run.
            order: Where each of these layers stands by registration.
            columns: Where each of these parameters does.
        """
        quantities = self._quantities
        values: dict[str, NDArray[np.float64]] = {}
        present: dict[str, NDArray[np.bool_]] = {}
        for name, totals in sums.parameters.items():
            finish = quantities[name].finish
            assert finish is not None
            values[name] = finish(totals[columns], layers.sizes)
        for name, (totals, counts) in sums.layers.items():
            finish = quantities[name].finish
            assert finish is not None
            there = counts[order] > 0
            values[name] = np.where(there, finish(totals, counts)[order], np.nan)
            present[name] = there
        values.update(sums.host)
        row = sums.row
        reading = Reading(
            row.step, values, present, layers, row.when, row.sampled, row.rare, _times(sums, order)
        )
        for quantity in self._derived:
            reading.memory = self._memories.setdefault(quantity.name, {})
            assert quantity.finish is not None
            derived = quantity.finish(reading)
            if derived is not None:
                values[quantity.name] = derived
        return reading


def _times(sums: Sums, order: NDArray[np.int64]) -> dict[int, NDArray[np.float64]]:
    """Return the time steps by layer as it runs; of several backwards those of the longest together."""
    places = {int(place): index for index, place in enumerate(order)} if sums.times else {}
    found: dict[int, NDArray[np.float64]] = {}
    for place, norms in sums.times:
        before = found.get(places[place])
        if before is None or len(norms) > len(before):
            found[places[place]] = norms
        elif len(norms) == len(before):
            found[places[place]] = np.hypot(before, norms)
    return found
