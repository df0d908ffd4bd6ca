"""Many tensors measured at once: small ones as one flat array, others by foreach calls."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchbp.monitor._packing import Packed

__all__ = ["Bundle"]


class Bundle:
    """Dense tensors of one device.

    Args:
        tensors: The tensors; none where they are packed.
        packed: The array that holds them.

    Attributes:
        tensors: The tensors.
        packed: The array, or None.
    """

    def __init__(self, tensors: Sequence[Tensor], packed: Packed | None = None) -> None:
        self.tensors, self.packed = list(tensors), packed

    def kept(self) -> "Bundle":
        """Return what stays as it is when the tensors change. An array is a copy already."""
        return Bundle([t.clone() for t in self.tensors], self.packed)

    def away(self, from_: "Bundle") -> "Bundle":
        """Return ``from_ - self``, of the same shapes, in place of ``from_``."""
        if self.packed is not None and from_.packed is not None:
            from_.packed.values -= self.packed.values
        else:
            torch._foreach_sub_(from_.tensors, self.tensors)
        return from_
