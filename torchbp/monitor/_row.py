"""What one step leaves behind on the device, until a drain brings it to the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Part", "Pieces", "Row"]

# Indices of the parameters and their values ``(n,)``, one piece a device; in numpy where it is the CPU.
Pieces = list[tuple[tuple[int, ...], "Tensor | NDArray[np.floating[Any]]"]]

# Of some layers: their places, what was measured ``(n,)``, what to multiply it by, and the numbers of elements.
Part = tuple[
    Sequence[int], "Tensor | NDArray[np.floating[Any]]", Sequence[float], "Sequence[int] | Tensor"
]


@dataclass(slots=True)
class Row:
    """One step, in the order in which parameters and layers are registered.

    Attributes:
        step: The step.
        when: Wall time at its end, in seconds since 1970.
        sampled: Whether the layers were listened to.
        rare: Whether what is measured rarely is measured.
        backwards: Number of backward passes so far.
        parameters: By quantity, what was measured of the parameters.
        layers: By quantity, what was measured of the layers, in parts.
        times: By layer, what came back to it at each time step ``(T,)``; one a backward.
        earlier: Gradients that a later backward of the same step replaced.
        unreduced: Of this rank alone, norms of the gradients before DDP reduces them.
        ran: The layers that ran with autograd; None where that is not known.
        frozen: The layers that learn no more.
        unowned: The layers that no optimizer has.
        scale: What the loss was multiplied by (GradScaler).
        host: Numbers known to the host, or 0-d tensors.
    """

    step: int
    sampled: bool = False
    rare: bool = False
    when: float = 0.0
    backwards: int = 0
    parameters: dict[str, Pieces] = field(default_factory=dict)
    layers: dict[str, list[Part]] = field(default_factory=dict)
    times: list[tuple[int, "Tensor | NDArray[np.floating[Any]]"]] = field(default_factory=list)
    earlier: list[Pieces] = field(default_factory=list)
    unreduced: Pieces = field(default_factory=list)
    ran: set[int] | None = None
    frozen: frozenset[int] = frozenset()
    unowned: frozenset[int] = frozenset()
    scale: Tensor | None = None
    host: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What rows have in common that make one table. One of several backwards stands apart."""
        apart = self.earlier or self.unreduced
        parameters = tuple(
            (name, tuple([id(indices) for indices, _ in pieces]))
            for name, pieces in self.parameters.items()
        )
        host = tuple([(n, len(v)) if isinstance(v, list) else n for n, v in self.host.items()])
        step = self.step if apart else None
        return self.sampled, self.rare, parameters, tuple(self.layers), host, step

    def add(self, quantity: str, part: Part) -> None:
        """Add what was measured of some layers."""
        self.layers.setdefault(quantity, []).append(part)

    def absorb(self, later: "Row") -> None:
        """Take over what was seen of the layers since."""
        for quantity, parts in later.layers.items():
            self.layers.setdefault(quantity, []).extend(parts)
        self.times += later.times
        if later.ran is not None:
            self.ran = later.ran | (self.ran or set())
        later.layers, later.times = {}, []
