"""What a call of the function under test gives, and the count of all calls."""

import time
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from torchbp.verify.raised import PastDeadline

__all__ = ["Calls", "Plain"]


class Plain(NamedTuple):
    """Forward and backward as everybody runs them: what other ways of running are compared with."""

    outputs: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]


@dataclass
class Calls:
    """How often the function was called, its variants counted in; and until when it may be."""

    forward: int = 0
    backward: int = 0
    until: float = float("inf")  # on the clock of time.perf_counter
    asked: str = ""  # an input of which forward itself asked a gradient that nobody wanted
    accumulates: bool = False  # whether backward leaves gradients in `.grad`, and returns none

    def count(self, *, forward: int = 0, backward: int = 0) -> None:
        """Count a call that is about to be made; raise :class:`PastDeadline` where none may."""
        if time.perf_counter() > self.until:
            raise PastDeadline
        self.forward += forward
        self.backward += backward
