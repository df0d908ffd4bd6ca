"""The alarms of gradcheck on functions that count as right: at most 8, each torch's own, with a reproduction."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Alarm:
    """What is wrong, and a function that shows it in plain torch: true while torch is so."""

    why: str
    holds: Callable[[], bool]


def _hardsigmoid() -> bool:
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.hardsigmoid(x), x)
    return abs(float(slope) - 1 / 6) > 1e-9


KNOWN: dict[str, Alarm] = {
    "F.hardsigmoid": Alarm("the slope 1/6 is rounded to float32: off by 5e-9", _hardsigmoid),
}
