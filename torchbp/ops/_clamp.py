"""Where max(u, bound) or min(u, bound) follows u: as far as the gradient of torch's ``clamp`` passes.

At the bound itself its slope was 1 until torch 2.13, and is 0 from 2.14 on: the subgradient of least norm, as relu's
and hardtanh's (pytorch#184572). A comparison, made once, so that nothing is asked while an op is traced.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["above", "below"]

_passes_at_bound = torch.__version__ < "2.14"  # a TorchVersion, which knows order

above: Callable[[Any, Any], Any] = operator.ge if _passes_at_bound else operator.gt
below: Callable[[Any, Any], Any] = operator.le if _passes_at_bound else operator.lt
