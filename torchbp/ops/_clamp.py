"""The slope of max(u, bound) and min(u, bound) where u is the bound: that of torch's ``clamp``, or always 0.

Torch's was 1 until 2.13, and is 0 from 2.14 on: the subgradient of least norm, as relu's and hardtanh's
(pytorch#184572). ``above`` and ``below`` are for a loss that is torch's clamp; ``clipped`` is for a formula that is
differentiated again, where the slope is that of torch's own second derivatives, which has been 0 all along.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["above", "below", "clipped"]

_passes_at_bound = torch.__version__ < "2.14"  # a TorchVersion, which knows order

above: Callable[[Any, Any], Any] = operator.ge if _passes_at_bound else operator.gt
below: Callable[[Any, Any], Any] = operator.le if _passes_at_bound else operator.lt


def clipped(u: Tensor, low: float, high: float) -> Tensor:
    """Return min(max(u, low), high), with slope 0 at the bounds in every torch."""
    return F.hardtanh(u, low, high)
