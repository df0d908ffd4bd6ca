"""What one step leaves behind on the device, until a drain brings it to the host."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Pieces", "Row"]

# Indices of the parameters and their values ``(n,)``, one piece a device.
Pieces = list[tuple[tuple[int, ...], Tensor]]


@dataclass
class Row:
    """One step, in the order in which parameters and layers are registered.

    Attributes:
        step: The step.
        when: Wall time at its end, in seconds since 1970.
        sampled: Whether the layers were listened to.
        rare: Whether what is measured rarely is measured.
        backwards: Number of backward passes so far.
        parameters: By quantity, sums.
        layers: By quantity and layer, 0-d tensors, what to multiply them by, and their numbers of
            elements.
        earlier: Gradients that a later backward of the same step replaced.
        scale: What the loss was multiplied by (GradScaler).
        host: Numbers known to the host, or 0-d tensors.
    """

    step: int
    sampled: bool = False
    rare: bool = False
    when: float = 0.0
    backwards: int = 0
    parameters: dict[str, Pieces] = field(default_factory=dict)
    layers: dict[str, dict[int, list[tuple[Tensor, float, int]]]] = field(default_factory=dict)
    earlier: list[Pieces] = field(default_factory=list)
    scale: Tensor | None = None
    host: dict[str, Any] = field(default_factory=dict)

    def add(
        self, quantity: str, place: int, total: Tensor, count: int, factor: float = 1.0
    ) -> None:
        """Add a sum over ``count`` elements of a layer."""
        parts = self.layers.setdefault(quantity, {}).setdefault(place, [])
        parts.append((total, factor, count))

    def absorb(self, later: "Row") -> None:
        """Take over what was seen of the layers since."""
        for quantity, places in later.layers.items():
            for place, parts in places.items():
                self.layers.setdefault(quantity, {}).setdefault(place, []).extend(parts)
        later.layers = {}
