"""The one form of an argument error's message: ``op: expected <rule>, got <value>; <what to do>``."""

from torch import Tensor

__all__ = ["shape", "wrong"]


def wrong(op: str, expected: str, got: object, advice: str) -> str:
    """Return the message of an argument error."""
    return f"{op}: expected {expected}, got {got}; {advice}"


def shape(tensor: Tensor) -> str:
    """Return a tensor's shape as it is written in a message."""
    return str(tuple(tensor.shape))
