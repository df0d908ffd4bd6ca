"""Whether autocast is on for a kind of device."""

import torch

__all__ = ["autocasts"]


def autocasts(device: str) -> bool:
    """Whether autocast is on for ``device``; torch raises where it is asked of meta tensors, which have no values."""
    return device != "meta" and torch.is_autocast_enabled(device)
