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

    What is measured on a device are sums over elements. Sums add up over the shards of a tensor,
    over ranks and over the micro-batches of a step; ``finish`` makes the quantity of them.

    Attributes:
        name: The name in files and in ``Reading.values``.
        title: What a chart of it is called.
        unit: The unit of its values.
        axis: What an entry of its vector stands for; ``"run"`` for one number a step,
            ``"estimate"`` for value, low and high.
        at: Where it is measured:
            ``"gradient"``: the gradients of all parameters, final and before clipping;
            ``"stepped"``: the same as the optimizer sees them, after clipping;
            ``"weight"``: the parameters before the update;
            ``"update"``: what the optimizer added to them;
            ``"error"``: the gradient of a layer's output;
            ``"output"``: a layer's output;
            ``"activation"``, ``"units"``: the output of the activation behind a layer;
            ``"derived"``: on the host, from other quantities;
            ``"host"``: a number that the training loop or the optimizer knows.
        measure: On the device, without synchronisation.
            Of parameters, of ``"error"`` and ``"output"``: a bundle of n dense tensors -> ``(n,)``, or a table
            of R rows of them -> ``(R, n)``.
            For ``"activation"``: n outputs of one shape ``(n, N, *)`` and the function's name ->
            ``(n,)``, or None where it doesn't apply; for ``"units"`` the same -> bool ``(n, units)``.
        finish: On the host, in numpy float64: ``(sums, counts)`` -> values; for ``"derived"``:
            ``(values, layers)`` of R steps -> ``(R, n)``, or ``(reading)`` -> ``(n,)`` where it
            ``looks_back``; None where it can't be had.
        logarithm: Stock charts show log10 of it.
        power: The host raises what was measured to it before it adds up: one operation less on the
            device.
        looks_back: ``finish`` takes one reading after the other, and may remember.
        often: ``"every step"``, ``"sampled"``, or ``"rarely"``: every fifth sampled step.
    """

    name: str
    title: str
    unit: str
    axis: Literal["parameter", "layer", "group", "estimate", "run"]
    at: Literal[
        "gradient",
        "stepped",
        "weight",
        "update",
        "error",
        "output",
        "activation",
        "units",
        "derived",
        "host",
    ]
    measure: Callable[..., Any] | None = None
    finish: Callable[..., Any] | None = None
    logarithm: bool = False
    power: int = 1
    looks_back: bool = False
    often: Literal["every step", "sampled", "rarely"] = "sampled"

    def is_due(self, sampled: bool, rare: bool) -> bool:
        """Whether it is measured at a step that is ``sampled``, or even ``rare``."""
        return {"every step": True, "sampled": sampled, "rarely": rare}[self.often]


def precise(tensor: Tensor) -> torch.dtype:
    """Return the dtype to sum in. Squares below 1e-45 are 0 in float32; some devices have no more."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
