"""What is read of the gradients that a backward has left."""

import torch

from torchbp.monitor._backwards import Backwards
from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._meter import Meter
from torchbp.monitor._optimizers import Optimizers
from torchbp.monitor._row import Row

__all__ = ["Gradients"]

_KEPT_EARLIER = 64
_LOOK = 8  # readings after which it is looked again what is frozen or unowned: fewer than make a layer disconnected


class Gradients:
    """Puts their norms into rows.

    Args:
        catalogue: The parameters.
        meter: Measures them.
    """

    def __init__(self, catalogue: Catalogue, meter: Meter) -> None:
        self._catalogue, self._meter = catalogue, meter
        # Parameters whose gradients were read last, by group.
        self._found: list[tuple[int, ...]] = []
        self._present: set[int] = set()  # the same together
        self._frozen, self._unowned, self._looked = frozenset[int](), frozenset[int](), 0

    def read(
        self, row: Row, backwards: Backwards, optimizers: Optimizers, *, another: bool
    ) -> None:
        """Put the norms into ``row``, in place of those of an earlier backward.

        ``another``: this backward goes on where that one has ended; else it is a part of it.
        """
        if another:
            if row.backwards and len(row.earlier) < _KEPT_EARLIER:
                row.earlier.append(row.parameters.get("gradient_norm", []))
            row.backwards += 1
        row.parameters.clear()
        with torch.no_grad():
            groups = self._meter.gradients()
            self._meter.measure(row, "gradient", groups)
        found = [indices for indices, _ in groups]
        self._looked += 1
        if found != self._found or self._looked >= _LOOK:
            self._found, self._present = found, {index for indices in found for index in indices}
            self._looked, self._frozen = 0, self._catalogue.frozen()
            self._unowned = self._catalogue.unowned(optimizers.members())
        row.frozen, row.unowned = self._frozen, self._unowned
        if backwards.early:
            gone = backwards.gone(self._present)
            row.parameters.setdefault("gradient_norm", []).extend(gone)
        else:
            backwards.gone(self._present)
