"""Many tensors measured at once: small ones as a row of a shelf, others by foreach calls."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchbp.monitor._packing import Shelf

__all__ = ["Bundle"]


class Bundle:
    """Dense tensors of one device.

    Args:
        tensors: The tensors.
        shelf: Where they are copied to, if they are to be packed.
        room: See :meth:`Shelf.put`.

    Attributes:
        tensors: The tensors, unless they are packed.
        shelf: Their shelf.
        row: Where they are on it, until it is emptied.
        filled: How often it had been emptied before.
    """

    def __init__(self, tensors: list[Tensor], shelf: Shelf | None = None, *, room: int = 1) -> None:
        self.tensors: list[Tensor] = [] if shelf is not None else list(tensors)
        self.shelf = shelf
        self.row, self.filled = (
            (0, 0) if shelf is None else (shelf.put(tensors, room=room), shelf.filled)
        )

    def measured(self, measure: Callable[..., Any]) -> Tensor | NDArray[np.floating[Any]]:
        """Return what ``measure`` finds, ``(n,)``; of a row, when its shelf has been emptied."""
        return measure(self) if self.shelf is None else self.shelf.ask(measure, self.row)

    def kept(self, buffers: list[Tensor] | None = None) -> "Bundle":
        """Return what stays as it is when the tensors change; a row is a copy already.

        ``buffers``: of tensors like these, to copy them to.
        """
        if self.shelf is not None:
            return self
        if buffers is None:
            return Bundle([t.clone() for t in self.tensors])
        torch._foreach_copy_(buffers, self.tensors)
        return Bundle(buffers)

    def minus(self, before: "Bundle") -> "Bundle | None":
        """Return the difference to ``before``, of the same shapes, or None where that is gone."""
        if self.shelf is None:
            torch._foreach_sub_(before.tensors, self.tensors)
            return before
        if before.shelf is not self.shelf or before.filled != self.filled:
            return None
        self.shelf.subtract(self.row, before.row)
        return self
