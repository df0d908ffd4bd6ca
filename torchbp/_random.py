"""The random state: of the CPU, and of every GPU in use."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

__all__ = ["forked", "states"]


def forked() -> AbstractContextManager[None]:
    """Put the state back at the end. torch's own ``fork_rng()`` warns where there are several GPUs."""
    return torch.random.fork_rng(devices=_devices())


def states() -> list[Tensor]:
    """Return the state of each generator that ``torch.manual_seed`` seeds; no device is waited for."""
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, _devices())]


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
