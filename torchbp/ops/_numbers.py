"""Numbers as tensors made once: beside a tensor a Python number takes 2.8 µs, one without dimensions 1.2."""

from functools import lru_cache

import torch
from torch import Tensor

from torchbp.ops._function import fused

__all__ = ["constant", "number"]

_WIDE = (torch.float32, torch.float64)


def number(value: float, beside: Tensor) -> Tensor | float:
    """Return ``value`` as what is cheapest to compute with beside ``beside``.

    A tensor without dimensions of its dtype, which must not be written to; ``value`` itself where something
    differentiates or traces, in other dtypes than float32 and float64, and on other devices. Not for -0, which is
    equal to 0, for which a tensor may have been made before.
    """
    if beside.dtype in _WIDE and beside.is_cpu and fused(beside, half=True):
        return constant(value, beside.dtype)
    return value


@lru_cache(256)
def constant(value: float, dtype: torch.dtype) -> Tensor:
    """Return :func:`number`'s tensor, for where nothing differentiates or traces, on the CPU."""
    return torch.tensor(value, dtype=dtype, device="cpu")
