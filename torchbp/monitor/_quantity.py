"""The record that every quantity file ends with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Quantity", "precise"]


@dataclass(frozen=True)
class Quantity:
    """What is measured, where, and in which unit.

    A measured quantity is a sum on the device, over elements: sums add up over the shards of a
    tensor, over ranks, over the micro-batches of a step. ``finish`` makes the quantity of them.

    Attributes:
        name: The name in files, verdicts and ``monitor.values``.
        title: What a chart of it is called.
        unit: The unit of its values.
        axis: What an entry of its vector stands for; ``"run"`` for one number a step.
        at: Where it is measured. ``"gradient"``: on the gradients of all parameters, once they are
            final; ``"error"``: on the gradient of a layer's output; ``"derived"``: on the host,
            from other quantities; ``"host"``: a number the training loop knows.
        measure: On the device, no synchronisation. ``"gradient"``: list of N dense tensors
            -> ``(N,)``; ``"error"``: one tensor -> 0-d.
        finish: On the host, numpy float64. ``"gradient"``: sums -> values; ``"error"``: sums and
            element counts -> values; ``"derived"``: a ``Reading`` -> values or None.
        logarithm: Stock charts show log10 of it.
    """

    name: str
    title: str
    unit: str
    axis: Literal["parameter", "layer", "group", "run"]
    at: Literal["gradient", "error", "derived", "host"]
    measure: Callable[[Any], Tensor] | None = None
    finish: Callable[..., Any] | None = None
    logarithm: bool = False


def precise(tensor: Tensor) -> torch.dtype:
    """Return the dtype to sum in: squares below 1e-45 are 0 in float32, and some devices have no more."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
